"""Interactive curves of runs: a plotly figure, or a picture if plotly is not installed."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..progress import log
from ..report.tables import Summary, labeled
from ..runs.summary import Run, load_run
from .figures import FONTS, GRAY, INK, LOOKS, known_epochs, ppl_curves, ppl_limits

SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "v": "triangle-down", "^": "triangle-up"}
SYMBOLS |= {"X": "x", "*": "star"}
PLOTLY = "application/vnd.plotly.v1+json"
# Height of the figure in pixels. The picture has the same height, so the page does not jump when the figure
# takes its place.
HEIGHT = 560
# Plotly's settings in JupyterLab and in HTML. Only the buttons may change the axes: if a tap, a double-click
# or a drag did so by accident, the note about values above the axis would be wrong.
CONFIG = {
    "responsive": True,
    "doubleClick": False,
    "scrollZoom": False,
    "showAxisDragHandles": False,
    "displaylogo": False,
    "showTips": False,
    "displayModeBar": True,
    "modeBarButtons": [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
}
# HTML that shows the picture until plotly's small bundle "basic" has loaded. The project's site serves its
# own copy of this bundle.
PAGE = """<div id="{id}"><img alt="{alt}" src="data:image/png;base64,{png}" style="max-width:100%"></div>
<script>
(() => {{
  const draw = () => {{
    const place = document.getElementById("{id}"), {{ data, layout }} = {figure};
    place.replaceChildren();
    Plotly.newPlot(place, data, layout, {config});
  }};
  const source = "https://cdn.plot.ly/plotly-basic-{version}.min.js";
  if (window.Plotly) draw();
  else document.head.append(Object.assign(document.createElement("script"), {{ src: source, onload: draw }}));
}})();
</script>"""


class Curves:
    """Curves of runs. A notebook shows them with plotly, or as a picture if plotly is not installed."""

    def __init__(self, summaries: Mapping[str, Summary]) -> None:
        self.summaries = summaries

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Return the figure for JupyterLab, HTML for pages that run scripts (Colab, the site), and a picture.

        The picture has the figure's size in pixels, because JupyterLab shows it, unscaled, until the pointer
        moves over it.
        """
        picture = ppl_curves(self.summaries)
        picture.set_figheight(HEIGHT / picture.dpi)
        png = picture.png(1)
        bundle = {"image/png": png, "text/plain": "Curves of runs"}
        try:
            figure = plotly_curves(self.summaries)
        except ImportError:
            log("plotly is not installed, so this is only a picture. To install it: `pip install plotly`.")
            return bundle
        content = figure.to_plotly_json() | {"config": CONFIG}
        return {PLOTLY: content, "text/html": _page(figure, png), **bundle}


def explore_runs(
    runs: Run | Path | str | Sequence[Run | Path | str] | Mapping[str, Run | Path | str],
) -> Curves:
    """Draw curves that show their values under the pointer. A click in the legend hides or shows a run.

    Buttons above the figure zoom, reset the axes and save a picture. Dragging or swiping scrolls the page.

    Args:
        runs: finished runs, or their folders. A mapping gives each run its label.

    Raises:
        UserError: no runs are given, or a folder has no finished run.
    """
    given = [runs] if isinstance(runs, Run | Path | str) else runs
    if not given:
        raise UserError("There are no runs to explore; give at least one run folder.")
    labels = [*given] if isinstance(given, Mapping) else None
    values = given.values() if isinstance(given, Mapping) else given
    opened = [run if isinstance(run, Run) else load_run(run) for run in values]
    by_label = labeled(opened) if labels is None else dict(zip(labels, opened, strict=True))
    return Curves({label: run.summary for label, run in by_label.items()})


def plotly_curves(summaries: Mapping[str, Summary]) -> Any:
    """Make the plotly figure: perplexity by epoch, with validation accuracy below it.

    Raises:
        ImportError: plotly is not installed.
    """
    import plotly.graph_objects as go

    figure, longest = go.Figure(), max(len(known_epochs(summary)) for summary in summaries.values())
    for look, (name, summary) in zip(cycle(LOOKS), summaries.items(), strict=False):
        figure.add_traces(_traces(name, summary, look))
    low, high, note = ppl_limits(summaries)
    # Plotly computes the range itself, so that the button "Reset axes" works for both types of axis.
    limits = {"autorangeoptions": {"include": [low, high], "clipmax": high}, "rangemode": "tozero"}
    title = "Perplexity per token"
    logarithmic = {"type": "log", "dtick": "D2", "title.text": f"{title} (log scale)"}  # labels at 1, 2 and 5
    linear = {"type": "linear", "dtick": None, "title.text": title}
    changes = [
        {f"yaxis.{key}": value for key, value in scale.items()} | {"yaxis.autorange": True}
        for scale in (logarithmic, linear)
    ]
    buttons = [{"label": new["yaxis.type"], "method": "relayout", "args": [new]} for new in changes]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "xanchor": "left"}
    menu |= {"y": 1, "yanchor": "bottom", "pad": {"b": 52}}
    heading = "<br>".join(filter(None, ["○ best epoch, dashed: training", note]))
    figure.update_layout(
        template="plotly_white",
        height=HEIGHT,
        font={"family": f"{', '.join(FONTS)}, sans-serif", "color": INK},
        modebar={"color": GRAY, "activecolor": INK},
        dragmode=False,
        # The top margin has room for plotly's tools, the buttons, and a title of up to two lines.
        margin={"l": 60, "r": 20, "t": 110, "b": 40},
        title={"text": heading, "font_size": 13, "x": 0, "xref": "paper", "y": 0.86, "yanchor": "top"},
        hovermode="x unified",
        hoverdistance=-1,  # also between epochs
        hoversubplots="axis",
        legend={"orientation": "h", "y": -0.12, "itemdoubleclick": False},
        # The first label and the hover text read "Epoch 1"; the other labels are numbers only.
        xaxis={
            "anchor": "y2",
            "tick0": 1,
            "dtick": 1 + longest // 12,
            "tickprefix": "Epoch ",
            "showtickprefix": "first",
        },
        yaxis={"tickformat": ",d", "domain": [0.34, 1], **limits},
        yaxis2={"title": "Accuracy", "tickformat": ".0%", "domain": [0, 0.27]},
        updatemenus=[menu],
        **changes[0],
    )
    return figure


def _page(figure: Any, png: bytes) -> str:
    """Return HTML that shows the picture and replaces it with the figure as soon as plotly has loaded."""
    from plotly.offline import get_plotlyjs_version

    # Without this escape, a run's name could contain "</script>" and end the script.
    content = figure.to_json().replace("</", "<\\/")
    return PAGE.format(
        id=f"curves-{hashlib.sha256(content.encode()).hexdigest()[:12]}",
        alt="Training and validation perplexity by epoch",
        png=b64encode(png).decode(),
        figure=content,
        config=json.dumps(CONFIG),
        version=get_plotlyjs_version(),
    )


def _traces(name: str, summary: Summary, look: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a run as plotly traces. One click in the legend hides all lines of the run."""
    epochs, best = known_epochs(summary), summary["phase2"]["best_epoch"]
    at = [line["epoch"] for line in epochs]
    symbols = [SYMBOLS[look["marker"]] + "-open" * (epoch == best) for epoch in at]
    marker = {"symbol": symbols, "size": [13 if epoch == best else 7 for epoch in at]}
    points = {"name": name, "mode": "lines+markers", "marker": marker}
    accuracy = {"y": [line["val_acc"] for line in epochs], "yaxis": "y2"}
    lines = [
        {**points, "y": [line["val_ppl"] for line in epochs]},
        {**points, **accuracy, "hovertemplate": "accuracy %{y:.1%}"},
        {"name": f"{name}, training", "y": [line["train_ppl"] for line in epochs], "line": {"dash": "dash"}},
    ]
    if "ngrams" in summary:
        ngrams = [summary["ngrams"]["kneser_ney"]["val_ppl"]] * len(at)
        lines.append({"name": f"{name}, n-grams", "y": ngrams, "line": {"dash": "dot"}})
    shared = {"type": "scatter", "x": at, "legendgroup": name, "line_color": look["color"]}
    default = {"mode": "lines", "hovertemplate": "perplexity %{y:,.1f}"}
    return [{**shared, **default, **line, "showlegend": not n} for n, line in enumerate(lines)]
