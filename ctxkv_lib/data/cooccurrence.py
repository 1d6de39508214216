"""Compute token vectors from text: a truncated SVD of the pointwise mutual information (PMI) of token pairs.

Reference: Levy and Goldberg, "Neural word embedding as implicit matrix factorization" (2014). The smoothing
follows Levy, Goldberg and Dagan, "Improving distributional similarity with lessons learned from word
embeddings".
"""

import torch
from torch.nn.functional import normalize

from .tokens import TokenStream

# The seed of the table is fixed, so that runs with different seeds share one table.
SEED = 0
# For data.neighbours=around: the number of tokens on each side, and the number of SVD components.
AROUND, AROUND_DIMS = 4, 200
# For data.neighbours=sides: the distances in tokens, and the number of SVD components per distance and side.
SIDES, SIDE_DIMS = (1, 2), 100
# Exponent for the counts of the second token in a pair. A value below 1 lowers the PMI of rare tokens.
SMOOTHING = 0.75
# Norm of the random vectors that unseen tokens get. All other vectors have a norm of about 1.
NOISE = 0.15
# Number of tokens per chunk when pairs are counted. Each token needs a few hundred bytes of memory.
_BLOCK = 1 << 20


def token_vectors(
    stream: TokenStream, vocab_size: int, hidden_size: int, neighbours: str
) -> dict[str, torch.Tensor]:
    """Compute one vector for each token that occurs in a token stream.

    With `neighbours="around"` (symmetric), tokens with the same neighbours get similar vectors. With "sides"
    (directional), left and right neighbours are counted separately. A token's vector then contains two SVD
    factors for each distance: one for the token as the first of a pair, and one for it as the second.

    Returns:
        `tokens`, int32 `[seen]`, in ascending order, and `vectors`, float32 `[seen, dims]`. `table_of` makes
        the token table from them. They are much smaller than the table, so a run can keep them.
    """
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
    return {"tokens": seen.int(), "vectors": torch.cat(parts, dim=1)[:, :hidden_size]}


def table_of(tokens: torch.Tensor, vectors: torch.Tensor, vocab_size: int, hidden_size: int) -> torch.Tensor:
    """Make the token table, float32 `[vocab_size, hidden_size]`, from the result of `token_vectors`.

    A random rotation gives all components the same weight. All vectors are scaled to a norm of about 1, so
    that frequent tokens do not dominate the output head. Tokens that do not occur in the text get random
    vectors of norm `NOISE`.
    """
    generator = torch.Generator().manual_seed(SEED)
    rotation = torch.linalg.qr(torch.randn(hidden_size, vectors.shape[1], generator=generator)).Q.T
    noise = torch.randn(vocab_size, hidden_size, generator=generator)
    table = noise * NOISE / hidden_size**0.5
    table[tokens.long()] += normalize(vectors @ rotation)  # (seen, hidden_size)
    return table


def count_pairs(stream: TokenStream, vocab_size: int, reach: int) -> torch.Tensor:
    """Count how often the row's token occurs at most `reach` tokens before the column's token.

    Both tokens must be in the same conversation. Returns a sparse, coalesced COO tensor, float32
    `[vocab_size, vocab_size]`.
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
    """Compute the positive PMI, `max(0, log(p(a, b) / (p(a) q(b))))` with smoothed q, as a sparse tensor."""
    row, column = counts.indices()
    n = counts.shape[0]
    of_row = torch.zeros(n).index_add_(0, row, counts.values())
    of_column = torch.zeros(n).index_add_(0, column, counts.values()) ** SMOOTHING
    pmi = torch.log(counts.values() / (of_row[row] * (of_column / of_column.sum())[column]))
    kept = pmi > 0
    return _sparse(counts.indices()[:, kept], pmi[kept], n)


def _sparse(indices: torch.Tensor, values: torch.Tensor, n: int, is_coalesced: bool = True) -> torch.Tensor:
    # Use the context manager because torch 2.11 warns about the argument `check_invariants`.
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(indices, values, (n, n), is_coalesced=is_coalesced or None)


def _factors(matrix: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `U sqrt(S)` and `V sqrt(S)` from a truncated SVD, each float32 `[n, min(n, dims)]`."""
    # `svd_lowrank` draws from the global random generator, so restore the generator's state afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        u, s, v = torch.svd_lowrank(matrix, q=min(dims + 10, matrix.shape[0]), niter=3)
    scale = s[:dims].sqrt()
    return u[:, :dims] * scale, v[:, :dims] * scale
