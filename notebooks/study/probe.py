"""Measure what contexts encode, and whether the model uses it: `python notebooks/study/probe.py RUN...`.

Decodability is measured by ridge regressions (`ctxkv_lib.method.readout`), for the run's contexts and for
contexts of untrained blocks.

Use is measured by the perplexity of the trained model when it reads wrong contexts at the same positions.
No model is trained for this.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ctxkv_lib as ctxkv
from ctxkv_lib.method.block import CONTEXT_WEIGHT_STD, ContextBlock
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.method.readout import ReadTokens, decodability, last_remembered
from ctxkv_lib.method.scoring import perplexity
from ctxkv_lib.method.streams import Stream
from ctxkv_lib.views.explore import elsewhere

# Number of tokens that are used, from the start of each stream.
ROWS = {"train": 10_000, "val": 5_000}
# Standard deviations of the weights of the untrained blocks.
UNTRAINED_STDS = (CONTEXT_WEIGHT_STD, 0.01)
# Largest error of any number in the contexts of the untrained blocks.
TOLERANCE = 1e-5
# The model reads wrong contexts at this many positions, all of which have a full window.
POSITIONS = 1024


@torch.no_grad()
def encoded(model: ContextKV, streams: Mapping[str, Stream]) -> dict[str, Any]:
    """Measure on the CPU what cached contexts encode. Use only the model's token table and window.

    Args:
        streams: one stream per split. The regressions are fitted on "train" and evaluated on "val".

    Returns:
        a dict. `decodability` is a list of `{distance, r2, top1}`. `memory_span` is in tokens. `window_share`
        is the share of the window that lies within some slot's memory span. `untrained` has the same three
        values for untrained blocks; its keys are the standard deviations of their weights. `offsets` lists
        the offsets of the slots.
    """
    ids = [streams[split].ids[:-1][:rows].cpu() for split, rows in ROWS.items()]
    lengths = [len(stream) for stream in ids]
    embeddings, rows = (tensor.cpu() for tensor in distinct_rows(model, torch.cat(ids)))
    tokens, shape = rows.split(lengths), model.config
    # The window has at most half of a stream, so the other half remains for the fit.
    window = min(shape.context_window, *(1 + length // 2 for length in lengths))

    def measured(contexts: Sequence[Tensor]) -> dict[str, Any]:
        train, validation = map(ReadTokens, contexts, tokens)
        by_distance = decodability(train, validation, embeddings, distances(shape.interval, window))
        span = last_remembered(by_distance)
        covered = window_share(model.window.offsets, shape.context_window, span)
        return {"decodability": by_distance, "memory_span": span, "window_share": covered}

    cached = [streams[split].contexts[1 : n + 1] for split, n in zip(ROWS, lengths, strict=True)]
    untrained = {}
    for std in UNTRAINED_STDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            block = ContextBlock(shape.context_dim, shape.hidden_size)
        block.linear.weight.mul_(std / CONTEXT_WEIGHT_STD)
        inputs, zero = block.project_inputs(embeddings), torch.zeros(shape.context_dim)
        untrained[f"{std:g}"] = measured(
            [exact_contexts(block, inputs, n, zero, TOLERANCE)[1:] for n in tokens]
        )
    trained = measured([contexts.float().cpu() for contexts in cached])
    return {**trained, "untrained": untrained, "offsets": model.window.offsets}


def distances(interval: int, window: int) -> list[int]:
    """List all distances up to `interval`, and then distances that grow by half, up to `window`."""
    listed = list(range(min(interval, window - 1) + 1))
    while (further := max(listed[-1] + 1, 3 * listed[-1] // 2)) < window:
        listed.append(further)
    return listed


def window_share(offsets: Sequence[int], window: int, span: int | None) -> float:
    """Compute the share of the `window` tokens before a position that lie within some slot's memory span."""
    read = {offset + behind for offset in offsets for behind in range(0 if span is None else span + 1)}
    return len(read & {*range(window)}) / window


@torch.no_grad()
def other_contexts(model: ContextKV, stream: Stream) -> dict[str, Any]:
    """Compute the perplexity if contexts are replaced by zeros or by contexts from elsewhere.

    Zero contexts never occur in training, so they harm even a model that ignores the content of contexts.
    Contexts from elsewhere come from half the stream away, usually from another conversation. They harm only
    a model that uses the content of contexts.

    Returns:
        a dict. `positions` is the number of positions. `changed` has the results for `zero` and `elsewhere`:
        the perplexity `ppl`, its increase `percent` compared with the run's own contexts, and the standard
        error `error` of this increase.
    """
    first = min(model.config.context_window, len(stream) - 1)
    # The fixed seed draws the same positions in all runs.
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(stream) - first, generator=seeded)
    chosen = first + drawn[:POSITIONS].sort().values
    batch = model.batch(stream, chosen)
    own, present = batch.inputs
    away, _ = model.batch(stream, elsewhere(chosen, first, len(stream))).inputs

    def losses(contexts: Tensor) -> Tensor:
        hidden, _ = model.read(replace(batch, inputs=(contexts, present)))
        return model.losses(hidden, batch.tokens, batch.targets)[0].double()

    unchanged, changed = losses(own), {}
    for name, contexts in {"zero": torch.zeros_like(own), "elsewhere": away}.items():
        replaced = losses(contexts)
        ratio = perplexity((replaced - unchanged).mean().item())
        error = (replaced - unchanged).std(correction=0).item() / math.sqrt(len(unchanged))
        ppl = perplexity(replaced.mean().item())
        changed[name] = {"ppl": ppl, "percent": 100 * (ratio - 1), "error": 100 * ratio * error}
    return {"positions": len(chosen), "changed": changed}


if __name__ == "__main__":
    for opened in map(ctxkv.open_run, sys.argv[1:]):
        probed = encoded(opened.model, opened.streams) | other_contexts(opened.model, opened.streams["val"])
        print(f"{opened.run.path}: {json.dumps(probed, indent=2)}")
