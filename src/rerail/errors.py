"""The one exception that users are meant to see."""


class InputError(ValueError):
    """A user's value cannot be used: one sentence with the value, the reason and the allowed values.

    The command line prints it without a traceback and exits with status 2.
    """
