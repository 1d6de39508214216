"""Parts of a model by name: `module:Name` of a class that stands in the place of a published part.

A model folder has this file with `NAMED` filled in, since the folder loads without this package.
"""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from ..method.model import Parts

NAMED: dict[str, Any] = {}  # the classes that a saved folder carries


def build_part(part: type, settings: Mapping[str, Any]) -> Any:
    """Return what makes a part: the class itself, or with the settings that its `Settings` describe."""
    kind = getattr(part, "Settings", None)
    return part if kind is None else partial(part, settings=kind(**settings))


def parts_of(plugins: Mapping[str, Mapping[str, Any]]) -> Parts:
    """Find the parts of a model by their names; see `ContextKVConfig.plugins`."""
    found = {}
    for hook, named in plugins.items():
        part = NAMED.get(named["plugin"]) or find(named["plugin"])
        found[hook] = build_part(part, named["settings"])
    return Parts(**found)


def find(name: str) -> Any:
    """Import `module:Name`; raises ImportError or AttributeError if it is not there."""
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
