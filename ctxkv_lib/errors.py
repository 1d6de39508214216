"""The one exception that means "the user can fix this"; the command line shows it as a sentence."""


class UserError(ValueError):
    """Bad input or an unreachable resource: what was wrong, what is allowed, what to do next."""
