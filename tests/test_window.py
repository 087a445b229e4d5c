"""Log-odds and the restoring step, against closed forms and an independent quadratic program."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from tolerances import relative_error

from safeopt.curvature.window import Window, _losses, log_odds, nonnegative_minimum

NAN = math.nan


def window(count=6, rank=4, held=2, seed=0, tokens=5.0):
    """Random examples; the last ``held`` ones are held, half of them already too likely."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    losses = torch.rand(count, generator=generator, dtype=torch.float64) + 0.05
    targets = torch.full((count,), NAN, dtype=torch.float64)
    if held:
        targets[-held:] = losses[-held:] * torch.tensor([1.5, 0.7] * held)[:held]
    return Window(rows, losses, torch.full_like(losses, tokens), targets)


def test_log_odds_of_known_probabilities():
    for probability, tokens in ((0.5, 1.0), (0.9, 4.0), (0.01, 13.0)):
        loss = torch.tensor([-math.log(probability) / tokens], dtype=torch.float64)
        odds = log_odds(loss, torch.tensor([tokens], dtype=torch.float64))
        assert float(odds) == pytest.approx(math.log(probability / (1 - probability)), rel=1e-12)
    plain = torch.tensor([-3.0, 0.0, 2.0])
    assert torch.equal(log_odds(plain, torch.zeros(3)), -plain)
    certain = log_odds(torch.tensor([0.0, 1e-30]), torch.ones(2))
    assert bool(torch.isfinite(certain).all())
    assert bool((certain > 13).all())
    hopeless = log_odds(torch.tensor([1e4]), torch.ones(1))
    assert float(hopeless) == -1e4


def test_moved_is_exact_where_log_odds_are_linear():
    """A logistic model with two parameters: losses and gradients follow exactly, far away too."""
    inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([1.0, 2.0, 3.0, 1.0, 4.0], dtype=torch.float64)

    def losses_of(parameters):
        return torch.nn.functional.softplus(-(inputs @ parameters)) / tokens

    def window_at(parameters):
        parameters = parameters.clone().requires_grad_()
        losses = losses_of(parameters)
        rows = [torch.autograd.grad(x, parameters, retain_graph=True)[0] for x in losses]
        return Window(torch.stack(rows), losses.detach(), tokens, torch.full((5,), NAN))

    start = torch.tensor([0.3, -0.7], dtype=torch.float64)
    change = torch.tensor([2.0, -1.5], dtype=torch.float64)
    moved, there = window_at(start).moved(change), window_at(start + change)
    assert relative_error(moved.losses, there.losses) < 1e-12
    assert relative_error(moved.coefficients, there.coefficients) < 1e-10
    assert torch.equal(moved.tokens, tokens)
    back = moved.moved(-change)
    assert relative_error(back.losses, window_at(start).losses) < 1e-10


def test_other_losses_are_moved_along_their_gradients():
    plain = window(held=0, tokens=0.0)
    change = torch.ones(4, dtype=torch.float64)
    moved = plain.moved(change)
    assert relative_error(moved.losses, plain.losses + plain.coefficients @ change) < 1e-14
    assert torch.equal(moved.coefficients, plain.coefficients)


@pytest.mark.parametrize("tokens", [0.0, 5.0])
def test_an_almost_undamped_step_brings_all_back_and_loses_none(tokens):
    examples = window(count=4, rank=6, held=2, tokens=tokens)
    goal = float(examples.losses[:2].min()) / 3
    step = examples.restoring_step(goal, 1e-9)
    after = examples.moved(step).losses
    assert bool((after[:2] <= goal * (1 + 1e-5)).all())
    assert bool((after[2:] >= examples.targets[2:] * (1 - 1e-5)).all())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1e-2, 0.1, 3]))
def test_restoring_step_equals_a_general_solver(count, rank, seed, damping):
    """min ½‖c‖² + Σ ξ_j²/2 with s_j(z_j + Z_j c) + √(δ‖Z_j‖²) ξ_j ≥ s_j goal_j."""
    examples = window(count, rank, held=count // 2, seed=seed)
    goal = float(examples.losses.median())
    step = examples.restoring_step(goal, damping)
    sign = torch.where(examples.safety, 1.0, -1.0).double()
    wanted = log_odds(
        torch.where(examples.safety, torch.full_like(examples.losses, goal), examples.targets),
        examples.tokens,
    )
    total = examples.losses * examples.tokens
    rows = -examples.tokens / (1 - torch.exp(-total))
    rows = (rows.unsqueeze(1) * examples.coefficients * sign.unsqueeze(1)).numpy()
    need = (sign * (wanted - examples.log_odds)).numpy()
    soft = (damping * (rows**2).sum(1)) ** 0.5
    # The point nearest to zero with G x ≥ h, from a nonnegative least-squares problem (Lawson and
    # Hanson 1974, chapter 23).
    inequalities = np.hstack([rows, np.diag(soft)])
    system = np.vstack([inequalities.T, need])
    unit = np.zeros(len(system))
    unit[-1] = 1.0
    residual = system @ nnls(system, unit, maxiter=1000)[0] - unit
    expected = torch.from_numpy(-residual[:rank] / residual[-1])
    assert float((step - expected).norm()) <= 1e-6 * (1 + float(expected.norm()))


@pytest.mark.parametrize(("beyond", "came"), [(0.0, 0.4), (0.3, 0.7), (1.0, 0.8)])
def test_lost_safety_examples_alone_are_brought_beyond_their_goal(beyond, came):
    """As far as they miss it, up to so much. What is within its goal keeps its slack."""
    slack = 0.05 if beyond == 0 else came - 0.05
    examples = Window(
        torch.tensor([[1, 0, 0], [0, 1, 0], [-1, 0, 1]], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 0.6 - slack], dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([NAN, 0.8, NAN], dtype=torch.float64),
    )
    step = examples.restoring_step(0.6, 1e-12, beyond)
    # The second one is held: back to its target. The third one's loss may rise by its slack.
    expected = torch.tensor([-came, 0.3, slack - came], dtype=torch.float64)
    assert relative_error(step, expected) < 1e-9


def test_nothing_lost_means_no_step():
    examples = window(held=0)
    assert not examples.restoring_step(1e3, 0.1).any()
    no_gradient = Window(
        torch.zeros(3, 2, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        torch.full((3,), NAN),
    )
    assert not no_gradient.restoring_step(0.1, 0.1).any()
    empty = Window(
        torch.zeros(3, 0, dtype=torch.float64),
        *(torch.ones(3).double(),) * 2,
        torch.full((3,), NAN),
    )
    assert empty.restoring_step(0.1, 0.1).shape == (0,)


@pytest.mark.parametrize(
    ("missing", "tokens", "held", "lost"),
    [
        (0.09, 4, False, False),
        (0.11, 4, False, True),
        (1e-6, 4, True, True),
        (1e-6, 0, False, True),
        (0.0, 0, False, False),
    ],
)
def test_what_counts_as_lost(missing, tokens, held, lost):
    """A refusal beyond the tolerance; held examples and losses in other units in any case."""
    count = torch.full((1,), float(tokens), dtype=torch.float64)
    goal = torch.full((1,), 0.2, dtype=torch.float64)
    wrong = log_odds(goal, count) + (missing if held else -missing)
    loss = _losses(wrong, count)
    example = Window(torch.ones(1, 1).double(), loss, count, goal if held else goal * NAN)
    assert example.loses(goal, 0.1) is lost


def test_repeated_examples_and_another_order_change_nothing():
    examples = window()
    step = examples.restoring_step(0.1, 0.1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = Window(*(x[order] for x in vars(examples).values()))
    assert relative_error(shuffled.restoring_step(0.1, 0.1), step) < 1e-10
    doubled = Window(*(torch.cat([x, x]) for x in vars(examples).values()))
    # Two copies count as one that is half as soft.
    assert relative_error(doubled.restoring_step(0.1, 0.2), step) < 1e-8


def test_latest():
    examples = window()
    young = examples.latest(2)
    assert len(young) == 2
    assert torch.equal(young.losses, examples.losses[-2:])
    assert not young.safety.any()
    assert len(examples.latest(0)) == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_nonnegative_minimum_fulfils_its_conditions(size, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T + 0.01 * torch.eye(size, dtype=torch.float64)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    alpha = nonnegative_minimum(matrix, vector)
    slope = vector - matrix @ alpha
    assert bool((alpha >= 0).all())
    assert float(slope.max()) <= 1e-8
    assert float((alpha * slope).abs().max()) <= 1e-8


def test_nonnegative_minimum_leaves_out_no_small_entry():
    vector = torch.tensor([1.0, 1e-4, -1.0, 1e-8, 0.0], dtype=torch.float64)
    assert torch.equal(nonnegative_minimum(torch.eye(5).double(), vector), vector.clamp(min=0))


@pytest.mark.parametrize("size", [1e-6, 1e3, 1e8])
def test_nonnegative_minimum_is_free_of_scale(size):
    """With gradients as many times as long the step is as many times shorter, however small."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        matrix = rows @ rows.T
        matrix = matrix + 0.1 * matrix.diagonal().diag()
        vector = torch.randn(8, generator=generator, dtype=torch.float64)
        expected = nonnegative_minimum(matrix, vector)
        found = nonnegative_minimum(size**2 * matrix, vector) * size**2
        assert relative_error(found, expected) < 1e-9
