"""Tables that stay readable at 80 columns and in a pipe."""

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 120
"""Columns where nobody looks at the width: in a file, a pipe, a test."""


def console() -> Console:
    """Return a console on standard output, as wide as the terminal, or PIPE_WIDTH where there is none."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def table(title: str | None, first: str, *numbers: str) -> Table:
    """Return an empty table: one column of names, then columns of numbers whose headings fold rather than vanish."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    made.add_column(first, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", overflow="fold")
    return made
