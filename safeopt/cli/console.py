"""What the commands share: the console, plain lines, and errors that the user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

console = Console(stderr=True)


def say(text: str) -> None:
    """Print text as it is: not wrapped, so that it can be copied, and without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """What the user can mend is one sentence, not a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
