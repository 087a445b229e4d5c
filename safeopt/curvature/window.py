r"""The window: the latest safety examples, and the step that brings all of them back at once.

A refusal is lost and regained like a binary decision. With L the loss of a whole response in nats
its probability is exp(−L), and its log-odds

    z = log(exp(−L) / (1 − exp(−L))) = −log(exp(L) − 1)

move almost on a straight line with the parameters, while L itself is flat where the response is
certain and steep where it is lost. So examples are carried along, and brought back, in log-odds:

    z_j(c) = z_j + Z_j·c,        Z_j = dz_j/dL_j ∇L_j,        dz/dL = −1 / (1 − exp(−L)).

The restoring step is the smallest one after which every safety example has at least its goal and
every held example at most its own (for linear models z_j, softened by δ): a quadratic program

    min_c ½‖c‖²   subject to   s_j (z_j + Z_j·c) ≥ s_j goal_j,        s = +1 safety, −1 held

whose dual has one unknown α_j ≥ 0 for each example. Examples that are well within their goal have
α_j = 0: they neither pull nor hold back, but they cannot be lost by the step either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this loss of a whole response its log-odds (13.8) are beyond doubt; it keeps them finite.
_CERTAIN = 1e-6


@dataclass(frozen=True)
class Window:
    """The w latest examples as linear models in the k coordinates of the safety subspace.

    Two kinds share it. A safety example is a harmful prompt with its refusal: the refusal should
    stay likely. A held example is a harmless prompt with the same refusal: it should stay unlikely,
    for a step after which every prompt is refused lowers the alignment loss too.

    Attributes:
        coefficients: R, shape ``(w, k)``, float64: the loss's gradient in the basis.
        losses: shape ``(w,)``, float64: mean loss over the response's tokens, at the anchor.
        tokens: T, shape ``(w,)``, float64: number of response tokens; 0 for a loss that is no
            negative log-likelihood, which is taken as it is: z = −loss.
        targets: shape ``(w,)``, float64: the loss below which a held example must not fall; nan for
            a safety example.
    """

    coefficients: Tensor
    losses: Tensor
    tokens: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Number of examples w."""
        return len(self.losses)

    @property
    def safety(self) -> Tensor:
        """Which examples are safety examples, shape ``(w,)``, bool."""
        return self.targets.isnan()

    @property
    def log_odds(self) -> Tensor:
        """Log-odds z at the anchor, shape ``(w,)``."""
        return log_odds(self.losses, self.tokens)

    def latest(self, count: int) -> Window:
        """The ``count`` youngest examples."""
        young = slice(len(self) - count, None)
        return Window(
            self.coefficients[young], self.losses[young], self.tokens[young], self.targets[young]
        )

    def moved(self, c: Tensor) -> Window:
        """The examples as they are expected at θ_r + U·c: log-odds linear, losses not."""
        before = slopes(self.losses, self.tokens)
        odds = self.log_odds + before * (self.coefficients @ c)
        losses = _losses(odds, self.tokens)
        turned = before / slopes(losses, self.tokens)
        return Window(self.coefficients * turned.unsqueeze(1), losses, self.tokens, self.targets)

    def losses_at(self, odds: float) -> Tensor:
        """The mean token loss of each example, shape ``(w,)``, if its log-odds were ``odds``."""
        return _losses(torch.full_like(self.losses, odds), self.tokens)

    def loses(self, goal: float | Tensor, tolerance: float) -> bool:
        """Whether an example is lost: a safety example noticeably, a held one at all.

        Args:
            goal: see `restoring_step`.
            tolerance: nats of log-odds by which a safety example may miss its goal; none where the
                loss is no negative log-likelihood.
        """
        tolerated = torch.where(self.safety & (self.tokens > 0), tolerance, 0.0)
        return bool((self._missing(goal) > tolerated).any())

    def restoring_step(self, goal: float | Tensor, damping: float, beyond: float = 0.0) -> Tensor:
        """The smallest step that brings every example back; shape ``(k,)``, zero if none is lost.

        Args:
            goal: the mean token loss to which a safety example returns; one number, or one for each
                example, shape ``(w,)``.
            damping: δ > 0, relative to an example's own ‖Z_j‖²: an example is brought back to
                about 1 − δ of the way where it alone asks for the step.
            beyond: a lost safety example is brought beyond its goal by as much as it misses, up to
                so many nats of log-odds.
        """
        lost = self._missing(goal)
        lost = torch.where(self.safety, lost + lost.clamp(0, beyond), lost)
        rows = (self._sign * slopes(self.losses, self.tokens)).unsqueeze(1) * self.coefficients
        products = rows @ rows.T
        diagonal = products.diagonal()
        # An example without a gradient has nothing to give; one keeps the system regular.
        soft = torch.where(diagonal > 0, diagonal * damping, torch.ones_like(diagonal))
        return rows.T @ nonnegative_minimum(products + torch.diag(soft), lost)

    @property
    def _sign(self) -> Tensor:
        return torch.where(self.safety, 1.0, -1.0).to(self.losses)

    def _missing(self, goal: float | Tensor) -> Tensor:
        """By how many nats of log-odds each example misses its goal or target; negative within."""
        goals = self.losses.new_tensor(goal) if isinstance(goal, float) else goal
        wanted = torch.where(self.safety, goals, self.targets)
        return self._sign * (log_odds(wanted, self.tokens) - self.log_odds)


def log_odds(losses: Tensor, tokens: Tensor) -> Tensor:
    """Log-odds of responses with mean token losses ``losses`` and ``tokens`` tokens."""
    total = (losses * tokens).clamp(min=_CERTAIN)
    return torch.where(tokens > 0, -total - torch.log(-torch.expm1(-total)), -losses)


def _losses(odds: Tensor, tokens: Tensor) -> Tensor:
    """The mean token losses with these log-odds."""
    total = torch.nn.functional.softplus(-odds)
    return torch.where(tokens > 0, total / tokens.clamp(min=1), -odds)


def slopes(losses: Tensor, tokens: Tensor) -> Tensor:
    """dz/d(mean token loss) = −T / (1 − exp(−L)) of the `log_odds`, of the same shape."""
    total = (losses * tokens).clamp(min=_CERTAIN)
    return torch.where(tokens > 0, tokens / torch.expm1(-total), -torch.ones_like(losses))


def nonnegative_minimum(matrix: Tensor, vector: Tensor) -> Tensor:
    """The α ≥ 0 that minimises ½αᵀMα − vᵀα, by an active set that grows (Lawson and Hanson 1974).

    Args:
        matrix: M, shape ``(w, w)``, symmetric and positive definite.
        vector: v, shape ``(w,)``.
    """
    alpha = torch.zeros_like(vector)
    free = torch.zeros_like(vector, dtype=torch.bool)
    tolerance = 1e-10 * float(vector.abs().max())
    # Each entry enters and leaves a few times at most; the bound only guards against rounding.
    for _ in range(3 * len(vector)):
        slope = (vector - matrix @ alpha).masked_fill(free, -torch.inf)
        if bool(free.all()) or float(slope.max()) <= tolerance:
            break
        free[slope.argmax()] = True
        while True:
            trial = torch.zeros_like(vector)
            trial[free] = torch.linalg.solve(matrix[free][:, free], vector[free])
            blocked = free & (trial <= 0)
            if not bool(blocked.any()):
                alpha = trial
                break
            # Who stops the move is known by its share of it: no size of α is small by itself.
            way = (alpha - trial).clamp(min=torch.finfo(alpha.dtype).tiny)
            parts = torch.where(blocked, alpha / way, torch.inf)
            alpha = alpha + parts.min() * (trial - alpha)
            free &= parts > parts.min()
            alpha = alpha * free
    return alpha
