"""Find the source text of a plug-in, i.e. its whole file or notebook cell, so that a run can keep it."""

import inspect
import linecache
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from .plugins import PACKAGE_PREFIX, PlugIn


def source_text(plugin: PlugIn) -> str:
    """Return the source text of a plug-in. The first line has the file's name or "notebook cell".

    Return "" if the text cannot be found, was edited after the code was run, or belongs to this package.
    """
    codes = [] if plugin.name.startswith(PACKAGE_PREFIX) else _codes_of(plugin.part)
    for file in dict.fromkeys(code.co_filename for code in codes):
        linecache.checkcache(file)
        # IPython stores the text of notebook cells in `linecache`.
        text = "".join(linecache.getlines(file))
        try:
            compiled = [*_nested(compile(text, file, "exec"))]
        except (SyntaxError, ValueError):  # the text has been edited
            continue
        if all(code in compiled for code in codes if code.co_filename == file):
            place = Path(file).name if Path(file).is_file() else "notebook cell"
            return f"# {place}, which defines {plugin.name}\n{text}"
    return ""


def _codes_of(part: Any) -> list[CodeType]:
    """Return the code objects of a function or of all methods of a class. For an object, use its class."""
    while isinstance(part, partial):
        part = part.func
    if inspect.ismethod(part):
        part = part.__func__
    elif not (inspect.isclass(part) or inspect.isfunction(part)):
        part = type(part)
    values = [*vars(part).values()] if inspect.isclass(part) else [part]
    functions = [inspect.unwrap(value) for value in values if inspect.isfunction(value)]
    return [function.__code__ for function in functions if inspect.isfunction(function)]


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and the code objects of all functions and classes inside it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _nested(value)
