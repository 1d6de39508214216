"""Digests of code: of what a user's class or function computes with, in memory, and of the method's own.

Other code means another result. Installed packages and Python itself count by name only.
"""

import ast
import dis
import hashlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import CellType, CodeType, ModuleType
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]
BESIDE = ("runs/build.py", "plugins/mixer.py", "runs/stages.py", "data/cooccurrence.py")  # what else computes
COMPUTING = [*sorted((PACKAGE / "method").glob("*.py")), *(PACKAGE / file for file in BESIDE)]
INSTALLED = {"site-packages", "dist-packages"}  # folders of installed packages
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))  # described by their repr
WRITTEN_BY_PYTHON = ("__doc__", "__firstlineno__", "__static_attributes__", "__annotate_func__")  # to a class
OF_THIS_MACHINE = ("device", "_Environ")
DIGITS = 12


def method_digest() -> str:
    """Digest all code of `method/` and of what computes around it, without its comments and layout."""
    trees = (ast.parse(file.read_bytes()) for file in COMPUTING)
    return hashlib.sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()[:DIGITS]


def code_digest(part: Any) -> str:
    """Digest a class or function: its bytecode, defaults, closures, bases and class attributes.

    The user's own functions, classes, objects and values that it names are digested with it, as they are now.
    Not seen are names that are looked up in strings, as by `globals()`, and libraries that are patched.
    """
    hasher, found = hashlib.sha256(), [part]
    number_of = {id(part): 0}

    def described(value: Any) -> str:
        """Describe a plain value by itself, and any other by its number in `found`."""
        if type(value) in PLAIN:
            return repr(value)
        if isinstance(value, set | frozenset):
            value = ("set", *sorted(value, key=_without_address))
        if type(value) is tuple:
            return f"({','.join(map(described, value))})"
        if id(value) not in number_of:
            number_of[id(value)] = len(found)
            found.append(value)
        return f"#{number_of[id(value)]}"

    for value in found:  # which grows
        hasher.update(described((type(value), *_parts(value))).encode())
    return hasher.hexdigest()[:DIGITS]


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a value is made of."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous().flatten()
        yield from (str(value.dtype), (*value.shape,), dense.view(torch.uint8).numpy().tobytes())
    elif inspect.isfunction(value) and _is_own(value.__globals__.get("__name__", "")):
        yield from (value.__defaults__, value.__kwdefaults__, vars(value), *_used_by(value))
    elif inspect.isclass(value) and _is_own(value.__module__):
        yield from value.__bases__
        for name, attribute in sorted(vars(value).items()):
            is_special = name.startswith("__") and name.endswith("__")
            if not is_special or (callable(attribute) and name not in WRITTEN_BY_PYTHON):
                yield from (name, attribute)
    elif inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, ModuleType):
        yield from (getattr(value, "__module__", ""), value.__name__, getattr(value, "__wrapped__", None))
    elif type(value).__name__ not in OF_THIS_MACHINE:
        yield from (getattr(value, name, None) for name in ("__wrapped__", "fget", "fset"))
        try:  # to take it apart as `pickle` would
            yield from ((*each,) if isinstance(each, Iterator) else each for each in value.__reduce_ex__(4))
        except Exception:  # as of a lock, or whatever an object of the user raises
            yield _without_address(value)


def _used_by(function: Any) -> Iterator[Any]:
    """Yield a function's steps, and the values outside that these name, also by way of the user's modules."""
    scope, steps = function.__globals__, _steps(function.__code__)
    names = {name for _, name in steps if isinstance(name, str)}
    loaded = {name for step, name in steps if step in ("LOAD_GLOBAL", "LOAD_NAME")}
    waiting = [scope[name] for name in sorted(loaded & scope.keys())]
    waiting += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    for (_, level), (step, name) in zip(steps, steps[2:], strict=False):
        if step == "IMPORT_NAME":
            with suppress(Exception):  # whatever a module of the user raises
                waiting.append(import_module("." * level + name, scope.get("__package__")))
    yield from steps
    seen = set()
    for value in waiting:  # which grows
        if not isinstance(value, ModuleType):
            yield value
        elif _is_own(value.__name__) and value.__name__ not in seen:
            seen.add(value.__name__)
            waiting += [vars(value)[name] for name in sorted(names & vars(value).keys())]


def _steps(code: CodeType) -> list[tuple[Any, Any]]:
    """Return what code and the functions in it do, without places in the file and docstrings."""
    steps = [
        (step.opname, code.co_consts[step.arg or 0] if step.opname == "KW_NAMES" else step.argval)
        for step in dis.get_instructions(code)  # which does not name keywords in Python 3.11
    ]
    written = {
        at for at, (step, name) in enumerate(steps) if step == "STORE_NAME" and name in WRITTEN_BY_PYTHON
    }
    kept = [step for at, step in enumerate(steps) if not {at, at + 1} & written]  # the value, and its name
    inner = [step for _, value in kept if isinstance(value, CodeType) for step in _steps(value)]
    form = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x3FF)
    return [(form, code.co_varnames), ("except", code.co_exceptiontable), *kept, *inner]


def _is_own(name: str) -> bool:
    """Return whether a module is the user's: not of Python, of this package, or of an installed one."""
    top = str(name).partition(".")[0]
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
    if top == "ctxkv_lib" or not (file or top == "__main__" or module is None):  # built in
        return False
    place = Path(file)
    return not ({*place.parts} & INSTALLED or place.is_relative_to(Path(inspect.__file__).parent))


def _without_address(value: Any) -> str:
    return repr(value).partition(" at 0x")[0]
