"""Load or make the frozen token table: GPT-2's `wte`, one made from text alone, or random numbers.

Input embeddings are normed, so a table's scale affects the output head only. In tables made here,
tokens that occur have an embedding norm of 1, in GPT-2's one of about four.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..files import MOST_HEADER_BYTES, digest
from ..progress import progress_bar, stage
from .conversations import load_conversations
from .counts import SEED, VERSION, build_table, count_tokens
from .hub import HubFile, gpt2_file, open_file
from .settings import DataConfig
from .tokens import GPT2_VOCAB_SIZE, kept_tensors, load_tokenizer, train_stream

WTE = "wte.weight"
GPT2_SHAPE = (GPT2_VOCAB_SIZE, 768)
CHUNK_ROWS = 4096  # transferred at a time

LONG_ROW = 0.99  # quantile of the embedding norms that `data.row_length` sets


@dataclass(frozen=True)
class TokenTable:
    """One vector, or one number, a token.

    Attributes:
        weight: float32 `[vocab_size, hidden_size]`, or counts, int64 `[vocab_size]`, on the CPU.
        fingerprint: changes with every input of the table.
    """

    weight: torch.Tensor
    fingerprint: str


def load_table(data: DataConfig, hidden_size: int, seed: int) -> TokenTable:
    """Read or make the table that `data.table` names.

    `seed` is for table=random; other tables do not depend on it. Raises a UserError if the Hub or the source
    cannot be read, or the table has another width than `hidden_size`.
    """
    makers = {"gpt2": _gpt2_table, "cooccurrence": _cooccurrence_table, "random": _random_table}
    table = makers[data.table](data, hidden_size, seed)
    if not data.row_length:
        return table
    lengths = table.weight.norm(dim=1)
    factor = data.row_length / lengths.kthvalue(round(LONG_ROW * len(lengths))).values
    return TokenTable(table.weight * factor, digest([table.fingerprint, data.row_length]))


def corpus_counts(data: DataConfig) -> TokenTable | None:
    """Count each token in split corpus, int64 `[vocab_size]`; None if no setting needs it."""
    if not data.reads_corpus:
        return None
    key = digest([load_conversations(data, "corpus").fingerprint, data.tokenizer, GPT2_VOCAB_SIZE])
    return TokenTable(count_tokens(corpus_ids(data), GPT2_VOCAB_SIZE), key)


def corpus_ids(data: DataConfig) -> torch.Tensor:
    """Return the token ids of split corpus, uint16 `[num_tokens]`."""
    return train_stream(load_conversations(data, "corpus"), load_tokenizer(data.tokenizer)).ids


def _random_table(data: DataConfig, hidden_size: int, seed: int) -> TokenTable:
    shape = (GPT2_VOCAB_SIZE, hidden_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / hidden_size**0.5
    return TokenTable(weight, digest(["random", shape, seed]))


def _cooccurrence_table(data: DataConfig, hidden_size: int, _: int) -> TokenTable:
    """Make a table from split `corpus` only, shared by all runs on that corpus."""
    text = load_conversations(data, "corpus")
    shape = (GPT2_VOCAB_SIZE, hidden_size)
    key = digest([text.fingerprint, data.tokenizer, shape, data.neighbours, SEED, VERSION])

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        stream = train_stream(text, load_tokenizer(data.tokenizer))
        with stage("Making the token table"):
            yield "weight", build_table(stream, *shape, data.neighbours)

    return TokenTable(kept_tensors("cooccurrence", key, make)["weight"], key)


def _gpt2_table(_: DataConfig, hidden_size: int, __: int) -> TokenTable:
    check_width("gpt2", hidden_size)
    file = gpt2_file("model.safetensors")
    key = digest([WTE, file.revision])
    return TokenTable(kept_tensors("gpt2-wte", key, lambda: _fetch_wte(file))["weight"], key)


def check_width(table: str, hidden_size: int) -> None:
    """Raise a UserError if the table named in `data.table` cannot have this width."""
    width = GPT2_SHAPE[1]
    if table == "gpt2" and hidden_size != width:
        raise UserError(
            f"model.hidden_size is {hidden_size}, allowed with data.table=gpt2: {width}; "
            f"set model.hidden_size={width}, or a table of any width: data.table=random, or "
            "cooccurrence."
        )


def _fetch_wte(file: HubFile) -> Iterator[tuple[str, torch.Tensor]]:
    """Download only `wte.weight` of a safetensors file on the Hub, some rows at a time.

    The format: 8 bytes, the little-endian length of a JSON header; the header, `{name: {dtype, shape,
    data_offsets}}` with offsets from its end; the tensors.
    """
    rows, width = GPT2_SHAPE
    with open_file(file) as stream:
        try:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > MOST_HEADER_BYTES:
                raise ValueError("its header has no plausible length")
            entry = json.loads(stream.read(header_bytes))[WTE]
            if (entry["dtype"], entry["shape"]) != ("F32", list(GPT2_SHAPE)):
                raise ValueError(f"{WTE} is not float32 {GPT2_SHAPE}")
            stream.seek(8 + header_bytes + entry["data_offsets"][0])
            for first in progress_bar(range(0, rows, CHUNK_ROWS), WTE, unit="chunk"):
                count = min(CHUNK_ROWS, rows - first)
                content = bytearray(stream.read(4 * count * width))
                if len(content) < 4 * count * width:
                    raise ValueError(f"{WTE} ends within row {first + count}")
                yield "weight", torch.frombuffer(content, dtype=torch.float32).view(count, width)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file.path} of {file.repo} is damaged ({type(error).__name__}: {error}); delete it from "
                "huggingface_hub's cache if it is there and run again, or use --preset offline."
            ) from error
