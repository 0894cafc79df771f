"""The exception that a user sees as one sentence instead of a stack trace."""


class UserError(Exception):
    """An error that the user can mend. The message says what was wrong, what was expected and what to do.

    The command line prints the message and exits with status 2.
    """
