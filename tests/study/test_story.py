"""Tests of the pictures on the first page, in the README and in the notebooks."""

import re
from base64 import b64decode
from io import BytesIO
from xml.etree import ElementTree

import nbformat
import pytest
import story
from conftest import TOP
from matplotlib.colors import to_rgb
from PIL import Image
from svg import PHASE1, PHASE2, PICTURES, SHOWN, SMALL

from ctxkv_lib.views.figures import GRAY

NAMES = re.compile(r"pictures/([\w-]+)\.svg")


def contrast(color):
    """Return the contrast of a color with white, as WCAG defines it."""
    channels = [
        channel / 12.92 if channel <= 0.04 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in to_rgb(color)
    ]
    return 1.05 / (0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2] + 0.05)


@pytest.mark.parametrize("name", story.DRAWN)
def test_committed_pictures_show_the_results_and_can_be_read_on_a_phone(name):
    picture = story.DRAWN[name]().svg()
    assert (PICTURES / f"{name}.svg").read_text(encoding="utf-8") == picture, "make tables"
    root = ElementTree.fromstring(picture)
    assert root[0].tag.endswith("title")
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert float(text.get("font-size")) >= SMALL
        assert text.get("fill") == "#ffffff" or contrast(text.get("fill")) >= 4.5


def test_white_letters_can_be_read_on_the_boxes_of_the_map():
    assert all(contrast(color) >= 4.5 for color in (PHASE1, PHASE2, GRAY))


def test_every_picture_is_shown_and_every_shown_picture_exists():
    pages = [TOP / "README.md", TOP / "docs" / "index.md"]
    shown = {name for page in pages for name in NAMES.findall(page.read_text(encoding="utf-8"))}
    shown |= {cell.metadata.picture for cell in picture_cells()}
    assert shown == {*story.DRAWN} == {path.stem for path in PICTURES.iterdir()}


def picture_cells():
    notebooks = [nbformat.read(path, as_version=4) for path in (TOP / "notebooks").glob("*.ipynb")]
    return [cell for notebook in notebooks for cell in notebook.cells if "picture" in cell.metadata]


def test_notebooks_carry_their_pictures():
    for cell in picture_cells():
        image = ElementTree.fromstring(story.IMAGE.search(cell.source)[0].replace(">", "/>"))
        assert image.get("alt") == story.DRAWN[cell.metadata.picture]().alternative, "make tables"
        head, _, content = image.get("src").partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(BytesIO(b64decode(content))).width == 2 * SHOWN
    for path in (TOP / "notebooks").glob("*.ipynb"):
        assert "](pictures/" not in path.read_text(encoding="utf-8")  # a copy on Colab has no such file


def test_strips_show_the_nearest_slot_that_read_a_token():
    exact, tuned = (story.recovered(recipe).mean(axis=0) for recipe in ("exact", "tuned"))
    assert exact.shape == tuned.shape == (640,)
    assert exact[0] == exact[20] == exact[620] > exact[21] > exact[39]  # every 20th token is a slot itself
    assert tuned[13] == tuned[0] > tuned[14]
