"""Run the stages of an experiment: reuse finished stages, compute the others, and say what has changed.

For each stage, `run_stages` first checks whether the stage's record can be reused. If not, it calls the
stage's function, which computes and writes the files. Then it records the stage with its metrics and memory
snapshots. It follows these rules:

- `stages.experiment_stages` lists the stages. Each stage has a table of what it is made from: settings by
  name, and digests from `inputs.Inputs.digests`. `Stage.table` adds digests of the earlier stages' outputs.
- `_reusable`: a stage is reused if its table equals the recorded table (`records.differences`) and its files
  are intact (`records.Record.damage`). Contexts may also be linked from a neighbouring run, i.e. a run in the
  same parent folder (`_link`).
- `is_finished`: if all stages are finished, nothing is computed. This check compares only the sizes of files.
  Their contents are checked when they are used.
- `prepare_folder`: a folder with different settings is refused. A folder whose Phase 2 was trained with
  different code, texts or precision is refused unless `again` is set, since training can take hours. After
  Phase 2, the saved model is the only stage that is recomputed without `again` (`Stage.is_replaceable`).
- `_clear`: before a stage is computed from different inputs, all files and records that depend on its old
  version are deleted. Even after a kill, a folder never has results and contexts from different texts.
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
from .folder import RunFolder
from .links import link_equal_files
from .records import OUTPUT_OF, Record, Table, as_json, describe_differences, differences, is_setting

TRAINED = "phase2"  # stage replaced only with `again`


class Work:
    """The argument of the function that computes a stage. It collects the metrics and memory snapshots.

    Attributes:
        made_from: table of what the stage is made from.
        state: the file from which interrupted training continues, or None if the stage does not save a state.
        metrics: all metrics so far, including restored ones.
        memory: all memory snapshots so far.
    """

    def __init__(
        self, folder: RunFolder, stage: "Stage", made_from: Table, device: torch.device, listener: Listener
    ) -> None:
        self.folder, self.made_from, self.device, self.listener = folder, made_from, device, listener
        self.state = folder.path / stage.state if stage.state else None
        self.metrics: list[Metric] = []
        self.memory: list[dict[str, Any]] = []

    def record(self, metric: Metric) -> None:
        """Append a metric to metrics.jsonl, and pass it to the listener.

        Before the stage's first metric, metrics.jsonl is rewritten with the metrics of earlier stages only.
        """
        is_first = not self.metrics
        self.metrics.append({name: value for name, value in metric.items() if name != "replayed"})
        if not ranks.rank():
            if is_first:
                self.folder.write_metrics(Record(self.made_from).outputs_before)
            self.folder.append_metric(metric)
            self.listener(metric)

    def snapshot(self, name: str) -> None:
        """Measure the current memory use. `name` describes this point of the stage, e.g. "data loaded"."""
        self.memory.append(snapshot(name, self.device))


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of an experiment, such as Phase 2.

    Attributes:
        compute: function that writes the files and returns the stage's part of the summary.
        made_from: table of the settings and digests that the stage depends on, not counting earlier stages.
        after: names of the earlier stages that the stage depends on; those without a record are ignored.
        files: files and folders that the stage writes.
        editable: files and folders that the stage writes and users may edit. Only their existence is checked.
        state: file from which an interrupted training run continues.
        is_linked: whether the files may be linked from another run in the same parent folder.
        is_collective: whether all processes compute the stage together. If not, only rank 0 computes it.
        is_from_results: whether the stage depends on the results and metrics of the stages in `after`, and
            not only on their files.
        is_replaceable: whether the stage may be recomputed without `again` after Phase 2 is trained.
        is_left_out: whether the stage is skipped. Its files are still deleted if they are out of date.
    """

    name: str
    compute: Callable[[Work], dict[str, Any]]
    made_from: Table
    after: Sequence[str] = ()
    files: Sequence[str] = ()
    editable: Sequence[str] = ()
    state: str = ""
    is_linked: bool = False
    is_collective: bool = False
    is_from_results: bool = False
    is_replaceable: bool = False
    is_left_out: bool = False

    def table(self, folder: RunFolder) -> Table:
        """Return the complete table: `made_from`, and digests of the outputs of earlier stages."""
        before = {name: folder.records[name] for name in self.after if folder.holds(name)}
        table = self.made_from | {OUTPUT_OF + name: record.output for name, record in before.items()}
        if self.is_from_results:
            table["numbers of the stages before"] = digest([record.numbers for record in before.values()])
        return as_json(table)

    def differences(self, folder: RunFolder) -> Table:
        """Return the differences between this stage's record and `made_from`, or {} if it has no record."""
        if self.name not in folder.records:
            return {}
        return differences(folder.records[self.name].made_from, as_json(self.made_from), [*self.made_from])


def require_same_settings(folder: RunFolder, stages: Sequence[Stage]) -> None:
    """Raise UserError if the folder has a record of a stage with different settings."""
    pairs = {name: pair for stage in stages for name, pair in stage.differences(folder).items()}
    if settings := {name: pair for name, pair in pairs.items() if is_setting(name)}:
        raise UserError(
            f"{folder.path} holds another experiment: {describe_differences(settings, ' instead of ')}; name "
            "another folder with --out."
        )


def prepare_folder(folder: RunFolder, stages: Sequence[Stage], again: bool) -> None:
    """Delete outdated files from a locked run folder, or refuse the folder.

    Args:
        again: whether a result from different code, texts or precision may be replaced.

    Raises:
        UserError: The folder was made with different settings, or `again` is False and its Phase 2 was
            trained with different code, texts or precision.
    """
    require_same_settings(folder, stages)
    changed = {stage: pairs for stage in stages if (pairs := stage.differences(folder))}
    kept = [pairs for stage, pairs in changed.items() if not stage.is_replaceable]
    pairs = {name: pair for table in kept for name, pair in table.items()}
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
    """Return whether every stage has a record that matches its table, and files of the right size.

    Only the files of the stage `results` are read. Other files are checked when they are used.
    """
    for stage in stages:
        if stage.is_left_out:
            continue
        record = folder.records.get(stage.name)
        if not record or differences(record.made_from, stage.table(folder)):
            return False
        if record.damage(folder.path, only_size=not stage.is_from_results):
            return False
    return True


def run_stages(
    folder: RunFolder, stages: Sequence[Stage], device: torch.device, listener: Listener, again: bool = False
) -> None:
    """Reuse or compute each stage, in order. Afterwards, every process has the records of all stages.

    Args:
        listener: called with every metric in order. The metrics of reused stages have `"replayed": True`.
        again: whether to retrain Phase 2 if its contexts were recomputed and differ from the old contexts.
    """
    for stage in stages:
        if stage.is_left_out:
            continue
        made_from, record = ranks.on_rank_0(partial(_reusable, folder, stage, stages, again))
        if record is None:
            record = _computed(folder, stage, stages, made_from, device, listener)
        else:
            replay(record, listener)
        folder.records[stage.name] = record
        # If a process was killed just after it recorded the stage, the training state still exists.
        if stage.state:
            ranks.on_rank_0(partial(remove, folder.path / stage.state))


def replay(record: Record, listener: Listener) -> None:
    """Pass the metrics of a reused stage to the listener. Each metric gets `"replayed": True`."""
    for metric in record.metrics if not ranks.rank() else ():
        listener({**metric, "replayed": True})


def _reusable(
    folder: RunFolder, stage: Stage, stages: Sequence[Stage], again: bool
) -> tuple[Table, Record | None]:
    """Return a stage's table and record. The record is None unless the stage can be reused or linked."""
    made_from, record = stage.table(folder), folder.records.get(stage.name)
    pairs = differences(record.made_from, made_from) if record else {}
    damage = record.damage(folder.path) if record else folder.unreadable(stage.name)
    if record and not pairs and not damage:
        if record.metrics:
            log(f"{stage.name}: reused.")
        return made_from, record
    if pairs and not damage and stage.name == TRAINED and not again:  # the contexts differ
        _refuse_to_replace(folder, describe_differences(pairs))
    if damage or (pairs and not stage.is_from_results):
        log(f"{stage.name}: recomputed, since {damage or describe_differences(pairs)}.")
    return made_from, _link(folder, stage, stages, made_from) if stage.is_linked else None


def _link(folder: RunFolder, stage: Stage, stages: Sequence[Stage], made_from: Table) -> Record | None:
    """Link a stage's files from a run in the same parent folder, and record the stage here.

    In the other run, the stage must have the same table. Return None if there is no such run.
    """
    for other, record in folder.sibling_records(stage.name):
        if differences(record.made_from, made_from):
            continue
        _clear(folder, stage, stages, made_from)
        with suppress(OSError):  # the files may be gone
            for name in record.files:
                with replacing(folder.path / name) as temporary_path:
                    _link_or_copy(other / name, temporary_path)
        if not record.damage(folder.path):
            log(f"{stage.name}: taken from {other.name}, which was made from the same inputs.")
            return folder.write(stage.name, record)
    return None


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # hard links are not supported
        shutil.copy2(file, to)


def _clear(folder: RunFolder, stage: Stage, stages: Sequence[Stage], made_from: Table) -> None:
    """Delete the files and the record of a stage before it is computed.

    If the stage's table has changed, all later stages that depend on it are deleted first, beginning with the
    last. Files that a killed process left without a record are deleted, too. If the table is unchanged,
    the stage is merely repaired, and files that users may have edited are kept.
    """
    record = folder.records.get(stage.name)
    is_repair = record is not None and record.made_from == made_from
    out_of_date = {stage.name: stage}
    for later in stages if record and not is_repair else ():
        if out_of_date.keys() & {*later.after}:
            out_of_date[later.name] = later
    for name, old in reversed(out_of_date.items()):
        for part in old.files if is_repair else (*old.files, *old.editable):
            remove(folder.path / part)
        folder.drop(name)


def _computed(
    folder: RunFolder,
    stage: Stage,
    stages: Sequence[Stage],
    made_from: Table,
    device: torch.device,
    listener: Listener,
) -> Record:
    """Compute a stage and record it."""
    work = Work(folder, stage, made_from, device, listener)
    ranks.on_rank_0(lambda: _clear(folder, stage, stages, made_from))
    result = stage.compute(work) if stage.is_collective else ranks.on_rank_0(lambda: stage.compute(work))

    def finish() -> Record:
        files = checksums(folder.path, stage.files)
        files |= dict.fromkeys(checksums(folder.path, stage.editable), "")
        link_equal_files(folder, stage.name, files)
        return folder.write(stage.name, Record(made_from, files, result, work.metrics, work.memory))

    return ranks.on_rank_0(finish)
