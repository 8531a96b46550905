"""The exceptions that users are meant to see."""


class InputError(ValueError):
    """A user's value cannot be used: one sentence with value, reason and allowed values.

    The command line prints it without a traceback and exits with status 2.
    """


class OutOfReach(InputError):
    """A method cannot reach the budget on this model: in a sweep that is a row, not a failure."""
