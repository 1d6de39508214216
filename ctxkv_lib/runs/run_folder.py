"""The folder of one experiment: its owner, its finished stages, and its results."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ranks
from ..errors import DamagedFile, UserError
from ..files import (
    checksums,
    content_digest,
    digest,
    expanded,
    read_json,
    read_tensors,
    replacing,
    sweep,
    write_json,
    write_text,
)
from ..locks import LOCK, only_process
from ..method.loop import Metric
from ..progress import counted, notice
from .config import ExperimentConfig, changed_settings
from .configure import differing_settings, run_command, stored_config
from .package_code import code_of
from .records import FILE, Record, Records

if TYPE_CHECKING:
    from ..method.model import ContextKV

ROOT_VARIABLE = "CTXKV_RUNS"
COMPARISON = "comparison.json"
CONFIG = "config.json"
FOREIGN = {"desktop.ini", "Thumbs.db"}  # files that systems create; hidden files are ignored, too
MODEL_MARK = "generation_config.json"  # in the folder of a model, which has a config.json, too
DEFAULT_ROOT = expanded(os.environ.get(ROOT_VARIABLE) or "runs")


def run_folder_of(config: ExperimentConfig, root: Path | str = DEFAULT_ROOT) -> Path:
    """Return the default folder of an experiment; the same experiment always gets the same one.

    `preset-recipe-samples`, with the names of plug-ins and a short hash behind it of the settings that are
    not those of preset and recipe, if any. The user's own file counts by its content, by its path if missing.
    """
    changed = changed_settings(config)
    if config.data.path is not None:
        changed["data.path"] = content_digest(config.data.path)
    own = [plugin.name for hook, plugin in config.plugins.items() if f"{hook}.plugin" in changed]
    words = [config.preset, config.recipe, str(config.data.samples)]
    name = "-".join(words + [re.findall(r"\w+", each)[-1] for each in own])
    return expanded(root) / (f"{name}-{digest(changed)[:6]}" if changed else name)


def comparison_folder(configs: Sequence[ExperimentConfig], root: Path | str = DEFAULT_ROOT) -> Path:
    """Return the default folder of a comparison: its largest run's name and the smaller counts."""
    *smaller, largest = sorted(configs, key=lambda config: config.data.samples)
    counts = "-".join(str(config.data.samples) for config in smaller)
    return Path(f"{run_folder_of(largest, root)}-vs-{counts}")


class RunFolder:
    """One experiment on disk. Stages record their inputs, so finished work is reused."""

    records: Records  # once claimed; rank 0 alone keeps them up to date

    def __init__(self, path: Path | str) -> None:
        self.path = path = expanded(path)
        self.caches = path / "caches"
        self.model = path / "model"
        self.context_block = path / "checkpoint" / "context_block.safetensors"
        self.attention = path / "checkpoint" / "attention.safetensors"
        self.phase1_checkpoint = path / "checkpoint" / "phase1.safetensors"
        self.phase2_checkpoint = path / "checkpoint" / "phase2.safetensors"
        self.summary = path / "summary.json"
        self.config = path / CONFIG
        self.metrics_file = path / "metrics.jsonl"
        self._is_ours = False

    @contextmanager
    def claimed(self, config: ExperimentConfig, again: bool = False) -> Iterator[None]:
        """Lock the folder for this experiment while the block runs, on rank 0 for all ranks.

        Args:
            again: replace a finished result of other code, or without its record.

        Raises:
            UserError: it is in use, or holds another experiment or other files.
        """
        is_new, held = not self.path.exists(), ExitStack()
        try:
            with held:
                self.records = ranks.on_rank_0(lambda: self._taken(config, held, again))
                yield
        except BaseException:
            if is_new and self._is_ours and {p.name for p in self.path.iterdir()} <= {self.config.name, LOCK}:
                shutil.rmtree(self.path)  # nothing was made
            raise

    def _taken(self, config: ExperimentConfig, held: ExitStack, again: bool) -> Records:
        """Lock the folder until `held` closes, and return its records."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name another folder with --out.")
        if self._content() and not self.holds_run():
            raise UserError(f"{self.path} is not empty and holds no run; name another folder with --out.")
        held.enter_context(only_process(self.path))
        self._is_ours = True
        records = self.records_of(config, again)
        sweep(self.path)
        if "results" not in records.stages:  # which are of the file there, and are written with it
            write_json(self.config, config.to_dict())
        return records

    def holds_run(self) -> bool:
        return self.config.is_file() or (self.path / FILE).is_file()

    def _content(self) -> set[str]:
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        return {name for name in names if not name.startswith(".")} - FOREIGN

    def records_of(self, config: ExperimentConfig, again: bool = False) -> Records:
        """Return the records of `config`'s stages; none if the folder is new or they are damaged.

        Raises:
            UserError: it holds another experiment, or a finished result that is not to be made `again`.
        """
        records, code, kept = None, code_of(config), ""
        if self._content() - {CONFIG}:  # something has been computed
            try:
                records = Records.read(self.path)
                if records is None and self.summary.is_file():
                    kept = "holds a finished result without its record"
            except DamagedFile as error:
                notice(f"{error.path} cannot be used: {error.reason}; every stage is made again.")
            is_other = self._refuse_other(config, records)
            if records and "results" in records.stages and (is_other or records.code != code):
                kept = "holds a finished result of other code"
        elif self.config.is_file():
            stored_config(self.path, read_json(self.config))  # refuses a file of something else
        if kept and not again:
            is_of_a_cell = any(plugin.name.startswith("__main__:") for plugin in config.plugins.values())
            cure = "again=True" if is_of_a_cell else f"`{run_command(config, self.path)} --again`"
            raise UserError(
                f"{self.path} {kept}, which is kept; name another folder with --out, or replace it with "
                f"{cure}."
            )
        return Records(self.path, config.to_dict(), code, records.stages if records else {})

    def _refuse_other(self, config: ExperimentConfig, records: Records | None) -> bool:
        """Refuse a folder of other settings; return whether the code of a plug-in is other."""
        try:
            held = records.config if records else read_json(self.config)
        except (FileNotFoundError, DamagedFile):
            raise UserError(
                f"The run in {self.path} can no longer be read, not even its {CONFIG}; delete that folder, "
                "or name another with --out."
            ) from None
        there = stored_config(self.path, held)
        theirs, ours = differing_settings([there, config])
        # The same text may be elsewhere; stages are of its content.
        if different := sorted(theirs.keys() - {"data.path"}):
            shown = (f"{key} {theirs[key]!r} (asked: {ours[key]!r})" for key in different[:3])
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise UserError(
                f"{self.path} holds a run with another configuration: {', '.join(shown)}{more}; "
                "name another folder with --out (beside it, finished stages are shared), or delete that one."
            )
        return there.plugins != config.plugins

    def finished(self, stage: str, key: str) -> Record | None:
        """Return a stage's record if its key is `key` and its files are intact."""
        return ranks.on_rank_0(lambda: self._intact(stage, key))

    def shared(self, stage: str, key: str) -> Record | None:
        """Return `finished`, or the same stage of another run under this root, with its files linked here."""
        return self.finished(stage, key) or ranks.on_rank_0(lambda: self._adopted(stage, key))

    def _adopted(self, stage: str, key: str) -> Record | None:
        for other in sorted(self.path.parent.glob(f"*/{FILE}")):
            folder = other.parents[1]
            try:
                records = Records.read(folder)
                record = records and records.stages.get(stage)
                if not record or record.key != key or record.lost(folder):
                    continue
                for name in record.files:
                    with replacing(self.path / name) as beside:
                        _link(folder / name, beside)
            except (DamagedFile, OSError):  # another run may be rewriting or dropping its files
                continue
            notice(f"Stage {stage} is taken from {folder.name}: same settings, data and code.")
            return self.records.add(stage, record)
        return None

    def _intact(self, stage: str, key: str) -> Record | None:
        record = self.records.stages.get(stage)
        if record is None or record.key != key:
            if record and "results" in self.records.stages:
                notice(f"{stage} is made again: the finished result is of other text, code or precision.")
            return None
        if lost := record.lost(self.path):
            made = "is made again from what is intact" if stage != "results" else "are written anew"
            notice(f"{lost}: {stage} {made}.")
            return None
        return record

    def finish(
        self,
        stage: str,
        key: str,
        parts: Iterable[Path],
        result: dict[str, Any] | None = None,
        metrics: Sequence[Metric] = (),
    ) -> Record:
        """Record a finished stage with exactly the files at and below `parts`."""
        return ranks.on_rank_0(
            lambda: self.records.add(
                stage, Record(key, checksums(self.path, parts), result or {}, list(metrics))
            )
        )

    def load_block(self, model: "ContextKV") -> None:
        """Load the ContextBlock that Phase 1 wrote; a mixer has none."""
        if hasattr(model, "context_block"):
            model.context_block.load_state_dict(read_tensors(self.context_block))

    def load_attention(self, model: "ContextKV") -> None:
        """Load what Phase 2 trained."""
        model.load_state_dict(read_tensors(self.attention), strict=False)

    def metric_lines(self) -> Iterator[Metric]:
        """Yield the lines of metrics.jsonl so far, in order."""
        content = self.metrics_file.read_bytes() if self.metrics_file.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):  # else an earlier version was killed while it wrote the last one
                try:
                    yield {**json.loads(line)}
                except (ValueError, TypeError, RecursionError):
                    raise DamagedFile(self.metrics_file, f"line {number} is no JSON object") from None

    def append_metric(self, metric: Metric) -> None:
        if ranks.rank():
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_line(metric))

    def keep_metrics(self, *records: Record) -> None:
        """Write metrics.jsonl anew, with the lines of these stages only."""
        if ranks.rank():
            return
        if len(records) < 2 and "results" in self.records.stages:
            self.records.remove("results")  # a training begins, and they lose their metrics
        write_text(self.metrics_file, "".join(_line(metric) for each in records for metric in each.metrics))


def _link(file: Path, beside: Path) -> None:
    try:
        os.link(file, beside)
    except OSError:  # not every file system can
        shutil.copy2(file, beside)


def _line(metric: Metric) -> str:
    return json.dumps({name: value for name, value in metric.items() if name != "memory"}) + "\n"


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    path: Path
    config: ExperimentConfig
    summary: dict[str, Any]  # summary.json
    metrics: list[Metric]  # lines of metrics.jsonl, both phases

    def __repr__(self) -> str:
        ppl = self.summary["phase2"]["val_ppl"]
        return f"Run({str(self.path)!r}: {counted(self.summary['samples'])}, val PPL {ppl:,.1f})"

    @property
    def phase1(self) -> list[Metric]:
        """Return the lines of Phase 1, one an iteration."""
        return [line for line in self.metrics if line["stage"] == "phase1"]


def load_run(path: Path | str) -> Run:
    """Read a finished run.

    Raises:
        UserError: no such folder, or its run is unfinished or damaged.
    """
    folder = RunFolder(path)
    if (folder.path / MODEL_MARK).is_file():
        raise UserError(f"{path} is a run's model; name the run, {folder.path.parent}.")
    read = (folder.config, folder.summary, folder.metrics_file)
    return read_run(folder.path, refuse_damaged(folder.path, "results", [file.name for file in read]))


def _no_run(path: Path) -> str:
    """Explain why a folder holds no run, and what to name instead."""
    if not path.is_dir():
        return f"{path} is not a folder; name one of `ctxkv list`, or make it with `ctxkv run --out {path}`."
    if (path / COMPARISON).is_file():
        return f"{path} is a comparison; name one of its runs (`ctxkv list {path.parent}` shows them)."
    if any(not (file.parent / MODEL_MARK).is_file() for file in path.glob(f"*/{CONFIG}")):
        return f"{path} holds runs and is none; name one of them (`ctxkv list {path}` shows them)."
    return f"{path} has no {CONFIG}; make a run there with `ctxkv run --out {path}`."


def refuse_damaged(path: Path, stage: str, names: Iterable[str] | None = None) -> ExperimentConfig:
    """Check a stage's files, or those named, before they are used.

    Returns:
        the run's configuration.

    Raises:
        UserError: the stage is unfinished, or a file or the record of them is missing or damaged.
    """
    if not RunFolder(path).holds_run():
        raise UserError(_no_run(path))
    records = Records.read(path)
    config = stored_config(path, records.config if records else read_json(path / CONFIG))
    cure = run_command(config, path)
    if records is None and RunFolder(path).summary.is_file():
        raise UserError(f"{path} has no {FILE}; make it again with `{cure} --again`.")
    if records is None or stage not in records.stages:
        raise UserError(f"{path} has not finished; finish it with `{cure}`.")
    if lost := records.stages[stage].lost(path, names):
        raise UserError(f"{lost}; make it again with `{cure}`.")
    return config


def read_run(path: Path, config: ExperimentConfig) -> Run:
    """Read the complete run of `config` from its folder."""
    folder = RunFolder(path)
    return Run(path, config, read_json(folder.summary), list(folder.metric_lines()))
