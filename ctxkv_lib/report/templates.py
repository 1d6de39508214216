"""The templates of reports, with words in one of two languages, and the functions that they call."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..errors import UserError
from . import tables, verdicts
from .labels import span

LANGUAGES = ("en", "ja")
TEXTS = "bold gib literal loss percent ppl r2 ratio short signed_percent whole whole_percent"
VERDICTS = "early_stopping epoch_note judged last_measured overfitting ratio_at stronger_decay"


@cache
def template(name: str, language: str) -> Template:
    """Load `NAME.md.j2`, in which `t(english, japanese)` gives the text in `language`.

    Raises:
        UserError: an unknown language.
    """
    if language not in LANGUAGES:
        raise UserError(f"language is {language!r}; allowed: {', '.join(LANGUAGES)}.")
    index = LANGUAGES.index(language)
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {name: getattr(tables, name) for name in TEXTS.split()}
    made.filters |= {name: getattr(verdicts, name) for name in VERDICTS.split()}
    made.filters |= {
        "at": at,
        "entry_of": lambda key, names: names.get(key, tables.literal(key)),
        "span": span,
    }
    made.keep_trailing_newline = True
    made.globals |= {"t": lambda *texts: texts[index], "head": tables.table_head, "row": tables.table_row}
    return made.get_template(f"{name}.md.j2")


def words(language: str) -> Any:
    """Load the names and macros of `tables.md.j2`, as attributes."""
    return template("tables", language).module


def at(summary: Mapping[str, Any], *keys: str) -> Any:
    """Look up a value by its path; None if the summary lacks it."""
    value: Any = summary
    for key in keys:
        value = value.get(key, {})
    return None if value == {} else value
