"""What the commands share: the console, plain lines, quiet libraries, errors a user can mend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape

from safeopt.models import cause_of

console = Console(stderr=True)


def say(text: str) -> None:
    """Print text as it is: not wrapped, so that it can be copied, and without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """What the user can mend is one sentence, not a traceback; Ctrl-C is one, not silence."""
    try:
        yield
    except KeyboardInterrupt:
        end("stopped", "at once, by Ctrl-C", status=130)
    except (ValueError, OSError, FloatingPointError) as error:
        end("error", str(error), status=2)
    except torch.cuda.OutOfMemoryError as error:
        end(
            "error",
            f"the device has no memory left ({cause_of(error)}); a smaller --batch-size, a smaller "
            "--max-length or fewer --examples take less",
            status=2,
        )


def end(word: str, text: str, *, status: int) -> NoReturn:
    """Say on stderr, behind a word in red, why a command ends, and end it with this status."""
    console.print(f"[red]{word}:[/] {escape(text)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status) from None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What transformers and peft tell each other is not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Show that models and data are loaded, without transformers' own bars and notes."""
    with console.status(what):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        yield
