"""The error whose text is meant for a terminal: what was expected, what was found, what to do."""


class UserError(ValueError):
    """A mistake in what was asked. `command_line.run` prints its text alone and ends with status 2."""
