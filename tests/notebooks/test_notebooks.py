"""The notebooks as files: alike, and with outputs of the code that they show. nbmake executes them."""

import json
import re
import sys

import pytest
from conftest import TOP

import ctxkv_lib

sys.path.append(str(TOP / "notebooks"))
from outputs import WIDGET, code_digest, slimmed

NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
(REPOSITORY,) = re.findall(r'Repository = "https://github\.com/(.+)"', (TOP / "pyproject.toml").read_text())
PLACE = f"https://colab.research.google.com/github/{REPOSITORY}/blob"
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@each_notebook
def test_it_begins_like_the_others(path):
    title, setup, _, parameters, *_ = read(path)["cells"]
    title = "".join(title["source"])
    assert setup["source"] == read(NOTEBOOKS[0])["cells"][1]["source"]
    assert f"@v{ctxkv_lib.__version__}" in "".join(setup["source"])
    assert f"({PLACE}/v{ctxkv_lib.__version__}/notebooks/{path.name})" in title
    assert parameters["metadata"]["tags"] == ["parameters"]


@each_notebook
def test_outputs_are_not_older_than_the_code_and_need_no_kernel(path):
    notebook = read(path)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    if outputs:
        assert notebook["metadata"].get("outputs_of") == code_digest(notebook), "run `make outputs`"
    assert "widgets" not in notebook["metadata"]
    assert not any(WIDGET in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 600_000


def test_of_an_explorer_its_picture_is_kept_and_of_a_progress_bar_nothing():
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    shown = slimmed({"output_type": "display_data", "data": {WIDGET: {}, "image/png": dot, "text/plain": ""}})
    assert {*shown["data"]} == {"image/png", "text/plain"}
    assert slimmed({"output_type": "display_data", "data": {WIDGET: {}, "text/plain": "0%"}}) is None
    assert slimmed({"output_type": "stream", "name": "stderr", "text": "a warning"}) is None
