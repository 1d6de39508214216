"""HTML for notebooks: figures, tables, text with its tokens marked, download links.

Only HTML has all of: alt text, a width that follows the page, values under the pointer, and a dark theme
without a second drawing. It uses no scripts, so it works in Colab, JupyterLab and VS Code.
"""

import html
import io
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..report.tables import digits
from .axes import DPI, INK, ORANGE, PAPER, QUIET, styled
from .explore import AttendedWindow, token_name

PLAIN = "tex2jax_ignore mathjax_ignore"  # notebooks would typeset text between dollar signs
WIDTH = 100  # pixels of the page for an inch of a figure, where the page has them
POINTER_REACH = 1.5  # percent of the figure's width around a point that shows its value
LONGEST_WORD = 14  # letters, in a table
# JupyterLab, Colab and VS Code each mark dark pages in their own way. Colours are inverted in
# brightness only: blue stays blue, so that words about colours stay true. Cells of a table and not its rows
# have colours, since themes paint rows, too. A reversed column opens scrolled to its end.
DARK = '[data-jp-theme-light="false"] .ctxkv, html[theme="dark"] .ctxkv, body.vscode-dark .ctxkv'
STRIPES = ("#dbe9f4", "#fbe3d4")  # light blue and light orange, which colour-blind people can distinguish
# A box of text is a whole number of lines high, and its margin a border: what scrolls is never cut in a line.
LINE, MOST_LINES = 24, 14  # pixels, lines
STYLE = f"""<style>{DARK} {{filter: invert(0.93) hue-rotate(180deg); color-scheme: light}}
.ctxkv table {{border-collapse: collapse}}
.ctxkv table th, .ctxkv table td {{background: {PAPER}; color: {INK}; border-bottom: 1px solid {STRIPES[0]};
  padding: 3px 6px; text-align: left}}
.ctxkv .line, .ctxkv .text {{background: {PAPER}; color: {INK}; border: 8px solid {PAPER};
  border-radius: 6px}}
.ctxkv .text {{line-height: {LINE}px; font-family: monospace; font-size: 13px; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: {LINE * MOST_LINES}px; overflow-y: auto}}
.ctxkv .text span {{border-radius: 3px}}
.ctxkv .text > span:nth-child(odd) {{background: {STRIPES[0]}}}
.ctxkv .text > span:nth-child(even) {{background: {STRIPES[1]}}}
</style>"""
FROM_THE_END = "display:flex;flex-direction:column-reverse"


def themed(content: str) -> str:
    """Wrap HTML made for a light page, so that it turns dark with a dark one."""
    return f'{STYLE}<div class="ctxkv">{content}</div>'


def show_html(content: str) -> Any:
    """Make an object that a notebook shows as HTML."""
    from IPython.display import HTML

    return HTML(themed(content))


def show(figure: Figure) -> None:
    """Display a figure under the cell; as a plain PNG where HTML is not shown."""
    from IPython.display import display

    image = png(figure)
    display({"text/html": figure_html(figure, image), "image/png": image}, raw=True)


@styled
def png(figure: Figure) -> bytes:
    """Draw `figure` with its own background, as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor=PAPER)
    return content.getvalue()


def figure_html(figure: Figure, image: bytes) -> str:
    """Wrap a figure that has been drawn: as wide as it is or as the page is, its values under the pointer.

    Height and width are in the tag, so that the page does not move while the picture is read.
    """
    width, height = (round(WIDTH * inches) for inches in figure.get_size_inches())
    picture = (
        f'<img src="{_data_uri(image, "image/png")}" alt="{html.escape(alt_text(figure))}" width="{width}" '
        f'height="{height}" decoding="sync" style="display:block;width:100%;height:auto;max-width:none">'
    )
    box = f"position:relative;width:100%;max-width:{width}px"  # in this order: widgets shrink it only then
    return themed(f'<div style="{box}">{picture}{"".join(_tooltips(figure))}</div>')


def alt_text(figure: Figure) -> str:
    """Describe a figure in words: titles, axes, names of the curves and all text in it."""
    parts = []
    for ax in figure.axes:
        by = " by ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        parts += [ax.get_title(loc="left"), by, *(text.get_text() for text in ax.texts)]
    parts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    lines = (part.replace("\n", ", ").strip() for part in parts)
    return "; ".join(dict.fromkeys(line for line in lines if line)) + "."


def _tooltips(figure: Figure) -> Iterator[str]:
    """Make an invisible box with the value as tooltip around each point of each curve."""
    for ax in figure.axes:
        for line in ax.get_lines():
            if line.get_transform() != ax.transData:
                continue  # a line across the page
            if line.get_linestyle() == "None" or str(line.get_label()).startswith("_"):
                continue  # marks, or a line that has no name
            points = np.asarray(line.get_xydata())
            points = points[np.isfinite(points).all(axis=1)]
            # A point above the axis has its value at the axis's end.
            seen = np.clip(ax.transData.transform(points), *ax.bbox.get_points())
            places = 100 * figure.transFigure.inverted().transform(seen) - POINTER_REACH
            what, unit = ax.get_xlabel().partition(" (")[0].lower(), "%" * ("%" in ax.get_ylabel())
            for (x, y), (left, up) in zip(points.tolist(), places.tolist(), strict=True):
                size = f"width:{2 * POINTER_REACH}%;height:{2 * POINTER_REACH}%"
                place = f"left:{left:.2f}%;bottom:{up:.2f}%;{size}"
                text = html.escape(f"{line.get_label()}, {what} {digits(x)}: {digits(y)}{unit}")
                yield f'<span title="{text}" style="position:absolute;{place}"></span>'


def download_link(name: str, content: bytes, kind: str) -> str:
    """Make a link that saves `content`, of a MIME type, on the browser's machine, not the kernel's."""
    underlined = 'style="text-decoration:underline"'  # JupyterLab takes it from links
    return f'<a download="{name}" {underlined} href="{_data_uri(content, kind)}">Download {name}</a>'


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


def token_boundaries(pieces: Sequence[str]) -> str:
    """Show tokens in alternating colours; a line break as an arrow and a break."""
    return f'<div class="text {PLAIN}">{"".join(f"<span>{_marked(piece)}</span>" for piece in pieces)}</div>'


def attended_text(window: AttendedWindow, shares: Mapping[int, float]) -> str:
    """Show the tokens of a window; a stronger blue behind a token means more attention.

    The box opens at the position itself, which is framed; the token after it is underlined.

    Args:
        shares: of the attention, by position; one for each slot within the stream.
    """
    strongest = max(shares.values())
    spans = []
    for position, piece in window.pieces.items():
        title, style, text = "", f"color:{QUIET}", html.escape(piece)
        if position in shares:
            strength, text = shares[position] / strongest, _marked(piece)
            title = f'title="{shares[position]:.1%} of the attention" '
            # Black on no more than this blue can be read (WCAG AA), also where a dark page inverts both.
            style = f"background:rgba(0,114,178,{0.12 + 0.48 * strength:.2f});color:black"
        if position == window.position:
            style += f";outline:2px solid {INK}"
        spans.append(f'<span {title}style="{style}">{text}</span>')
    spans.append(f'<span style="border-bottom:2px solid {ORANGE}">{_marked(window.target)}</span>')
    return f'<div class="text {PLAIN}" style="{FROM_THE_END}"><div>{"".join(spans)}</div></div>'


def guesses_line(window: AttendedWindow) -> str:
    """Show the next token, and the tokens that the model expects."""
    guesses = ", ".join(f"<b>{_quoted(text)}</b> {share:.1%}" for text, share in window.guesses)
    return (
        f'<div class="line {PLAIN}">Position {window.position:,}. '
        f"Next token: <b>{_quoted(window.target)}</b>. The model expects: {guesses}</div>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a plain table; all cells are text."""
    lines = ["".join(_cell("th", name) for name in header)]
    lines += ["".join(_cell("td", text) for text in row) for row in rows]
    return f'<table class="{PLAIN}">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def _cell(tag: str, text: str) -> str:
    """Make a cell of a table, which breaks only words too long for the page."""
    is_long = max(map(len, text.split()), default=0) > LONGEST_WORD
    style = ' style="overflow-wrap:anywhere"' if is_long else ""
    return f"<{tag}{style}>{html.escape(text)}</{tag}>"


def _marked(piece: str) -> str:
    """Escape a token for a coloured span; a line break gets an arrow, since alone it is invisible."""
    return html.escape(piece).replace("\n", "↵\n")


def _quoted(piece: str) -> str:
    return html.escape(token_name(piece))
