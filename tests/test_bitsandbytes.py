"""Quantised bases and 8-bit optimizers of bitsandbytes, in Trainer, protected."""

from __future__ import annotations

import pytest
import torch
from documents import HARMFUL, REFUSAL
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny_models import (
    randomise,
    safety_batch,
    single,
    task_step,
    tiny_llama,
    tiny_tokenizer,
    trainable,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from safeopt import ProjectedAdamW, RefreshPolicy
from safeopt.curvature.krylov import lanczos
from safeopt.curvature.operators import HessianOperator
from safeopt.data import safety_batches
from safeopt.integrations.bitsandbytes import keep_trainable
from safeopt.integrations.peft import safety_probe
from safeopt.integrations.trainer import protect
from safeopt.integrations.transformers import safety_of, unwrapped
from safeopt.losses import refusal_nll

bnb = pytest.importorskip("bitsandbytes")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 3)) % 30 + 4
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden=64).save_pretrained(folder)
    return folder


def quantised(folder, device="cpu", *, bits=4, double=False, outliers=6.0):
    """A LoRA adapter on an NF4 base, as QLoRA loads it, or on an int8 one."""
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    eight = {"load_in_8bit": True, "llm_int8_threshold": outliers}
    config = BitsAndBytesConfig(**(four if bits == 4 else eight))
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=device
    )
    layer = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    assert isinstance(model.model.layers[0].self_attn.q_proj, layer)
    model = prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, lora)


def build(folder, saved, *, device="cpu", bits=4, double=False, options=(), **choices):
    model = quantised(saved, device, bits=bits, double=double)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
            report_to="none", disable_tqdm=True, use_cpu=device == "cpu", save_strategy="steps",
            save_steps=2, **choices,
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(),
    )  # fmt: skip
    batches = safety_batches(tiny_tokenizer(), HARMFUL, [REFUSAL] * len(HARMFUL))
    protect(
        trainer, safety_probe(model, batches), rank=4, refresh=RefreshPolicy.fixed(2),
        **dict(options),
    )  # fmt: skip
    return trainer


def final(trainer):
    return [p.detach().clone() for p in trainable(trainer.model)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [4, 8])
def test_evaluating_a_quantised_base_does_not_stop_its_training(tmp_path, saved, device, bits):
    choices = {"device": device, "bits": bits}
    plain = build(tmp_path / "a", saved, **choices)
    plain.train()
    evaluated = build(tmp_path / "b", saved, **choices, eval_strategy="steps", eval_steps=1)
    evaluated.evaluate()
    evaluated.train()
    for left, right in zip(final(plain), final(evaluated), strict=True):
        torch.testing.assert_close(left, right)
    assert safety_of(unwrapped(plain.optimizer)).subspace.rank > 0


def evaluate(model):
    with torch.no_grad():
        model.eval()(**safety_batch())
    model.train()


def packed(model):
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    if not all(hasattr(layer, "support_avx512bf16_for_cpu") for layer in layers):
        pytest.skip("this bitsandbytes rewrites nothing")
    return [getattr(x.weight.quant_state, "packing_format_for_cpu", False) for x in layers]


def test_layers_keep_their_form_in_evaluation(saved):
    model = quantised(saved)
    assert keep_trainable(model) == len(packed(model)) == 14
    task_step(model, 0)
    expected = [p.grad.clone() for p in trainable(model)]
    evaluate(model)
    assert not any(packed(model))
    task_step(model, 0)
    for p, gradient in zip(trainable(model), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_layers_that_were_rewritten_for_inference_are_refused(saved):
    model = quantised(saved)
    evaluate(model)
    if not any(packed(model)):
        pytest.skip("this processor has no AVX512-BF16: bitsandbytes rewrites nothing")
    with pytest.raises(RuntimeError, match="14 of 14 4-bit layers were rewritten for inference"):
        keep_trainable(model)


@pytest.mark.parametrize(
    ("optim", "double"),
    [
        ("adamw_torch", False),
        ("adamw_bnb_8bit", True),
        ("lion_8bit", False),
        pytest.param("paged_adamw_8bit", False, marks=gpu),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, saved, optim, double):
    choices = {"double": double, "optim": optim, "options": {"basis": "int8"} if double else {}}
    choices["device"] = "cuda" if "paged" in optim else "cpu"
    whole = build(tmp_path, saved, **choices)
    whole.train()
    resumed = build(tmp_path, saved, **choices)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    basis = safety_of(unwrapped(whole.optimizer)).subspace.basis
    assert basis.kind == ("int8" if double else "dense")
    assert all(map(torch.equal, final(whole), final(resumed)))


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_on_an_int8_base_is_protected_and_resumes(tmp_path, saved, device):
    def run(resume=None):
        trainer = build(
            tmp_path, saved, device=device, bits=8, options={"optimizer": "projected-adamw"}
        )
        before = final(trainer)
        trainer.train(resume_from_checkpoint=resume)
        safety = safety_of(unwrapped(trainer.optimizer))
        assert not safety.probe._looped, "one pass gives the gradients of all examples"
        assert {entry.step for entry in safety.history} == {0, 2, 4}
        assert not any(map(torch.equal, before, final(trainer)))
        return trainer

    whole, resumed = run(), run(str(tmp_path / "checkpoint-2"))
    assert type(unwrapped(whole.optimizer)) is ProjectedAdamW
    assert all(map(torch.equal, final(whole), final(resumed)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("outliers", "tolerance"), [(0.0, 1e-3), (6.0, 0.1)])
def test_safety_gradients_through_an_int8_base(saved, device, outliers, tolerance):
    """They are autograd's. Outlier columns are those of a whole batch: they make a difference."""
    model = quantised(saved, device, bits=8, outliers=outliers)
    torch.manual_seed(0)
    randomise(trainable(model), 0.1)  # away from B = 0, where A has no gradient
    batch = {name: tensor.to(device) for name, tensor in safety_batch().items()}
    params = trainable(model)
    losses, rows = safety_probe(model, [batch]).per_example(params)
    model.eval()
    for example in range(len(losses)):
        loss = refusal_nll(model, single(batch, example))[0]
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
        found = torch.cat([row[example].flatten() for row in rows])
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("optim", "name"),
    [
        ("adamw_bnb_8bit", "AdamW"),
        pytest.param("paged_adamw_8bit", "AdamW", marks=gpu),
        ("lion_8bit", "Lion"),
    ],
)
def test_trainers_names_of_8_bit_optimizers_are_protected(tmp_path, saved, device, optim, name):
    trainer = build(tmp_path, saved, device=device, optim=optim)
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert type(optimizer).__module__.startswith("bitsandbytes")
    assert type(optimizer).__name__ == name
    assert {entry.step for entry in safety_of(optimizer).history} == {0, 2, 4}


@pytest.mark.parametrize("device", DEVICES)
def test_products_through_a_four_bit_base_agree(saved, device):
    """Finite differences of gradients against a second backward pass, on an NF4 base."""
    model = quantised(saved, device)
    batch = {name: tensor.to(device) for name, tensor in safety_batch().items()}
    spectra = {}
    for backend in ("double", "finite"):
        operator = HessianOperator(
            model, [batch], loss="causal_lm", params=lambda name: "lora" in name, products=backend
        )
        spectra[backend] = lanczos(operator, rank=2, tolerance=1e-3).eigenvalues
    torch.testing.assert_close(spectra["double"], spectra["finite"], rtol=2e-2, atol=1e-3)
