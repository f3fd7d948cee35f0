"""The one exception that means "the user can mend this": shown as one line, exit code 2."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was found, what is allowed and what to do."""
