"""Test split and yardsticks beside each run; an older run, which lacks them, has dashes or no section."""

from collections.abc import Iterator, Sequence

from .tables import MISSING, Column, Report, Say, Summary, bold, markdown_table, percent, ppl

KINDS = ("kneser_ney", "kneser_ney_cache")
SPLITS = ("val", "test")


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
