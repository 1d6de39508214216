"""The README: short, complete, and true to the code and to the study's results."""

import json
import re
from importlib import import_module
from statistics import mean, stdev

import pytest
import torch
from conftest import TOP

import ctxkv_lib as ctxkv
from ctxkv_lib.method import reference
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.model import ContextKV

README = (TOP / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?s)```python\n(.*?)```", README)
ROWS = {  # of the table of results: part of the study, and its variant or baseline
    "`exact`: the original with exact contexts": ("answer", "exact"),
    "n-grams on the same text": ("answer", "n-grams"),
    "n-grams and a cache of the window": ("answer", "n-grams and cache"),
    "`tuned`: ours": ("answer", "tuned"),
    "`tuned` without contexts": ("baselines", "no contexts"),
    "GRU instead of contexts": ("baselines", "GRU"),
    "n-grams and four caches, with the token table's text counted, too": (
        "answer",
        "n-grams (table's text too) and caches",
    ),
}


def test_it_is_short():
    assert len(README.splitlines()) <= 160


def test_its_parts_stand_in_order():
    """One sentence, the original, badges, the picture, and then the sections."""
    marks = ["attention reads", "rato-tokyo/new-llm", "badge.svg", "architecture.png"]
    sections = [
        "Notebooks",
        "Two commands",
        "The method",
        "Results",
        "Your own conversations",
        "Your own idea",
        "Hardware, precision, size",
        "Documentation",
        "Citing",
    ]
    places = [README.index(mark) for mark in [*marks, *(f"\n## {name}\n" for name in sections)]]
    assert places == sorted(places)


def test_every_notebook_has_its_row():
    notebooks = [*TOP.glob("notebooks/*.ipynb")]
    assert len(notebooks) == README.count(".ipynb)")
    for path in notebooks:
        (row,) = [line for line in README.splitlines() if path.name in line]
        assert f"github.io/REPOSITORY/notebooks/{path.stem}.html" in row
        assert "colab-badge.svg" in row


def test_its_links_lead_to_pages_of_the_site():
    for page in re.findall(r"github\.io/[^/]+/(\w[\w-]*)\.html", README):
        assert (TOP / "docs" / f"{page}.md").is_file(), page


@pytest.mark.parametrize("name", ROWS)
def test_its_results_are_those_of_the_study(name):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
    part, variant = ROWS[name]
    found = {}
    for each in ("full", part):
        results = (TOP / f"notebooks/study/results/{each}/sweep.json").read_text(encoding="utf-8")
        rows = json.loads(results)["rows"]
        found |= {row["samples"]: row["test_ppl"] for row in rows if row["variant"] == variant}
    cells = {n: f"{mean(v):,.1f}" + (f" ± {stdev(v):,.1f}" if len(v) > 1 else "") for n, v in found.items()}
    assert {10, 50, 200} <= set(cells)
    assert line.strip("| ").split(" | ")[1:] == [cells.get(n, "–") for n in (10, 50, 100, 200, 500, 1000)]


def test_its_lines_of_the_method_are_the_reference():
    code = {}
    exec(SNIPPETS[0], code)
    torch.manual_seed(0)
    model, ids = ContextKV(ModelConfig(), 50), torch.randint(50, (700,))
    table = model.wte.weight.detach()
    p = {name: value.detach() for name, value in model.state_dict().items()}
    x = reference.normed_embedding(table, ids)
    contexts = torch.randn(700, 256)
    torch.testing.assert_close(
        code["next_context"](model.context_block, contexts, x), reference.context_block(p, contexts, x)
    )
    torch.testing.assert_close(code["oacd"](contexts), reference.oacd_loss(contexts, 0.1))
    positions = torch.tensor([0, 19, 20, 350, 699])
    expected = reference.phase2_logits(p, table, ids, contexts, positions, ModelConfig())
    for position, logits in zip(positions.tolist(), expected, strict=True):
        made = code["logits"](model, x, contexts, position)
        torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)


def test_its_own_idea_trains(tiny_config, tmp_path, monkeypatch):
    (code,) = [snippet for snippet in SNIPPETS if "loss=" in snippet]
    (tmp_path / "readme_idea.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctxkv, "build_config", lambda *_, **__: tiny_config)
    found = import_module("readme_idea")
    assert found.run.config.plugins["loss"].name == "readme_idea:spread"
