"""Whether what contexts hold is used: decodability, loss saved and recall, by distance.

    python notebooks/study/evidence.py [RUN...]

measures finished runs; without any, trains what is missing in `runs/evidence` and measures that. The results
are in `results/evidence/evidence.json`.
"""

import sys
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ctxkv_lib.research.ablations import gather_with_other, window_scores
from ctxkv_lib.research.measure import measure
from intervals import difference
from matplotlib.figure import Figure
from torch import Tensor

import ctxkv_lib as ctxkv
from ctxkv_lib.files import read_json, write_rows_json
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.testing import trained_model
from ctxkv_lib.views.axes import BLUE, INK, ORANGE, QUIET, panels, reference, styled

RUNS = Path("runs/evidence")
RESULTS = Path(__file__).parent / "results" / "evidence" / "evidence.json"
RECIPES = ("tuned", "exact")
SAMPLES = 50  # conversations to train
SEEDS = (42, 43, 44)
LINES = {  # of the figure, by recipe and conversations
    ("tuned", 50): (BLUE, "-"),
    ("exact", 50): (ORANGE, "-"),
    ("exact", 100): (ORANGE, "--"),
    ("exact", 500): (ORANGE, ":"),
}
named = itemgetter("recipe", "samples", "seed")  # what tells runs apart
DISTANCES = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
EVERY = 4  # of so many positions with a full window, one is measured
BATCH = 512


@torch.no_grad()
def loss_saved(model: ContextKV, cache: StreamCache, starts: Tensor) -> dict[str, Any]:
    """Measure the loss if all slots from a distance on take contexts from elsewhere in the stream.

    Elsewhere is half the stream away. The slots that lie nearer keep their own contexts.

    Args:
        cache: of the validation stream.
        starts: int64 `[conversations]`, the first token of each.

    Returns:
        `tokens`, the positions measured in each conversation that has any; `losses`, the mean loss of each
        in thousandths of a nat; `rises`, by distance, what it is above that, once if no slot lies between
        it and a nearer distance.
    """
    first = model.window.offsets[-1]
    far_slots = {sum(offset >= each for offset in model.window.offsets): each for each in DISTANCES[::-1]}
    positions = torch.arange(first, len(cache), EVERY)
    conversation = torch.searchsorted(starts, positions, right=True) - 1
    back = positions[:, None] - model.window.slots(positions)
    found: dict[int, list[Tensor]] = {distance: [] for distance in sorted(far_slots.values())}
    for rows in torch.arange(len(positions)).split(BATCH):
        batch, other = gather_with_other(model, cache, first, positions[rows])
        for distance, losses in found.items():
            far = (back[rows] >= distance)[..., None].to(model.device)
            losses.append(window_scores(model, batch, torch.where(far, other, batch.window))[0])
    places = conversation.unique().tolist()

    def by_conversation(parts: list[Tensor]) -> list[float]:
        losses = torch.cat(parts)
        return [round(1000 * losses[conversation == place].mean().item()) for place in places]

    losses = {str(distance): by_conversation(parts) for distance, parts in found.items()}
    own = losses.pop(str(DISTANCES[-1]))  # beyond all slots
    return {
        "tokens": [int((conversation == place).sum()) for place in places],
        "losses": own,
        "rises": {
            at: [far - near for far, near in zip(each, own, strict=True)] for at, each in losses.items()
        },
    }


def trained(recipe: str, seed: int) -> ctxkv.Run:
    """Train one run if it is missing, with 50 conversations to validate."""
    settings: dict[str, Any] = {"runtime.seed": seed, "data.validation_samples": 50}
    settings |= {"attention.copy_weight": 0.0} if recipe == "tuned" else {}
    return ctxkv.run(ctxkv.build_config("offline", recipe, SAMPLES, settings), RUNS / f"{recipe}-{seed}")


def evidence(run: ctxkv.Run) -> dict[str, Any]:
    """Measure a run."""
    run = measure(run, ["probe"])
    config, folder = run.config, ctxkv.RunFolder(run.path)
    starts = ctxkv.load_corpus(config).streams["val"].starts
    model = trained_model(config, folder)
    return {
        "recipe": config.recipe,
        "samples": config.data.samples,
        "seed": config.runtime.seed,
        "held": [round(r2, 4) for r2 in held(model.window.offsets, run.summary["probe"]["recall"])],
        **loss_saved(model, load_cache(folder.caches, "val"), starts),
    }


def recall() -> list[dict[str, float]]:
    """Train `look_up` on preset `recall` if it is missing; return its accuracy by distance."""
    run = measure(ctxkv.run(ctxkv.build_config("recall", "look_up"), RUNS / "look_up"), ["recall_task"])
    task = run.summary["recall_task"]
    return [{key: row[key] for key in ("from", "to", "tokens", "accuracy")} for row in task["by_distance"]]


def held(offsets: list[int], decoded: list[dict[str, Any]]) -> list[float]:
    """Compute how well tokens between two of `DISTANCES` are decoded from the nearest slot that read them.

    Args:
        offsets: of the slots, in tokens.
        decoded: `probe.recall` of the summary.

    Returns:
        R², mean over the tokens of each interval; 0 beyond the distances that the probe measured.
    """
    at, r2 = zip(*((row["distance"], max(row["r2"], 0)) for row in decoded), strict=True)
    tokens = np.arange(1, DISTANCES[-1])
    nearest = np.array(offsets)[np.searchsorted(offsets, tokens, side="right") - 1]
    means = np.interp(tokens - nearest, at, r2, right=0)
    return [float(means[low - 1 : high - 1].mean()) for low, high in pairwise(DISTANCES)]


def runs_of(results: dict[str, Any], recipe: str, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Return the runs of a recipe and size."""
    return [run for run in results["runs"] if (run["recipe"], run["samples"]) == (recipe, samples)]


def used(results: dict[str, Any], recipe: str, samples: int = SAMPLES) -> list[tuple[float, float, float]]:
    """Compute the rise of perplexity in per cent without the slots from each distance on, with intervals."""
    runs, tokens = runs_of(results, recipe, samples), np.array(results["tokens"])
    own = np.array([run["losses"] for run in runs])

    def rises(distance: int) -> Any:
        kept = [max(at for at in map(int, run["rises"]) if at <= distance) for run in runs]
        return np.array([run["rises"][str(at)] for run, at in zip(runs, kept, strict=True)])

    return [difference((own + rises(each)) / 1000, own / 1000, tokens) for each in DISTANCES[:-1]]


@styled
def evidence_figure(results: dict[str, Any]) -> Figure:
    """Draw what the window holds, what the model loses without it, and what is recalled, by distance."""
    count = 3 if results["recall"] else 2
    figure, axes = panels(count, 3.5 * count, rows=count)
    hold, use = axes[:2]
    for (recipe, samples), (colour, style) in LINES.items():
        if not (runs := runs_of(results, recipe, samples)):
            continue
        look: dict[str, Any] = {"color": colour, "ls": style, "label": f"{recipe}, {samples} conversations"}
        r2 = [float(np.mean(each)) for each in zip(*(run["held"] for run in runs), strict=True)]
        hold.stairs(r2, DISTANCES, baseline=None, lw=2.2, **look)
        middle, low, high = np.array(used(results, recipe, samples)).T
        use.errorbar(DISTANCES[:-1], middle, (middle - low, high - middle), marker="o", **look)
    hold.set(
        title="Held: a token is decoded from the nearest slot that read it", ylabel="R² (mean)", ylim=(0, 1)
    )
    reference(use.axhline, 0)
    use.set(title="Used: slots from here on take other contexts", ylabel="Rise of validation PPL (%)")
    for ax in axes[2:]:
        rows = results["recall"]
        edges = [*(row["from"] for row in rows), rows[-1]["to"] + 1]
        share = [100 * row["accuracy"] for row in rows]
        ax.stairs(share, edges, baseline=None, color=INK, lw=2.2, label="look_up, preset recall")
        reference(ax.axhline, 4, "guessing", color=QUIET, ls=":")
        ax.set(title="Recalled: values of made-up pairs", ylabel="Values recalled (%)", ylim=(0, 104))
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks(DISTANCES, [f"{distance:,}" for distance in DISTANCES])
        ax.minorticks_off()
        ax.set_xlim(DISTANCES[0] / 1.1, DISTANCES[-1] * 1.1)
        ax.legend(loc="best")
    axes[-1].set_xlabel("Distance back (tokens, log scale)")
    return figure


def main(paths: list[str]) -> None:
    """Measure runs, and add them to the results; recall, which takes longest, last."""
    results = read_json(RESULTS) if RESULTS.is_file() else {"runs": [], "recall": []}
    new = map(ctxkv.load_run, paths) if paths else (trained(name, seed) for name in RECIPES for seed in SEEDS)
    for found in map(evidence, new):
        tokens = found.pop("tokens")
        assert tokens == results.setdefault("tokens", tokens)  # the same text in all
        others = (run for run in results["runs"] if named(run) != named(found))
        results["runs"] = sorted([*others, found], key=named)
        write_rows_json(RESULTS, results)
        recipe, samples, _ = named(found)
        for distance, (percent, low, high) in zip(DISTANCES, used(results, recipe, samples), strict=False):
            print(f"{recipe}, {samples}, from {distance} on: {percent:+.1f}% ({low:+.1f} to {high:+.1f})")
    if not paths:
        write_rows_json(RESULTS, {**results, "recall": recall()})


if __name__ == "__main__":
    main(sys.argv[1:])
