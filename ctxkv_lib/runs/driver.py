"""Runs the stages of an experiment: reuses what is finished, computes the rest, and says what differs.

A stage function only computes and writes its files. For each stage, `run_stages` asks whether its record
counts, lets the function compute if not, takes its metrics and memory snapshots, and records it.

What one run trusts, with `differences` of the tables in `records`:

- A stage is reused if its table equals the recorded one and its files are intact. The contexts may also be
  linked from a run beside this one.
- A folder with different settings is refused. A folder whose Phase 2 was trained with different code, texts
  or precision is refused unless the run is to be made again, since training can take hours.
- Before a stage is computed from something else, all files and records that were made from its old version
  are deleted, so that a kill never leaves a result beside the contexts of another text.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..errors import UserError
from ..files import checksums, digest, remove, replacing
from ..method.loop import Metric
from ..method.memory import snapshot
from ..progress import Listener, log
from .folder import RECORDS, RunFolder
from .links import link_equal_files
from .records import OUTPUT_OF, Record, Table, as_json, describe_differences, differences, is_setting

TRAINED = "phase2"  # the stage that is never replaced unasked
EVERY_STAGE = ("*",)  # as `Stage.after`: every stage whose record holds and has a result


class Work:
    """What the function of a stage is handed: the run folder, and what takes its metrics and snapshots.

    Attributes:
        made_from: the table of the stage.
        metrics: all metrics so far, the restored ones included.
        memory: all memory snapshots so far.
    """

    def __init__(
        self,
        folder: RunFolder,
        made_from: Table,
        after: Sequence[str],
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.folder, self.made_from, self.after = folder, made_from, after
        self.device, self.listener = device, listener
        self.metrics: list[Metric] = []
        self.memory: list[dict[str, Any]] = []

    def record(self, metric: Metric) -> None:
        """Append a metric to metrics.jsonl, begun anew at the first one, and pass it to the listener."""
        if not ranks.rank():
            if not self.metrics:
                self.folder.write_metrics(self.after)
            self.folder.append_metric(metric)
        self.metrics.append({name: value for name, value in metric.items() if name != "replayed"})
        if not ranks.rank():
            self.listener(metric)

    def snapshot(self, name: str) -> None:
        """Measure the memory at the end of a part of the stage."""
        self.memory.append(snapshot(name, self.device))


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage as it is asked for.

    Attributes:
        compute: writes the files, and returns the stage's part of the summary.
        made_from: the table of the stage, without the outputs of the stages before it.
        after: the stages before it.
        files: files and folders that the stage writes.
        editable: those of them that users may edit; they only have to exist.
        state: a file with which an interrupted training run continues.
        is_linked: whether the stage may be linked from a run beside this one.
        by_all: whether all processes compute it together; otherwise only rank 0 does.
        is_left_out: whether the stage is not computed. Its files are still deleted if they are out of date.
        is_result: whether a different table is a different result, which is not replaced unasked.
    """

    name: str
    compute: Callable[[Work], dict[str, Any]]
    made_from: Table
    after: Sequence[str] = ()
    files: Sequence[str] = ()
    editable: Sequence[str] = ()
    state: str = ""
    is_linked: bool = False
    by_all: bool = False
    is_left_out: bool = False
    is_result: bool = True

    def table(self, folder: RunFolder) -> Table:
        """Return the whole table: `made_from`, and the outputs of the stages before, which are finished."""
        names, numbers = self.after, {}
        if self.after == EVERY_STAGE:
            others = [name for name, record in folder.records.items() if name != self.name and record.result]
            names = sorted(filter(folder.holds, others))
            numbers = {"sum of all numbers": digest([folder.records[name].numbers for name in names])}
        outputs = {OUTPUT_OF + name: folder.records[name].output for name in names}
        return as_json(self.made_from | numbers | outputs)

    def differences(self, folder: RunFolder) -> Table:
        """Return how `made_from` differs from what is recorded, if anything is."""
        if self.name not in folder.records:
            return {}
        return differences(folder.records[self.name].made_from, as_json(self.made_from), [*self.made_from])


def require_same_settings(folder: RunFolder, stages: Sequence[Stage]) -> None:
    """Raise UserError if one of the stages was recorded with different settings."""
    pairs = {name: pair for stage in stages for name, pair in stage.differences(folder).items()}
    if settings := {name: pair for name, pair in pairs.items() if is_setting(name)}:
        raise UserError(
            f"{folder.path} holds another experiment: {describe_differences(settings, ', asked ')}; name "
            "another folder with --out."
        )


def prepare_folder(folder: RunFolder, stages: Sequence[Stage], again: bool) -> None:
    """Refuse a claimed folder that holds something else, or delete what is out of date in it.

    Args:
        again: replace a result with different code, texts or precision.

    Raises:
        UserError: different settings; or a trained Phase 2 that differs otherwise and is to be kept.
    """
    require_same_settings(folder, stages)
    changed = {stage: pairs for stage in stages if (pairs := stage.differences(folder))}
    pairs = {name: pair for stage in changed if stage.is_result for name, pair in changed[stage].items()}
    if pairs and TRAINED in folder.records and not again:
        _refuse_to_replace(folder, describe_differences(pairs))
    for stage, pairs in changed.items():
        log(f"{stage.name}: recomputed, since {describe_differences(pairs)}.")
        _clear(folder, stage, stages, as_json(stage.made_from))


def _refuse_to_replace(folder: RunFolder, reason: str) -> None:
    raise UserError(
        f"{folder.path} holds a trained model, but {reason}; replace it with --again (again=True), or name "
        "another folder with --out."
    )


def is_finished(folder: RunFolder, stages: Sequence[Stage]) -> bool:
    """Return whether every stage is recorded as it is asked for, with all files there in their size.

    Only the results are read; the contents of the other stages are checked where they are used.
    """
    for stage in stages:
        if stage.is_left_out:
            continue
        record = folder.records.get(stage.name)
        if not record or differences(record.made_from, stage.table(folder)):
            return False
        if record.damage(folder.path, only_size=stage.after != EVERY_STAGE):
            return False
    return True


def run_stages(
    folder: RunFolder, stages: Sequence[Stage], device: torch.device, listener: Listener, again: bool = False
) -> None:
    """Finish `stages` in order; all processes then know the records.

    Args:
        listener: gets every metric in order; the metrics of reused stages with `"replayed": True`.
        again: replace a trained Phase 2 whose contexts were computed anew with different bytes.
    """
    for stage in stages:
        if stage.is_left_out:
            continue
        made_from, record = ranks.on_rank_0(partial(_ask, folder, stage, stages, again))
        if record is None:
            record = _computed(folder, stage, stages, made_from, device, listener)
        else:
            replay(record, listener)
        folder.records[stage.name] = record
        if stage.state:  # after the record is written, also for a process that was killed between the two
            ranks.on_rank_0(partial(remove, folder.path / stage.state))


def replay(record: Record, listener: Listener) -> None:
    """Pass the metrics of a reused stage to the listener, marked as `replayed`."""
    for metric in record.metrics if not ranks.rank() else ():
        listener({**metric, "replayed": True})


def _ask(
    folder: RunFolder, stage: Stage, stages: Sequence[Stage], again: bool
) -> tuple[Table, Record | None]:
    """Return the table of a stage, and its record if that counts; None means that it is to be computed."""
    made_from, record, damage = stage.table(folder), folder.records.get(stage.name), ""
    if record is None:
        is_unreadable = folder.record_file(stage.name).is_file()
        reason = damage = f"{folder.record_file(stage.name)} is damaged" if is_unreadable else ""
    else:
        pairs, damage = differences(record.made_from, made_from), record.damage(folder.path)
        reason = damage or describe_differences(pairs)
        if not reason:
            if record.metrics:
                log(f"{stage.name}: reused.")
            return made_from, record
        if stage.name == TRAINED and not damage and not again:  # contexts of another machine, for example
            _refuse_to_replace(folder, reason)
    if reason and (stage.after != EVERY_STAGE or damage):
        log(f"{stage.name}: recomputed, since {reason}.")
    linked = _link(folder, stage, stages, made_from) if stage.is_linked else None
    return made_from, linked


def _link(folder: RunFolder, stage: Stage, stages: Sequence[Stage], made_from: Table) -> Record | None:
    """Link the files of a stage from a run beside this one that was made from the same; record it here."""
    for file in sorted(folder.path.parent.glob(f"[!.]*/{RECORDS}/{stage.name}.json")):
        other, record = file.parents[1], Record.read(file)
        if other == folder.path or record is None or differences(record.made_from, made_from):
            continue
        _clear(folder, stage, stages, made_from)
        with suppress(OSError):  # the files may have gone
            for name in record.files:
                with replacing(folder.path / name) as temporary_path:
                    _link_or_copy(other / name, temporary_path)
        if not record.damage(folder.path):
            log(f"{stage.name}: taken from {other.name}, which was made from the same.")
            return folder.write(stage.name, record)
    return None


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # not every file system can
        shutil.copy2(file, to)


def _clear(folder: RunFolder, stage: Stage, stages: Sequence[Stage], made_from: Table) -> None:
    """Delete the files and the record of a stage that is to be computed.

    If it is made from something else than before, everything that was made from its old version is deleted
    first, the last stage first, with the files that a killed process left without a record. If it is made
    from the same, as in a repair, files that users may edit are kept.
    """
    record = folder.records.get(stage.name)
    is_repair = record is not None and record.made_from == made_from
    later = [] if is_repair or record is None else _later_stages(stage, stages)
    for out_of_date in [*reversed(later), stage]:
        kept = out_of_date.editable if is_repair else ()
        for part in out_of_date.files:
            if part not in kept:
                remove(folder.path / part)
        folder.drop(out_of_date.name)


def _later_stages(stage: Stage, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that are made from this one, directly or not, in order."""
    names, later = {stage.name}, []
    for other in stages:
        if other.after == EVERY_STAGE or names & {*other.after}:
            names.add(other.name)
            later.append(other)
    return [other for other in later if other is not stage]


def _computed(
    folder: RunFolder,
    stage: Stage,
    stages: Sequence[Stage],
    made_from: Table,
    device: torch.device,
    listener: Listener,
) -> Record:
    """Compute a stage and record it."""
    after = stage.after if stage.after != EVERY_STAGE else ()
    work = Work(folder, made_from, after, device, listener)
    ranks.on_rank_0(lambda: _clear(folder, stage, stages, made_from))
    result = stage.compute(work) if stage.by_all else ranks.on_rank_0(lambda: stage.compute(work))

    def finish() -> Record:
        files = checksums(folder.path, [folder.path / part for part in stage.files])
        edited = checksums(folder.path, [folder.path / part for part in stage.editable])
        files |= dict.fromkeys(edited, "")
        link_equal_files(folder, stage.name, files)
        return folder.write(stage.name, Record(made_from, files, result, work.metrics, work.memory))

    return ranks.on_rank_0(finish)
