"""Digest a user's class or function and everything that it computes with, as it is in memory.

A run must not reuse results of different code. A name does not identify code, since every run of a cell
redefines `__main__:Block`. Source text does not identify it either: it lacks values, closures and helpers,
and comments change it. The user's own functions, classes, objects and values that a part names are digested
with it. Installed packages, this package and Python itself are identified by name only. The digest misses
names that are looked up as strings (for example through `globals()`), patched libraries, and anything that a
part reads from files, the environment or the clock.
"""

import dis
import hashlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from ..errors import is_of_user
from ..files import PACKAGE

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))  # types described by repr
# Attributes that Python adds to a class.
WRITTEN_BY_PYTHON = ("__doc__", "__firstlineno__", "__static_attributes__", "__annotate_func__")
OF_THIS_MACHINE = ("device", "_Environ")
DIGITS = 12

Instruction = tuple[Any, Any]  # the operation's name, and its argument


def code_digest(part: Any) -> str:
    """Return the digest of a user's class or function: 12 hexadecimal digits.

    The part is taken apart into components, as `pickle` would do. Components that are not plain values are
    numbered in the order in which they are found. The number stands for the component, which is taken apart
    later. So circular references do no harm, and it matters whether two components are the same object.
    """
    hasher, values, number_of = hashlib.sha256(), [part], {id(part): 0}

    def describe(value: Any) -> str:
        if type(value) in PLAIN:
            return repr(value)
        if isinstance(value, set | frozenset):
            value = ("set", *sorted(value, key=_without_address))
        if type(value) is tuple:
            return f"({','.join(map(describe, value))})"
        if id(value) not in number_of:
            number_of[id(value)] = len(values)
            values.append(value)
        return f"#{number_of[id(value)]}"

    for value in values:  # `describe` appends to this list
        hasher.update(describe((type(value), *_components(value))).encode())
    return hasher.hexdigest()[:DIGITS]


def _components(value: Any) -> Iterator[Any]:
    """Yield the components of a value."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous().flatten()
        yield from (str(value.dtype), (*value.shape,), dense.view(torch.uint8).numpy().tobytes())
    elif inspect.isfunction(value) and _is_module_of_user(value.__globals__.get("__name__", "")):
        yield from (value.__defaults__, value.__kwdefaults__, vars(value), *_instructions(value.__code__))
        yield from _named_values(value)
    elif inspect.isclass(value) and _is_module_of_user(value.__module__):
        yield from value.__bases__
        for name, attribute in sorted(vars(value).items()):
            is_special = name.startswith("__") and name.endswith("__")
            if not is_special or (callable(attribute) and name not in WRITTEN_BY_PYTHON):
                yield from (name, attribute)
    elif inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, ModuleType):
        yield from (getattr(value, "__module__", ""), value.__name__, getattr(value, "__wrapped__", None))
    elif type(value).__name__ not in OF_THIS_MACHINE:
        yield from (getattr(value, name, None) for name in ("__wrapped__", "fget", "fset"))
        try:  # take the value apart as `pickle` would
            for component in value.__reduce_ex__(4):
                yield (*component,) if isinstance(component, Iterator) else component
        except Exception:  # a lock has no components, and a user's object may raise anything
            yield _without_address(value)


def _named_values(function: FunctionType) -> Iterator[Any]:
    """Yield the current values of all names that a function uses and that are defined outside of it.

    They are globals, variables of enclosing functions, and modules that the function imports. From a user's
    module, every attribute that an instruction names is included (`clip` for `tools.clip`), perhaps too many.
    """
    instructions, scope = _instructions(function.__code__), function.__globals__
    names = {name for _, name in instructions if isinstance(name, str)}
    loaded = {name for operation, name in instructions if operation in ("LOAD_GLOBAL", "LOAD_NAME")}
    values = [scope[name] for name in sorted(loaded & scope.keys())]
    values += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    values += _imported_inside(instructions, scope.get("__package__"))
    entered = set()
    for value in values:  # the loop appends the attributes of modules
        if not isinstance(value, ModuleType):
            yield value
        elif _is_module_of_user(value.__name__) and value.__name__ not in entered:
            entered.add(value.__name__)
            values += [vars(value)[name] for name in sorted(names & vars(value).keys())]


def _imported_inside(instructions: list[Instruction], package: str | None) -> list[ModuleType]:
    """Return the modules that a function imports in its body.

    Python does this in three instructions: push the level of a relative import, push the names, and import.
    """
    modules = []
    for (_, level), (operation, name) in zip(instructions, instructions[2:], strict=False):
        if operation == "IMPORT_NAME":
            with suppress(Exception):  # a user's module may raise anything
                modules.append(import_module("." * level + name, package))
    return modules


def _instructions(code: CodeType) -> list[Instruction]:
    """Return the instructions of code and of the functions inside it, without line numbers and docstrings."""
    instructions = [
        (step.opname, code.co_consts[step.arg or 0] if step.opname == "KW_NAMES" else step.argval)
        for step in dis.get_instructions(code)  # Python 3.11 gives no keyword names here
    ]
    # A class body sets its docstring and line number like any attribute: load a value, then store it by name.
    dropped = set[int]()
    for place, (operation, name) in enumerate(instructions):
        if operation == "STORE_NAME" and name in WRITTEN_BY_PYTHON:
            dropped |= {place - 1, place}
    kept = [step for place, step in enumerate(instructions) if place not in dropped]
    inner = [step for _, value in kept if isinstance(value, CodeType) for step in _instructions(value)]
    form = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x3FF)
    return [(form, code.co_varnames), ("except", code.co_exceptiontable), *kept, *inner]


def _is_module_of_user(name: str) -> bool:
    """Return whether a module is the user's, and not part of Python, this package or an installed package."""
    top = str(name).partition(".")[0]
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
    if top == PACKAGE.name or not (file or top == "__main__" or module is None):  # built in
        return False
    return is_of_user(Path(file))


def _without_address(value: Any) -> str:
    return repr(value).partition(" at 0x")[0]
