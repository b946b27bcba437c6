"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one plain sentence: the value, and what would be right.

    Commands print it without a traceback and exit with code 2.
    """
