"""The one exception that is the user's to mend."""


class UserError(Exception):
    """What the user gave is wrong: one line saying where, what was found and what to write instead.

    Entry points print it without a traceback and exit with 2; every other exception is a bug of ours.
    """
