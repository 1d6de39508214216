"""The README and its pictures: true to the code."""

import re
import sys
from importlib import import_module

import pytest
import torch
from conftest import TOP
from matplotlib.backends.backend_agg import FigureCanvasAgg

import ctxkv_lib as ctxkv
from ctxkv_lib.method import reference
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.model import ContextKV

sys.path.append(str(TOP / "docs"))
from diagram import PACKAGES, architecture, packages

README = (TOP / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?s)```python\n(.*?)```", README)


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
    torch.testing.assert_close(code["oacd"](contexts), reference.dispersion_loss(contexts, 0.1))
    positions = torch.tensor([0, 19, 20, 350, 699])
    expected = reference.phase2_logits(p, table, ids, contexts, positions, ModelConfig())
    for position, logits in zip(positions.tolist(), expected, strict=True):
        made = code["logits"](model, x, contexts, position)
        torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)


def test_its_own_idea_trains(tiny_config, tmp_path, monkeypatch, own_module):
    (code,) = [snippet for snippet in SNIPPETS if "loss=" in snippet]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctxkv, "build_config", lambda *_, **__: tiny_config)
    found = import_module(own_module("readme_idea", code))
    assert found.run.config.plugins["loss"].name == "readme_idea:spread"


# The pictures, which `make picture` draws


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_architecture_takes_its_numbers_from_the_config():
    published = " ".join(texts(architecture(ModelConfig())))
    for number in ("640 tokens", "50,257 × 768", "i − 620", "6,301,440", "262,912", "8 heads over 32"):
        assert number in published
    other = " ".join(texts(architecture(ModelConfig(interval=50, max_contexts=4, num_heads=4))))
    for number in ("200 tokens", "i − 150", "4 heads over 4"):
        assert number in other
    assert "620" not in other


@pytest.mark.parametrize("max_contexts", [1, 2, 3, 4])
def test_architecture_draws_no_slot_that_does_not_exist(max_contexts):
    written = texts(architecture(ModelConfig(max_contexts=max_contexts)))
    assert len([text for text in written if text == "i" or text.startswith("i − ")]) == max_contexts


@pytest.mark.parametrize(
    "figure", [architecture(ModelConfig()), packages()], ids=["architecture", "packages"]
)
def test_text_of_a_drawing_stays_on_the_page_and_touches_no_other(figure):
    renderer, page = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()]
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_every_package_is_drawn():
    assert {*PACKAGES} == {path.parent.name for path in (TOP / "ctxkv_lib").glob("*/__init__.py")}
