"""A card: what an idea changes, and what it costs, beside the variants that it is compared with."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..errors import friendly_errors
from ..progress import progress_bar
from ..runs.opened import open_run
from .difference import AnyRun, Runs, Seeds, Variant, compared, variants
from .info import bytes_kept
from .tables import COUNT, PPL, RATIO, cell

DIFFERENCE = ("percent", "low", "high", "verdict")
FORMATS = {  # of numbers on a terminal
    "test_ppl": PPL,
    "test_ppl_sd": PPL,
    **dict.fromkeys(DIFFERENCE[:3], "+.1f"),
    "weights": COUNT,
    "bytes_kept": COUNT,
    "epoch_time": RATIO,
    "memory_span": ".0f",
}


@friendly_errors()
def card(runs: Runs, base: AnyRun | Sequence[AnyRun] | None = None) -> pd.DataFrame:
    """Compare variants by what they reach and by what they cost.

    Runs that differ only in `runtime.seed` are one variant, as in `difference`. The weights, the bytes and
    the memory span are those of one run of the variant.

    Args:
        runs: finished runs, or their folders. A mapping gives each variant its label.
        base: the runs of the variant to compare with. The default is the first variant of `runs`.

    Returns:
        one row per variant, with the base first:

        - `seeds`: number of runs.
        - `test_ppl`, `test_ppl_sd`: mean and standard deviation of the test perplexity over seeds.
        - `percent`, `low`, `high`, `verdict`: the difference from the base, as in `difference`.
        - `weights`: number of weights of the block and the layer.
        - `bytes_kept`: what generation keeps of a text of any length (see `report.info.bytes_kept`).
        - `epoch_time`: seconds per epoch of Phase 2, divided by those of the base. This is meaningful only if
          both were trained on the same machine in the same way.
        - `memory_span`: the last distance in tokens at which a context shows a trace of a token (see
          `ctxkv.memory_span`), measured on the validation text. It is missing if the layer reads tokens.

        Values that do not apply are missing.

    Raises:
        UserError: as in `difference` and `open_run`.
    """
    rows = {}
    for variant in progress_bar(variants(runs, base), "Variants of the card", unit="variant"):
        rows[variant.name] = {**_results(variant), **_costs(variant)}
    return pd.DataFrame.from_dict(rows, orient="index")


def _results(variant: Variant) -> dict[str, Any]:
    tested = [run.summary.get("test", {}).get("ppl") for run in variant.seeds.values()]
    perplexities = pd.Series(tested, dtype=float)
    result: dict[str, Any] = {
        "seeds": len(tested),
        "test_ppl": perplexities.mean(),
        "test_ppl_sd": perplexities.std(),
        **dict.fromkeys(DIFFERENCE, math.nan),
    }
    if variant.seeds is variant.base:
        return result | {"verdict": "the base"}
    if not variant.seeds.keys() & variant.base.keys():
        return result | {"verdict": "shares no seed with the base"}
    row = compared(variant.seeds, variant.base)
    return result | {name: row[name] for name in DIFFERENCE}


def _costs(variant: Variant) -> dict[str, Any]:
    run = next(iter(variant.seeds.values()))
    opened, parameters = open_run(run), run.summary["parameters"]
    has_contexts = opened.model.has_contexts
    return {
        "weights": parameters["trainable_phase1"] + parameters["trainable_phase2"],
        "bytes_kept": bytes_kept(opened.model),
        "epoch_time": _epoch_seconds(variant.seeds) / _epoch_seconds(variant.base),
        "memory_span": opened.memory_span().attrs["span"] if has_contexts else math.nan,
    }


def _epoch_seconds(seeds: Seeds) -> float:
    """Return the mean over seeds, NaN if there are none."""
    seconds = [run.summary["phase2"]["seconds_per_epoch"] for run in seeds.values()]
    return float(pd.Series(seconds, dtype=float).mean())


def format_card(table: pd.DataFrame) -> str:
    """Format the result of `card` for a terminal."""
    cells = {name: [cell(value, FORMATS.get(name, "")) for value in table[name]] for name in table}
    return pd.DataFrame(cells, index=table.index).to_string()
