"""Snapshot: a training run as it stands after a step, kept in memory and put back exactly.

It holds what decides how the run goes on: the optimizer's parameters, the model's buffers, the
optimizer's state (with the safety geometry of a protected one), schedulers and whatever else has a
``state_dict``, and all random states. It does not hold the data's position: batches that were used
are not used again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safeopt.optim.schedule_free import is_schedule_free

# Where schedulers keep rates: in the optimizer's groups, and as numbers or lists of them in
# themselves. "eps" is the smallest change of a rate that ReduceLROnPlateau makes; "_init_lrs" is
# where transformers' GreedyLR starts again.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_RATES = (
    "base_lrs", "_last_lr", "_init_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min", "eps",
)  # fmt: skip


class Stateful(Protocol):
    """A scheduler, a `GradScaler`, a sampler, …: anything whose state can be put back."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Continue from a state."""


class Snapshot:
    """A copy of a run's state.

    Args:
        model: whose buffers are kept.
        optimizer: whose parameters and state are kept; a `SafetySAM` is seen unperturbed.
        others: schedulers and the like.

    Memory: the trained parameters and the optimizer's state once more, on their devices: three
    numbers a parameter for AdamW, and the basis of a protected optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, others: Sequence[Stateful] = ()
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._others = list(others)
        with unperturbed(optimizer):
            self._params = _copies(_parameters(optimizer))
            self._homes = [(module, dict(module._buffers)) for module in model.modules()]
            self._buffers = _copies(list(model.buffers()))
            self._state = copy.deepcopy(optimizer.state_dict())
            self._other_states = [copy.deepcopy(x.state_dict()) for x in self._others]
        self._random = _random_state()

    @property
    def fits(self) -> bool:
        """Whether the optimizer has the parameters that it had; of others nothing is kept."""
        return [*map(id, _parameters(self._optimizer))] == [id(p) for p, _ in self._params]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit; gradients are cleared. It can be called repeatedly.

        Raises:
            RuntimeError: if the optimizer was given other parameters since; nothing is changed.
        """
        if not self.fits:
            raise RuntimeError(
                "optimizer: its parameters are not those of the snapshot, which has nothing to put "
                "back for the others; make one after add_param_group"
            )
        with unperturbed(self._optimizer):
            self._optimizer.zero_grad()
            for module, named in self._homes:
                module._buffers.update(named)  # some modules put another tensor in its place
            for tensor, saved in (*self._params, *self._buffers):
                tensor.copy_(saved)
            self._optimizer.load_state_dict(copy.deepcopy(self._state))
            self._undo_casts()
            for other, state in zip(self._others, self._other_states, strict=True):
                other.load_state_dict(copy.deepcopy(state))
        _set_random_state(self._random)

    def _undo_casts(self) -> None:
        """Loading casts state to the parameter's dtype, Adafactor's float32 to bfloat16."""
        for index, p in enumerate(_parameters(self._optimizer)):
            for name, saved in self._state["state"].get(index, {}).items():
                loaded = self._optimizer.state[p]
                if isinstance(saved, Tensor) and saved.dtype != loaded[name].dtype:
                    loaded[name] = saved.clone()


def lower_learning_rate(optimizer: Optimizer, others: Sequence[Stateful], factor: float) -> None:
    """Multiply the learning rate, now and in every scheduler's plan.

    Schedulers compute rates from the last one, and from base, largest and smallest rates that they
    and the groups keep; all of these are multiplied, so that the whole remaining schedule is.

    Args:
        optimizer: its groups' rates.
        others: the schedulers among them have ``_last_lr``; nested ones are found.
        factor: positive.
    """
    # All are computed before one is written: groups may share the tensor that holds their rate.
    lowered = [
        (group, name, group[name] * factor)
        for group in optimizer.param_groups
        for name in _GROUP_RATES
        if name in group
    ]
    for group, name, rate in lowered:
        if isinstance(rate, Tensor):
            group[name].copy_(rate)
        else:
            group[name] = rate
    for scheduler in _schedulers(others):
        for name in _RATES:
            kept = getattr(scheduler, name, None)
            if isinstance(kept, (list, tuple)):
                setattr(scheduler, name, [rate * factor for rate in kept])
            elif kept is not None:
                setattr(scheduler, name, kept * factor)


@contextmanager
def unperturbed(optimizer: Optimizer) -> Iterator[None]:
    """The parameters of a `SafetySAM` are θ inside; nothing changes for other optimizers."""
    if hasattr(optimizer, "unperturbed"):
        with optimizer.unperturbed():
            yield
    else:
        yield


@contextmanager
def deployed(optimizer: Optimizer) -> Iterator[None]:
    """The parameters are those that would be saved; outside they are as before, bit for bit.

    That is θ for `SafetySAM`, and the average for schedule-free optimizers.
    """
    if not is_schedule_free(optimizer) or not optimizer.param_groups[0]["train_mode"]:
        with unperturbed(optimizer):
            yield
        return
    params = _copies(_parameters(optimizer))
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for p, copy_ in params:  # the way there and back leaves a rounding error
                p.copy_(copy_)


@contextmanager
def undrawn() -> Iterator[None]:
    """What is drawn at random inside is not missed outside: all random states are as before."""
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copies(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _schedulers(candidates: Sequence[Any]) -> Iterator[Any]:
    """All schedulers, also those inside of others."""
    for candidate in candidates:
        inner = getattr(candidate, "_schedulers", None)  # SequentialLR, ChainedScheduler
        if inner is None:
            inner = [candidate.scheduler] if hasattr(candidate, "scheduler") else []  # Accelerate's
        yield from _schedulers(inner)
        if hasattr(candidate, "_last_lr") and not hasattr(candidate, "scheduler"):
            yield candidate


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global state is what is to be kept
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
