"""Which safety prompts the methods get: those that the model refuses least firmly.

A probe of prompts that the model refuses firmly notices late that others are being lost. All
methods of a comparison, replay included, work with the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from benchmarks.config import ALIGNED, ConfigError, RunConfig
from benchmarks.inference import Row, response_nll
from benchmarks.models import ADAPTER

FILE = "probe_losses.json"


def hardest(config: RunConfig, model: nn.Module, rows: Sequence[Row]) -> list[Row]:
    """The rows with the highest loss before fine-tuning, as many as the config asks for.

    Args:
        config: names the model and the number.
        model: before fine-tuning, in evaluation mode.
        rows: harmful prompts of the probe's part with refusals.

    Raises:
        ConfigError: if the config asks for more than there are.
    """
    if config.safety_prompts > len(rows):
        raise ConfigError(
            f"safety_prompts={config.safety_prompts}: there are only {len(rows)} such prompts"
        )
    if config.model.name == ALIGNED:
        losses = json.loads((ADAPTER / FILE).read_text(encoding="utf-8"))
    else:
        losses = refusal_losses(model, rows)
    order = sorted(range(len(rows)), key=lambda i: -losses[i])
    return [rows[i] for i in order[: config.safety_prompts]]


def refusal_losses(model: nn.Module, rows: Sequence[Row]) -> list[float]:
    """Mean token loss of each row's refusal, in nats, to four digits after the point."""
    sums, counts = response_nll(model, rows)
    return [round(value, 4) for value in (sums / counts).tolist()]


def write_losses(losses: Sequence[float], folder: Path) -> None:
    """Write losses beside the adapter that they belong to; `hardest` reads them."""
    (folder / FILE).write_text(json.dumps(list(losses)) + "\n", encoding="utf-8")
