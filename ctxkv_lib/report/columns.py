"""Compute columns of the report's tables, and values that are not in `summary.json`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from ..data.conversations import VALIDATION_LIMIT, check_splits
from ..errors import UserError
from ..method.config import ModelConfig
from ..method.windows import Window
from ..runs.differences import distinctions
from ..runs.published import PUBLISHED, PUBLISHED_PHASE1, published_samples
from ..runs.refusals import refuse_short
from ..runs.run_folder import Run
from .labels import memory_stages, run_labels
from .tables import MISSING, at, gib, literal
from .verdicts import gains

NO_EPOCH = dict.fromkeys(("train_ppl", "val_ppl", "val_acc"))


@dataclass(frozen=True)
class Column:
    """One column of a table: a run, a published run, or (with `gain`) the gain of one run over another."""

    label: str
    summary: Any = None
    config: Any = None
    lines: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl, those of Phase 1
    original: "Column | None" = None  # the published run that this one repeats
    gain: Mapping[str, Any] | None = None

    @property
    def method(self) -> str:
        """Return the key of the text on what attention reads, or the name of the mixer."""
        mixer = self.config.plugins.get("mixer")
        return mixer.name.partition(":")[2] if mixer else self.config.model.kv_method

    @property
    def offsets(self) -> list[int] | None:
        """Return the distances of the slots in tokens; None for a mixer."""
        return self.summary["context_window"].get("offsets", Window(self.config.model).offsets)

    @property
    def is_uniform(self) -> bool:
        """Return whether the slots are an interval apart."""
        return self.offsets == Window(self.config.model).offsets

    @property
    def copies(self) -> bool:
        """Return whether a setting makes the model copy, which it does in validation but not in training."""
        attention = self.config.plugins.get("attention")
        return bool(attention and attention.settings.get("copy_weight"))

    @property
    def epochs(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return the epochs of this run, each with the published one."""
        published = self.original.summary["phase2"]["epochs"] if self.original else []
        return zip_longest(self.summary["phase2"]["epochs"], published, fillvalue=NO_EPOCH)


def run_columns(runs: Sequence[Run], unit: str, published: str) -> list[Column]:
    """Make a column for each run, and for the published run that it repeats.

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
    """Add a column for the gain of the last of several runs over the first."""
    if len(columns) < 2:
        return [*columns]
    return [*columns, Column(label, gain=gains(columns[0].summary, columns[-1].summary))]


def origin(columns: Sequence[Column]) -> dict[str, str]:
    """Return date, machine and versions of the runs: shared ones once, others for each run."""
    made, found = {column.label: _origin(column) for column in columns}, {}
    for name in _origin(columns[0]):
        texts = {label: each[name] for label, each in made.items()}
        shared, *others = dict.fromkeys(texts.values())
        found[name] = "; ".join(f"{label}: {text}" for label, text in texts.items()) if others else shared
    return found


def _origin(column: Column) -> dict[str, str]:
    made, path = column.summary["provenance"], column.config.data.path
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return {
        "date": made["date"],
        "environment": literal(f"{made['device']} ({versions})"),
        "seed": str(made["seed"]),
        "commit": made["git_commit"] or MISSING,
        "source": made["data"]["source"] + (f" ({literal(str(path))})" if path else ""),
        "table": str(made["embeddings"]["table"]),
    }


def devices(columns: Sequence[Column]) -> Iterator[Column]:
    """Make a column for the CPU of each run, and for its GPU if it used one: GiB and peak by stage."""
    for column in columns:
        for device in ("cpu", "gpu"):
            cells = {}
            for stage in memory_stages(column.summary["memory"]):
                held, peak = stage[f"{device}_gib"], stage[f"{device}_peak_gib"]
                if held is not None:
                    cells[stage["stage"]] = gib(held) + ("" if peak is None else f" ({gib(peak)})")
            if cells:
                yield Column(f"{column.label}: {device.upper()}", cells)


def cache_sizes(ours: Sequence[Column], held: str, dense: str) -> Iterator[Column]:
    """Make columns of cache sizes (MiB): of runs as held and in the original's layout, and the original's.

    Args:
        held, dense: labels, with a place for that of the run.
    """
    for own in ours:
        yield Column(held.format(own.label), own.summary["caches_mib"])
        if own.offsets:  # a mixer has no contexts
            yield Column(dense.format(own.label), own.summary["caches_dense_fp32_mib"])
        if own.original and own.original.summary["caches_mib"]["total"] is not None:
            yield Column(own.original.label, own.original.summary["caches_mib"])


def slot_examples(column: Column) -> Iterator[tuple[int, str, int, int]]:
    """Yield position, what it sees, real slots and others: of a short, a half-full and a full window."""
    model = column.config.model
    window = Window(model, column.offsets)
    for position in example_positions(model, column.summary["train_tokens"]):
        slots = window.slots(torch.tensor(position)).tolist()
        seen = [f"ctx[{slot}]" for slot in slots if slot >= 0]
        rest = len(window) - len(seen)
        zeros = ["0"] * rest if model.kv_method == "fixed" else []
        yield position, ", ".join([*_elided(seen), *_elided(zeros, head=1)]), len(seen), rest


def example_positions(model: ModelConfig, num_tokens: int) -> list[int]:
    """List 50, 350 and 3500 for the published window (20 x 32), and scaled for others, within the stream."""
    interval, half = model.interval, (model.max_contexts + 3) * model.interval
    wanted = (5 * interval // 2, half // 2, 5 * half)
    return sorted({min(position, num_tokens - 1) for position in wanted})


def _elided(items: list[str], head: int = 2) -> list[str]:
    return items if len(items) <= head + 1 else [*items[:head], "...", items[-1]]


def over_conversations(tokens: Sequence[int], losses: Sequence[float]) -> tuple[float, float]:
    """Compute the mean over all tokens, and its standard error over conversations.

    Args:
        tokens: of each of two conversations or more.
        losses: their means, in nats, or differences of two models' means.
    """
    total, count = sum(tokens), len(tokens)
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / total
    squares = sum((n * (loss - mean)) ** 2 for n, loss in zip(tokens, losses, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def ppl_errors(columns: Sequence[Column]) -> Iterator[tuple[str, float, int]]:
    """Yield label, relative standard error of the test PPL, and number of conversations of each run."""
    for column, tokens, losses in _tested(columns):
        yield column.label, over_conversations(tokens, losses)[1], len(tokens)


def ppl_changes(columns: Sequence[Column]) -> Iterator[tuple[str, str, float, float]]:
    """Yield label, first run's label, and the relative change of test PPL with its standard error.

    Losses are compared conversation by conversation, if runs were tested on the same ones.
    """
    tested = list(_tested(columns))
    for column, tokens, losses in tested[1:]:
        base, base_tokens, before = tested[0]
        if tokens == base_tokens and is_one_test([column, base]):
            more = [loss - other for loss, other in zip(losses, before, strict=True)]
            mean, error = over_conversations(tokens, more)
            yield column.label, base.label, math.expm1(mean), error * math.exp(mean)


def is_one_test(columns: Sequence[Column]) -> bool:
    """Return whether those that were tested read the same conversations, as far as is known."""
    tests = [column.summary["test"] for column in columns if "test" in column.summary]
    known = {test["fingerprint"] for test in tests if "fingerprint" in test}
    return len(known) < 2 and len({test["tokens"] for test in tests}) < 2


def _tested(columns: Sequence[Column]) -> Iterator[tuple[Column, tuple[int, ...], tuple[float, ...]]]:
    """Yield the runs that were tested on several conversations, with tokens and loss of each."""
    for column in columns:
        found = at(column.summary, "test", "conversations") or []
        if len(found) > 1:
            tokens, losses = zip(*found, strict=True)
            yield column, tokens, losses


def beside_ngrams(summary: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield each split with both PPLs, and by how much (%) it is below n-grams without and with cache."""
    for split, own in (("val", summary["phase2"]["val_ppl"]), ("test", at(summary, "test", "ppl"))):
        ngrams = [at(summary, "ngrams", kind, f"{split}_ppl") for kind in ("kneser_ney", "kneser_ney_cache")]
        if own and all(ngrams):
            yield split, *(100 * (1 - own / theirs) for theirs in ngrams)


def probe_blocks(probed: Sequence[Column], with_untrained: bool) -> list[dict[str, Any]]:
    """Make columns of ContextBlocks: of several runs by label, or of one run and untrained blocks."""
    blocks = [{"label": column.label, "std": None, **column.summary["probe"]} for column in probed]
    if with_untrained:
        untrained = [{"std": std, **block} for std, block in blocks[0]["untrained"].items()]
        blocks = [{**block, "label": None} for block in [blocks[0], *untrained]]
    return [{**block, "at": {row["distance"]: row for row in block["decodability"]}} for block in blocks]


def possible(column: Column, setting: str, *values: int) -> list[int]:
    """Return those values with which the run has enough conversations, and streams longer than its window.

    A wider window takes more of the user's own file for validation.
    """
    tokens = {split: column.summary[f"{split}_tokens"] for split in ("train", "val")}
    if column.config.data.source == "file":
        tokens["val"] = int(VALIDATION_LIMIT * sum(tokens.values()))
    found = []
    for value in values:
        with suppress(UserError):
            config = column.config.replace({setting: value})
            if config.data != column.config.data:
                check_splits(config.data)
            refuse_short(tokens, config.model)
            found.append(value)
    return found
