"""Which prompts the methods get: those that are nearest to the line between refusing and answering.

A probe of prompts that the model refuses firmly notices late that others are being lost; harmless
prompts that nobody would refuse hold nothing. All methods of a comparison, replay included, work
with the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from benchmarks.config import ALIGNED, ConfigError, RunConfig
from benchmarks.inference import Row, response_nll
from benchmarks.models import ADAPTER
from benchmarks.tasks import Material

FILE = "probe_losses.json"


def hardest(config: RunConfig, model: nn.Module, material: Material) -> Material:
    """The material with only the harmful prompts of the highest and harmless ones of lowest loss.

    Args:
        config: names the model and how many.
        model: before fine-tuning, in evaluation mode.
        material: its ``safety`` and ``harmless_refused`` are cut down.

    Raises:
        ConfigError: if the config asks for more than there are.
    """
    kinds = {"safety_prompts": material.safety, "held_prompts": material.harmless_refused}
    for name, rows in kinds.items():
        wanted = getattr(config, name)
        if wanted > len(rows):
            raise ConfigError(f"{name}={wanted}: there are only {len(rows)} such prompts")
    if config.model.name == ALIGNED:
        losses = json.loads((ADAPTER / FILE).read_text(encoding="utf-8"))
    else:
        losses = measured_losses(model, material.safety, material.harmless_refused)
    return replace(
        material,
        safety=_first(material.safety, [-x for x in losses["safety"]], config.safety_prompts),
        harmless_refused=_first(material.harmless_refused, losses["harmless"], config.held_prompts),
    )


def measured_losses(
    model: nn.Module, safety: Sequence[Row], harmless: Sequence[Row]
) -> dict[str, list[float]]:
    """Mean token loss of each prompt's refusal in nats, to four digits, by kind of prompt."""
    losses = {}
    for kind, rows in (("safety", safety), ("harmless", harmless)):
        sums, counts = response_nll(model, rows)
        losses[kind] = [round(value, 4) for value in (sums / counts).tolist()]
    return losses


def write_losses(losses: dict[str, list[float]], folder: Path) -> None:
    """Write losses beside the adapter that they belong to; `hardest` reads them."""
    (folder / FILE).write_text(json.dumps(losses) + "\n", encoding="utf-8")


def _first(rows: Sequence[Row], keys: Sequence[float], count: int) -> list[Row]:
    order = sorted(range(len(rows)), key=lambda i: keys[i])
    return [rows[i] for i in order[:count]]
