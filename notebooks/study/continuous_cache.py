"""What a continuous cache adds to a trained model (Grave et al., 2017); nothing is trained.

    python notebooks/study/continuous_cache.py PART RUN...

Each position of the window votes for the token that followed it, by how similar its hidden state is to the
present one; in *copying*, its context. The four caches of the n-grams, which compare tokens only, are added
to the model, and to copying. `results/PART/cache.json` gets a row for each run; if PART is a
sweep, the model's own losses are in its `sweep.json`.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ctxkv_lib.hf.copying import Copying, Recent
from ctxkv_lib.research.ngrams import four_caches, with_caches
from ctxkv_lib.research.sweep import identity
from ctxkv_lib.research.sweep_file import read_sweep
from ctxkv_lib.research.sweep_table import Results
from intervals import difference, test_tokens
from torch import Tensor

import ctxkv_lib as ctxkv
from ctxkv_lib.data.tokens import TokenStream
from ctxkv_lib.files import read_json, write_rows_json
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.evaluation import perplexity
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.rows import as_read
from ctxkv_lib.runs.testing import by_conversation, test_cache, test_stream, trained_model

RESULTS = Path(__file__).parent / "results"
SHARPNESS = (0, 1, 2, 4, 8, 16, 32)  # the factor of the cosine; 0: all tokens of the window count the same
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of the cache
KINDS = {  # of caches: what positions are compared by, and the factors of it that are tried
    "unigram cache": ("hidden states", (0,)),
    "continuous cache": ("hidden states", SHARPNESS),
    "copying": ("contexts", SHARPNESS),
}
WITH_FOUR = {"model": "four caches", "copying": "copying and four caches"}  # of the n-grams, on top
SPLITS = ("val", "test")
BATCH = 512
named = itemgetter("variant", "samples", "seed")  # what tells runs of a part apart


class Read(NamedTuple):
    """A stream of n + 1 tokens as a model reads it.

    Attributes:
        ids: int64 `[n + 1]`; position i reads token i, and its next token is token i + 1.
        losses: float64 `[n]`, in nats.
        keys: what positions are compared by, by name: float32 `[n, ...]`, on the CPU.
    """

    ids: Tensor
    losses: Tensor
    keys: dict[str, Tensor]


@torch.no_grad()
def read(model: ContextKV, cache: StreamCache) -> Read:
    """Compute losses, hidden states and contexts of each position of a stream; a mixer has no contexts."""
    losses, hidden = [], []
    for batch in cache.batches(torch.arange(len(cache)), BATCH, model):
        found, _ = batch.attend(model)
        losses.append(model.losses(found, batch.tokens, batch.targets)[0].cpu())
        hidden.append(found.float().cpu())
    keys = {"hidden states": torch.cat(hidden)}
    if cache.contexts.shape[1]:
        keys["contexts"] = cache.contexts[1 : len(cache) + 1].float().cpu()
    return Read(cache.ids.long().cpu(), torch.cat(losses).double(), keys)


def votes(keys: Tensor, ids: Tensor, window: int, sharpness: Sequence[int]) -> Tensor:
    """Compute the probability that the cache gives each next token, by sharpness.

    Args:
        keys, ids: as in `Read`.
        window: how many positions before the present one vote.

    Returns:
        `[len(sharpness), n]`; 0 at the first position, before which there is none.
    """
    places, found = torch.arange(len(keys)), []
    for factor in sharpness:
        copies = Copying(1, factor).copies(Recent(keys, ids, places, before=places), window)
        found.append((copies.shares * (copies.tokens == ids[1:, None])).sum(dim=1))
    return torch.stack(found).double()


def mixed(losses: Tensor, share: Tensor, weight: float) -> Tensor:
    """Compute the losses of (1 - weight) times the model's probabilities plus `weight` times the cache's."""
    return -((1 - weight) * (-losses).exp() + weight * share).log()


def measured(path: str, part: str) -> dict[str, Any]:
    """Choose sharpness and weight on the validation text of a run, and measure its test text once.

    A run of a part that is a sweep is named as there, and has no row `model`.
    """
    run = ctxkv.load_run(path)
    folder, config = ctxkv.RunFolder(run.path), run.config
    model, stream = trained_model(config, folder), test_stream(config)
    assert stream is not None
    cache = load_cache(folder.caches, "val")
    if served := getattr(model.attention, "served", None):  # a mixer with contexts: the model that has them
        model = served(model)[0].to(model.device).eval()
        cache = test_cache(config, model, TokenStream(cache.ids, stream.starts[:0]))
    else:
        cache = as_read(model, cache, trained=False)
    held_out = read(model, cache)
    test = read(model, test_cache(config, model, stream))
    scored = {"model": (held_out.losses, test.losses)}
    chosen: dict[str, dict[str, Any]] = {"model": {}}
    for kind, (key, sharpness) in KINDS.items():
        if key not in held_out.keys:
            continue
        # Copying compares no more contexts than attention keeps.
        window = model.window.offsets[-1] if key == "contexts" else config.model.context_window
        shares = [votes(each.keys[key], each.ids, window, sharpness) for each in (held_out, test)]
        grid = {
            (place, weight): mixed(held_out.losses, shares[0][place], weight)
            for place in range(len(sharpness))
            for weight in WEIGHTS
        }
        place, weight = min(grid, key=lambda pair: grid[pair].mean())
        scored[kind] = grid[place, weight], mixed(test.losses, shares[1][place], weight)
        chosen[kind] = {"sharpness": sharpness[place], "weight": weight}
    caches = {
        name: four_caches(each.ids.numpy(), config.model.context_window)
        for name, each in zip(SPLITS, (held_out, test), strict=True)
    }
    for base, kind in WITH_FOUR.items():
        if base in scored:
            likely = {name: (-own).exp().numpy() for name, own in zip(SPLITS, scored[base], strict=True)}
            best, weights = with_caches(likely, caches)
            scored[kind] = tuple(torch.from_numpy(-np.log(best[-1][name])) for name in SPLITS)
            chosen[kind] = {"weights": [round(weight, 4) for weight in weights]}
    rows = {kind: {**chosen[kind], **_row(*losses, stream)} for kind, losses in scored.items()}
    for kind in ("unigram cache", *(("four caches",) if "copying" in rows else ())):
        del rows[kind]["test_conversations"]  # no interval of it is computed
    if swept := _swept(part).get(identity(config)):
        del rows["model"]
    mixer = config.plugins.get("mixer")
    variant = mixer.name.partition(":")[2] if mixer else config.recipe
    return {
        "variant": swept["variant"] if swept else variant,
        "samples": config.data.samples,
        "seed": config.runtime.seed,
        "validation_samples": config.data.validation_samples,
        "rows": rows,
    }


def _row(validation: Tensor, test: Tensor, stream: TokenStream) -> dict[str, Any]:
    """Describe the losses of both splits, `[n]`."""
    return {
        "val_ppl": round(perplexity(validation.mean().item()), 4),
        "test_ppl": round(perplexity(test.mean().item()), 4),
        "test_conversations": [round(part.mean().item(), 4) for part in by_conversation(test, stream.starts)],
    }


def change(runs: Sequence[dict[str, Any]], kind: str) -> tuple[float, float, float]:
    """Compute by how many per cent a kind of cache changes the test perplexity; as `difference`."""
    changed, base = (  # [seeds, conversations]
        np.array([run["rows"][name]["test_conversations"] for run in runs]) for name in (kind, "model")
    )
    return difference(changed, base, test_tokens(base.shape[1]))


def found(part: str) -> list[dict[str, Any]]:
    """Read the runs of a part that are measured, in order, all with a row `model`."""
    own = {named(cell): cell for cell in _swept(part).values()}
    return [{**run, "rows": {"model": own.get(named(run)), **run["rows"]}} for run in _recorded(part)]


def results(part: str) -> Results:
    """Read the results of a part that is a sweep."""
    return read_sweep(RESULTS / part / "sweep.json")


def _recorded(part: str) -> list[dict[str, Any]]:
    path = RESULTS / part / "cache.json"
    return read_json(path)["runs"] if path.is_file() else []


def _swept(part: str) -> dict[str, dict[str, Any]]:
    """Read the finished runs of a part that is a sweep, by the identity of their configuration."""
    with suppress(FileNotFoundError):
        return {cell["config"]: cell for cell in results(part)["cells"]}
    return {}


def main(part: str, paths: list[str]) -> None:
    """Measure runs, and add them to the results of a part."""
    for path in paths:
        new = measured(path, part)
        runs = [run for run in _recorded(part) if named(run) != named(new)]
        runs.append(new)
        name = f"{new['variant']}, {new['samples']} conversations, seed {new['seed']}"
        print(name, *(f"{key} {row['test_ppl']:.1f}" for key, row in new["rows"].items()), sep="; ")
        write_rows_json(RESULTS / part / "cache.json", {"runs": sorted(runs, key=named)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
