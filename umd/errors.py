"""The one exception a user sees as a sentence instead of a stack trace."""


class UserError(Exception):
    """Something the person running the command can mend: what was wrong, what was expected, what to do.

    The command line prints the message and exits with status 2.
    """
