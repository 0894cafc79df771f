"""The exceptions that a user sees as one sentence instead of a stack trace."""


class UserError(Exception):
    """An error that the user can mend. The message says what was wrong, what was expected and what to do.

    The command line prints the message and exits with status `code`.
    """

    code = 2


class TemporaryError(UserError):
    """A fault that may be gone when the command is repeated: a host, process or network disk was lost.

    Its exit status is sysexits' EX_TEMPFAIL, and launch/slurm.sbatch queues the job again.
    """

    code = 75
