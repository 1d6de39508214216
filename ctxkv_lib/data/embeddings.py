"""Where the frozen token table comes from: GPT-2's `wte`, one made from text alone, or random numbers.

No table ever replaces another silently: one that cannot be read or made is an error. The input side norms
every row, so a table's scale matters to the output head alone. Rows of the tables made here have length 1,
which gives untrained logits a variance of about 1. GPT-2's rows are four times as long.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..files import MOST_HEADER_BYTES, cache_dir, digest, read_tensors, write_tensors
from ..locks import made_once
from ..progress import progress_bar, stage
from .conversations import load_conversations
from .cooccurrence import SEED, VERSION, build_table
from .counts import count_tokens
from .hub import HubFile, gpt2_file, open_file
from .settings import DataConfig
from .tokens import GPT2_VOCAB_SIZE, load_tokenizer, train_stream

WTE = "wte.weight"
GPT2_SHAPE = (GPT2_VOCAB_SIZE, 768)
_CHUNK_BYTES = 1 << 24

LONG_ROW = 0.99  # share of rows no longer than the one that `data.row_length` scales


@dataclass(frozen=True)
class TokenTable:
    """One vector, or one number, a token.

    Attributes:
        weight: float32 `[vocab_size, hidden_size]`, or counts, int64 `[vocab_size]`, on the CPU.
        fingerprint: changes when anything does that the table is made from.
    """

    weight: torch.Tensor
    fingerprint: str


def load_table(data: DataConfig, hidden_size: int, seed: int) -> TokenTable:
    """Read or make the table that `data.table` names; what was read or made once is in the shared cache.

    Args:
        data: `table`, and for table=cooccurrence the source, tokenizer and `corpus_samples` it is made from.
        hidden_size: numbers a token.
        seed: of table=random; the others do not depend on it.

    Raises:
        UserError: the Hub or the source cannot be read, or the table has another width.
    """
    makers = {"gpt2": _gpt2_table, "cooccurrence": _cooccurrence_table, "random": _random_table}
    table = makers[data.table](data, hidden_size, seed)
    if not data.row_length:
        return table
    lengths = table.weight.norm(dim=1)
    factor = data.row_length / lengths.kthvalue(round(LONG_ROW * len(lengths))).values
    return TokenTable(table.weight * factor, digest([table.fingerprint, data.row_length]))


def corpus_counts(data: DataConfig) -> TokenTable | None:
    """Count each token in split corpus, int64 `[vocab_size]`; None if nothing is made from it."""
    if not data.reads_corpus:
        return None
    text = load_conversations(data, "corpus")
    ids = train_stream(text, load_tokenizer(data.tokenizer)).ids
    key = digest([text.fingerprint, data.tokenizer, GPT2_VOCAB_SIZE])
    return TokenTable(count_tokens(ids, GPT2_VOCAB_SIZE), key)


def corpus_ids(data: DataConfig) -> torch.Tensor:
    """Token ids of split corpus, uint16 `[num_tokens]`."""
    return train_stream(load_conversations(data, "corpus"), load_tokenizer(data.tokenizer)).ids


def _random_table(data: DataConfig, hidden_size: int, seed: int) -> TokenTable:
    shape = (GPT2_VOCAB_SIZE, hidden_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / hidden_size**0.5
    return TokenTable(weight, digest(["random", shape, seed]))


def _cooccurrence_table(data: DataConfig, hidden_size: int, _: int) -> TokenTable:
    """A table made from split `corpus` and nothing else, shared by all runs on that corpus."""
    text = load_conversations(data, "corpus")
    shape = (GPT2_VOCAB_SIZE, hidden_size)
    key = digest([text.fingerprint, data.tokenizer, shape, data.neighbours, SEED, VERSION])

    def make() -> torch.Tensor:
        stream = train_stream(text, load_tokenizer(data.tokenizer))
        with stage("Making the token table"):
            return build_table(stream, *shape, data.neighbours)

    return _kept("cooccurrence", key, make)


def _kept(name: str, key: str, make: Callable[[], torch.Tensor]) -> TokenTable:
    """The table in the shared cache; made and written if it is not there intact."""
    path = cache_dir() / f"{name}-{key}.safetensors"
    weight = made_once(
        lambda: read_tensors(path, key)["weight"],
        lambda: write_tensors(path, {"weight": make()}, {"key": key}),
    )
    return TokenTable(weight, key)


def _gpt2_table(_: DataConfig, hidden_size: int, __: int) -> TokenTable:
    width = GPT2_SHAPE[1]
    if hidden_size != width:
        raise UserError(
            f"model.hidden_size is {hidden_size}, allowed with data.table=gpt2: {width}; "
            f"set model.hidden_size={width}, or a table of any width: data.table=cooccurrence or random."
        )
    file = gpt2_file("model.safetensors")
    return _kept("gpt2-wte", digest([WTE, file.revision]), lambda: _fetch_wte(file))


def _fetch_wte(file: HubFile) -> torch.Tensor:
    """Transfer `wte.weight` and nothing else from a safetensors file on the Hub.

    The format: 8 bytes, the little-endian length of a JSON header; the header, `{name: {dtype, shape,
    data_offsets}}` with offsets from its end; the tensors.
    """
    with open_file(file) as stream:
        try:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > MOST_HEADER_BYTES:
                raise ValueError("its header has no plausible length")
            entry = json.loads(stream.read(header_bytes))[WTE]
            if (entry["dtype"], entry["shape"]) != ("F32", list(GPT2_SHAPE)):
                raise ValueError(f"{WTE} is not float32 {GPT2_SHAPE}")
            start, end = entry["data_offsets"]
            stream.seek(8 + header_bytes + start)
            sizes = [min(_CHUNK_BYTES, end - at) for at in range(start, end, _CHUNK_BYTES)]
            content = bytearray().join(stream.read(size) for size in progress_bar(sizes, WTE, unit="chunk"))
            if len(content) != 4 * GPT2_SHAPE[0] * GPT2_SHAPE[1]:
                raise ValueError(f"{WTE} has {len(content):,} bytes")
            return torch.frombuffer(content, dtype=torch.float32).view(GPT2_SHAPE)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file.path} of {file.repo} is damaged ({type(error).__name__}: {error}); delete it from "
                "huggingface_hub's cache if it is there and run again, or use --preset offline."
            ) from error
