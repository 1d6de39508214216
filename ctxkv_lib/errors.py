"""The one exception that means "the user can fix this": shown as a sentence, never as a traceback."""


class UserError(ValueError):
    """Bad input or an unreachable resource. The message says what was wrong, what is allowed and what to do."""
