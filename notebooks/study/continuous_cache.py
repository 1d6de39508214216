"""What a continuous cache adds to a trained model (Grave et al., 2017); nothing is trained.

    python notebooks/study/continuous_cache.py RUN...

Each position of the window votes for the token that followed it, by how similar its hidden state is to the
present one. `results/cache/cache.json` gets a row for each run.
"""

import json
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from intervals import rise, test_tokens
from torch import Tensor

import ctxkv_lib as ctxkv
from ctxkv_lib.files import write_rows_json
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.evaluation import perplexity
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.rows import as_read
from ctxkv_lib.runs.testing import by_conversation, test_cache, test_stream, trained_model

RESULTS = Path(__file__).parent / "results" / "cache" / "cache.json"
SHARPNESS = (0, 1, 2, 4, 8, 16, 32)  # the factor of the cosine; 0: all tokens of the window count the same
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of the cache
BATCH = 512
KEY = ("variant", "samples", "seed")  # of a run in the results


@torch.no_grad()
def scored(model: ContextKV, cache: StreamCache) -> tuple[Tensor, Tensor]:
    """Compute loss `[n]` and hidden state `[n, hidden_size]` of each position of a stream, on the CPU."""
    losses, hidden = [], []
    for batch in cache.batches(torch.arange(len(cache)), BATCH, model):
        found, _ = batch.attend(model)
        losses.append(model.losses(found, batch.tokens, batch.targets)[0].cpu())
        hidden.append(found.float().cpu())
    return torch.cat(losses).double(), torch.cat(hidden)


def votes(hidden: Tensor, ids: Tensor, window: int) -> Tensor:
    """Compute the probability that the cache gives each next token, by sharpness.

    Args:
        hidden: `[n, hidden_size]`.
        ids: int64 `[n + 1]`; position i reads token i, and its next token is token i + 1.
        window: how many positions before the present one vote.

    Returns:
        `[len(SHARPNESS), n]`; 0 at the first position, before which there is none.
    """
    directions, found = F.normalize(hidden, dim=1), []
    for rows in torch.arange(len(hidden)).split(BATCH):
        before = torch.arange(max(0, int(rows[0]) - window), int(rows[-1]))
        back = rows[:, None] - before
        voting = (back >= 1) & (back <= window)
        agreeing = voting & (ids[before + 1] == ids[rows + 1, None])
        cosine = directions[rows] @ directions[before].T
        shares = []
        for factor in SHARPNESS:
            weight = (factor * (cosine - 1)).exp()
            shares.append((weight * agreeing).sum(dim=1) / (weight * voting).sum(dim=1).clamp(min=1e-30))
        found.append(torch.stack(shares))
    return torch.cat(found, dim=1).double()


def mixed(losses: Tensor, share: Tensor, weight: float) -> Tensor:
    """Compute the losses of (1 - weight) times the model's probabilities plus `weight` times the cache's."""
    return -((1 - weight) * (-losses).exp() + weight * share).log()


def measured(path: str) -> dict[str, Any]:
    """Choose sharpness and weight on the validation text of a run, and measure its test text once."""
    run = ctxkv.load_run(path)
    folder, config = ctxkv.RunFolder(run.path), run.config
    model, window = trained_model(config, folder), config.model.context_window
    held_out = as_read(model, load_cache(folder.caches, "val"), trained=False)
    losses, hidden = scored(model, held_out)
    shares = votes(hidden, held_out.ids.long(), window)
    grid = {
        (factor, weight): mixed(losses, share, weight).mean().item()
        for factor, share in zip(SHARPNESS, shares, strict=True)
        for weight in WEIGHTS
    }
    unigram = min((key for key in grid if key[0] == 0), key=grid.__getitem__)
    chosen = {
        "model": (0, 0.0),
        "unigram cache": unigram,
        "continuous cache": min(grid, key=grid.__getitem__),
    }
    stream = test_stream(config)
    assert stream is not None
    losses, hidden = scored(model, test_cache(config, model, stream))
    shares = votes(hidden, stream.ids, window)
    rows: dict[str, dict[str, Any]] = {}
    for name, (factor, weight) in chosen.items():
        test = mixed(losses, shares[SHARPNESS.index(factor)], weight)
        rows[name] = {
            "sharpness": factor,
            "weight": weight,
            "val_ppl": round(perplexity(grid[factor, weight]), 4),
            "test_ppl": round(perplexity(test.mean().item()), 4),
        }
        if name != "unigram cache":  # of which no interval is computed
            rows[name]["test_conversations"] = [
                round(part.mean().item(), 4) for part in by_conversation(test, stream.starts)
            ]
    mixer = config.plugins.get("mixer")
    return {
        "variant": mixer.name.partition(":")[2] if mixer else config.recipe,
        "samples": config.data.samples,
        "seed": config.runtime.seed,
        "validation_samples": config.data.validation_samples,
        "rows": rows,
    }


def change(runs: Sequence[dict[str, Any]], kind: str) -> tuple[float, float, float]:
    """Compute by how many per cent a kind of cache changes the test perplexity of some seeds; as `rise`."""
    changed, base = (  # [seeds, conversations]
        np.array([run["rows"][name]["test_conversations"] for run in runs]) for name in (kind, "model")
    )
    return rise(changed, base, test_tokens(base.shape[1]))


def main(paths: list[str]) -> None:
    """Measure runs, and add them to the results."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.is_file() else []
    for path in paths:
        new = measured(path)
        found = [run for run in found if any(run[key] != new[key] for key in KEY)]
        found.append(new)
        name = f"{new['variant']}, {new['samples']} conversations, seed {new['seed']}"
        print(name, *(f"{key} {row['test_ppl']:.1f}" for key, row in new["rows"].items()), sep="; ")
        write_rows_json(RESULTS, {"runs": sorted(found, key=itemgetter(*KEY))})


if __name__ == "__main__":
    main(sys.argv[1:])
