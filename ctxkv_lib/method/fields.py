"""Settings that carry their unit, reason and allowed values, from which they are checked and listed."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """Which values a setting takes: in words, and as a test."""

    text: str
    holds: Callable[[Any], bool]


ANY = Allowed("any", lambda value: True)
POSITIVE = Allowed("more than 0", lambda value: value > 0)
SHARE = Allowed("0 to 1", lambda value: 0 <= value <= 1)
RATE = Allowed("more than 0, at most 1e30", lambda value: 0 < value <= 1e30)  # beyond, a step overflows
WEIGHT = Allowed("0 to 1e30", lambda value: 0 <= value <= 1e30)


def at_least(least: float) -> Allowed:
    return Allowed(f"{least} or more", lambda value: value >= least)


def setting(default: Any, reason: str, allowed: Allowed | Mapping[str, str] = ANY, unit: str = "") -> Any:
    """A field of a dataclass of settings: its default, and what it is for, or why it is what it is.

    `allowed` are its values; a mapping names them and says what each means. `unit` is what it counts.
    """
    meanings = allowed if isinstance(allowed, Mapping) else {}
    named = Allowed(", ".join(meanings), lambda value: value in tuple(meanings))
    known = allowed if isinstance(allowed, Allowed) else named
    metadata = {"reason": reason, "unit": unit, "allowed": known, "meanings": meanings}
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config: Any, concern: str) -> None:
    """Raise ValueError if a setting of a dataclass is not allowed; None is, where the field's type has it."""
    for known in dataclasses.fields(config):
        value, allowed = getattr(config, known.name), known.metadata["allowed"]
        may_be_none = types.NoneType in typing.get_args(known.type)
        try:
            holds = (value is None and may_be_none) or allowed.holds(value)
        except TypeError:  # it is no number
            holds = False
        require(holds, f"{concern}.{known.name}", value, allowed.text)


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")
