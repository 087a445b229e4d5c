"""Every kind of model: a diagnosis, checked against a loop over examples, and protected steps."""

from __future__ import annotations

import pytest
import torch
from tiny_models import END, PAD, VOCAB, safety_batch, tiny_gpt2, tiny_llama, trainable

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, diagnose, refusal_nll

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip
IMAGE = VOCAB - 1


def built(name, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config)


def vision_language():
    """A LLaVA of a tiny CLIP tower and a tiny Llama: an image is four tokens."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


MODELS = {
    "llama": tiny_llama,
    "falcon": lambda: built("Falcon", new_decoder_architecture=True, num_kv_heads=1, bias=True),
    "mistral": lambda: built("Mistral", sliding_window=8, head_dim=8),
    "qwen3": lambda: built("Qwen3", head_dim=8),
    "gpt2": tiny_gpt2,
    "mixture-of-experts": lambda: built("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "vision-language": vision_language,
}


def batch_for(name, seed):
    batch = safety_batch(seed=seed)
    if name == "vision-language":
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 4)
        rows = len(ids)
        images = torch.full((rows, 4), IMAGE)  # before the padding: every row has an image
        outside = torch.full_like(images, -100)
        generator = torch.Generator().manual_seed(seed)
        batch = {
            "input_ids": torch.cat([images, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(images), batch["attention_mask"]], dim=1),
            "labels": torch.cat([outside, batch["labels"]], dim=1),
            "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
        }
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_diagnosed_and_protected(name):
    model = MODELS[name]().eval()
    params = trainable(model)
    batch, task = batch_for(name, 0), [batch_for(name, 1), batch_for(name, 2)]
    probe = SafetyProbe(model, [batch])
    result = diagnose(probe, task, rank=2)

    rows = []
    for row in range(len(batch["input_ids"])):
        single = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        parts = torch.autograd.grad(
            refusal_nll(model, single).sum(), params, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([part.flatten() for part in parts]))
    gradients = torch.stack(rows).double()
    values = torch.linalg.svdvals(gradients).square() / len(gradients)
    assert result.eigenvalues == pytest.approx(values.tolist(), rel=1e-3)
    assert result.figures.coupling > 0
    assert sum(layer.curvature for layer in result.layers) == pytest.approx(1)

    optimizer = ProjectedAdamW(
        params, lr=1e-3, probe=probe, rank=3, trial_examples=1, refresh=RefreshPolicy.fixed(2)
    )
    before = [p.detach().clone() for p in params]
    model.train()
    for step in range(5):
        optimizer.zero_grad()
        refusal_nll(model, task[step % 2]).mean().backward()
        optimizer.step()
        c = optimizer.safety.subspace.coordinates(params)
        assert float(c.norm()) < 1e-4, "projected: no way gone inside the subspace"
    assert optimizer.safety.step_count == 5
    assert len(optimizer.safety.history) == 3, "at the start, and after steps 2 and 4"
    assert any(not torch.equal(p, old) for p, old in zip(params, before, strict=True))
