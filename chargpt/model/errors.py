"""The base class of all errors that a user can cause."""


class UserError(ValueError):
    """Invalid input, or a file or setting that cannot be used.

    The message says what is wrong, where, and what to do, in one or two lines. The command line
    prints it without a traceback; every other exception keeps its traceback.
    """
