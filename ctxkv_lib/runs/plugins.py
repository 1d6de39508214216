"""Plug-ins: classes and functions of the user that replace parts of the method.

A configuration names a plug-in as `module:Name`, with its settings and, if it is not of this package, a
digest of its source: a run with other code is another run.
"""

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ..errors import UserError

# `method.model.Parts`, `runs.rows` and `method.phase2.Stepper` describe what each hook is given and returns.
PACKAGE = Path(__file__).parent.parent
HOOKS = ("block", "loss", "attention", "mixer", "optimizer")
WITH_CONTEXTS = ("block", "loss", "attention")  # hooks that have no effect with a mixer
OWN = "ctxkv_lib."
FOLLOWED = {"data", "hf", "research"}  # `method/` is in every key, and `runs/` only loads what a run has made
METHOD_IMPORTS = {"ctxkv_lib", "torch", "numpy", "psutil", *sys.stdlib_module_names}
WRAPPERS = (property, staticmethod, classmethod)
PLAIN = bool | int | float | str  # values that keys cover
INSTALLED = {"site-packages", "dist-packages"}  # folders of installed packages
given: dict[str, Any] = {}  # what a notebook or script has passed itself, by name, and by name and source


@dataclass(frozen=True)
class PlugIn:
    """One plug-in of a configuration.

    Attributes:
        name: `module:Name`.
        source: digest of its source; empty for plug-ins of this package, whose code is in the stage keys.
        settings: the fields of its `Settings`, if it has any.
    """

    name: str
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"plugin": self.name, **({"source": self.source} if self.source else {}), **self.settings}

    @classmethod
    def of(cls, part: Any) -> "PlugIn":
        """Make a plug-in of a class, a function, or its `module:Name`, with default settings.

        Raises:
            UserError: there is no such thing.
        """
        if not isinstance(part, str):
            if not (inspect.isclass(part) or inspect.isfunction(part)):
                raise UserError(
                    f"{part!r} is no plug-in; give a class or a function, or package.module:Name."
                )
            name, source = f"{part.__module__}:{part.__qualname__}", _source_digest(part)
            given[name] = given[name + source] = part  # the second, if a loop makes others of the same name
            part = name
        found = load(part)
        kind = settings_class(found)
        return cls(part, _source_digest(found), dataclasses.asdict(kind()) if kind else {})


def settings_class(part: Any) -> Any:
    """Return the dataclass of a plug-in's settings; None if it has no settings."""
    return getattr(part, "Settings", None)


def load(name: str) -> Any:
    """Return the class or function `module:Name`.

    Raises:
        UserError: there is none.
    """
    from ..hf.plugins import find

    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise UserError(f"{name!r} names no plug-in; write package.module:Name.")
    if name in given:
        return given[name]
    try:
        return find(name)
    except (ImportError, AttributeError, ValueError) as error:
        where = (
            "run the cell that defines it" if module == "__main__" else "check the name and the Python path"
        )
        raise UserError(f"The plug-in {name} cannot be loaded ({error}); {where}.") from None


def loaded(plugin: PlugIn) -> Any:
    """Return the class or function of a configuration, after a check of its source.

    Raises:
        UserError: it is gone, or was changed.
    """
    if passed := given.get(plugin.name + plugin.source):
        return passed
    found = load(plugin.name)
    if _source_digest(found) != plugin.source:
        raise UserError(
            f"The source of {plugin.name} is not what the run was made with; restore it, or make a new run."
        )
    return found


def built(plugin: PlugIn) -> Any:
    """Return the plug-in as a constructor that takes shapes, with its settings bound if it has any."""
    from ..hf.plugins import build_part

    return build_part(loaded(plugin), plugin.settings)


def _source_digest(part: Any) -> str:
    """Digest the code of a function or class and its dependencies; empty for code of this package."""
    if part.__module__.startswith(OWN):
        return ""
    try:
        source = "".join(_sources(part, {}))
    except (OSError, TypeError, SyntaxError):
        raise UserError(
            f"The source of {part.__qualname__} is not to be found; define it with def or class, in a file "
            "or a notebook cell."
        ) from None
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _sources(part: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yield the source of a function or class, and what describes all that it uses.

    Args:
        seen: what is described already, by its id.
    """
    seen[id(part)] = part
    source = plain_source(_source(part))
    yield source
    scope = dict(vars(sys.modules[part.__module__]))
    for function in filter(inspect.isfunction, [part, *vars(part).values()]):
        scope |= inspect.getclosurevars(function).nonlocals
    for name in sorted(_names(compile(source, "", "exec")) & scope.keys()):
        yield from _described(scope[name], part, seen)


def _described(value: Any, part: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yield what describes a value that a part uses, by its source or its numbers.

    Nothing of installed packages is followed, but for the one that `part` is in.
    """
    if isinstance(value, PLAIN):
        yield f"{value!r};"
    elif hasattr(value, "tolist") and not inspect.isclass(value):
        yield f"{value.tolist()};"
    elif id(value) not in seen:
        seen[id(value)] = value
        if isinstance(value, dict):
            value = [*value.items()]
        if isinstance(value, list | tuple | set | frozenset):
            for each in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
                yield from _described(each, part, seen)
        elif isinstance(value, functools.partial):
            yield from _described([value.func, value.args, value.keywords], part, seen)
        elif hasattr(value, "__wrapped__"):
            yield from _described(value.__wrapped__, part, seen)
        elif not _is_followed(value, part):
            return
        elif inspect.isfunction(value) or inspect.isclass(value):
            yield from _sources(value, seen)
        elif inspect.ismodule(value):
            names = sorted(name for name in vars(value) if not name.startswith("__"))
            yield from _described([getattr(value, name) for name in names], part, seen)
        elif hasattr(value, "__dict__"):
            yield from _described([type(value), vars(value)], part, seen)


def _is_followed(value: Any, part: Any) -> bool:
    """Return whether a value is of the part's own package, or of a file or notebook that is not installed."""
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or "builtins"
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    top = name.partition(".")[0]
    is_installed = top in (OWN[:-1], *sys.stdlib_module_names) or {*file.parts} & INSTALLED
    return top == _top_package(part) or not is_installed


def _top_package(part: Any) -> str:
    return part.__module__.partition(".")[0]


def _names(code: CodeType) -> set[str]:
    """Return the names that code looks up outside itself."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    own = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*inner)


def _source(part: Any) -> str:
    """Return the source of a function or class; `inspect` does not find a class of a notebook cell."""
    for function in filter(inspect.isfunction, vars(part).values() if inspect.isclass(part) else ()):
        code = function.__code__
        linecache.checkcache(code.co_filename)
        nodes = ast.walk(ast.parse("".join(linecache.getlines(code.co_filename))))
        for node in (node for node in nodes if isinstance(node, ast.ClassDef)):
            if node.name == part.__name__ and node.lineno <= code.co_firstlineno <= (node.end_lineno or 0):
                return ast.unparse(node)
    return textwrap.dedent(inspect.getsource(part))


def plain_source(source: str) -> str:
    """Return Python code without its comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _patched_source() -> str:
    """Describe all plain values of `method/`, and the functions, classes and methods replaced in it."""
    found = ""
    for file in _method_files():
        module = import_module(f"{OWN}method.{file.stem}")
        classes = [each for each in vars(module).values() if inspect.isclass(each)]
        places: list[Any] = [module, *(each for each in classes if each.__module__ == module.__name__)]
        for place in places:
            for key, value in vars(place).items():
                if isinstance(value, PLAIN | tuple) and not key.startswith(
                    "_"
                ):  # which Python adds to classes
                    found += f"{place.__name__}.{key}={value!r};"
                for part in _foreign(value):
                    found += f"{place.__name__}.{key}={_source_digest(part)};"
    return found


def _method_files() -> list[Path]:
    return [file for file in sorted((PACKAGE / "method").glob("*.py")) if file.stem != "reference"]


def _foreign(value: Any) -> Iterator[Any]:
    """Yield the classes and functions of a user that a value is or wraps, each function by itself."""
    while inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, WRAPPERS):
        part, value = value, getattr(value, "fget", getattr(value, "__wrapped__", None))
        if inspect.isfunction(part):  # a copy, whose module is its own and not that of what it wraps
            part = FunctionType(part.__code__, part.__globals__, closure=part.__closure__)
        known = isinstance(part, WRAPPERS) or part.__module__ not in sys.modules  # as of a NamedTuple
        if not known and _top_package(part) not in METHOD_IMPORTS:
            yield part


def code_key(*plugins: PlugIn | None) -> str:
    """Digest the code that results depend on: `method/`, and the files of this package's plug-ins.

    Docstrings, comments and layout are ignored; functions and values replaced at run time are included.
    """
    modules = {plugin.name.partition(":")[0] for plugin in plugins if plugin is not None}
    files = {*_method_files()}
    files |= {file for name in modules if name.startswith(OWN) for file in _with_imports(_file_of(name))}
    return _code_digest(files, _patched_source())


def code_with_imports(name: str) -> str:
    """Digest the code of a module or folder of this package, as `runs/testing` or `hf`, and its imports."""
    files = PACKAGE.glob(f"{name}/*.py" if (PACKAGE / name).is_dir() else f"{name}.py")
    return _code_digest({other for file in files for other in _with_imports(file)})


def _code_digest(files: Iterable[Path], more: str = "") -> str:
    code = "".join(_plain_file(file, file.stat().st_mtime_ns) for file in sorted(files))
    return hashlib.sha256((code + more).encode()).hexdigest()[:16]


def _file_of(module: str) -> Path:
    return PACKAGE.parent / f"{module.replace('.', '/')}.py"


def _with_imports(file: Path) -> set[Path]:
    """Return a module's file with those that it imports from the folders `FOLLOWED`, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        file = waiting.pop()
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                other = file.parents[node.level - 1] / f"{node.module.replace('.', '/')}.py"
                if other.parent.name in FOLLOWED and other not in found:
                    waiting.append(other)
    return found


@functools.cache
def _plain_file(file: Path, _: int) -> str:
    return plain_source(file.read_text(encoding="utf-8"))
