"""What a notebook's page shows of ours, as HTML: figures, tables, text with its tokens marked, links.

HTML, since only HTML has all of: alt text, a width that follows the page, values under the pointer, and a
dark side without a second drawing. Nothing in it is a script, so it works in Colab, JupyterLab and VS Code.
"""

import html
import io
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .axes import DPI, INK, OKABE_ITO, PAPER, QUIET
from .explore import Window

PLAIN = 'class="tex2jax_ignore mathjax_ignore"'  # notebooks would set what stands between dollar signs
WIDTH = 100  # pixels of the page an inch of a figure takes, where the page has them
POINTER_REACH = 1.5  # percent of the figure's width around a point that shows its value
LONGEST_WORD = 14  # letters, in a table
MOST_POINTS = 200  # of a curve: clouds of points keep their values to themselves
# JupyterLab, Colab and VS Code each say in their own way that the page is dark. The colours are turned by
# brightness alone: blue stays blue, so that words about colours stay true.
DARK = '[data-jp-theme-light="false"] .ctxkv, html[theme="dark"] .ctxkv, body.vscode-dark .ctxkv'
STYLE = f"<style>{DARK} {{filter: invert(0.93) hue-rotate(180deg); color-scheme: light}}</style>"
STRIPES = ("#dbe9f4", "#fbe3d4")  # light blue and light orange, told apart by every eye
BOX = (
    f"background:{PAPER};color:{INK};padding:10px 12px;border-radius:6px;line-height:1.75;"
    "font-family:monospace;font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere;"
    "max-height:320px;overflow-y:auto"
)
AT_END = ";display:flex;flex-direction:column-reverse"  # a box so turned opens scrolled to its end


def themed(content: str) -> str:
    """HTML made for a light page, that turns dark with a dark one."""
    return f'{STYLE}<div class="ctxkv">{content}</div>'


def show_html(content: str) -> Any:
    """An object that a notebook shows as HTML."""
    from IPython.display import HTML

    return HTML(themed(content))


def show(figure: Figure) -> None:
    """Display a figure under the cell; as a plain PNG where HTML is not shown."""
    from IPython.display import display

    image = png(figure)
    display({"text/html": figure_html(figure, image), "image/png": image}, raw=True)


def png(figure: Figure) -> bytes:
    """`figure` with its own background, as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor=PAPER)
    return content.getvalue()


def figure_html(figure: Figure, image: bytes) -> str:
    """A figure that has been drawn, as wide as it is or as the page is; its values under the pointer.

    Height and width stand in the tag, so that the page does not move while the picture is read.
    """
    width, height = (round(WIDTH * inches) for inches in figure.get_size_inches())
    picture = (
        f'<img src="{data_uri(image, "image/png")}" alt="{html.escape(alt_text(figure))}" width="{width}" '
        f'height="{height}" decoding="sync" style="display:block;width:100%;height:auto;max-width:none">'
    )
    box = f"position:relative;width:100%;max-width:{width}px"  # in this order, or widgets will not shrink it
    return themed(f'<div style="{box}">{picture}{"".join(_values(figure))}</div>')


def alt_text(figure: Figure) -> str:
    """What a figure shows, in words: titles, axes, names of the curves and whatever is written in it."""
    parts = []
    for ax in figure.axes:
        if ax.get_label() != "<colorbar>":
            parts += [ax.get_title(loc="left"), _axes_text(ax), *(text.get_text() for text in ax.texts)]
    parts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    lines = (part.replace("\n", ", ").replace(r"\$", "$").strip() for part in parts)
    return "; ".join(dict.fromkeys(line for line in lines if line)) + "."


def download_link(name: str, content: bytes, kind: str) -> str:
    """A link that saves `content`, of a MIME type, where the browser is and not where the kernel is."""
    name = html.escape(name)
    return f'<a download="{name}" href="{data_uri(content, kind)}">Download {name}</a>'


def data_uri(content: bytes, kind: str) -> str:
    """`content` as an address that needs no server."""
    return f"data:{kind};base64,{b64encode(content).decode()}"


def token_boundaries(pieces: Sequence[str]) -> str:
    """Tokens in alternating colours; a line break shows as a mark and a break."""
    spans = (f'<span style="background:{STRIPES[i % 2]}">{_text(p)}</span>' for i, p in enumerate(pieces))
    return f'<div {PLAIN} style="{BOX}">{"".join(spans)}</div>'


def attended_text(window: Window, weights: Sequence[float]) -> str:
    """The tokens of a window, attended ones on a blue that is the stronger the more weight they get.

    The box opens at the position itself, which is framed; the token after it is underlined.

    Args:
        weights: one a slot, as in `window.slots`.
    """
    share = {int(at): weight for at, weight in zip(window.slots, weights, strict=True) if at >= 0}
    strongest = max(share.values())
    spans = []
    for position, piece in enumerate(window.pieces, start=window.start):
        if position in share:
            spans.append(_attended(piece, share[position], share[position] / strongest))
        else:
            spans.append(f'<span style="color:{QUIET}">{_text(piece)}</span>')
    spans[-1] = f'<span style="outline:2px solid {INK};border-radius:3px">{spans[-1]}</span>'
    spans.append(f'<span style="border-bottom:2px solid {OKABE_ITO[1]}">{_text(window.target)}</span>')
    return f'<div {PLAIN} style="{BOX}{AT_END}"><div>{"".join(spans)}</div></div>'


def guesses_line(window: Window) -> str:
    """What follows, and what the model expects."""
    guesses = ", ".join(f"<b>{_quoted(text)}</b> {share:.1%}" for text, share in window.guesses)
    style = f"background:{PAPER};color:{INK};padding:6px 12px;border-radius:6px"
    return (
        f'<div {PLAIN} style="{style}">Position {window.position:,}. '
        f"Next token: <b>{_quoted(window.target)}</b>. The model expects: {guesses}</div>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table; all cells are text. Each cell has its colours, since themes paint rows, too."""
    colours = f"background:{PAPER};color:{INK};border-bottom:1px solid {STRIPES[0]}"
    cell = f"{colours};padding:3px 6px;text-align:left"
    lines = [_row("th", header, cell), *(_row("td", row, cell) for row in rows)]
    return f'<table {PLAIN} style="border-collapse:collapse">{"".join(lines)}</table>'


def _row(tag: str, cells: Sequence[str], style: str) -> str:
    marked = (f'<{tag} style="{style}{_broken(cell)}">{html.escape(cell)}</{tag}>' for cell in cells)
    return f"<tr>{''.join(marked)}</tr>"


def _broken(cell: str) -> str:
    """Words and numbers are not broken, what is longer than any of them is, or the page would be too wide."""
    return ";overflow-wrap:anywhere" if max(map(len, cell.split()), default=0) > LONGEST_WORD else ""


def _attended(piece: str, weight: float, strength: float) -> str:
    colour = PAPER if strength > 0.55 else INK
    background = f"rgba(0,114,178,{0.12 + 0.88 * strength:.2f})"
    return (
        f'<span title="{weight:.1%} of the attention" '
        f'style="background:{background};color:{colour};border-radius:3px">{_text(piece)}</span>'
    )


def _text(piece: str) -> str:
    return html.escape(piece).replace("\n", "⏎\n")


def _quoted(piece: str) -> str:
    return html.escape(repr(piece))


def _axes_text(ax: Axes) -> str:
    return " by ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))


def _values(figure: Figure) -> Iterator[str]:
    """An invisible place on each point of each curve, whose tooltip says the value."""
    for ax in figure.axes:
        for line in ax.get_lines():
            points = np.asarray(line.get_xydata())
            if line.get_transform() != ax.transData or not 0 < len(points) <= MOST_POINTS:
                continue  # a line across the page, or a cloud
            if line.get_linestyle() == "None":
                continue  # a mark on a point of another curve
            places = figure.transFigure.inverted().transform(ax.transData.transform(points))
            for (x, y), (left, up) in zip(points.tolist(), places.tolist(), strict=True):
                if not 0 <= up <= 1:  # off the page, which would grow as far
                    continue
                yield _value(f"{line.get_label()}, {x:g}: {y:,.5g}", 100 * left, 100 * (1 - up))


def _value(text: str, left: float, top: float) -> str:
    """A tooltip around a place of the figure, given in percent of its width and height."""
    place = f"left:{left - POINTER_REACH:.2f}%;top:{top - POINTER_REACH:.2f}%"
    size = f"width:{2 * POINTER_REACH}%;height:{2 * POINTER_REACH}%"
    return f'<span title="{html.escape(text)}" style="position:absolute;{place};{size}"></span>'
