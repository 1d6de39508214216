"""Dataclass fields for settings. Each field has a unit, a reason and the allowed values.

Checks and lists of settings are built from this metadata.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """A description of the values that a setting may have, and a function that checks a value."""

    text: str
    check: Callable[[Any], bool]


ANY = Allowed("any", lambda value: True)
POSITIVE = Allowed("more than 0", lambda value: value > 0)
SHARE = Allowed("0 to 1", lambda value: 0 <= value <= 1)
# With a larger learning rate, an optimizer step would overflow.
RATE = Allowed("more than 0, at most 1e30", lambda value: 0 < value <= 1e30)
WEIGHT = Allowed("0 to 1e30", lambda value: 0 <= value <= 1e30)


def at_least(least: float) -> Allowed:
    return Allowed(f"{least} or more", lambda value: value >= least)


def setting(default: Any, reason: str, allowed: Allowed | Mapping[str, str] = ANY, unit: str = "") -> Any:
    """Return a dataclass field for one setting.

    Args:
        default: the default value.
        reason: the purpose of the setting, or the reason for its default.
        allowed: the allowed values, or a mapping from each allowed name to its meaning.
        unit: the unit of the value.
    """
    meanings = allowed if isinstance(allowed, Mapping) else {}
    named = Allowed(", ".join(meanings), lambda value: value in tuple(meanings))
    known = allowed if isinstance(allowed, Allowed) else named
    metadata = {"reason": reason, "unit": unit, "allowed": known, "meanings": meanings}
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config: Any, concern: str) -> None:
    """Raise ValueError if a setting has a value that is not allowed.

    None is allowed where the field's type includes None.
    """
    for known in dataclasses.fields(config):
        value, allowed = getattr(config, known.name), known.metadata["allowed"]
        may_be_none = types.NoneType in typing.get_args(known.type)
        try:
            is_allowed = (value is None and may_be_none) or allowed.check(value)
        except TypeError:  # the value is not a number
            is_allowed = False
        require(is_allowed, f"{concern}.{known.name}", value, allowed.text)


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")
