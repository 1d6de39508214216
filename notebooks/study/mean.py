"""Measure what Phase 1 does to the mean of the contexts: `python notebooks/study/mean.py`.

For `exact` with 10, 50 and 500 conversations and three seeds, the script compares the block before and after
Phase 1 on validation contexts. It also measures which part of the first gradients of Phase 2 points along the
mean. It writes `results/mean/phase1.json`. If the runs of part `mean` (`train.py`) are in the store, it takes
minutes; otherwise, Phase 1 is trained first.
"""

import json
from typing import Any

import torch
from tables import TOP
from torch import Tensor
from train import MEANS, SEEDS, configure, rounded

import ctxkv_lib as ctxkv
from ctxkv_lib.method.phase2 import epoch_order

SIZES = (10, 50, 500)
SHOWN = 150  # contexts in the picture on the first page
COMPARED = 5_000  # validation contexts, as many as a batch of Phase 1 has
BATCHES = 20  # batches at the beginning of Phase 2, whose gradients are averaged
RESULTS = TOP / "notebooks" / "study" / "results" / "mean" / "phase1.json"


def terms(contexts: Tensor, weight: float) -> dict[str, float]:
    """Return both terms of the loss of Phase 1 for contexts `[n, context_dim]`, and what they depend on."""
    mean = contexts.mean(dim=0)
    values = {
        "mean_length": mean.norm(),
        "dispersion": (contexts - mean).square().sum(dim=1).mean().sqrt(),
        "squared_length": contexts.square().sum(dim=1).mean(),
        "first_term": -(contexts - mean).norm() / len(contexts),
        "second_term": weight * mean.square().sum(),
    }
    return {name: value.item() for name, value in values.items()}


def of_block(opened: Any) -> dict[str, Any]:
    """Measure a block: its contexts of the validation text, and its LayerNorm's scale."""
    config, block = opened.run.config, opened.model.context_block
    contexts = opened.stream("val").contexts()[:COMPARED]
    scale = block.norm.weight.detach()
    norm = {"scale_mean": scale.mean().item(), "scale_sd": scale.std().item()}
    return terms(contexts, config.phase1.centroid_weight) | norm


def first_gradients(opened: Any) -> dict[str, float]:
    """Return the share of the squared gradients of W_k and W_v that points along the mean of the contexts.

    The gradients are averaged over the first batches of Phase 2, without a step between them and without the
    positions whose window reaches beyond the start of the text.
    """
    config, model, stream = opened.run.config, opened.model, opened.streams["train"]
    torch.manual_seed(config.runtime.seed)
    model.init_layer(stream.ids[:-1], config.phase1)
    model.set_phase(2)
    model.eval()  # no dropout
    reach, size = model.window.offsets[-1], config.phase2.batch_size
    order = epoch_order(len(stream), config.runtime.seed, 1)
    for batch in model.batches(stream, order[order >= reach][: BATCHES * size], size):
        model.losses(model.read(batch)[0], batch.tokens, batch.targets)[0].mean().backward()
    mean = stream.contexts[1:].float().mean(dim=0)
    attention = model.layer.attention
    return {
        name: ((part.weight.grad @ mean).square().sum() / mean.square().sum()).item()
        / part.weight.grad.square().sum().item()
        for name, part in (("keys", attention.k), ("values", attention.v))
    }


def cloud(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return some contexts before and after Phase 1, projected onto the same two directions.

    They are the directions with the largest singular values of the contexts before Phase 1. The first of them
    is nearly that of the mean.
    """
    directions = torch.linalg.svd(before, full_matrices=False).Vh[:2]
    centered = before - before.mean(dim=0)
    sets = {"before": before, "after": after, "centered": centered}
    return {
        name: {
            "mean": (contexts.mean(dim=0) @ directions.T).tolist(),
            "points": (contexts[:: len(contexts) // SHOWN][:SHOWN] @ directions.T).tolist(),
        }
        for name, contexts in sets.items()
    }


def measure(samples: int, seed: int) -> dict[str, Any]:
    opened = {name: ctxkv.prepare(configure(MEANS[name], samples, seed)) for name in MEANS}
    trained, untrained = opened["exact"], opened["exact, untrained"]
    before, after = (run.model.context_block.linear.weight.detach() for run in (untrained, trained))
    table = trained.memory_span()
    contexts = [run.stream("val").contexts()[:COMPARED] for run in (untrained, trained)]
    return {
        "samples": samples,
        "seed": seed,
        "before": of_block(untrained),
        "after": of_block(trained),
        "weights_moved": ((after - before).norm() / before.norm()).item(),
        "memory_span": {"before": table.attrs["untrained_span"], "after": table.attrs["span"]},
        "r2": {"before": table["untrained_r2"].tolist(), "after": table["r2"].tolist()},
        "gradients": {name: first_gradients(run) for name, run in opened.items()},
        "cloud": cloud(*contexts) if (samples, seed) == (50, SEEDS[0]) else None,
    }


def main() -> None:
    rows = [json.dumps(rounded(measure(samples, seed))) for samples in SIZES for seed in SEEDS]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text('{"runs": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
