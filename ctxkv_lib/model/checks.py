"""Checks of a setting's value: each says in one sentence what was given and what is allowed.

They stand here because a saved model carries them; the other settings use them, too.
"""

from collections.abc import Iterable
from typing import Any


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    require(value in allowed, name, value, ", ".join(allowed))


def at_least(config: Any, concern: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{concern}.{name}", value, f"{least} or more")


def share(config: Any, concern: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{concern}.{name}", value, "0 to 1")
