"""OptimizerWrapper: an optimizer around another one, with that one's groups and state."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.groups import loaded_parameters
from safeopt.optim.portable import reveal


class OptimizerWrapper(Optimizer):
    """A torch optimizer whose groups, state and defaults are the base optimizer's own.

    Schedulers, clipping, `GradScaler`, Accelerate and checkpointing, which read and write
    ``param_groups`` and ``state``, thereby act on the base optimizer. Hooks registered on the
    wrapper run around the wrapper's methods, those of the base optimizer around its own.

    Args:
        base_optimizer: the optimizer that takes the steps, a protected one.
    """

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer = base_optimizer
        self.safety: SafetyGeometry = base_optimizer.safety  # type: ignore[attr-defined]
        super().__setstate__({})  # the hooks; __init__ would make groups and state of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list of groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's own defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: everything but hooks and schedulers, as torch does."""
        return {
            name: value
            for name, value in vars(self).items()
            if name != "step" and not name.startswith("_optimizer_")
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimizer does."""
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and what the wrapper adds to it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.base_optimizer.state_dict()
        self._add_state(state)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the same kind of wrapper; one that does not fit changes nothing."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        params, model = loaded_parameters(self, self.safety), self.safety.probe.model
        state_dict = reveal(state_dict, self, params, model)
        self._check_state(state_dict)
        self.base_optimizer.load_state_dict(state_dict)
        self._take_state(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _add_state(self, state: dict[str, Any]) -> None:
        """Put the wrapper's own state into ``state``."""

    def _check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that does not fit, before anything changes."""

    def _take_state(self, state: dict[str, Any]) -> None:
        """Continue from a checked state."""


def base_of(
    params: ParamsT | Optimizer, base_optimizer: type[Optimizer], options: dict[str, Any]
) -> Optimizer:
    """The optimizer that is wrapped: ``params`` itself, or one built from them.

    Raises:
        TypeError: for options beside an optimizer that exists already, or no optimizer class.
    """
    if isinstance(params, Optimizer):
        if options:
            raise TypeError(
                f"{', '.join(sorted(options))}: unknown, or an option of the base optimizer, which "
                f"is given as params={type(params).__name__}; set it there"
            )
        return params
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer={base_optimizer!r}: expected a class of torch.optim.Optimizer; an "
            "optimizer that exists already takes the place of params"
        )
    return base_optimizer(params, **options)
