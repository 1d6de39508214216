"""Report sections on what was run: origin, settings, context window and slots, memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..method.config import ModelConfig
from ..method.windows import slot_offsets, slot_positions
from ..runs.run_folder import Run
from ..views.figures import memory_stages
from .tables import (
    MISSING,
    Column,
    Report,
    Say,
    code,
    distinct,
    gib,
    literal,
    markdown_table,
    method,
    short,
    whole,
)

CACHES = ("train_ctx", "train_emb", "val_ctx", "val_emb", "total")


def header(report: Report) -> list[str]:
    """Title; date, environment, KV method and where data and weights came from."""
    say, configs = report.say, [run.config for run in report.runs]
    methods = distinct(method(config.model, say) for config in configs)
    long = distinct(_long_method(config.model, say) for config in configs)
    lines = [
        say("date", value=_of_each(report, lambda run: run.summary["provenance"]["date"])),
        say("environment", value=_of_each(report, _environment)),
        say("method", value="; ".join(long)),
        say(
            "origin",
            preset="/".join(distinct(config.preset for config in configs)),
            recipe="/".join(distinct(config.recipe for config in configs)),
            seed=_of_each(report, lambda run: str(run.summary["provenance"]["seed"])),
            commit=_of_each(report, lambda run: run.summary["provenance"]["git_commit"] or MISSING),
        ),
        say("data", source=_of_each(report, _source), table=_of_each(report, _table)),
    ]
    runs = say("and").join(run.label for run in report.ours)
    notes = [say("with_published" if report.published else "without_published")]
    if not report.is_one_validation:
        notes.append(say("other_validation"))
    title = say("title", runs=runs, method=say("and").join(methods))
    return [title, "\n".join(f"- {line}" for line in lines), *notes]


def _long_method(model: ModelConfig, say: Say) -> str:
    if model.memory != "contexts":
        return say("memory_long", memory=method(model, say))
    return say(f"{model.kv_method}_long", slots=model.max_contexts)


def _of_each(report: Report, value_of: Callable[[Run], str]) -> str:
    """What all runs share; where they differ, what each has."""
    values = [value_of(run) for run in report.runs]
    if len(set(values)) == 1:
        return values[0]
    named = zip(report.ours, values, strict=True)
    return "; ".join(f"{column.label}: {value}" for column, value in named)


def _environment(run: Run) -> str:
    made = run.summary["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return literal(f"{made['device']} ({versions})")


def _source(run: Run) -> str:
    path = run.config.data.path
    source = run.summary["provenance"]["data"]["source"]
    return source if path is None else f"{source} ({literal(path)})"


def _table(run: Run) -> str:
    return str(run.summary["provenance"]["embeddings"]["table"])


def settings(report: Report) -> list[str]:
    """Size of the data, the model and its trainable share."""
    say = report.say

    def trainable(column: Column) -> str:
        count = column.summary["parameters"]
        share = count["trainable_phase2"] / count["total"]
        return say("trainable_value", count=count["trainable_phase2"], share=share)

    rows: dict[str, Callable[[Column], str]] = {
        say("samples"): lambda c: whole(c.summary["samples"]),
        say("train_tokens"): lambda c: whole(c.summary["train_tokens"]),
        say("val_tokens"): lambda c: whole(c.summary["val_tokens"]),
        say("context_dim"): lambda c: whole(c.config.model.context_dim),
        say("interval"): lambda c: _interval(c.config.model, say),
        say("heads"): lambda c: whole(c.config.model.num_heads),
        say("max_contexts"): lambda c: _slot_count(c.config.model, say),
        say("total_parameters"): lambda c: whole(c.summary["parameters"]["total"]),
        say("trainable"): trainable,
        say("cached_contexts"): lambda c: say(f"contexts_{c.config.phase1.contexts}"),
        say("precision"): lambda c: c.summary["provenance"].get("precision", MISSING),
    }
    return [say("settings"), report.table(say("parameter"), rows)]


def _interval(model: ModelConfig, say: Say) -> str:
    if model.slots == "uniform":
        return whole(model.interval)
    return say("interval_geometric", last=slot_offsets(model)[-1])


def _slot_count(model: ModelConfig, say: Say) -> str:
    return say(f"count_{model.kv_method}", count=model.max_contexts)


def context_window(report: Report) -> list[str]:
    """How far back attention sees, and how far it would see without a limit."""
    blocks = []
    for model in dict.fromkeys(column.config.model for column in report.ours):
        if not model.memory_dim:
            continue
        sharing = [column for column in report.ours if column.config.model == model]
        lines = _reach(model, report.say)
        for column in sharing if model.slots == "uniform" else ():
            lines += ["", *_theoretical(column, report.say)]
        blocks.append(code(lines))
    return [report.say("window"), *blocks] if blocks else []


def _reach(model: ModelConfig, say: Say) -> list[str]:
    count, interval = model.max_contexts, model.interval
    spacing = f"interval={interval}" if model.slots == "uniform" else f"slots={model.slots}"
    return [
        f"{spacing}, max_contexts={_slot_count(model, say)}",
        say(f"window_{model.kv_method}", count=count),
        say(
            "window_tokens" if model.slots == "uniform" else "window_geometric",
            count=count,
            interval=interval,
            tokens=model.context_window,
        ),
    ]


def _theoretical(column: Column, say: Say) -> list[str]:
    window, tokens = column.summary["context_window"], column.summary["train_tokens"]
    most, count = window["theoretical_max"], window["max_contexts"]
    limit = say("window_limit", count=count, share=count / most) if most > count else None
    return [
        f"theoretical_max = {tokens:,} // {window['interval']} + 1 = {most:,}",
        limit or say("window_free", count=count),
    ]


def memory(report: Report) -> list[str]:
    """CPU and GPU memory by stage, and the caches as held and as the published layout would hold them."""
    say = report.say
    blocks = [say("memory"), say("memory_unit"), _memory_table(report)]
    return [*blocks, say("memory_figure", folder=report.figures), say("caches"), _cache_table(report)]


def _memory_table(report: Report) -> str:
    columns = [column for column in report.columns if column.summary["memory"]]
    stages = {c.label: {s["stage"]: s for s in memory_stages(c.summary["memory"])} for c in columns}
    shown = [
        (label, device)
        for label, run in stages.items()
        for device in ("cpu", "gpu")
        if any(stage[f"{device}_gib"] is not None for stage in run.values())
    ]
    names = distinct(name for run in stages.values() for name in run)
    rows = [
        [report.say(name), *(_memory_cell(stages[label].get(name), device) for label, device in shown)]
        for name in names
    ]
    return markdown_table([report.say("stage"), *(f"{label}: {d.upper()}" for label, d in shown)], rows)


def _memory_cell(stage: Mapping[str, Any] | None, device: str) -> str:
    if stage is None:
        return MISSING
    peak = stage[f"{device}_peak_gib"]
    return gib(stage[f"{device}_gib"]) + (f" ({gib(peak)})" if peak is not None else "")


def _cache_table(report: Report) -> str:
    say, columns = report.say, []
    for column in report.columns:
        sizes = column.summary["caches_dense_fp32_mib"]
        if not column.is_published:
            columns.append((say("held", label=column.label), column.summary["caches_mib"]))
            columns.append((say("dense", label=column.label), sizes))
        elif sizes["total"] is not None:
            columns.append((column.label, sizes))
    rows = [[_cache_name(name, say), *(short(sizes[name]) for _, sizes in columns)] for name in CACHES]
    return markdown_table([say("cache"), *(label for label, _ in columns)], rows)


def _cache_name(name: str, say: Say) -> str:
    return say("total") if name == "total" else name


def slots(report: Report) -> list[str]:
    """What attention sees at three positions, if it has slots: a short, a half-full and a full window."""
    say, run = report.say, report.runs[-1]
    model = run.config.model
    if not model.memory_dim:
        return []
    count, interval = model.max_contexts, model.interval
    rule = say(
        f"slots_rule_{model.anchor if model.slots == 'uniform' else model.slots}",
        interval=interval,
        count=count,
        last=count - 1,
        last_step=interval - 1,
        offsets=", ".join(map(str, slot_offsets(model)[1:])),
    )
    lines = [_slot_line(i, model, say) for i in example_positions(model, run.summary["train_tokens"])]
    blocks = [say(f"slots_{model.kv_method}"), rule, code(lines)]
    return [*blocks, *([say("slots_slip")] if report.published else []), say(f"gains_{model.kv_method}")]


def example_positions(model: ModelConfig, num_tokens: int) -> list[int]:
    """50, 350 and 3500 for the published window (20 x 32); in proportion for others, within the stream."""
    interval, half = model.interval, (model.max_contexts + 3) * model.interval
    wanted = (5 * interval // 2, half // 2, 5 * half)
    return sorted({min(position, num_tokens - 1) for position in wanted})


def _slot_line(position: int, model: ModelConfig, say: Say) -> str:
    slots = slot_positions(torch.tensor(position), model)
    seen = [f"ctx[{slot}]" for slot in slots.tolist() if slot >= 0]
    real, rest = len(seen), model.max_contexts - len(seen)
    zeros = ["0"] * rest if model.kv_method == "fixed" else []
    shown = ", ".join([*_elided(seen), *_elided(zeros, head=1)])
    return f"Position {position}: [{shown}] {say(f'slot_{model.kv_method}', real=real, rest=rest)}"


def _elided(items: list[str], head: int = 2) -> list[str]:
    return items if len(items) <= head + 1 else [*items[:head], "...", items[-1]]
