"""Tables and numbers as text, for reports, terminals and notebooks. What is None shows as a dash."""

import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MISSING = "–"
MARKUP = frozenset("\\`*_[]#|~$!")  # Markdown's special characters; `<`, `>` and `&` become entities


def head(*names: str) -> str:
    """Format the lines of a Markdown table above its first row, with their newlines."""
    return _line(names) + _line(["---", *["---:"] * (len(names) - 1)])


def row(name: str, items: Iterable[Any], caller: Callable[[Any], str]) -> str:
    """Format a row of a Markdown table, with its newline; none if all its cells are missing.

    `call` blocks of templates use it: `caller` formats the cell of an item.
    """
    cells = [caller(item) for item in items]
    return "" if set(cells) <= {MISSING, ""} else _line([name, *cells])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def table_cells(markdown: str) -> list[list[str]]:
    """Split the rows of a Markdown table into cells, without the rule below the header."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in markdown.splitlines()]
    return [row for row in rows if row[0] != "---"]


def literal(text: str) -> str:
    """Escape text from outside, so that Markdown shows it as it is, in a table, too: no markup, no HTML."""
    marked = "".join(f"\\{c}" if c in MARKUP else c for c in " ".join(text.split()))
    return html.escape(marked, quote=False)


def _text(spec: str, unit: str = "") -> Callable[[float | None], str]:
    return lambda value: MISSING if value is None else format(value, spec) + unit


# z: what rounds to zero is not negative
ppl = _text(",.1f")
percent = _text(",.1%")
whole_percent = _text(".0%")
signed_percent = _text("+z,.1%")
whole = _text(",d")
ratio = _text(",.2f", "x")
loss = _text(",.2f")
gib = _text(",.1f")
r2 = _text("z.2f")


def short(value: float | None) -> str:
    """Format seconds or MiB: one decimal below 10, none above."""
    return _text(",.1f" if value is not None and value < 10 else ",.0f")(value)


def digits(value: float) -> str:
    """Format a number with four digits, or more if it is large: 0.0123, 60.88, 366.4, 2,905."""
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def bold(text: str, yes: bool = True) -> str:
    return f"**{text}**" if yes else text


def at(summary: Mapping[str, Any], *keys: str) -> Any:
    """Look up a value by its path; None if the summary lacks it."""
    value: Any = summary
    for key in keys:
        value = value.get(key, {})
    return None if value == {} else value
