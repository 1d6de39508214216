"""Judge the numbers of runs; the templates hold the text.

Every claim is derived from the numbers, also that a run got worse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]


def gains(first: Summary, last: Summary) -> dict[str, Any]:
    """Compute the gain of the last run over the first.

    Returns:
        `ppl` and `gap`: percent by which they are lower; `acc`: points; `epochs`: change of the best epoch;
        `before` and `after`: both summaries.
    """
    before, after = first["phase2"], last["phase2"]
    return {
        "before": first,
        "after": last,
        "ppl": 100 * (1 - after["val_ppl"] / before["val_ppl"]),
        "acc": 100 * (after["val_acc"] - before["val_acc"]),
        "epochs": after["best_epoch"] - before["best_epoch"],
        "gap": 100 * (1 - after["train_val_ratio"] / before["train_val_ratio"]),
    }


def judged(gain: float) -> str:
    """Judge a gain in percent or points: better, worse, or the same where it shows as 0.0."""
    return "same" if round(gain, 1) == 0 else "better" if gain > 0 else "worse"


def best_epoch(epochs: Sequence[Summary]) -> Summary:
    """Find the epoch whose weights were kept: the last one that improved."""
    return next(line for line in reversed(epochs) if line["improved"])


def overfitting(phase2: Summary) -> str:
    """Judge if train PPL as shown fell after the best epoch while val PPL rose: yes, unclear or not_yet."""
    last = phase2["epochs"][-1]
    if phase2["best_epoch"] == last["epoch"]:
        return "not_yet"
    train, val = (round(last[name], 1) - round(phase2[name], 1) for name in ("train_ppl", "val_ppl"))
    return "yes" if train < 0 < val else "unclear"


def epoch_note(phase2: Summary, line: Summary) -> str:
    """Judge an epoch: best, improved, worse, stopped (training ended with it) or none (it was not run)."""
    if "epoch" not in line:
        return "none"
    if line["epoch"] == phase2["best_epoch"]:
        return "best"
    if line["improved"]:
        return "improved"
    is_last = line["epoch"] == phase2["epochs"][-1]["epoch"]
    return "stopped" if is_last and phase2["stop_reason"] == "early_stopping" else "worse"


def ratio_at(phase2: Summary, epoch: int) -> float | None:
    """Compute val PPL over train PPL at an epoch; None if it has no numbers."""
    return {e["epoch"]: e["val_ppl"] / e["train_ppl"] for e in phase2["epochs"] if e["val_ppl"]}.get(epoch)


def stronger_decay(decay: float) -> float:
    """Compute the weight decay to try next against overfitting: ten times as much, or twice a strong one."""
    return (2 if decay >= 1 else 10) * decay
