"""Curves of runs that answer to the pointer: a plotly figure, and its picture where plotly cannot draw."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import log10
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..progress import log
from ..report.tables import Summary, runs_by_name
from ..runs.summary import Run, load_run
from .figures import LOOKS, known_epochs, ppl_curves, ppl_limits

SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "v": "triangle-down", "^": "triangle-up"}
SYMBOLS |= {"X": "x", "*": "star"}
PLOTLY = "application/vnd.plotly.v1+json"


class Curves:
    """Curves of runs by name, as a cell shows them: by plotly, or where that is missing as a picture."""

    def __init__(self, summaries: Mapping[str, Summary]) -> None:
        self.summaries = summaries

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Return the figure for JupyterLab, for pages with scripts (Colab, the site), and as a picture.

        JupyterLab shows the picture until the pointer comes, as large as it has pixels.
        """
        bundle = {"image/png": ppl_curves(self.summaries).png(1), "text/plain": "Curves of runs"}
        try:
            figure = plotly_curves(self.summaries)
        except ImportError:
            log("plotly is not installed, so that this is only a picture; get it by `pip install plotly`.")
            return bundle
        page = figure.to_html(full_html=False, include_plotlyjs="cdn")
        return {PLOTLY: figure.to_plotly_json(), "text/html": page, **bundle}


def explore_runs(runs: Run | Path | str | Sequence[Run | Path | str]) -> Curves:
    """Draw curves of runs whose values show under the pointer, with zoom, and runs to switch in the legend.

    Args:
        runs: finished runs, or their folders.

    Raises:
        UserError: no runs, or a folder without a finished run.
    """
    given = [runs] if isinstance(runs, Run | Path | str) else [*runs]
    opened = [run if isinstance(run, Run) else load_run(run) for run in given]
    if not opened:
        raise UserError("There are no runs to explore; name at least one run folder.")
    return Curves({name: run.summary for name, run in runs_by_name(opened).items()})


def plotly_curves(summaries: Mapping[str, Summary]) -> Any:
    """Make the plotly figure: perplexity above validation accuracy, by epoch.

    Raises:
        ImportError: plotly is not installed.
    """
    import plotly.graph_objects as go

    figure, longest = go.Figure(), max(len(known_epochs(summary)) for summary in summaries.values())
    for look, (name, summary) in zip(cycle(LOOKS), summaries.items(), strict=False):
        figure.add_traces(_traces(name, summary, look))
    low, high, note = ppl_limits(summaries)
    logarithmic = {"type": "log", "range": [log10(low), log10(high)], "dtick": "D2"}  # labels of 1, 2 and 5
    linear = {"type": "linear", "range": [0, high], "dtick": None}
    changes = [{f"yaxis.{key}": value for key, value in scale.items()} for scale in (logarithmic, linear)]
    buttons = [{"label": new["yaxis.type"], "method": "relayout", "args": [new]} for new in changes]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "xanchor": "left"}
    menu |= {"y": 1, "yanchor": "bottom", "pad": {"b": 52}}
    title = "<br>".join(filter(None, ["○ best epoch, dashed: training", note]))
    figure.update_layout(
        template="plotly_white",
        height=560,
        # The top has rows for plotly's tools, the buttons, and the title in up to two lines.
        margin={"l": 60, "r": 20, "t": 110, "b": 40},
        title={"text": title, "font_size": 13, "x": 0, "xref": "paper", "y": 0.86, "yanchor": "top"},
        hovermode="x unified",
        hoversubplots="axis",
        legend={"orientation": "h", "y": -0.12},
        xaxis={"title": "Epoch", "anchor": "y2", "tick0": 0, "dtick": 1 + longest // 12},
        yaxis={"title": "Perplexity per token", "tickformat": ",d", **logarithmic, "domain": [0.34, 1]},
        yaxis2={"title": "Accuracy", "tickformat": ".0%", "domain": [0, 0.27]},
        updatemenus=[menu],
    )
    return figure


def _traces(name: str, summary: Summary, look: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe the lines of a run, which one click in the legend hides together."""
    epochs, best = known_epochs(summary), summary["phase2"]["best_epoch"]
    at = [line["epoch"] for line in epochs]
    symbols = [SYMBOLS[look["marker"]] + "-open" * (epoch == best) for epoch in at]
    marker = {"symbol": symbols, "size": [13 if epoch == best else 7 for epoch in at]}
    points = {"name": name, "mode": "lines+markers", "marker": marker, "hovertemplate": "%{y:,.1f}"}
    lines = [
        {**points, "y": [line["val_ppl"] for line in epochs]},
        {**points, "y": [line["val_acc"] for line in epochs], "hovertemplate": "%{y:.1%}", "yaxis": "y2"},
        {"name": f"{name}, training", "y": [line["train_ppl"] for line in epochs], "line": {"dash": "dash"}},
    ]
    if "ngrams" in summary:
        ngrams = [summary["ngrams"]["kneser_ney"]["val_ppl"]] * len(at)
        lines.append({"name": f"{name}, n-grams", "y": ngrams, "line": {"dash": "dot"}})
    shared = {"type": "scatter", "x": at, "legendgroup": name, "line_color": look["color"]}
    default = {"mode": "lines", "hovertemplate": "%{y:,.1f}"}
    return [{**shared, **default, **line, "showlegend": not n} for n, line in enumerate(lines)]
