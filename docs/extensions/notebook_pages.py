"""The notebooks as pages: copied beside the others, with a note on how they were executed, without controls.

A page has no kernel: sliders would do nothing, and ipywidgets would load its scripts from another site. So
each widget becomes what it shows when its notebook ends.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.core.render import WIDGET_VIEW_MIMETYPE
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx

TOP = Path(__file__).resolve().parents[2]
FOLDER = "notebooks"
NO_CONTROLS = '<p class="still">Shown as it opens: the controls need a running notebook.</p>'
EXECUTED = """```{{note}}
Executed{how} when this site was built. To run it yourself: [](../colab.md), or in a clone.
```"""
PRESET = " with preset `{}`"
SMALL = " (a small model, a few conversations: its numbers only show the way)"
VARIABLE = "CTXKV_PRESET"


def copy_notebooks(app: Sphinx) -> None:
    """Copy the notebooks, with the times of their last change, and link the study that one of them reads."""
    copies, originals = Path(app.srcdir, FOLDER), [*(TOP / FOLDER).glob("*.ipynb")]
    copies.mkdir(exist_ok=True)
    for gone in {*copies.glob("*.ipynb")} - {copies / path.name for path in originals}:
        gone.unlink()
    for path in originals:
        shutil.copy2(path, copies)
    if not (copies / "study").exists():
        (copies / "study").symlink_to(TOP / FOLDER / "study", target_is_directory=True)


def introduce(app: Sphinx, page: str, source: list[str]) -> None:
    """Say below a notebook's title how it was executed, and fold its first cell, the same in all of them."""
    if not page.startswith(f"{FOLDER}/"):
        return
    notebook, preset = json.loads(source[0]), os.environ[VARIABLE]
    how = PRESET.format(preset) + SMALL * (preset == "ci") if VARIABLE in source[0] else ""
    text = EXECUTED.format(how=how)
    notebook["cells"].insert(1, {"cell_type": "markdown", "metadata": {}, "source": text, "id": "executed"})
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    first["metadata"]["tags"] = [*first["metadata"].get("tags", []), "hide-input"]
    source[0] = json.dumps(notebook)


def replace_widgets(app: Sphinx, doctree: nodes.document) -> None:
    """Replace the widgets of a page by their HTML, and drop the scripts that would have drawn them."""
    scripts = NbMetadataCollector.get_js_files(app.env, app.env.docname)
    dropped = {name: scripts.pop(name) for name in list(scripts) if name.startswith("ipywidgets_")}
    if not dropped:
        return
    state = json.loads(dropped["ipywidgets_state"][1]["body"])["state"]
    for view in list(doctree.findall(nodes.container)):
        if view.get("mime_type") == WIDGET_VIEW_MIMETYPE:
            name = json.loads(view.astext().partition(">")[2].rpartition("<")[0])["model_id"]
            html = nodes.raw("", shown(state, name), format="html")
            view.parent.children = [nodes.container("", html, mime_type="text/html")]


def shown(state: dict[str, Any], name: str) -> str:
    """Return the HTML in a widget, with a note if it has controls, too."""
    found = contents(state, name)
    texts = [each["state"]["value"] for each in found if each["model_name"] == "HTMLModel"]
    return "".join(texts) + NO_CONTROLS * (len(texts) < len(found))


def contents(state: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """List the widgets inside one, in their order; one that holds no others is its own content."""
    children = [child.removeprefix("IPY_MODEL_") for child in state[name]["state"].get("children", ())]
    return [found for child in children for found in contents(state, child)] if children else [state[name]]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", introduce)
    app.connect("doctree-read", replace_widgets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
