"""SafetySAM against plain SAM and dense references, and as a torch optimizer."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_table import NEVER, copies, equal
from optimizer_table import probe_of as language_probe
from pytorch_optimizer import SAM
from quadratic import Quadratic, dense_basis, orthogonal, probe_of
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from tiny_models import task_step, tiny_llama, trainable, with_lora
from tolerances import relative_error
from transformers import Trainer, TrainingArguments

from safeopt import RefreshPolicy, optimizers, safeguard
from safeopt.integrations.transformers import SafetyCallback
from safeopt.optim import SafetySAM


@pytest.fixture(scope="module", autouse=True)
def whole_first_look():
    """The first look takes all ``examples``, so that the subspace is the one a test has chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safeopt.optim.geometry._FEWEST", 10**6)
        yield


# The ascent and the map alone, without the pull to the aligned model.
OPTIONS = {
    "trial_examples": 1, "examples": 8, "elastic": 0.0, "refresh": NEVER, "rho": 0.1,
    "ascent": "task",
}  # fmt: skip
modes = pytest.mark.parametrize("mode", ["two_pass", "lookahead"])


def problem(shapes=((2, 2), (3,), (1, 2)), *, rank=3, seed=0, dtype=torch.float64):
    n = sum(torch.Size(shape).numel() for shape in shapes)
    generator = torch.Generator().manual_seed(seed)
    root, gradient = (torch.randn(s, generator=generator).double() for s in ((n, n), (n,)))
    model = Quadratic(root @ root.T / n, gradient, shapes, dtype=dtype, seed=seed)
    basis = orthogonal(n, seed)[:, :rank]
    mix = torch.randn(max(9, n + 1), rank, generator=generator).double()
    return model, probe_of(model, mix @ basis.T)


def sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.05, "momentum": 0.9, **options})


def build(model, probe, mode="two_pass", base=None, **options):
    base = sgd(model.parameters()) if base is None else base
    return SafetySAM(base, probe=probe, mode=mode, **{**OPTIONS, **options})


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.step(lambda: model.closure(optimizer))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_the_whole_space_is_plain_sam(base):
    """With U square, ε = ρ g/‖g‖ (Foret et al., equation 2)."""
    model, probe = problem(rank=9)
    optimizer = SafetySAM(
        model.parameters(), base, lr=0.05, probe=probe, mode="two_pass", damping=0,
        **{**OPTIONS, "examples": 9},
    )  # fmt: skip
    plain, _ = problem()
    reference = base(plain.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.step(lambda: model.closure(optimizer))
        plain.closure(reference)
        gradients = [p.grad.clone() for p in plain.weights]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        before = copies(plain.weights)
        with torch.no_grad():
            for p, g in zip(plain.weights, gradients, strict=True):
                p.add_(0.1 * g / norm)
        plain.closure(reference)
        with torch.no_grad():
            for p, kept in zip(plain.weights, before, strict=True):
                p.copy_(kept)
        reference.step()
        assert relative_error(model.x, plain.x) < 1e-10
    assert optimizer.safety.subspace.rank == 9


def test_the_whole_space_is_pytorch_optimizers_sam():
    model, probe = problem(rank=9)
    base = sgd(model.parameters())
    optimizer = build(model, probe, base=base, damping=0, **{"examples": 9})
    plain, _ = problem()
    reference = SAM(plain.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)

    def closure():  # of tensors: that library's closure is called with gradients enabled
        reference.zero_grad()
        loss = plain.task()
        loss.backward()
        return loss

    for _ in range(10):
        train(model, optimizer, 1)
        closure()
        reference.step(closure)
        assert relative_error(model.x, plain.x) < 1e-6


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=2), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from(["task", "safety"]),
    st.sampled_from(["two_pass", "lookahead"]),
    st.booleans(),
)
def test_equals_a_dense_reference(shapes, rank, seed, ascent, mode, maximize):
    """ε = ρUe in plain vectors, for both ways, both ascents and both signs of the loss."""
    size = sum(torch.Size(shape).numel() for shape in shapes)
    model, probe = problem(shapes, rank=min(rank, size), seed=seed)
    base = sgd([{"params": [p]} for p in model.weights], momentum=0.0, maximize=maximize)
    optimizer = build(model, probe, mode, base=base, ascent=ascent, damping=0, beta=0.7)
    sign = -1.0 if maximize else 1.0
    d, momentum, epsilon = torch.zeros(size).double(), 0.0, torch.zeros(size).double()
    for _ in range(4):
        train(model, optimizer, 1)
        basis, surrogate = dense_basis(optimizer), optimizer.safety.subspace.surrogate

        def along(inside, d, basis=basis, surrogate=surrogate):
            climbed = surrogate.slope(basis.T @ d) if ascent == "safety" else inside
            return 0.1 * basis @ climbed / climbed.norm()

        if mode == "two_pass":
            epsilon = along(basis.T @ (sign * model.task_gradient(d)), d)
            d = d - 0.05 * sign * model.task_gradient(d + epsilon)
        else:
            gradient = sign * model.task_gradient(d + epsilon)
            d = d - 0.05 * gradient
            momentum = 0.7 * momentum + 0.3 * basis.T @ gradient
            epsilon = along(momentum, d)
            assert relative_error(model.moved, d + epsilon) < 1e-9
        with optimizer.unperturbed():
            assert relative_error(model.moved, d) < 1e-9


@pytest.mark.parametrize(("mode", "calls"), [("two_pass", 2), ("lookahead", 1)])
def test_closure_calls_and_safety_passes(mode, calls):
    model, probe = problem()
    optimizer = build(model, probe, mode, refresh=RefreshPolicy.fixed(3), restore_alignment=False)
    seen = []

    def closure():
        seen.append(model.moved)
        assert optimizer.safety.history  # the reference is taken before training
        return model.closure(optimizer)

    for step in range(7):
        loss = optimizer.step(closure)
        assert len(seen) == calls * (step + 1)
        if mode == "two_pass":  # the loss at θ is returned, and the second call is at ρ from it
            assert (seen[-1] - seen[-2]).norm() == pytest.approx(0.1, rel=1e-9)
            d = seen[-2]
            assert loss == pytest.approx(float(0.5 * d @ model.hessian @ d + model.slope @ d))
    assert [entry.step for entry in optimizer.safety.history] == [0, 3, 6]
    assert optimizer.safety.step_count == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_return_bit_for_bit(dtype):
    model = tiny_llama(layers=1, dtype=dtype)
    params = trainable(model)
    for mode in ("two_pass", "lookahead"):
        optimizer = SafetySAM(
            params, torch.optim.SGD, lr=1e-2, probe=language_probe(model), rho=0.5, mode=mode
        )
        if mode == "two_pass":
            task_step(model, 0)
            before = copies(params)
            with optimizer.second_pass():
                assert not equal(params, before)
                assert all(p.grad is None for p in params)
            assert equal(params, before)
            continue
        for step in range(3):
            task_step(model, step)
            optimizer.step()
            held = copies(params)
            optimizer.eval()
            before = copies(params)
            assert not equal(held, before)
            optimizer.eval()
            optimizer.train()
            optimizer.train()
            assert equal(params, held)
            with optimizer.unperturbed():
                assert equal(params, before)
            assert equal(params, held)


@modes
@pytest.mark.parametrize("failing", [1, 2])
def test_exceptions_in_the_closure_leave_everything_as_before(mode, failing):
    model, probe = problem()
    optimizer = build(model, probe, mode)
    train(model, optimizer, 2)
    before, calls = copies(model.parameters()), []

    def closure():
        calls.append(1)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return model.closure(optimizer)

    if mode == "two_pass" or failing == 1:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert equal(model.parameters(), before)
        assert optimizer.safety.step_count == 2
    train(model, optimizer, 1)


def test_accumulation_and_clipping_inside_the_closure():
    """Two half losses add up to the whole; clipping limits what the base optimizer sees."""
    ends = []
    for parts in (1, 2):
        model, probe = problem()
        optimizer = build(model, probe, base=sgd(model.parameters(), momentum=0.0))

        def closure(model=model, optimizer=optimizer, parts=parts):
            optimizer.zero_grad()
            for _ in range(parts):
                (model.task() / parts).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return 0.0

        optimizer.step(closure)
        norm = torch.cat([p.grad.flatten() for p in model.weights]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-4)
        ends.append(model.moved)
    assert relative_error(ends[1], ends[0]) < 1e-12


@modes
def test_parameters_without_a_gradient(mode):
    """They are perturbed, return bit for bit, and are not stepped: also if only in one pass."""
    model, probe = problem()
    optimizer = build(model, probe, mode, damping=0)
    first, calls = model.weights[0].detach().clone(), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        model.task().backward()
        if mode == "lookahead" or len(calls) % 2 == 0:
            model.weights[0].grad = None
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    with optimizer.unperturbed():
        assert torch.equal(model.weights[0], first)
        assert not torch.equal(model.weights[1].flatten(), model.start[4:7])


@pytest.mark.parametrize("overflow", [None, "first", "second"])
def test_gradient_scaler_with_two_passes(overflow):
    model, probe = problem()
    optimizer = build(model, probe)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plain, other = problem()
    reference = build(plain, other)
    for step in range(3):
        bad = step == 1 and overflow is not None
        before = copies(model.parameters())
        optimizer.zero_grad()
        scale = math.inf if bad and overflow == "first" else 1.0
        scaler.scale(model.task() * scale).backward()
        with optimizer.second_pass():
            scaler.scale(model.task() * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert equal(model.parameters(), before) == bad
        if not bad:
            train(plain, reference, 1)
        assert relative_error(model.x, plain.x) < 1e-12
    assert optimizer.safety.step_count == (3 if overflow is None else 2)


@pytest.mark.parametrize("cleared_by", ["optimizer", "optimizer, to zeros", "model"])
def test_a_second_pass_does_not_outlive_its_gradients(cleared_by):
    """A scaler skips the step after it: the next step needs a second pass of its own."""
    model, probe = problem()
    optimizer = build(model, probe)
    clear = {
        "optimizer": optimizer.zero_grad,
        "optimizer, to zeros": lambda: optimizer.zero_grad(set_to_none=False),
        "model": model.zero_grad,
    }[cleared_by]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model.task()).backward()
    with optimizer.second_pass():
        scaler.scale(model.task() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.safety.step_count == 0
    clear()
    scaler.scale(model.task()).backward()
    with pytest.raises(RuntimeError, match="evaluates the loss twice"):
        scaler.step(optimizer)
    scaler.update()
    clear()
    scaler.scale(model.task()).backward()
    with optimizer.second_pass():
        scaler.scale(model.task()).backward()
    scaler.step(optimizer)
    assert optimizer.safety.step_count == 1


def test_gradient_scaler_with_lookahead():
    model, probe = problem()
    optimizer = build(model, probe, "lookahead")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plain, other = problem()
    reference = build(plain, other, "lookahead")
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model.task() * (math.inf if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(plain, reference, 1)
        assert relative_error(model.x, plain.x) < 1e-12
    assert optimizer.safety.step_count == 3


@modes
@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
def test_without_a_subspace_it_is_the_base_optimizer_bit_for_bit(mode, base):
    for empty in ("strengths", "rank 0"):
        model, probe = problem()
        options = {"rho": 0.0, "damping": 0.0} if empty == "strengths" else {}
        if empty == "rank 0":
            probe = probe_of(model, torch.zeros(9, len(model.start)), sharpness=0.0)
        cls = getattr(torch.optim, base)
        optimizer = build(model, probe, mode, base=cls(model.parameters(), lr=0.01), **options)
        plain, _ = problem()
        reference = cls(plain.parameters(), lr=0.01)
        train(model, optimizer, 5)
        train(plain, reference, 5)
        assert equal(model.parameters(), plain.parameters())
        if empty == "strengths":
            assert probe.passes.forward == 0
            assert not {"safety", "sam"} & set(optimizer.state_dict())
        else:
            assert optimizer.safety.subspace.rank == 0


@modes
def test_strengths_are_independent(mode):
    """ρ = 0 leaves the map, damping = 0 leaves the perturbation."""
    model, probe = problem()
    optimizer = build(model, probe, mode, rho=0.0)
    plain, other = problem()
    options = {name: value for name, value in OPTIONS.items() if name not in ("rho", "ascent")}
    reference = safeguard(sgd(plain.parameters()), other, **options)
    train(model, optimizer, 4)
    train(plain, reference, 4)
    assert equal(model.parameters(), plain.parameters())
    moved = {}
    for damping in (0, 1):
        model, probe = problem()
        optimizer = build(model, probe, mode, damping=damping)
        train(model, optimizer, 4)
        with optimizer.unperturbed():
            moved[damping] = float((dense_basis(optimizer).T @ model.moved).norm())
        assert len(optimizer.safety.history) == 1
    assert moved[1] < 1e-12 < 1e-3 < moved[0]


def test_a_refresh_carries_the_momentum_to_the_new_basis():
    """m_new = U_newᵀU_old m; the old basis is let go."""
    model = tiny_llama(layers=1).double()
    params = trainable(model)
    optimizer = SafetySAM(
        params, torch.optim.SGD, lr=0.1, probe=language_probe(model), rank=6,
        refresh=RefreshPolicy.fixed(2), beta=0.5,
    )  # fmt: skip
    task_step(model, 0)
    optimizer.step()
    old = optimizer.safety.subspace
    past = optimizer.state_dict()["sam"]["momentum"]
    task_step(model, 1)
    average = 0.5 * past + 0.5 * old.basis.coordinates([p.grad for p in params])
    optimizer.step()
    new = optimizer.safety.subspace
    assert new is not old
    spread = [torch.zeros_like(p) for p in params]
    old.basis.expand_into(spread, average)
    expected = new.basis.coordinates(spread)
    assert relative_error(optimizer.state_dict()["sam"]["momentum"], expected) < 1e-9
    assert optimizer._ascent._subspace is new


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@modes
def test_resumes_bit_for_bit(mode):
    def start():
        model = tiny_llama(layers=1)
        return model, SafetySAM(
            trainable(model), lr=1e-2, probe=language_probe(model), rank=8, mode=mode,
            refresh=RefreshPolicy.fixed(3), budget=0.0,
        )  # fmt: skip

    def train(model, optimizer, steps):
        for step in steps:
            if mode == "two_pass":
                optimizer.step(lambda step=step: task_step(model, step))
            else:
                optimizer.train()
                task_step(model, step)
                optimizer.step()

    model, optimizer = start()
    train(model, optimizer, range(4))
    with optimizer.unperturbed():
        saved = through_a_file(model.state_dict())
        state = optimizer.state_dict()
    held = optimizer.state_dict()
    assert torch.equal(held["sam"]["momentum"], state["sam"]["momentum"])
    again, fresh = start()
    again.load_state_dict(saved)
    fresh.load_state_dict(through_a_file(state))
    train(model, optimizer, range(4, 8))
    train(again, fresh, range(4, 8))
    assert equal(model.parameters(), again.parameters())
    assert optimizer.safety.counters() == fresh.safety.counters()
    optimizer.restore()
    fresh.restore()
    assert equal(model.parameters(), again.parameters())


@modes
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(mode, copied):
    """Also where the parameters are held perturbed: the copy returns its own to its own θ."""

    def train(model, optimizer, step):
        if mode == "two_pass":
            optimizer.step(lambda: task_step(model, step))
        else:
            task_step(model, step)
            optimizer.step()

    model = tiny_llama(layers=1)
    optimizer = SafetySAM(
        trainable(model), lr=1e-2, probe=language_probe(model), rank=8, mode=mode,
        refresh=RefreshPolicy.fixed(3), budget=0.0,
    )  # fmt: skip
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # it replaces the instance's step
    for step in range(2):
        train(model, optimizer, step)
    held = copies(model.parameters())
    twin, other = copied((model, optimizer))
    assert other.safety.probe.model is twin
    assert other.param_groups is other.base_optimizer.param_groups
    assert equal(twin.parameters(), held)
    other.eval()
    optimizer.eval()
    assert equal(twin.parameters(), model.parameters())
    assert equal(twin.parameters(), held) == (mode == "two_pass")
    for one in (other, optimizer):
        one.train()
    for step in range(2, 5):
        train(twin, other, step)
        train(model, optimizer, step)
    assert equal(twin.parameters(), model.parameters())
    assert other.safety.history == optimizer.safety.history
    assert other.safety.coupling == optimizer.safety.coupling
    alone = copy.deepcopy(optimizer)
    assert alone.safety.probe.model is not model
    with torch.no_grad():
        trainable(model)[0].add_(1.0)
    if mode == "lookahead":  # what was written to while held is known to the copy as well
        _, written = copied((model, optimizer))
        with pytest.raises(RuntimeError, match="params: 1 parameters were written to"):
            written.eval()


def test_restore_leaves_the_parameters_ready_to_be_saved():
    model, probe = problem()
    optimizer = build(model, probe, "lookahead")
    train(model, optimizer, 3)
    with optimizer.unperturbed():
        expected = copies(model.parameters())
    optimizer.restore()
    if optimizer.safety.history[-1].restored_to is None:
        assert equal(model.parameters(), expected)
    kept = copies(model.parameters())
    optimizer.train()
    assert not equal(model.parameters(), kept)
    with optimizer.unperturbed():
        assert equal(model.parameters(), kept)


def test_written_parameters_are_not_overwritten():
    model, probe = problem()
    optimizer = build(model, probe, "lookahead")
    train(model, optimizer, 2)
    with torch.no_grad():
        model.weights[0].fill_(7.0)
    with pytest.raises(RuntimeError, match="params: 1 parameters were written to"):
        train(model, optimizer, 1)
    assert bool((model.weights[0] == 7.0).all())
    train(model, optimizer, 1)  # and training can go on

    # A checkpoint loaded into model and optimizer while the parameters are held.
    with optimizer.unperturbed():
        saved, state = copies(model.parameters()), through_a_file(optimizer.state_dict())
    with torch.no_grad():
        for p, kept in zip(model.weights, saved, strict=True):
            p.copy_(kept)
    optimizer.load_state_dict(state)
    assert equal(model.parameters(), saved)


def test_parameters_resized_while_held_are_refused_by_name():
    model, probe = problem()
    optimizer = build(model, probe, "lookahead")
    train(model, optimizer, 2)
    resized = model.weights[0].detach().repeat(2, *[1] * (model.weights[0].dim() - 1))
    model.weights[0].data = resized.clone()
    with pytest.raises(RuntimeError, match="params: 1 parameters were written to"):
        optimizer.restore()
    with pytest.raises(ValueError, match="params: a protected parameter of shape"):
        optimizer.restore()
    assert torch.equal(model.weights[0], resized)


@modes
def test_freezing_a_part_is_refused_by_name(mode):
    """Before anything moves, and with the parameters back at θ."""
    model, probe = problem()
    optimizer = build(model, probe, mode, ascent="safety")
    train(model, optimizer, 2)
    with optimizer.unperturbed():
        before = copies(model.parameters())
    model.weights[0].requires_grad_(False)

    def in_two_passes():
        model.closure(optimizer)
        with optimizer.second_pass():
            model.closure(optimizer)

    calls = {
        "lookahead": (optimizer.step, optimizer.train),
        "two_pass": (lambda: train(model, optimizer, 1), in_two_passes),
    }
    for call in (*calls[mode], optimizer.restore):
        with pytest.raises(ValueError, match=r"params: 0 protected parameters .* 1 removed or fro"):
            call()
        assert equal(model.parameters(), before)


def test_it_is_the_base_optimizer_to_the_outside():
    model, probe = problem()
    base = sgd(model.parameters())
    optimizer = build(model, probe, "lookahead", base=base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    events = []
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    optimizer.register_step_post_hook(lambda *_: events.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: events.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: events.append("loaded"))
    before = copies(model.parameters())
    train(model, optimizer, 1)  # a warm-up's first step has learning rate 0
    scheduler.step()
    assert equal(model.parameters(), before)
    assert base.param_groups[0]["lr"] == 0.025
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups
    assert events == ["before", "after", "before", "after", "saved", "loaded"]
    assert optimizer.safety.step_count == 1
    assert "SafetySAM" in repr(optimizer)


@modes
def test_inert_steps_change_nothing(mode):
    """No gradients; or zero gradients and learning rate 0, as distributed checkpointing does."""
    model, probe = problem()
    optimizer = build(model, probe, mode)
    for trained in (0, 2):
        train(model, optimizer, trained)
        before, state = copies(model.parameters()), optimizer.state_dict()["sam"]
        optimizer.zero_grad()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
        for p in model.weights:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05
        assert equal(model.parameters(), before)
        assert optimizer.safety.step_count == trained
        after = optimizer.state_dict()["sam"]
        assert state["momentum"] is after["momentum"] or torch.equal(
            state["momentum"], after["momentum"]
        )


@modes
def test_groups_without_protection_are_not_perturbed(mode):
    model, probe = problem()
    groups = [{"params": list(model.weights)[1:]}, {"params": [model.weights[0]], "protect": False}]
    optimizer = build(model, probe, mode, base=sgd(groups))
    seen = []

    def closure():
        seen.append(copies(model.weights))
        return model.closure(optimizer)

    optimizer.step(closure)
    if mode == "two_pass":
        assert torch.equal(seen[0][0], seen[1][0])
        assert not torch.equal(seen[0][1], seen[1][1])
    else:
        held = copies(model.weights)
        optimizer.eval()
        assert torch.equal(held[0], model.weights[0])
        assert not torch.equal(held[1], model.weights[1])


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = (torch.arange(6) + index) % 30 + 4
        return {"input_ids": ids, "labels": ids}


def test_trainer_saves_and_evaluates_unperturbed_parameters(tmp_path):
    """Trainer needs no closure: it calls train() and eval(), SafetyCallback restores."""
    model = with_lora(tiny_llama(layers=1))
    params = trainable(model)
    optimizer = SafetySAM(params, lr=1e-2, probe=language_probe(model), rank=8)
    seen = {"training": [], "evaluation": []}

    def watch(module, args):
        kind = "training" if module.training else "evaluation"
        seen[kind].append((optimizer.safety.step_count, bool(optimizer._held)))

    handle = model.register_forward_pre_hook(watch)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=6, logging_steps=1,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=3, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(
        model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(),
        optimizers=(optimizer, None), callbacks=[SafetyCallback()],
    ).train()  # fmt: skip
    handle.remove()
    # Perturbed in every training pass but those of the first step, and never in evaluation.
    assert len(seen["training"]) == 12
    assert all(held == (step > 0) for step, held in seen["training"])
    assert seen["evaluation"]
    assert not any(held for _, held in seen["evaluation"])
    assert not optimizer._held
    # The last checkpoint holds the parameters as they are now.
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    now = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    assert saved
    assert all(torch.equal(tensor, now[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("name", optimizers())
def test_the_table_of_optimizers_builds_each_alike(name):
    model = tiny_llama(layers=1)
    optimizer = optimizers()[name].cls(
        trainable(model), lr=1e-2, weight_decay=0.01, probe=language_probe(model), rank=4,
        budget=0.1, seed=1,
    )  # fmt: skip
    for step in range(2):
        task_step(model, step)
        optimizer.step()
    assert optimizer.safety.step_count == 2
    assert optimizer.safety.config.rank == 4
    optimizer.restore()


WRONG = [
    ({"rho": -0.1}, ValueError, r"rho=-0\.1"),
    ({"rho": math.inf}, ValueError, "rho=inf"),
    ({"rho": "x"}, ValueError, "rho='x'"),
    ({"beta": 1.0}, ValueError, r"beta=1\.0"),
    ({"beta": -0.1}, ValueError, r"beta=-0\.1"),
    ({"mode": "project"}, ValueError, 'mode="project": expected one of "two_pass", "lookahead"'),
    ({"ascent": "up"}, ValueError, 'ascent="up": expected one of "task", "safety"'),
    ({"protection": "two_pass"}, ValueError, 'protection="two_pass": expected one of "project"'),
    ({"damping": -1}, ValueError, "damping=-1"),
    ({"rank": 0}, ValueError, "rank=0"),
    ({"lr": 0.1}, TypeError, "lr: unknown, or an option of the base optimizer"),
    ({"probe": None}, TypeError, "probe=NoneType"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_arguments_name_themselves(options, error, message):
    model, probe = problem()
    with pytest.raises(error, match=message):
        build(model, **{"probe": probe, **options})


def test_more_misuse():
    model, probe = problem()
    with pytest.raises(TypeError, match="base_optimizer='adam'"):
        SafetySAM(model.parameters(), "adam", probe=probe)
    free = AdamWScheduleFree(model.parameters())
    with pytest.raises(TypeError, match="base_optimizer=AdamWScheduleFree: it evaluates at"):
        SafetySAM(free, probe=probe)
    assert not hasattr(free, "safety")
    bare = SafetySAM([{"params": model.parameters(), "protect": False}], probe=probe)
    with pytest.raises(ValueError, match="no parameter is left to protect"):
        bare.step(lambda: model.closure(bare))
    assert all(p.grad is None for p in model.weights)
    optimizer = build(model, probe)
    with pytest.raises(ValueError, match="protected already"):
        build(model, probe, base=optimizer)
    model.closure(optimizer)
    with pytest.raises(RuntimeError, match='closure=None: mode="two_pass"'):
        optimizer.step()
    model, probe = problem()
    optimizer = build(model, probe, "lookahead")
    with (
        pytest.raises(RuntimeError, match='second_pass: mode="lookahead"'),
        optimizer.second_pass(),
    ):
        pass
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        optimizer.step()
    optimizer.train()
    train(model, optimizer, 2)
    before, good = copies(model.parameters()), through_a_file(optimizer.state_dict())
    for sam in ({}, {"momentum": torch.zeros(1)}, {"momentum": torch.full((3,), torch.nan)}, None):
        with pytest.raises(ValueError, match='"sam"'):
            optimizer.load_state_dict({**good, "sam": sam})
    assert equal(model.parameters(), before)
    for p in model.weights:
        p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
