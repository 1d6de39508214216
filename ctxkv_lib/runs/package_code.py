"""Digests of this package's own code, of which the keys of stages are made."""

import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sources import OWN, PYTHON_AND_THIS, WRAPPERS, layers, module_of, plain_source, source_digest

if TYPE_CHECKING:
    from .config import ExperimentConfig

PACKAGE = Path(__file__).parent.parent
FOLLOWED = {"data", "measure"}  # `method/` is in every key, and most of `runs/` computes nothing
COMPUTING = ("rows",)  # modules of `runs/` that do
METHOD_IMPORTS = {"torch", "numpy", "psutil", "transformers"} | PYTHON_AND_THIS
PLAIN = bool | int | float | str | tuple  # values of `method/` that keys cover


def _values() -> Iterator[tuple[str, Any]]:
    """Yield all values in the modules and classes of `method/`, by name."""
    for file in _method_files():
        module = import_module(f"{OWN}method.{file.stem}")
        classes = [each for each in vars(module).values() if inspect.isclass(each)]
        places: list[Any] = [module, *(each for each in classes if each.__module__ == module.__name__)]
        yield from (
            (f"{place.__name__}.{key}", value) for place in places for key, value in vars(place).items()
        )


def replaced_parts() -> Iterator[tuple[str, Any]]:
    """Yield the functions, classes and methods that took the place of those of `method/`, by name."""
    for name, value in _values():
        for part in layers(value):
            module_name = module_of(part)
            known = isinstance(part, WRAPPERS) or module_name not in sys.modules  # as of a NamedTuple
            if not known and module_name.partition(".")[0] not in METHOD_IMPORTS:
                yield name, part


def _patched_source() -> str:
    """Describe all plain values of `method/`, and the functions, classes and methods replaced in it."""
    plain = (
        f"{name}={value!r};"
        for name, value in _values()
        if isinstance(value, PLAIN) and not name.rpartition(".")[2].startswith("_")  # Python's own
    )
    return "".join(plain) + "".join(f"{name}={source_digest(part)};" for name, part in replaced_parts())


def _method_files() -> list[Path]:
    return [file for file in sorted((PACKAGE / "method").glob("*.py")) if file.stem != "reference"]


def code_key(*plugins: str) -> str:
    """Digest the code that results depend on: `method/`, `COMPUTING`, and those plug-ins of this package.

    Docstrings, comments and layout are ignored; functions and values replaced at run time are included.
    """
    modules = {name.partition(":")[0].replace(".", "/") for name in plugins if name.startswith(OWN)}
    modules |= {f"{PACKAGE.name}/runs/{name}" for name in COMPUTING}
    files = {file for name in modules for file in _with_imports(PACKAGE.parent / f"{name}.py")}
    return _code_digest({*files, *_method_files()}, _patched_source())


def code_of(config: "ExperimentConfig") -> str:
    """Return the `code_key` of an experiment."""
    return code_key(*(plugin.name for plugin in config.plugins.values()))


def code_with_imports(name: str) -> str:
    """Digest the code of a module or folder of this package, as `runs/testing` or `data`, and its imports."""
    files = PACKAGE.glob(f"{name}/*.py" if (PACKAGE / name).is_dir() else f"{name}.py")
    return _code_digest({other for file in files for other in _with_imports(file)})


def _code_digest(files: Iterable[Path], more: str = "") -> str:
    code = "".join(_code_of(file)[0] for file in sorted(files))
    return hashlib.sha256((code + more).encode()).hexdigest()[:16]


def _with_imports(file: Path) -> set[Path]:
    """Return a module's file with those that it imports of `FOLLOWED` and `COMPUTING`, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting += [other for other in _code_of(file)[1] if other not in found]
    return found


def _code_of(file: Path) -> tuple[str, list[Path]]:
    """Return the `plain_source` of a file of this package, and the files that `_with_imports` follows."""
    return _read_once(file, file.stat().st_mtime_ns)


@functools.cache
def _read_once(file: Path, _: int) -> tuple[str, list[Path]]:
    source, imports = file.read_text(encoding="utf-8"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            other = file.parents[node.level - 1] / f"{node.module.replace('.', '/')}.py"
            if other.parent.name in FOLLOWED or (other.parent.name == "runs" and other.stem in COMPUTING):
                imports.append(other)
    return plain_source(source), imports
