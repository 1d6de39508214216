"""The digest of an idea: of a function or class of the user, with all that it uses.

A function counts with its source and the values that it reads, a class with its bases and attributes, an
object of the user's classes with its attributes. What is installed counts by its name, or as it prints.
"""

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ..errors import UserError

OWN = "ctxkv_lib."
NOT_FOLLOWED = {"ctxkv_lib", "torch", "numpy", "psutil", "transformers", *sys.stdlib_module_names}
INSTALLED = {"site-packages", "dist-packages"}  # folders of installed packages
WRAPPERS = (property, staticmethod, classmethod)
# Methods that change a container.
CHANGING = {"append", "extend", "insert", "update", "setdefault", "pop", "popitem", "remove", "clear"}
_parsed = functools.lru_cache(ast.parse)
TEXTS: dict[int, tuple[CodeType, str]] = {}  # code by its `id`, with its source when that was first read


def source_digest(part: Any) -> str:
    """Digest the code of a function or class and its dependencies; empty for code of this package.

    Raises:
        UserError: the source cannot be found, or has changed since it was imported.
    """
    *_, last = layers(part)
    idea = next(filter(is_followed, layers(part)), last)
    module = module_of(idea)
    if module.startswith(OWN):
        return ""
    if not is_followed(idea):
        found = plain_source(inspect.getsource(sys.modules[module])) + _plain(idea)
    else:
        functions = _functions(idea)
        if functions and not any(_text(each.__code__) for each in functions):
            raise UserError(
                f"The source of {part.__qualname__} is not to be found; define it with def or class, in a "
                "file or a notebook cell."
            )
        found = "".join(_described(part, {}))
    return hashlib.sha256(found.encode()).hexdigest()[:12]


def _described(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yield what describes a value; `seen` has, by `id`, what is described already."""
    if isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    elif inspect.ismethod(value):
        value = [value.__func__, value.__self__]
    elif isinstance(value, property):
        value = [value.fget, value.fset, value.fdel]
    elif _is_code(value):
        *outer, last = layers(value)
        for part in [*filter(is_followed, outer), last]:  # libraries wrap methods of a class in use
            yield _plain(part)
            if is_followed(part) and id(part) not in seen:
                seen[id(part)] = part
                yield from _of_class(part, seen) if inspect.isclass(part) else _of_function(part, seen)
        return
    kind = type(value)
    if id(value) in seen:
        yield kind.__qualname__
        return
    is_own = is_followed(kind)
    if is_own or isinstance(value, dict | list):
        seen[id(value)] = value
    if isinstance(value, set | frozenset):
        yield from sorted("".join(_described(each, {**seen})) for each in value)
    elif isinstance(value, dict | list | tuple):
        held = value.items() if isinstance(value, dict) else value
        yield f"[{','.join(''.join(_described(each, seen)) for each in held)}]"
    else:
        yield _plain(value)
    if is_own:
        yield from _described(kind, seen)
        yield from _described(_state(value), seen)


def _plain(value: Any) -> str:
    """Describe a value by itself: arrays by their bytes, code by its name."""
    kind = type(value).__qualname__
    if _is_code(value):
        return f"{module_of(value)}.{getattr(value, '__qualname__', kind)}"
    if kind in ("Tensor", "Parameter", "ndarray"):
        array = value  # or as bytes, since numpy has no bfloat16
        if hasattr(value, "detach"):
            array = value.detach().cpu().flatten().view(sys.modules["torch"].uint8).numpy()
        return f"{value.dtype}{[*value.shape]}{hashlib.sha256(array.tobytes()).hexdigest()}"
    return kind if kind == "device" or " at 0x" in repr(value) else repr(value)


def _of_function(function: FunctionType, seen: dict[int, Any]) -> Iterator[str]:
    """Yield the source of a function, and what describes its defaults and what it reads.

    What it changes itself, as a list that it appends to, is left out.
    """
    text = _text(function.__code__)
    tree = _parsed(text)
    yield text
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values() if text else ()
    values = {each.name: each.default for each in parameters if each.default is not each.empty}
    changed = _changed(tree)
    for name, value in sorted((values | _used(function, tree)).items()):
        if name in changed and not (_is_code(value) or is_followed(type(value))):
            value = type(value)
        yield f"{name}={''.join(_described(value, seen))};"


def _used(function: FunctionType, tree: ast.Module) -> dict[str, Any]:
    """Return what a function looks up outside itself, also as attributes of the user's modules, by name."""
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    names, found = scope.keys() & {*_global_names(function.__code__), *function.__code__.co_freevars}, {}
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        first, *rest = name.split(".")
        value = scope[first] if first in names else sys
        while rest and inspect.ismodule(value) and not _is_installed(value.__name__):
            value = getattr(value, rest.pop(0), None)
        if not (rest or inspect.ismodule(value)):
            found[name] = value
    return found


def _global_names(code: CodeType) -> set[str]:
    inner = (_global_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return {each.argval for each in dis.get_instructions(code) if "GLOBAL" in each.opname}.union(*inner)


def _of_class(kind: type, seen: dict[int, Any]) -> Iterator[str]:
    """Yield what describes the bases and attributes of a class, without those that its methods change."""
    yield from _described(kind.__bases__, seen)
    changed, by_objects = _changed_by_methods(kind, "cls", kind.__name__), _changed_by_methods(kind, "self")
    for name, value in sorted(vars(kind).items()):
        is_left_out = name in changed or (name in by_objects and isinstance(value, dict | list))
        if any(map(is_followed, layers(value))) or not (name.startswith("__") or is_left_out):
            yield f"{name}={''.join(_described(value, seen))};"
    if dataclasses.is_dataclass(kind):
        yield from _described([each.default_factory for each in dataclasses.fields(kind)], seen)


def _state(value: Any) -> dict[str, Any]:
    """Return what an object of the user holds, without what its methods change."""
    state = {**getattr(value, "__dict__", {})}
    if hasattr(type(value), "state_dict"):  # an `nn.Module`
        state |= {"training": None, **value.state_dict()}
    changed = [_changed_by_methods(kind, "self") for kind in type(value).__mro__ if is_followed(kind)]
    return {name: each for name, each in state.items() if not any(name in names for names in changed)}


def _changed_by_methods(kind: type, *owners: str) -> set[str]:
    """Return the attributes of `owners`, as "self", that methods of a class change after `__init__`."""
    methods = [each for each in _functions(kind) if each.__name__ not in ("__init__", "__post_init__")]
    paths = [path.split(".") for each in methods for path in _changed(_parsed(_text(each.__code__)))]
    return {name for owner, name, *_ in (path for path in paths if len(path) > 1) if owner in owners}


def _changed(tree: ast.Module) -> set[str]:
    """Return the names, with dots where they are attributes, of what code changes itself."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Global(names=names):
                found.update(names)
            case ast.Attribute(ctx=ast.Store() | ast.Del()):
                found.add(ast.unparse(node))
            case ast.Subscript(value=held, ctx=ast.Store() | ast.Del()):
                found.add(ast.unparse(held).partition("[")[0])
            case ast.Attribute(value=held, attr=attr) if attr in CHANGING:
                found.add(ast.unparse(held).partition("[")[0])
    return found


def _is_code(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, WRAPPERS)


def layers(value: Any) -> Iterator[Any]:
    """Yield a function, method or class, and what it wraps, from the outside in."""
    while _is_code(value):
        yield value
        value = getattr(value, "fget", getattr(value, "__wrapped__", getattr(value, "func", None)))


def is_followed(part: Any) -> bool:
    """Return whether something is a function or class of the user."""
    return (inspect.isfunction(part) or inspect.isclass(part)) and not _is_installed(module_of(part))


def _is_installed(module: str) -> bool:
    """Return whether a module is of Python, of this package, or of an installed one."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return module.partition(".")[0] in NOT_FOLLOWED or bool({*file.parts} & INSTALLED)


def module_of(part: Any) -> str:
    """Return the module that a function or class was written in, also if it is named like what it wraps."""
    return getattr(part, "__globals__", {}).get("__name__") or getattr(part, "__module__", None) or ""


def _functions(part: Any) -> list[FunctionType]:
    """Return a function, or the user's functions among the attributes of a class."""
    values = vars(part).values() if inspect.isclass(part) else [part]
    found = [each for value in values for each in layers(value) if inspect.isfunction(each)]
    return [*filter(is_followed, found)]


def _text(code: CodeType) -> str:
    """Return the plain source of code, empty if there is none; refuse it if its file has changed since."""
    try:
        text = plain_source(_source(code))
    except (OSError, SyntaxError):  # also of lines that have moved
        text = ""
    if TEXTS.setdefault(id(code), (code, text))[1] != text:
        raise UserError(
            f"{code.co_filename} has changed since {code.co_name} was imported; reload it or start anew."
        )
    return text


def _source(code: CodeType) -> str:
    """Return the source of the `def` or lambda that was compiled to `code`."""
    linecache.checkcache(code.co_filename)
    for node in ast.walk(_parsed("".join(linecache.getlines(code.co_filename)))):
        match node:
            case ast.FunctionDef(name=name, decorator_list=above) if name == code.co_name:
                if code.co_firstlineno in (node.lineno, *(each.lineno for each in above)):
                    return ast.unparse(node)
            case ast.Lambda(body=body) if code.co_name == "<lambda>":  # a line may have several
                where = (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset)
                if where in code.co_positions():
                    return ast.unparse(node)
    raise OSError


def plain_source(source: str) -> str:
    """Return Python code without its comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
