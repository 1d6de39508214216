"""The site's settings for Sphinx: `make docs` builds it into build/docs and treats warnings as errors.

Nothing is executed: the notebooks are copied next to the pages and show their saved outputs.
"""

import re
import shutil
import sys
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

import ctxkv_lib  # noqa: E402
from ctxkv_lib.views.figures import FONTS, INK  # noqa: E402

shutil.rmtree(TOP / "docs" / "notebooks", ignore_errors=True)
shutil.copytree(
    TOP / "notebooks", TOP / "docs" / "notebooks", ignore=lambda *_: ["study", "runs", "ruff.toml"]
)
# Their plotly figures load the bundle that the site itself serves (see the Makefile), not the CDN's.
for notebook in (TOP / "docs" / "notebooks").glob("*.ipynb"):
    text = notebook.read_text(encoding="utf-8")
    bundle = "../_static/plotly-basic.min.js"
    text = re.sub(r"https://cdn\.plot\.ly/plotly-basic-[\d.]+\.min\.js", bundle, text)
    notebook.write_text(text, encoding="utf-8")

project = "ctxkv_lib"
author = "The ctxkv_lib authors"
copyright = f"2026, {author}"
release = ctxkv_lib.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["**.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # plotly's MIME type; the output also has HTML
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
nb_render_markdown_format = "myst"  # because CommonMark has no tables
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "html_image"]
myst_heading_anchors = 3
DESCRIPTIONS = {  # of each page, for search engines
    "index": "In this language model, attention reads 32 compressed context vectors. Contexts help, but "
    "simpler models do as well or better.",
    "start": "Install ctxkv_lib, train a first model on a CPU in a few minutes, and look up all commands.",
    "method": "Context-KV attention in a map, in formulas and in PyTorch: how contexts are trained and read.",
    "study": "What is Context-KV attention worth? We compare it with n-grams, a GRU, an LSTM and a GPT.",
    "study-appendix": "More results: second intervals, all perplexities, variants of tuned, and what failed.",
    "own-data": "Train on your own conversations: formats of files and data sets, and how they are split.",
    "own-idea": "Replace a part of the method with your own class or function, and test whether it helps.",
    "scale": "Train many runs at once: on one machine, on a cluster, or with a job scheduler.",
    "colab": "Run the notebooks on Colab, keep runs in Google Drive, and estimate memory on GPUs.",
    "transformers": "Use a trained model with transformers: generate text, fine-tune, add LoRA, evaluate.",
    "fields": "The files of a run folder, the fields of its results, and when results are computed again.",
    "api": "The public functions and classes of ctxkv_lib.",
    "tuned": "All constants of the recipes published, exact and tuned, and what tuned replaces.",
    "glossary": "Terms of Context-KV attention: context, slot, window, recipe, token table, copying.",
}
mathjax_path = "es5/tex-svg.js"  # served by the site itself (see the Makefile)
myst_html_meta = {  # previews of links to a page
    "property=og:title": "Context-KV attention",
    "property=og:description": DESCRIPTIONS["index"],
    "property=og:image": "https://OWNER.github.io/REPOSITORY/_static/card.png",
    "name=twitter:card": "summary_large_image",
}

default_role = "code"
napoleon_use_ivar = True
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # the docstrings of torch's methods do not help here
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
maximum_signature_line_length = 60
python_display_short_literal_types = True

linkcheck_ignore = [".*OWNER.*"]  # placeholder until `make badges` fills in the repository

html_theme = "furo"
html_title = "ctxkv_lib: Context-KV attention"
html_theme_options = {  # the font and the ink of the figures
    "light_css_variables": {
        "font-stack": ", ".join([*map(repr, FONTS), "sans-serif"]),
        "color-foreground-primary": INK,
    }
}
html_static_path = ["_static", "../build/package"]
html_css_files = ["site.css"]
html_favicon = html_logo = "_static/icon.svg"
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "repository.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_js_files = ["window.js", "site.js"]
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False


def setup(app: Sphinx) -> None:
    """Register the changes for which Sphinx has no setting."""
    app.connect("doctree-read", keep_hidden_cells_out_of_search)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", add_narrow_pictures)
    app.connect("html-page-context", mark_intervals)


def keep_hidden_cells_out_of_search(_app: Sphinx, doctree: nodes.document) -> None:
    """Mark the folded cells of notebooks, which the search would otherwise list before "Get started"."""
    for container in doctree.findall(nodes.container):
        if "tag_hide-input" in container["classes"]:
            container["classes"].append("no-search")


def describe(
    _app: Sphinx, page: str, _template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Give a page its description for search engines: for a notebook, its title and its purpose."""
    description = DESCRIPTIONS.get(page)
    if page.startswith("notebooks/") and doctree:
        paragraphs = (paragraph.astext().replace("\n", " ") for paragraph in doctree.findall(nodes.paragraph))
        purpose = next(text for text in paragraphs if text.startswith("Purpose. "))
        description = f"{context['title']}. {re.split(r'(?<=[.]) ', purpose)[1]}"
    if description:
        tag = f'<meta name="description" content="{escape(description)}">'
        context["metatags"] = context.get("metatags", "") + tag


def add_narrow_pictures(
    _app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: nodes.document | None
) -> None:
    """Show NAME-narrow.png instead of NAME.png on phones, if docs/_static has both."""
    to_top = "../" * page.count("/")

    def picture(match: re.Match[str]) -> str:
        narrow = f"_static/{match['name']}-narrow.png"
        if not (TOP / "docs" / narrow).exists():
            return match[0]
        return f'<picture><source media="(max-width: 46em)" srcset="{to_top}{narrow}">{match[0]}</picture>'

    image = r'<img [^>]*src="[^"]*/(?P<name>[\w-]+)\.png"[^>]*>'
    context["body"] = re.sub(image, picture, context.get("body", ""))


def mark_intervals(
    _app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: nodes.document | None
) -> None:
    """Mark cells with an interval, such as "+2.3 (-4.7 to +11)", so that site.css lets them wrap."""
    cell = r'<td class="text-right(?="><p>[^<]*\()'
    context["body"] = re.sub(cell, r"\g<0> interval", context.get("body", ""))
