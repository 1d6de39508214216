"""Text with its tokens marked, and tables, as HTML with colours of its own; `page.themed` turns them dark."""

import html
from collections.abc import Iterable, Sequence

from .diagram import INK, OKABE_ITO, PAPER, QUIET
from .explore import Window
from .page import show_html as show_html

STRIPES = ("#dbe9f4", "#fbe3d4")  # light blue and light orange, told apart by every eye
BOX = (
    f"background:{PAPER};color:{INK};padding:10px 12px;border-radius:6px;line-height:1.75;"
    "font-family:monospace;font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere;"
    "max-height:320px;overflow-y:auto"
)
AT_END = ";display:flex;flex-direction:column-reverse"  # a box so turned opens scrolled to its end


def token_boundaries(pieces: Sequence[str]) -> str:
    """Tokens in alternating colours; a line break shows as a mark and a break."""
    spans = (f'<span style="background:{STRIPES[i % 2]}">{_text(p)}</span>' for i, p in enumerate(pieces))
    return f'<div style="{BOX}">{"".join(spans)}</div>'


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
    return f'<div style="{BOX}{AT_END}"><div>{"".join(spans)}</div></div>'


def guesses_line(window: Window) -> str:
    """What follows, and what the model expects."""
    guesses = ", ".join(f"<b>{_quoted(text)}</b> {share:.1%}" for text, share in window.guesses)
    style = f"background:{PAPER};color:{INK};padding:6px 12px;border-radius:6px"
    return (
        f'<div style="{style}">Position {window.position:,}. Next token: <b>{_quoted(window.target)}</b>. '
        f"The model expects: {guesses}</div>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table; all cells are text. Each cell has its colours, since themes paint rows, too."""
    colours = f"background:{PAPER};color:{INK};border-bottom:1px solid {STRIPES[0]}"
    cell = f"{colours};padding:3px 12px;text-align:left"
    lines = [_row("th", header, cell), *(_row("td", row, cell) for row in rows)]
    return f'<table style="border-collapse:collapse">{"".join(lines)}</table>'


def _row(tag: str, cells: Sequence[str], style: str) -> str:
    marked = (f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for cell in cells)
    return f"<tr>{''.join(marked)}</tr>"


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
