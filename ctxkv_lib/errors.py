"""The one kind of error that the command line shows as a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input or an unreachable resource: what was wrong, what is allowed, what to do next."""


@contextmanager
def values_of_user() -> Iterator[None]:
    """Inside, values come from the user: a ValueError about one of them is a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
