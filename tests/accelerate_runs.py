"""What the processes of the Accelerate tests do: a prepared loop that shards with FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_runs import STEPS, outcome, protected, rank, task_loss
from tiny_models import randomise, safety_batch, tiny_llama, with_lora

from safeopt import SafetyProbe

MIDDLE = 9
# The oldest versions that are tested do not have it yet.
HAS_FSDP2 = "fsdp_version" in FullyShardedDataParallelPlugin.__dataclass_fields__


def let_it_shard() -> None:
    """Accelerate shards on accelerators only: tell it that the processes of this group have some.

    All that follows is its own code, on CPUs.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerator(**options: Any) -> Accelerator:
    """Accelerate with FSDP2 in a process group."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    let_it_shard()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **options,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def train(
    name: str,
    options: dict[str, Any],
    plugin: dict[str, Any],
    *,
    save: Path | None = None,
    load: Path | None = None,
) -> Any:
    """Steps of a prepared loop; the optimizer and its probe are made before the model is sharded.

    Args:
        name: of the optimizer, see `distributed_runs.protected`.
        options: of the optimizer; ``lora`` of the model.
        plugin: of Accelerate's plugin.
        save: where to save a state after ``MIDDLE`` steps.
        load: where to continue from.
    """
    options = dict(options)
    model = tiny_llama(dtype=torch.float64)
    if options.pop("lora", False):
        model = with_lora(model, rank=2)
    if plugin.get("cpu_ram_efficient_loading") and rank():
        randomise(model.parameters())  # only the first process has read the weights
    probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=1)], held=[safety_batch(seed=2)])
    inner = protected(name, model, probe, **options)
    ours = accelerator(**plugin)
    prepared, optimizer = ours.prepare(model, inner)
    if load is not None:
        ours.load_state(str(load))
    optimizer.train()
    for step in range(0 if load is None else MIDDLE, STEPS):
        if save is not None and step == MIDDLE:
            optimizer.eval()
            ours.save_state(str(save))
            optimizer.train()
        ours.backward(task_loss(prepared, step))
        optimizer.step()
        optimizer.zero_grad()
    return {"sharded": type(prepared).__name__, **outcome(prepared, inner)}
