"""Report sections that judge: runs against each other, what to try next, conclusion.

Every claim is derived from the numbers; a run that got worse reads so.
"""

from collections.abc import Iterator, Sequence

from .results import at_last_epoch, overfits
from .tables import (
    Column,
    Report,
    Say,
    Summary,
    bold,
    judged,
    literal,
    markdown_table,
    method,
    percent,
    ppl,
    ratio,
)


def improvement(first: Summary, last: Summary) -> dict[str, float]:
    """How much better `last` is than `first`, as in `comparison.json`.

    Returns:
        `val_ppl_percent` (percent by which the PPL is lower) and `val_acc_points` (points of accuracy more).
    """
    before, after = first["phase2"], last["phase2"]
    return {
        "val_ppl_percent": 100 * (1 - after["val_ppl"] / before["val_ppl"]),
        "val_acc_points": 100 * (after["val_acc"] - before["val_acc"]),
    }


def comparison_rows(summaries: Sequence[Summary], say: Say) -> list[list[str]]:
    """The published report's four rows: a name, then one cell a run."""
    runs = [summary["phase2"] for summary in summaries]
    return [
        [say("val_ppl"), *(ppl(run["val_ppl"]) for run in runs)],
        [say("val_acc"), *(percent(run["val_acc"]) for run in runs)],
        [say("row_best_epoch"), *(str(run["best_epoch"]) for run in runs)],
        [say("gap"), *(ratio(run["train_val_ratio"]) for run in runs)],
    ]


def changes(first: Summary, last: Summary, say: Say) -> list[str]:
    """What became of each of `comparison_rows` from the first run to the last."""
    before, after, gain = first["phase2"], last["phase2"], improvement(first, last)
    epochs = after["best_epoch"] - before["best_epoch"]
    points = gain["val_acc_points"]
    return [
        _percent_change(gain["val_ppl_percent"], say),
        say(judged(points, "points", "same", "points"), points=points),
        say("epochs_change", change=epochs) if epochs else say("same"),
        _percent_change(100 * (1 - after["train_val_ratio"] / before["train_val_ratio"]), say),
    ]


def _percent_change(lower_by: float, say: Say) -> str:
    return say(judged(lower_by, "lower", "same", "higher"), percent=abs(lower_by))


def comparison(report: Report) -> list[str]:
    """The runs, what the last gained over the first, and the same of the published.

    Nothing for one run, and none of gains where validation texts differ.
    """
    say, ours = report.say, report.ours
    if len(ours) < 2:
        return []
    header = [say("metric")]
    rows = [[row[0]] for row in comparison_rows([], say)]
    for columns, key in ((ours, "improvement"), (report.published, "published_improvement")):
        _append_compared(header, rows, columns, say, key if report.is_one_validation else None)
    title = say("comparison", runs=say("versus").join(column.label for column in ours))
    if not report.is_one_validation:
        return [title, markdown_table(header, rows), say("other_validation")]
    seen = "\n".join(observations(ours[0].summary, ours[-1].summary, say))
    return [title, markdown_table(header, rows), say("observations"), seen]


def _append_compared(
    header: list[str], rows: list[list[str]], columns: Sequence[Column], say: Say, key: str | None
) -> None:
    """Append a cell for each column and, under `key`, what the last of several gained over the first."""
    summaries = [column.summary for column in columns]
    header += [column.label for column in columns]
    for row, (_, *cells) in zip(rows, comparison_rows(summaries, say), strict=True):
        row += cells
    if key and len(columns) > 1:
        header.append(say(key))
        for row, change in zip(rows, changes(summaries[0], summaries[-1], say), strict=True):
            row.append(bold(change))


def observations(first: Summary, last: Summary, say: Say) -> Iterator[str]:
    """Sentences on data, perplexity, accuracy and the gap, from the first run to the last."""
    before, after, gain = first["phase2"], last["phase2"], improvement(first, last)
    tokens = {"before": first["train_tokens"], "after": last["train_tokens"]}
    if tokens["before"] == tokens["after"]:
        yield say("saw_same_data", **tokens)
    else:
        yield say("saw_data", times=tokens["after"] / tokens["before"], **tokens)
    lower = gain["val_ppl_percent"]
    ppls = {"before": ppl(before["val_ppl"]), "after": ppl(after["val_ppl"]), "percent": abs(lower)}
    same = {"name": say("val_ppl"), "value": ppls["after"]}
    yield say(judged(lower, "saw_ppl_down", "saw_same", "saw_ppl_up"), **ppls, **same)
    points = gain["val_acc_points"]
    same = {"name": say("val_acc"), "value": percent(after["val_acc"])}
    yield say(judged(points, "saw_acc_up", "saw_same", "saw_acc_down"), points=abs(points), **same)
    narrowed = round(before["train_val_ratio"], 2) - round(after["train_val_ratio"], 2)
    gaps = {"before": ratio(before["train_val_ratio"]), "after": ratio(after["train_val_ratio"])}
    same = {"name": say("gap"), "value": gaps["after"]}
    yield say(judged(100 * narrowed, "saw_gap_smaller", "saw_same", "saw_gap_larger"), **gaps, **same)


def next_experiments(report: Report) -> list[str]:
    """What to try next, from what the last run's settings and result leave open."""
    say, last = report.say, report.ours[-1]
    model, samples = last.config.model, last.summary["samples"]
    a, b = model.interval * 5 // 2, model.interval * 5
    reach = {"tokens_a": a * model.max_contexts, "tokens_b": b * model.max_contexts}
    more, path = 2 * model.max_contexts, last.config.data.path
    more_data = {"a": 2 * samples, "b": 4 * samples, "path": literal(str(path))}
    items = [
        say("next_interval", interval=model.interval, a=a, b=b, **reach),
        say("next_samples" if path is None else "next_samples_file", samples=samples, **more_data),
        _next_training(last, say),
        say("next_contexts", count=model.max_contexts, a=more, tokens=more * model.interval),
    ]
    return [say("next"), "\n".join(items), *([] if path is None else [say("next_file")])]


def _next_training(column: Column, say: Say) -> str:
    limit, decay = column.config.phase2.max_epochs, column.config.phase2.weight_decay
    dropout = column.config.model.attention_dropout
    if at_last_epoch(column):
        return say("next_epochs", limit=limit, a=2 * limit)
    stronger = {"a": min(2 * dropout, (1 + dropout) / 2) or 0.1, "b": stronger_decay(decay) or 0.01}
    return say("next_regularise", dropout=dropout, decay=decay, **stronger)


def stronger_decay(decay: float) -> float:
    """The weight decay to try next against overfitting: ten times as much, of a strong one twice."""
    return (2 if decay >= 1 else 10) * decay


def conclusion(report: Report) -> list[str]:
    """Results, against the published ones and against each other; early stopping and overfitting."""
    say, ours = report.say, report.ours
    lines = [_result(column, say) for column in ours]
    lines += [_against_published(column, twin, say) for column, twin in report.pairs if twin]
    if len(ours) > 1 and report.is_one_validation:
        lower = improvement(ours[0].summary, ours[-1].summary)["val_ppl_percent"]
        ends = {"first": ours[0].label, "last": ours[-1].label}
        key = judged(lower, "end_better", "end_same", "end_not_better")
        lines.append(say(key, percent=abs(lower), **ends))
    stopped = sum(column.phase2["stop_reason"] == "early_stopping" for column in ours)
    lines.append(say("end_early", count=stopped, runs=len(ours)))
    lines.append(say("end_overfit", count=sum(map(overfits, ours)), runs=len(ours)))
    updated = say("updated", date=max(run.summary["provenance"]["date"] for run in report.runs))
    return [say("conclusion"), "\n".join(lines), "---", updated]


def _result(column: Column, say: Say) -> str:
    done = column.phase2
    values = {"ppl": ppl(done["val_ppl"]), "acc": percent(done["val_acc"]), "epoch": done["best_epoch"]}
    values |= {"method": method(column.config.model, say), "epochs": len(done["epochs"])}
    return say("end_run", label=column.label, **values)


def _against_published(column: Column, twin: Column, say: Say) -> str:
    ours, theirs = column.phase2["val_ppl"], twin.phase2["val_ppl"]
    return say("end_published", label=column.label, published=ppl(theirs), change=100 * (ours / theirs - 1))
