"""The source text of a user's part, which is kept with a run: the whole file or notebook cell."""

import inspect
import linecache
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from .hooks import OF_PACKAGE, PlugIn


def source_text(plugin: PlugIn) -> str:
    """Return the text that defines a part, after a line with the name of its file or "notebook cell".

    Return "" if the text cannot be found, if it was edited after it was run, or for a part of this package.
    """
    codes = [] if plugin.name.startswith(OF_PACKAGE) else _codes_of(plugin.load())
    for file in dict.fromkeys(code.co_filename for code in codes):
        linecache.checkcache(file)
        text = "".join(linecache.getlines(file))  # IPython keeps the text of its cells there
        try:
            compiled = [*_nested(compile(text, file, "exec"))]
        except (SyntaxError, ValueError):  # the text was edited after it was run
            continue
        if all(code in compiled for code in codes if code.co_filename == file):
            place = Path(file).name if Path(file).is_file() else "notebook cell"
            return f"# {place}, which defines {plugin.name}\n{text}"
    return ""


def _codes_of(part: Any) -> list[CodeType]:
    """Return the code of a function, or of all methods of a class. An object stands for its class."""
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
    """Yield code and the code of all functions and classes inside it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _nested(value)
