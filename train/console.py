"""Print sentences to a console."""

from contextlib import suppress

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a text as it is: rich neither wraps a path at the terminal's width nor takes its brackets for markup.

    Work goes on without a reader: a closed terminal raises OSError, and rich turns a closed pipe into SystemExit.
    """
    with suppress(SystemExit, OSError):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
