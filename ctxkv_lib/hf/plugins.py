"""Parts of a model by name: `module:Name` of a class that stands in the place of a published part.

A model folder has this file with `NAMED` filled in, since the folder loads without this package.
"""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from ..method.model import Parts

NAMED: dict[str, Any] = {}  # the classes that a saved folder carries


def build_part(part: type, settings: Mapping[str, Any]) -> Any:
    """Return what makes a part: the class itself, or with the settings that its `Settings` describe."""
    kind = getattr(part, "Settings", None)
    return part if kind is None else partial(part, settings=kind(**settings))


def parts_of(plugins: Mapping[str, Mapping[str, Any]]) -> Parts:
    """Find the parts of a model by their names; see `ContextKVConfig.plugins`."""
    return Parts(
        **{hook: build_part(named_part(each["plugin"]), each["settings"]) for hook, each in plugins.items()}
    )


def named_part(name: str) -> Any:
    """Return the class `module:Name`, of those that a saved folder carries or by importing it."""
    return NAMED.get(name) or find(name)


def find(name: str) -> Any:
    """Import `module:Name`; raises ImportError or AttributeError if it is not there."""
    module, _, path = name.partition(":")
    return attrgetter(path)(import_module(module))
