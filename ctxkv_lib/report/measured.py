"""Test split, yardsticks, contexts and generated text; an older run lacks them: dashes, or no section."""

import math
from collections.abc import Iterator, Mapping, Sequence

from ..method.config import ModelConfig
from ..views.figures import span
from .tables import (
    MISSING,
    Column,
    Report,
    Say,
    Summary,
    bold,
    judged,
    literal,
    markdown_table,
    percent,
    ppl,
    speaker,
    terminal_table,
    whole,
)

KINDS = ("kneser_ney", "kneser_ney_cache")
TABLE_KIND = "kneser_ney_table_cache"  # counts what a token table is made from, too
SPLITS = ("val", "test")
CHANGED = ("intact", "slot_0", "shuffled", "elsewhere", "zero")
GROUPS = ("by_repetition", "by_history", "by_frequency")
SHOWN_DISTANCES = (0, 1, 2, 4, 8, 16)  # of the recall; figure and JSON have all


def yardsticks(report: Report) -> list[str]:
    """Perplexities of each run and of n-grams counted on the same tokens, on validation and on test."""
    say, runs = report.say, report.ours
    rows = measured_rows([column.summary for column in runs], say)
    if not rows:
        return []
    own = [bold(say("val_ppl")), *(bold(ppl(column.phase2["val_ppl"])) for column in runs)]
    table = markdown_table([say("metric"), *(column.label for column in runs)], [own, *rows])
    verdicts = [line for column in runs for line in _verdicts(column, say)] + list(_errors(runs, say))
    return [say("yardsticks"), say("yardsticks_how"), table, "\n".join(verdicts)]


def measured_rows(summaries: Sequence[Summary], say: Say) -> list[list[str]]:
    """A name and a cell a run, for each measure that any of the runs has."""
    rows = []
    for split in SPLITS:
        if split == "test":
            tests = [summary.get("test", {}) for summary in summaries]
            rows.append([say("test_ppl"), *(ppl(test.get("ppl")) for test in tests)])
            rows.append([say("test_acc"), *(percent(test.get("acc")) for test in tests)])
        for kind in (*KINDS, TABLE_KIND):
            found = [_of(summary, kind).get(f"{split}_ppl") for summary in summaries]
            rows.append([say(f"{kind}_{split}"), *map(ppl, found)])
    return [row for row in rows if set(row[1:]) != {MISSING}]


def _of(summary: Summary, kind: str) -> Summary:
    return summary.get("ngrams", {}).get(kind, {})


def _verdicts(column: Column, say: Say) -> Iterator[str]:
    """The model against the n-grams, on each split that has both."""
    models = {"val": column.phase2["val_ppl"], "test": column.summary.get("test", {}).get("ppl")}
    for split, model in models.items():
        found = {kind: _of(column.summary, kind) for kind in KINDS}
        if model is None or any(f"{split}_ppl" not in each for each in found.values()):
            continue
        lower = [100 * (1 - model / each[f"{split}_ppl"]) for each in found.values()]
        plain, cached = (say(judged(by, "below", "same", "above"), percent=abs(by)) for by in lower)
        order, floor = found["kneser_ney"]["order"], say(f"floor {found['kneser_ney']['floor']}")
        values = {"order": order, "floor": floor, "plain": plain, "cached": cached}
        yield say(f"yardsticks_{split}", label=column.label, **values)


def _errors(runs: Sequence[Column], say: Say) -> Iterator[str]:
    """How far a test perplexity, and the difference of two, would move on other conversations."""
    known = {column.label: column.summary.get("test", {}).get("conversations", []) for column in runs}
    known = {label: found for label, found in known.items() if len(found) > 1}
    for label, found in known.items():
        tokens, losses = zip(*found, strict=True)
        _, error = over_conversations(tokens, losses)
        yield say("test_error", label=label, error=error, count=len(tokens))
    for label, found in list(known.items())[1:]:
        base, first = next(iter(known.items()))
        tokens, losses = zip(*found, strict=True)
        if tokens == tuple(count for count, _ in first):
            more = [loss - before for loss, (_, before) in zip(losses, first, strict=True)]
            mean, error = over_conversations(tokens, more)
            change = math.expm1(mean)
            yield say("test_paired", label=label, base=base, change=change, error=error * (1 + change))


def over_conversations(tokens: Sequence[int], losses: Sequence[float]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error where whole conversations are what is drawn.

    Args:
        tokens: of each of two conversations or more.
        losses: their means, in nats, or differences of two models' means.
    """
    total, count = sum(tokens), len(tokens)
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / total
    squares = sum((n * (loss - mean)) ** 2 for n, loss in zip(tokens, losses, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


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


def contexts_used(report: Report) -> list[str]:
    """What other contexts cost; of one run, for kinds of positions, too."""
    say, runs = report.say, [column for column in report.ours if "ablations" in column.summary]
    if not runs:
        return []
    intro = [say("used"), say("used_how")]
    if len(report.ours) > 1:
        return [*intro, markdown_table(*_head_and_rows(compared_ablations(runs, say)))]
    found = runs[0].summary["ablations"]
    tables = [markdown_table(*_head_and_rows(rows)) for rows in ablation_tables(found, say)]
    return [*intro, *tables, say("used_figure", folder=report.figures)]


def format_ablations(ablations: Summary, language: str = "en") -> str:
    """The tables of `contexts_used` for one run, for a terminal."""
    return "\n\n".join(map(terminal_table, ablation_tables(ablations, speaker(language))))


def ablation_tables(ablations: Summary, say: Say) -> list[list[list[str]]]:
    """Two tables: perplexity by ablation, and with and without contexts by kind of position."""
    header = [say("used_contexts", count=ablations["positions"]), say("val_ppl"), say("used_change")]
    changed = [header, *(_changed_row(ablations["changed"], name, say) for name in CHANGED)]
    kinds = [[say("used_kind"), say("used_positions"), say("val_ppl"), say("used_other_ppl")]]
    for group in GROUPS:
        for row in ablations[group]:
            key = f"used_{group}_{row['from']}" if group == "by_repetition" else f"used_{group}"
            name = say(key, span=span(row))
            kinds.append([name, whole(row["tokens"]), ppl(row["ppl"]), ppl(row["other_ppl"])])
    return [changed, kinds]


def compared_ablations(runs: Sequence[Column], say: Say) -> list[list[str]]:
    """A header, then a cell a run: what each ablation costs, and perplexity at repeated pairs."""
    found = [column.summary["ablations"] for column in runs]
    rows = [[say("metric"), *(column.label for column in runs)]]
    rows.append([say("used_measured"), *(whole(each["positions"]) for each in found)])
    for name in CHANGED[1:]:
        rows.append([say(f"used_{name}"), *(_change(each["changed"][name], say) for each in found)])
    for kind in (1, 0):
        cells = [{row["from"]: row for row in each["by_repetition"]}.get(kind) for each in found]
        named = say("used_ppl_at", kind=say(f"used_by_repetition_{kind}"))
        rows.append([named, *(_with_count(cell) for cell in cells)])
    return rows


def _with_count(row: Summary | None) -> str:
    """The perplexity of a bin, and of how many positions it is."""
    return MISSING if row is None else f"{ppl(row['ppl'])} ({whole(row['tokens'])})"


def _changed_row(changed: Mapping[str, Summary], name: str, say: Say) -> list[str]:
    change = MISSING if name == "intact" else _change(changed[name], say)
    return [say(f"used_{name}"), ppl(changed[name]["ppl"]), change]


def _change(found: Summary, say: Say) -> str:
    return say("used_percent", percent=round(found["percent"], 1) + 0, error=found["error"])


def _head_and_rows(rows: Sequence[list[str]]) -> tuple[list[str], Sequence[list[str]]]:
    return rows[0], rows[1:]


def told_and_asked(report: Report) -> list[str]:
    """The recall task, of runs whose text it is; of one run, by distance and place, too."""
    say, runs = report.say, [column for column in report.ours if "recall_task" in column.summary]
    if not runs:
        return []
    found = [column.summary["recall_task"] for column in runs]
    rows = [
        [say("recall_answers"), *(whole(each["answers"]) for each in found)],
        [say("recall_accuracy"), *(percent(each["accuracy"]) for each in found)],
        [say("recall_guessing"), *(percent(1 / each["values"]) for each in found)],
        [say("recall_ppl"), *(ppl(each["ppl"]) for each in found)],
    ]
    worst = [min(each["by_place"], key=lambda row: row["accuracy"]) for each in found]
    cells = [say("recall_at", span=span(row), share=row["accuracy"]) for row in worst]
    rows.append([say("recall_worst"), *cells])
    parts = [markdown_table([say("metric"), *(column.label for column in runs)], rows)]
    if len(report.ours) == 1:
        for group in ("by_distance", "by_place"):
            bins = [
                [span(b), whole(b["tokens"]), percent(b["accuracy"]), ppl(b["ppl"])] for b in found[0][group]
            ]
            keys = (f"recall_{group}", "recall_answers", "recall_accuracy", "recall_ppl")
            parts.append(markdown_table([say(key) for key in keys], bins))
        parts.append(say("recall_figure", folder=report.figures))
    return [say("recall"), say("recall_how"), *parts]


def generated_text(report: Report) -> list[str]:
    """How much greedy text repeats itself; of one run, with a sample."""
    say, runs = report.say, [column for column in report.ours if "generation" in column.summary]
    if not runs:
        return []
    found = [column.summary["generation"] for column in runs]
    rows = [[say("generated_text"), *(whole(each["samples"]) for each in found)]]
    for name, of in (("", found), ("_text", [each["text"] for each in found])):
        rows.append([say(f"generated_run{name}"), *(whole(each["longest_run"]) for each in of)])
        rows.append([say(f"generated_repeated{name}"), *(percent(each["repeated"]) for each in of)])
    table = markdown_table([say("metric"), *(column.label for column in runs)], rows)
    parts = [say("generated"), say("generated_how"), table]
    if len(report.ours) == 1:
        sample = {name: literal(text) for name, text in found[0]["sample"].items()}
        parts.append(say("generated_sample", **sample))
    return parts


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
