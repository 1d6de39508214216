"""Save the files of a user's own classes with a model; this file is itself saved with every model."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from .fields import require


def save_part(kind: type, modeling: Path) -> None:
    """Add the file of a user's own class to a saved model.

    The file may import installed packages and files that are saved with every model. Raises ValueError for
    any other import, or if the class is not defined in a module.
    """
    name, allowed = kind.__name__, "a class of a module, not of a notebook, script or function"
    is_found = getattr(inspect.getmodule(kind), name, None) is kind and kind.__module__ != "__main__"
    require(is_found, "a part of the model", name, allowed)
    file = Path(inspect.getfile(kind))
    require(not (Path(__file__).parent / file.name).exists(), "the file of a part", file.name, "another name")
    code = re.sub(rf"(?m)^(\s*from ){re.escape(__package__)}\.", r"\1.", file.read_text("utf-8"))
    beside = {path.stem for path in file.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    unsaved = {__package__.partition(".")[0], *beside}
    for needed in _imports(code):
        top, saved = needed.partition(".")[0], modeling.parent / f"{needed[1:]}.py"
        allowed = "an installed package except ctxkv_lib, or a file that is saved with every model"
        require(top not in unsaved if top else saved.exists(), f"an import of {file.name}", needed, allowed)
    (modeling.parent / file.name).write_text(code, "utf-8")
    line = f"from .{file.stem} import {name} as part  # noqa: E402\n\nPARTS[{name!r}] = part\n"
    modeling.write_text(modeling.read_text("utf-8") + line, "utf-8")


def _imports(code: str) -> Iterator[str]:
    """Yield the names of the modules that code imports; the name of a relative import begins with a dot."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (module.name for module in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or node.names[0].name)
