"""Per-example gradients of one pass against an explicit loop over single examples."""

import gc
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from test_krylov import rounded_products
from tiny_models import VOCAB, safety_batch, single, tiny_gpt2, tiny_llama, trainable, with_lora
from tolerances import GRADIENT, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safeopt import SafetyProbe, refusal_nll
from safeopt.curvature.basis import inner_products

Output = namedtuple("Output", "logits")
MODELS = {
    "plain": tiny_llama,
    "tied": lambda **kw: tiny_llama(tied=True, **kw),
    "bias": lambda **kw: tiny_llama(bias=True, **kw),
    "lora": lambda **kw: with_lora(tiny_llama(**kw)),
    "lora_start": lambda **kw: with_lora(tiny_llama(**kw), random_b=False),
    "gpt2": tiny_gpt2,
}


def looped_rows(model, params, batch):
    """The reference: one forward and one backward pass for each example, without padding."""
    rows = [torch.zeros(len(batch["input_ids"]), *p.shape, dtype=p.dtype) for p in params]
    model.eval()
    for example in range(len(batch["input_ids"])):
        loss = refusal_nll(model, single(batch, example)).sum()
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        for row, gradient in zip(rows, gradients, strict=True):
            if gradient is not None:
                row[example] = gradient
    return rows


def check(model, batch, *, passes, tolerance=None):
    """Compare with the loop, and count the passes: more than one says that the fallback ran."""
    params = trainable(model)
    probe = SafetyProbe(model, [batch])
    result = probe.per_example(params)
    expected = looped_rows(model, params, batch)
    tolerance = tolerance or GRADIENT[params[0].dtype]
    for actual, row in zip(result.rows, expected, strict=True):
        assert relative_error(actual, row) < tolerance or float(row.abs().max()) < 1e-12
    assert relative_error(result.losses, refusal_nll(model, batch).detach()) < tolerance
    assert (probe.passes.forward, probe.passes.backward) == (passes, passes)
    return result.rows, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop_in_one_pass(name, dtype):
    rows, expected = check(MODELS[name](dtype=dtype), safety_batch(), passes=1)
    dense = torch.cat([row.double().flatten(1) for row in expected], dim=1)
    products = dense @ dense.T
    assert relative_error(inner_products(rows, rows), products) < GRADIENT[dtype]


def test_some_parameters_only():
    """Gradients of a few parameters, in the caller's order."""
    model, batch = tiny_llama(tied=True), safety_batch()
    params = [trainable(model)[index] for index in (7, 0, 3)]
    rows = SafetyProbe(model, [batch]).per_example(params).rows
    for actual, expected in zip(rows, looped_rows(model, params, batch), strict=True):
        assert relative_error(actual, expected) < GRADIENT[torch.float32]


def test_rounded_products_need_no_loop():
    """Their rounding is no sign that a parameter is used elsewhere."""
    with rounded_products():
        check(tiny_llama(), safety_batch(), passes=1, tolerance=GRADIENT[torch.bfloat16])


def test_half_precision_needs_no_loop():
    check(tiny_llama(dtype=torch.bfloat16), safety_batch(), passes=1)
    with torch.autocast("cpu", torch.bfloat16):
        model = with_lora(tiny_llama())
        check(model, safety_batch(), passes=1, tolerance=GRADIENT[torch.bfloat16])


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_autocast_around_the_forward_pass_alone(kind):
    """As Accelerate puts it: layers are run again, to see their gradients, as they have run."""
    model = tiny_gpt2()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    params, probe = trainable(model), SafetyProbe(model, [safety_batch()])
    if kind == "dense":
        rows = probe.per_example(params).rows
    else:
        factors = probe.factored(params)[1]
        rows = [factors.block(index) for index in range(len(params))]
    assert probe.passes.forward == 1
    for actual, row in zip(rows, looped_rows(model, params, safety_batch()), strict=True):
        assert relative_error(actual, row) < GRADIENT[torch.bfloat16]


def test_a_parameter_in_half_precision_among_others_needs_no_loop():
    """Its own gradient is rounded, though its layer computes in float32."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8).bfloat16())

        def forward(self, x):
            return x * self.weight.float()

    model = Toy(Scale())
    params = [model.middle.weight]
    probe = SafetyProbe(model, [safety_batch()])
    rows = probe.per_example(params).rows
    assert probe.passes.forward == 1
    expected = looped_rows(model, params, safety_batch())
    assert relative_error(rows[0], expected[0]) < GRADIENT[torch.bfloat16]


def test_rows_are_float32_for_half_precision():
    model = tiny_llama(dtype=torch.bfloat16)
    rows = SafetyProbe(model, [safety_batch()]).per_example(trainable(model)).rows
    assert {row.dtype for row in rows} == {torch.float32}


class Toy(nn.Module):
    """Embedding, a linear layer, ``middle``, and a linear head."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.inner = nn.Linear(8, 8)
        self.middle = middle
        self.head = nn.Linear(8, VOCAB, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.inner(self.embedding(input_ids)))
        return Output(self.head(x + self.middle(x)))


class Flat(nn.Module):
    """Works on all tokens of the batch at once, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def forward(self, x):
        return self.expert(x.reshape(-1, 8)).view(x.shape)


class Routed(nn.Module):
    """An expert that is given the tokens whose first feature is above a threshold."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(8, 8)
        self.threshold = 0.0
        self.given = 0

    def forward(self, x):
        flat = x.reshape(-1, 8)
        chosen = (flat[:, 0] > self.threshold).nonzero().squeeze(1)
        self.given = len(chosen)
        return torch.zeros_like(flat).index_add(0, chosen, self.expert(flat[chosen])).view(x.shape)


class Positions(nn.Module):
    """Learned positions of the last three tokens, looked up once for all examples."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 8)

    def forward(self, x):
        places = self.embedding(torch.arange(3))
        return nn.functional.pad(places, (0, 0, x.shape[1] - 3, 0)).expand(x.shape)


class TupleOutput(nn.Module):
    """A layer with a parameter of its own that returns more than one tensor."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x) * self.scale, None


class First(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class Borrows(nn.Module):
    """Uses the weight of another module, which that module does not see."""

    def __init__(self):
        super().__init__()
        self.lender = nn.Linear(8, 8)

    def forward(self, x):
        return self.lender(x) @ self.lender.weight


class Pair(nn.Module):
    """A layer whose arguments are nested."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, x, rotation, *, extra):
            return x * self.weight * rotation[0] + rotation[1] * extra["shift"]

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(x, (x.cos(), x.sin()), extra={"shift": x})


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Padded(nn.Module):
    """An embedding whose padding row has no gradient, a convolution and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8, padding_idx=7)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        tokens = (x[..., 0].detach().abs() * VOCAB).long().clamp(max=VOCAB - 1)
        y = self.frozen(self.embedding(tokens))
        return self.convolution(y.transpose(1, 2)).transpose(1, 2)


class Renamed(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.scale = self.shift = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x.square() * self.scale + self.shift


class Named(nn.Module):
    """A layer whose input is given by its name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(input=x)


@pytest.mark.parametrize("middle", [Pair, Shared, Padded, Renamed, Named, nn.Identity])
def test_unusual_layers_in_one_pass(middle):
    check(Toy(middle()).double(), safety_batch(), passes=1)


@pytest.mark.parametrize(
    "middle",
    [Flat, lambda: First(TupleOutput()), Borrows],
    ids=["flat", "tuple", "borrowed"],
)
def test_fallback_to_the_loop(middle):
    """The parameters that hooks cannot serve need one more pass for each of the five examples."""
    check(Toy(middle()).double(), safety_batch(), passes=1 + 5)


def test_an_expert_with_as_many_tokens_as_examples_is_no_row_an_example():
    model, batch = Toy(Routed()).double(), safety_batch(seed=4)
    tokens = batch["input_ids"][batch["attention_mask"].bool()]
    with torch.no_grad():
        scores, _ = torch.tanh(model.inner(model.embedding(tokens)))[:, 0].sort(descending=True)
    model.middle.threshold = float((scores[4] + scores[5]) / 2)
    check(model, batch, passes=1 + 5)
    model(batch["input_ids"])
    assert model.middle.given == 5, "of five examples"


def test_positions_as_many_as_examples_are_no_row_an_example():
    three = {name: x[:3] for name, x in safety_batch(prompts=(4,) * 3, responses=(3,) * 3).items()}
    check(Toy(Positions()).double(), three, passes=1 + 3)


class TokensFirst(nn.Module):
    """A layer that is given the tokens before the examples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def test_as_many_examples_as_tokens_are_no_row_an_example():
    """The shortest goes alone: without the longest the others might be square again."""
    batch = safety_batch(prompts=(3,) * 5, responses=(2,) * 5)
    check(Toy(TokensFirst()).double(), batch, passes=(1 + 1) + (1 + 4))
    batch = safety_batch(prompts=(3,) * 5 + (4,), responses=(2,) * 6)  # five of five, one of six
    check(Toy(TokensFirst()).double(), batch, passes=(1 + 1) + (1 + 5))


def test_fallback_is_remembered_for_the_parameters_that_need_it():
    model = Toy(Flat()).double()
    params = trainable(model)
    probe = SafetyProbe(model, [safety_batch()])
    first = probe.per_example(params).rows
    runs = []
    model.embedding.register_forward_hook(lambda *args: runs.append(args[2].shape[0]))
    again = probe.per_example(params).rows
    assert runs == [5, 1, 1, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    head = [model.head.weight]
    runs.clear()
    probe.per_example(head)
    assert runs == [5]


class Bystander(nn.Module):
    """Has a parameter that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return x


class LookingBystander(Bystander):
    """Looks at the data, too, which `torch.func.vmap` refuses."""

    def forward(self, x):
        return x if bool(x.isfinite().all()) else x + self.unused.sum()


@pytest.mark.parametrize("middle", [Bystander, LookingBystander])
def test_unused_parameters_have_zero_rows(middle):
    model = Toy(middle())
    rows, _ = check(model, safety_batch(), passes=1)
    unused = [p is model.middle.unused for p in trainable(model)].index(True)
    assert not rows[unused].any()


class Branching(nn.Module):
    """A layer that looks at the data, which `torch.func.vmap` refuses."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x * self.weight if bool(x.isfinite().all()) else x


@pytest.mark.parametrize(
    ("middle", "replays"),
    [(nn.LayerNorm(8), 1), (nn.RMSNorm(8), 1), (Branching(), 5)],
    ids=["LayerNorm", "RMSNorm", "branching"],
)
def test_other_layers_are_replayed_once_where_that_is_possible(middle, replays):
    """One call in the pass, one for all examples, or after that is refused one for each."""
    model, calls = Toy(middle).double(), []
    check(model, safety_batch(), passes=1)
    probe, forward = SafetyProbe(model, [safety_batch()]), middle.forward
    middle.forward = lambda x: (forward(x), calls.append(x.shape))[0]
    probe.per_example(trainable(model))
    assert len(calls) == 1 + replays


class Keeps(nn.Module):
    """A layer that keeps a tensor for inputs of the same shape, and its latest input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.kept = None

    def forward(self, x):
        if self.kept is None or self.kept.shape != x.shape:
            self.kept = torch.ones_like(x)
        self.latest = x
        return x * self.weight * self.kept


def test_what_a_layer_keeps_is_that_of_the_whole_pass():
    """A replay leaves none of its tensors, of which those of `torch.func.vmap` are void."""
    model, batch = Toy(Keeps()).double(), safety_batch()
    check(model, batch, passes=1)
    SafetyProbe(model, [batch]).per_example(trainable(model))
    assert len(model.middle.kept) == len(model.middle.latest) == len(batch["input_ids"])
    assert bool(model(batch["input_ids"][:1]).logits.isfinite().all())


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_of_others_see_tensors_that_last(everywhere, before):
    model, seen = Toy(nn.LayerNorm(8)).double(), []

    def keep(module, inputs, output=None):
        if module is model.middle:
            seen.append((inputs[0] if output is None else output).detach())

    of = nn.modules.module if everywhere else model.middle
    where = f"register{'_module' * everywhere}_forward{'_pre' * before}_hook"
    with getattr(of, where)(keep):
        check(model, safety_batch(), passes=1)
    assert seen
    assert all(bool(tensor.isfinite().all()) for tensor in seen)


class Remembers(nn.Module):
    """A layer that puts what it sees into a list and a dict of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.seen, self.last = [], {}

    def forward(self, x):
        self.seen.append(x)
        self.last["x"] = x
        return x * self.weight


def test_what_a_layer_remembers_outlives_the_replay():
    model = Toy(Remembers()).double()
    check(model, safety_batch(), passes=1)
    kept = [*model.middle.seen, model.middle.last["x"]]
    assert all(float(x.detach().abs().sum()) > 0 for x in kept)


class Reads(TorchDispatchMode):
    """Counts numbers that are read from a tensor: a GPU is waited for at each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_numbers_read_do_not_grow_with_the_layers():
    counts = []
    for layers in (1, 4):
        model = with_lora(tiny_llama(layers=layers))
        probe, params = SafetyProbe(model, [safety_batch()]), trainable(model)
        with Reads() as reads:
            probe.per_example(params)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_many_small_blocks_are_multiplied_together():
    """Their inner products are those of the whole, in any mixture of sizes and dtypes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (40, 500), (700, 600), (0, 4), (2, 3)]
    dtypes = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float32]
    blocks = [
        torch.randn(5, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, dtype in zip(shapes, [*dtypes, torch.float32], strict=True)
    ]
    whole = torch.cat([block.double().reshape(5, -1) for block in blocks], dim=1)
    assert relative_error(inner_products(blocks, blocks), whole @ whole.T) < 1e-6
    others = [block[:2].clone() for block in blocks]
    assert relative_error(inner_products(blocks, others), whole @ whole[:2].T) < 1e-6


class Opaque(nn.Module):
    """A layer whose argument hides a tensor of the whole batch."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, x, hidden):
            return x * self.weight + hidden.logits

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(x, SimpleNamespace(logits=x))


def test_hidden_arguments_fall_back():
    check(Toy(Opaque()).double(), safety_batch(), passes=1 + 5)


def test_a_layer_that_remembers_the_batch_falls_back():
    """It cannot be run again on one example, as a recurrent layer whose state is a batch's."""

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))
            self.examples = None

        def forward(self, x):
            self.examples = self.examples or len(x)
            if len(x) != self.examples:
                raise RuntimeError("the state is that of another batch")
            return x * self.weight

    class Forgets(Toy):
        def forward(self, input_ids, attention_mask=None):
            self.middle.examples = None
            return super().forward(input_ids)

    check(Forgets(Remembers()).double(), safety_batch(), passes=1 + 5)


def test_a_gradient_that_padding_makes_nan_is_looped():
    """Zeros from a weight that is used outside of its module are not taken for its rows."""

    class Lent(Toy):
        def __init__(self):
            super().__init__(nn.Embedding(1, 8))

        def forward(self, input_ids, attention_mask):
            x = torch.tanh(self.inner(self.embedding(input_ids)))
            lent = attention_mask.unsqueeze(-1) * self.middle.weight.square()
            return Output(self.head(x + lent.sqrt()))

    check(Lent().double(), safety_batch(), passes=1 + 5)


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_gradients_that_overflow_need_no_loop(kind):
    """A loop would find the same, and go on for good."""
    model = Toy(nn.Identity())
    with torch.no_grad():
        model.head.weight.fill_(torch.inf)
    probe = SafetyProbe(model, [safety_batch()])
    (probe.per_example if kind == "dense" else probe.factored)(trainable(model))
    assert probe.passes.forward == 1


def test_batch_statistics_fall_back():
    """A normalisation over the batch mixes the examples: its own gradients are looped."""

    class BatchNorm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = Toy(BatchNorm(8, track_running_stats=False)).double()
    nn.init.normal_(model.middle.weight)
    batch = safety_batch((4, 4, 4), (3, 3, 3))
    params = [model.middle.weight, model.middle.bias]
    probe = SafetyProbe(model, [batch])
    rows = probe.per_example(params).rows
    assert probe.passes.forward == 1 + 3
    expected = looped_rows(model, params, batch)
    assert relative_error(rows[0], expected[0]) < GRADIENT[torch.float64]


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_nothing_of_a_pass_stays_in_memory(kind):
    """The graph, the hooks and the recorder hold each other; autograd hides that from gc."""
    model = with_lora(tiny_llama())
    params, probe = trainable(model), SafetyProbe(model, [safety_batch()])
    look = probe.per_example if kind == "dense" else probe.factored

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    look(params)
    before = tensors()
    for _ in range(3):
        look(params)
    assert tensors() <= before  # fewer where another test's garbage goes in the meantime
