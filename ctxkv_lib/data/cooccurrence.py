"""Make token vectors from a text: a truncated SVD of the pointwise mutual information (PMI) of token pairs.

References: Levy and Goldberg, "Neural word embedding as implicit matrix factorization" (2014); for the
smoothing, Levy, Goldberg and Dagan, "Improving distributional similarity with lessons learned from word
embeddings".
"""

import torch
from torch.nn.functional import normalize

from .tokens import TokenStream

SEED = 0  # runs with different seeds share one table
AROUND, AROUND_DIMS = 4, 200  # data.neighbours=around: tokens on each side, and SVD components
SIDES, SIDE_DIMS = (1, 2), 100  # data.neighbours=sides: distances, and SVD components per distance and side
SMOOTHING = 0.75  # exponent of the context counts, which tempers the PMI of rare tokens
NOISE = 0.15  # norm of the noise that tells unseen tokens apart; all other vectors have norm 1
_BLOCK = 1 << 20  # tokens counted at a time; each takes a few hundred bytes


def build_table(stream: TokenStream, vocab_size: int, hidden_size: int, neighbours: str) -> torch.Tensor:
    """Make one vector per token from the text of a stream: float32 `[vocab_size, hidden_size]`.

    With `neighbours` "around" (symmetric), tokens with the same neighbours have similar vectors. With "sides"
    (directional), a token's vector holds, for each distance, its factors of the PMI matrix as the first and
    as the second token of a pair, so tokens between the same neighbours are similar. A random rotation gives
    all components the same weight. All vectors are scaled to a norm of about 1, because the SVD gives
    frequent tokens larger vectors, which would dominate the output head. Tokens that do not occur get noise
    of norm `NOISE`.
    """
    generator = torch.Generator().manual_seed(SEED)
    occurs = torch.bincount(stream.ids.int(), minlength=vocab_size) > 0
    seen, place = occurs.nonzero().flatten(), occurs.cumsum(0) - 1

    def followed(reach: int) -> torch.Tensor:
        pairs = count_pairs(stream, vocab_size, reach)
        return _sparse(place[pairs.indices()], pairs.values(), len(seen))

    if neighbours == "around":
        pairs = followed(AROUND)
        parts = [_factors(positive_pmi((pairs + pairs.T).coalesce()), min(AROUND_DIMS, hidden_size))[0]]
    else:
        dims = -(-hidden_size // (2 * len(SIDES)))
        factors = [_factors(positive_pmi(followed(reach)), min(SIDE_DIMS, dims)) for reach in SIDES]
        parts = [normalize(factor) for both in factors for factor in both]
    vectors = torch.cat(parts, dim=1)[:, :hidden_size]  # (seen, dims)
    rotation = torch.linalg.qr(torch.randn(hidden_size, vectors.shape[1], generator=generator)).Q.T
    noise = torch.randn(vocab_size, hidden_size, generator=generator)
    table = noise * NOISE / hidden_size**0.5
    table[seen] += normalize(vectors @ rotation)  # (seen, hidden_size)
    return table


def count_pairs(stream: TokenStream, vocab_size: int, reach: int) -> torch.Tensor:
    """Count how often a token (row) occurs at most `reach` tokens before another (column) in a conversation.

    Returns a sparse, coalesced COO tensor, float32 `[vocab_size, vocab_size]`.
    """
    counts = _sparse(torch.empty(2, 0).long(), torch.empty(0).long(), vocab_size)
    for first in range(0, len(stream.ids), _BLOCK):
        begin = max(0, first - reach)
        part = stream.ids[begin : first + _BLOCK].long()
        place = torch.arange(begin, begin + len(part))
        conversation = torch.searchsorted(stream.starts, place, right=True)
        for distance in range(1, reach + 1):
            before, after = slice(None, -distance), slice(distance, None)
            counted = (conversation[before] == conversation[after]) & (place[after] >= first)
            pairs = torch.stack([part[before], part[after]])[:, counted]
            counts += _sparse(pairs, torch.ones_like(pairs[0]), vocab_size, is_coalesced=False)
        counts = counts.coalesce()
    return counts.float()


def positive_pmi(counts: torch.Tensor) -> torch.Tensor:
    """Compute `max(0, log(p(a, b) / (p(a) q(b))))`, where q(b) is smoothed; sparse like `counts`."""
    row, column = counts.indices()
    n = counts.shape[0]
    of_row = torch.zeros(n).index_add_(0, row, counts.values())
    of_column = torch.zeros(n).index_add_(0, column, counts.values()) ** SMOOTHING
    pmi = torch.log(counts.values() / (of_row[row] * (of_column / of_column.sum())[column]))
    kept = pmi > 0
    return _sparse(counts.indices()[:, kept], pmi[kept], n)


def _sparse(indices: torch.Tensor, values: torch.Tensor, n: int, is_coalesced: bool = True) -> torch.Tensor:
    with torch.sparse.check_sparse_tensor_invariants():  # torch 2.11 warns about the equivalent argument
        return torch.sparse_coo_tensor(indices, values, (n, n), is_coalesced=is_coalesced or None)


def _factors(matrix: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `U sqrt(S)` and `V sqrt(S)` of a truncated SVD, each float32 `[n, min(n, dims)]`."""
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(SEED)
        u, s, v = torch.svd_lowrank(matrix, q=min(dims + 10, matrix.shape[0]), niter=3)
    scale = s[:dims].sqrt()
    return u[:, :dims] * scale, v[:, :dims] * scale
