"""Each notebook has exercises, and the code of their answers runs at the end of the notebook."""

import re

import nbformat
import pytest
from nbclient import NotebookClient
from test_notebooks import NOTEBOOKS, each_notebook

ANSWER = re.compile(r"<details>\n<summary>Answer</summary>\n\n(.*?)\n\n</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def answers(notebook):
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [answer for text in texts for answer in ANSWER.findall(text)]


@each_notebook
def test_a_notebook_has_three_exercises_with_folded_answers_and_asks_for_a_prediction(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(answers(notebook)) == 3
    (exercises,) = [cell.source for cell in notebook.cells if cell.source.startswith("## Exercises")]
    assert "prediction" in exercises
    assert len(re.findall(r"(?m)^\*\*[123]\. ", exercises)) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_all_answers_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("CTXKV_PRESET", "ci")
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    code = [text for answer in answers(notebook) for text in CODE.findall(answer)]
    assert code
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in code]
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
