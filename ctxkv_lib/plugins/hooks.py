"""Plug-ins: a user's classes and functions that replace parts of the method.

A configuration names a plug-in as `module:Name`, with its settings and the digest of its code. The name alone
does not identify the code: each run of a notebook cell defines another `__main__:Block`. So `PlugIn.of`
digests what the part computes with, as it is in memory (`code_digest`), and keeps the part itself in
`_given`, by name and digest. The digest is used in two places: `runs.inputs.settings_table` lists it among
the inputs of a stage, and `runs.names.run_folder_of` makes it a part of the folder's name. A later process
has only the name and the digest: `PlugIn.load` imports the name and refuses a part with a different digest.
With a different version of Python, or for a part of this package, it only prints a message, since the code
may well be the same.
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
    """A place where a user's part may replace a part of the method."""

    help: str  # help text of its command-line option
    arguments: tuple[str, ...]  # arguments of the class or function that makes the module
    is_module: bool  # whether the result is a part of the model, which `ContextKV.part` returns
    trial: str  # `module:name` of the function that tries the part before training


_CHECKS = "ctxkv_lib.plugins.checks:"
# `method.block.Block`, `method.objective` and `method.layer.Layer` document what each part takes and returns.
# A loss may also be a function, which is itself the objective and is not called with these arguments.
HOOKS = {
    "block": Hook("your own ContextBlock", ("context_dim", "hidden_size"), True, f"{_CHECKS}try_block"),
    "loss": Hook("your own Phase 1 loss", ("context_dim", "hidden_size"), False, f"{_CHECKS}try_loss"),
    "layer": Hook("your own layer, all that Phase 2 trains", ("config",), True, f"{_CHECKS}try_layer"),
}
OF_PHASE_1 = ("block", "loss")  # hooks that do not exist if the layer reads tokens
READS = ("contexts", "tokens")  # what a layer may read
OF_PACKAGE, TUNED = "ctxkv_lib.", "ctxkv_lib.method.tuned:"
BOUND = "(...)"  # the end of an object's name; an object holds values besides its code
# Parts that this process was given, by name and digest; a cell may since have redefined the name.
_given: dict[tuple[str, str], Any] = {}
# Maps a part's digest after training to its digest before, for parts that modify their own state.
_digest_before: dict[str, str] = {}


@dataclass(frozen=True)
class PlugIn:
    """One plug-in of a configuration."""

    name: str  # `module:Name`; for an object, which only this process has, it ends in `(...)`
    code: str = ""  # Python's version, or "package" for a part of this package, and the digest of the code
    settings: dict[str, Any] = field(default_factory=dict)  # the fields of its `Settings`, if it has any

    def to_dict(self) -> dict[str, Any]:
        return {"plugin": self.name, "code": self.code, **self.settings}

    @classmethod
    def of(cls, part: Any, hook: str = "") -> "PlugIn":
        """Make a plug-in with default settings from a class, a function, or its `module:Name`.

        A loss may be any callable that is not a module, such as a `functools.partial`. Raises a UserError for
        anything else, for a part that does not take the arguments of its hook, and for a layer that reads
        something unknown.
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
        """Raise a UserError if the part cannot be called with the arguments of the hook."""
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
        """Raise a UserError if Phase 1 cannot call a loss, or the `forward` of its class."""
        asked = asked_tensors(compute)
        if not _fits(compute, () if asked else TENSORS[:1], dict.fromkeys(asked)):
            raise UserError(
                f"{self.name} takes {inspect.signature(compute)}, but a loss is given "
                f"{', '.join(TENSORS)} by these names, or the contexts alone by any name; rename its "
                "parameters, or give the others a default."
            )

    @property
    def reads(self) -> Any:
        """Return what a layer reads, one of `READS`; the default is contexts."""
        return getattr(self.load(), "reads", READS[0])

    def load(self) -> Any:
        """Return the class or function; raises a UserError if it is gone or has changed."""
        if (self.name, self.code) not in _given:
            self.require_same_code()
        return self._part()

    def _part(self) -> Any:
        key = (self.name, self.code)
        return _given[key] if key in _given else imported(self.name)

    def require_same_code(self) -> None:
        """Raise a UserError if the code of the part, or code it uses, has changed since the run was made."""
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
        """Return the class or function, with its settings bound if it has any."""
        part = self.load()
        kind = getattr(part, "Settings", None)
        return partial(part, settings=kind(**self.settings)) if kind else part

    def make(self, *arguments: Any) -> Any:
        """Make the module; raises a UserError if the part makes something else."""
        from torch import nn

        module = self.build()(*arguments)
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.name} makes a {type(module).__name__}; it must make a torch.nn.Module.")
        return module

    def objective(self, model: Any) -> Any:
        """Return what Phase 1 of a model minimises: a function, or a new module on the model's device."""
        if _class_in(self.load()) is None:
            return self.build()
        return self.make(model.config.context_dim, model.config.hidden_size).to(model.device)

    def keep_code(self) -> None:
        """Keep the digest of the code, even if the plug-in has modified its own state in training."""
        _digest_before[_code_of(self.name, self.load())] = self.code


def _is_defined(part: Any) -> bool:
    return inspect.isclass(part) or inspect.isfunction(part)


def _class_in(part: Any) -> Any:
    """Return the class if a part is a class or a partial of a class; otherwise return None."""
    kind = part.func if isinstance(part, partial) else part
    return kind if inspect.isclass(kind) else None


def _fits(function: Any, arguments: Sequence[str], named: Mapping[str, Any]) -> bool:
    """Return whether a function takes these arguments; True if it has no signature (some C functions)."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _name_of(part: Any) -> str:
    """Return `module:Name`, followed by `(...)` for an object.

    A partial is named after its function, and any other object is named after its class.
    """
    if isinstance(part, partial):
        return _name_of(part.func).removesuffix(BOUND) + BOUND
    named = part if hasattr(part, "__qualname__") else type(part)
    # `wraps` copies names, so a decorated function belongs to its decorator's module.
    module = getattr(named, "__globals__", {}).get("__name__", named.__module__)
    return f"{module}:{named.__qualname__}{'' if _is_defined(part) else BOUND}"


def settings_of(part: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plug-in with the given values, in JSON's types; {} if it has no `Settings`.

    Raises a UserError if the settings are invalid or cannot be written as JSON.
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
    from .code_digest import code_digest  # imported here because it imports torch

    code = f"{sys.version_info.major}.{sys.version_info.minor}-{code_digest(part)}"
    return _digest_before.get(code, code)


def imported(name: str) -> Any:
    """Import `module:Name`; raises a UserError if it does not exist."""
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
