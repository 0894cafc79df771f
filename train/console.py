"""Print sentences to a console."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a text as it is: rich neither wraps a path at the terminal's width nor takes its brackets for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
