"""The folder of one experiment: what is in it, which stages are done, and whose it is."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ExperimentConfig, build_config, config_from_dict
from ..errors import UserError
from ..files import digest, read_json, write_json, write_text
from ..progress import Metric

ROOT_VARIABLE = "CTXKV_RUNS"
DEFAULT_ROOT = Path(os.environ.get(ROOT_VARIABLE) or "runs")
STAGES = "checkpoint/stages.json"


def run_folder_of(config: ExperimentConfig, root: Path = DEFAULT_ROOT) -> Path:
    """Where an experiment goes unless told otherwise; the same experiment always goes to the same place.

    `preset-recipe-samples`, with a short hash behind it if any other setting is not the preset's.
    """
    name = f"{config.preset}-{config.recipe}-{config.data.samples}"
    plain = build_config(config.preset, config.recipe, config.data.samples)
    return root / (name if config == plain else f"{name}-{digest(config.to_dict())[:6]}")


def comparison_folder(configs: Sequence[ExperimentConfig], root: Path = DEFAULT_ROOT) -> Path:
    """Where a comparison goes unless told otherwise: named after its largest run and the smaller counts."""
    *smaller, largest = sorted(configs, key=lambda config: config.data.samples)
    counts = "-".join(str(config.data.samples) for config in smaller)
    return root / f"{run_folder_of(largest).name}-vs-{counts}"


class RunFolder:
    """One experiment on disk. Stages record what they were made from, so finished work is found again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.caches = path / "caches"
        self.model = path / "model"
        self.figures = path / "figures"
        self.context_block = path / "checkpoint" / "context_block.safetensors"
        self.phase2_checkpoint = path / "checkpoint" / "phase2.safetensors"
        self.summary = path / "summary.json"
        self.report = path / "report.md"
        self.config = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"

    def claim(self, config: ExperimentConfig) -> None:
        """Make the folder this experiment's own.

        Raises:
            UserError: the folder holds another experiment, or something that is no experiment.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name another folder with --out.")
        if self.metrics_file.exists():
            self._refuse_other(config.to_dict(), config_from_dict(read_json(self.config)).to_dict())
        elif self.path.exists() and set(self.path.iterdir()) - {self.config}:
            raise UserError(f"{self.path} is not empty and holds no run; name another folder with --out.")
        write_json(self.config, config.to_dict())

    def _refuse_other(self, wanted: dict[str, Any], found: dict[str, Any]) -> None:
        ours, theirs = dict(_flat(wanted)), dict(_flat(found))
        different = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
        if different:
            shown = ", ".join(f"{k} {theirs.get(k)!r} (asked: {ours.get(k)!r})" for k in different[:3])
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise UserError(
                f"{self.path} holds a run with another configuration: {shown}{more}; "
                "name another folder with --out, or delete that one."
            )

    def finished(self, stage: str, key: str) -> dict[str, Any] | None:
        """What `stage` recorded, if it was made from the inputs that `key` stands for."""
        record = self._stages().get(stage)
        return record["result"] if record and record["key"] == key else None

    def finish(self, stage: str, key: str, result: dict[str, Any]) -> None:
        """Record a finished stage; the stages after it will see that their inputs changed."""
        write_json(self.path / STAGES, {**self._stages(), stage: {"key": key, "result": result}})

    def _stages(self) -> dict[str, Any]:
        path = self.path / STAGES
        return read_json(path) if path.exists() else {}

    def append_metric(self, metric: Metric) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metric) + "\n")

    def metrics(self, stage: str) -> list[Metric]:
        """The lines of metrics.jsonl that a stage wrote, in order."""
        return [line for line in self.metric_lines() if line["stage"] == stage]

    def forget_metrics(self, *stages: str) -> None:
        """Drop the lines of stages that are about to be done again."""
        kept = [json.dumps(line) + "\n" for line in self.metric_lines() if line["stage"] not in stages]
        write_text(self.metrics_file, "".join(kept))

    def metric_lines(self) -> Iterator[Metric]:
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else the last one was cut off by a crash
                    yield json.loads(line)


@dataclass(frozen=True)
class Run:
    """A finished run, as read from its folder."""

    path: Path
    config: ExperimentConfig
    summary: dict[str, Any]  # summary.json
    metrics: list[Metric]  # lines of metrics.jsonl, both phases

    @property
    def phase1(self) -> list[Metric]:
        """The lines of Phase 1, one an iteration."""
        return [line for line in self.metrics if line["stage"] == "phase1"]


def load_run(path: Path | str) -> Run:
    """Read a finished run.

    Raises:
        UserError: no such folder, or the run in it has not finished.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{path} is not a folder; make it with `ctxkv run --out {path}`.")
    for file in (folder.config, folder.summary, folder.metrics_file):
        if not file.is_file():
            raise UserError(f"{path} has no {file.name}; finish it with `ctxkv run --out {path}`.")
    return Run(
        path=folder.path,
        config=config_from_dict(read_json(folder.config)),
        summary=read_json(folder.summary),
        metrics=list(folder.metric_lines()),
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
