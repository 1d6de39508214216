"""The public names on their page, by what they are for: all that `ctxkv_lib` lists."""

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

import ctxkv_lib

PAGE, PLACE = "api", "PUBLIC_NAMES"
TITLES = {  # by the package of a name's module; what none of these has stands last
    "experiments": "Experiments",
    "runs": "Settings and run folders",
    "hf": "Trained models",
    "report": "Reports",
    "views": "Notebooks and figures",
    "measure": "Measurements",
}
OTHERS = "Others"
UNPARSED = re.compile(r"<class '[\w.]*?(\w+)'>|<factory>")  # defaults that are no Python


def directive(name: str) -> str:
    """Write the directive that documents a public name."""
    value = getattr(ctxkv_lib, name)
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        return f".. auto{kind}:: ctxkv_lib.{name}\n   :members:\n"
    if inspect.isfunction(value):
        return f".. autofunction:: ctxkv_lib.{name}\n"
    return f".. py:data:: ctxkv_lib.{name}\n   :type: {type(value).__name__}\n"


def title(name: str) -> str:
    home = getattr(getattr(ctxkv_lib, name), "__module__", "ctxkv_lib.runs")  # constants are of runs
    return TITLES.get(home.split(".")[1], OTHERS)


def list_names(app: Sphinx, page: str, source: list[str]) -> None:
    """Write a section for each title in the place that the page leaves for it."""
    if page == PAGE:
        titles = {name: title(name) for name in ctxkv_lib.__all__}
        sections = [
            f"## {each}\n\n```{{eval-rst}}\n" + "\n".join(map(directive, names)) + "```\n"
            for each in [*TITLES.values(), OTHERS]
            if (names := [name for name, its in titles.items() if its == each])
        ]
        source[0] = source[0].replace(PLACE, "\n".join(sections))


def parsable(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Write defaults as Python: Sphinx shortens the names of a signature only if it can parse it."""
    return signature and UNPARSED.sub(lambda found: found[1] or "...", signature), returned


def skip_aliases(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out fields of a named tuple, which its class describes."""
    return True if (inspect.getdoc(value) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", list_names)
    app.connect("autodoc-process-signature", parsable)
    app.connect("autodoc-skip-member", skip_aliases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
