"""DeepSpeed ZeRO 1 and 2.

The engine keeps the optimizer's float32 numbers as flat vectors, of which every rank has a range,
and the model's weights whole, in the dtype that it trains in. `protect` attaches a `SafetyGeometry`
to the engine's optimizer: safety passes run on the model's weights; all else (coordinates, the map
after a step, restoring) works on each rank's own float32 numbers, which are then copied to the
model's weights as the engine does after a step::

    engine, *_ = deepspeed.initialize(model=model, optimizer=AdamW(...), config=config)
    optimizer = protect(engine, probe)
    for batch in loader:
        engine.backward(engine(**batch).loss)
        engine.step()
    optimizer.restore()
    engine.save_checkpoint(folder)

With Trainer, `safeopt.integrations.trainer.protect` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safeopt.distributed import Layout, Range, master_of, set_master
from safeopt.integrations.versions import require
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.groups import check_groups, is_protected, largest_learning_rate
from safeopt.optim.measurement import Measurement
from safeopt.optim.protection import (
    OnRefreshError,
    all_finite,
    check_policy,
    not_finite,
    report,
)
from safeopt.optim.safeguard import config_of
from safeopt.optim.state import check_state, load_state, pack_state
from safeopt.probe import SafetyProbe

_KEY = "safeopt"


def protect(
    engine: Any,
    probe: SafetyProbe,
    *,
    on_refresh_error: OnRefreshError = "raise",
    **options: Any,
) -> Any:
    """Protect the parameters that an engine under ZeRO 1 or 2 trains. All ranks call it.

    Args:
        engine: what ``deepspeed.initialize`` returned; it has taken no step yet. Its optimizer may
            be any that DeepSpeed takes; groups with ``protect=False`` are left as they are.
        probe: the safety examples; its model is ``engine.module``.
        on_refresh_error: ``"raise"``, or ``"warn"`` to train on without protection where a refresh
            or a gradient fails, see `safeopt.optim.protection`.
        **options: fields of `SafetyConfig`: ``rank``, ``mode``, ``damping``, ``budget``, ….

    Returns:
        The engine's optimizer, now with the attribute ``safety`` (its `SafetyGeometry`) and the
        method ``restore()``; call that before ``engine.save_checkpoint``. The protection travels in
        the engine's checkpoints; where a second engine trains the same model on, with the same
        ranks and groups, ``continue_from(safety)`` takes over the first one's. Without
        ``elastic`` there is no ``safety.coupling``: the engine clears the gradients in the step.
        ``engine.destroy()`` leaves an ordinary model, without the protection.

    Raises:
        ImportError: if DeepSpeed is missing or too old.
        TypeError: if ``engine`` is none, shards in another way (``offload_optimizer``,
            ``round_robin_gradients``, …), or an option is unknown.
        ValueError: if it is protected already, nothing is left to protect, the probe's model is
            another one, or an option is out of its range.

    Cost: as `ProjectedAdamW`, of whose basis each rank keeps its part; after every step the
    model's weights are gathered once more.
    """
    require("deepspeed")
    check_policy(on_refresh_error)
    zero = _optimizer_of(engine)
    geometry = SafetyGeometry(probe, config_of(options))
    check_groups(zero)
    groups = [i for i, group in enumerate(zero.param_groups) if is_protected(group)]
    params = [p for i in groups for p in zero.bit16_groups[i]]
    if not params:
        raise ValueError("engine: no parameter is left to protect; all groups have protect=False")
    probe.layout(params)  # are they the model's?
    if geometry.active:
        for i in groups:
            for p in zero.bit16_groups[i]:
                set_master(p, _Master(p, zero, zero.single_partition_of_fp32_groups[i]))
        probe.divide(zero.dp_process_group)
    protection = _Protection(zero, geometry, groups, params, on_refresh_error)
    zero.safety, zero.restore = geometry, protection.restore
    zero.continue_from = protection.continue_from
    if geometry.active:
        zero.step, zero.destroy = protection.step, protection.destroy
        zero.state_dict, zero.load_state_dict = protection.state_dict, protection.load_state_dict
    return zero


def _optimizer_of(engine: Any) -> Any:
    """The engine's ZeRO optimizer.

    Raises:
        TypeError: if it is not one of stage 1 or 2, or not all of its numbers are on the device, or
            it is not known which of them are a parameter's.
        ValueError: if it is protected already.
    """
    if not hasattr(engine, "zero_optimization_stage"):
        raise TypeError(
            f"engine={type(engine).__name__}: expected the engine that deepspeed.initialize returns"
        )
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage not in (1, 2):
        raise TypeError(f"engine: ZeRO stage {stage} cannot be protected; use stage 1 or 2")
    if not hasattr(zero, "bit16_groups"):
        raise TypeError(
            f"engine: with grad_accum_dtype fp32 and bfloat16 weights stage 1 has a "
            f"{type(zero).__name__}, which cannot be protected; use stage 2"
        )
    if zero.round_robin_gradients:
        raise TypeError(
            "engine: with round_robin_gradients DeepSpeed mistakes which float32 numbers are which "
            "parameter's; leave it out"
        )
    if getattr(zero, "cpu_offload", False):
        raise TypeError(
            "engine: offload_optimizer keeps the numbers on the host, where the safety directions "
            "would have to be as well; leave it out"
        )
    alone = dist.get_world_size(zero.dp_process_group) == dist.get_world_size()
    if engine.has_moe_layers or zero.sequence_parallel_size > 1 or not alone:
        raise TypeError(
            "engine: expert, tensor, sequence and pipeline parallelism cannot be protected; train "
            "with data-parallel ranks alone"
        )
    if hasattr(zero, "safety"):
        raise ValueError("engine: it is protected already; call protect once")
    return zero


class _Master:
    """This rank's range of a parameter's float32 numbers, see `safeopt.distributed.Master`.

    Args:
        p: the parameter.
        zero: the engine's optimizer.
        flat: this rank's numbers of all parameters of its group. Views of it are made anew each
            time: DeepSpeed moves it (``offload_states``), and makes and drops its own views.
    """

    def __init__(self, p: Any, zero: Any, flat: Tensor) -> None:
        start, length, first = 0, 0, 0
        if p._hp_mapping is not None:  # else other ranks have all of it
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            start, length, first = here.start, here.numel, there.start
        self.range = Range(start, length, p.shape)
        self.group = zero.dp_process_group
        self.publish = zero.update_lp_params
        self._flat = flat
        self._first = first

    def values(self) -> Tensor:
        return self._flat.detach().narrow(0, self._first, self.range.length)


def _gradient(p: Any) -> Tensor:
    """This rank's range of a parameter's gradient; a copy, for the engine's step clears it."""
    if p._hp_mapping is None:  # other ranks have all of it
        return torch.empty(0, dtype=torch.float32, device=p.device)
    found: Tensor = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
    return found.detach().flatten().to(torch.float32, copy=True)


class _Protection:
    """What takes the place of a ZeRO optimizer's own methods."""

    def __init__(
        self,
        zero: Any,
        geometry: SafetyGeometry,
        groups: list[int],
        params: list[Any],
        on_refresh_error: OnRefreshError,
    ) -> None:
        self._zero = zero
        self._geometry = geometry
        self._groups = groups
        self._params = params
        self._masters = [master_of(p) for p in params]
        self._policy = on_refresh_error
        self._own_step, self._own_state = zero.step, zero.state_dict
        self._own_load, self._own_destroy = zero.load_state_dict, zero.destroy

    def step(self, closure: None = None) -> None:
        """The engine's step, then the map and, where it is time, a refresh."""
        rate = largest_learning_rate(self._zero)  # a hook of the step may set the next one
        moves = rate > 0 and self._accepts()
        if moves:
            self._geometry.before_step(self._params)
        pulls = moves and self._geometry.pull is not None
        gradients = [_gradient(p) for p in self._params] if pulls else None
        scale = self._zero.loss_scale
        self._own_step(closure)
        if not moves or self._zero.overflow:  # with an overflow of float16 nothing has moved
            return
        if gradients is not None:
            self._unscale(gradients, scale)
        try:
            self._geometry.after_step(self._params, rate, gradients=gradients)
        except Exception as error:
            report(error, self._policy)

    def _unscale(self, gradients: Sequence[Tensor], scale: float) -> None:
        """Divide them by the loss scale and clip them, in place, as the engine's step has done."""
        limit = self._zero.clip_grad
        if limit > 0:
            scale *= max(1.0, (float(self._zero._global_grad_norm) + 1e-6) / limit)
        for gradient in gradients:
            gradient.div_(scale)

    def restore(self) -> Measurement:
        """See `ProjectedAdamW.restore`. All ranks call it."""
        with torch.inference_mode(False):
            return self._geometry.restore(self._params)

    def destroy(self) -> None:
        """The engine's end: the optimizer moves the parameters no more, and another one may."""
        for p, master in zip(self._params, self._masters, strict=True):
            if master_of(p) is master:  # not a later engine's
                set_master(p, None)
        self._own_destroy()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the engine's checkpoint."""
        return {**self._own_state(), _KEY: pack_state(self._geometry)}

    def load_state_dict(
        self,
        state_dict_list: Sequence[Mapping[str, Any]] | None,
        load_optimizer_states: bool = True,
        **options: Any,
    ) -> None:
        """Load a checkpoint of all ranks; without optimizer states the protection is none of it.

        Raises:
            ValueError: if it carries no protection, or one that does not fit; masters and geometry
                are as before, but the engine has loaded the model's weights.
        """
        state: Any = None
        if load_optimizer_states:
            rank = dist.get_rank(self._zero.dp_process_group)
            state = None if state_dict_list is None else state_dict_list[rank].get(_KEY)
            if state is None:
                raise ValueError(
                    f'checkpoint: it has no "{_KEY}" entry; it was saved by an unprotected '
                    "engine, or converted to a universal one, and the alignment loss before "
                    "fine-tuning is not known. Start from the aligned model, or from a checkpoint "
                    "of a protected run"
                )
            check_state(state, self._params, self._geometry)
        self._own_load(state_dict_list, load_optimizer_states=load_optimizer_states, **options)
        if state is not None:
            load_state(self._geometry, state, self._params)

    def continue_from(self, geometry: SafetyGeometry) -> None:
        """Go on from the state of another engine that has trained the same parameters."""
        state = pack_state(geometry)
        check_state(state, self._params, self._geometry)
        load_state(self._geometry, state, self._params)

    def _accepts(self) -> bool:
        """Whether the step's gradients can be protected, as `protection` decides it elsewhere."""
        if self._zero.dtype == torch.float16:
            return True  # the engine looks itself, skips the step and lowers the loss scale
        gradients = [g for i in self._groups for g in self._zero.averaged_gradients[i]]
        layout = Layout.of(self._params)
        if not layout.any(not all_finite(gradients), self._params[0].device):
            return True
        if self._policy == "raise":  # the next gradients may be added to those that are there
            self._zero.zero_grad()
            for i in self._zero.averaged_gradients:
                self._zero.averaged_gradients[i] = None
        report(not_finite(), self._policy)
        return False
