"""Formulas as MathML, made when the site is built: browsers draw it without a script or a download."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SIZES = re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])")  # MathML stretches brackets by itself
ACCENT = ' accent="true"'  # with it, Chromium draws a bar through the letter
NORM = re.compile("<mo[^>]*>‖</mo>")  # the first of two would stretch to the height of the whole formula


def mathml(formula: str, is_block: bool) -> str:
    drawn = str(tex2mathml(SIZES.sub("", formula), as_block=is_block)).replace(ACCENT, "")
    return NORM.sub('<mo stretchy="false">‖</mo>', drawn)


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), is_block=False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node.astext(), is_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
