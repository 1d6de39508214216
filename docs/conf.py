"""The site's settings for Sphinx: `make docs` builds it into build/docs and treats warnings as errors.

Nothing is executed: the notebooks are copied next to the pages and show their saved outputs.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

import ctxkv_lib  # noqa: E402

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
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
mathjax_path = "es5/tex-svg.js"  # served by the site itself (see the Makefile)
myst_html_meta = {  # previews of links to a page
    "property=og:title": "Context-KV attention",
    "property=og:description": "In this language model, attention reads 32 compressed context vectors.",
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
    """Register the two changes for which Sphinx has no setting."""
    app.connect("doctree-read", keep_hidden_cells_out_of_search)
    app.connect("html-page-context", add_narrow_pictures)


def keep_hidden_cells_out_of_search(_app: Sphinx, doctree: nodes.document) -> None:
    """Mark the folded cells of notebooks, which the search would otherwise list before "Get started"."""
    for container in doctree.findall(nodes.container):
        if "tag_hide-input" in container["classes"]:
            container["classes"].append("no-search")


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
