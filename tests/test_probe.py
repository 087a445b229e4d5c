"""SafetyProbe: what it answers, what it costs, and that it leaves no trace."""

import math

import pytest
import torch
from tiny_models import randomise, safety_batch, single, tiny_gpt2, tiny_llama, trainable, with_lora
from tolerances import GRADIENT, relative_error
from torch import nn

from safeopt import ReferenceKL, SafetyProbe, refusal_nll

TOKENS = [5, 10, 7, 10, 10]  # of safety_batch()


def snapshot(model):
    """Everything that a probe could leave behind."""
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [set(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    for name, expected in before.items():
        actual = after[name]
        if isinstance(expected, dict):
            assert expected.keys() == actual.keys()
            expected, actual = list(expected.values()), list(actual.values())
        if isinstance(expected, torch.Tensor):
            expected, actual = [expected], [actual]
        if name in ("parameters", "grads", "buffers", "random"):
            for a, b in zip(actual, expected, strict=True):
                assert (a is None and b is None) or torch.equal(a, b), name
        else:
            assert actual == expected, name


class Restless(nn.Module):
    """A language model that draws random numbers and changes its buffers at every call."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("empty", None)
        self.fails_at = math.inf

    def forward(self, **inputs):
        self.calls += 1
        self.replaced = self.replaced + torch.rand(1)
        self.empty = torch.rand(1)
        if self.calls >= self.fails_at:
            raise RuntimeError("in the middle")
        assert not self.dropout.training
        return self.model(**inputs)


def restless(**kwargs):
    model = Restless(with_lora(tiny_llama()))
    probe = SafetyProbe(model, [safety_batch()], micro_batch_size=2, **kwargs)
    model.train()
    model.model.eval()
    model.dropout.train()
    for p in trainable(model)[::2]:
        p.grad = torch.rand_like(p)
    return model, probe


ASK = {
    "value": lambda probe, params: probe.value(),
    "values": lambda probe, params: probe.values([3, 1]),
    "gradient": lambda probe, params: probe.gradient(params),
    "per_example": lambda probe, params: probe.per_example(params),
}


@pytest.mark.parametrize("loss", ["nll", "kl"])
@pytest.mark.parametrize("ask", ASK)
def test_leaves_no_trace(ask, loss):
    model, probe = restless(loss=loss)
    before = snapshot(model)
    ASK[ask](probe, trainable(model))
    assert_same(before, snapshot(model))


def test_leaves_the_seed_of_a_gpu_that_is_first_used_later(monkeypatch):
    """torch remembers the last seed for it, and does not put it back."""
    seeds = []
    _, probe = restless()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(3)
    probe.value()
    assert seeds == [3]


@pytest.mark.parametrize("ask", ["value", "gradient", "per_example"])
def test_leaves_no_trace_when_the_forward_pass_raises(ask):
    model, probe = restless()
    model.fails_at = 2
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        ASK[ask](probe, trainable(model))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("ask", ["gradient", "per_example"])
def test_leaves_no_trace_when_the_backward_pass_raises(ask):
    model, probe = restless()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("in the middle")

    probe.loss = lambda model, batch: Fails.apply(refusal_nll(model, batch))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        ASK[ask](probe, trainable(model))
    assert_same(before, snapshot(model))


def test_works_without_grad_mode():
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch()])
    with torch.no_grad():
        value, gradient = probe.gradient(trainable(model))
        rows = probe.per_example(trainable(model)).rows
        assert not torch.is_grad_enabled()
    assert value == pytest.approx(probe.value(), rel=1e-6)
    for total, row in zip(gradient, rows, strict=True):
        assert relative_error(row.mean(0), total) < GRADIENT[torch.float32]


def counts(probe):
    passes = probe.passes
    return passes.forward, passes.backward, passes.forward_tokens, passes.backward_tokens


def test_pass_and_token_counts():
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch()], micro_batch_size=2)
    assert probe.passes.as_dict() == dict.fromkeys(probe.passes.as_dict(), 0)
    probe.value()
    assert counts(probe) == (3, 0, sum(TOKENS), 0)
    probe.value([0, 2])
    assert counts(probe) == (4, 0, sum(TOKENS) + 12, 0)
    probe.gradient(trainable(model), [1])
    assert counts(probe) == (5, 1, sum(TOKENS) + 22, 10)
    probe.per_example(trainable(model))
    assert counts(probe) == (8, 4, 2 * sum(TOKENS) + 22, sum(TOKENS) + 10)
    assert probe.passes.seconds > 0


def test_reference_is_cached_once_and_counted():
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch()], loss="kl")
    assert probe.value() == pytest.approx(0, abs=1e-6)
    assert counts(probe)[0] == 2
    randomise([model.lm_head.weight])
    assert probe.value() > 0.01
    assert counts(probe)[0] == 3


def test_a_reference_that_was_cached_before_is_kept():
    """By the caller, or by another probe's first use, on the aligned model."""
    model, loss = tiny_llama().eval(), ReferenceKL()
    batch, other = safety_batch(), safety_batch(seed=1)
    loss.cache(model, batch)
    randomise([model.lm_head.weight])
    expected = loss(model, batch).detach()
    assert expected.mean() > 0.01
    probes = [SafetyProbe(model, [batch, other], loss=loss) for _ in range(2)]
    for probe in probes:
        assert torch.allclose(probe.values(range(5)), expected)
        assert probe.value(range(5, 10)) == pytest.approx(0, abs=1e-6), "seen here first"
    assert probes[1].passes.forward == 2, "nothing was left to cache"


def test_held_examples_need_the_refusal_nll():
    with pytest.raises(ValueError, match='use loss="nll"'):
        SafetyProbe(tiny_llama(), [safety_batch()], loss="kl", held=[safety_batch(seed=1)])


def test_passes_equal_model_calls():
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    probe = SafetyProbe(model, [safety_batch()], loss="kl", micro_batch_size=3)
    probe.value()
    probe.per_example(trainable(model), [4, 4, 0])
    assert len(calls) == probe.passes.forward


@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_values_are_each_example_alone(loss):
    model, batch = tiny_llama(dtype=torch.float64).eval(), safety_batch()
    probe = SafetyProbe(model, [batch], loss=loss)
    probe.value()
    randomise([model.lm_head.weight])
    alone = torch.cat([probe.loss(model, single(batch, row)) for row in range(5)]).detach()
    assert relative_error(probe.values(), alone) < GRADIENT[torch.float64]
    assert probe.value() == pytest.approx(float(alone.mean()), rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_micro_batches_and_order_do_not_matter(size):
    model = tiny_gpt2(dtype=torch.float64)  # Llama's norms are computed in float32 always
    params, order = trainable(model), [3, 0, 4, 1, 0]
    whole = SafetyProbe(model, [safety_batch()])
    split = SafetyProbe(model, [safety_batch()], micro_batch_size=size)
    tolerance = GRADIENT[torch.float64]
    assert relative_error(split.values(order), whole.values()[order]) < tolerance
    result, expected = split.per_example(params, order), whole.per_example(params)
    assert relative_error(result.losses, expected.losses[order]) < tolerance
    for row, row_expected in zip(result.rows, expected.rows, strict=True):
        assert relative_error(row, row_expected[order]) < tolerance
    value, gradient = split.gradient(params, order)
    assert value == pytest.approx(float(expected.losses[order].mean()), rel=1e-12)
    for part, row in zip(gradient, expected.rows, strict=True):
        assert relative_error(part, row[order].mean(0)) < tolerance


def test_the_batches_do_not_matter():
    """Examples given in one left-padded, one right-padded or several batches are the same."""
    model, batch = tiny_llama(dtype=torch.float64), safety_batch()
    expected = SafetyProbe(model, [batch]).values()
    for batches in (
        [safety_batch(side="right")],
        [single(batch, row) for row in range(5)],
        [{name: t for name, t in single(batch, r).items() if "mask" not in name} for r in range(5)],
    ):
        actual = SafetyProbe(model, batches).values()
        assert relative_error(actual, expected) < GRADIENT[torch.float64]


def of_family(name, **sizes):
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**common, eos_token_id=1, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model.parameters())
    return model


ATTENTION = {"num_attention_heads": 2, "intermediate_size": 32}
MAMBA = {"state_size": 8, "time_step_rank": 4, "pad_token_id": 0}
BART = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Bart", {"d_model": 16, "pad_token_id": 0, **BART}),  # counts padding as positions
        ("Roberta", {"is_decoder": True, "pad_token_id": 1, **ATTENTION}),  # counts from 2 on
        ("RecurrentGemma", {"lru_width": 16, "pad_token_id": 0, **ATTENTION}),  # reads padding
    ],
    ids=["bart", "roberta", "recurrent-gemma"],
)
def test_only_one_length_a_pass_where_padding_would_be_seen(name, sizes):
    """Three lengths; the expected numbers come from the model without mask or positions."""
    model = of_family(name, **sizes)
    check_against_singles(model, passes=3)
    probe = SafetyProbe(model, [safety_batch()], loss="kl")
    assert float(probe.values().abs().max()) < 1e-5
    assert probe.passes.forward == 3 + 3, "the reference is taken likewise"


def test_a_data_parallel_model_is_taken_for_the_model_inside():
    """It has no config of its own, and on several devices its copies would be hidden from hooks."""
    model = of_family("Roberta", is_decoder=True, pad_token_id=1, **ATTENTION)
    batch, parallel = safety_batch(), nn.DataParallel(model)
    probe = SafetyProbe(parallel, [batch])
    assert probe.model is model
    assert torch.equal(probe.values(), SafetyProbe(model, [batch]).values())
    with pytest.raises(ValueError, match="RobertaForCausalLM may take padding for tokens"):
        refusal_nll(parallel, batch)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Bloom", {"n_head": 2, "n_layer": 2, "pad_token_id": 0}),
        ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}),
        ("Mamba", MAMBA),
        ("FalconMamba", MAMBA),
        ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1}),
    ],
    ids=["bloom", "mpt", "mamba", "falcon-mamba", "mamba2"],
)
def test_all_lengths_share_a_pass_where_padding_is_known_to_be_left_out(name, sizes):
    """They take no positions, but see distances only, or zeros."""
    check_against_singles(of_family(name, **sizes), passes=1)


def check_against_singles(model, passes):
    """Losses and gradients are those of the model without mask or positions, one by one."""
    batch = safety_batch()
    probe = SafetyProbe(model, [batch])
    values = probe.values()
    assert probe.passes.forward == passes
    params = trainable(model)
    rows = probe.per_example(params).rows
    for row in range(5):
        kept = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row : row + 1, kept], batch["labels"][row, kept]
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = nn.functional.nll_loss(log_probs, labels[1:], ignore_index=-100)
        assert float(values[row]) == pytest.approx(float(expected), rel=1e-5)
        gradients = torch.autograd.grad(expected, params, allow_unused=True, materialize_grads=True)
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        found = torch.cat([part[row].flatten() for part in rows])
        assert relative_error(found, whole) < GRADIENT[torch.float32]


def test_gradient_is_zero_where_unused():
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch()], loss=lambda m, b: m.lm_head.weight.sum() + 0 * b[
        "labels"].sum(1))  # fmt: skip
    _, gradient = probe.gradient([model.lm_head.weight, model.model.norm.weight])
    assert torch.equal(gradient[0], torch.ones_like(gradient[0]))
    assert not gradient[1].any()


def test_held_examples_follow_the_safety_examples():
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch()], held=[safety_batch(seed=1)])
    assert (len(probe), probe.held_count) == (5, 5)
    assert probe.values().shape == (5,)
    held = SafetyProbe(model, [safety_batch(seed=1)]).values()
    assert torch.allclose(probe.values(range(5, 10)), held)
    with pytest.raises(IndexError, match="examples 0 to 9"):
        probe.values([10])


def test_an_opening_is_the_start_of_every_response():
    """As if the batches ended there; responses that are shorter stay whole."""
    model, batch = tiny_llama(), safety_batch()
    held = safety_batch(seed=1)
    whole = SafetyProbe(model, [batch], held=[held])
    tokens = whole.response_tokens(range(10))
    assert tokens.min() <= 2 < tokens.max(), "both cases occur"
    short = SafetyProbe(model, [batch], held=[held], opening=2)
    assert torch.equal(short.response_tokens(range(10)), tokens.clamp(max=2))
    for index in range(10):
        source, row = (batch, index) if index < 5 else (held, index - 5)
        cut = {name: tensor[row : row + 1].clone() for name, tensor in source.items()}
        later = (cut["labels"] != -100).cumsum(1) > 2
        cut["labels"][later] = -100
        expected = refusal_nll(model.eval(), cut)
        assert torch.allclose(short.values([index]), expected, rtol=1e-5)
    shown = int(batch["attention_mask"].sum())
    assert short.passes.forward_tokens == 2 * (shown - (2 + 1 + 3)), "what follows is not run"


def broken(name, value):
    return {**safety_batch(), name: value}


BATCH = safety_batch()
EMPTY = torch.full_like(BATCH["labels"], -100)
LONGER = {**BATCH, "labels": BATCH["input_ids"]}
MINUS = {**BATCH, "labels": BATCH["labels"].masked_fill(BATCH["labels"] == -100, -1)}


def encoder_decoder():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    return BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **sizes))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "model=int: expected a torch.nn.Module", {"model": 3}),
        (ValueError, "batches: no safety example", {"batches": []}),
        (ValueError, r"batches: .*input_ids and labels are needed", {"batches": [{"x": EMPTY}]}),
        (ValueError, "batches: labels has", {"batches": [broken("labels", EMPTY[1:])]}),
        (ValueError, "batches: labels has", {"batches": [broken("labels", EMPTY[:, 1:])]}),
        (
            ValueError,
            "batches: attention_mask has",
            {"batches": [broken("attention_mask", EMPTY[:, 1:])]},
        ),
        (ValueError, "example 0 has no response token", {"batches": [broken("labels", EMPTY)]}),
        (ValueError, "held: example 0 has no response token", {"held": [broken("labels", EMPTY)]}),
        (ValueError, "batches: example 0 has the label -1;", {"batches": [MINUS]}),
        (ValueError, "held: example 0 has the label -1;", {"held": [MINUS]}),
        (ValueError, "batches: .*different keys", {"batches": [BATCH, broken("extra", EMPTY)]}),
        (ValueError, "batches, held: .*different keys", {"held": [broken("extra", EMPTY)]}),
        (ValueError, "batches: a batch is str; expected a list of dicts", {"batches": BATCH}),
        (ValueError, "held: labels is list", {"held": [broken("labels", EMPTY.tolist())]}),
        (
            ValueError,
            r"batches: input_ids has shape \(10,\); expected \(examples, tokens\)",
            {"batches": [{name: tensor[0] for name, tensor in BATCH.items()}]},
        ),
        (
            ValueError,
            r'batches with loss="kl": examples 0 and 5 have the same input_ids and other labels',
            {"batches": [BATCH, LONGER], "loss": "kl"},
        ),
        (
            ValueError,
            "model=BartForConditionalGeneration: it is an encoder with a decoder",
            {"model": encoder_decoder()},
        ),
        (ValueError, 'loss="ce"', {"loss": "ce"}),
        (TypeError, "loss=3", {"loss": 3}),
        (ValueError, "micro_batch_size=0: expected a number of examples", {"micro_batch_size": 0}),
        (ValueError, "micro_batch_size='8'", {"micro_batch_size": "8"}),
        (ValueError, "micro_batch_size=2.5", {"micro_batch_size": 2.5}),
        (ValueError, "opening=0: expected a number of tokens", {"opening": 0}),
        (ValueError, "opening=2.5: expected a number of tokens", {"opening": 2.5}),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        SafetyProbe(**{"model": tiny_llama(), "batches": [safety_batch()], **arguments})


def test_errors_when_asked():
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch()])
    with pytest.raises(ValueError, match="indices: empty"):
        probe.value([])
    with pytest.raises(IndexError, match=r"indices=\[5\]: the probe has examples 0 to 4"):
        probe.value([5])
    with pytest.raises(IndexError, match=r"indices=\[-1\]"):
        probe.gradient(trainable(model), [-1])
    foreign = [nn.Parameter(p.detach().clone()) for p in trainable(model)[:2]]
    before = snapshot(model)
    for ask in ("gradient", "per_example"):
        with pytest.raises(ValueError, match=r"params: 2 of \d+ parameters do not belong"):
            ASK[ask](probe, [*trainable(model), *foreign])
    assert_same(before, snapshot(model))
    probe = SafetyProbe(model, [safety_batch()], loss=lambda m, b: refusal_nll(m, b).mean())
    with pytest.raises(ValueError, match=r"loss: returned shape \(\) for 5 examples"):
        probe.value()
    probe = SafetyProbe(model, [safety_batch()], loss=lambda m, b: [refusal_nll(m, b)])
    with pytest.raises(ValueError, match="loss: returned list for 5 examples"):
        probe.value()
    probe = SafetyProbe(model, [safety_batch()], loss=lambda m, b: refusal_nll(m, b).detach())
    with pytest.raises(ValueError, match="loss: its values have no gradient"):
        probe.gradient(trainable(model))


def test_a_loss_object_is_used_as_given():
    probe = SafetyProbe(tiny_llama(), [safety_batch()], loss=ReferenceKL(top_k=3))
    assert probe.value() == pytest.approx(0, abs=1e-6)
