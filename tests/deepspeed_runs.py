"""What the processes of the DeepSpeed tests do."""

from __future__ import annotations

import contextlib
import io
import math
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed_runs import EVERY, RANK, ROWS, STEPS, in_turn, rank, ranks, task_loss, whole
from tiny_models import safety_batch, tiny_llama, trainable, with_lora

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, safeguard

RATE = 1e-2
MIDDLE = 9
CLIP = 1.0  # some steps' gradients are longer
EXAMPLES = Path(__file__).parents[1] / "examples"


def without_compiling(tasks: list[tuple[Callable[..., Any], ...]]) -> list[Any]:
    """`in_turn`, without a collective that DeepSpeed would compile first."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return in_turn(tasks)


def model_and_probe(lora: bool = False) -> tuple[Any, SafetyProbe]:
    model = tiny_llama()
    if lora:
        model = with_lora(model, rank=2)
    batches = [safety_batch(), safety_batch(seed=1)]
    return model, SafetyProbe(model, batches, held=[safety_batch(seed=2)])


def groups_of(model: Any, partly: bool = False) -> list[dict[str, Any]]:
    """As Trainer makes them: matrices decay, vectors do not; these may be left unprotected."""
    params = trainable(model)
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.01},
        {
            "params": [p for p in params if p.dim() < 2],
            "weight_decay": 0.0,
            "protect": not partly,
        },
    ]


def options(lora: bool = False) -> dict[str, Any]:
    elastic = 0.0 if lora else 0.5
    return {"rank": RANK, "refresh": RefreshPolicy.fixed(EVERY), "elastic": elastic}


def rate_of(lora: bool) -> float:
    # Adam's first steps of an adapter divide by gradients of next to nothing: what rounding makes
    # of them is as long as the rate.
    return RATE / 4 if lora else RATE


def engine_of(
    model: Any, stage: int, partly: bool = False, *, rate: float = RATE, **config: Any
) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": ROWS // ranks(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # it clips at 1 by default
        **config,
    }
    optimizer = torch.optim.AdamW(groups_of(model, partly), lr=rate)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def started(
    stage: int,
    lora: bool = False,
    partly: bool = False,
    half: bool = False,
    **more: Any,
) -> tuple[Any, Any]:
    from safeopt.integrations.deepspeed import protect

    model, probe = model_and_probe(lora)
    engine = engine_of(model, stage, partly, rate=rate_of(lora), bf16={"enabled": half})
    return engine, protect(engine, probe, **options(lora), **more)


def train(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(task_loss(engine, step))
        engine.step()


def run(stage: int, lora: bool = False, partly: bool = False) -> dict[str, Any]:
    engine, optimizer = started(stage, lora, partly)
    train(engine, 0, STEPS)
    return outcome(engine.module, optimizer)


def clipped(stage: int) -> dict[str, Any]:
    """Some gradients are clipped."""
    from safeopt.integrations.deepspeed import protect

    model, probe = model_and_probe()
    engine = engine_of(model, stage, gradient_clipping=CLIP)
    optimizer = protect(engine, probe, **options())
    train(engine, 0, STEPS)
    return outcome(engine.module, optimizer)


def run_one(lora: bool = False, partly: bool = False, clip: float = math.inf) -> dict[str, Any]:
    """The same in one process, without DeepSpeed."""
    model, probe = model_and_probe(lora)
    base = torch.optim.AdamW(groups_of(model, partly), lr=rate_of(lora))
    optimizer = safeguard(base, probe, **options(lora))
    for step in range(STEPS):
        task_loss(model, step).backward()
        if clip < math.inf:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model, optimizer)


def outcome(model: Any, optimizer: Any) -> dict[str, Any]:
    safety = optimizer.safety
    return {
        "params": [whole(p) for p in model.parameters()],
        "losses": [(entry.alignment_loss, entry.restored_to or 0.0) for entry in safety.history],
        "tokens": safety.passes.backward_tokens,
        "bytes": safety.subspace.basis.nbytes,
        "looped": len(safety.probe._looped),
        "coupling": safety.coupling,
    }


def save(folder: Path, stage: int, middle: int) -> None:
    """A checkpoint after some steps."""
    engine, optimizer = started(stage)
    train(engine, 0, middle)
    optimizer.restore()
    engine.save_checkpoint(folder)


def resume(folder: Path, stage: int, middle: int) -> dict[str, Any]:
    """The run from the checkpoint on."""
    engine, optimizer = started(stage)
    engine.load_checkpoint(folder)
    return _to_the_end(engine, optimizer, middle)


def uninterrupted(stage: int, middle: int) -> dict[str, Any]:
    engine, optimizer = started(stage)
    train(engine, 0, middle)
    optimizer.restore()
    return _to_the_end(engine, optimizer, middle)


def _to_the_end(engine: Any, optimizer: Any, middle: int) -> dict[str, Any]:
    train(engine, middle, STEPS)
    optimizer.restore()
    return outcome(engine.module, optimizer)


def half(stage: int) -> dict[str, Any]:
    """Weights in bfloat16."""
    engine, optimizer = started(stage, half=True)
    before = [whole(p) for p in engine.module.parameters()]
    train(engine, 0, STEPS)
    after = [whole(p) for p in engine.module.parameters()]
    moved = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    return {**outcome(engine.module, optimizer), **consistent(engine), "moved": moved}


def consistent(engine: Any) -> dict[str, Any]:
    """Whether weights are their masters, rounded, and how far c is from where the map puts it."""
    safety = engine.optimizer.safety
    params = list(engine.module.parameters())
    c = safety.subspace.basis.coordinates(safety.spanned) - safety.subspace.anchor
    return {
        "rounded": [torch.equal(p.get_full_hp_param().to(p.dtype), p) for p in params],
        "outside": float(c.norm()),
    }


def with_a_group_unprotected() -> dict[str, Any]:
    return run(2, partly=True)


def not_finite_on_one_rank(policy: str = "raise") -> dict[str, Any]:
    """A gradient of the last rank alone overflows at the second step."""
    engine, optimizer = started(2, on_refresh_error=policy)
    train(engine, 0, 1)
    before = [p.get_full_hp_param() for p in engine.module.parameters()]
    loss = task_loss(engine, 1)
    engine.backward(loss * (float("inf") if rank() == ranks() - 1 else 1.0))
    found: dict[str, Any] = {"error": None, "warning": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            engine.step()
        except FloatingPointError as error:
            found["error"] = f"{type(error).__name__}: {error}"
    said = [str(w.message) for w in caught if str(w.message).startswith("safeopt")]
    after = [p.get_full_hp_param() for p in engine.module.parameters()]
    return {
        **found,
        "warning": said[0] if said else None,
        "unmoved": all(map(torch.equal, before, after)),
        "steps": optimizer.safety.step_count,
    }


def not_finite_but_warned() -> dict[str, Any]:
    return not_finite_on_one_rank("warn")


def skipped_batch() -> dict[str, Any]:
    """The same, of float32 sums of bfloat16 gradients; training goes on with the next batch."""
    from safeopt.integrations.deepspeed import protect

    model, probe = model_and_probe()
    sums = {"grad_accum_dtype": "fp32"}
    engine = engine_of(model, 2, bf16={"enabled": True}, data_types=sums)
    optimizer = protect(engine, probe, **options())
    engine.backward(task_loss(engine, 0) * float("inf"))
    found: dict[str, Any] = {"error": None}
    try:
        engine.step()
    except FloatingPointError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    train(engine, 1, 3)
    return {**found, **consistent(engine), "steps": optimizer.safety.step_count}


def hooked() -> float | None:
    """The rate of a step after which a hook of the base optimizer has set another one."""
    engine, optimizer = started(2)

    def lower(base: torch.optim.Optimizer, *args: Any) -> None:
        for group in base.param_groups:
            group["lr"] /= 2

    optimizer.optimizer.register_step_post_hook(lower)
    train(engine, 0, 1)
    rate: float | None = optimizer.safety.last_rate
    return rate


def offloaded() -> dict[str, Any]:
    """DeepSpeed makes its views anew, and then moves what they were of."""
    engine, optimizer = started(2)
    train(engine, 0, MIDDLE)
    states = [optimizer.state_dict()] * ranks()
    optimizer.load_state_dict(states, load_from_fp32_weights=True)
    engine.offload_states()
    engine.reload_states()
    train(engine, MIDDLE, STEPS)
    return outcome(engine.module, optimizer)


def destroyed() -> dict[str, bool]:
    """Whether the parameters have masters: of a later engine, and after the last one's end."""
    from safeopt.integrations.deepspeed import protect

    first, optimizer = started(1)
    model, probe = first.module, optimizer.safety.probe
    second = engine_of(model, 2)
    protect(second, probe, **options())
    first.destroy()
    later = probe.layout(trainable(model)).sharded
    second.destroy()
    return {"later": later, "at the end": probe.layout(trainable(model)).sharded}


def failed_refresh() -> dict[str, Any]:
    """A refresh that fails on all ranks after it has moved the parameters."""
    engine, optimizer = started(2, half=True)
    train(engine, 0, EVERY - 1)
    safety = optimizer.safety
    rebase = type(safety.subspace).rebase

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    type(safety.subspace).rebase = fail
    try:
        train(engine, EVERY - 1, EVERY)
    except RuntimeError as error:
        found: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
    type(safety.subspace).rebase = rebase
    found |= consistent(engine)
    # The exception left the engine in the middle of its own step: it has not cleared its gradients.
    optimizer.zero_grad()
    train(engine, EVERY, EVERY + 2)
    steps = [entry.step for entry in safety.history]
    return {**found, "after": steps}


def refusals(folder: Path) -> dict[str, str]:
    """What is said where an engine cannot be protected."""
    from safeopt.integrations.deepspeed import protect

    model, probe = model_and_probe()
    engine = engine_of(model, 2)
    other, its_probe = model_and_probe()
    bare = engine_of(other, 0)
    exempt = torch.nn.Linear(2, 2)
    free = engine_of(exempt, 1, partly=True)
    free.optimizer.param_groups[0]["protect"] = False
    mixed, its_order = model_and_probe()
    turns = engine_of(mixed, 2, zero_optimization={"stage": 2, "round_robin_gradients": True})
    low, its_sums = model_and_probe()
    sums = {"grad_accum_dtype": "fp32"}
    bf16 = engine_of(low, 1, bf16={"enabled": True}, data_types=sums)
    long, its_sequences = model_and_probe()
    ulysses = engine_of(long, 2)
    ulysses.optimizer.sequence_parallel_size = 2
    inside, inside_probe = model_and_probe()
    cases: dict[str, Callable[[], Any]] = {
        "no engine": lambda: protect(exempt, probe),
        "stage 0": lambda: protect(bare, its_probe),
        "round robin": lambda: protect(turns, its_order),
        "bfloat16 optimizer": lambda: protect(bf16, its_sums),
        "sequences": lambda: protect(ulysses, its_sequences),
        "another model": lambda: protect(engine, its_probe),
        "option": lambda: protect(engine, probe, ranks=3),
        "policy": lambda: protect(engine, probe, on_refresh_error="stop"),
        "nothing left": lambda: protect(free, probe),
        "engine in a probe": lambda: SafetyProbe(engine, [safety_batch()]),
        "ours inside": lambda: _step_of_ours(inside, inside_probe),
        "plain checkpoint": lambda: _from_a_plain_checkpoint(engine, probe, folder),
        "twice": lambda: protect(engine, probe),
    }
    said = {}
    for case, do in cases.items():
        try:
            do()
        except (TypeError, ValueError) as error:
            said[case] = f"{type(error).__name__}: {error}"
    return said


def _step_of_ours(model: Any, probe: SafetyProbe) -> None:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    ours = ProjectedAdamW(model.parameters(), probe=probe)
    engine = deepspeed.initialize(model=model, optimizer=ours, config=settings)[0]
    train(engine, 0, 1)


def _from_a_plain_checkpoint(engine: Any, probe: SafetyProbe, folder: Path) -> None:
    from safeopt.integrations.deepspeed import protect

    engine.save_checkpoint(folder)
    protect(engine, probe, **options())
    engine.load_checkpoint(folder)


def example(folder: Path) -> set[str]:
    """The example, run to its end; the names of what it leaves."""
    os.environ["SAFEOPT_TINY"] = "1"
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = ["deepspeed_zero.py", "--out", str(folder / "example")]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(EXAMPLES / "deepspeed_zero.py"), run_name="__main__")
    return {path.name for path in (folder / "example").iterdir()}
