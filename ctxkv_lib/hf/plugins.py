"""Parts of a model by name: `module:Name` of a class that replaces a published part.

In a model folder, which loads without this package, `NAMED` is filled in by the file of the model.
"""

import ast
import hashlib
import inspect
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..method.model import Parts

NAMED: dict[str, Any] = {}  # by `key_of`: the classes in a saved folder, or those of this process's runs


def build_part(part: type, settings: Mapping[str, Any]) -> Any:
    """Return the constructor of a part: the class, with its `Settings` bound if it has any."""
    kind = getattr(part, "Settings", None)
    return part if kind is None else partial(part, settings=kind(**settings))


def parts_of(plugins: Mapping[str, Mapping[str, Any]]) -> Parts:
    """Find the parts of a model by their names; see `ContextKVConfig.plugins`."""
    return Parts(**{hook: build_part(named_part(each), each["settings"]) for hook, each in plugins.items()})


def named_part(plugin: Mapping[str, Any]) -> Any:
    """Return the class of one of `ContextKVConfig.plugins`: in a saved folder its own, else an imported one.

    Raises a ValueError if it is not in the folder, cannot be imported, or was changed since it was saved.
    """
    if part := NAMED.get(key_of(plugin)):
        return part
    name, source = plugin["plugin"], plugin.get("source")
    if not __name__.startswith("ctxkv_lib."):
        raise ValueError(f"The code of {name} is not in the folder of this model; save it with ctxkv_lib.")
    try:
        part = find(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} cannot be imported here ({error}); put its file on the Python path, or load the model "
            "where ctxkv_lib is not imported, with trust_remote_code=True."
        ) from None
    if source and file_digest(part) != source:
        raise ValueError(
            f"The file of {name} is not what the model was saved with; restore it, or load the run with "
            "ctxkv_lib.load_trained."
        )
    return part


def key_of(plugin: Mapping[str, Any]) -> str:
    return plugin["plugin"] + plugin.get("source", "")


def file_digest(part: Any) -> str:
    """Digest the file of a class, but for comments and layout; empty for code of this package."""
    if part.__module__.startswith("ctxkv_lib."):
        return ""
    code = Path(inspect.getfile(part)).read_text(encoding="utf-8")
    return hashlib.sha256(ast.unparse(ast.parse(code)).encode()).hexdigest()[:12]


def find(name: str) -> Any:
    """Import `module:Name`; raises ImportError or AttributeError if it is not there."""
    module, _, path = name.partition(":")
    return attrgetter(path)(import_module(module))
