"""Measure which tokens can be decoded from the 32 slots: `python notebooks/study/keyholes.py`.

The script runs Phase 1 of the recipes `exact` and `tuned`, with 50 conversations each. It measures how well
the last token that a context has read, and the tokens before it, can be decoded from the context. It also
computes the loss of Phase 1 for the trained contexts, for contexts of an untrained block, and for random
vectors. `story.py` draws the results. The script takes 10 minutes on one core.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from tables import TOP
from train import FIFTY, SEEDS

import ctxkv_lib as ctxkv
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.oacd import oacd_loss

# Losses are computed on this many validation tokens, as in notebook 2.
COMPARED = 1_000
ROWS = TOP / "notebooks" / "study" / "results" / "keyholes" / "keyholes.json"


def curve(table: Any, block: str = "") -> dict[str, Any]:
    """Return R² and share of recovered tokens for each distance, from a table of `memory_span`."""
    return {name: table[f"{block}{name}"].round(4).tolist() for name in ("r2", "recovered")}


@torch.no_grad()
def losses(prepared: Any, seed: int) -> dict[str, float]:
    """Compute the loss of Phase 1 for contexts of a trained and an untrained block, and for noise."""
    model, config = prepared.model.cpu(), prepared.run.config
    embeddings, rows = distinct_rows(model, prepared.streams["val"].ids[:COMPARED].cpu())
    torch.manual_seed(seed)
    untrained = ctxkv.ContextBlock(config.model.context_dim, config.model.hidden_size)
    zero = torch.zeros(config.model.context_dim)
    contexts = {
        "trained": prepared.stream("val").contexts()[:COMPARED],
        "untrained": exact_contexts(untrained, untrained.project_inputs(embeddings), rows, zero, 1e-5)[1:],
    }
    contexts["noise"] = F.layer_norm(torch.randn_like(contexts["trained"]), contexts["trained"].shape[1:])
    weight = config.phase1.centroid_weight
    return {name: round(oacd_loss(each, weight).item(), 4) for name, each in contexts.items()}


def keyholes(recipe: str, seed: int) -> dict[str, Any]:
    """Train a recipe's contexts. Measure what they encode, and the same before Phase 1."""
    settings = {**FIFTY, "runtime.seed": seed}
    prepared = ctxkv.prepare(ctxkv.build_config("offline", recipe, 50, settings=settings))
    table = prepared.memory_span()
    return {
        "recipe": recipe,
        "samples": 50,
        "seed": seed,
        "offsets": list(prepared.model.window.offsets),
        "memory_span": table.attrs["span"],
        "losses": losses(prepared, seed),
        "distance": table.index.tolist(),
        **curve(table),
        "untrained": curve(table, "untrained_"),
    }


if __name__ == "__main__":
    runs = [keyholes(recipe, seed) for recipe in ("exact", "tuned") for seed in SEEDS]
    ROWS.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(run) for run in runs)
    ROWS.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")
