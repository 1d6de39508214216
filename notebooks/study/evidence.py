"""Measure which contexts help a model, by distance: `python notebooks/study/evidence.py RUN...`.

For each finished run and each distance, the script prints how well contexts encode the tokens (R²) and how
much the perplexity rises if the slots from this distance on read wrong contexts. The rise has a confidence
interval over the validation conversations.
"""

import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from probe import encoded
from tables import DISTANCES, used
from torch import Tensor

import ctxkv_lib as ctxkv
from ctxkv_lib.views.explore import elsewhere

# Every fourth position with a full window is measured.
EVERY = 4
BATCH = 512


@torch.no_grad()
def loss_saved(model: Any, cache: Any, starts: Tensor) -> dict[str, Any]:
    """Measure how much the loss rises if all slots from a distance on read wrong contexts.

    The wrong contexts come from half the stream away. The nearer slots keep their own contexts.

    Args:
        model: the model of a run, in evaluation mode.
        cache: the cache of the run's validation stream.
        starts: int64 `[conversations]`, the position of the first token of each conversation.

    Returns:
        a dict with three keys. `tokens` lists the number of measured positions in each conversation that has
        such positions. `losses` lists the mean losses of these conversations in thousandths of a nat. `rises`
        lists, for each distance, by how much these losses rise.
    """
    first, found = model.window.offsets[-1], []
    positions = torch.arange(first, len(cache), EVERY)
    others = elsewhere(positions, first, len(cache))
    offsets = torch.tensor(model.window.offsets, device=model.device)[:, None]
    for here, away in zip(positions.split(BATCH), others.split(BATCH), strict=True):
        own, other = (model.batch(cache, positions) for positions in (here, away))
        (near, present), (far, _) = own.inputs, other.inputs
        windows = (torch.where(offsets >= distance, far, near) for distance in DISTANCES)
        batches = (replace(own, inputs=(window, present)) for window in windows)
        found.append(torch.stack([model.scores(batch)[0].cpu() for batch in batches]))
    conversation = torch.searchsorted(starts, positions, right=True) - 1
    members = [conversation == at for at in conversation.unique()]
    losses = [[round(1000 * each[at].mean().item()) for at in members] for each in torch.cat(found, dim=1)]
    # The last distance lies beyond all slots, so its losses are the losses with unchanged contexts.
    *above, beyond = np.array(losses)
    return {
        "tokens": [int(at.sum()) for at in members],
        "losses": beyond.tolist(),
        "rises": {str(at): (each - beyond).tolist() for at, each in zip(DISTANCES, above, strict=False)},
    }


def held(offsets: list[int], decoded: list[dict[str, Any]]) -> list[float]:
    """Compute the mean R² of the tokens between each of the `DISTANCES` and the next.

    The R² of a token says how well it can be decoded from the nearest slot that has read it. `offsets` are
    the offsets of the slots. `decoded` lists `distance` and `r2`, which `probe.py` measured. Beyond its last
    distance, R² counts as 0.
    """
    at, r2 = zip(*((row["distance"], max(row["r2"], 0)) for row in decoded), strict=True)
    tokens = np.arange(1, DISTANCES[-1])
    nearest = np.array(offsets)[np.searchsorted(offsets, tokens, side="right") - 1]
    means = np.interp(tokens - nearest, at, r2, right=0)
    return [float(means[low - 1 : high - 1].mean()) for low, high in pairwise(DISTANCES)]


def evidence(run: ctxkv.Run) -> dict[str, Any]:
    """Measure a finished run and return a row for `results/evidence/evidence.json`."""
    trained, data = ctxkv.open_run(run), run.config.data
    probed = encoded(trained.model, trained.streams)
    conversations = ctxkv.load_conversations(data, "validation")
    stream = ctxkv.validation_stream(conversations, ctxkv.load_tokenizer(data.tokenizer))
    return {
        "recipe": run.config.recipe,
        "samples": data.samples,
        "seed": run.config.runtime.seed,
        "held": held(probed["offsets"], probed["decodability"]),
        **loss_saved(trained.model.eval(), trained.streams["val"], stream.starts),
    }


if __name__ == "__main__":
    for row in map(evidence, map(ctxkv.load_run, sys.argv[1:])):
        print(f"{row['recipe']}, {row['samples']} conversations, seed {row['seed']}")
        rises = used([row], row["tokens"])
        for (distance, (rise, low, high)), r2 in zip(rises.items(), row["held"], strict=True):
            print(f"from {distance} back: R² {r2:.2f}, used {rise:+.1f}% ({low:+.1f}% to {high:+.1f}%)")
