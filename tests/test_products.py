"""Product backends on the models people have: attention kernels, checkpointing, 4 bit, bfloat16."""

import logging

import pytest
import torch
from tiny_models import PAD, VOCAB, safety_batch, tiny_gpt2, tiny_llama, trainable, with_lora
from tolerances import GRADIENT, relative_error
from torch import nn

from safeopt.curvature.differences import Differences, rounding_unit
from safeopt.curvature.operators import FisherOperator, GGNOperator, HessianOperator
from safeopt.curvature.operators.base import ProductCounter
from safeopt.curvature.products import Site, choose
from safeopt.isolation import untouched

KINDS = ("double", "forward", "finite")
OPERATORS = {"hessian": HessianOperator, "ggn": GGNOperator}
# Stated in safeopt.curvature.differences; GGNs of rough models are a little worse.
FINITE = 5e-3
BATCHES = [safety_batch()]


def tolerance(kind):
    return FINITE if kind == "finite" else 10 * GRADIENT[torch.float32]


def vector_for(operator, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(operator.dtype) for p in operator.params]


def product(model, name, kind, batches=BATCHES, **options):
    operator = OPERATORS[name](model, batches, products=kind, **options)
    return torch.cat([x.flatten() for x in operator.matvec(vector_for(operator))]), operator


def snapshot(model):
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return left == right


MODELS = {
    "eager": lambda: with_attention(tiny_llama(), "eager"),
    "sdpa": lambda: with_attention(tiny_llama(), "sdpa"),
    "tied": lambda: tiny_llama(tied=True),
    "bias": lambda: tiny_llama(bias=True),
    "lora": lambda: with_lora(tiny_llama()),
    "lora_start": lambda: with_lora(tiny_llama(), random_b=False),
    "frozen": lambda: frozen(tiny_llama()),
}


def with_attention(model, kind):
    model.set_attn_implementation(kind)
    return model


def frozen(model):
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", MODELS)
def test_backends_agree_and_leave_no_trace(name, operator, kind):
    model = MODELS[name]().train()
    for index, p in enumerate(trainable(model)):
        if index % 2:
            p.grad = torch.ones_like(p)
    before = snapshot(model)
    actual, _ = product(model, operator, kind)
    assert same(before, snapshot(model))
    reference = MODELS[name]().double()
    if name == "eager":  # whose float32 softmax overflows on padding in float64
        reference.set_attn_implementation("sdpa")
    expected, _ = product(reference, operator, "double")
    assert relative_error(actual, expected) < tolerance(kind)


@pytest.mark.parametrize("products", ["double", "forward", "auto"])
def test_kinks_do_not_speak_against_a_derivative(products):
    """Differences go over them, whatever their step: two derivatives that agree are right."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(1e-6 * torch.eye(4))

    def loss(model, x):
        z = model(x)
        return z.relu().sum(1) + 0.5 * z.square().sum(1)

    operator = HessianOperator(model, [torch.eye(4)], loss, products=products)
    vector = vector_for(operator)
    finite = HessianOperator(model, [torch.eye(4)], loss, products="finite").matvec(vector)
    assert relative_error(finite[0], vector[0] / 4) > 1
    assert relative_error(operator.matvec(vector)[0], vector[0] / 4) < GRADIENT[torch.float32]
    assert operator.chosen_products() == products.replace("auto", "double")


def test_no_trace_after_an_error():
    model = tiny_llama().train()
    calls, last = [], []

    def loss(model, batch):
        calls.append(1)
        result = model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))
        if [len(calls)] == last:
            raise KeyError("a loss that fails in the middle")
        return result

    for kind, fails in (("finite", 4), ("finite", 5), ("double", 4)):
        last[:] = [fails]
        calls.clear()
        before = snapshot(model)
        operator = HessianOperator(model, BATCHES, loss, products=kind)
        with pytest.raises(KeyError):
            operator.matvec(vector_for(operator))
        assert same(before, snapshot(model))


def test_graphs_of_others_stay_valid():
    """Finite differences move the parameters while the caller holds a graph on them."""
    model = tiny_llama()
    loss = model(input_ids=BATCHES[0]["input_ids"]).logits.square().mean()
    expected = torch.autograd.grad(loss, trainable(model), retain_graph=True)
    product(model, "hessian", "finite")
    for a, b in zip(torch.autograd.grad(loss, trainable(model)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, operator, caplog):
    model = with_attention(tiny_llama(), "eager").train()
    kind = "auto" if operator == "hessian" else "double"
    expected, _ = product(model, operator, kind)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    for p in trainable(model)[::2]:
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    with caplog.at_level(logging.INFO, "safeopt"):
        actual, used = product(model, operator, "auto")
    assert same(before, snapshot(model))
    assert len(runs) > used.counts.forward  # layers ran again in backward passes
    assert used.chosen_products() == ("finite" if reentrant else "double")
    assert f'took "{used.chosen_products()}"' in caplog.text
    assert relative_error(actual, expected) < (FINITE if reentrant else 1e-4)
    if reentrant:
        assert "checkpoint" in caplog.text
        with pytest.raises(RuntimeError, match=r"Cure: .*non-reentrant"):
            product(model, operator, "double")


def test_reentrant_checkpointing_with_an_optimizer_in_the_backward_pass():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    trainable(model)[0].register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        product(model, "hessian", "finite")
    assert same(before, snapshot(model))


def test_dropout_is_off_and_layers_with_dropout_are_not_checkpointed():
    model = tiny_gpt2().train()
    expected, _ = product(model.eval(), "hessian", "double")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    actual, _ = product(model, "hessian", "double")
    assert relative_error(actual, expected) < 1e-4


def test_bfloat16():
    """Against the same weights in float32: rounding of the model, not of the perturbation."""
    for make in (tiny_smooth, lambda: with_lora(tiny_smooth())):
        model = make().bfloat16()
        expected, _ = product(make().bfloat16().float(), "hessian", "double")
        for kind, error in (("double", 0.05), ("forward", 0.05), ("finite", 0.25)):
            actual, operator = product(model, "hessian", kind)
            assert actual.dtype == operator.dtype == torch.float32
            assert relative_error(actual, expected) < error


def tiny_smooth():
    """Weights of the size that models are initialised with, where bfloat16 has something to say."""
    model = tiny_llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(0.25)
    return model


def test_autocast_serves_no_stale_weights():
    model = with_lora(tiny_smooth())
    expected, _ = product(model, "hessian", "double")
    with torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=BATCHES[0]["input_ids"]).logits
        actual, _ = product(model, "hessian", "finite")
        after = model(input_ids=BATCHES[0]["input_ids"]).logits
    assert relative_error(actual, expected) < 0.25
    assert torch.equal(after, before)


def test_four_bit_base():
    bnb = pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    model = with_lora(tiny_llama(hidden=64, layers=1))
    plain = with_lora(tiny_llama(hidden=64, layers=1))
    replaced = 0
    for module, twin in zip(model.modules(), plain.modules(), strict=False):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or "lora" in name or child.weight.requires_grad:
                continue
            if child.out_features == VOCAB:
                continue
            four = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, quant_type="nf4",
                compute_dtype=torch.float32,
            )  # fmt: skip
            four.weight = bnb.nn.Params4bit(
                child.weight.data.clone(), requires_grad=False, quant_type="nf4"
            )
            four = four.to("cpu")
            if four.weight.dtype != torch.uint8:
                pytest.skip("this bitsandbytes does not quantise on the CPU")
            whole = bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
            getattr(twin, name).weight.data.copy_(whole)
            setattr(module, name, four)
            replaced += 1
    assert replaced == 7
    for operator in OPERATORS:
        expected, _ = product(plain, operator, "double")
        for kind in ("double", "finite", "auto"):
            actual, _ = product(model, operator, kind)
            assert relative_error(actual, expected) < FINITE
    fisher = [FisherOperator(m, BATCHES).trace() for m in (model, plain)]
    assert fisher[0] == pytest.approx(fisher[1], rel=1e-3)


class Opaque(torch.autograd.Function):
    """tanh whose backward pass autograd cannot see, as that of a custom kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y.detach() ** 2)


class Small(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 1)
        self.activation = activation

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


def test_auto_notices_wrong_second_derivatives(caplog):
    x = {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(1))}

    def loss(model, batch):
        return model(batch["x"]).square().sum(1)

    honest, opaque = Small(torch.tanh), Small(Opaque.apply)
    operators = [HessianOperator(model, [x], loss) for model in (honest, opaque)]
    with caplog.at_level(logging.INFO, "safeopt"):
        a, b = (torch.cat([y.flatten() for y in o.matvec(vector_for(o))]) for o in operators)
    assert [o.chosen_products() for o in operators] == ["double", "finite"]
    assert "away from finite differences" in caplog.text
    assert relative_error(b, a) < FINITE
    with pytest.raises(RuntimeError, match="away from finite differences"):
        HessianOperator(opaque, [x], loss, products="double").chosen_products()


def test_wrong_forward_mode_rule_of_layer_norm():
    """Forward over reverse gets LayerNorm's weight wrong (torch 2.13); it must not pass unseen."""
    exact, _ = product(tiny_gpt2(dtype=torch.float64), "hessian", "double")
    operator = HessianOperator(tiny_gpt2(dtype=torch.float64), BATCHES, products="forward")
    try:
        actual = torch.cat([x.flatten() for x in operator.matvec(vector_for(operator))])
    except RuntimeError as error:
        message = str(error)
    else:  # a torch that has mended it
        assert relative_error(actual, exact) < 1e-9
        return
    assert "away from finite differences" in message


def test_unknown_and_impossible_products():
    with pytest.raises(ValueError, match='products="exact"'):
        product(tiny_llama(), "hessian", "exact")

    def loss(model, batch):
        return model(input_ids=batch["input_ids"]).logits.detach().mean((1, 2))

    with pytest.raises(RuntimeError, match=r'products="finite" cannot work.*Cure'):
        HessianOperator(tiny_llama(), BATCHES, loss).chosen_products()


@pytest.mark.parametrize("products", KINDS)
def test_what_enters_linearly_has_no_curvature(products):
    model = nn.Linear(3, 1)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def loss(model, x):
        return (x @ model.weight.T).square().sum(1) + model.bias

    operator = HessianOperator(model, [x], loss, products=products)
    weight, bias = operator.matvec([torch.ones(1, 3), torch.ones(1)])
    assert relative_error(weight, (2 * x.T @ x.sum(1) / 4).unsqueeze(0)) < FINITE
    assert bias.abs().max() < FINITE
    operator = HessianOperator(model, [x], lambda model, x: model(x).sum(1), products=products)
    for part in operator.matvec([torch.ones(1, 3), torch.ones(1)]):
        assert part.abs().max() < FINITE


@pytest.mark.parametrize("products", ["auto", *KINDS])
def test_products_that_are_not_finite_are_refused(products):
    model = nn.Linear(3, 1, bias=False)

    def loss(model, x):
        return torch.inf * model(x).square().sum(1)

    operator = HessianOperator(model, [torch.ones(2, 3)], loss, products=products)
    with pytest.raises(RuntimeError, match=r"not finite.*Cure: check the loss"):
        operator.matvec([torch.ones(1, 3)])


def test_backend_is_chosen_once():
    operator = HessianOperator(tiny_llama(), BATCHES)
    operator.chosen_products()
    spent = operator.counts.as_dict()
    operator.chosen_products()
    assert operator.counts.as_dict() == spent
    assert spent["forward"] <= 10
    operator.matvec(vector_for(operator))
    assert operator.counts.forward == spent["forward"] + 1


def test_finite_differences_are_two_gradients_once_the_step_is_known():
    _, operator = product(tiny_llama(), "hessian", "finite")
    before = operator.counts.as_dict()
    operator.matvec(vector_for(operator, seed=1))
    assert operator.counts.forward - before["forward"] == 2
    assert operator.counts.backward - before["backward"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_without_effect_does_not_spoil_the_next_ones_step(dtype):
    """As a token that no example has."""
    model = nn.Linear(5, 3, bias=False, dtype=dtype)
    differences = Differences(model, [model.weight])

    def cube():
        return [model.weight[:, 1:] ** 3]

    without_effect, vector = torch.zeros(2, 3, 5, dtype=dtype)
    without_effect[:, 0] = 1
    vector[:, 1:] = 1
    expected = 3 * model.weight.detach()[:, 1:] ** 2
    for _ in range(2):
        for _ in range(3):
            assert differences.along([without_effect], cube)[0].abs().max() == 0
        (derivative,) = differences.along([vector], cube)
        assert relative_error(derivative.flatten(), expected.flatten()) < FINITE


def test_differences_of_a_cubic():
    """f = Σ θ³/3: f' is known; the zero vector and a vector that is not finite are handled."""
    model = nn.Linear(5, 3, bias=False).double()
    differences = Differences(model, [model.weight])
    vector = [torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()]
    before = model.weight.detach().clone()

    def cube():
        return [model.weight**3 / 3]

    (derivative,) = differences.along(vector, cube)
    assert relative_error(derivative, before**2 * vector[0]) < 1e-3
    assert torch.equal(model.weight, before)
    assert differences.along([torch.zeros(3, 5).double()], cube)[0].abs().max() == 0
    with pytest.raises(ValueError, match="expected finite numbers"):
        differences.along([torch.full((3, 5), float("nan")).double()], cube)


def test_values_that_are_not_finite_do_not_spoil_the_next_ones_step():
    model = nn.Linear(5, 3, bias=False).double()
    differences, vector = Differences(model, [model.weight]), [torch.ones(3, 5).double()]
    assert not differences.along(vector, lambda: [torch.nan * model.weight])[0].isfinite().any()
    (derivative,) = differences.along(vector, lambda: [model.weight**3 / 3])
    assert relative_error(derivative, model.weight**2) < 1e-3


def test_a_step_too_short_to_be_seen_is_lengthened():
    model = nn.Linear(5, 3, bias=False)
    (derivative,) = Differences(model, [model.weight]).along(
        [torch.ones(3, 5)], lambda: [model.weight + 3e5]
    )
    assert relative_error(derivative, torch.ones(3, 5)) < FINITE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_differences_where_all_parameters_are_zero(dtype):
    model = nn.Linear(5, 3, bias=False, dtype=dtype)
    model.weight.data.zero_()
    differences = Differences(model, [model.weight])
    for size in (0.0, 1.0):
        (derivative,) = differences.along(
            [torch.full((3, 5), size)], lambda: [3 * model.weight + 1]
        )
        assert derivative.dtype == torch.float32
        assert (derivative - 3 * size).abs().max() < (0.1 if dtype == torch.bfloat16 else FINITE)


def test_the_rounding_unit_is_that_of_the_coarsest_dtype():
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2).double())
    assert rounding_unit(model) == torch.finfo(torch.float32).eps
    model[1].compute_dtype = torch.float16  # as of a quantised layer, whose weight is no float
    assert rounding_unit(model) == torch.finfo(torch.float16).eps
    model[0].bfloat16()
    assert rounding_unit(model) == torch.finfo(torch.bfloat16).eps


def test_equal_calls_give_equal_results():
    for kind in KINDS:
        model = tiny_llama()
        assert torch.equal(product(model, "hessian", kind)[0], product(model, "hessian", kind)[0])


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.001], "double"),  # they agree
        ([1.5, 1.001, 1.001], "double"),  # they agree once the step is better
        ([1.5, 1.009, 1.014], "double"),  # one of the two does
        ([1.05, 1.05, 1.02], "double"),  # differences are as far from themselves
        ([1.05, 1.05, 1.049], "finite"),  # differences are sure of what they say
        ([1.5, 1.5, 1.2], "finite"),  # something is missing, however rough they are
    ],
)
def test_exact_backends_are_believed_as_far_as_differences_contradict_themselves(
    differences, expected
):
    layer = nn.Linear(3, 2, bias=False)
    site = Site(layer, ["weight"], [layer.weight], ProductCounter())
    factors = iter(differences)

    def build(kind):
        if kind == "forward":
            raise RuntimeError("no rule")
        factor = next(factors) if kind == "finite" else 1.0
        return lambda vector: [factor * x for x in vector]

    assert choose("auto", site, build) == expected


def test_a_padding_token_that_is_read_does_not_make_a_backend_look_wrong():
    """Autograd leaves an embedding's padding row without a gradient, whoever reads it."""
    model = tiny_llama(tied=True, dtype=torch.float64)
    ids = torch.tensor([[5, PAD, 7, PAD, 9, 11, PAD, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert model.get_input_embeddings().padding_idx == PAD
    assert HessianOperator(model, [batch], "causal_lm").chosen_products() == "double"


def test_half_a_step_is_half_as_long():
    model = nn.Linear(4, 2, bias=False)
    differences, places = Differences(model, [model.weight]), []
    vector = [torch.ones(2, 4)]

    def value():
        places.append(model.weight.detach().clone())
        return [model.weight * 1.0]

    for _ in range(2):
        differences.along(vector, value)
    differences.halve_step()
    differences.along(vector, value)
    lengths = [float((a - b).norm()) for a, b in zip(places[::2], places[1::2], strict=True)]
    assert lengths[-1] == pytest.approx(lengths[-2] / 2, rel=1e-3)


class FourBit(nn.Linear):
    """As bitsandbytes' layer on some CPUs: evaluation mode rewrites its weight."""

    support_avx512bf16_for_cpu = True

    def forward(self, x):
        if not self.training:
            self.weight.data = self.weight.data.bfloat16().float()
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_rewrite_weights_in_evaluation_mode_do_not_see_it(training):
    model = nn.Sequential(FourBit(4, 4), nn.Dropout(0.5)).train(training)
    before = model[0].weight.detach().clone()
    x = torch.randn(3, 4)
    with untouched(model):
        torch.testing.assert_close(model(x), x @ before.T + model[0].bias)  # without dropout
    assert torch.equal(model[0].weight, before)
    assert [m.training for m in model.modules()] == [training] * 3
