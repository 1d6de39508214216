"""Test split, yardsticks and what contexts remember; an older run lacks them and has dashes or no section."""

from collections.abc import Iterator, Mapping, Sequence

from ..model.config import ModelConfig
from .tables import (
    MISSING,
    Column,
    Report,
    Say,
    Summary,
    bold,
    markdown_table,
    percent,
    ppl,
    speaker,
    terminal_table,
)

KINDS = ("kneser_ney", "kneser_ney_cache")
SPLITS = ("val", "test")
SHOWN_DISTANCES = (0, 1, 2, 4, 8, 16)  # of the recall; figure and JSON have all


def yardsticks(report: Report) -> list[str]:
    """Perplexities of each run and of n-grams counted on the same tokens, on validation and on test."""
    say, runs = report.say, report.ours
    rows = measured_rows([column.summary for column in runs], say)
    if not rows:
        return []
    own = [bold(say("val_ppl")), *(bold(ppl(column.phase2["val_ppl"])) for column in runs)]
    table = markdown_table([say("metric"), *(column.label for column in runs)], [own, *rows])
    verdicts = [line for column in runs for line in _verdicts(column, say)]
    return [say("yardsticks"), say("yardsticks_how"), table, "\n".join(verdicts)]


def measured_rows(summaries: Sequence[Summary], say: Say) -> list[list[str]]:
    """A name and a cell a run, for each measure that any of the runs has."""
    rows = []
    for split in SPLITS:
        if split == "test":
            tests = [summary.get("test", {}) for summary in summaries]
            rows.append([say("test_ppl"), *(ppl(test.get("ppl")) for test in tests)])
            rows.append([say("test_acc"), *(percent(test.get("acc")) for test in tests)])
        for kind in KINDS:
            found = [_of(summary, kind).get(f"{split}_ppl") for summary in summaries]
            rows.append([say(f"{kind}_{split}"), *map(ppl, found)])
    return [row for row in rows if set(row[1:]) != {MISSING}]


def _of(summary: Summary, kind: str) -> Summary:
    return summary.get("yardsticks", {}).get(kind, {})


def _verdicts(column: Column, say: Say) -> Iterator[str]:
    """The model against the n-grams, on each split that has both."""
    models = {"val": column.phase2["val_ppl"], "test": column.summary.get("test", {}).get("ppl")}
    for split, model in models.items():
        found = {kind: _of(column.summary, kind) for kind in KINDS}
        if model is None or any(f"{split}_ppl" not in each for each in found.values()):
            continue
        plain, cached = (100 * (model / each[f"{split}_ppl"] - 1) for each in found.values())
        order, floor = found["kneser_ney"]["order"], say(f"floor {found['kneser_ney']['floor']}")
        values = {"order": order, "floor": floor, "plain": plain, "cached": cached}
        yield say(f"yardsticks_{split}", label=column.label, **values)


def contexts_remember(report: Report) -> list[str]:
    """What contexts hold of the text before them; of one run, beside fresh blocks."""
    say = report.say
    probes = {column.label: column.summary["probe"] for column in report.ours if "probe" in column.summary}
    if not probes:
        return []
    blocks = probes if len(report.ours) > 1 else probe_blocks(next(iter(probes.values())), say)
    header, *rows = probe_rows(blocks, report.ours[0].config.model.interval, say)
    verdicts = [
        say("remember_verdict", label=label, reach=_reach(probe), share=probe["coverage"])
        for label, probe in probes.items()
    ]
    parts = [say("remember"), say("remember_how"), markdown_table(header, rows), "\n".join(verdicts)]
    return parts if len(report.ours) > 1 else [*parts, say("remember_figure", folder=report.figures)]


def format_probe(probe: Summary, model: ModelConfig, language: str = "en") -> str:
    """`probe_table` as plain text for a terminal."""
    return terminal_table(probe_table(probe, model, language))


def probe_table(probe: Summary, model: ModelConfig, language: str = "en") -> list[list[str]]:
    """One run's contexts beside fresh blocks, header first."""
    say = speaker(language)
    return probe_rows(probe_blocks(probe, say), model.interval, say)


def probe_blocks(probe: Summary, say: Say) -> dict[str, Summary]:
    """The trained block and the fresh ones beside it, by name."""
    fresh = {say("remember_fresh", std=std): found for std, found in probe["fresh"].items()}
    return {say("remember_trained"): probe, **fresh}


def probe_rows(blocks: Mapping[str, Summary], interval: int, say: Say) -> list[list[str]]:
    """A header, then a name and a cell a block for each measure."""
    rows = [[say("metric"), *blocks]]
    recalls = [{row["distance"]: row for row in block["recall"]} for block in blocks.values()]
    for distance in SHOWN_DISTANCES:
        found = [recall[distance] for recall in recalls if distance in recall]
        if len(found) == len(recalls):
            cells = [say("remember_cell", r2=round(row["r2"], 2) + 0, top1=row["top1"]) for row in found]
            rows.append([say("remember_back", distance=distance), *cells])
    rows.append(
        [say("remember_mean", interval=interval), *(f"{b['mean_recall']:.2f}" for b in blocks.values())]
    )
    rows.append([say("remember_horizon"), *(_reach(block) for block in blocks.values())])
    for key in ("coverage", "centroid", "effective_rank"):
        rows.append([say(f"remember_{key}"), *(percent(block[key]) for block in blocks.values())])
    return rows


def _reach(probe: Summary) -> str:
    return MISSING if probe["horizon"] is None else str(probe["horizon"])
