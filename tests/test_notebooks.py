"""The notebooks as files: short, alike, and without anything of a run."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_the_suite_is_there():
    names = [
        "01_data",
        "02_phase1_oacd",
        "03_phase2_context_kv",
        "04_compare_100_vs_500",
        "05_next_experiments",
    ]
    assert [path.stem for path in NOTEBOOKS] == names


@each_notebook
def test_nothing_of_a_run_is_kept(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@each_notebook
def test_cells_are_few_and_short(path):
    cells = code_cells(path)
    assert len(cells) <= 15
    assert max(len(source(cell).splitlines()) for cell in cells) <= 25
    for cell in cells:
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name


@each_notebook
def test_every_notebook_begins_alike(path):
    bootstrap, parameters = code_cells(path)[:2]
    assert source(bootstrap) == source(code_cells(NOTEBOOKS[0])[0])
    assert parameters["metadata"]["tags"] == ["parameters"]
    title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    repository = re.search(r'REPOSITORY = "(.+?)"', source(bootstrap)).group(1)
    assert f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}" in title
    for promise in ("**Purpose.**", "**Hardware.**", "**Time.**"):
        assert promise in title


def test_colab_keeps_its_own_packages():
    bootstrap = source(code_cells(NOTEBOOKS[0])[0])
    assert "--no-deps" in bootstrap
    assert "--upgrade" not in bootstrap


def test_badges_are_written_by_one_command(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS:
        (tmp_path / "notebooks" / path.name).write_bytes(path.read_bytes())
    makefile = str(FOLDER.parent / "Makefile")
    subprocess.run(["make", "-f", makefile, "badges", "REPO=someone/something"], cwd=tmp_path, check=True)
    for path in NOTEBOOKS:
        before, after = (
            path.read_text(encoding="utf-8"),
            (tmp_path / "notebooks" / path.name).read_text("utf-8"),
        )
        assert 'REPOSITORY = \\"someone/something\\"' in after
        assert f"colab.research.google.com/github/someone/something/blob/main/notebooks/{path.name}" in after
        assert len(before.splitlines()) == len(after.splitlines())
