"""Random sequences of what users do, compared after each with a dense reference in float64.

The reference shares no code with the package: NumPy, SciPy's `nnls` and torch's own optimizers. The
alignment loss is that of `quadratic`, whose response is no likelihood: its odds are −loss.
"""

import copy
import io
import math

import numpy as np
import pytest
import torch
from optimizer_table import OPTIMIZERS
from quadratic import Quadratic, probe_of
from scipy.optimize import brentq, nnls

from safeopt import RefreshPolicy, SafetyProbe

SHAPES = [(3, 4), (), (2, 3), (0, 2)]
SIZES = [math.prod(shape) for shape in SHAPES]
MODES = ("project", "damp", "acceleration", "budget", "none")
KINDS = [name for name in OPTIMIZERS if name != "PreconditionedSGD"]  # its step has its own tests
ACTIONS = ("step",) * 8 + ("restore", "lr", "load", "deepcopy", "write", "nan", "fail")


class Dense:
    """What `SafetyGeometry` promises, with whole gradients and vectors."""

    def __init__(self, directions, sharpness, start, rota, config, policy):
        self.directions, self.sharpness, self.start = directions, sharpness, start
        self.units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        self.trial, self.pool, self.config, self.policy = rota.trial, rota._pool, config, policy
        self.x, self.history, self.window = start.copy(), [], []
        self.steps = self.last = self.drawn = self.checked = 0
        self.squares, self.task, self.travelled = np.zeros(len(start)), np.zeros(len(start)), 0.0

    def losses(self, indices):
        d = self.x - self.start
        u, v = self.directions[indices], self.units[indices]
        return 0.5 * self.sharpness * (v @ d) ** 2 + u @ d

    def predict(self, c):
        return self.value + self.slope @ c + 0.5 * (self.values * c * c).sum()

    def begin(self):
        if not self.history:
            self.origin = self.x.copy()
            trial = self.losses(self.trial)
            self.trial_reference = trial.mean()
            self.estimate(min(2, self.config["examples"]))
            all_losses = [*trial, *(loss for _, loss in self.window)]
            self.reference, self.goal = np.mean(all_losses), min(all_losses)

    def estimate(self, count):
        count = min(count, len(self.pool))
        predicted = self.predict(self.c) if self.history else None
        look = [self.pool[(self.drawn + i) % len(self.pool)] for i in range(count)]
        self.drawn += count
        d = self.x - self.start
        rows = self.directions[look]
        rows = rows + self.sharpness * (self.units[look] @ d)[:, None] * self.units[look]
        self.squares = self.squares + (rows**2).sum(0)
        kept = max(0, min(self.config["window"] - count, len(self.window)))
        if kept:
            self.move_window(self.basis @ (self.basis.T @ (self.x - self.anchor)))
        old = self.window[len(self.window) - kept :]
        window = old + list(zip(rows, self.losses(look), strict=True))
        _, singular, right = np.linalg.svd(np.stack([row for row, _ in window]))
        squares = singular**2
        k = min(self.config["rank"], int((squares > 1e-13 * squares[0]).sum()))
        self.basis, self.values = right[:k].T, squares[:k] / len(window)
        self.window = [(self.basis @ (self.basis.T @ row), loss) for row, loss in window]
        self.anchor, self.value = self.x.copy(), self.losses(look).mean()
        self.slope = self.basis.T @ np.mean([row for row, _ in self.window], axis=0)
        self.c, self.taken, self.drift, self.last = np.zeros(k), np.zeros(k), None, self.steps
        self.history.append([self.steps, self.value, predicted, None, count])

    def move_window(self, change):
        self.window = [(row, loss + row @ change) for row, loss in self.window]

    def pull(self, rate, gradient):
        self.travelled, self.task = self.travelled + rate, self.task + gradient**2
        safety, task = self.squares / self.squares.sum(), self.task / self.task.sum()
        weight = self.config["elastic"] * rate / self.travelled * safety
        if not weight.any():
            return
        self.x = (task * self.x + weight * self.origin) / (task + weight)

    def after(self, rate, gradient, refreshes):
        self.steps += 1
        self.pull(rate, gradient)
        c = self.basis.T @ (self.x - self.anchor)
        mapped = self.map(c)
        self.x = self.x + self.basis @ (mapped - c)
        self.c, self.taken = mapped, self.taken + c - mapped
        pushed = self.predict(self.c + self.taken) - self.value
        if self.policy.due(self.steps, self.last, pushed) and refreshes:
            self.refresh(min(max(self.steps - self.last, 2), self.config["examples"]))

    def map(self, c):
        mode, limit = self.config["mode"], self.reference + self.config["budget"]
        limit = max(limit, self.value)
        if mode == "none" or (mode == "budget" and self.predict(c) <= limit):
            return c
        if mode == "damp":
            return c / (1 + self.config["damping"] * self.values / self.values.mean())
        if mode == "acceleration":
            self.drift = c - self.c if self.drift is None else self.drift
            return self.c + self.drift
        if mode == "project":
            return np.zeros_like(c)

        def point(exponent):
            mu = math.exp(exponent)
            return (c - mu * self.slope) / (1 + mu * self.values)

        return point(brentq(lambda e: self.predict(point(e)) - limit, -60, 60, xtol=1e-13))

    def refresh(self, count, search=False, trial=None):
        since = self.steps - self.last
        self.estimate(count)
        missing = np.array([loss for _, loss in self.window]) - self.goal - self.config["budget"]
        if not (missing > 0).any():
            return trial
        rows = np.stack([-row for row, _ in self.window])
        products = rows @ rows.T
        half = np.linalg.cholesky(products + np.diag(0.1 * products.diagonal())).T
        step = rows.T @ nnls(half, np.linalg.solve(half.T, missing))[0]
        start, expected = self.x, None
        if search or since >= 16:
            before = self.losses(self.trial).mean() if trial is None else trial
            limit, trial = max(before, self.trial_reference + self.config["budget"]), before
            for length in (1, 0.5, 0.25, 0):
                self.x = start + length * step
                if (now := self.losses(self.trial).mean()) < limit or not length:
                    step, trial = length * step, now if length else before
                    break
            expected = trial
        else:
            self.x, trial = start + step, None
        self.move_window(step)
        self.slope = self.slope + self.values * (self.basis.T @ step)
        self.value = np.mean([loss for _, loss in self.window[-self.history[-1][-1] :]])
        self.anchor = self.x.copy()
        self.history[-1][3] = self.value if expected is None else expected
        return trial

    def restore(self):
        if not self.history:
            return self.begin()
        if self.steps > self.checked:
            most, trial = 2 * self.config["examples"], None
            if self.steps > self.last:
                trial = self.refresh(min(max(self.steps - self.last, 2), most), search=True)
            trial = self.losses(self.trial).mean() if trial is None else trial
            if trial > self.trial_reference + self.config["budget"]:
                self.refresh(most, search=True, trial=trial)
            self.checked = self.steps


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", KINDS)
def test_whatever_the_user_does(name, seed, monkeypatch):
    random = np.random.default_rng([seed, KINDS.index(name)])
    n, count = sum(SIZES), int(random.integers(5, 12))
    directions, sharpness = 0.4 * random.normal(size=(count, n)), random.uniform(0.2, 2)
    most = int(random.integers(1, 5))
    config = {
        "rank": int(random.integers(1, 8)), "mode": str(random.choice(MODES)), "examples": most,
        "damping": random.uniform(0.3, 3), "budget": float(random.choice([0.01, 0.1])),
        "window": int(random.integers(most, 10)), "trial_examples": int(random.integers(1, 4)),
        "elastic": float(random.choice([0, 0.5, 3])),
    }  # fmt: skip
    drift = [None, 0.02][random.integers(2)]
    policy = RefreshPolicy(int(random.integers(1, 4)), 1.5, int(random.integers(5, 20)), drift)

    def start():
        zeros = torch.zeros(n, dtype=torch.float64)
        model = Quadratic(torch.diag(zeros), zeros, SHAPES)
        model.weights[2].data = model.weights[2].data.t().contiguous().t()
        probe = probe_of(model, torch.from_numpy(directions), sharpness=sharpness)
        options = {"probe": probe, "refresh": policy, **config}
        return model, OPTIMIZERS[name].protected(list(model.weights), 0.02, options)

    def step(fails=False):
        missing = random.random(len(SHAPES)) < 0.2
        pieces = torch.from_numpy(random.normal(size=n)).split(SIZES)
        grads = [
            None if none else piece.view(shape)
            for none, piece, shape in zip(missing, pieces, SHAPES, strict=True)
        ]
        rate = optimizer.param_groups[0]["lr"]

        def closure():
            for p, grad in zip(model.weights, grads, strict=True):
                p.grad = None if grad is None else grad.clone()
            return 0.0

        closed = random.random() < 0.3
        if not closed:
            closure()
        moves = rate > 0 and not missing.all()
        if rate > 0 and (moves or closed):
            dense.begin()
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(SafetyProbe, "_run", lambda *args, **kwargs: 1 / 0)
            try:
                optimizer.step(closure) if closed else optimizer.step()
                failed = False
            except ZeroDivisionError:
                failed = True
        with torch.no_grad():
            for p, grad, x in zip(
                twins, grads, torch.from_numpy(dense.x).split(SIZES), strict=True
            ):
                p.copy_(x.view(p.shape))
                p.grad = grad
        plain.param_groups[0]["lr"] = rate
        plain.step()
        dense.x = torch.cat([p.detach().flatten() for p in twins]).numpy()
        if moves:
            seen = [
                torch.zeros_like(piece) if none else piece
                for none, piece in zip(missing, pieces, strict=True)
            ]
            dense.after(rate, torch.cat(seen).numpy(), not failed)

    model, optimizer = start()
    dense = Dense(directions, sharpness, model.start.numpy(), optimizer.safety.rota, config, policy)
    twins = [p.detach().clone().requires_grad_() for p in model.weights]
    plain = OPTIMIZERS[name].plain(twins, 0.02)
    for action in random.choice(ACTIONS, size=30):
        if action == "step" or (action == "fail" and dense.history):
            step(action == "fail")
        elif action == "restore":
            optimizer.restore()
            dense.restore()
        elif action == "lr":
            optimizer.param_groups[0]["lr"] = float(random.choice([0.0, 0.01, 0.03]))
        elif action == "load":
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model, optimizer = start()
            for part, state in zip((model, optimizer), saved, strict=True):
                part.load_state_dict(state)
        elif action == "deepcopy":
            model, optimizer = copy.deepcopy((model, optimizer))
        elif action == "write":
            change = 0.02 * random.normal(size=n)
            with torch.no_grad():
                for p, x in zip(model.weights, torch.from_numpy(change).split(SIZES), strict=True):
                    p.add_(x.view(p.shape))
            dense.x = dense.x + change
        elif action == "nan" and optimizer.param_groups[0]["lr"] > 0:
            model.weights[0].grad = torch.full(SHAPES[0], torch.nan, dtype=torch.float64)
            with pytest.raises(FloatingPointError, match="task gradient is not finite"):
                optimizer.step()
        safety = optimizer.safety
        assert np.allclose(model.x.detach(), dense.x, rtol=1e-7, atol=1e-7), action
        counters = (safety.step_count, safety.last_refresh, safety.rota.drawn, safety._checked)
        assert counters == (dense.steps, dense.last, dense.drawn, dense.checked)
        assert len(safety.history) == len(dense.history)
        for mine, expected in zip(safety.history, dense.history, strict=True):
            figures = np.array([*vars(mine).values()], dtype=float)  # None is nan
            assert np.allclose(figures, np.array(expected, dtype=float), 1e-6, 1e-7, equal_nan=True)
        if dense.history:
            assert safety.reference == pytest.approx(dense.reference)
            assert safety.predicted == pytest.approx(dense.predict(dense.c), rel=1e-6, abs=1e-7)
