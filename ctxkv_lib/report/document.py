"""The written report of one or more runs, in the published report's form; and the comparison table.

`write_report` puts sections together: `setup.py` (what was run), `results.py` (what came out),
`measured.py` (what it is worth) and `verdicts.py` (what it means). They share `tables.py`, and `text` holds
the words of both languages: every number is computed and formatted once, whatever the language.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..runs.run_folder import Run
from ..views.figures import run_labels
from . import measured, results, setup, verdicts
from .tables import Report, speaker, terminal_table
from .text import LANGUAGES as LANGUAGES
from .verdicts import improvement as improvement

ORDER: tuple[Callable[[Report], list[str]], ...] = (
    setup.header,
    setup.settings,
    setup.context_window,
    results.phase1,
    measured.contexts_remember,
    results.phase2,
    results.final_result,
    measured.yardsticks,
    measured.contexts_used,
    measured.told_and_asked,
    measured.generated_text,
    results.early_stopping,
    verdicts.comparison,
    results.overfitting,
    setup.memory,
    setup.slots,
    verdicts.next_experiments,
    verdicts.conclusion,
)


def write_report(runs: Sequence[Run], language: str = "en", figures: str = "figures") -> str:
    """The report as Markdown.

    Args:
        runs: one or more; they are shown and compared in ascending order of samples.
        language: "en" or "ja".
        figures: folder of the figures, as seen from the report.

    Raises:
        UserError: no runs, or an unknown language.
    """
    if not runs:
        raise UserError("There are no runs to report; name at least one run folder.")
    ascending = sorted(runs, key=lambda run: run.summary["samples"])
    report = Report(ascending, speaker(language), figures)
    return "\n\n".join(block for section in ORDER for block in section(report)) + "\n"


def comparison_table(summaries: Sequence[Mapping[str, Any]], language: str = "en") -> str:
    """`compared` as plain text for a terminal."""
    return terminal_table(compared(summaries, language))


def compared(summaries: Sequence[Mapping[str, Any]], language: str = "en") -> list[list[str]]:
    """The published comparison, header first: a column a run, then first against last."""
    say = speaker(language)
    rows = [["", *run_labels(summaries, say("unit"))], *verdicts.comparison_rows(summaries, say)]
    if len(summaries) > 1:
        changes = [say("improvement"), *verdicts.changes(summaries[0], summaries[-1], say)]
        rows = [[*row, change] for row, change in zip(rows, changes, strict=True)]
    beside = measured.measured_rows(summaries, say)
    return [*rows, *([*row, *[""] * (len(rows[0]) - len(row))] for row in beside)]
