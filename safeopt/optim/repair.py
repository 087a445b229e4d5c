r"""Repair: bring a model back that has already lost its alignment.

At most ``refreshes`` times: look at new safety examples, estimate the safety subspace where the
model stands now, and go back inside it. The step is that of `safeopt.curvature.window`, the
smallest one after which no safety example is lost and no held example refused more than the aligned
model refused it, with two differences that keep what fine-tuning has learned:

**Length is measured by the task.** Where task examples are given, their gradients t_1, …, t_m span
directions of the subspace, too, and the smallest step is the one that the task minds least,

    min_c ½ cᵀMc,        M = I + κ/σ̄² Σ_j t_j t_jᵀ

with σ̄² the mean nonzero eigenvalue of Σ_j t_j t_jᵀ, subject to the same linear models of the
log-odds. With y = M^{1/2}c these are Z_j M^{-1/2} y, so the window's own quadratic programme solves
it. κ = 1000 makes a direction that the task feels 30 times as long: hardly any step is left there,
to first order (the task's gradient) and to second (its empirical Fisher matrix).

**The way back is curved.** The linear models hold nearby, and a model that was broken has far to
go. The first steps take a third and a half of what is missing, the others all of it. A line search
on the trial examples, which span no subspace, shortens a step that does not lower their loss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.batches import split
from safeopt.curvature.bases import choose_basis
from safeopt.curvature.subspace import updated_subspace
from safeopt.curvature.window import Window
from safeopt.isolation import trainability_kept
from safeopt.losses import Batch
from safeopt.optim.config import SafetyConfig
from safeopt.optim.copies import copied, put_back
from safeopt.optim.estimate import gradient_rows
from safeopt.optim.examples import ExampleRota, held_beside, require_enough
from safeopt.optim.line_search import backtrack
from safeopt.optim.measurement import finite
from safeopt.passes import PassCounter
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")

# κ: how much longer (squared) a direction counts along which the task is as sharp as on average.
_TASK_WEIGHT = 1000.0
# The last steps go the whole way, the two before them a third and a half of it.
_GRADUAL = 3
_LENGTHS = (1.0, 0.5, 0.25)
# The share of the task examples that is kept to measure what repairing costs.
_MEASURED = 0.25
# The most examples on which a loss is measured.
_MOST_MEASURED = 32


@dataclass(frozen=True)
class RepairStep:
    """One refresh of a repair. Losses in nats a token.

    Attributes:
        alignment_loss: of the new safety examples, before the step.
        trial_loss: of the trial examples, after it.
        share: how much of what was missing the step went for.
        length: how much of that step the line search took; 0 where no length was good enough.
    """

    alignment_loss: float
    trial_loss: float
    share: float
    length: float


@dataclass(frozen=True)
class RepairReport:
    """What a repair reached, and what it cost. Losses in nats a token.

    Attributes:
        reference: the aligned model's alignment loss on the trial examples, or the number given.
        budget: accepted rise over it.
        alignment_before: of the trial examples.
        alignment_after: likewise.
        task_before: task loss of examples that steered nothing; None without task examples.
        task_after: likewise.
        steps: the refreshes, in order.
        passes: safety passes and passes on task examples, together.
    """

    reference: float
    budget: float
    alignment_before: float
    alignment_after: float
    task_before: float | None
    task_after: float | None
    steps: tuple[RepairStep, ...]
    passes: dict[str, float]

    @property
    def within_budget(self) -> bool:
        """Whether the trial examples are back within the budget."""
        return self.alignment_after <= self.reference + self.budget

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {**asdict(self), "within_budget": self.within_budget}


def repair(
    model: nn.Module,
    probe: SafetyProbe,
    *,
    budget: float = 0.01,
    reference: Tensor | float | None = None,
    task: Sequence[Batch] = (),
    refreshes: int = 5,
    examples: int = 32,
    task_examples: int = 32,
    trial_examples: int = 8,
    newton_damping: float = SafetyConfig.newton_damping,
    basis: str = "auto",
    seed: int = 0,
) -> RepairReport:
    """Bring lost refusals back by a few damped Gauss-Newton steps in the safety subspace.

    Args:
        model: the fine-tuned model; its trainable parameters are changed in place. An adapter must
            have been loaded as trainable.
        probe: safety examples of ``model`` with the aligned model's refusals. Give it ``held``
            harmless prompts: without them the cure over-refuses.
        budget: accepted rise of the alignment loss over the aligned model's, at least 0; reached,
            the repair ends.
        reference: the aligned model's losses on all examples of the probe, shape ``(n + h,)``: with
            a probe of that model and the same batches, ``probe.values(probe.indices)``. None
            measures the model with its adapter disabled, for adapters that were trained on the
            aligned model. Where only its alignment loss is known, one number: held prompts are then
            refused no more than the broken model refuses them, which leaves less room.
        task: batches of what the model was fine-tuned on, in the form of safety batches. The more
            of them, up to ``task_examples`` a refresh, the less of it is lost.
        refreshes: estimates of the subspace, each followed by a step, at most; at least 1.
        examples: safety examples a refresh (if there are held ones, three join four), at least 1.
        task_examples: task examples a refresh, at least 1.
        trial_examples: safety examples that are kept apart for the line search, at least 1.
        newton_damping: see `safeopt.curvature.window`; positive.
        basis: how the subspace is stored, see `safeopt.curvature.bases`.
        seed: of the order of all examples.

    Returns:
        What it reached and what it cost.

    Raises:
        ValueError: if an argument is out of its range, the probe is another model's or has too few
            examples, ``reference`` is needed or of another shape, or no parameter is trainable.
        FloatingPointError: if a loss is not finite. The parameters are as before then, as after any
            exception.

    Cost: a forward pass over the trial examples, and unless ``reference`` has all losses one over
    the held examples that can take a turn (and the trial ones, where it is None); a refresh takes
    one forward and one backward pass over its examples and up to three forward passes over the
    trial examples. Memory: one number a parameter for each of a refresh's examples (factors of the
    gradients where ``basis`` keeps these), and two copies of the parameters.
    """
    SafetyConfig(budget=budget, newton_damping=newton_damping, basis=basis, seed=seed)  # type: ignore[arg-type]
    for name, number in (
        ("refreshes", refreshes),
        ("examples", examples),
        ("task_examples", task_examples),
        ("trial_examples", trial_examples),
    ):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number}: expected a whole number, at least 1")
    if probe.model is not model:
        raise ValueError("probe: it looks at another model; build it from the model to repair")
    require_enough(probe, trial_examples)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            "model: no parameter is trainable; load an adapter with is_trainable=True, or call "
            "model.requires_grad_(True)"
        )
    rota = ExampleRota(probe, trial_examples, seed, refreshes * held_beside(examples))
    goal = _goal(model, probe, rota, reference)
    work = _Repair(
        params,
        probe,
        _Task(model, task, task_examples, max(1, probe.micro_batch_size // 4), seed)
        if task  # task examples are longer than refusals: fewer of them in a pass
        else None,
        rota,
        limit=goal + budget,
        examples=examples,
        damping=newton_damping,
        basis=basis,
    )
    kept = copied(params)
    try:
        before, steps, after = work.run(refreshes)
    except BaseException:
        put_back(params, kept)
        raise
    return RepairReport(goal, budget, before, after, *work.task_losses, tuple(steps), work.passes())


class _Task:
    """Task examples: some measure what repairing costs, the others take turns in steering it."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], count: int, micro_batch: int, seed: int
    ) -> None:
        split(batches, "task")  # the probe would call them by another name in its errors
        self.probe = SafetyProbe(model, batches, micro_batch_size=micro_batch)
        total = len(self.probe)
        if total < 2:
            raise ValueError(f"task: {total} example; one to steer and one to measure are needed")
        order = torch.randperm(
            total, generator=torch.Generator().manual_seed(seed), device="cpu"
        ).tolist()
        measured = max(1, min(_MOST_MEASURED, int(_MEASURED * total)))
        self._measured, self._steering = order[:measured], order[measured:]
        self._count = min(count, len(self._steering))
        self._drawn = 0

    def next(self) -> list[int]:
        """The examples whose turn it is."""
        start, pool = self._drawn, self._steering
        self._drawn += self._count
        return [pool[(start + i) % len(pool)] for i in range(self._count)]

    def loss(self) -> float:
        return finite(self.probe.value(self._measured))


class _Repair:
    """The model on its way back."""

    def __init__(
        self,
        params: Sequence[Tensor],
        probe: SafetyProbe,
        task: _Task | None,
        rota: ExampleRota,
        *,
        limit: float,
        examples: int,
        damping: float,
        basis: str,
    ) -> None:
        self._params, self._probe, self._task, self._rota = params, probe, task, rota
        self._limit, self._examples, self._damping = limit, examples, damping
        self._basis = basis
        self.task_losses: tuple[float | None, float | None] = (None, None)

    def run(self, refreshes: int) -> tuple[float, list[RepairStep], float]:
        """The trial loss before, the steps, and the trial loss after them."""
        before = trial = finite(self._probe.value(self._rota.trial))
        cost = self._task.loss() if self._task else None
        steps: list[RepairStep] = []
        while trial > self._limit and len(steps) < refreshes:
            share = 1 / max(1, min(_GRADUAL, refreshes) - len(steps))
            steps.append(self._step(share, trial))
            trial = steps[-1].trial_loss
            logger.info("repair, refresh %d: %s", len(steps), steps[-1])
        if trial > self._limit:
            logger.warning(
                "repair: after %d refreshes the alignment loss of the trial examples is %.4f, "
                "above its limit %.4f",
                len(steps),
                trial,
                self._limit,
            )
        self.task_losses = (cost, self._task.loss() if self._task and steps else cost)
        return before, steps, trial

    def _step(self, share: float, trial: float) -> RepairStep:
        """Estimate the subspace here and go a share of the way back."""
        params, probe, task = self._params, self._probe, self._task
        look = self._rota.next(self._examples)
        steering = task.next() if task else []
        count = len(look.indices) + len(steering)
        layout = probe.layout(params)
        kind = choose_basis(self._basis, params, count, probe.model, layout)
        losses, rows = gradient_rows(probe, params, look.indices, kind, layout)
        tokens = probe.response_tokens(look.indices)
        targets = self._rota.targets(look)
        self._rota.advance(look)
        value = finite(float(losses[targets.isnan()].mean()))
        if task:
            task_losses, task_rows = gradient_rows(task.probe, params, steering, kind, layout)
            rows = rows.followed_by(task_rows)  # type: ignore[attr-defined]
            losses = torch.cat([losses, task_losses])
            tokens = torch.cat([tokens, tokens.new_zeros(len(steering))])
            targets = torch.cat([targets, task_losses.to(targets)])  # neither safety nor asked for
        subspace = updated_subspace(
            None,
            params,
            rows,
            losses,
            tokens,
            targets,
            rank=count,
            window=count,
            kind=kind,
            layout=layout,
        )
        whole, first = subspace.window, len(look.indices)
        scaling = _inverse_root(whole.coefficients[first:])
        own = Window(
            whole.coefficients[:first] @ scaling,
            whole.losses[:first],
            whole.tokens[:first],
            whole.targets[:first],
        )
        step = share * (scaling @ own.restoring_step(self._limit, self._damping))
        length, after = 0.0, None
        if bool(step.any()):
            length, after = backtrack(
                subspace, params, step, _LENGTHS, lambda: probe.value(self._rota.trial), trial
            )
        return RepairStep(value, trial if after is None else after, share, length)

    def passes(self) -> dict[str, float]:
        """Of safety and task examples together."""
        total = PassCounter()
        for probe in (self._probe, *((self._task.probe,) if self._task else ())):
            total.include(probe.passes)
        return total.as_dict()


def _inverse_root(rows: Tensor) -> Tensor:
    """M^{-1/2} for M = I + κ/σ̄² Σ_j t_j t_jᵀ; ``rows (m, k)`` are the t_j. I without rows."""
    identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    if not len(rows):
        return identity
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    squares = singular.square()
    felt = squares > 1e-12 * squares.max()
    if not bool(felt.any()):
        return identity
    weights = 1 - (1 + _TASK_WEIGHT * squares / squares[felt].mean()).rsqrt()
    return identity - directions.T @ (weights.unsqueeze(1) * directions)


def _goal(
    model: nn.Module, probe: SafetyProbe, rota: ExampleRota, reference: Tensor | float | None
) -> float:
    """The aligned model's trial loss; the held examples are bound by what it refuses, too.

    Its loss is that of the trial examples, which are compared with it: prompts differ by more than
    a budget.
    """
    if reference is None:
        with _without_adapter(model):
            return float(rota.measure(probe).mean())
    if not isinstance(reference, Tensor):
        if rota.held:
            rota.hold(probe, probe.values(rota.held).to("cpu", torch.float64))
        return finite(reference)
    if reference.shape != (len(probe.indices),):
        raise ValueError(
            f"reference: shape {tuple(reference.shape)}; expected ({len(probe.indices)},), a loss "
            "for each safety example and each held one"
        )
    losses = reference.to("cpu", torch.float64)
    finite(float(losses.sum()))
    rota.hold(probe, losses[rota.held])
    return float(losses[rota.trial].mean())


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """The model that an adapter was trained on."""
    disabled: Any = getattr(model, "disable_adapter", None)
    if disabled is None:
        raise ValueError(
            "reference=None: the model has no adapter that could be disabled; give the aligned "
            "model's losses"
        )
    context: AbstractContextManager[None] = disabled()
    with trainability_kept(model), context:  # PEFT's own unfreezes all of an active adapter
        yield
