"""Both training loops as the original ran them: what `ctxkv bench` measures this package against.

A dense embedding row for every position on the host; windows gathered slot by slot; keys and values
projected for every slot; full logits; each step waits for its loss. The arithmetic is the recipe's, and so
are the draws of noise and dropout: with the same weights and batches, losses are the package's own up to
rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...hf.modeling import ContextKVForCausalLM
from ...method.model import ContextBlock
from ...runs.config import Phase1Config


def phase1_iteration(
    block: ContextBlock,
    optimizer: torch.optim.Optimizer,
    embeddings: Tensor,
    contexts: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
) -> tuple[Tensor, float, float]:
    """One iteration of Phase 1.

    Args:
        embeddings: normed, float32 `[n, hidden_size]`, on the host.
        contexts: of the previous iteration, `[n, context_dim]`, on the block's device.

    Returns:
        contexts of this iteration, mean loss and convergence rate.
    """
    previous = torch.cat([torch.zeros_like(contexts[:1]), contexts[:-1]])
    outputs, total = [], 0.0
    batches = list(zip(previous.split(config.batch_size), embeddings.split(config.batch_size), strict=True))
    optimizer.zero_grad()
    for before, rows in batches:
        noise = torch.randn(before.shape, generator=generator, device=before.device)
        noisy = before + noise * config.noise_std
        joined = torch.cat([noisy, rows.to(noisy.device)], dim=-1)
        output = block.norm(noisy + F.gelu(block.linear(joined)))
        centroid = output.mean(dim=0)
        dispersion = torch.linalg.vector_norm(output - centroid) / len(output)
        loss = config.centroid_weight * centroid.square().sum() - dispersion
        (loss / len(batches)).backward()
        outputs.append(output.detach())
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(block.parameters(), config.clip_norm)
    optimizer.step()
    updated = torch.cat(outputs)
    moved = (updated - contexts).square().mean(dim=1)
    rate = (moved < config.convergence_threshold).float().mean().item()
    return updated, total / len(batches), rate


def phase2_step(
    model: ContextKVForCausalLM,
    optimizer: torch.optim.Optimizer,
    embeddings: Tensor,
    contexts: Tensor,
    ids: Tensor,
    positions: Tensor,
) -> float:
    """One optimiser step of Phase 2 on `positions`, with fixed-count KV; returns the mean loss.

    Args:
        embeddings, contexts: of the whole stream, one row a position, on the host.
        ids: int64 `[n + 1]`, on the host.
    """
    shape, attention, device = model.config, model.attention, model.device
    slots = []
    for back in range(shape.max_contexts):
        index = positions - back * shape.interval
        slots.append(contexts[index.clamp(min=0)] * (index >= 0)[:, None])
    window, x = torch.stack(slots, dim=1).to(device), embeddings[positions].to(device)
    heads = (attention.num_heads, attention.head_dim)
    query = attention.q(x).unflatten(-1, heads)  # (batch, heads, head_dim)
    keys = attention.k(window).unflatten(-1, heads)  # (batch, slots, heads, head_dim)
    values = attention.v(window).unflatten(-1, heads)
    scores = torch.einsum("bhd,bshd->bhs", query, keys) / attention.head_dim**0.5
    weights = attention.dropout(scores.softmax(dim=-1))
    mixed = torch.einsum("bhs,bshd->bhd", weights, values).flatten(1)
    attended = attention.norm(x + attention.out(mixed))
    hidden = attended + model.feed_forward(attended)
    loss = F.cross_entropy(model.logits(hidden, ids[positions].to(device)), ids[positions + 1].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
