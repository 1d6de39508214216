"""The site's settings for Sphinx: `make docs` builds it into build/docs, and a warning is an error.

The notebooks are copied beside the pages and executed there. Their outputs are kept under build/, by the code
of their cells and of the package: a change of prose executes nothing. Run folders are kept there, too, so
that executing them again trains nothing.
"""

import hashlib
import os
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
BUILD = TOP / "build"
sys.path[:0] = [str(TOP), str(TOP / "docs" / "extensions")]

from ctxkv_lib.runs.sources import plain_source  # noqa: E402

import ctxkv_lib  # noqa: E402

project = "ctxkv_lib"
author = "The ctxkv_lib authors"
copyright = f"2026, {author}"
release = ctxkv_lib.__version__

# Read by the notebooks' kernels; another preset takes longer and shows more.
os.environ.setdefault("CTXKV_PRESET", "ci")
os.environ.setdefault("CTXKV_RUNS", str(BUILD / "docs-runs"))
os.environ["PYTHONPATH"] = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])


def executed_with() -> str:
    """Identify what outputs depend on besides their cells: preset, package, results of the study."""
    code = [plain_source(path.read_text(encoding="utf-8")) for path in sorted(TOP.glob("ctxkv_lib/**/*.py"))]
    data = [path.read_text(encoding="utf-8") for path in sorted(TOP.glob("notebooks/study/results/*/*.json"))]
    words = [path.read_text(encoding="utf-8") for path in sorted(TOP.glob("ctxkv_lib/**/*.j2"))]
    found = "".join([os.environ["CTXKV_PRESET"], *code, *data, *words])
    return hashlib.sha256(found.encode()).hexdigest()[:16]


extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "notebook_pages",
    "public_api",
]
exclude_patterns = ["notebooks/study", "**.ipynb_checkpoints"]

nb_execution_mode = "cache"
nb_execution_cache_path = str(BUILD / "docs-outputs" / executed_with())
nb_execution_excludepatterns = ["notebooks/*"] if "CTXKV_EXECUTED" in os.environ else []  # they have outputs
nb_execution_timeout = 7200  # seconds for a cell, on a busy machine and with another preset
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove-warn"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of torch's methods say nothing here
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 60
python_display_short_literal_types = True

linkcheck_ignore = [".*OWNER.*"]  # until `make badges` has written the repository

html_theme = "furo"
html_title = "ctxkv_lib: Context-KV attention"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False  # of modules: two pages, which the contents list
