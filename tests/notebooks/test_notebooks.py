"""All notebooks begin in the same way, and their outputs belong to their code. nbmake executes them."""

import json
import re
import sys

import pytest
from conftest import TOP

import ctxkv_lib

sys.path.append(str(TOP / "notebooks"))
from outputs import CLICKED, WIDGET, WINDOW, code_digest, slimmed, window_data

NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
(REPOSITORY,) = re.findall(r'Repository = "https://github\.com/(.+)"', (TOP / "pyproject.toml").read_text())
PLACE = f"https://colab.research.google.com/github/{REPOSITORY}/blob"
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def window():
    return json.loads(WINDOW.read_text(encoding="utf-8").removeprefix("window.attention=").rstrip(";\n"))


@each_notebook
def test_a_notebook_begins_like_the_others(path):
    title, setup, _, parameters, *_ = read(path)["cells"]
    title = "".join(title["source"])
    *lines, last = setup["source"]
    assert lines == read(NOTEBOOKS[0])["cells"][1]["source"][:-1]
    assert last.startswith("print(ctxkv.session(")
    assert f"@v{ctxkv_lib.__version__}" in "".join(lines)
    assert f"({PLACE}/v{ctxkv_lib.__version__}/notebooks/{path.name})" in title
    assert "parameters" in parameters["metadata"]["tags"]


@each_notebook
def test_a_folded_cell_is_folded_everywhere(path):
    code = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        kept = cell["metadata"]
        if kept.get("jupyter", {}).get("source_hidden"):  # JupyterLab
            assert kept["cellView"] == "form"  # Colab, which shows the title
            assert cell["source"][0].startswith("# @title ")
            assert "hide-input" in kept["tags"]  # the site
        assert len(cell["source"]) <= 25
    assert len(code) <= 20


@each_notebook
def test_outputs_are_not_older_than_the_code_and_need_no_kernel(path):
    notebook = read(path)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    if outputs:
        assert notebook["metadata"].get("outputs_of") == code_digest(notebook), "run `make outputs`"
    assert f"{TOP}/" not in path.read_text(encoding="utf-8")
    assert "widgets" not in notebook["metadata"]
    assert not any(WIDGET in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 600_000


def test_the_data_of_the_sites_explorer_hold_attention_and_guesses(trained):
    data = window_data(trained, 5, 5)  # some slots lie before the stream
    ids = trained.streams["val"].ids[:11].tolist()
    assert (data["start"], data["first"], len(data["positions"])) == (0, 5, 5)
    assert data["tokens"] == [trained.tokenizer.decode([token]) for token in ids]
    assert [*data["positions"][0]] == ["own", "other"]
    assert data["positions"][0]["own"]["weights"] != data["positions"][0]["other"]["weights"]
    for position in (answer for pair in data["positions"] for answer in pair.values()):
        assert all(sum(row) == pytest.approx(1000, abs=len(row)) for row in position["weights"])
        assert position["guesses"][0][1] >= position["guesses"][-1][1]
        assert position["next"][1] >= 1


def test_the_first_page_counts_the_guesses_that_stay_in_its_explorer():
    first = [{answer["guesses"][0][0] for answer in pair.values()} for pair in window()["positions"]]
    kept = sum(len(tokens) == 1 for tokens in first)
    words = (TOP / "docs" / "index.md").read_text(encoding="utf-8").split()
    assert f"at {kept} of the {len(first)} positions below" in " ".join(words)


def test_the_data_of_the_site_are_small_and_complete():
    assert WINDOW.stat().st_size < 150_000
    data = window()
    assert len(data["positions"]) == CLICKED
    assert len(data["tokens"]) == data["first"] - data["start"] + CLICKED + 1


def test_outputs_keep_the_picture_of_an_explorer_and_drop_progress_bars():
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    page = f'<img src="data:image/png;base64,{dot}">'
    data = {WIDGET: {}, "image/png": dot, "text/html": page, "text/plain": ""}
    shown = slimmed({"output_type": "display_data", "data": data})["data"]
    assert {*shown} == {"image/png", "text/html", "text/plain"}
    assert shown["image/png"] in shown["text/html"]  # the page embeds the same picture
    assert slimmed({"output_type": "display_data", "data": {WIDGET: {}, "text/plain": "0%"}}) is None
    assert slimmed({"output_type": "stream", "name": "stderr", "text": "a warning"}) is None
