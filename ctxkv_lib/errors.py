"""The one kind of error that the command line shows as a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Bad input or an unreachable resource: what was wrong, what is allowed, what to do next."""


class DamagedFile(UserError):
    """A file is not what was written; whoever can make it again does, others let the user read this."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be used: {reason}; run what made it once more to make it anew.")
        self.path, self.reason = path, reason


@contextmanager
def values_of_user() -> Iterator[None]:
    """Inside, values come from the user: a ValueError about one of them is a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
