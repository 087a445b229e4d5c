"""Refusal NLL and KL to the reference, against plain full-logits references."""

import pytest
import torch
from test_probe import ATTENTION, BART, of_family
from tiny_models import randomise, safety_batch, single, tiny_gpt2, tiny_llama, with_lora
from tolerances import GRADIENT, relative_error

from safeopt import ReferenceKL, refusal_nll
from safeopt.losses import (
    _outside_layers,
    forward_arguments,
    response_log_probs,
    takes_positions,
    trimmed,
)

IGNORE = -100


def reference_log_probs(model, batch, row):
    """Log-probabilities of one unpadded example at every predicting position, and the targets."""
    example = single(batch, row)
    logits = model(input_ids=example["input_ids"]).logits[0, :-1]
    return logits.log_softmax(-1), example["labels"][0, 1:]


def reference_nll(model, batch):
    losses = []
    for row in range(len(batch["input_ids"])):
        log_probs, targets = reference_log_probs(model, batch, row)
        kept = targets != IGNORE
        losses.append(-log_probs[kept].gather(1, targets[kept, None]).mean())
    return torch.stack(losses)


def reference_kl(model, original, batch):
    losses = []
    for row in range(len(batch["input_ids"])):
        now, targets = reference_log_probs(model, batch, row)
        before, _ = reference_log_probs(original, batch, row)
        kept = targets != IGNORE
        losses.append((before.exp() * (before - now)).sum(-1)[kept].mean())
    return torch.stack(losses)


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


MODELS = {
    "llama": tiny_llama,
    "tied": lambda **kw: tiny_llama(tied=True, **kw),
    "gpt2": tiny_gpt2,
    "lora": lambda **kw: with_lora(tiny_llama(**kw)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_refusal_nll_equals_full_logits(name, side):
    model, batch = MODELS[name](dtype=torch.float64).eval(), safety_batch(side=side)
    losses = refusal_nll(model, batch)
    assert losses.dtype == torch.float64
    assert relative_error(losses, reference_nll(model, batch)) < GRADIENT[torch.float64]


def test_refusal_nll_is_float32_for_half_precision():
    model = tiny_llama(dtype=torch.bfloat16).eval()
    losses = refusal_nll(model, safety_batch())
    assert losses.dtype == torch.float32
    assert relative_error(losses, reference_nll(model, safety_batch())) < GRADIENT[torch.bfloat16]


def test_first_token_never_counts():
    """Nothing predicts it, so it must not be predicted from padding either."""
    model, batch = tiny_llama(dtype=torch.float64).eval(), safety_batch((3, 6), (2, 2))
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORE)
    losses = refusal_nll(model, batch)
    assert relative_error(losses, reference_nll(model, batch)) < GRADIENT[torch.float64]


def test_logits_are_computed_at_the_response_only():
    model, batch = tiny_llama().eval(), safety_batch((9, 4), (2, 3))
    shapes = []
    model.lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape[1]))
    log_probs, targets = response_log_probs(model, batch)
    assert shapes == [3 + 1]
    assert log_probs.shape[:2] == targets.shape == (2, 3)


def test_labels_without_refusal_tokens():
    batch = safety_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    with pytest.raises(ValueError, match=r"labels: every entry is -100"):
        refusal_nll(tiny_llama(), batch)


def test_one_example_without_refusal_tokens_loses_nothing():
    model, batch = tiny_llama().eval(), safety_batch()
    batch["labels"][1] = IGNORE
    kl = ReferenceKL()
    kl.cache(model, batch)
    for loss in (refusal_nll, kl):
        losses = loss(tiny_llama(seed=1).eval(), batch)
        assert float(losses[1]) == 0
        assert bool((losses[[0, 2, 3, 4]] > 0).all())


def test_forward_arguments_behind_wrappers():
    inner = tiny_llama()
    expected = forward_arguments(inner)
    assert {"logits_to_keep", "position_ids", "use_cache"} <= expected
    assert forward_arguments(torch.nn.DataParallel(inner)) == expected
    assert forward_arguments(torch.compile(inner)) == expected
    assert forward_arguments(with_lora(inner)) == expected


def test_models_that_read_padding_are_refused_it():
    """BART's decoder counts padding as positions; rows of one length are as good as any."""
    model, batch = of_family("Bart", d_model=16, pad_token_id=0, **BART), safety_batch()
    for loss in (refusal_nll, ReferenceKL().cache):
        with pytest.raises(ValueError, match="attention_mask: rows of 5 to 10 tokens in 10, and B"):
            loss(model, batch)
    kept = trimmed({name: x[:1] for name, x in batch.items()})
    assert kept["attention_mask"].shape == (1, 5)
    alone = refusal_nll(model, kept)
    assert torch.equal(alone, refusal_nll(model, single(batch, 0)))
    twice = {name: x.repeat(2, 1) for name, x in kept.items()}
    assert relative_error(refusal_nll(model, twice), alone.repeat(2)) < GRADIENT[torch.float32]


def test_positions_are_looked_for_outside_of_the_layers():
    """A model has thousands of modules, and this is asked at every pass."""
    sizes = {len(list(_outside_layers(tiny_llama(layers=n)))) for n in (1, 3)}
    assert len(sizes) == 1
    roberta = of_family("Roberta", is_decoder=True, pad_token_id=1, **ATTENTION)
    assert takes_positions(tiny_llama())
    assert not takes_positions(roberta)


def test_reference_kl_is_zero_at_the_reference_with_zero_gradient():
    model, batch = tiny_llama(dtype=torch.float64).eval(), safety_batch()
    loss = ReferenceKL(top_k=4)
    loss.cache(model, batch)
    value = loss(model, batch)
    assert value.abs().max() < 1e-14
    gradients = torch.autograd.grad(value.sum(), list(model.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-13


@pytest.mark.parametrize("side", ["left", "right"])
def test_reference_kl_covering_the_vocabulary_is_the_full_kl(side):
    original, batch = tiny_llama(dtype=torch.float64).eval(), safety_batch(side=side)
    loss = ReferenceKL(top_k=39)
    loss.cache(original, batch)
    model = moved(tiny_llama(dtype=torch.float64)).eval()
    full = reference_kl(model, original, batch)
    assert relative_error(loss(model, batch), full) < GRADIENT[torch.float64]


def test_reference_kl_is_a_lower_bound_that_grows_with_top_k():
    original, batch = tiny_llama(dtype=torch.float64).eval(), safety_batch()
    model = moved(tiny_llama(dtype=torch.float64)).eval()
    bounds = [torch.zeros(5, dtype=torch.float64)]
    for top_k in (1, 4, 16, 39, 1000):
        loss = ReferenceKL(top_k)
        loss.cache(original, batch)
        bounds.append(loss(model, batch))
    full = reference_kl(model, original, batch)
    for low, high in zip(bounds, [*bounds[1:], full], strict=True):
        assert (low <= high + 1e-12).all()
    assert (bounds[1] > 0).all()


def test_reference_kl_is_found_in_any_batch():
    """The reference belongs to the example: batching and padding do not matter."""
    original, batch = tiny_llama(dtype=torch.float64).eval(), safety_batch()
    loss = ReferenceKL(top_k=8)
    loss.cache(original, batch)
    model = moved(tiny_llama(dtype=torch.float64)).eval()
    together = loss(model, batch)
    apart = torch.cat([loss(model, single(batch, row)) for row in range(5)])
    assert relative_error(apart, together) < GRADIENT[torch.float64]


def test_reference_kl_float32_with_confident_reference():
    """log(1 − Σp) where rounding leaves nothing of the remainder: finite, and not below zero."""
    model, batch = tiny_llama().eval(), safety_batch()
    randomise([model.lm_head.weight], scale=20.0)
    loss = ReferenceKL(top_k=8)
    loss.cache(model, batch)
    value = loss(moved(model), batch)
    gradients = torch.autograd.grad(value.sum(), list(model.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert (value > -1e-5).all()


def test_reference_kl_errors():
    with pytest.raises(ValueError, match="top_k=0"):
        ReferenceKL(top_k=0)
    with pytest.raises(KeyError, match="no cached reference"):
        ReferenceKL()(tiny_llama().eval(), safety_batch())
    batch, loss = safety_batch((3,), (4,)), ReferenceKL()
    loss.cache(tiny_llama().eval(), batch)
    batch["labels"][0, -1] = -100
    with pytest.raises(ValueError, match=r"labels: 3 tokens count of an example .* cached with 4"):
        loss(tiny_llama().eval(), batch)
