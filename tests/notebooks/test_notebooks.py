"""The notebooks as files: short, alike, nothing of a run in them. `make notebooks` executes them."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import types

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import TOP, sources

import ctxkv_lib
from ctxkv_lib.errors import UserError
from ctxkv_lib.runs.config import PRESETS, RECIPES, build_config
from ctxkv_lib.runs.configure import compared_samples, configure
from ctxkv_lib.runs.published import PUBLISHED
from ctxkv_lib.views import notebook
from ctxkv_lib.views.explore import load_corpus

FOLDER = TOP / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FROM_SCRATCH, RUNNING = NOTEBOOKS[0], NOTEBOOKS[1:]  # without the package; of experiments


BOOTSTRAP = sources(FROM_SCRATCH)["bootstrap"]


@each_notebook
def test_nothing_of_a_run_is_kept_and_cells_are_few_and_short(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    cells = sources(path).values()
    assert len(cells) <= 15
    assert max(len(cell.splitlines()) for cell in cells) <= 25
    for cell in cells:
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name


@each_notebook
def test_every_notebook_begins_alike_and_explains_oacd_and_the_original_where_they_first_appear(path):
    title, bootstrap, _, parameters, *_ = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert "".join(bootstrap["source"]) == BOOTSTRAP
    assert parameters["metadata"]["tags"] == ["parameters"]
    title = "".join(title["source"])
    repository = re.search(r'REPOSITORY = "(.+?)"', BOOTSTRAP).group(1)
    version = re.search(r'VERSION = "(.+?)"', BOOTSTRAP).group(1)
    assert (
        f"https://colab.research.google.com/github/{repository}/blob/{version}/notebooks/{path.name}" in title
    )
    for promise in ("**Purpose.**", "**Hardware.**", "**Time.**"):
        assert promise in title
    texts = [*sources(path, "markdown").values()]
    assert "2025-12-03" in texts[0]
    assert "rato-tokyo/new-llm" in texts[0]
    assert 'called "the original" below' in " ".join(texts[0].split())
    assert not [text for text in texts if re.search("published (report|experiment)", text)]
    explained = re.search(r"OACD\W+Origin-Anchored\s+Centroid\s+Dispersion", "\n".join(texts))
    assert "\n".join(texts).find("OACD") == (explained.start() if explained else -1)


def test_the_notebook_from_scratch_imports_the_package_in_its_last_cell_only():
    _, *before, last = sources(FROM_SCRATCH).values()
    assert "ctxkv_lib" in last
    modules = {
        name.split(".")[0]
        for node in ast.walk(ast.parse("\n".join(before)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert modules <= {"copy", "math", "random", "matplotlib", "numpy", "torch"}


def test_each_picture_from_scratch_is_described_in_words():
    """The site's alt text; without, it is the name of a file. Pictures of the package have their own."""
    cells = json.loads(FROM_SCRATCH.read_text(encoding="utf-8"))["cells"]
    drawing = [cell for cell in cells if re.search(r"plt\.(figure|subplots)", "".join(cell["source"]))]
    assert len({cell["metadata"]["mystnb"]["image"]["alt"] for cell in drawing}) == len(drawing) > 0


def test_from_scratch_draws_weights_of_few_contexts_in_full():
    plt.switch_backend("agg")
    page = {"torch": torch, "plt": plt, "interval": 1, "max_contexts": 2, "num_heads": 4, "layers": {2: None}}
    page |= {"val": torch.arange(40), "val_contexts": None}
    page["predict"] = lambda *at: (torch.zeros(len(at[3]), 40), torch.full((len(at[3]), 4, 2), 0.5))
    exec(sources(FROM_SCRATCH)["weights"], page)
    _, ax, _ = page["axes"]
    plt.close(page["fig"])
    assert max(bar.get_height() for bar in ax.patches) == 0.5 < ax.get_ylim()[1]


class Colab:
    """Stands in for `google.colab` and for pip, and notes what is asked of them."""

    def __init__(self, monkeypatch):
        self.mounted, self.commands, self.failure = [], [], 0
        drive = types.SimpleNamespace(mount=self.mounted.append)
        monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
        monkeypatch.setattr(subprocess, "run", self.pip)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delenv("CTXKV_DRIVE", raising=False)

    def pip(self, command, check):
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.failure)


UNSET, IN_A_FORK = (
    re.sub('REPOSITORY = ".+?"', f'REPOSITORY = "{place}"', BOOTSTRAP, count=1)
    for place in ("OWNER/REPOSITORY", "someone/fork")
)


def test_on_colab_only_what_it_lacks_is_installed_and_drive_is_mounted_when_asked_for(monkeypatch):
    colab = Colab(monkeypatch)
    exec(IN_A_FORK, {})
    (command,) = colab.commands
    assert "--no-deps" in command
    assert not [word for word in command if word.startswith(("-U", "--upgrade"))]
    packages = [word for word in command[command.index("install") + 1 :] if not word.startswith("-")]
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert packages[1:] == project["optional-dependencies"]["offline"]
    assert packages[0] == f"ctxkv_lib @ git+https://github.com/someone/fork@v{ctxkv_lib.__version__}"
    assert colab.mounted == []
    assert "CTXKV_DRIVE" not in os.environ
    exec(IN_A_FORK.replace("USE_DRIVE = False", "USE_DRIVE = True"), {})
    assert colab.mounted == ["/content/drive"]
    assert os.environ.pop("CTXKV_DRIVE").startswith("/content/drive/")


def test_a_place_that_is_not_set_or_wrong_is_one_sentence_and_a_clone_needs_none(monkeypatch):
    colab = Colab(monkeypatch)
    with pytest.raises(SystemExit, match="REPOSITORY is not set: type owner/name"):
        exec(UNSET, {})
    assert colab.commands == []
    colab.failure = 1
    with pytest.raises(SystemExit, match=r"could not install v[\d.]+ of github\.com/someone/fork"):
        exec(IN_A_FORK, {})
    colab.commands.clear()
    monkeypatch.delitem(sys.modules, "google.colab")
    exec(BOOTSTRAP, {})
    assert colab.commands == []


# What notebooks share


@pytest.fixture
def bare(monkeypatch):
    """No variable of ours is set."""
    for name in ("PRESET", "SAMPLES", "RECIPE", "SEED"):
        monkeypatch.delenv(f"CTXKV_{name}", raising=False)


def test_values_of_a_form_and_of_plain_python_count_alike_and_those_left_out_are_the_presets(bare, capsys):
    assert notebook.parameters("ci", " 7 ", "exact", "1") == ("ci", 7, "exact", 1)
    assert notebook.parameters("ci", 7, "exact", 0) == ("ci", 7, "exact", 0)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="seed is 'many'; allowed: a whole number, or nothing"):
        notebook.parameters("ci", "", "", "many")
    assert notebook.notebook_config("ci") == build_config("ci")
    chosen = notebook.notebook_config("ci", 4, "published", 7, {"phase2.patience": 1})
    assert chosen == build_config("ci", "published", 4, {"runtime.seed": 7, "phase2.patience": 1})


def test_the_environment_goes_before_the_form_which_may_leave_the_choice_to_machine_and_preset(
    bare, monkeypatch, capsys
):
    assert notebook.parameters("", "", "", "") == ("offline", None, None, None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "google.colab", types.SimpleNamespace())
        assert notebook.parameters("", None, " ", "") == ("colab", None, None, None)
    monkeypatch.setenv("CTXKV_PRESET", "ci")
    monkeypatch.setenv("CTXKV_SAMPLES", "7")
    monkeypatch.setenv("CTXKV_RECIPE", "")  # as good as not set
    assert notebook.parameters("", "50", "published", "") == ("ci", 7, "published", None)
    assert capsys.readouterr().out == "samples is 7, as CTXKV_SAMPLES says, and not 50.\n"


@pytest.mark.parametrize("path", RUNNING, ids=lambda path: path.stem)
def test_parameters_are_a_form_that_offers_what_there_is(path):
    lines = sources(path)["parameters"].splitlines()
    form = dict(line.split("  # @param ") for line in lines if "# @param" in line)
    assert [line.split(" = ") for line in form] == [
        [name, '""'] for name in ("preset", "samples", "recipe", "seed")
    ]
    choices = [json.loads(values) for values in form.values() if values.startswith("[")]
    assert choices == [["", *PRESETS], ["", *RECIPES]]


def test_comparisons_are_one_to_five():
    counts = {preset: compared_samples(build_config(preset)) for preset in PRESETS}
    assert counts == {"colab": (100, 500), "offline": (10, 50), "ci": (2, 10)}
    assert notebook.comparison_counts("colab", 1000) == (200, 1000)
    assert notebook.comparison_counts("ci", 5) == (1, 5)
    assert compared_samples(configure("offline", settings={"data.samples": 30})) == (6, 30)
    with pytest.raises(UserError, match="samples is 4; allowed for a comparison: 5 or more"):
        compared_samples(notebook.notebook_config("ci", 4))


def test_runs_lie_at_the_top_of_the_clone(monkeypatch, tmp_path):
    monkeypatch.delenv("CTXKV_RUNS", raising=False)
    monkeypatch.chdir(FOLDER)
    assert notebook.runs_root() == FOLDER.parent / "runs"
    monkeypatch.chdir(tmp_path)
    assert notebook.runs_root() == tmp_path / "runs"
    (tmp_path / "ctxkv_lib").mkdir()
    monkeypatch.chdir(tmp_path / "ctxkv_lib")  # a clone of that name
    assert notebook.runs_root() == tmp_path / "ctxkv_lib" / "runs"
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "elsewhere"))
    assert notebook.runs_root() == tmp_path / "elsewhere"


def test_the_file_that_01_writes_is_enough_to_train_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(sources(RUNNING[0])["own-file"], {})
    config = notebook.notebook_config("ci", settings={"data.path": "my_chats.jsonl"})
    streams = load_corpus(config).streams
    assert min(len(stream.ids) for stream in streams.values()) > config.model.context_window


def test_what_has_no_phase_1_is_shown_and_05_draws_the_setting_that_is_named(capsys):
    untrained = {"iterations": 0, "stop_reason": "untrained", "effective_rank": None}
    record = {"phase1": {**untrained, "convergence_rate": None, "seconds": 0.0, "effective_rank": 0.78}}
    exec(sources(RUNNING[1])["outcome"], {"prepared": types.SimpleNamespace(record=record)})
    assert "here: untrained after iteration 0, 0% of positions converged" in capsys.readouterr().out
    summaries = {
        "base": PUBLISHED[500],
        "other": PUBLISHED[100],
        "mixer": {**PUBLISHED[100], "phase1": untrained},
    }
    runs = {name: types.SimpleNamespace(summary=summary) for name, summary in summaries.items()}
    page = {"runs": runs}
    exec(sources(RUNNING[5])["table"], page)
    assert [row[-1] for row in page["rows"]] == ["82.1%", "82.2%", "–"]
    page = {"runs": {name: [run] for name, run in runs.items()}, "show": lambda _: None}
    exec(sources(RUNNING[4])["curves"].replace("list(runs)[1]", "'mixer'"), page)
    assert [*page["pair"]] == ["base", "mixer"]
