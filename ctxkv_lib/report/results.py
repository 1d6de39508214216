"""Report sections on what came out: both phases, early stopping, overfitting."""

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from .tables import (
    MISSING,
    Column,
    Report,
    Say,
    bold,
    code,
    loss,
    markdown_table,
    percent,
    ppl,
    ratio,
    short,
    whole_percent,
)


def phase1(report: Report) -> list[str]:
    """Time, convergence and effective rank; and the iterations that were published."""
    say = report.say

    def time(column: Column) -> str:
        done = column.summary["phase1"]
        return say("time_value", seconds=short(done["seconds"]), iterations=done["iterations"])

    def stop(column: Column) -> str:
        done, setting = column.summary["phase1"], column.config.phase1
        rates = {"rate": setting.stop_rate, "plateau": setting.plateau_rate}
        return say(f"stop_{done['stop_reason']}", n=done["iterations"], **rates)

    rows: dict[str, Callable[[Column], str]] = {
        say("time"): time,
        say("convergence"): lambda c: whole_percent(c.summary["phase1"]["convergence_rate"]),
        say("stop"): stop,
        say("rank"): lambda c: percent(c.summary["phase1"]["effective_rank"]),
    }
    blocks = [say("results"), say("phase1"), report.table(say("metric"), rows)]
    for column, twin in report.pairs:
        if twin:
            blocks += [say("phase1_trace", label=column.label), _published_iterations(column, twin, say)]
    is_drawn = any(column.phase1 for column in report.ours)
    return [*blocks, say("phase1_figure", folder=report.figures)] if is_drawn else blocks


def _published_iterations(column: Column, twin: Column, say: Say) -> str:
    lines = {line["iteration"]: line for line in column.phase1}
    rows = []
    for theirs in twin.phase1:
        ours: Mapping[str, Any] = lines.get(theirs["iteration"], {})
        cells = [loss(ours.get("loss")), loss(theirs["loss"])]
        cells += [whole_percent(line.get("convergence_rate")) for line in (ours, theirs)]
        rows.append([str(theirs["iteration"]), *cells])
    keys = ("iteration", "loss", "published_loss", "convergence", "published_convergence")
    return markdown_table([say(key) for key in keys], rows)


def phase2(report: Report) -> list[str]:
    """The epochs of each run, the best in bold."""
    say = report.say
    blocks = [say("phase2")]
    for column, twin in report.pairs:
        if len(report.pairs) > 1:
            blocks.append(f"#### {column.label}")
        blocks.append(_epoch_table(column, twin, say))
    return [*blocks, say("ppl_figure", folder=report.figures)]


def _epoch_table(column: Column, twin: Column | None, say: Say) -> str:
    keys = ["epoch", "train_ppl", "val_ppl", "val_acc", "note"]
    if twin:
        keys += ["published_train_ppl", "published_val_ppl", "published_val_acc"]
    rows = []
    both = zip_longest(column.phase2["epochs"], twin.phase2["epochs"] if twin else [])
    for number, (ours, theirs) in enumerate(both, start=1):
        best = number == column.phase2["best_epoch"]
        row = [bold(str(number), best), *_epoch_cells(ours, best)]
        row.append(bold(_epoch_note(column, ours, say), best) if ours else "")
        rows.append(row + (_epoch_cells(theirs, number == twin.phase2["best_epoch"]) if twin else []))
    return markdown_table([say(key) for key in keys], rows)


def _epoch_cells(line: Mapping[str, Any] | None, best: bool) -> list[str]:
    if line is None:
        return [MISSING] * 3
    cells = ppl(line["train_ppl"]), ppl(line["val_ppl"]), percent(line["val_acc"])
    return [bold(cell, best) for cell in cells]


def _epoch_note(column: Column, line: Mapping[str, Any], say: Say) -> str:
    done = column.phase2
    if line["epoch"] == done["best_epoch"]:
        return say("best")
    if line["improved"]:
        return say("improved")
    last = line["epoch"] == done["epochs"][-1]["epoch"]
    return say("stopped" if last and done["stop_reason"] == "early_stopping" else "worse")


def final_result(report: Report) -> list[str]:
    """The best epoch's numbers, which are the run's result."""
    say = report.say

    def epoch_time(column: Column) -> str:
        seconds = column.phase2["seconds_per_epoch"]
        return MISSING if seconds is None else say("seconds", seconds=short(seconds))

    rows: dict[str, Callable[[Column], str]] = {
        bold(say("val_ppl")): lambda c: bold(ppl(c.phase2["val_ppl"])),
        bold(say("val_acc")): lambda c: bold(percent(c.phase2["val_acc"])),
        say("train_ppl"): lambda c: ppl(c.phase2["train_ppl"]),
        say("best_epoch"): lambda c: str(c.phase2["best_epoch"]),
        say("epochs_run"): lambda c: str(len(c.phase2["epochs"])),
        say("epoch_time"): epoch_time,
    }
    one = len(report.pairs) == 1
    title = say("final_one", epoch=report.ours[0].phase2["best_epoch"]) if one else say("final_many")
    return [title, report.table(say("metric"), rows)]


def early_stopping(report: Report) -> list[str]:
    """Whether each run stopped as its settings say, and the epochs that led there."""
    blocks = [report.say("early")]
    for column in report.ours:
        blocks += [_early_verdict(column, report.say), code(_early_trace(column, report.say))]
    return blocks


def _early_verdict(column: Column, say: Say) -> str:
    setting, seen = column.config.phase2, column.phase2["epochs"][-1]["no_improve"]
    if column.phase2["stop_reason"] == "max_epochs":
        return say("early_unused", label=column.label, limit=setting.max_epochs)
    key = "early_worked" if seen == setting.patience else "early_odd"
    return say(key, label=column.label, patience=setting.patience, seen=seen)


def _early_trace(column: Column, say: Say) -> list[str]:
    lines = [f"patience={column.config.phase2.patience}", ""]
    for line in column.phase2["epochs"][column.phase2["best_epoch"] - 1 :]:
        key = "early_worse" if line["no_improve"] else "early_best"
        lines.append(say(key, epoch=line["epoch"], ppl=ppl(line["val_ppl"]), count=line["no_improve"]))
    if column.phase2["stop_reason"] == "early_stopping":
        lines[-1] += say("early_end")
    return lines


def overfits(column: Column) -> bool:
    """Whether train PPL went on falling after the best epoch while val PPL rose."""
    last, best = column.measured[-1], column.phase2
    return last["train_ppl"] < best["train_ppl"] and last["val_ppl"] > best["val_ppl"]


def at_last_epoch(column: Column) -> bool:
    """Whether val PPL was at its lowest at the last epoch."""
    return column.phase2["best_epoch"] == column.phase2["epochs"][-1]["epoch"]


def overfitting(report: Report) -> list[str]:
    """Train against validation perplexity at the best and the last epoch, and by epoch."""
    say = report.say
    blocks = [say("overfitting")]
    for column in report.ours:
        blocks += [code(_two_epochs(column, say)), _overfitting_verdict(column, say)]
    numbers = range(1, max(len(column.phase2["epochs"]) for column in report.columns) + 1)
    rows = [[str(n), *(_ratio_at(column, n) for column in report.columns)] for n in numbers]
    names = [column.label for column in report.columns]
    return [*blocks, say("ratio_table"), markdown_table([say("epoch"), *names], rows)]


def _two_epochs(column: Column, say: Say) -> list[str]:
    best = {**column.phase2, "epoch": column.phase2["best_epoch"]}
    lines = []
    for key, line in (("at_best", best), ("at_last", column.measured[-1])):
        lines += [say(key, label=column.label, epoch=line["epoch"])]
        lines += [f"  Train PPL: {ppl(line['train_ppl'])}", f"  Val PPL:   {ppl(line['val_ppl'])}"]
        lines += [f"  Ratio:     {ratio(line['val_ppl'] / line['train_ppl'])}"]
        if at_last_epoch(column):
            break
    return lines


def _overfitting_verdict(column: Column, say: Say) -> str:
    best, last = column.phase2, column.measured[-1]
    if at_last_epoch(column):
        return say("overfit_not_yet", label=column.label)
    if not overfits(column):
        return say("overfit_unclear", label=column.label, epoch=best["best_epoch"])
    moved = {key: f"{ppl(best[f'{key}_ppl'])} → {ppl(last[f'{key}_ppl'])}" for key in ("train", "val")}
    return say("overfit_yes", label=column.label, **moved)


def _ratio_at(column: Column, number: int) -> str:
    values = {line["epoch"]: line["val_ppl"] / line["train_ppl"] for line in column.measured}
    return bold(ratio(values.get(number)), number == column.phase2["best_epoch"])
