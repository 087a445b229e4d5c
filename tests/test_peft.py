"""PEFT: every kind of adapter against autograd, and the parameters and reference chosen."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny_models import VOCAB, randomise, safety_batch, single, task_step, tiny_llama, trainable
from transformers import Trainer, TrainingArguments

from safeopt import ProjectedAdamW, ReferenceKL, RefreshPolicy, SafetyProbe
from safeopt.integrations.peft import (
    BaseReferenceKL,
    adapter_parameters,
    adapters_off,
    check_adapters,
    safety_probe,
)
from safeopt.integrations.trainer import protect
from safeopt.losses import refusal_nll

LAYERS = ["q_proj", "v_proj"]
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": LAYERS}
KINDS = {
    "LoRA": lambda: LoraConfig(**LORA),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "rsLoRA": lambda: LoraConfig(**LORA, use_rslora=True),
    "PiSSA": lambda: LoraConfig(**LORA, init_lora_weights="pissa"),
    "IA3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def with_adapter(kind, *, moved=True, **options):
    """A tiny Llama with an adapter; ``moved`` away from its initialisation, as after training."""
    model = tiny_llama(layers=1, **options)
    torch.manual_seed(1)
    model = get_peft_model(model, KINDS[kind]())
    if moved:
        with torch.no_grad():
            for p in trainable(model):
                p.add_(0.1 * torch.randn_like(p))
    return model


@kinds
def test_per_example_gradients_are_those_of_autograd(kind):
    model, batch = with_adapter(kind), safety_batch()
    params = adapter_parameters(model)
    probe = safety_probe(model, [batch])
    losses, rows = probe.per_example(params)
    model.eval()
    for example in range(len(losses)):
        loss = refusal_nll(model, single(batch, example))[0]
        expected = torch.autograd.grad(loss, params)
        torch.testing.assert_close(losses[example], loss.detach(), rtol=1e-4, atol=1e-5)
        for row, gradient in zip(rows, expected, strict=True):
            torch.testing.assert_close(row[example], gradient, rtol=1e-3, atol=1e-5)


def assert_resumes(build, adapter="default"):
    """A run of six steps is the same with a checkpoint after three of them."""

    def train(model, optimizer, first, last):
        for step in range(first, last):
            task_step(model, step)
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 0, 3)
    file = io.BytesIO()
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    torch.save((weights, optimizer.state_dict()), file)
    train(model, optimizer, 3, 6)
    assert len(optimizer.safety.history) == 4

    resumed, other = build()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    set_peft_model_state_dict(resumed, weights, adapter_name=adapter)
    other.load_state_dict(state)
    train(resumed, other, 3, 6)
    assert all(map(torch.equal, trainable(model), trainable(resumed)))


@kinds
def test_a_resumed_run_equals_an_uninterrupted_one(kind):
    def build():
        model = with_adapter(kind, moved=False)
        probe = safety_probe(model, [safety_batch(), safety_batch(seed=1)])
        optimizer = ProjectedAdamW(
            adapter_parameters(model), lr=1e-2, probe=probe, rank=4, refresh=RefreshPolicy.fixed(2)
        )
        return model, optimizer

    assert_resumes(build)


@kinds
def test_training_stays_out_of_the_subspace(kind):
    model = with_adapter(kind)
    probe = safety_probe(model, [safety_batch(), safety_batch(seed=1)])
    params = adapter_parameters(model)
    optimizer = ProjectedAdamW(
        params, lr=1e-2, probe=probe, rank=2, refresh=RefreshPolicy.fixed(100)
    )
    before = [p.detach().clone() for p in params]
    for step in range(3):
        task_step(model, step)
        optimizer.step()
    inside = optimizer.safety.subspace.coordinates(params)
    pairs = zip(params, before, strict=True)
    moved = sum(float((p.detach() - b).norm() ** 2) for p, b in pairs) ** 0.5
    assert moved > 1e-3
    assert float(inside.norm()) < 1e-3 * moved


def test_adalora_is_refused_with_an_alternative(tmp_path):
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS, total_step=10)
    model = get_peft_model(tiny_llama(layers=1), config)
    with pytest.raises(TypeError, match=r'"default" is ADALORA: it prunes its ranks .* use LoRA'):
        safety_probe(model, [safety_batch()])
    trainer = Trainer(
        model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    )
    with pytest.raises(TypeError, match="ADALORA"):
        protect(trainer, SafetyProbe(model, [safety_batch()]))


def test_only_the_active_adapter_is_protected():
    model = with_adapter("LoRA")
    model.add_adapter("second", LoraConfig(**LORA))
    randomise(p for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    params = adapter_parameters(model)
    chosen = {name for name, p in model.named_parameters() if any(p is q for q in params)}
    assert chosen
    assert all("second" in name for name in chosen)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if "default" in n}
    optimizer = ProjectedAdamW(
        params, lr=1e-2, probe=safety_probe(model, [safety_batch(), safety_batch(seed=1)]), rank=2
    )
    for step in range(5):
        task_step(model, step)
        optimizer.step()
    named = dict(model.named_parameters())
    assert all(torch.equal(before, named[name]) for name, before in first.items())
    model.set_adapter("default")
    task_step(model, 5)
    with pytest.raises(ValueError, match="no parameter is left to protect"):
        optimizer.step()


def test_the_second_of_two_adapters_resumes():
    """A checkpoint of the active adapter; the other one is frozen and comes with the model."""

    def build():
        model = with_adapter("LoRA")
        model.add_adapter("second", LoraConfig(**LORA))
        torch.manual_seed(2)
        randomise(p for name, p in model.named_parameters() if "second" in name)
        model.set_adapter("second")
        probe = safety_probe(model, [safety_batch(), safety_batch(seed=1)])
        return model, ProjectedAdamW(
            adapter_parameters(model), lr=1e-2, probe=probe, rank=4, refresh=RefreshPolicy.fixed(2)
        )

    assert_resumes(build, "second")


def full_kl(reference, model, batch):
    """KL(reference ‖ model) over the whole vocabulary, mean over the refusal tokens."""
    labels, mask = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    p, q = (m.eval()(**inputs).logits[:, :-1].double().log_softmax(-1) for m in (reference, model))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert labels.shape == kl.shape
    return (kl * mask).sum(-1) / mask.sum(-1)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "rsLoRA", "IA3"])
def test_the_reference_is_the_base_model_whenever_it_is_asked(kind):
    """A probe made on the drifted model, as in a resumed run, knows the aligned model."""
    aligned = tiny_llama(layers=1)
    model, batch = with_adapter(kind), safety_batch()
    flags = [p.requires_grad for p in model.parameters()]
    probe = safety_probe(model, [batch], loss="kl", reference="base")
    probe.loss.top_k = VOCAB - 1
    torch.testing.assert_close(
        probe.values().double(), full_kl(aligned, model, batch).detach(), rtol=1e-3, atol=1e-5
    )
    assert flags == [p.requires_grad for p in model.parameters()]


def test_auto_takes_the_base_model_for_a_fresh_or_drifted_adapter():
    fresh = with_adapter("LoRA", moved=False)
    probe = safety_probe(fresh, [safety_batch()], loss="kl")
    assert type(probe.loss) is BaseReferenceKL
    assert probe.value() == pytest.approx(0, abs=1e-6)
    drifted = with_adapter("LoRA", moved=False)
    climb(drifted, safety_batch(), -1)
    assert type(safety_probe(drifted, [safety_batch()], loss="kl").loss) is BaseReferenceKL


def climb(model, batch, sign):
    """Train an adapter on refusals, or against them."""
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        (sign * refusal_nll(model, batch).mean()).backward()
        optimizer.step()


def test_auto_takes_the_present_model_where_the_alignment_sits_in_the_adapter():
    model, batch = with_adapter("LoRA", moved=False), safety_batch()
    climb(model, batch, +1)
    before = copy.deepcopy(model)
    probe = safety_probe(model, [batch], loss="kl")
    assert type(probe.loss) is ReferenceKL
    randomise(trainable(model), 0.1)
    probe_oracle = full_kl(before, model, batch).detach()
    assert float(probe_oracle.mean()) > 0.01
    assert probe.value() == pytest.approx(float(probe_oracle.mean()), rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, init_lora_weights="pissa"),
        LoraConfig(**LORA, init_lora_weights="olora"),
        LoraConfig(**LORA, bias="all"),
    ],
)
def test_a_changed_base_model_is_no_reference(config):
    model = get_peft_model(tiny_llama(layers=1, bias=True), config)
    probe = safety_probe(model, [safety_batch()], loss="kl")
    assert type(probe.loss) is ReferenceKL
    assert probe.value() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match='reference="base": the base model is not the aligned'):
        safety_probe(model, [safety_batch()], loss="kl", reference="base")


def test_a_base_model_that_is_trained_by_hand_is_no_reference():
    model = with_adapter("LoRA", moved=False)
    assert type(safety_probe(model, [safety_batch()], loss="kl").loss) is BaseReferenceKL
    norms = [p.requires_grad_() for name, p in model.named_parameters() if "norm" in name]
    probe = safety_probe(model, [safety_batch()], loss="kl")
    randomise(norms)
    assert probe.value() > 0.01, "the reference does not move with the model"
    with pytest.raises(ValueError, match='reference="base": the base model is not the aligned'):
        safety_probe(model, [safety_batch()], loss="kl", reference="base")


def test_a_frozen_active_adapter_stays_frozen():
    model = with_adapter("LoRA")
    for p in trainable(model)[:2]:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with adapters_off(model):
        pass
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "rsLoRA", "PiSSA", "IA3"])
def test_merging_keeps_the_alignment_loss(kind):
    model, batch = with_adapter(kind), safety_batch()
    probe = safety_probe(model, [batch])
    loss = probe.value()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into \d layers.*unmerge_adapter"):
        check_adapters(model)
    assert probe.value() == pytest.approx(loss, rel=1e-4)
    model.unmerge_adapter()
    assert probe.value() == pytest.approx(loss, rel=1e-4)
    assert SafetyProbe(model.merge_and_unload(), [batch]).value() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_virtual_tokens_are_not_parted_from_the_prompt_by_padding(kind):
    model = with_adapter(kind)
    alone = [safety_probe(model, [single(safety_batch(), row)]).value() for row in range(5)]
    together = safety_probe(model, [safety_batch()]).values()
    torch.testing.assert_close(together, torch.tensor(alone), rtol=1e-5, atol=1e-6)


def test_what_is_no_peft_model_or_does_not_train_is_named():
    with pytest.raises(TypeError, match="model=LlamaForCausalLM: expected a PEFT model"):
        safety_probe(tiny_llama(layers=1), [safety_batch()])
    frozen = with_adapter("LoRA").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the active adapter"):
        adapter_parameters(frozen)
    with pytest.raises(ValueError, match='reference="old": expected one of'):
        safety_probe(with_adapter("LoRA"), [safety_batch()], reference="old")
