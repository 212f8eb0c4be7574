"""Exceptions that end a run with one line and no traceback."""


class UserError(Exception):
    """What the user gave is wrong: one line saying where, what was found and what to write instead.

    Entry points print it without a traceback and exit with 2; every exception but these two is a bug of ours.
    """


class RunError(Exception):
    """The run cannot go on, and nobody made a mistake that could be named beforehand; all ranks raise it together.

    Entry points print it without a traceback and exit with 1.
    """
