"""Plug-ins: a user's classes and functions that replace parts of the method.

A configuration stores a plug-in as a name (`module:Name`), the plug-in's settings and a digest of its code.
The name alone does not identify the code, since each run of a notebook cell defines a new `__main__:Block`. A
plug-in that this process was given holds the class or function itself. A later process has only the name and
the digest: `PlugIn.part` then imports the name and refuses code with a different digest. If the Python
version differs, it only prints a message, since the results may well be the same.

The digest is one of the inputs of the steps that use the plug-in (`runs.plan`), and a part of the name of the
run folder. The parts of recipe `tuned` belong to this package, so their code is covered by the package's own
versions of results.
"""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from ..errors import UserError
from ..progress import log


@dataclass(frozen=True)
class Kind:
    """A part of the method that a plug-in can replace. `checks.TRIALS` has a trial for each kind.

    Attributes:
        help: help text of the option.
        is_module: whether the plug-in makes a module of the model.
    """

    help: str
    is_module: bool


# `method.block.Block`, `method.objective` and `method.layer.Layer` document what plug-ins take and return.
KINDS = {
    "block": Kind("your own ContextBlock", is_module=True),
    "loss": Kind("your own Phase 1 loss", is_module=False),
    "layer": Kind("your own layer, all that Phase 2 trains", is_module=True),
}
PHASE1_KINDS = ("block", "loss")  # kinds that have no effect if the layer reads tokens
PACKAGE_PREFIX, TUNED = "ctxkv_lib.", "ctxkv_lib.method.tuned:"
# Suffix for the name of a plug-in that is an object. It stands for the values in the object.
BOUND = "(...)"


@dataclass(frozen=True)
class PlugIn:
    """A plug-in in a configuration.

    Attributes:
        name: `module:Name`, or `module:Name(...)` for an object, which exists only in this process.
        code: Python's version and a digest of the code. It is empty for parts of this package.
        settings: the values of the plug-in's `Settings`, or {} if it has none.
        given: the class, function or object, or None if only its name is known.
    """

    name: str
    code: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    given: Any = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"plugin": self.name, "code": self.code, **self.settings}

    @classmethod
    def of(cls, part: Any, kind: str = "") -> "PlugIn":
        """Make a plug-in with default settings. `part` is a class, a function, or a name `module:Name`.

        A loss may also be another callable, such as a `functools.partial`, but not a module. Raises a
        UserError if `part` is anything else.
        """
        name, part = (part, imported(part)) if isinstance(part, str) else (None, part)
        is_loss = kind == "loss" and callable(part) and not hasattr(part, "forward")
        if not (_is_defined(part) or is_loss):
            raise UserError(
                f"An object of type {type(part).__name__} is not a plug-in; give a class or a function, or "
                "package.module:Name."
            )
        name = name or _name_of(part)
        return cls(name, _code_of(name, part), settings_of(part, {}), part)

    @property
    def reads_tokens(self) -> bool:
        """Return whether this is a layer that reads tokens instead of contexts."""
        reads = getattr(self.part, "reads", "contexts")
        if reads not in ("contexts", "tokens"):
            raise UserError(f"reads of {self.name} is {reads!r}; allowed: contexts, tokens.")
        return bool(reads == "tokens")

    @cached_property
    def part(self) -> Any:
        """The class or function. Raises a UserError if it no longer exists or has changed since the run."""
        part = imported(self.name) if self.given is None else self.given
        self.require_same_code(part)
        return part

    def require_same_code(self, part: Any = None) -> None:
        """Raise a UserError if the plug-in's code, or code that it uses, has changed since the run."""
        code = _code_of(self.name, self.part if part is None else part)
        if code == self.code:
            return
        version, version_before = (text.partition("-")[0] for text in (code, self.code))
        if version == version_before:
            raise UserError(
                f"The code of {self.name}, or what it uses, is not what the run was made with; restore it or "
                "make a new run."
            )
        log(f"The run was made with a different Python: {self.name} may compute something different here.")

    def build(self) -> Any:
        """Return the class or function. If there are settings, they are bound to the argument `settings`."""
        kind = getattr(self.part, "Settings", None)
        return partial(self.part, settings=kind(**self.settings)) if kind else self.part

    def make(self, *arguments: Any) -> Any:
        """Make the plug-in's module. Raises a UserError if the result is not a `torch.nn.Module`."""
        from torch import nn

        module = self.build()(*arguments)
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.name} makes a {type(module).__name__}; it must make a torch.nn.Module.")
        return module

    def make_loss(self, model: Any) -> Any:
        """Return the loss that Phase 1 minimizes: a function, or a new module on the model's device."""
        part = self.part.func if isinstance(self.part, partial) else self.part
        if not inspect.isclass(part):
            return self.build()
        return self.make(model.config.context_dim, model.config.hidden_size).to(model.device)


def _is_defined(part: Any) -> bool:
    return inspect.isclass(part) or inspect.isfunction(part)


def _name_of(part: Any) -> str:
    """Return the name of a plug-in: `module:Name`, or `module:Name(...)` if the plug-in is an object.

    A `functools.partial` is named after its function. Any other object is named after its class.
    """
    if isinstance(part, partial):
        return _name_of(part.func).removesuffix(BOUND) + BOUND
    named = part if hasattr(part, "__qualname__") else type(part)
    # `__module__` may be wrong for a decorated function, since `functools.wraps` copies it.
    module = getattr(named, "__globals__", {}).get("__name__", named.__module__)
    return f"{module}:{named.__qualname__}{'' if _is_defined(part) else BOUND}"


def settings_of(part: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plug-in as a dict that JSON can hold, or {} if the plug-in has no `Settings`.

    `values` replace the defaults. Raises a UserError if a setting is invalid or cannot be written as JSON.
    """
    kind = getattr(part, "Settings", None)
    if kind is None:
        return {}
    try:
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(kind(**values))))
    except TypeError as error:
        raise UserError(
            f"{kind.__qualname__} cannot contain settings ({error}); make it a dataclass whose fields have "
            "defaults that JSON can hold."
        ) from None
    if reserved := settings.keys() & {"plugin", "code"}:
        raise UserError(f"{kind.__qualname__} has a setting named {min(reserved)}; give it another name.")
    return settings


def _code_of(name: str, part: Any) -> str:
    if name.startswith(PACKAGE_PREFIX) and not name.endswith(BOUND):
        return ""
    # The import is here because `code_digest` imports torch, which is slow.
    from .code_digest import code_digest

    return f"{sys.version_info.major}.{sys.version_info.minor}-{code_digest(part)}"


def imported(name: str) -> Any:
    """Import `module:Name`, and return the object. Raises a UserError if the name does not exist."""
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise UserError(f"{name!r} does not name a plug-in; write package.module:Name.")
    if path.endswith(BOUND):
        raise UserError(f"{name} is an object, which exists in one process only; give it again.")
    try:
        return attrgetter(path)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        where = "run the cell that defines it" if module == "__main__" else "check name and Python path"
        raise UserError(f"The plug-in {name} cannot be loaded ({error}); {where}.") from None


def short_name(plugin: str) -> str:
    """Return the name of a class or function without its module."""
    return str(re.findall(r"\w+", plugin)[-1])
