"""Write the report of one or more runs, in the form of the original's, and compare runs in a table.

The templates hold all text, English and Japanese side by side: `report.md.j2` is the report, `tables.md.j2`
the tables that terminals and notebooks show as well. Numbers are formatted once for both languages. Public
functions of this package's modules are filters and globals of the templates.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..errors import UserError
from ..progress import counted
from ..runs.differences import settings_differ
from ..runs.run_folder import Run
from . import columns, labels, tables, verdicts
from .columns import Column, probe_blocks, run_columns, with_gain
from .labels import run_labels
from .tables import table_cells
from .terminal import terminal_table
from .verdicts import gains

LANGUAGES = ("en", "ja")


@cache
def environment(language: str) -> Environment:
    """Make what templates are rendered in: `t(english, japanese)` gives the text in `language`.

    Raises:
        UserError: an unknown language.
    """
    if language not in LANGUAGES:
        raise UserError(f"language is {language!r}; allowed: {', '.join(LANGUAGES)}.")
    index = LANGUAGES.index(language)
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for module in (tables, verdicts, labels, columns):
        functions = {k: f for k, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
        made.filters |= functions
        made.globals |= functions
    made.filters["entry_of"] = lambda key, names: names.get(key, tables.literal(key))
    made.keep_trailing_newline = True
    made.globals["counted"] = counted
    made.globals["t"] = lambda *texts: texts[index]
    return made


def template(name: str, language: str) -> Template:
    """Load `NAME.md.j2`; raises as `environment`."""
    return environment(language).get_template(f"{name}.md.j2")


def words(language: str) -> Any:
    """Load the names and macros of `tables.md.j2`, as attributes."""
    return template("tables", language).module


def write_report(runs: Sequence[Run], language: str = "en", has_figures: bool | None = None) -> str:
    """Write the report as Markdown.

    Args:
        runs: one or more; they are shown and compared in ascending order of samples.
        language: "en" or "ja".
        has_figures: show those in `figures` beside it; None does for one run, whose folder has them.

    Raises:
        UserError: no runs, or an unknown language.
    """
    if not runs:
        raise UserError("There are no runs to report; name at least one run folder.")
    macros = words(language)
    ascending = sorted(runs, key=lambda run: run.summary["samples"])
    ours = run_columns(ascending, macros.unit, macros.published)
    text = template("report", language).render(
        ours=ours,
        has_figures=len(ours) == 1 if has_figures is None else has_figures,
        columns=[column for own in ours for column in (own, own.original) if column],
        published=[own.original for own in ours if own.original],
        having=lambda part: [own for own in ours if part in own.summary],
        is_one_validation=_is_one_validation([own.summary for own in ours]),
        settings_differ=settings_differ([own.config for own in ours]),
        one_a_window={(own.config.model, *own.offsets): own for own in ours if own.offsets}.values(),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def comparison_table(summaries: Sequence[Mapping[str, Any]], language: str = "en") -> str:
    """Format `compared` for a terminal."""
    return terminal_table(compared(summaries, language))


def compared(summaries: Sequence[Mapping[str, Any]], language: str = "en") -> list[list[str]]:
    """Compare runs as the original's report does.

    Returns:
        rows of cells, header first: a name, a cell for each run and, for several with one validation text,
        the change.

    Raises:
        UserError: as `write_report`.
    """
    summaries, macros = [*summaries], words(language)
    if not summaries:
        raise UserError("There are no runs to compare; name at least one run.")
    runs = list(map(Column, run_labels(summaries, macros.unit), summaries))
    items = with_gain(runs, macros.change) if _is_one_validation(summaries) else runs
    rows = table_cells(macros.comparison("", items) + macros.ngrams(items))
    return [[cell.strip("*") for cell in row] for row in rows]


def _is_one_validation(summaries: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all have the same validation text; published summaries do not name theirs."""
    return len({tables.at(each, "provenance", "data", "validation_fingerprint") for each in summaries}) == 1


def observations(first: Mapping[str, Any], last: Mapping[str, Any], language: str = "en") -> list[str]:
    """Describe the change of data, perplexity, accuracy and gap from the first run to the last."""
    return words(language).observations(gains(first, last)).splitlines()


def probe_table(probe: Mapping[str, Any], language: str = "en") -> list[list[str]]:
    """Compare one run's contexts with those of untrained blocks: rows of cells, header first."""
    blocks = probe_blocks([Column("", {"probe": probe})], with_untrained=True)
    return table_cells(words(language).probe(blocks))
