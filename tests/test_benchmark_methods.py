"""The benchmark's rivals: each against a closed form, or a property that a mistake would break."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import safety_batch, single, tiny_llama, trainable, with_lora

from benchmarks.evaluation import Losses
from benchmarks.methods import METHODS, Setup, method_class
from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import SafetyCost, holding, joined, snapshot
from benchmarks.records import Point
from benchmarks.training import StepLoss, train
from safeopt.curvature.operators import FisherOperator, HessianOperator
from safeopt.losses import ReferenceKL, refusal_nll

PROTECTED = ("projected_adamw", "safety_sam", "preconditioned_sgd", "safeguard")
LR = 1e-2
SAFETY = safety_batch(seed=1)
TASK = [safety_batch(seed=seed) for seed in range(100, 112)]


def setup(*, lora: bool = False, dtype=torch.float32, seed: int = 0, **given) -> Setup:
    model = tiny_llama(dtype=dtype, hidden=8, layers=1)
    model = with_lora(model, rank=2, random_b=False) if lora else model
    return Setup(
        model=model.train(),
        params=trainable(model),
        safety=[single(SAFETY, row) for row in range(5)],
        harmless=[single(safety_batch(seed=2), row) for row in range(3)],
        learning_rate=LR,
        seed=seed,
        **given,
    )


def build(name: str, given: Setup | None = None, **options):
    if name == "alignguard":  # its package refuses the newest Pythons
        pytest.importorskip("alignment_risk")
    chosen = method_class(name)
    return chosen(given or setup(), chosen.Options(**options))


def run(method, steps: int, *, finish: bool = False) -> list[StepLoss]:
    losses = [StepLoss(method.setup.model, TASK[step]) for step in range(steps)]
    for loss in losses:
        method.step(loss)
    if finish:
        method.finish()
    return losses


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def task_gradient(given: Setup, batch) -> torch.Tensor:
    loss = StepLoss(given.model, batch)()
    return flat(torch.autograd.grad(loss, given.params))


def grad_of(method) -> torch.Tensor:
    return flat(p.grad for p in method.setup.params)


# --- all of them ---


def trained_and_counted(name: str, lora: bool, **options):
    """A method after six steps on one batch, the model, and the batch's loss before them."""
    given = setup(lora=lora)
    before = {n: t.clone() + 0.1 for n, t in tiny_llama(hidden=8, layers=1).state_dict().items()}
    given = Setup(**{**vars(given), "unaligned": lambda: before})
    calls = 0

    def count(module, arguments, output):
        nonlocal calls
        calls += 1

    given.model.register_forward_hook(count)
    batch = TASK[0]
    with torch.no_grad():
        start = float(StepLoss(given.model, batch)())
    calls = 0
    method = build(name, given, **options)
    losses = []
    for _ in range(6):
        losses.append(StepLoss(given.model, batch))
        value = method.step(losses[-1])
        assert math.isfinite(value)
    method.finish()
    task_passes = sum(loss.forward for loss in losses)
    assert task_passes + method.cost.forward == calls
    assert method.cost.backward_tokens >= method.cost.backward
    assert method.cost.forward == 0 or method.cost.seconds > 0
    return method, given.model, start


both = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@both
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_task_and_counts_its_passes(name: str, lora: bool):
    # A random model has no refusals: restoring them would undo what so few steps learn.
    options = {"budget": 10.0} if name in PROTECTED else {}
    method, model, start = trained_and_counted(name, lora, **options)
    with method.evaluating(), torch.no_grad():
        assert float(StepLoss(model, TASK[0])()) < start


@both
@pytest.mark.parametrize("name", PROTECTED)
def test_the_passes_of_restoring_are_counted(name: str, lora: bool):
    method, _, _ = trained_and_counted(name, lora)
    quiet, _, _ = trained_and_counted(name, lora, budget=10.0)
    assert method.cost.forward > quiet.cost.forward


@pytest.mark.parametrize("name", METHODS)
def test_every_file_says_its_source_licence_and_what_was_simplified(name: str):
    import sys

    text = sys.modules[METHODS[name].__module__].__doc__ or ""
    ours = ("projected_adamw", "safety_sam", "preconditioned_sgd", "safeguard", "repair")
    if name not in ("adamw", *ours):
        assert "Apache-2.0" in text or "MIT" in text
        assert "implified" in text


def test_names_of_methods_from_elsewhere(tmp_path):
    assert method_class("benchmarks.methods.adamw:AdamW") is AdamW
    file = tmp_path / "mine.py"
    file.write_text(
        "from benchmarks.methods.adamw import AdamW\nclass Mine(AdamW): pass\nclass Not: pass\n",
        encoding="utf-8",
    )
    broken = tmp_path / "broken.py"
    broken.write_text("class Mine: pass\nclass (:\n", encoding="utf-8")
    assert issubclass(method_class(f"{file}:Mine"), AdamW)
    for name, message in (
        ("magic", "known are adamw"),
        (f"{file}:Yours", "cannot be imported"),
        (f"{tmp_path}/absent.py:Mine", "cannot be imported"),
        (f"{file}:Not", "lacks Options, step"),
        (f"{broken}:Mine", r"SyntaxError: .*broken\.py, line 2"),
        (f"{broken}:Mine", r"SyntaxError: .*broken\.py, line 2"),  # no half of it is kept
    ):
        with pytest.raises(ValueError, match=message):
            method_class(name)


def test_joined_examples_are_the_single_ones():
    examples = [single(SAFETY, row) for row in range(5)]
    alone = [
        float(refusal_nll(tiny_llama(), {k: v for k, v in e.items() if k != "attention_mask"}))
        for e in examples
    ]
    together = refusal_nll(tiny_llama(), joined(examples)).tolist()
    assert together == pytest.approx(alone, rel=1e-4)
    cost = SafetyCost()
    cost.add(joined(examples), backward=True)
    assert cost.backward_tokens == sum(e["input_ids"].numel() for e in examples)


# --- penalties ---


def test_l2_adds_strength_times_the_change():
    method = build("l2_reference", strength=3.0)
    reference = snapshot(method.setup.params)
    run(method, 2)
    change = flat(method.setup.params) - flat(reference)
    expected = task_gradient(method.setup, TASK[2]) + 3.0 * change
    method.step(StepLoss(method.setup.model, TASK[2]))
    torch.testing.assert_close(grad_of(method), expected, rtol=1e-4, atol=1e-5)


def test_ewc_weighs_the_change_by_the_fisher_diagonal():
    method = build("ewc", setup(dtype=torch.float64), strength=50.0, examples=5)
    given = method.setup
    fisher = FisherOperator(given.model, [SAFETY], params=list(given.params)).to_dense().diagonal()
    reference = flat(given.params)
    run(method, 2)
    change = flat(given.params) - reference
    expected = task_gradient(given, TASK[2]) + 50.0 * fisher * change
    method.step(StepLoss(given.model, TASK[2]))
    torch.testing.assert_close(grad_of(method), expected, rtol=1e-6, atol=1e-9)
    assert (method.cost.forward, method.cost.backward) == (1, 1)


def test_the_kl_penalty_is_zero_at_the_reference_and_its_gradient_afterwards():
    method = build("kl_reference", weight=2.0, examples=5, batch_size=5)
    given = method.setup
    reference = ReferenceKL()
    reference.cache(given.model, SAFETY)
    before = task_gradient(given, TASK[0])
    method.step(StepLoss(given.model, TASK[0]))
    torch.testing.assert_close(grad_of(method), before, rtol=1e-3, atol=1e-4)
    kl = reference(given.model, SAFETY).mean()
    expected = task_gradient(given, TASK[1]) + 2.0 * flat(torch.autograd.grad(kl, given.params))
    method.step(StepLoss(given.model, TASK[1]))
    torch.testing.assert_close(grad_of(method), expected, rtol=1e-3, atol=1e-4)


def test_the_kl_penalty_can_know_every_example():
    given = setup()
    for examples, known in ((2, 2), (None, 5)):
        method = build("kl_reference", given, examples=examples)
        assert method.cost.forward_tokens > 0
        assert len({id(method.kl_gradient.examples.next()) for _ in range(10)}) == known


def test_safegrad_removes_the_conflict_and_only_that():
    method = build("safegrad", weight=0.5, examples=5, batch_size=5)
    given = method.setup
    reference = ReferenceKL()
    reference.cache(given.model, SAFETY)
    seen = []
    for step in range(8):
        kl = reference(given.model, SAFETY).mean()
        safety = flat(torch.autograd.grad(kl, given.params))
        task = task_gradient(given, TASK[step])
        method.step(StepLoss(given.model, TASK[step]))
        if step == 0:
            continue  # no gradient at the reference
        kept = grad_of(method) - 0.5 * safety
        conflicts = bool(task @ safety < 0)
        seen.append(conflicts)
        if conflicts:  # orthogonal to the safety gradient, and changed along it only
            assert abs(float(kept @ safety)) < 1e-3 * float(task.norm() * safety.norm())
            change = kept - task
            cosine = float(change @ safety / (change.norm() * safety.norm()))
            assert cosine == pytest.approx(1, abs=1e-3)
        else:
            torch.testing.assert_close(kept, task, rtol=1e-3, atol=1e-4)
    assert set(seen) == {True, False}


def test_constrained_sft_starts_as_sft_and_fades_on_the_first_tokens():
    given = setup()
    expected = task_gradient(given, TASK[0])
    method = build("constrained_sft", given)
    before = float(StepLoss(given.model, TASK[0])().detach())
    loss = StepLoss(given.model, TASK[0])
    assert method.step(loss) == pytest.approx(before, rel=1e-5)
    assert (loss.forward, loss.backward) == (1, 1)
    # At the aligned model σ'(0)·(2/β)·β = 1: the gradient is the usual one.
    torch.testing.assert_close(grad_of(method), expected, rtol=1e-4, atol=1e-6)
    # Later token t has the weight 2(1 − σ(β_t·log-ratio)).
    run(method, 3)
    with torch.no_grad(), holding(given.params, method.reference):
        old, targets = StepLoss(given.model, TASK[5]).log_probs()
    log_probs, _ = StepLoss(given.model, TASK[5]).log_probs()
    old, chosen = (
        x.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) for x in (old, log_probs)
    )
    mask = targets != -100
    beta = torch.zeros_like(chosen)
    for row in range(len(mask)):
        for place, column in enumerate(mask[row].nonzero().flatten().tolist()):
            beta[row, column] = 0.5 if place == 0 else 2.0 if place < 5 else 0.1
    weight = 2 * (1 - torch.sigmoid(beta * (chosen - old))).detach()
    loss = -(weight * chosen * mask).sum() / mask.sum()
    expected = flat(torch.autograd.grad(loss, given.params))
    method.step(StepLoss(given.model, TASK[5]))
    torch.testing.assert_close(grad_of(method), expected, rtol=1e-3, atol=1e-5)


def test_alignguard_s_penalty_is_the_package_s_and_vanishes_at_the_reference():
    given = setup()
    start = task_gradient(given, TASK[0])
    method = build("alignguard", given, strength=2.0, rank=3)
    method.step(StepLoss(given.model, TASK[0]))
    torch.testing.assert_close(grad_of(method), start, rtol=1e-4, atol=1e-6)
    run(method, 2)
    change = flat(given.params) - method.regularizer.reference_vector
    u, values = method.regularizer.basis, method.regularizer.eigenvalues
    dense = FisherOperator(given.model, [SAFETY], params=list(given.params))
    assert u.shape == (dense.size, 3)
    torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=1e-4, atol=1e-4)
    inside = u @ (u.T @ change)
    outside = change - inside
    package = method.regularizer.config
    eta = 1 + package.beta * torch.sigmoid((inside + outside).abs() - package.tau)
    expected = (
        2 * 0.25 * (values * (u.T @ change) ** 2).sum()
        + 2 * 0.5 * (method.regularizer.fisher_diagonal * outside**2).sum()
        + 2
        * 0.1
        * (
            0.5 * (eta * (inside * outside).abs()).mean()
            + 0.5 * (inside @ outside) ** 2 / (inside @ inside * (outside @ outside))
        )
    )
    found = method.regularizer.regularized_loss(torch.zeros(())).total_loss
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-3)


# --- averages, stops, repairs ---


def test_the_average_is_the_closed_form_and_only_counts_in_evaluation():
    method, plain = build("weight_ema", decay=0.8), build("adamw")
    start = flat(plain.setup.params)
    trajectory = []
    for step in range(4):
        plain.step(StepLoss(plain.setup.model, TASK[step]))
        trajectory.append(flat(plain.setup.params))
    run(method, 4)
    expected = 0.8**4 * start
    for step, point in enumerate(trajectory):
        expected = expected + 0.2 * 0.8 ** (3 - step) * point
    with method.evaluating():
        torch.testing.assert_close(flat(method.setup.params), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(flat(method.setup.params), trajectory[-1])


def test_early_stop_goes_back_to_the_last_good_parameters_and_saves_the_rest():
    free = build("early_stop", tolerance=1e9, every=2)
    assert [loss.forward for loss in run(free, 6, finish=True)] == [1] * 6
    method = build("early_stop", tolerance=1e-6, every=2)
    start = flat(method.setup.params)
    alignment = float(refusal_nll(method.setup.model, joined(method.setup.safety)).mean())
    losses = [StepLoss(method.setup.model, TASK[step]) for step in range(6)]
    # The steps go away from the safety examples for certain.
    method.after_backward = lambda: [
        p.grad.copy_(g)
        for p, g in zip(
            method.setup.params,
            torch.autograd.grad(
                -refusal_nll(method.setup.model, SAFETY).mean(), method.setup.params
            ),
            strict=True,
        )
    ]
    for loss in losses:
        method.step(loss)
    assert [loss.forward for loss in losses] == [1, 1, 0, 0, 0, 0]
    assert torch.equal(flat(method.setup.params), start)
    assert method.limit == pytest.approx(alignment + 1e-6, rel=1e-4)


def test_early_stop_goes_back_from_what_is_no_number():
    method = build("early_stop", every=1)
    start = flat(method.setup.params)
    method.optimizer.step = lambda: [p.data.fill_(float("nan")) for p in method.setup.params]
    assert [loss.forward for loss in run(method, 2, finish=True)] == [1, 0]
    assert torch.equal(flat(method.setup.params), start)


def test_ten_examples_trains_on_the_examples_after_training_only():
    method, plain = build("ten_examples", steps=3, examples=5), build("adamw")
    run(plain, 3)
    run(method, 3)
    assert torch.equal(flat(method.setup.params), flat(plain.setup.params))
    assert method.cost.forward == 0
    before = float(refusal_nll(method.setup.model, SAFETY).mean())
    method.finish()
    assert float(refusal_nll(method.setup.model, SAFETY).mean()) < before
    assert (method.cost.forward, method.cost.backward) == (3, 3)


def test_replay_can_be_rare_and_replays_the_model_s_own_answers():
    method = build("replay", every=3)
    run(method, 7)
    assert method.cost.backward == 2
    method = build("replay", answers=2)
    examples = [method.examples.next() for _ in range(4)]
    assert torch.equal(examples[0]["input_ids"], method.setup.safety[0]["input_ids"])
    harmless = method.setup.harmless[0]
    prompt = harmless["input_ids"][0][harmless["labels"][0] == -100].tolist()
    ids = examples[1]["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    for place in range(len(prompt), len(ids)):
        with torch.no_grad():
            logits = method.setup.model(input_ids=torch.tensor([ids[:place]])).logits
        assert int(logits[0, -1].argmax()) == ids[place]
    assert examples[1]["labels"][0].tolist() == [-100] * len(prompt) + ids[len(prompt) :]


def test_lisa_alternates_and_pulls_to_where_it_switched():
    method = build("lisa", proximal=2.0, task_steps=2, safety_steps=3, batch_size=2)
    run(method, 1)
    switched = flat(method.switched_at)
    change = flat(method.setup.params) - switched
    assert float(change.norm()) > 0
    expected = task_gradient(method.setup, TASK[1]) + 2.0 * change
    seen = []
    inner = method._safety_state
    method._safety_state = lambda: (seen.append(grad_of(method)), inner())
    method.step(StepLoss(method.setup.model, TASK[1]))
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert method.cost.backward == 3
    assert torch.equal(flat(method.switched_at), flat(method.setup.params))
    run(method, 3, finish=True)  # steps 3 to 5: one switch, and one at the end
    assert method.cost.backward == 9


# --- subspaces ---


def test_the_static_projection_stays_off_the_safety_gradients_and_never_looks_again():
    given = setup(dtype=torch.float64)
    method = build("static_projection", given, rank=3)
    rows = []
    for example in given.safety[:3]:
        loss = refusal_nll(given.model, example).mean()
        rows.append(flat(torch.autograd.grad(loss, given.params)))
    gradients = torch.stack(rows)
    start = flat(given.params)
    run(method, 1)
    basis, passes = method.basis, method.cost.forward
    run(method, 5)
    change = flat(given.params) - start
    assert float(change.norm()) > 0.01
    assert float((gradients @ change).abs().max()) < 1e-9 * float(gradients.norm() * change.norm())
    assert method.basis is basis
    assert method.cost.forward == passes


def test_the_random_subspace_is_the_seed_s_and_nearly_adamw():
    first, again, other = (build("random_subspace", setup(seed=seed), rank=4) for seed in (0, 0, 1))
    plain = build("adamw")
    starts = flat(plain.setup.params)
    for method in (first, again, other, plain):
        run(method, 3)
    assert torch.equal(flat(first.setup.params), flat(again.setup.params))
    assert not torch.equal(flat(first.setup.params), flat(other.setup.params))
    u = torch.cat([block.flatten(1) for block in first.basis.blocks], 1)
    torch.testing.assert_close(u @ u.T, torch.eye(4), rtol=1e-4, atol=1e-5)
    change = flat(first.setup.params) - starts
    assert float((u @ change).norm()) < 1e-4 * float(change.norm())
    difference = flat(first.setup.params) - flat(plain.setup.params)
    expected = math.sqrt(4 / len(change))  # the share of a random direction
    assert 0.1 * expected < float(difference.norm() / change.norm()) < 5 * expected


def test_the_task_hessian_s_subspace_is_the_dense_top_eigenspace():
    given = setup(dtype=torch.float64)
    method = build("task_hessian", given, rank=3, max_products=400)
    dense = HessianOperator(given.model, [TASK[0]], "causal_lm", params=list(given.params))
    values, vectors = torch.linalg.eigh(dense.to_dense())
    top = values.abs().argsort(descending=True)[:3]
    assert float(values.abs().sort(descending=True).values[3]) < 0.99 * float(values[top[-1]].abs())
    start = flat(given.params)
    run(method, 3)
    u = torch.cat([block.flatten(1) for block in method.basis.blocks], 1)
    angles = torch.linalg.svdvals(u @ vectors[:, top])
    assert float(angles.min()) > 1 - 1e-3
    change = flat(given.params) - start
    assert float((u @ change).norm()) < 1e-8 * float(change.norm())
    assert method.cost.backward > 0


# --- costs ---


def test_set_up_counts_as_safety_and_takes_nothing_off_the_task():
    given = setup()
    method = build("adamw", given)
    method.cost.seconds = 1000.0  # as if it had measured the examples before the first step
    start = Point(step=0, task_loss=1.0, alignment_loss=1.0, seconds=0.0)
    found = train(
        given.model, method, TASK[:2], 2, start, lambda _: Losses(1.0, 1.0, None), 1,
        lambda *_: None, lambda _: None,
    )  # fmt: skip
    seconds = found.seconds
    assert seconds.safety == 1000.0
    assert 0 < seconds.task < 1000.0
    assert seconds.total == pytest.approx(seconds.task + seconds.safety + seconds.evaluation)


# --- Safe LoRA, SAM ---


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_safelora_is_the_paper_s_formula(lora: bool):
    given = setup(lora=lora, dtype=torch.float64)
    base = given.model.get_base_model() if lora else given.model
    names = {n.replace(".base_layer", ""): p for n, p in base.named_parameters()}
    before = {n: p.detach().clone() for n, p in names.items() if "lora" not in n}
    touched = "model.layers.0.self_attn.q_proj.weight"
    torch.manual_seed(3)
    before[touched] += torch.randn_like(before[touched]) @ torch.diag(
        torch.linspace(0, 1, 8).double()
    )

    def unaligned():
        assert torch.is_grad_enabled(), "it may have to be trained first"
        return before

    given = Setup(**{**vars(given), "unaligned": unaligned})
    start = names[touched].detach().clone()
    v = start - before[touched]
    c = v @ v.T / v.norm()

    def change(method) -> torch.Tensor:
        if not lora:
            return names[touched].detach() - start
        layer = base.model.layers[0].self_attn.q_proj
        return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()

    method = build("safelora", given, threshold=2.0)
    run(method, 3)
    update = change(method)
    rest = {n: p.detach().clone() for n, p in names.items() if n != touched and "q_proj" not in n}
    method.finish()
    assert method.projected == [touched]
    torch.testing.assert_close(change(method), c @ update)
    assert all(torch.equal(names[n], p) for n, p in rest.items())
    cosine = float((update * (c @ update)).sum() / (update.norm() * (c @ update).norm()))
    for threshold, projected in ((cosine - 0.01, []), (cosine + 0.01, [touched])):
        update = change(method)
        method.threshold, method.projected = threshold, []
        now = float((update * (c @ update)).sum() / (update.norm() * (c @ update).norm()))
        method.threshold += now - cosine
        method.finish()
        assert method.projected == projected


def test_safelora_needs_the_unaligned_model():
    with pytest.raises(ValueError, match=r"model\.unaligned"):
        build("safelora")


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_sam_takes_the_gradient_at_the_perturbed_point(name: str):
    given = setup(dtype=torch.float64)
    start = snapshot(given.params)
    gradient = torch.autograd.grad(StepLoss(given.model, TASK[0])(), given.params)
    if name == "sam":
        direction = list(gradient)
        norm = flat(gradient).norm()
    else:  # T² g / ‖T g‖ with T = |θ|
        direction = [p.detach() ** 2 * g for p, g in zip(given.params, gradient, strict=True)]
        norm = flat(p.detach() * g for p, g in zip(given.params, gradient, strict=True)).norm()
    with torch.no_grad():
        for parameter, d in zip(given.params, direction, strict=True):
            parameter += 0.1 * d / norm
    expected = task_gradient(given, TASK[0])
    with torch.no_grad():
        for parameter, value in zip(given.params, start, strict=True):
            parameter.copy_(value)
    method = build(name, given, rho=0.1)
    loss = StepLoss(given.model, TASK[0])
    method.step(loss)
    assert (loss.forward, loss.backward) == (2, 2)
    torch.testing.assert_close(grad_of(method), expected, rtol=1e-5, atol=1e-7)
    twin = SimpleNamespace(p=[torch.nn.Parameter(v.clone()) for v in start])
    plain = torch.optim.AdamW(twin.p, lr=LR)
    for parameter, given_parameter in zip(twin.p, given.params, strict=True):
        parameter.grad = given_parameter.grad.clone()
    plain.step()
    torch.testing.assert_close(flat(given.params), flat(twin.p))
