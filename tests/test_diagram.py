"""The pictures of the README, which `make picture` draws."""

import sys

import pytest
from conftest import TOP
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ctxkv_lib.method.config import ModelConfig

sys.path.append(str(TOP / "docs"))
from diagram import PACKAGES, architecture, packages


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
