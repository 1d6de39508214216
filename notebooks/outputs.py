"""Execute notebooks (all, or the named ones) and keep their outputs: `make outputs`.

Outputs are kept if a page without a kernel can show them: PNGs with at most 128
colors, and the pictures and texts of widgets instead of the widgets. A digest of the
code cells in the metadata shows whether outputs are outdated. After notebook 3,
the script also writes the data of the site's attention explorer,
`docs/_static/window-data.js`.
"""

import base64
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER = Path(__file__).parent
COLORS = 128  # largest number of colors in a picture
EXPLORED = "03_phase2_context_kv.ipynb"  # its run is in the site's explorer
WINDOW = FOLDER.parent / "docs" / "_static" / "window-data.js"
CLICKED = 50  # number of positions in the site's explorer


def code_digest(notebook: dict[str, Any]) -> str:
    """Return a digest of all code cells in order."""
    cells = [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def execute(path: Path) -> None:
    """Execute a notebook in its folder and write it back with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["outputs_of"] = code_digest(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of execution
        if cell.cell_type == "code":
            cell.outputs = [
                kept for output in cell.outputs if (kept := slimmed(output))
            ]
    # Paths are those of a reader's clone.
    path.write_text(
        nbformat.writes(notebook).replace(f"{FOLDER.parent}/", "") + "\n", "utf-8"
    )


def slimmed(output: Any) -> Any:
    """Return an output without widgets, with smaller pictures, or None to drop it."""
    data = output.get("data", {})
    is_widget = data.pop(WIDGET, None) is not None
    if output.get("name") == "stderr" or (is_widget and "image/png" not in data):
        return None  # a progress bar
    if "image/png" in data:
        large, small = data["image/png"].strip(), fewer_colors(data["image/png"])
        data["image/png"] = small
        if "text/html" in data:  # the HTML may hold the same picture
            data["text/html"] = data["text/html"].replace(large, small)
    return output


def fewer_colors(png: str) -> str:
    """Reduce a PNG, in base64, to a palette of `COLORS` colors."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    rare_ones_too = Image.Quantize.MAXCOVERAGE  # median cut would gray a scale's ends
    image = image.quantize(COLORS, rare_ones_too, dither=Image.Dither.NONE)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def window_data(opened: Any, first: int, count: int = CLICKED) -> dict[str, Any]:
    """Collect attention and guesses at `count` positions, with their text.

    Args:
        opened: a finished run, opened with `open_run`.
        first: the first position.

    Returns:
        `tokens`, and `start`, the position of the first one; `first`; `offsets` of the
        slots; and `positions`, each with two results of `answers`: `own`, with its own
        contexts, and `other`, with contexts from half the stream away.
    """
    import torch

    from ctxkv_lib.views.explore import with_other_contexts

    model, stream, decode = opened.model, opened.streams["val"], opened.tokenizer.decode
    at = torch.arange(first, first + count)
    batch, slots = model.batch(stream, at), model.window.slots(at)
    sources = {"own": batch, "other": with_other_contexts(model, stream, at)}
    columns = {name: answers(opened, batch) for name, batch in sources.items()}
    start = max(0, int(slots.min()))  # a slot before the stream has no token
    tokens = [
        decode([token]) for token in stream.ids[start : first + count + 1].tolist()
    ]
    return {
        "start": start,
        "first": first,
        "tokens": tokens,
        "offsets": (at[0] - slots[0]).tolist(),
        "positions": [
            dict(zip(columns, row, strict=True))
            for row in zip(*columns.values(), strict=True)
        ],
    }


def answers(opened: Any, batch: Any) -> list[dict[str, Any]]:
    """Compute attention and predictions of the model at each position of a batch.

    Returns:
        `weights` `[heads, slots]` in tenths of a percent; `guesses`, pairs of a token
        and its probability in percent; and `next`, the same and the rank
        for the true token.
    """
    import torch

    model, decode, found = opened.model, opened.tokenizer.decode, []
    with torch.no_grad():
        weights = model.read(batch)[1]
        probabilities = torch.cat([*model.predictions(batch)]).softmax(dim=1)
    rows = zip(probabilities, batch.targets.tolist(), weights, strict=True)
    for row, target, shares in rows:
        likely, ids = row.topk(5)
        guesses = [
            [decode([token]), percent(share)]
            for token, share in zip(ids.tolist(), likely.tolist(), strict=True)
        ]
        rank = int((row > row[target]).sum()) + 1
        found.append(
            {
                "weights": (1000 * shares).round().int().tolist(),
                "guesses": guesses,
                "next": [percent(row[target].item()), rank],
            }
        )
    return found


def percent(share: float) -> float:
    return round(100 * share, 1)


def keep_window() -> None:
    """Write the data of the site's explorer from the run that notebook 3 finished."""
    import ctxkv_lib as ctxkv

    opened = ctxkv.open_run(ctxkv.run_folder_of(ctxkv.notebook_config()))
    data = window_data(opened, len(opened.streams["val"]) // 2)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    WINDOW.write_text(f"window.attention={text};\n", encoding="utf-8")


if __name__ == "__main__":
    for named in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb")))):
        print(named.name, flush=True)
        execute(named)
        if named.name == EXPLORED:
            keep_window()
