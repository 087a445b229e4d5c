"""ProjectedAdamW: AdamW that keeps a model's alignment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from safeopt.curvature.bases import Storage
from safeopt.curvature.refresh import RefreshPolicy
from safeopt.optim.config import Curvature, Mode, SafetyConfig
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.measurement import Measurement
from safeopt.optim.protection import OnRefreshError, attach, restore
from safeopt.probe import SafetyProbe


class ProjectedAdamW(torch.optim.AdamW):
    r"""AdamW, followed by a proximal step in the safety subspace.

    .. code-block:: text

        before step 1:        a_0, U, Λ  from a few safety examples at the aligned model
        at every step t:      θ'  = AdamW(θ, g)
                              θ'  ← θ' + w ⊙ (θ_0 − θ')       safeopt.optim.elastic
                              c   = Uᵀθ' − Uᵀθ_r
                              θ'' = θ' + U(map(c) − c)
        at a refresh:         measure A on new examples; renew U, Λ
                              if examples are lost:  θ ← θ + U·(smallest step that regains them)
                              θ_r ← θ

    Everything happens in ``step()``; no closure is needed. Call `restore` before you save a model
    outside of a Trainer that uses `safeopt.integrations.transformers.SafetyCallback`. Copy or
    pickle it together with its model, ``copy.deepcopy((model, optimizer))``.

    Args:
        params: parameters, or groups of them. A group with ``protect=False`` is trained by plain
            AdamW. AdamW leaves a group with ``lr=0`` where it is, but the map after a step,
            refreshes and restoring move all protected groups: to keep one still, use
            ``protect=False`` or ``requires_grad_(False)`` before the first step.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: term added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: use the maximum of all second moments.
        probe: the safety examples; its model holds ``params``.
        rank: see `SafetyConfig`, as for all arguments up to ``seed``.
        mode: the map c → c⁺; what ``"acceleration"`` removes is derived in
            `safeopt.curvature.surrogate.remove_acceleration`.
        damping: strength of the protection; 0 is ``torch.optim.AdamW`` bit for bit.
        budget: accepted rise of the alignment loss, in nats a token.
        refresh: when to estimate the subspace anew.
        examples: new safety examples at one refresh, at most.
        window: latest examples whose gradients span the subspace.
        newton_damping: damping of the restoring step.
        restore_alignment: restore where the budget is exceeded.
        trial_examples: safety examples kept apart for the line search.
        curvature: ``"fisher"``, or ``"random"`` for the control experiment.
        basis: how U is stored.
        elastic: strength of a pull back to the aligned model; none by default.
        seed: of the order of the safety examples.
        on_refresh_error: ``"raise"``, or ``"warn"`` to train on without protection where a refresh
            or a gradient fails, see `safeopt.optim.protection`.
        maximize: as in AdamW; the alignment loss is kept low all the same.
        foreach: as in AdamW.
        capturable: not supported: reading k coordinates needs the values on the host.
        differentiable: not supported.
        fused: as in AdamW.

    Attributes:
        safety: the `SafetyGeometry`: history, measured, predicted, coupling, passes.

    Raises:
        ValueError: if an argument is out of its range; in ``step``, if protected parameters were
            added or frozen after the first step.
        TypeError: if ``probe`` is not a `SafetyProbe`; for complex or sparse parameters, and in
            ``step`` for sparse gradients.
        FloatingPointError: in ``step``, if a gradient is not finite, before anything has changed;
            if AdamW's step has left a parameter so, before that spreads over the others.

    Cost: a step adds 3·k·n multiplications; a refresh one forward and one backward pass on at most
    ``examples`` short prompts (twice as many in `restore`; and three held ones for four of them, if
    there are); the first step also a forward pass on the trial examples and at most 24 held ones.
    Memory: k float32 numbers for each protected parameter, three more with ``elastic``.

    Source: the safety subspace and its curvature coupling are those of Springer et al. 2026
    (arXiv 2602.15799); AdamW is Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        probe: SafetyProbe,
        rank: int = SafetyConfig.rank,
        mode: Mode = SafetyConfig.mode,
        damping: float = SafetyConfig.damping,
        budget: float = SafetyConfig.budget,
        refresh: RefreshPolicy | None = None,
        examples: int = SafetyConfig.examples,
        window: int = SafetyConfig.window,
        newton_damping: float = SafetyConfig.newton_damping,
        restore_alignment: bool = SafetyConfig.restore_alignment,
        trial_examples: int = SafetyConfig.trial_examples,
        curvature: Curvature = SafetyConfig.curvature,
        basis: Storage = SafetyConfig.basis,
        elastic: float = SafetyConfig.elastic,
        seed: int = SafetyConfig.seed,
        on_refresh_error: OnRefreshError = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        for name, value in (("capturable", capturable), ("differentiable", differentiable)):
            if value:
                raise ValueError(f"{name}=True: ProjectedAdamW does not support it; leave it False")
        geometry = SafetyGeometry(
            probe,
            SafetyConfig(
                rank=rank,
                mode=mode,
                damping=damping,
                budget=budget,
                refresh=RefreshPolicy() if refresh is None else refresh,
                examples=examples,
                window=window,
                newton_damping=newton_damping,
                restore_alignment=restore_alignment,
                trial_examples=trial_examples,
                curvature=curvature,
                basis=basis,
                elastic=elastic,
                seed=seed,
            ),
        )
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self.safety = geometry
        attach(self, geometry, on_refresh_error)

    def restore(self) -> Measurement:
        """Measure the alignment loss now and restore examples that are lost.

        Returns:
            The last measurement, with the loss before and after. Cost: see
            `SafetyGeometry.restore`; nothing if no step was taken since the last call.
        """
        return restore(self, self.safety)
