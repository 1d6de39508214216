"""Columns of the report's tables, and what in them takes more than a look-up in `summary.json`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from ..method.config import ModelConfig
from ..method.windows import Window
from ..runs.differences import distinctions
from ..runs.published import PUBLISHED, PUBLISHED_PHASE1, published_samples
from ..runs.run_folder import Run
from .labels import memory_stages, run_labels
from .tables import MISSING, gib, literal
from .verdicts import gains

NO_EPOCH = dict.fromkeys(("train_ppl", "val_ppl", "val_acc"))


@dataclass(frozen=True)
class Column:
    """One column of a table: a run, a published run, or (with `gain`) what one run gained over another."""

    label: str
    summary: Any = None
    config: Any = None
    lines: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl, those of Phase 1
    original: "Column | None" = None  # the published run that this one repeats
    gain: Mapping[str, Any] | None = None

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def phase1(self) -> Mapping[str, Any]:
        return self.summary["phase1"]

    @property
    def phase2(self) -> Mapping[str, Any]:
        return self.summary["phase2"]

    @property
    def method(self) -> str:
        """The key of the words for what attention reads, or the name of the mixer in its place."""
        mixer = self.config.plugins.get("mixer")
        return mixer.name.partition(":")[2] if mixer else self.model.kv_method

    @property
    def offsets(self) -> list[int] | None:
        """Distances of the slots in tokens; None of a mixer, which has none."""
        uniform = [slot * self.model.interval for slot in range(self.model.max_contexts)]
        return self.summary["context_window"].get("offsets", uniform)

    @property
    def is_uniform(self) -> bool:
        """Whether the slots lie an interval apart."""
        return self.offsets in (None, Window(self.model).offsets)

    @property
    def plugins(self) -> str:
        """What stands in the place of parts of the method, in words."""
        found = self.config.plugins.items()
        return ", ".join(
            f"{hook} `{each.name}`" + f" ({each.source})" * bool(each.source) for hook, each in found
        )

    @property
    def epochs(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """The epochs of this run, each with the published one."""
        published = self.original.phase2["epochs"] if self.original else []
        return zip_longest(self.phase2["epochs"], published, fillvalue=NO_EPOCH)


def run_columns(runs: Sequence[Run], unit: str, published: str) -> list[Column]:
    """Make a column of each run, with that of the published run that it repeats.

    Args:
        unit: what follows the number of samples in a label.
        published: label of a published run, with a place for that of the run.
    """
    labels = run_labels([run.summary for run in runs], unit, distinctions([run.config for run in runs]))
    columns = []
    for label, run in zip(labels, runs, strict=True):
        samples, original = published_samples(run.config), None
        if samples is not None:
            numbers = PUBLISHED[samples], run.config, PUBLISHED_PHASE1[samples]
            original = Column(published.format(label), *numbers)
        columns.append(Column(label, run.summary, run.config, run.phase1, original))
    return columns


def with_gain(columns: Sequence[Column], label: str) -> list[Column]:
    """Add to several runs a column of what the last gained over the first."""
    gain = gains(columns[0].summary, columns[-1].summary) if len(columns) > 1 else None
    return [*columns, *([Column(label, gain=gain)] if gain else [])]


def origin(columns: Sequence[Column]) -> dict[str, str]:
    """Say when, where and from what runs were made: what all share, or what each has."""
    found = {column.label: _origin(column) for column in columns}
    names = _origin(columns[0])
    return {name: _shared({label: each[name] for label, each in found.items()}) for name in names}


def _origin(column: Column) -> dict[str, str]:
    made, path = column.summary["provenance"], column.config.data.path
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    source = made["data"]["source"]
    return {
        "date": made["date"],
        "environment": literal(f"{made['device']} ({versions})"),
        "seed": str(made["seed"]),
        "commit": made["git_commit"] or MISSING,
        "source": source if path is None else f"{source} ({literal(str(path))})",
        "table": str(made["embeddings"]["table"]),
    }


def _shared(values: Mapping[str, str]) -> str:
    first, *others = dict.fromkeys(values.values())
    return "; ".join(f"{label}: {value}" for label, value in values.items()) if others else first


def devices(columns: Sequence[Column]) -> Iterator[Column]:
    """Make a column for the CPU of each run, and for its GPU if it used one: GiB and peak by stage."""
    for column in columns:
        stages = memory_stages(column.summary["memory"])
        for device in ("cpu", "gpu"):
            used = [stage for stage in stages if stage[f"{device}_gib"] is not None]
            if used:
                cells = {stage["stage"]: _memory(stage, device) for stage in used}
                yield Column(f"{column.label}: {device.upper()}", cells)


def _memory(stage: Mapping[str, Any], device: str) -> str:
    peak = stage[f"{device}_peak_gib"]
    return gib(stage[f"{device}_gib"]) + (f" ({gib(peak)})" if peak is not None else "")


def cache_sizes(ours: Sequence[Column], held: str, dense: str) -> Iterator[Column]:
    """Make columns of cache sizes (MiB): of runs as held and in the published layout, and the published ones.

    Args:
        held, dense: labels, with a place for that of the run.
    """
    for own in ours:
        yield Column(held.format(own.label), own.summary["caches_mib"])
        yield Column(dense.format(own.label), own.summary["caches_dense_fp32_mib"])
        if own.original and own.original.summary["caches_mib"]["total"] is not None:
            yield Column(own.original.label, own.original.summary["caches_mib"])


def slot_examples(column: Column) -> Iterator[tuple[int, str, int, int]]:
    """Yield position, what it sees, real slots and others: of a short, a half-full and a full window."""
    model = column.model
    window = Window(model, column.offsets)
    for position in example_positions(model, column.summary["train_tokens"]):
        slots = window.slots(torch.tensor(position)).tolist()
        seen = [f"ctx[{slot}]" for slot in slots if slot >= 0]
        rest = model.max_contexts - len(seen)
        zeros = ["0"] * rest if model.kv_method == "fixed" else []
        yield position, ", ".join([*_elided(seen), *_elided(zeros, head=1)]), len(seen), rest


def example_positions(model: ModelConfig, num_tokens: int) -> list[int]:
    """List 50, 350 and 3500 for the published window (20 x 32), and as much for others, within the stream."""
    interval, half = model.interval, (model.max_contexts + 3) * model.interval
    wanted = (5 * interval // 2, half // 2, 5 * half)
    return sorted({min(position, num_tokens - 1) for position in wanted})


def _elided(items: list[str], head: int = 2) -> list[str]:
    return items if len(items) <= head + 1 else [*items[:head], "...", items[-1]]
