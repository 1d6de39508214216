"""Execute the notebooks and keep their outputs: `make outputs`. Naming some executes only these.

What is kept is what a page without a kernel can show: PNGs of at most 128 colours, and no widgets, whose
picture stands beside them. A digest of the code cells in the metadata tells outputs that are older.
"""

import base64
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER = Path(__file__).parent
COLOURS = 128  # of a kept picture


def code_digest(notebook: dict[str, Any]) -> str:
    """Return a digest of all code cells, in their order."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def execute(path: Path) -> None:
    """Execute a notebook where it lies, and write it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["outputs_of"] = code_digest(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := slimmed(output))]
    nbformat.write(notebook, path)


def slimmed(output: Any) -> Any:
    """Return an output without widgets and with smaller pictures; None if nothing is left to show."""
    data = output.get("data", {})
    is_widget = data.pop(WIDGET, None) is not None
    if output.get("name") == "stderr" or (is_widget and "image/png" not in data):
        return None  # a progress bar
    if "image/png" in data:
        data["image/png"] = fewer_colours(data["image/png"])
    return output


def fewer_colours(png: str) -> str:
    """Return a PNG, as base64, with a palette."""
    from PIL import Image

    image, content = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


if __name__ == "__main__":
    for named in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb")))):
        print(named.name, flush=True)
        execute(named)
