"""The base class of all errors that a user can cause."""


class UserError(ValueError):
    """Invalid input; its one or two lines say what is wrong, where, and what to do.

    The command line prints it without a traceback; every other exception keeps its traceback.
    """
