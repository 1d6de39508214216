"""The digest of an idea: of a function or class of the user, with all that it uses."""

import ast
import dis
import functools
import hashlib
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Collection, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import suppress
from dataclasses import is_dataclass
from importlib.machinery import SourceFileLoader
from operator import attrgetter
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import UserError

OWN = "ctxkv_lib."
PYTHON_AND_THIS = {"ctxkv_lib", *sys.stdlib_module_names}
WRAPPERS = (property, staticmethod, classmethod)
ANNOTATE = "__annotate_func__"  # of a class; computes its annotations, from Python 3.14 on
INSTALLED = {"site-packages", "dist-packages"}  # folders of installed packages
# Methods that change what a name holds, if that is a container.
CHANGING = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "clear"}
PLACE = ("lineno", "end_lineno", "col_offset", "end_col_offset")  # of `co_positions`
DEEPEST = 30  # objects and containers in each other, at which a description ends
TEXTS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of functions and classes, with their code objects


def source_digest(part: Any) -> str:
    """Digest the code of a function or class and its dependencies; empty for code of this package."""
    parts = [each for each in layers(part) if _is_followed(each)] or [inspect.unwrap(part)]
    if module_of(parts[0]).startswith(OWN):
        return ""
    seen: dict[int, Any] = {}
    source = "".join(text for each in parts for text in _sources(each, seen))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _sources(part: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yield the source of a function or class, and what describes all that it uses.

    What the code itself changes, as a list that it appends to, is left out; `seen` is described already.
    """
    seen[id(part)] = part
    if not (text := _text(part)):
        return  # it is generated
    yield text
    tree, functions = ast.parse(text), _own_functions(part)
    scope = dict(functions[0].__globals__ if functions else vars(sys.modules.get(part.__module__, part)))
    for function in functions:
        seen[id(function)] = function
        scope |= inspect.getclosurevars(function).nonlocals
        names = reversed(function.__code__.co_varnames[: function.__code__.co_argcount])
        defaults = dict(zip(names, reversed(function.__defaults__ or ()), strict=False))
        defaults |= function.__kwdefaults__ or {}
        for name in sorted(defaults.keys() - _changed(tree, defaults)):
            yield f"{name}={''.join(_described(defaults[name], seen))};"
    for imported in _imports(tree, scope):
        yield from _looked_up(tree, imported.keys(), scope | imported, seen)
    yield from _looked_up(tree, _names(tree), scope, seen)
    if inspect.isclass(part):
        yield from _described(part.__bases__, seen)
        changed = _changed_by_methods(tree, part, part)
        for name, value in sorted(vars(part).items()):
            if name == ANNOTATE or (name == "__replace__" and _is_installed(value)):
                continue  # from Python 3.14 and 3.13 on
            if _is_code(value) or not (name.startswith("__") or name in changed):
                yield f"{name}={''.join(_described(value, seen))};"


def _looked_up(
    tree: ast.Module, names: Collection[str], scope: dict[str, Any], seen: dict[int, Any]
) -> Iterator[str]:
    """Yield what describes all that code looks up in a scope by these names, with dots for attributes."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    held = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    used_as_a_whole = {ast.unparse(node) for node in nodes if id(node) not in held}
    changed = _changed(tree, scope)
    for name in sorted({ast.unparse(node) for node in nodes} - changed):
        first, dot, _ = name.partition(".")
        if first not in names or (dot and not inspect.ismodule(scope.get(first))):
            continue
        value = _value(name, scope)
        if inspect.ismodule(value):
            if name in used_as_a_whole and not _is_installed(value):
                yield f"{name}={''.join(_of_module(value, seen))};"
        elif value is not scope:
            if not _is_code(value) and any(each.startswith(f"{name}.") for each in changed):
                value = type(value)
            yield f"{name}={''.join(_described(value, seen))};"


def _imports(tree: ast.Module, scope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what each import within code gives, by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = {name: scope.get(name) for name in ("__name__", "__package__")}
            with suppress(Exception, SystemExit):  # whatever a module of the user raises
                exec(ast.unparse(node), found)
            yield {name: value for name, value in found.items() if not name.startswith("__")}


def _of_module(module: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yield the source of a module of the user and what its code uses, but for modules that it holds."""
    with suppress(OSError, TypeError, SyntaxError):  # whose source is nowhere
        yield plain_source(inspect.getsource(module))
    for name, value in sorted(vars(module).items()):
        if _is_code(value):
            yield f"{name}={''.join(_described(value, seen))};"


def _names(tree: ast.Module) -> set[str]:
    """Return the names that code looks up outside itself."""
    try:
        return _global_names(compile(tree, "", "exec"))
    except SyntaxError:  # `nonlocal` of a function around it
        return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _global_names(code: CodeType) -> set[str]:
    inner = (_global_names(each) for each in code.co_consts if isinstance(each, CodeType))
    loads = (each for each in dis.get_instructions(code) if each.opname.startswith("LOAD"))
    own = {each.argval for each in loads if "GLOBAL" in each.opname or "NAME" in each.opname}
    return own.union(*inner)


def _changed(tree: ast.AST, scope: dict[str, Any]) -> set[str]:
    """Return the names, with dots where they are attributes, of what code changes itself."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ctx=ast.Store() | ast.Del()):
                found.add(ast.unparse(node))
            case ast.Attribute(value=held, attr=attr) if attr in CHANGING:
                value = _value(ast.unparse(held), scope)
                if isinstance(value, MutableMapping | MutableSequence | MutableSet):
                    found.add(ast.unparse(held))
            case ast.Subscript(value=held, ctx=ast.Store() | ast.Del()):
                found.add(ast.unparse(held))
            case ast.Global(names=assigned) | ast.Nonlocal(names=assigned):
                found.update(assigned)
    return found


def _changed_by_methods(tree: ast.Module, kind: Any, value: Any) -> set[str]:
    """Return the attributes of a class or object that methods, in the tree of a class, change later."""
    scope, found = dict.fromkeys(("self", "cls", kind.__name__), value), set()
    making = () if inspect.isclass(value) else ("__init__", "__post_init__")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in making:
            found |= {name for each in _changed(node, scope) for name in each.split(".")[1:]}
    return found


def _value(name: str, scope: dict[str, Any]) -> Any:
    """Return the value of a name, with dots where they are attributes; the scope itself if there is none."""
    first, _, rest = name.partition(".")
    with suppress(Exception):  # whatever an object of the user raises
        return attrgetter(rest)(scope[first]) if rest else scope[first]
    return scope


def _described(value: Any, seen: dict[int, Any], depth: int = 0) -> Iterator[str]:
    """Yield what describes a value: code by its source, containers and a user's objects by their content."""
    if isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    elif inspect.ismethod(value):
        value = [value.__func__, value.__self__]
    elif _is_code(value):
        *outer, last = layers(value)
        for part in [*filter(_is_followed, outer), last]:  # libraries wrap methods of a class in use
            yield _plain(part)
            if _is_followed(part) and id(part) not in seen:
                yield from _sources(part, seen)
        return
    kind = type(value)
    is_of_this_process = value is os.environ or (kind.__module__, kind.__name__) == ("torch", "device")
    if is_of_this_process or depth == DEEPEST or id(value) in seen:
        yield kind.__qualname__
        return
    is_own = kind.__module__ != "builtins" and not _is_installed(kind)
    if is_own or isinstance(value, dict | list):
        seen[id(value)] = value
    if isinstance(value, set | frozenset):
        yield from sorted(f"{''.join(_described(each, {**seen}, depth + 1))}," for each in value)
    elif isinstance(value, dict | list | tuple):
        held = value.items() if isinstance(value, dict) else value
        yield f"[{','.join(''.join(_described(each, seen, depth + 1)) for each in held)}]"
    elif isinstance(value, SimpleNamespace):
        yield from _described(vars(value), seen, depth + 1)
    elif not (is_own and is_dataclass(value) and not hasattr(value, "state_dict")):
        yield _plain(value)  # else what it holds follows
    if is_own:
        yield from _described(kind, seen)
        yield from _described(_state(value), seen, depth + 1)


def _state(value: Any) -> dict[str, Any]:
    """Return what an object of the user holds, without what its methods change or keep."""
    kind = type(value)
    slots = [name for each in kind.__mro__ for name in getattr(each, "__slots__", ()) if name[:2] != "__"]
    state = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    state |= getattr(value, "__dict__", {})
    left_out = {name for name in state if isinstance(getattr(kind, name, None), functools.cached_property)}
    with suppress(Exception):  # whatever an object of the user raises
        if hasattr(kind, "state_dict"):  # an `nn.Module`
            left_out |= {name for name in state if name.startswith("_") or name == "training"}
            state |= value.state_dict() | dict(getattr(value, "named_modules", dict)())
        for each in (each for each in kind.__mro__ if not _is_installed(each)):
            left_out |= _changed_by_methods(ast.parse(_text(each)), each, value)
    return {name: each for name, each in state.items() if name not in left_out}


def _plain(value: Any) -> str:
    """Describe a value by itself: arrays by their bytes, code by its name."""
    try:
        if type(value).__name__ in ("Tensor", "Parameter", "ndarray"):
            array = value  # or as bytes, since numpy has no bfloat16
            if hasattr(value, "detach"):
                array = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
                array = array.flatten().view(sys.modules["torch"].uint8).numpy()
            return f"{value.dtype}{[*value.shape]}{hashlib.sha256(array.tobytes()).hexdigest()}"
        if inspect.isroutine(value) or inspect.isclass(value):
            return f"{value.__module__}.{value.__qualname__}"
        text = repr(value)
    except Exception:  # whatever an object of the user raises
        text = " at 0x"
    return type(value).__qualname__ if " at 0x" in text else text


def _is_code(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, WRAPPERS)


def layers(value: Any) -> Iterator[Any]:
    """Yield a function, method or class, and what it wraps, from the outside in."""
    while _is_code(value):
        yield value
        value = getattr(value, "fget", getattr(value, "__wrapped__", None))


def _is_followed(part: Any) -> bool:
    return (inspect.isfunction(part) or inspect.isclass(part)) and not _is_installed(part)


def _is_installed(part: Any) -> bool:
    """Return whether a function, class or module is of Python, of this package, or of an installed one."""
    name = module_of(part)
    file = Path(getattr(sys.modules.get(name), "__file__", None) or os.__file__)
    is_named = name.partition(".")[0] in PYTHON_AND_THIS  # as a file of the user may be, too
    is_there = f"{name}.".startswith(OWN) or file.is_relative_to(Path(os.__file__).parent)
    return (is_named and is_there) or bool({*file.parts} & INSTALLED)


def module_of(part: Any) -> str:
    """Return the module that a function or class was written in, also if it is named like what it wraps."""
    if inspect.ismodule(part):
        return part.__name__
    return getattr(part, "__globals__", {}).get("__name__") or getattr(part, "__module__", None) or ""


def _own_functions(part: Any) -> list[Any]:
    """Return a function, or the functions in the body of a class."""
    if not inspect.isclass(part):
        return [part] if inspect.isfunction(part) else []
    values = (value for name, value in vars(part).items() if name != ANNOTATE)
    found = [each for value in values for each in layers(value) if inspect.isfunction(each)]
    return [each for each in found if each.__code__.co_qualname.startswith(f"{part.__qualname__}.")]


def own_code(part: Any) -> list[CodeType]:
    """Return the code objects of `_own_functions`."""
    return [function.__code__ for function in _own_functions(part)]


def _text(part: Any) -> str:
    """Return the plain source of a function or class, none if it is generated; refuse a changed file."""
    codes, known, text = own_code(part), TEXTS.get(part), ""
    is_edited = _is_edited(part, codes)
    try:
        text = "" if is_edited else plain_source(_source(part))
    except (OSError, TypeError, SyntaxError):
        if not (hasattr(part, "__wrapped__") or part.__name__.startswith("__")):  # as of a dataclass
            raise UserError(
                f"The source of {part.__qualname__} is not to be found; define it with def or class, in a "
                "file or a notebook cell, without %%time or exec."
            ) from None
    if known and codes and [*map(id, known[0])] == [*map(id, codes)]:
        is_edited |= known[1] != text
    if is_edited:
        file = codes[0].co_filename
        raise UserError(f"{file} has changed since {part.__name__} was imported; reload it or start anew.")
    TEXTS[part] = codes, text
    return text


def _is_edited(part: Any, codes: list[CodeType]) -> bool:
    """Return whether the file of a module no longer has this code of it; a notebook has no such file."""
    module = sys.modules.get(module_of(part))
    file = str(getattr(module, "__file__", None))
    own = {code for code in codes if code.co_filename == file}
    if not own or type(getattr(module, "__loader__", None)) is not SourceFileLoader:  # others change code
        return False
    with suppress(OSError, SyntaxError):
        waiting = [compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)]
        while waiting:
            own.discard(code := waiting.pop())
            waiting += [each for each in code.co_consts if isinstance(each, CodeType)]
    return bool(own)


def _source(part: Any) -> str:
    """Return the source of a function or class; `inspect` finds no class of a notebook, nor one lambda."""
    found: ast.AST | None = None
    for code in (codes := own_code(part)):
        linecache.checkcache(code.co_filename)
        for node in ast.walk(ast.parse("".join(linecache.getlines(code.co_filename)))):
            if isinstance(node, ast.ClassDef) and inspect.isclass(part):
                last = node.end_lineno or 0
                if node.name == part.__name__ and node.lineno <= code.co_firstlineno <= last:
                    return ast.unparse(node)
            elif isinstance(node, ast.Lambda) and code.co_name == "<lambda>":
                places = {(*map(vars(each).get, PLACE),) for each in ast.walk(node.body)}
                found = node if places & {*code.co_positions()} else found  # the last is the innermost
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
                first = min(each.lineno for each in (node, *node.decorator_list))
                found = node if first == code.co_firstlineno else found
    if found and not inspect.isclass(part):
        return ast.unparse(found)
    if codes or not inspect.isclass(part):
        raise OSError
    with suppress(OSError, TypeError):
        return textwrap.dedent(inspect.getsource(part))
    return f"class {part.__name__}: pass"


def plain_source(source: str) -> str:
    """Return Python code without its comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
