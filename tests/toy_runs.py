"""A toy experiment with the steps of a real one.

The toy writes small text files, so a run takes milliseconds. Any other input gives other numbers. `machine`
stands for rounding: it changes the bytes of the token vectors, the contexts and the weights, but is no input.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ctxkv_lib.files import digest, read_json, replacing, write_json, write_text
from ctxkv_lib.runs.drive import kept_on_drive, restore
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.steps import (
    RESULTS,
    STORE_PREFIX,
    RunFolder,
    claimed,
    describe,
    finished,
    metric_lines,
    record_settings,
    records,
    refuse_to_replace,
    require_same_settings,
    step,
)
from ctxkv_lib.store import Work, entry, entry_folder, inputs_of, intact_entry

SETTINGS = {"phase1.learning_rate": 0.002, "phase2.learning_rate": 0.001}
DIGESTS = {"train": "a", "test": "c", "corpus": "d", "code": "1"}
EPOCHS, STATE, WEIGHTS, VECTORS = 3, "phase2.pt", "weights.safetensors", "token_vectors.safetensors"
CONTEXTS = ("block", "train_ctx")


def number(*values: Any) -> float:
    return int(digest(values), 16) % 10**6 / 1000


@dataclass(frozen=True)
class Toy:
    """An experiment. `versions` are the versions of the results of each step."""

    settings: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    machine: int = 0

    @property
    def config(self):
        return build_config("ci", samples=3, settings=self.settings)

    @property
    def inputs(self) -> dict[str, Any]:
        texts = {"train": "a", "test": "c", "corpus": "d"} | self.texts
        settings = SETTINGS | self.settings

        def code(name: str) -> dict[str, int]:
            return {f"results version of {name}": self.versions.get(name, 1)}

        table = inputs_of(code("table"), {"corpus text": texts["corpus"]})
        chosen = {name: value for name, value in settings.items() if "phase1" in name}
        contexts = inputs_of(chosen | code("contexts"), {"train text": texts["train"]}, table=table)
        chosen = {name: value for name, value in settings.items() if "phase2" in name}
        before = {"table": table, "contexts": contexts}
        phase2 = inputs_of(chosen | code("phase2"), {"train text": texts["train"]}, **before)
        test = inputs_of(code("test"), {"test text": texts["test"]}, table=table, phase2=phase2)
        return {"table": table, "contexts": contexts, "phase2": phase2, "test": test}

    def run(self, path: Path, again: bool = False, listener: Any = lambda metric: None) -> dict[str, Any]:
        """Run the experiment as `experiments.run` does, and return its summary."""
        restore(path)
        require_same_settings(path, self.config)

        def entries() -> list[Path]:
            return [] if "phase2" in records(path) else [entry_folder("contexts", self.inputs["contexts"])]

        with (
            claimed(RunFolder(path, again, defaults=self.config.defaults())) as folder,
            kept_on_drive(path, entries, listener) as folder.listener,
        ):
            decisions = {"config": self.config.to_dict(), "precision": "fp32", "threads": 1}
            record_settings(folder, self.config, decisions, self._write_config)
            refuse_to_replace(folder, "phase2", self.inputs["phase2"])
            step(folder, "table", self.inputs["table"], self._table, [VECTORS])
            step(folder, "phase2", self.inputs["phase2"], self._phase2, [WEIGHTS], STATE)
            step(folder, "test", self.inputs["test"], self._test)
            return write_results(folder)

    def _write_config(self, work: Work) -> dict[str, Any]:
        write_json(work.folder / "config.json", self.config.to_dict())
        return {}

    def _table(self, work: Work) -> dict[str, Any]:
        def compute(inner: Work) -> dict[str, Any]:
            write_text(inner.folder / VECTORS, str(number("table", inner.inputs, self.machine)))
            return {}

        path, _ = entry("table", work.inputs, compute, [VECTORS])
        with replacing(work.folder / VECTORS) as temporary_path:
            shutil.copyfile(path / VECTORS, temporary_path)
        return {}

    def _phase2(self, work: Work) -> dict[str, Any]:
        table = (work.folder / VECTORS).read_text()

        def compute(inner: Work) -> dict[str, Any]:
            value = number(table, inner.inputs, self.machine)
            for iteration in (2, 3):
                inner.add_metric(
                    {"stage": "phase1", "iteration": iteration, "loss": number(value, iteration)}
                )
            for name in CONTEXTS:
                write_text(inner.folder / name, f"{name} {value}")
            return {"loss": value}

        uses = {"table": work.uses["table"]}
        path, record = entry(
            "contexts", work.inputs["before"]["contexts"], compute, CONTEXTS, uses, work.listen
        )
        work.uses[f"{STORE_PREFIX}contexts"] = record.output
        work.metrics += record.metrics
        contexts = [(path / name).read_text() for name in CONTEXTS]
        value, epochs = 0.0, self._restored(work)
        value = epochs[-1]["val_ppl"] if epochs else 0.0
        for metric in epochs:
            work.add_metric({**metric, "replayed": True})
        for epoch in range(len(epochs) + 1, EPOCHS + 1):
            value = number(value, epoch, contexts, work.inputs, self.machine)
            metric = {"stage": "phase2", "epoch": epoch, "val_ppl": value}
            epochs = [*epochs, metric]
            write_json(work.folder / STATE, {"inputs": work.inputs, "uses": work.uses, "epochs": epochs})
            work.add_metric(metric)
        write_text(work.folder / WEIGHTS, json.dumps([contexts[0], value]))
        return {"loss": record.numbers["loss"], "val_ppl": value}

    def _restored(self, work: Work) -> list[dict[str, Any]]:
        state = work.folder / STATE
        saved = read_json(state) if state.exists() else {"uses": None}
        if saved["uses"] != work.uses or describe(saved["inputs"], work.inputs, self.config.defaults()):
            return []
        return saved["epochs"]

    def _test(self, work: Work) -> dict[str, Any]:
        weights, table = (work.folder / WEIGHTS).read_text(), (work.folder / VECTORS).read_text()
        return {"ppl": number(weights, table, work.inputs, self.machine)}

    def contexts(self, path: Path) -> str:
        """Return the contexts of a finished run, from the store or from its block, as an open run does."""
        record = records(path)["phase2"]
        inputs = record.inputs["before"]["contexts"]
        found = intact_entry("contexts", inputs, {"table": record.uses["table"]})
        if found and found.output == record.uses[f"{STORE_PREFIX}contexts"]:
            return (entry_folder("contexts", inputs) / "train_ctx").read_text()
        block, _ = read_json(path / WEIGHTS)
        return block.replace("block", "train_ctx")


def summary_of(path: Path) -> dict[str, Any]:
    """Return what a folder shows as the result of a run. Raises UserError if it has not finished."""
    known = finished(path, "settings", "table", "phase2", "test")
    return {"phase2": known["phase2"].numbers, "test": known["test"].numbers}


def write_results(folder: RunFolder) -> dict[str, Any]:
    summary, path = summary_of(folder.path), folder.path

    def compute(_: Work) -> dict[str, Any]:
        write_json(path / "summary.json", summary)
        write_text(path / "metrics.jsonl", metric_lines(records(path)["phase2"].metrics))
        return {}

    numbers = inputs_of({}, {"numbers": digest(summary)})
    step(folder, RESULTS, numbers, compute, ["summary.json", "metrics.jsonl"])
    for name in ("report.md", "report.ja.md"):
        if not (path / name).exists():
            write_text(path / name, f"{name} {summary}")
    return summary


A = Toy()
OTHER_PHASE1, OTHER_PHASE2 = (replace(A, settings={name: 0.9}) for name in SETTINGS)
OTHER_TRAIN, OTHER_TEST, OTHER_CORPUS = (
    replace(A, texts={name: "x"}) for name in ("train", "test", "corpus")
)
NEW_CONTEXTS, NEW_PHASE2, NEW_TEST = (replace(A, versions={n: 2}) for n in ("contexts", "phase2", "test"))
RETRAINED = (OTHER_TRAIN, OTHER_CORPUS, NEW_CONTEXTS, NEW_PHASE2)  # refused without `again`
OTHER_MACHINE = replace(A, machine=7)
