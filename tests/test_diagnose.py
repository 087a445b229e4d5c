"""The Alignment Instability Condition against closed forms, and against dense linear algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from quadratic import Quadratic, orthogonal, probe_of
from scipy import stats
from tiny_models import safety_batch, tiny_llama, trainable, with_lora

from safeopt import RefreshPolicy, SafetyProbe, refusal_nll, safeguard
from safeopt.curvature.operators import HessianOperator
from safeopt.diagnostics import diagnose
from safeopt.diagnostics.conditions import (
    NAMES,
    _student,
    figures,
    intervals,
    jackknife_interval,
    random_coupling,
)
from safeopt.diagnostics.layers import block_shares, layer_shares, module_name
from safeopt.diagnostics.lookahead import adam_rise
from safeopt.diagnostics.measure import Evidence, first_adam_update, measure
from safeopt.diagnostics.plots import layer_plot
from safeopt.diagnostics.spectrum import Spectrum

N, K = 24, 3
VALUES = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)


def analytic(*, overlap: float = 0.0, tail: float = 0.0, coupling: float = 0.7):
    """A system whose every figure is known: safety directions e_1..e_3, task direction e_4.

    Each direction has a pair of examples ±√(3λ)e, so that the mean safety gradient is zero.
    """
    axes = orthogonal(N)
    safe, free = axes[:K], axes[K]
    count = K + (tail > 0)
    lengths = (count * VALUES).sqrt()
    rows = [lengths[:, None] * safe]
    if tail > 0:
        rows.append((count * torch.tensor([[tail]], dtype=torch.float64)).sqrt() * axes[K + 1])
    directions = torch.cat([*rows, *(-row for row in rows)])
    gradient = math.sqrt(1 - overlap**2) * free + overlap * safe[0]
    hessian = 0.2 * torch.eye(N, dtype=torch.float64)
    # The curvature couples the task direction with the second safety direction.
    hessian += coupling * (torch.outer(safe[1], free) + torch.outer(free, safe[1]))
    model = Quadratic(hessian, gradient)
    return model, probe_of(model, directions)


def task_of(model, count=3):
    return [torch.zeros(1)] * count, lambda module, batch: module.task()


def check(model, probe, **choices):
    batches, loss = task_of(model)
    return diagnose(probe, batches, task_loss=loss, rank=K, **choices)


def test_every_figure_equals_its_closed_form():
    overlap, tail, coupling = 0.05, 0.1, 0.7
    result = check(*analytic(overlap=overlap, tail=tail, coupling=coupling))
    exact = {
        "top": 4.0,
        "lowest": 1.0,
        "tail": tail / (7 + tail),
        "effective_rank": (7 + tail) ** 2 / (21 + tail**2),
        "overlap": overlap,
        "drift": 2.0 * overlap,
        # Hg has 0.2·overlap along e_1 (λ = 4) and coupling·√(1 − overlap²) along e_2 (λ = 2).
        "coupling": math.sqrt(4 * (0.2 * overlap) ** 2 + 2 * coupling**2 * (1 - overlap**2)),
    }
    for name, value in exact.items():
        assert getattr(result.figures, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert result.angle == pytest.approx(math.acos(overlap), abs=1e-6)
    assert result.eigenvalues[:K] == pytest.approx(VALUES.tolist(), rel=1e-6)
    update = model_update(result)
    assert result.figures.update_overlap == pytest.approx(update, rel=1e-6)
    assert [c.holds for c in result.conditions] == [True, True, True]
    assert result.verdict.risk == "at risk"


def test_the_kth_eigenvalue_is_zero_where_the_examples_span_fewer_directions():
    """Examples that repeat each other, as the pairs ±g do."""
    model, probe = analytic()
    batches, loss = task_of(model)
    result = diagnose(probe, batches, task_loss=loss, rank=5)
    assert result.figures.lowest == 0
    assert result.intervals["lowest"] == (0, 0)
    assert result.figures.top == pytest.approx(4)


def model_update(result):
    """‖Pu‖/‖u‖ of Adam's first update, from the analytic system's own vectors."""
    model, _ = analytic(overlap=0.05, tail=0.1)
    update = model.slope / (model.slope.abs() + 1e-8)
    return float((orthogonal(N)[:K] @ update).norm() / update.norm())


@pytest.mark.parametrize(
    ("system", "holds", "risk"),
    [
        ({"coupling": 0.0}, [True, True, False], "not shown"),
        ({"overlap": 0.5}, [True, False, True], "at risk at once"),
        ({"tail": 0.95}, [False, True, True], "unclear"),
    ],
)
def test_the_verdict_follows_the_conditions(system, holds, risk):
    result = check(*analytic(**system))
    assert [c.holds for c in result.conditions] == holds
    assert result.verdict.risk == risk


def test_figures_of_a_language_model_equal_dense_linear_algebra():
    model = with_lora(tiny_llama(dtype=torch.float64))
    probe = SafetyProbe(model, [safety_batch(seed=s) for s in range(3)])
    task = [safety_batch(seed=s) for s in (10, 11)]
    result = diagnose(probe, task, rank=4)
    params = trainable(model)
    flat = [row.flatten(1) for row in probe.per_example(params).rows]
    rows = torch.cat(flat, dim=1)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    u, top = vectors[:, -4:], values[-4:]

    def loss():
        total, count = 0.0, 0
        for batch in task:
            out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            targets = batch["labels"][:, 1:]
            seen = batch["attention_mask"][:, :-1] * (targets != -100)
            nll = -out.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            total, count = total + (nll * seen).sum(), count + int(seen.sum())
        return total / count

    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        parts = torch.autograd.grad(loss(), params, create_graph=True)
        gradient = torch.cat([p.flatten() for p in parts])
        bent = torch.autograd.grad(gradient @ gradient.detach(), params)
    bending = torch.cat([p.flatten() for p in bent])
    gradient = gradient.detach()
    expected = {
        "top": top[-1],
        "lowest": top[0],
        "tail": 1 - top.sum() / values.sum(),
        "overlap": (u.T @ gradient).norm() / gradient.norm(),
        "drift": (top.sqrt() * (u.T @ gradient)).norm(),
        "coupling": (top.sqrt() * (u.T @ bending)).norm(),
    }
    for name, value in expected.items():
        assert getattr(result.figures, name) == pytest.approx(float(value), rel=1e-6), name
    assert sum(layer.curvature for layer in result.layers) == pytest.approx(1)
    assert sum(layer.subspace for layer in result.layers) == pytest.approx(1 - result.figures.tail)
    assert {layer.kind for layer in result.layers} == {"self_attn.q_proj", "self_attn.v_proj"}


def test_nothing_is_left_behind_and_passes_are_counted():
    model = with_lora(tiny_llama()).train()
    probe = SafetyProbe(model, [safety_batch()])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    seen = []
    result = diagnose(probe, [safety_batch(seed=1)] * 2, listener=lambda *x: seen.append(x))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert result.evidence.passes["safety_forward"] == 1
    more = diagnose(probe, [safety_batch(seed=1)] * 3).evidence.passes
    few = result.evidence.passes
    assert more["task_forward"] - few["task_forward"] == 2, "a gradient and a graph, no trial"
    # The same with their backward passes, and 3·3 products on three graphs for 2·2 on two.
    assert more["task_backward"] - few["task_backward"] == 2 + 5
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] < seen[-1][2]


def test_lora_at_its_start_is_half_blind_and_says_so():
    model = with_lora(tiny_llama(), random_b=False)
    result = diagnose(SafetyProbe(model, [safety_batch()]), [safety_batch(seed=1)] * 2)
    assert len(result.evidence.blind) == 4
    assert all("lora_A" in name for name in result.evidence.blind)
    assert any("LoRA's B = 0" in note for note in result.verdict.notes)


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.safe.weight", "layers.3.mlp.up_proj"),
        ("base_model.model.model.embed_tokens.lora_embedding_B.safe", "embed_tokens"),
        ("base_model.model.model.head.modules_to_save.safe.bias", "head"),
        ("model.layers.3.mlp.up_proj.base_layer.weight", "layers.3.mlp.up_proj"),
    ],
)
def test_modules_are_called_as_the_model_calls_them(parameter, module):
    assert module_name(parameter) == f"model.{module}"


def test_wrong_arguments_are_named():
    model, probe = analytic()
    batches, loss = task_of(model)
    for choices, words in (
        ({"rank": 0}, "rank=0"),
        ({"rank": 6}, "rank=6"),
        ({"examples": 1}, "examples=1"),
        ({"params": lambda name: False}, "params: none of"),
    ):
        with pytest.raises(ValueError, match=words):
            diagnose(probe, batches, task_loss=loss, **choices)
    with pytest.raises(ValueError, match="at least two"):
        diagnose(probe, batches[:1], task_loss=loss)
    still = probe_of(model, torch.zeros(4, N))
    with pytest.raises(ValueError, match="every safety gradient is zero"):
        diagnose(still, batches, task_loss=loss, rank=1)
    for task in (iter(batches), {"input_ids": 0}, "batches"):
        with pytest.raises(TypeError, match=r"task=\w+: expected a list of training batches"):
            diagnose(probe, task, task_loss=loss)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_batch_that_is_no_number_is_refused(scale):
    """Comparisons with NaN are false: the coupling would not be shown, and the overlap zero."""
    _, probe = analytic()
    batches = [torch.tensor(x, dtype=torch.float64) for x in (1.0, scale, 1.0)]
    with pytest.raises(ValueError, match="task: batch 1 has no finite loss and gradient"):
        diagnose(probe, batches, task_loss=lambda module, x: x * module.task(), rank=K)

    def bent(module, x):  # |d|^1.5 at d = 0 has the gradient 0 and no second derivative
        rough = (module.x - module.start).abs().pow(1.5).sum() if x != 1 else 0
        return module.task() + rough

    with pytest.raises(ValueError, match="task: batch 1 has no finite Hessian-vector products"):
        diagnose(probe, batches, task_loss=bent, rank=K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_at_the_reference_of_a_divergence_is_no_curvature(dtype):
    """There the gradient is that of differences in the last place, not exactly zero."""
    model = tiny_llama(dtype=dtype)
    probe = SafetyProbe(model, [safety_batch()], loss="kl")
    with pytest.raises(ValueError, match='loss="kl" has none at its own reference'):
        diagnose(probe, [safety_batch(seed=1), safety_batch(seed=2)])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    assert diagnose(probe, [safety_batch(seed=1), safety_batch(seed=2)]).figures.top > 0


def test_random_directions_have_the_coupling_that_theory_says():
    spectrum = Spectrum.of(torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)) * 2)
    # One direction: |N(0, 1)|·√λ·length/√n, whose 95% quantile is 1.96.
    assert random_coupling(spectrum, 1, 100, 3.0, 0.95) == pytest.approx(1.96 * 0.6, rel=0.05)


def test_the_jackknife_interval_of_a_mean_is_students():
    """The jackknife variance of a mean is s²/q, and with one sample the freedom q − 1."""
    sample = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = [(sample.sum() - value) / 8 for value in sample]
    mean, error = float(sample.mean().abs()), float(sample.std()) / 3
    low, high = jackknife_interval(mean, [rest, []], 0.95)
    assert (low, high) == pytest.approx(
        (max(mean - 2.306 * error, 0), mean + 2.306 * error), rel=1e-3
    )
    assert jackknife_interval(2.0, [[2.0, 2.0], []], 0.95) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("freedom", "tolerance"), [(1, 1e-9), (2, 0.035), (3, 0.011), (6, 1e-3), (40, 1e-6)]
)
def test_students_quantiles(freedom, tolerance):
    for share in (0.9, 0.975):
        exact = float(stats.t.ppf(share, freedom))
        assert _student(share, freedom) == pytest.approx(exact, rel=tolerance)


def test_two_samples_have_welchs_degrees_of_freedom():
    """The sum of two means: the difference's interval of Welch's test, around the sum."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(9, generator=generator, dtype=torch.float64)
    two = 2 * torch.randn(6, generator=generator, dtype=torch.float64)
    total = float(one.mean() + two.mean())
    groups = [
        [float((x.sum() - value) / (len(x) - 1) + other) for value in x]
        for x, other in ((one, two.mean()), (two, one.mean()))
    ]
    exact = stats.ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    reach = (exact.high - exact.low) / 2
    low, high = jackknife_interval(total + 100, [[v + 100 for v in g] for g in groups], 0.95)
    assert high - low == pytest.approx(2 * reach, rel=2e-3)


def simulated(generator, m=24, count=4, n=60):
    """Safety and task gradients around fixed means, one Hessian: evidence as the passes find it."""
    fixed = torch.Generator().manual_seed(3)
    decay = torch.arange(1, n + 1, dtype=torch.float64).reciprocal()
    hessian = torch.randn(n, n, generator=fixed, dtype=torch.float64) / n**0.5
    hessian = hessian + hessian.T
    means = torch.randn(2, n, generator=fixed, dtype=torch.float64)
    noise = torch.randn(m + count, n, generator=generator, dtype=torch.float64)
    safety = decay * (noise[:m] + means[0])
    task = 0.5 * noise[m:] + 0.3 * means[1]
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    bent = task @ hessian
    updates = torch.stack(first_adam_update(list(task)))
    return Evidence(
        names=["weight"],
        sizes=[n],
        grams=(safety @ safety.T)[None],
        safety_losses=torch.zeros(m),
        response_tokens=torch.ones(m),
        weights=weights,
        task_losses=torch.zeros(count),
        gradient=safety @ task.T,
        gradient_products=task @ task.T,
        gradient_energy=(weights @ task).square().sum()[None],
        update=safety @ updates.T,
        update_norms=updates.norm(dim=1),
        bending=(safety @ bent.T)[:, None].expand(m, count, count),
        bending_norm=float((weights @ bent).norm()),
        products="double",
    )


def test_a_sample_of_the_batches_is_their_own_mean():
    """The weights of those that are left are shares again."""
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    evidence = replace(simulated(torch.Generator().manual_seed(0)), weights=weights)
    some = figures(evidence, 12, batches=torch.tensor([1, 3]))
    rest = torch.tensor([0, 0.75, 0, 0.25], dtype=torch.float64)
    whole = figures(replace(evidence, weights=rest), 12)
    for name in ("overlap", "drift", "coupling"):
        assert getattr(some, name) == pytest.approx(getattr(whole, name)), name


def test_intervals_cover_what_other_samples_give_on_average():
    """Also where half of the examples' directions count, and where only the gradients vary."""
    generator = torch.Generator().manual_seed(0)
    points = [figures(simulated(generator), 12) for _ in range(300)]
    hits, widths = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0.0)
    for _ in range(60):
        evidence = simulated(generator)
        found = intervals(evidence, 12, figures(evidence, 12))
        for name in NAMES:
            low, high = found[name]
            widths[name] += math.log(high / low) / 60
            hits[name] += low <= sum(getattr(point, name) for point in points) / 300 <= high
    assert all(hit >= 0.8 * 60 for hit in hits.values()), hits
    for name in NAMES:  # four standard deviations are a 95% interval
        spread = torch.tensor([getattr(point, name) for point in points]).log().std()
        assert widths[name] < 3 * 4 * spread, name


def test_with_all_directions_but_one_the_tail_is_not_certain():
    result = diagnose(
        SafetyProbe(tiny_llama(), [safety_batch()]), [safety_batch(seed=1)] * 2, rank=4
    )
    tail = result.conditions[0]
    assert 0 < tail.value < 1
    assert tail.interval == (0.0, 1.0)
    assert not tail.certain


def test_coupling_from_differences_of_coordinates_is_that_of_a_hessian_vector_product():
    """What the optimizers log for free equals the explicit product on a small transformer."""
    model = tiny_llama(dtype=torch.float64)
    params, task, rate = trainable(model), safety_batch(seed=7), 1e-3
    probe = SafetyProbe(model, [safety_batch()])
    optimizer = safeguard(
        torch.optim.SGD(params, lr=rate), probe, mode="none", rank=3, trial_examples=1,
        refresh=RefreshPolicy.fixed(10**6),
    )  # fmt: skip
    bending = []
    for _ in range(2):
        optimizer.zero_grad()
        refusal_nll(model, task).mean().backward()
        bending.append(HessianOperator(model, [task], "nll").matvec([p.grad for p in params]))
        optimizer.step()
    subspace = optimizer.safety.subspace
    explicit = subspace.eigenvalues.sqrt() * subspace.basis.coordinates(bending[0])
    assert optimizer.safety.coupling == pytest.approx(float(explicit.norm()), rel=0.05)


def test_the_legend_of_the_layer_plot_hides_no_bar():
    layers = [
        {"block": block, "curvature": 0.25, "subspace": 0.2, "gradient": 0.25} for block in range(4)
    ]
    figure = layer_plot(layers)
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_legend() is None
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_task_batches_count_by_their_examples():
    """Three examples of one quadratic task, times 1, 2 and 3: the mean of all is twice the task."""
    model, probe = analytic(overlap=0.3)
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    result = diagnose(probe, batches, task_loss=lambda m, a: a.double() * m.task(), rank=K)
    once = check(model, probe)
    assert result.evidence.weights.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert result.evidence.gradient_energy.sum() == pytest.approx(
        4 * float(model.slope @ model.slope)
    )
    bent = float((model.hessian @ model.slope).norm())
    assert result.evidence.bending_norm == pytest.approx(4 * bent)
    assert result.figures.drift == pytest.approx(2 * once.figures.drift)
    assert result.figures.coupling == pytest.approx(4 * once.figures.coupling)
    assert result.figures.overlap == pytest.approx(0.3)


def test_shares_of_modules_equal_dense_linear_algebra():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, N, generator=generator, dtype=torch.float64)
    gradient = torch.randn(N, generator=generator, dtype=torch.float64)
    model = Quadratic(torch.eye(N, dtype=torch.float64), gradient, [(2, 5), (4,), (10,)])
    batches, loss = task_of(model)
    result = diagnose(probe_of(model, directions), batches, task_loss=loss, rank=K)
    names = ["layers.1.b.weight", "layers.1.b.bias", "layers.0.a.weight"]
    shares = layer_shares(replace(result.evidence, names=names), K)
    assert [(s.name, s.block, s.kind) for s in shares] == [
        ("layers.1.b", 1, "b"), ("layers.0.a", 0, "a"),
    ]  # fmt: skip
    _, sizes, v = torch.linalg.svd(directions, full_matrices=False)
    top = sizes[:K, None] * v[:K]
    for share, entries in zip(shares, (slice(14), slice(14, None)), strict=True):
        assert share.parameters == len(gradient[entries])
        for figure, rows in (("curvature", directions), ("subspace", top)):
            expected = rows[:, entries].square().sum() / directions.square().sum()
            assert getattr(share, figure) == pytest.approx(float(expected)), figure
        expected = gradient[entries].square().sum() / gradient.square().sum()
        assert share.gradient == pytest.approx(float(expected))
    double = [*shares, shares[0]]
    assert list(block_shares(double).items()) == [
        (0, shares[1].curvature), (1, pytest.approx(2 * shares[0].curvature)),
    ]  # fmt: skip


def test_adams_forecast_moves_log_odds_on_straight_lines():
    evidence = replace(
        simulated(torch.Generator().manual_seed(0)),
        safety_losses=torch.linspace(0.1, 2, 24, dtype=torch.float64),
        response_tokens=torch.arange(24, dtype=torch.float64) % 5 + 1,
        weights=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64),
    )
    rate, steps, rises = 0.01, 7, []
    for i, (loss, tokens) in enumerate(
        zip(evidence.safety_losses.tolist(), evidence.response_tokens.tolist(), strict=True)
    ):
        change = -rate * steps * float(evidence.update[i] @ evidence.weights)
        total = loss * tokens
        odds = -math.log(math.expm1(total)) - tokens / (1 - math.exp(-total)) * change
        rises.append(math.log1p(math.exp(-odds)) / tokens - loss)
    assert adam_rise(evidence, rate, steps) == pytest.approx(sum(rises) / 24)
    with pytest.raises(ValueError, match="learning_rate=0"):
        adam_rise(evidence, 0, steps)
    with pytest.raises(ValueError, match="steps=-1"):
        adam_rise(evidence, rate, -1)


def test_adams_first_update_is_that_of_torch():
    """Zero where the gradient is, as for LoRA's A at its start; a small one makes a small step."""
    gradient = torch.tensor([0.0, 1e-8, -1e-7, 2.0], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = gradient.clone()
    torch.optim.Adam([p], lr=1.0).step()
    [update] = first_adam_update([gradient])
    assert torch.allclose(-p.detach(), update, rtol=1e-9)


def test_some_examples_are_known_by_their_own_figures():
    """Those that were drawn; also where their gradients are kept as factors."""
    model = with_lora(tiny_llama(layers=1, dtype=torch.float64))
    probe = SafetyProbe(model, [safety_batch()])
    params, drawn = trainable(model), [1, 3, 4]
    losses, rows = probe.per_example(params, drawn)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    task = [safety_batch(seed=s) for s in (1, 2)]
    flat = torch.cat([row.flatten(1) for row in rows], dim=1)
    for limit in (1 << 30, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("safeopt.diagnostics.measure._DENSE_BYTES", limit)
            if not limit:  # too large to be formed
                patch.delattr(SafetyProbe, "per_example")
            found = measure(
                probe, task, params, names,
                task_loss="causal_lm", examples=drawn, listener=lambda *_: None,
            )  # fmt: skip
        assert found.safety_losses.tolist() == pytest.approx(losses.tolist())
        assert torch.equal(found.response_tokens, probe.response_tokens(drawn))
        assert torch.allclose(found.gram, flat @ flat.T, rtol=1e-9)
    assert replace(found, grams=1e-12 * found.grams).blind == [], "small is not zero"
