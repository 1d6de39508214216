"""Plug-ins: a user's classes and functions that replace parts of the method.

A configuration stores a plug-in as a name (`module:Name`), the plug-in's settings and a digest of its code.
The name alone does not identify the code, since each run of a notebook cell defines a new `__main__:Block`.
So `PlugIn.of` computes a digest of the class or function in memory (`code_digest`), and keeps the class or
function in `_given`, by name and digest. The digest is used in two places: `runs.inputs.settings_table` lists
it among the inputs of a stage, and `runs.names.run_folder_of` makes it a part of the folder's name. A later
process has only the name and the digest. `PlugIn.load` then imports the name and refuses code with a
different digest. If the Python version differs, or if the code belongs to this package, `PlugIn.load` only
prints a message, since the results may well be the same.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from ..errors import UserError
from ..files import source_digest
from ..method.objective import TENSORS, asked_tensors
from ..progress import log


@dataclass(frozen=True)
class Hook:
    """A part of the method that a plug-in can replace."""

    help: str  # help text of the option
    # The arguments with which the plug-in is called to make a module.
    arguments: tuple[str, ...]
    # Whether the plug-in makes a module of the model. If so, `ContextKV.part` returns that module.
    is_module: bool
    # The function that checks the plug-in before training, as `module:name`.
    trial: str


_CHECKS = "ctxkv_lib.plugins.checks:"
# `method.block.Block`, `method.objective` and `method.layer.Layer` document what plug-ins take and return.
# If a loss is a function that computes the loss itself, it is not called with the arguments listed here.
HOOKS = {
    "block": Hook("your own ContextBlock", ("context_dim", "hidden_size"), True, f"{_CHECKS}try_block"),
    "loss": Hook("your own Phase 1 loss", ("context_dim", "hidden_size"), False, f"{_CHECKS}try_loss"),
    "layer": Hook("your own layer, all that Phase 2 trains", ("config",), True, f"{_CHECKS}try_layer"),
}
# Hooks for Phase 1. If the layer reads tokens, there is no Phase 1, so these hooks cannot be used.
OF_PHASE_1 = ("block", "loss")
READS = ("contexts", "tokens")  # what a layer may read
OF_PACKAGE, TUNED = "ctxkv_lib.", "ctxkv_lib.method.tuned:"
# Suffix for the name of a plug-in that is an object. It stands for the values in the object.
BOUND = "(...)"
# The plug-ins that this process was given, by name and digest.
# A notebook cell may have redefined the name since then.
_given: dict[tuple[str, str], Any] = {}
# Maps a plug-in's digest after training to its digest before, for plug-ins that modify their own state.
_digest_before: dict[str, str] = {}


@dataclass(frozen=True)
class PlugIn:
    """A plug-in in a configuration."""

    # `module:Name`, or `module:Name(...)` for an object, which exists only in this process.
    name: str
    # Python's version and a digest of the code. For code of this package, "package" replaces the version.
    code: str = ""
    # The values of the plug-in's `Settings`. Without `Settings`, the dict is empty.
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"plugin": self.name, "code": self.code, **self.settings}

    @classmethod
    def of(cls, part: Any, hook: str = "") -> "PlugIn":
        """Make a plug-in with default settings. `part` is a class, a function, or a name `module:Name`.

        A loss may also be another callable, such as a `functools.partial`, but not a module. Raises a
        UserError if `part` is anything else, if it does not take the arguments of its hook, or if a layer
        reads neither contexts nor tokens.
        """
        name, part = (part, imported(part)) if isinstance(part, str) else (None, part)
        is_loss = hook == "loss" and callable(part) and not hasattr(part, "forward")
        if not (_is_defined(part) or is_loss):
            raise UserError(
                f"An object of type {type(part).__name__} is not a plug-in; give a class or a function, or "
                "package.module:Name."
            )
        name = name or _name_of(part)
        plugin = cls(name, _code_of(name, part), settings_of(part, {}))
        _given[name, plugin.code] = part
        if hook:
            plugin._refuse_other_hook(hook)
        if hook == "layer" and plugin.reads not in READS:
            allowed = " or ".join(map(repr, READS))
            raise UserError(f"{name} has reads = {plugin.reads!r}; allowed: {allowed}.")
        return plugin

    def _refuse_other_hook(self, hook: str) -> None:
        """Raise a UserError if the plug-in cannot be called with the arguments of the hook."""
        part, names, is_module = self.load(), HOOKS[hook].arguments, HOOKS[hook].is_module
        settings = {} if getattr(part, "Settings", None) is None else {"settings": None}
        kind = _class_in(part)
        is_made = is_module or kind is not None
        if is_made and not (_fits(part, names, settings) and (is_module or hasattr(kind, "forward"))):
            allowed = "a class or function" if is_module else "a function, or an nn.Module class,"
            called = ", ".join([*names, *settings])
            raise UserError(
                f"{self.name} is not a {hook}: a {hook} is {allowed} that is called with ({called}). Is it "
                f"meant for another of {', '.join(HOOKS)}?"
            )
        if not is_module:
            self._refuse_other_tensors(self.build() if kind is None else partial(kind.forward, None))

    def _refuse_other_tensors(self, compute: Any) -> None:
        """Raise a UserError if Phase 1 cannot call `compute`, i.e. a loss or `forward` of a loss class."""
        asked = asked_tensors(compute)
        if not _fits(compute, () if asked else TENSORS[:1], dict.fromkeys(asked)):
            raise UserError(
                f"{self.name} takes {inspect.signature(compute)}, but a loss is given "
                f"{', '.join(TENSORS)} by these names, or the contexts alone by any name; rename its "
                "parameters, or give the others a default."
            )

    @property
    def reads(self) -> Any:
        """Return what a layer reads: "contexts" (the default) or "tokens"."""
        return getattr(self.load(), "reads", READS[0])

    def load(self) -> Any:
        """Return the class or function. Raises a UserError if it no longer exists or has changed."""
        if (self.name, self.code) not in _given:
            self.require_same_code()
        return self._part()

    def _part(self) -> Any:
        key = (self.name, self.code)
        return _given[key] if key in _given else imported(self.name)

    def require_same_code(self) -> None:
        """Raise a UserError if the plug-in's code, or code it uses, has changed since the run was made."""
        code = _code_of(self.name, self._part())
        if code == self.code:
            return
        version, version_before = (text.partition("-")[0] for text in (code, self.code))
        if version == version_before != "package":
            raise UserError(
                f"The code of {self.name}, or what it uses, is not what the run was made with; restore it or "
                "make a new run."
            )
        other = "different code of this package" if version == version_before else "a different Python"
        log(f"The run was made with {other}: {self.name} may compute something different here.")

    def build(self) -> Any:
        """Return the class or function. If there are settings, they are bound to the argument `settings`."""
        part = self.load()
        kind = getattr(part, "Settings", None)
        return partial(part, settings=kind(**self.settings)) if kind else part

    def make(self, *arguments: Any) -> Any:
        """Make the plug-in's module. Raises a UserError if the result is not a `torch.nn.Module`."""
        from torch import nn

        module = self.build()(*arguments)
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.name} makes a {type(module).__name__}; it must make a torch.nn.Module.")
        return module

    def objective(self, model: Any) -> Any:
        """Return the loss that Phase 1 minimises: a function, or a new module on the model's device."""
        if _class_in(self.load()) is None:
            return self.build()
        return self.make(model.config.context_dim, model.config.hidden_size).to(model.device)

    def keep_code(self) -> None:
        """Keep the digest from before training, even if training has modified the plug-in's own state."""
        _digest_before[_code_of(self.name, self.load())] = self.code


def _is_defined(part: Any) -> bool:
    return inspect.isclass(part) or inspect.isfunction(part)


def _class_in(part: Any) -> Any:
    """Return the class if `part` is a class or a `functools.partial` of a class; otherwise return None."""
    kind = part.func if isinstance(part, partial) else part
    return kind if inspect.isclass(kind) else None


def _fits(function: Any, arguments: Sequence[str], named: Mapping[str, Any]) -> bool:
    """Return whether a function takes these arguments. If it has no signature, return True."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


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
            f"{kind.__qualname__} cannot hold settings ({error}); make it a dataclass whose fields have "
            "defaults that JSON can hold."
        ) from None
    if reserved := settings.keys() & {"plugin", "code"}:
        raise UserError(f"{kind.__qualname__} has a setting named {min(reserved)}; give it another name.")
    return settings


def _code_of(name: str, part: Any) -> str:
    if name.startswith(OF_PACKAGE) and not name.endswith(BOUND):
        return f"package-{source_digest(name.partition(':')[0].removeprefix(OF_PACKAGE))}"
    # The import is here because `code_digest` imports torch, which is slow.
    from .code_digest import code_digest

    code = f"{sys.version_info.major}.{sys.version_info.minor}-{code_digest(part)}"
    return _digest_before.get(code, code)


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
