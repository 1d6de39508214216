"""What the report is made of: runs beside their published twins, tables of them, numbers as text.

A `Column` is a run, or the published run that it repeats; both hold a summary of the same shape, so that
one row of a table is one function of a column. What is None shows as a dash.
"""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import east_asian_width

from ..errors import UserError
from ..method.config import ModelConfig
from ..runs.config import ExperimentConfig
from ..runs.differences import distinctions
from ..runs.published import PUBLISHED, PUBLISHED_PHASE1, published_samples
from ..runs.run_folder import Run
from ..views.figures import run_labels
from .text import LANGUAGES, TEXT

Say = Callable[..., str]
Summary = Mapping[str, Any]
MISSING = "–"
MARKUP = frozenset("\\`*_[]#|~$!")  # what Markdown would read as its own; `<`, `>` and `&` become entities


@dataclass(frozen=True)
class Column:
    """One column of a table: a run, or (`is_published`) the published one beside it."""

    label: str
    summary: Summary
    config: ExperimentConfig
    phase1: Sequence[Mapping[str, Any]]
    is_published: bool = False

    @property
    def phase2(self) -> Mapping[str, Any]:
        return self.summary["phase2"]

    @property
    def measured(self) -> list[Mapping[str, Any]]:
        """Epochs with numbers; never empty."""
        return [line for line in self.phase2["epochs"] if line["val_ppl"] is not None]


@dataclass(frozen=True)
class Report:
    """What every section reads."""

    runs: Sequence[Run]
    say: Say
    figures: str

    @cached_property
    def pairs(self) -> list[tuple[Column, Column | None]]:
        """Each run, with its published twin or None."""
        others = distinctions([run.config for run in self.runs])
        labels = run_labels([run.summary for run in self.runs], self.say("unit"), others)
        return [
            (Column(label, run.summary, run.config, run.phase1), self._twin(label, run.config))
            for label, run in zip(labels, self.runs, strict=True)
        ]

    def _twin(self, label: str, config: ExperimentConfig) -> Column | None:
        samples = published_samples(config)
        if samples is None:
            return None
        label = self.say("published_label", label=label)
        return Column(label, PUBLISHED[samples], config, PUBLISHED_PHASE1[samples], is_published=True)

    @property
    def is_one_validation(self) -> bool:
        """Whether all runs were measured on the same text, so that their perplexities can be compared."""
        data = [run.summary["provenance"]["data"] for run in self.runs]
        return len({each["validation_fingerprint"] for each in data}) == 1

    @property
    def ours(self) -> list[Column]:
        return [run for run, _ in self.pairs]

    @property
    def published(self) -> list[Column]:
        return [twin for _, twin in self.pairs if twin]

    @property
    def columns(self) -> list[Column]:
        """Each run, followed by its published twin where it has one."""
        return [column for pair in self.pairs for column in pair if column]

    def table(self, corner: str, rows: Mapping[str, Callable[[Column], str]]) -> str:
        """A table of all columns, with one row for each function of a column."""
        body = [[name, *map(cell, self.columns)] for name, cell in rows.items()]
        return markdown_table([corner, *(column.label for column in self.columns)], body)


def speaker(language: str) -> Say:
    """`say(key, **numbers)`: the text of `key` in `language`, with the numbers in their places.

    Raises:
        UserError: an unknown language.
    """
    if language not in LANGUAGES:
        raise UserError(f"language is {language!r}; allowed: {', '.join(LANGUAGES)}.")
    index = LANGUAGES.index(language)
    return lambda key, **numbers: TEXT[key][index].format(**numbers)


def method(model: ModelConfig, say: Say) -> str:
    """What a run remembers with, in a few words."""
    return say(model.kv_method if model.memory == "contexts" else f"memory_{model.memory}")


def judged(gain: float, better: str, same: str, worse: str) -> str:
    """The key for a gain in percent or points, which is a tie where it shows as 0.0."""
    if round(gain, 1) == 0:
        return same
    return better if gain > 0 else worse


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def terminal_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines for a terminal: first column to the left, the others to the right."""
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_terminal_line(row, widths) for row in rows)


def _terminal_line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right of their columns."""
    padding = [" " * (width - _cells(cell)) for cell, width in zip(row, widths, strict=True)]
    numbers = [pad + cell for pad, cell in zip(padding[1:], row[1:], strict=True)]
    return "   ".join([row[0] + padding[0], *numbers])


def _cells(text: str) -> int:
    """Width of `text` in a terminal, where Japanese characters take two cells."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def literal(text: str) -> str:
    """Text from outside as Markdown that shows it as it is, in a table, too: no markup, no HTML."""
    marked = "".join(f"\\{c}" if c in MARKUP else c for c in " ".join(text.split()))
    return html.escape(marked, quote=False)


def code(lines: Iterable[str]) -> str:
    """A block of plain text."""
    return "\n".join(["```", *lines, "```"])


def distinct(values: Iterable[str]) -> list[str]:
    """Each value once, in order of first appearance."""
    return list(dict.fromkeys(values))


def _text(spec: str, unit: str = "") -> Callable[[float | None], str]:
    return lambda value: MISSING if value is None else format(value, spec) + unit


ppl = _text(",.1f")
percent = _text(".1%")
whole_percent = _text(".0%")
whole = _text(",d")
ratio = _text(",.2f", "x")
gib = _text(",.1f")
loss = _text(",.2f")


def short(value: float | None) -> str:
    """Seconds or MiB: one decimal below 10, none above."""
    return _text(",.1f" if value is not None and value < 10 else ",.0f")(value)


def bold(text: str, yes: bool = True) -> str:
    return f"**{text}**" if yes and text != MISSING else text
