"""Compute a digest of a user's class or function and of everything that it uses, from the objects in memory.

A run must not reuse results of different code. A name does not identify code, since every run of a notebook
cell redefines `__main__:Block`. Source text does not identify code either: every comment changes the text,
and the text lacks values, closures and helper functions. The digest therefore covers the class or function
and all of the user's functions, classes, objects and values that its code names. Objects from Python,
installed packages and this package are identified by name only. The digest misses names that are looked up as
strings (for example through `globals()`), patched libraries, and anything that the code reads from files, the
environment or the clock.
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
# Attributes that Python itself adds to a class.
WRITTEN_BY_PYTHON = ("__doc__", "__firstlineno__", "__static_attributes__", "__annotate_func__")
MACHINE_TYPES = ("device", "_Environ")
DIGITS = 12

Instruction = tuple[Any, Any]  # operation name and argument


def code_digest(part: Any) -> str:
    """Return a digest of a user's class or function, as 12 hexadecimal digits.

    The class or function is taken apart into components, as `pickle` would do. Each component that is not a
    plain value gets a number, in the order of discovery. The number is digested in place of the component,
    and the component itself is taken apart later. So circular references do no harm, and two references to
    one object differ from references to two equal objects.
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
    """Yield the components from which the digest of a value is computed."""
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
    elif type(value).__name__ not in MACHINE_TYPES:
        yield from (getattr(value, name, None) for name in ("__wrapped__", "fget", "fset"))
        try:
            # Take the value apart as `pickle` would.
            for component in value.__reduce_ex__(4):
                yield (*component,) if isinstance(component, Iterator) else component
        except Exception:
            # The value cannot be taken apart. For example, it is a lock.
            yield _without_address(value)


def _named_values(function: FunctionType) -> Iterator[Any]:
    """Yield the current values of all names that a function uses but does not define itself.

    Such names are globals, variables of enclosing functions, and modules that the function imports. From a
    user's module, every attribute is included whose name occurs in the function's instructions (`clip` for
    `tools.clip`). This may include too many attributes.
    """
    instructions, scope = _instructions(function.__code__), function.__globals__
    names = {name for _, name in instructions if isinstance(name, str)}
    loaded = {name for operation, name in instructions if operation in ("LOAD_GLOBAL", "LOAD_NAME")}
    values = [scope[name] for name in sorted(loaded & scope.keys())]
    values += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    values += _imported_inside(instructions, scope.get("__package__"))
    entered = set()
    # The loop itself appends the attributes of modules to `values`.
    for value in values:
        if not isinstance(value, ModuleType):
            yield value
        elif _is_module_of_user(value.__name__) and value.__name__ not in entered:
            entered.add(value.__name__)
            values += [vars(value)[name] for name in sorted(names & vars(value).keys())]


def _imported_inside(instructions: list[Instruction], package: str | None) -> list[ModuleType]:
    """Return the modules that a function imports in its body.

    An import consists of three instructions: push the level of a relative import, push the names, and import.
    """
    modules = []
    for (_, level), (operation, name) in zip(instructions, instructions[2:], strict=False):
        if operation == "IMPORT_NAME":
            with suppress(Exception):  # imports may raise any exception
                modules.append(import_module("." * level + name, package))
    return modules


def _instructions(code: CodeType) -> list[Instruction]:
    """Return the instructions of code and of its inner functions, without line numbers and docstrings."""
    # In Python 3.11, `argval` of KW_NAMES lacks the names of keyword arguments, but `co_consts` has them.
    instructions = [
        (step.opname, code.co_consts[step.arg or 0] if step.opname == "KW_NAMES" else step.argval)
        for step in dis.get_instructions(code)
    ]
    # A class body sets an attribute, such as its docstring, by two instructions: load a value, then store it.
    dropped = set[int]()
    for place, (operation, name) in enumerate(instructions):
        if operation == "STORE_NAME" and name in WRITTEN_BY_PYTHON:
            dropped |= {place - 1, place}
    kept = [step for place, step in enumerate(instructions) if place not in dropped]
    inner = [step for _, value in kept if isinstance(value, CodeType) for step in _instructions(value)]
    form = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x3FF)
    return [(form, code.co_varnames), ("except", code.co_exceptiontable), *kept, *inner]


def _is_module_of_user(name: str) -> bool:
    """Return whether a module belongs to the user, not to Python, this package or an installed package."""
    top = str(name).partition(".")[0]
    if top == "__main__":  # in a worker process, it has the file of the library that started the process
        return True
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
    if top == PACKAGE.name or not (file or module is None):  # built in
        return False
    return is_of_user(Path(file))


def _without_address(value: Any) -> str:
    return repr(value).partition(" at 0x")[0]
