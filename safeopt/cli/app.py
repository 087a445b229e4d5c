"""The ``safeopt`` command with all its commands, one file each."""

from __future__ import annotations

import typer

from safeopt.cli.diagnose import diagnose
from safeopt.cli.finetune import finetune
from safeopt.cli.plan import plan
from safeopt.cli.profile import profile
from safeopt.cli.repair import repair

app = typer.Typer(
    help="Fine-tune an aligned language model without losing its alignment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(finetune)
app.command()(diagnose)
app.command()(profile)
app.command()(plan)
app.command()(repair)


@app.callback()
def _commands() -> None:
    """Fine-tune an aligned language model without losing its alignment."""
