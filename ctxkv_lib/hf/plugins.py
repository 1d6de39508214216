"""Parts of a model by name: `module:Name` of a class that replaces a published part.

In a model folder, which loads without this package, `NAMED` in this file is filled in.
"""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from ..method.model import Parts

NAMED: dict[str, Any] = {}  # the classes in a saved folder


def build_part(part: type, settings: Mapping[str, Any]) -> Any:
    """Return the constructor of a part: the class, with its `Settings` bound if it has any."""
    kind = getattr(part, "Settings", None)
    return part if kind is None else partial(part, settings=kind(**settings))


def parts_of(plugins: Mapping[str, Mapping[str, Any]]) -> Parts:
    """Find the parts of a model by their names; see `ContextKVConfig.plugins`."""
    return Parts(
        **{hook: build_part(named_part(each["plugin"]), each["settings"]) for hook, each in plugins.items()}
    )


def named_part(name: str) -> Any:
    """Return the class `module:Name` from the saved folder, or import it."""
    return NAMED.get(name) or find(name)


def find(name: str) -> Any:
    """Import `module:Name`; raises ImportError or AttributeError if it is not there."""
    module, _, path = name.partition(":")
    return attrgetter(path)(import_module(module))
