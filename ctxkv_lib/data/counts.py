"""How often tokens occur in a stream, and how they vary."""

import torch
from torch import Tensor

AT_ONCE = 2**20  # tokens, to bound the memory of their widened ids: streams are uint16, mapped, of any length


def count_tokens(ids: Tensor, size: int = 0) -> Tensor:
    """How often each id of `ids` `[n]` occurs: int64, of length `size` or more, if an id needs it."""
    counts = torch.zeros(size, dtype=torch.int64)
    for part in ids.split(AT_ONCE):
        found = torch.bincount(part.int(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def principal_components(embed_distinct: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens of a stream: their mean `[hidden_size]`, their axes `[hidden_size, hidden_size]`, largest
    first, and the standard deviations along these `[hidden_size]`; on the CPU, float32.

    An axis points where its largest component is positive. Where tokens do not vary, a deviation is not 0
    but a thousandth of the largest, and where no two differ, 1e-6.
    """
    shares = count_tokens(tokens.cpu(), len(embed_distinct)).float() / len(tokens)
    rows = embed_distinct.float().cpu()
    mean = shares @ rows
    centred = (rows - mean) * shares[:, None].sqrt()
    variances, axes = torch.linalg.eigh((centred.T @ centred).double())
    deviations = variances.flip(0).clamp(min=0).sqrt()
    deviations = deviations.clamp(min=max(1e-3 * deviations[0].item(), 1e-6))
    axes = axes.T.flip(0)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return mean, (axes * largest.sign()).float(), deviations.float()
