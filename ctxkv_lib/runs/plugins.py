"""Plug-ins: classes and functions of the user that replace parts of the method.

A configuration names a plug-in as `module:Name`, with its settings and, if it is not of this package, a
digest of its source: a run with other code is another run.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import UserError
from .sources import own_code, source_digest

# `method.model.Parts` and `runs.rows` describe what each hook is given and returns.
HOOKS = ("block", "loss", "attention", "mixer")
WITH_CONTEXTS = ("block", "loss", "attention")  # hooks that have no effect with a mixer
given: dict[str, Any] = {}  # what a notebook or script has passed itself, by name, and by name and source
digested: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # parts, with `own_code` and the digest of then


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
            _check(part)
            name = f"{part.__module__}:{part.__qualname__}"
            given[name] = part
            part = name
        elif "<" not in part:  # as a lambda or a class within a function has, which no module holds
            given.pop(part, None)  # a name is of what its module has now, reloaded or defined anew
        found = load(part)
        source = source_digest(found)
        digested[found] = own_code(found), source
        if part in given:
            given[part + source] = found  # stays, if a loop makes others of the same name
        return cls(part, source, settings_of(found, {}))


def settings_class(part: Any) -> Any:
    """Return the dataclass of a plug-in's settings; None if it has no settings."""
    return getattr(part, "Settings", None)


def settings_of(part: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plug-in, none if it has no `Settings`, with these values, as JSON holds them.

    Raises:
        UserError: they cannot be made, or JSON cannot hold them.
    """
    kind = settings_class(part)
    if kind is None:
        return {}
    try:
        made = dataclasses.asdict(kind(**values))
        made = {each.name: made[each.name] for each in dataclasses.fields(kind) if each.init}
        if taken := {"plugin", "source"} & made.keys():  # of `to_dict`
            raise UserError(f"{kind.__qualname__} has a field {min(taken)!r}; give it another name.")
        return json.loads(json.dumps(made))
    except TypeError as error:
        raise UserError(
            f"{kind.__qualname__} holds no settings ({error}); make it a dataclass whose fields have "
            "defaults that JSON can hold."
        ) from None


def _check(part: Any) -> None:
    if not (inspect.isclass(part) or inspect.isfunction(part)):
        raise UserError(
            f"An object of type {type(part).__name__} is no plug-in; give a class or a function, or "
            "package.module:Name."
        )


def load(name: str) -> Any:
    """Return the class or function `module:Name`.

    Raises:
        UserError: there is none.
    """
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise UserError(f"{name!r} names no plug-in; write package.module:Name.")
    if name in given:
        return given[name]
    try:
        found = attrgetter(path)(import_module(module))
    except (Exception, SystemExit) as error:  # whatever a user's module raises as it is imported
        is_code = not isinstance(error, ImportError | AttributeError | ValueError)
        why = f"{type(error).__name__}: {error}" if is_code else error
        where = (
            "run the cell that defines it" if module == "__main__" else "check the name and the Python path"
        )
        raise UserError(
            f"The plug-in {name} cannot be loaded ({why}); {'correct its file' if is_code else where}."
        ) from None
    _check(found)
    return found


def loaded(plugin: PlugIn) -> Any:
    """Return the class or function of a configuration, after a check of its source.

    Raises:
        UserError: it is gone, or was changed.
    """
    found = given.get(plugin.name + plugin.source) or load(plugin.name)
    code, source = digested.get(found, ([], None))
    if source == plugin.source and [*map(id, code)] == [*map(id, own_code(found))]:
        return found  # whatever its run has changed since
    if source_digest(found) != plugin.source:
        raise UserError(
            f"The source of {plugin.name} is not what the run was made with; restore it, or make a new run."
        )
    return found


def refuse_changed(plugin: PlugIn) -> None:
    """Refuse a plug-in, a UserError, if it computes something else than when its configuration was made."""
    try:
        source = source_digest(loaded(plugin))
    except UserError:  # `loaded` says so where it matters; of an edited file, what was imported is trained
        return
    if source != plugin.source:
        raise UserError(
            f"What {plugin.name} uses has changed since its configuration was made; make another one."
        )


def built(plugin: PlugIn) -> Any:
    """Return the plug-in as a constructor that takes shapes, with its settings bound if it has any."""
    kind = loaded(plugin)
    settings = getattr(kind, "Settings", None)
    return kind if settings is None else partial(kind, settings=settings(**plugin.settings))
