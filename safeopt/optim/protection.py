"""How a `SafetyGeometry` is attached to a torch optimizer: by the optimizer's own step hooks.

Nothing is wrapped: the optimizer keeps its class, its ``param_groups`` and its state, so
schedulers, `GradScaler`, Accelerate and checkpointing treat it as before. The geometry's state
travels in the optimizer's ``state_dict`` under the key ``"safety"``. The hooks, unlike a user's,
are also kept when the optimizer is copied or pickled: an optimizer that looks protected is.

**What is a step.** One that moves protected parameters. A step without any gradient, with every
protected learning rate zero, or one that a gradient scaler skips moves nothing, is not counted and
refreshes nothing.

**When something goes wrong** (``on_refresh_error``):

====================================  ===========================================================
in the first estimate                 raises, whatever the policy: nothing has been trained, and
                                      the aligned model cannot be measured later
task gradient not finite              ``"raise"``: FloatingPointError, before anything has changed
                                      ``"warn"``: the base optimizer's step alone, not counted
anything after the base optimizer's   ``"raise"``: the exception itself, at the state after this
step: a refresh, restoring            step without its refresh; training can go on from there
                                      ``"warn"``: the same state, one warning, no exception
====================================  ===========================================================

A refresh that failed is tried again after the next step.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from safeopt.curvature.bases import empty_basis
from safeopt.distributed import Layout, locals_of
from safeopt.optim.base_step import BaseStep
from safeopt.optim.elastic import ElasticPull
from safeopt.optim.estimate import basis_kind, pulls
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.groups import (
    check_groups,
    largest_learning_rate,
    loaded_parameters,
    protected_parameters,
    spanned_parameters,
    trained_parameters,
)
from safeopt.optim.measurement import Measurement
from safeopt.optim.portable import hide, hide_basis, hide_pull, in_process_group, reveal, stripped
from safeopt.optim.schedule_free import at_average
from safeopt.optim.state import check_state, in_saved_order, load_state, pack_state

OnRefreshError = Literal["raise", "warn"]
_KEY = "safety"


def is_inert(
    optimizer: Optimizer, params: Sequence[Tensor], closure: Callable[[], Any] | None
) -> bool:
    """Whether the step that begins will move no protected parameter.

    Args:
        optimizer: about to take it.
        params: its `protected_parameters`.
        closure: what was passed to ``step``.
    """
    unmoved = closure is None and all(p.grad is None for p in params)
    found = getattr(optimizer, "found_inf", None)  # a fused step under a `GradScaler` moves nothing
    return (
        unmoved or not largest_learning_rate(optimizer) > 0 or (found is not None and bool(found))
    )


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """What was passed to ``step``, by a step hook's arguments; the first is the optimizer."""
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A step hook's arguments with this one in the place of what `closure_of` returns."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def attach(
    optimizer: Optimizer, geometry: SafetyGeometry, on_refresh_error: OnRefreshError = "raise"
) -> None:
    """Protect ``optimizer``'s parameters from now on.

    Before its first step the safety subspace is estimated at the aligned model; after each step the
    parameters are mapped back.

    Args:
        optimizer: any torch optimizer; it gets the attribute ``safety``.
        geometry: its own, used by no other optimizer.
        on_refresh_error: see the module.

    Raises:
        ValueError: if ``on_refresh_error`` is unknown, or a protected group is ``capturable`` or
            ``differentiable`` or has no learning rate.
        TypeError: for complex or sparse parameters.
    """
    check_policy(on_refresh_error)
    if geometry.active:
        check_groups(optimizer)
    optimizer.safety = geometry  # type: ignore[attr-defined]
    hooks: dict[str, Callable[..., Any]] = {"_optimizer_load_state_dict_pre_hooks": _unprotected}
    if geometry.active:
        protection = _Protection(geometry, on_refresh_error)
        hooks = {
            "_optimizer_step_pre_hooks": protection.before,
            "_optimizer_step_post_hooks": protection.after,
            "_optimizer_state_dict_post_hooks": protection.save,
            "_optimizer_load_state_dict_pre_hooks": protection.check,
            "_optimizer_load_state_dict_post_hooks": protection.load,
        }
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            optimizer.load_state_dict = partial(_load, optimizer, protection)  # type: ignore[method-assign]
    # torch numbers hooks anew in every process: a name cannot be taken over by another hook.
    for registry, hook in hooks.items():
        getattr(optimizer, registry)[_KEY] = hook
    # Found on the instance by copy and pickle, so that the optimizer keeps its class.
    optimizer.__getstate__ = partial(_whole_state, optimizer, tuple(hooks))  # type: ignore[method-assign]


def restore(optimizer: Optimizer, geometry: SafetyGeometry) -> Measurement:
    """Measure the alignment loss now and restore examples that are lost.

    Call it before a checkpoint is saved and at the end of training; in inference mode as well, in
    which Lightning validates and then saves.

    Raises:
        ValueError: if protected parameters were added, frozen or resized since the first estimate.
    """
    params = spanned_parameters(optimizer, geometry)
    with torch.inference_mode(False), at_average(optimizer, params, geometry) as follow:
        measured = geometry.restore(params)
        follow()
        return measured


def _unprotected(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Where ``damping=0``, what a group carries of the protection is not kept, nor saved again."""
    return stripped(state)


class _Protection:
    """The hooks that tie one geometry to one optimizer; they refer to no optimizer themselves."""

    def __init__(self, geometry: SafetyGeometry, on_refresh_error: OnRefreshError) -> None:
        self._geometry = geometry
        self._policy = on_refresh_error
        self._protects = False  # whether the present step is protected
        self._step = BaseStep()
        self._checked: Mapping[str, Any] = {}  # a state between the two hooks of loading

    @_disable_dynamo
    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make the first estimate; refuse what cannot be protected before anything has moved."""
        self._protects = False
        self._step.forget()
        check_groups(optimizer)
        params = protected_parameters(optimizer)
        closure = closure_of(args, kwargs)
        if is_inert(optimizer, params, closure):
            return None
        params = spanned_parameters(optimizer, self._geometry)
        if closure is None and not self._accepts(params):
            return None
        self._geometry.before_step(params)
        # Decided before the step: the optimizer, or another hook, may clear the gradients in it.
        self._begins(optimizer, params)
        if closure is None:
            return None

        def evaluate() -> Any:
            self._protects = False
            self._step.forget()  # no copy beside a backward pass
            loss = closure()
            if self._accepts(params):
                self._begins(optimizer, params)
            return loss

        return with_closure(args, kwargs, evaluate)

    @_disable_dynamo
    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Map the parameters back and refresh the subspace where it is time."""
        if not self._protects:
            return
        self._protects = False  # a subclass's step around its parent's has these hooks twice
        params = self._geometry.spanned
        rate, gradients = self._step.ends(optimizer, params)
        if not rate > 0:  # a warm-up may begin with 0
            return
        try:
            with at_average(optimizer, params, self._geometry) as follow:
                self._geometry.after_step(params, rate, moved=follow, gradients=gradients)
        except Exception as error:
            report(error, self._policy)

    def save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Add the geometry to a state."""
        state[_KEY] = pack_state(self._geometry)
        # The basis is of the parameters that it was estimated on, whatever has been frozen since.
        geometry = self._geometry
        params = geometry.spanned or trained_parameters(optimizer)
        kind = basis_kind(geometry.subspace, params, geometry.probe, geometry.config)
        if in_process_group() and kind == "dense":
            blocks = empty_basis("dense", params).state_dict()["blocks"]
            if state[_KEY]["subspace"] is not None:
                blocks = state[_KEY]["subspace"].pop("basis")["blocks"]
            hide_basis(state, optimizer, params, blocks, geometry.config.largest_rank)
            if state[_KEY]["pull"] is not None:
                hide_pull(state, optimizer, params, state[_KEY]["pull"].pop("blocks"))
            elif pulls(geometry.config, kind):  # an entry for DCP to fill
                hide_pull(state, optimizer, params, ElasticPull.at(params).blocks)
            hide(state, _KEY)

    def check(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Refuse a state that does not fit, before anything has changed."""
        model = self._geometry.probe.model
        state = reveal(state, optimizer, self._loaded_into(optimizer), model)
        if _KEY not in state:
            raise ValueError(
                'state_dict: it has no "safety" entry; it was saved by an unprotected optimizer, '
                "and the alignment loss before fine-tuning is not known. Start from the aligned "
                "model, or from a checkpoint of a protected run"
            )
        check_state(state[_KEY], self._loaded_into(optimizer, state[_KEY]), self._geometry)
        self._checked = state[_KEY]
        return state

    def load(self, optimizer: Optimizer) -> None:
        """Continue from the checked state, once."""
        if not self._checked:
            return
        load_state(self._geometry, self._checked, self._loaded_into(optimizer, self._checked))
        self._checked = {}

    def _loaded_into(self, optimizer: Optimizer, state: Any = None) -> list[Tensor]:
        """The `loaded_parameters`, in the order of a state's basis.

        Raises:
            ValueError: if all are frozen and there is no subspace.
        """
        params = loaded_parameters(optimizer, self._geometry) or protected_parameters(optimizer)
        return in_saved_order(params, state, self._geometry.probe.model)

    def _begins(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        """Note what a step is taken with, and whether it has gradients."""
        self._protects = any(p.grad is not None for p in params)
        if self._protects:
            self._step.begins(optimizer, params)

    def _accepts(self, params: Sequence[Tensor]) -> bool:
        """Whether the step with these gradients can be protected.

        Raises:
            TypeError: for sparse gradients.
            FloatingPointError: if one is not finite and the policy is to raise.
        """
        gradients = [g for g in locals_of([p.grad for p in params]) if g is not None]
        if any(g.layout != torch.strided for g in gradients):
            raise TypeError(
                "params: sparse gradients cannot be protected; use protect=False, or layers with "
                "sparse=False"
            )
        lost = not all_finite(gradients)
        if not Layout.of(params).any(lost, params[0].device):
            return True
        report(not_finite(), self._policy)
        return False


def _load(
    optimizer: Optimizer, protection: _Protection, state_dict: dict[str, Any], *args: Any, **kw: Any
) -> None:
    """An optimizer's own ``load_state_dict``, which may not call its hooks (bitsandbytes's)."""
    state_dict = protection.check(optimizer, state_dict)
    type(optimizer).load_state_dict(optimizer, state_dict, *args, **kw)
    protection.load(optimizer)


def _whole_state(optimizer: Optimizer, registries: Sequence[str]) -> dict[str, Any]:
    """What copies and pickles carry: torch's part, the geometry and its hooks.

    The geometry holds the model through its probe. Copied or pickled together, model and optimizer
    belong together again; an optimizer copied alone brings a copy of its model,
    ``safety.probe.model``, as torch's brings copies of its parameters.
    """
    state = dict(type(optimizer).__getstate__(optimizer))
    for name in ("safety", "restore", "load_state_dict", "__getstate__"):
        if name in vars(optimizer):
            state[name] = vars(optimizer)[name]
    for registry in registries:
        state[registry] = OrderedDict({_KEY: getattr(optimizer, registry)[_KEY]})
    return state


def check_policy(on_refresh_error: OnRefreshError) -> None:
    """Raise a ValueError if ``on_refresh_error`` is unknown."""
    if on_refresh_error not in get_args(OnRefreshError):
        raise ValueError(f'on_refresh_error="{on_refresh_error}": expected one of "raise", "warn"')


def not_finite() -> FloatingPointError:
    """What is raised, or warned of, before a step with such gradients."""
    return FloatingPointError(
        "the task gradient is not finite, and the step has not been taken; skip such batches, or "
        "lower the learning rate"
    )


def report(error: Exception, policy: OnRefreshError) -> None:
    """Raise an error, or warn of it, as ``on_refresh_error`` says."""
    if policy == "raise":
        raise error
    warnings.warn(
        "safeopt: this step is not protected, or its refresh is postponed "
        f"({type(error).__name__}: {error})",
        RuntimeWarning,
        stacklevel=3,
    )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite; reads each once."""
    filled = [t for t in tensors if t.numel()]
    # The 2-norm is much faster than the largest entry, but that of finite numbers can overflow.
    return not filled or _finite_norms(filled, 2) or _finite_norms(filled, torch.inf)


@torch.no_grad()
def _finite_norms(tensors: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(tensors, order)
    return bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all())
