"""Digests of code: of a plug-in of the user with all that it uses, and of this package itself."""

import ast
import dis
import functools
import hashlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ..errors import UserError

PACKAGE = Path(__file__).parent.parent
OWN = "ctxkv_lib."
FOLLOWED = {"data", "hf", "research"}  # `method/` is in every key, and `runs/` only loads what a run has made
METHOD_IMPORTS = {"ctxkv_lib", "torch", "numpy", "psutil", *sys.stdlib_module_names}
WRAPPERS = (property, staticmethod, classmethod)
PLAIN = bool | int | float | str | tuple  # values of `method/` that keys cover
INSTALLED = {"site-packages", "dist-packages"}  # folders of installed packages
# Methods that change what a name holds.
CHANGING = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "clear"}


def source_digest(part: Any) -> str:
    """Digest the code of a function or class and its dependencies; empty for code of this package."""
    if part.__module__.startswith(OWN):
        return ""
    try:
        source = "".join(_sources(part, []))
    except (OSError, TypeError, SyntaxError):
        raise UserError(
            f"The source of {part.__qualname__} is not to be found; define it with def or class, in a file "
            "or a notebook cell."
        ) from None
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _sources(part: Any, seen: list[Any]) -> Iterator[str]:
    """Yield the source of a function or class, and what describes all that it uses.

    Of what is not installed, these are functions and classes with all that they use; of anything else, what
    `_plain` says. Names that the code itself changes, as a list that it appends to, are left out.
    """
    seen.append(part)
    source = plain_source(_source(part))
    yield source
    scope = dict(vars(sys.modules[part.__module__]))
    for function in filter(inspect.isfunction, [part, *vars(part).values()]):
        scope |= inspect.getclosurevars(function).nonlocals
    for name in sorted(_used(source)):
        first, _, rest = name.partition(".")
        value = scope.get(first, scope)  # where it is no name of the module, a builtin or a local of its own
        if rest:
            with suppress(AttributeError):
                value = attrgetter(rest)(value) if inspect.ismodule(value) else scope
        if value is scope or inspect.ismodule(value):
            continue
        if isinstance(value, functools.partial):
            yield _plain([value.args, value.keywords])
            value = value.func
        if inspect.isroutine(value):
            value = inspect.unwrap(value)
        yield f"{name}={_plain(value)};"
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if is_code and not _is_installed(value) and not any(value is each for each in seen):
            with suppress(OSError, TypeError, SyntaxError):  # as of a namedtuple, whose source is nowhere
                yield from _sources(value, seen)


def _used(source: str) -> set[str]:
    """Return the names, with dots where they are attributes, that code looks up outside itself."""
    tree, found, changed = ast.parse(source), set(), set()
    try:
        names = _global_names(compile(source, "", "exec"))
    except SyntaxError:  # `nonlocal` of a function around it
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=held, attr=attr) if attr in CHANGING:
                changed.add(ast.unparse(held))
                found.add(ast.unparse(node))
            case ast.Subscript(value=held, ctx=ast.Store() | ast.Del()):
                changed.add(ast.unparse(held))
            case ast.Global(names=assigned):
                changed.update(assigned)
            case ast.Name() | ast.Attribute():
                found.add(ast.unparse(node))
    return {name for name in found - changed if name.partition(".")[0] in names}


def _global_names(code: CodeType) -> set[str]:
    inner = (_global_names(each) for each in code.co_consts if isinstance(each, CodeType))
    loads = (each for each in dis.get_instructions(code) if each.opname.startswith("LOAD"))
    own = {each.argval for each in loads if "GLOBAL" in each.opname or "NAME" in each.opname}
    return own.union(*inner)


def _plain(value: Any) -> str:
    """Describe a value: containers by what they hold, arrays by their bytes, code by its name."""
    try:
        if isinstance(value, dict):
            return "{" + ",".join(f"{_plain(key)}:{_plain(each)}" for key, each in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(_plain, value)) + "]"
        if isinstance(value, set | frozenset):
            return "{" + ",".join(sorted(map(_plain, value))) + "}"
        if type(value).__name__ in ("Tensor", "Parameter", "ndarray"):
            array = value if type(value).__name__ == "ndarray" else value.detach().cpu().contiguous().numpy()
            return f"{value.dtype}{[*value.shape]}{hashlib.sha256(array.tobytes()).hexdigest()}"
        if inspect.isroutine(value) or inspect.isclass(value):
            return f"{value.__module__}.{value.__qualname__}"
        text = repr(value)
    except Exception:  # whatever an object of the user raises
        text = " at 0x"
    return type(value).__qualname__ if " at 0x" in text else text


def _is_installed(part: Any) -> bool:
    """Return whether a function or class is of Python, of this package, or of an installed one."""
    file = Path(getattr(sys.modules.get(part.__module__), "__file__", None) or "")
    top = _top_package(part)
    return top in (OWN[:-1], *sys.stdlib_module_names) or bool({*file.parts} & INSTALLED)


def _top_package(part: Any) -> str:
    return part.__module__.partition(".")[0]


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
                is_private = key.startswith("_")  # as what Python adds to classes
                if isinstance(value, PLAIN) and not is_private:
                    found += f"{place.__name__}.{key}={value!r};"
                for part in _foreign(value):
                    found += f"{place.__name__}.{key}={source_digest(part)};"
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


def code_key(*plugins: str) -> str:
    """Digest the code that results depend on: `method/`, and the files of those plug-ins of this package.

    Docstrings, comments and layout are ignored; functions and values replaced at run time are included.
    """
    modules = {name.partition(":")[0] for name in plugins}
    files = {*_method_files()}
    files |= {file for name in modules if name.startswith(OWN) for file in _with_imports(_file_of(name))}
    return _code_digest(files, _patched_source())


def code_with_imports(name: str) -> str:
    """Digest the code of a module or folder of this package, as `runs/testing` or `hf`, and its imports."""
    files = PACKAGE.glob(f"{name}/*.py" if (PACKAGE / name).is_dir() else f"{name}.py")
    return _code_digest({other for file in files for other in _with_imports(file)})


def _code_digest(files: Iterable[Path], more: str = "") -> str:
    code = "".join(_code_of(file)[0] for file in sorted(files))
    return hashlib.sha256((code + more).encode()).hexdigest()[:16]


def _file_of(module: str) -> Path:
    return PACKAGE.parent / f"{module.replace('.', '/')}.py"


def _with_imports(file: Path) -> set[Path]:
    """Return a module's file with those that it imports from the folders `FOLLOWED`, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting += [other for other in _code_of(file)[1] if other not in found]
    return found


def _code_of(file: Path) -> tuple[str, list[Path]]:
    """Return the `plain_source` of a file of this package, and the files of `FOLLOWED` that it imports."""
    return _read_once(file, file.stat().st_mtime_ns)


@functools.cache
def _read_once(file: Path, _: int) -> tuple[str, list[Path]]:
    source, imports = file.read_text(encoding="utf-8"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            other = file.parents[node.level - 1] / f"{node.module.replace('.', '/')}.py"
            if other.parent.name in FOLLOWED:
                imports.append(other)
    return plain_source(source), imports
