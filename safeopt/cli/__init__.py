"""The command line: `safeopt.cli.app`, and one file a command; it needs the extra ``cli``."""

from __future__ import annotations

import logging
import sys

# What the extra brings, and a command imports.
_EXTRA = {
    "accelerate",
    "datasets",
    "gguf",
    "jinja2",
    "matplotlib",
    "peft",
    "rich",
    "transformers",
    "typer",
}


def main() -> None:
    """Entry point of the ``safeopt`` command."""
    # As it is imported, it looks for a faster CPU kernel on the hub and warns that there is none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from safeopt.cli.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        print(
            f"safeopt: the command line needs the package {package}, which is not installed; "
            'run: pip install "safeopt-torch[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(2) from None
