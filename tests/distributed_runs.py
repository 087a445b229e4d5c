"""What the processes of the distributed tests do: training runs that any layout must agree on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optimizer_table import OPTIMIZERS
from tiny_models import VOCAB, safety_batch, tiny_llama, trainable, with_lora
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM, safeguard
from safeopt.distributed import Layout, Range, set_master
from safeopt.optim.transaction import whole_or_not_at_all

EVERY = 6  # steps between two refreshes
RANK = 32
STEPS = 20
ROWS = 12  # of a batch of the task, over all ranks


def in_turn(tasks: list[tuple[Callable[..., Any], ...]]) -> list[Any]:
    """Several tasks in one set of processes: starting them costs more than most tasks."""
    return [function(*args) for function, *args in tasks]


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(model: nn.Module, replicas: int = 1) -> nn.Module:
    mesh = init_device_mesh("cpu", (ranks(),))
    if replicas > 1:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (replicas, ranks() // replicas), mesh_dim_names=names)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


LAYOUTS = {
    "one": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp": shard,
    "hsdp": partial(shard, replicas=2),
}


def protected(name: str, model: nn.Module, probe: SafetyProbe, **options: Any) -> Optimizer:
    # All of the window's directions: where the eigenvalues of a random model are cut off, rounding
    # decides which direction is kept, and the long steps of restoring magnify it.
    options = {"probe": probe, "rank": RANK, "refresh": RefreshPolicy.fixed(EVERY), **options}
    if name == "SafetySAM":  # that of the table does not perturb
        return SafetySAM(trainable(model), lr=1e-2, rho=0.1, **options)
    return OPTIMIZERS[name].protected(trainable(model), 1e-2, options)


def start(
    layout: str,
    name: str = "ProjectedAdamW",
    *,
    dtype: torch.dtype = torch.float64,
    lora: bool = False,
    **options: Any,
) -> tuple[nn.Module, Optimizer]:
    model = tiny_llama(dtype=dtype)
    if lora:  # of rank 2: one of three ranks has no part of A
        model = with_lora(model, rank=2)
    model = LAYOUTS[layout](model)
    batches = [safety_batch(), safety_batch(seed=1)]
    probe = SafetyProbe(model, batches, held=[safety_batch(seed=2)])
    return model, protected(name, model, probe, **options)


def task_loss(model: nn.Module, step: int) -> Tensor:
    """The task's loss at a step; each rank takes its rows of the same batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(4, VOCAB, (ROWS, 8), generator=generator)[rank() :: ranks()]
    logits = model(input_ids=ids).logits  # the model's own loss would be computed in float32
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def backward(model: nn.Module, step: int) -> None:
    """The task's gradient at a step."""
    task_loss(model, step).backward()


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def outcome(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What all layouts must agree on, and what each rank has done for it."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    safety = optimizer.safety
    return {
        "params": [whole(p) for p in model.parameters()],
        "losses": [(entry.alignment_loss, entry.restored_to or 0.0) for entry in safety.history],
        "passes": safety.passes.as_dict(),
        "parts": [len(p.to_local()) for p in trainable(model) if hasattr(p, "to_local")],
        "bytes": safety.subspace.basis.nbytes,
        "looped": len(safety.probe._looped),
    }


def run(layout: str, name: str = "ProjectedAdamW", options: dict[str, Any] | None = None) -> Any:
    model, optimizer = start(layout, name, **(options or {}))
    train(model, optimizer, 0, STEPS)
    return outcome(model, optimizer)


def run_swapped() -> Any:
    """As Accelerate does: the optimizer is made before the model is sharded."""
    model = tiny_llama(dtype=torch.float64)
    batches = [safety_batch(), safety_batch(seed=1)]
    probe = SafetyProbe(model, batches, held=[safety_batch(seed=2)])
    optimizer = protected("ProjectedAdamW", model, probe, elastic=0.5)
    names = {p: name for name, p in model.named_parameters()}
    shard(model)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[p]] for p in group["params"]]
    train(model, optimizer, 0, STEPS)
    return outcome(model, optimizer)


def save(folder: Path, layout: str, name: str, middle: int, options: dict[str, Any]) -> None:
    """A checkpoint after some steps, sharded and whole."""
    model, optimizer = start(layout, name, **options)
    train(model, optimizer, 0, middle)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    assert not any("safety_basis" in state for state in optimizer.state.values())
    states = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank() == 0:
        torch.save(states, folder / "whole.pt")


def resume(folder: Path, layout: str, name: str, middle: int, options: dict[str, Any]) -> Any:
    """The run from the sharded checkpoint on."""
    model, optimizer = start(layout, name, **options)
    before = [whole(p) for p in model.parameters()]
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    # torch has just called step() with zero gradients and lr=0.
    assert optimizer.safety.subspace is None
    assert optimizer.safety.passes.forward == 0
    assert all(torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    assert not any("safe" in key for group in optimizer.param_groups for key in group)
    assert not any("safety_basis" in state for state in optimizer.state.values())
    return _to_the_end(model, optimizer, middle)


def resume_whole(folder: Path, name: str, middle: int, options: dict[str, Any]) -> Any:
    """The run from the whole checkpoint on, by nothing but the optimizer's own method."""
    model, optimizer = start("one", name, **options)
    model_state, state = torch.load(folder / "whole.pt", weights_only=True)
    model.load_state_dict(model_state)
    optimizer.load_state_dict(state)
    return _to_the_end(model, optimizer, middle)


def _to_the_end(model: nn.Module, optimizer: Optimizer, middle: int) -> Any:
    if hasattr(optimizer, "train"):
        optimizer.train()
    train(model, optimizer, middle, STEPS)
    return outcome(model, optimizer)


class Collectives(TorchDispatchMode):
    """Records every collective that a process takes part in: its name and the bytes it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            sent = args[1] if "allgather" in name else args[0]
            tensors = [sent] if isinstance(sent, Tensor) else list(sent)
            self.calls.append((name, sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


def traffic(layout: str) -> dict[str, Any]:
    """Collectives inside of ``step()``, for each step after the first one; k is that of its U."""
    model, optimizer = start(layout, elastic=0.5)
    train(model, optimizer, 0, 1)
    steps = []
    for step in range(1, 2 * EVERY + 1):
        safety = optimizer.safety
        k, seen = safety.subspace.rank, safety.rota.drawn + safety.rota.held_drawn
        backward(model, step)
        with Collectives() as collectives:
            optimizer.step()
        steps.append(
            {
                "k": k,
                "after": safety.subspace.rank,
                "examples": safety.rota.drawn + safety.rota.held_drawn - seen,
                "calls": collectives.calls,
            }
        )
        optimizer.zero_grad()
    return {"steps": steps, "numbers": sum(p.numel() for p in trainable(model))}


class OnTokens(nn.Module):
    """A layer that works on a list of tokens, which does not say whose tokens they are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).view_as(x)


def gradients_of(prepare: Callable[[nn.Module], None]) -> dict[str, Any]:
    """Gradients of a sharded model and what looking at them leaves behind, beside a plain one."""
    plain, model = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    for each in (plain, model):
        prepare(each)
    fully_shard(model.model.norm)  # what the hooks replay may itself be sharded
    fully_shard(model.model.embed_tokens)
    shard(model)
    probes = [SafetyProbe(each, [safety_batch()], micro_batch_size=3) for each in (plain, model)]
    backward(model, 0)
    before = [(p, p.grad, p.grad.to_local().clone()) for p in model.parameters()]
    params = [list(each.parameters()) for each in (plain, model)]
    parts = Layout.of(params[1]).parts
    gaps = []
    for _ in range(2):  # the second time without the check of the sum
        expected, found = (
            probe.per_example(own) for probe, own in zip(probes, params, strict=True)
        )
        for mine, all_of_it, part in zip(found.rows, expected.rows, parts, strict=True):
            gaps.append((mine - part.cut(all_of_it, leading=1)).abs().max() if mine.numel() else 0)
        gaps.append((found.losses - expected.losses).abs().max())
    total = [probe.gradient(own)[1] for probe, own in zip(probes, params, strict=True)]
    gaps += [(whole(b) - a).abs().max() for a, b in zip(*total, strict=True)]
    gaps.append((probes[1].values() - probes[0].values()).abs().max())
    return {
        "gap": max(float(gap) for gap in gaps),
        "same": all(
            p.grad is grad and torch.equal(grad.to_local(), value) for p, grad, value in before
        ),
        "owned": {id(p) for p in model.parameters()} == {id(p) for p, _, _ in before},
        "looped": len(probes[1]._looped),
    }


def untouched(model: nn.Module) -> None:
    """No preparation."""


def with_token_layer(model: nn.Module) -> None:
    model.model.layers[0].mlp = OnTokens(model.model.layers[0].mlp)


def written_after_evaluation() -> tuple[float, float]:
    """A forward pass leaves whole weights in place; what is written to the parts is seen after it.

    Returns:
        How far the safety losses move by the writing, and how far they are from a plain model's.
    """
    model, optimizer = start("fsdp")
    train(model, optimizer, 0, 2)
    safety, params = optimizer.safety, optimizer.param_groups[0]["params"]
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.no_grad():
        model(input_ids=ids)
        optimizer.restore()
        before = safety.probe.values()
        model(input_ids=ids)
        safety.subspace.shift(params, torch.full((safety.subspace.rank,), 0.1))
        after = safety.probe.values()
    plain = tiny_llama(dtype=torch.float64)
    plain.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
    expected = SafetyProbe(plain, [safety_batch(), safety_batch(seed=1)]).values()
    return float((after - before).abs().max()), float((after - expected).abs().max())


def not_finite_on_one_rank() -> tuple[str, bool]:
    """A gradient that overflows in one rank's part stops the step on all ranks."""
    model, optimizer = start("fsdp")
    train(model, optimizer, 0, 1)
    before = [whole(p) for p in model.parameters()]
    backward(model, 1)
    if rank() == 1:
        next(model.parameters()).grad.to_local()[0] = torch.inf
    message = failure(optimizer.step)
    return message, all(
        torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True)
    )


class Masters:
    """Copies of whole weights, which are brought back into them by all ranks together."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.copies = [p.detach().flatten().clone() for p in params]
        for p, copy in zip(params, self.copies, strict=True):
            set_master(p, Master(p, copy, self.publish))

    def publish(self) -> None:
        dist.monitored_barrier(timeout=timedelta(seconds=5))
        with torch.no_grad():
            for p, copy in zip(self.params, self.copies, strict=True):
                p.copy_(copy.view_as(p))


class Master:
    def __init__(self, p: Tensor, copy: Tensor, publish: Callable[[], None]) -> None:
        self.range = Range(0, p.numel(), p.shape)
        self.group = dist.group.WORLD
        self.publish = publish
        self._copy = copy

    def values(self) -> Tensor:
        return self._copy


def failed_on_one_rank() -> tuple[str, bool]:
    """A refresh that fails on the first rank alone, after all have moved the parameters."""
    model, optimizer = start("one", dtype=torch.float32)
    train(model, optimizer, 0, 1)
    safety, params = optimizer.safety, trainable(model)
    masters = Masters(params)
    before = [p.detach().clone() for p in (*params, *masters.copies)]
    safety.subspace.basis.layout = Layout.of(params)

    def refresh() -> None:
        with whole_or_not_at_all(safety, params) as before_move:
            before_move()
            safety.subspace.shift(params, torch.ones(safety.subspace.rank))
            if rank() == 0:
                raise RuntimeError("in the middle")

    return failure(refresh), all(map(torch.equal, before, (*params, *masters.copies)))


def failure(action: Callable[[], Any]) -> str:
    """The error that an action raises, as text."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    """What each layout that is not supported raises."""
    found = {}
    for basis in ("int8", "factored", "compressed"):
        model, optimizer = start("fsdp", basis=basis)
        backward(model, 0)
        found[basis] = failure(optimizer.step)
    model = tiny_llama()
    fully_shard(model.model.layers[0])
    probe = SafetyProbe(model, [safety_batch()])
    optimizer = safeguard(SGD(model.parameters(), lr=0.1), probe, trial_examples=1)
    backward(model, 0)
    found["partly"] = failure(optimizer.step)
    flat = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
    found["fsdp1"] = failure(lambda: ProjectedAdamW(
        flat.parameters(), probe=SafetyProbe(flat, [safety_batch()])
    ))  # fmt: skip
    model = tiny_llama()  # as Accelerate does it: wrapped after probe and optimizer were made
    optimizer = protected("ProjectedAdamW", model, SafetyProbe(model, [safety_batch()] * 2))
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    backward(flat, 0)
    found["fsdp1 later"] = failure(optimizer.step)
    model, optimizer = start("fsdp")
    found["factored gradients"] = failure(
        lambda: optimizer.safety.probe.factored(trainable(model), [0])
    )
    mesh = init_device_mesh("cpu", (ranks(), 1))
    tensor = distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0), Shard(1)])
    found["tensor parallel"] = failure(lambda: Layout.of([nn.Parameter(tensor)]))
    return found
