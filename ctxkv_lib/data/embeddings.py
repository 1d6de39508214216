"""Where the frozen token table comes from: GPT-2's `wte`, one made from text alone, or random numbers.

None of them ever stands in for another: what cannot be had is an error. The input side norms every row, so
a table's scale matters to the output head alone. Rows of the tables made here have length 1, which gives
untrained logits a variance of about 1; GPT-2's are four times as long, and training starts by unlearning.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from ..errors import UserError
from ..files import MOST_HEADER_BYTES, cache_dir, digest, read_tensors, write_tensors
from ..locks import made_once
from ..method.config import ModelConfig
from ..progress import stage
from ..runs.config import DataConfig
from .conversations import Conversations, load_conversations
from .counts import count_tokens
from .hub import HubFile, gpt2_file, open_file
from .tokens import TokenStream, load_tokenizer, train_stream

WTE = "wte.weight"
FLOAT_BYTES = 4
_CHUNK_BYTES = 1 << 24
_BLOCK = 1 << 20  # tokens of a stream at a time; pairs take some hundred bytes each

LONG_ROW = 0.99  # of all rows are no longer than the one that a row length is measured by

COOCCURRENCE_VERSION = 4  # raise it when the numbers change: it is part of the cache's key
COOCCURRENCE_SEED = 0  # not the run's: runs with other seeds share one table
AROUND, AROUND_DIMS = 4, 200  # data.neighbours=around: tokens to each side
SIDES, SIDE_DIMS = (1, 2), 100  # data.neighbours=sides: tokens to a side; numbers for each, on each side
COOCCURRENCE_SMOOTHING = 0.75  # power of the context counts; tempers rare tokens' PMI (Levy et al., 2015)
COOCCURRENCE_NOISE = 0.15  # length of the noise that keeps never-seen tokens apart; vectors have length 1


@dataclass(frozen=True)
class TokenTable:
    """One vector, or one number, a token.

    Attributes:
        weight: float32 `[vocab_size, hidden_size]`, or counts, int64 `[vocab_size]`, on the CPU.
        fingerprint: changes when anything does that the table is made from.
    """

    weight: torch.Tensor
    fingerprint: str


def load_table(data: DataConfig, model: ModelConfig, seed: int) -> TokenTable:
    """The table that `data.table` names, from the cache if an earlier run left it there.

    Args:
        data: `table`, and for table=cooccurrence the source, tokenizer and `corpus_samples` it is made from.
        model: `vocab_size` and `hidden_size`.
        seed: of table=random; the others do not depend on it.

    Raises:
        UserError: the Hub or the source cannot be read, or the table does not fit the model's shapes.
    """
    made = {"gpt2": _gpt2_table, "cooccurrence": _cooccurrence_table, "random": _random_table}
    table = made[data.table](data, model, seed)
    if not data.row_length:
        return table
    lengths = table.weight.norm(dim=1)
    factor = data.row_length / lengths.kthvalue(round(LONG_ROW * len(lengths))).values
    return TokenTable(table.weight * factor, digest([table.fingerprint, data.row_length]))


def _random_table(data: DataConfig, model: ModelConfig, seed: int) -> TokenTable:
    shape = (model.vocab_size, model.hidden_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / model.hidden_size**0.5
    return TokenTable(weight, digest(["random", shape, seed]))


def _gpt2_table(data: DataConfig, model: ModelConfig, _: int) -> TokenTable:
    file = gpt2_file("model.safetensors")
    key = digest([WTE, file.revision])
    weight = _kept("gpt2-wte", key, lambda: _fetch_wte(file, data, model))
    _check_shape(tuple(weight.shape), model)
    return TokenTable(weight, key)


def _kept(name: str, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What an earlier run left in the shared cache; made and left there if it is not there intact."""

    def read() -> torch.Tensor:
        return read_tensors(_place(name, key), key)["weight"]

    return made_once(read, lambda: _keep(name, key, make()))


def _keep(name: str, key: str, tensor: torch.Tensor) -> None:
    write_tensors(_place(name, key), {"weight": tensor}, {"key": key})


def _place(name: str, key: str) -> Path:
    return cache_dir() / f"{name}-{key}.safetensors"


def _fetch_wte(file: HubFile, data: DataConfig, model: ModelConfig) -> torch.Tensor:
    with open_file(file, data.download) as stream:
        shape, start = _find_tensor(stream, file)
        _check_shape(shape, model)
        stream.seek(start)
        content = _read_exactly(stream, FLOAT_BYTES * math.prod(shape), file)
    return torch.frombuffer(content, dtype=torch.float32).view(shape)


def _check_shape(shape: tuple[int, ...], model: ModelConfig) -> None:
    for name, allowed in zip(("vocab_size", "hidden_size"), shape, strict=True):
        value = getattr(model, name)
        if value != allowed:
            raise UserError(
                f"model.{name} is {value}, allowed with data.table=gpt2: {allowed}; "
                f"set model.{name}={allowed} or data.table=cooccurrence."
            )


def _find_tensor(stream: IO[bytes], file: HubFile) -> tuple[tuple[int, ...], int]:
    """Shape and first byte of `wte.weight` in a safetensors file, without reading any tensor.

    The format: 8 bytes, the little-endian length of a JSON header; the header, `{name: {dtype, shape,
    data_offsets}}` with offsets from its end; the tensors.
    """
    header_bytes = int.from_bytes(stream.read(8), "little")
    try:
        if header_bytes > MOST_HEADER_BYTES:
            raise ValueError("its header has no plausible length")
        entry = json.loads(stream.read(header_bytes))[WTE]
        start, end = entry["data_offsets"]
        if entry["dtype"] != "F32" or end - start != FLOAT_BYTES * math.prod(entry["shape"]):
            raise ValueError(f"{WTE} is not float32")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    return tuple(entry["shape"]), 8 + header_bytes + start


def _read_exactly(stream: IO[bytes], size: int, file: HubFile) -> bytearray:
    from tqdm import tqdm

    content = bytearray()
    with tqdm(total=size, desc=WTE, unit="B", unit_scale=True, disable=None) as progress:
        while len(content) < size:
            chunk = stream.read(min(_CHUNK_BYTES, size - len(content)))
            if not chunk:
                raise _damaged(file, f"it ends {size - len(content)} bytes too early")
            content += chunk
            progress.update(len(chunk))
    return content


def _damaged(file: HubFile, reason: str) -> UserError:
    return UserError(
        f"{file.path} of {file.repo} is damaged ({reason}); delete it from huggingface_hub's cache "
        "if it is there and run again, or use --preset offline."
    )


def _cooccurrence_table(data: DataConfig, model: ModelConfig, _: int) -> TokenTable:
    """A table made from split `corpus` and nothing else, shared by all runs on that corpus."""
    text = load_conversations(data, "corpus")
    shape = (model.vocab_size, model.hidden_size)
    made = [data.neighbours, COOCCURRENCE_SEED, COOCCURRENCE_VERSION]
    key = digest([text.fingerprint, data.tokenizer, shape, *made])

    def make() -> torch.Tensor:
        stream, counts = _table_stream(text, data.tokenizer, model.vocab_size)
        _keep("counts", _counts_key(text, data, model.vocab_size), counts)
        with stage("Making the token table"):
            return build_table(stream, *shape, data.neighbours)

    return TokenTable(_kept("cooccurrence", key, make), key)


def corpus_counts(data: DataConfig, vocab_size: int) -> TokenTable | None:
    """How often each token occurs in split corpus, int64 `[vocab_size]`; None if nothing is made from it.

    A table's text is counted when the table is made; what was made by earlier versions is read once more.
    """
    if not data.reads_corpus:
        return None
    text = load_conversations(data, "corpus")
    key = _counts_key(text, data, vocab_size)

    def count() -> torch.Tensor:
        return _table_stream(text, data.tokenizer, vocab_size)[1]

    return TokenTable(_kept("counts", key, count), key)


def corpus_ids(data: DataConfig) -> torch.Tensor:
    """Token ids of split corpus, whole numbers `[num_tokens]`."""
    return train_stream(load_conversations(data, "corpus"), load_tokenizer(data.tokenizer)).ids


def _counts_key(text: Conversations, data: DataConfig, vocab_size: int) -> str:
    return digest([text.fingerprint, data.tokenizer, vocab_size])


def _table_stream(text: Conversations, tokenizer: str, vocab_size: int) -> tuple[TokenStream, torch.Tensor]:
    """The text's stream, and how often each token of the vocabulary occurs in it."""
    stream = train_stream(text, load_tokenizer(tokenizer))
    counts = count_tokens(stream.ids, vocab_size)
    if len(counts) > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the text holds token {len(counts) - 1}; set it to 50257."
        )
    return stream, counts


def build_table(stream: TokenStream, vocab_size: int, hidden_size: int, neighbours: str) -> torch.Tensor:
    """Word vectors from co-occurrence counts: SVD of positive PMI matrices (Levy and Goldberg, 2014).

    With `neighbours` "around", tokens are alike that the same tokens surround. With "sides", the halves of a
    vector tell what comes after its token and what comes before it, in factors of one matrix: the product of
    one token's first half and another's second approximates how much more often than by chance the other
    follows it. That is what a tied output head asks of its table.

    The vectors are turned by a random rotation, so that no component weighs more than another, and brought to
    one length: in the SVD, frequent tokens are many times longer than rare ones, and through the tied head
    their logits would drown all others.

    Args:
        neighbours: as `DataConfig` has it.

    Returns:
        float32 `[vocab_size, hidden_size]`. Rows of tokens in the stream have about length 1, the others are
        noise of length `COOCCURRENCE_NOISE`.
    """
    generator = torch.Generator().manual_seed(COOCCURRENCE_SEED)
    occurs = count_tokens(stream.ids) > 0
    seen, place = occurs.nonzero().flatten(), occurs.cumsum(0) - 1

    def followed(reach: int) -> torch.Tensor:
        pairs = count_pairs(stream.ids, stream.starts, reach)
        return _sparse(place[pairs.indices()], pairs.values(), len(seen))

    if neighbours == "around":
        pairs = followed(AROUND)
        parts = [_factors(positive_pmi((pairs + pairs.T).coalesce()), min(AROUND_DIMS, hidden_size))[0]]
    else:
        dims = -(-hidden_size // (2 * len(SIDES)))
        found = [_factors(positive_pmi(followed(reach)), min(SIDE_DIMS, dims)) for reach in SIDES]
        parts = [torch.nn.functional.normalize(side) for both in found for side in both]
    vectors = torch.cat(parts, dim=1)[:, :hidden_size]  # (seen, dims)
    rotation = torch.linalg.qr(torch.randn(hidden_size, vectors.shape[1], generator=generator)).Q.T
    turned = vectors @ rotation  # (seen, hidden_size)
    noise = torch.randn(vocab_size, hidden_size, generator=generator)
    table = noise * COOCCURRENCE_NOISE / hidden_size**0.5
    table[seen] += torch.nn.functional.normalize(turned)
    return table


def count_pairs(ids: torch.Tensor, starts: torch.Tensor, reach: int) -> torch.Tensor:
    """How often a token stands at most `reach` tokens before another in one conversation.

    Args:
        ids: whole numbers `[num_tokens]`; a block of them at a time is worked on.
        starts: int64 `[num_conversations]`.

    Returns:
        Sparse COO float32 `[n, n]` with n = largest id + 1, coalesced; a row is of the token before.
    """
    n = len(count_tokens(ids))
    pairs = counts = torch.empty(0, dtype=torch.int64)
    for first in range(0, len(ids), _BLOCK):
        block = range(first, min(first + _BLOCK, len(ids)))
        codes, times = _pair_codes(ids, starts, block, reach, n)
        pairs, places = torch.cat([pairs, codes]).unique(return_inverse=True)
        counts = torch.zeros_like(pairs).index_add_(0, places, torch.cat([counts, times]))
    return _sparse(torch.stack([pairs // n, pairs % n]), counts.float(), n)


def _pair_codes(
    ids: torch.Tensor, starts: torch.Tensor, block: range, reach: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`before * n + after` of all pairs whose later token is in `block`; and how often."""
    first = max(0, block.start - reach)
    part = ids[first : block.stop].long()
    conversation = torch.searchsorted(starts, torch.arange(first, block.stop), right=True)
    own_tokens = torch.arange(block.start - first, len(part))
    codes = []
    for distance in range(1, reach + 1):
        later = own_tokens[own_tokens >= distance]
        later = later[conversation[later] == conversation[later - distance]]
        codes.append(part[later - distance] * n + part[later])
    return torch.cat(codes).unique(return_counts=True)


def positive_pmi(counts: torch.Tensor) -> torch.Tensor:
    """`max(0, log(p(a, b) / (p(a) q(b))))` with q smoothed (the columns' share); sparse like `counts`."""
    row, column = counts.indices()
    n = counts.shape[0]
    of_row = torch.zeros(n).index_add_(0, row, counts.values())
    of_column = torch.zeros(n).index_add_(0, column, counts.values()) ** COOCCURRENCE_SMOOTHING
    pmi = torch.log(counts.values() / (of_row[row] * (of_column / of_column.sum())[column]))
    kept = pmi > 0
    return _sparse(counts.indices()[:, kept], pmi[kept], n)


def _sparse(indices: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices, values, (n, n), check_invariants=True, is_coalesced=True)


def _factors(matrix: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`U sqrt(S)` and `V sqrt(S)` of a truncated SVD, float32 `[n, dims]`, or narrower if n is less."""
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(COOCCURRENCE_SEED)
        u, s, v = torch.svd_lowrank(matrix, q=min(dims + 10, matrix.shape[0]), niter=3)
    scale = s[:dims].sqrt()
    return u[:, :dims] * scale, v[:, :dims] * scale
