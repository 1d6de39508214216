"""Write the report of one or more runs, in the form of the original's, and compare runs in a table.

The templates have all words, English and Japanese side by side: `report.md.j2` is the report, `tables.md.j2`
what terminals and notebooks show of it, too. So numbers are formatted once for both languages, and a sentence
cannot change in one of them unseen.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..runs.run_folder import Run
from .columns import Column, cache_sizes, devices, origin, run_columns, slot_examples, with_gain
from .labels import run_labels
from .measured import beside_ngrams, ppl_changes, ppl_errors, probe_blocks
from .tables import table_cells, terminal_table
from .templates import LANGUAGES as LANGUAGES
from .templates import template, words
from .verdicts import gains
from .verdicts import improvement as improvement

FUNCTIONS = (beside_ngrams, cache_sizes, slot_examples, ppl_changes, ppl_errors, with_gain)


def write_report(runs: Sequence[Run], language: str = "en") -> str:
    """Write the report as Markdown.

    Args:
        runs: one or more; they are shown and compared in ascending order of samples.
        language: "en" or "ja".

    Raises:
        UserError: no runs, or an unknown language.
    """
    if not runs:
        raise UserError("There are no runs to report; name at least one run folder.")
    macros = words(language)
    ascending = sorted(runs, key=lambda run: run.summary["samples"])
    ours = run_columns(ascending, macros.unit, macros.published)
    text = template("report", language).render(_context(ours))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _context(ours: Sequence[Column]) -> dict[str, Any]:
    """Collect what the template of the report reads."""
    columns = [column for own in ours for column in (own, own.original) if column]
    data = [own.summary["provenance"]["data"] for own in ours]
    probes = {own.label: own.summary["probe"] for own in ours if "probe" in own.summary}
    return {
        **{function.__name__: function for function in FUNCTIONS},
        "ours": ours,
        "columns": columns,
        "published": [own.original for own in ours if own.original],
        "having": lambda part: [own for own in ours if part in own.summary],
        "is_single": len(ours) == 1,
        "is_one_validation": len({each["validation_fingerprint"] for each in data}) == 1,
        "one_a_method": {(own.method, own.model.max_contexts): own for own in ours}.values(),
        "one_a_window": {(own.model, *own.offsets): own for own in ours if own.offsets}.values(),
        "origin": origin(ours),
        "devices": list(devices(columns)),
        "gain": gains(ours[0].summary, ours[-1].summary),
        "probed": probe_blocks(probes, with_untrained=len(ours) == 1),
    }


def comparison_table(summaries: Sequence[Mapping[str, Any]], language: str = "en") -> str:
    """Format `compared` for a terminal."""
    return terminal_table(compared(summaries, language))


def compared(summaries: Sequence[Mapping[str, Any]], language: str = "en") -> list[list[str]]:
    """Compare runs as the original's report does.

    Returns:
        rows of cells, header first: a name, a cell for each run and, for several, the change.
    """
    macros = words(language)
    runs = list(map(Column, run_labels(summaries, macros.unit), summaries))
    columns = with_gain(runs, macros.change)
    rows = table_cells(macros.comparison("", columns) + macros.ngrams(columns))
    return [[cell.strip("*") for cell in row] for row in rows]


def observations(first: Mapping[str, Any], last: Mapping[str, Any], language: str = "en") -> list[str]:
    """Say in sentences what became of data, perplexity, accuracy and gap, from the first run to the last."""
    return words(language).observations(gains(first, last)).splitlines()
