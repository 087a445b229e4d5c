"""Factored per-example gradients against the dense ones."""

import io

import pytest
import torch
from test_per_example import (
    MODELS,
    Borrows,
    First,
    Flat,
    Padded,
    Shared,
    Toy,
    TupleOutput,
    looped_rows,
)
from tiny_models import safety_batch, single, tiny_llama, trainable, with_lora
from tolerances import GRADIENT, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safeopt import SafetyProbe, refusal_nll
from safeopt import factored as module
from safeopt.factored import FactoredRows
from safeopt.factored_gradients import factored_gradients, in_order
from safeopt.factors import Factors


def factored(model, batch, looped=None, **options):
    """Rows of all trainable parameters, and how often the model was run."""
    runs = []

    def run(examples):
        runs.append(len(examples["input_ids"]))
        return refusal_nll(model.eval(), examples)

    count = len(batch["input_ids"])
    losses, rows = factored_gradients(
        lambda: run(batch),
        [lambda i=i: run(single(batch, i)) for i in range(count)],
        model,
        trainable(model),
        set() if looped is None else looped,
        **{"verify": True, **options},
    )
    return losses, rows, runs


def flat(blocks):
    return torch.cat([block.double().flatten(1) for block in blocks], dim=1)


def blocks(rows):
    return [rows.block(i) for i in range(len(rows.shapes))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop_in_one_pass(name, dtype):
    model, batch = MODELS[name](dtype=dtype), safety_batch()
    expected = looped_rows(model, trainable(model), batch)
    for verify in (True, False):
        losses, rows, runs = factored(model, batch, verify=verify)
        assert runs == [5]
        for actual, row in zip(blocks(rows), expected, strict=True):
            assert actual.dtype == row.dtype
            assert relative_error(actual, row) < GRADIENT[dtype] or row.abs().max() < 1e-12
        assert relative_error(losses, refusal_nll(model, batch).detach()) < GRADIENT[dtype]
        dense = flat(expected)
        assert relative_error(rows.products(), dense @ dense.T) < GRADIENT[dtype]


def test_what_is_kept():
    """Linear layers and embeddings as factors, inputs once, and only tokens with a gradient."""
    model = tiny_llama(tied=True, bias=True)
    batch = safety_batch()
    names = [name for name, _ in model.named_parameters()]
    _, rows, _ = factored(model, batch)
    dense = {names[i] for i in rows.dense}
    assert dense == {name for name in names if "norm" in name or name.endswith("bias")}
    together = [{names[i].split(".")[-2] for i in site.left} for site in rows.sites]
    for group in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
        assert together.count(group) == 2
    embedding = [site for site in rows.sites if 0 in site.left]
    assert sorted(site.left[0].dim() for site in embedding) == [1, 2]  # read and written
    tokens = batch["attention_mask"].sum(1)
    responses = (batch["labels"] != -100).sum(1)
    for site in rows.sites:
        counts = torch.tensor(site.counts)
        assert bool((counts <= tokens - 1).all())  # the last token predicts nothing
        if any(left.dim() == 2 and i == 0 for i, left in site.left.items()):
            assert torch.equal(counts, responses)


def test_lora_has_factors_only():
    _, rows, _ = factored(with_lora(tiny_llama()), safety_batch())
    assert not rows.dense


class Begins(nn.Module):
    """Two layers whose inputs begin at the same place of memory, and are not the same."""

    def __init__(self):
        super().__init__()
        self.whole, self.part = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x):
        return self.whole(x) + self.part(x[..., :4])


class Again(nn.Module):
    """One layer used twice on the same input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) + torch.tanh(self.layer(x))


class Tied(nn.Module):
    """A linear layer whose weight another kind of layer owns, too."""

    class Transposed(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.transposed = self.Transposed(self.linear.weight)

    def forward(self, x):
        return self.transposed(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("middle", [Shared, Padded, Begins, Again, Tied])
def test_unusual_layers_in_one_pass(middle):
    model, batch = Toy(middle()).double(), safety_batch()
    _, rows, runs = factored(model, batch)
    assert runs == [5]
    dense = flat(looped_rows(model, trainable(model), batch))
    assert relative_error(flat(blocks(rows)), dense) < GRADIENT[torch.float64]


@pytest.mark.parametrize("middle", [Flat, lambda: First(TupleOutput()), Borrows])
def test_fallback_to_the_loop_is_remembered(middle):
    model, batch, looped = Toy(middle()).double(), safety_batch(), set()
    dense = flat(looped_rows(model, trainable(model), batch))
    for verify in (True, False):
        _, rows, runs = factored(model, batch, looped, verify=verify)
        assert runs == [5, 1, 1, 1, 1, 1]
        assert looped
        assert looped <= set(rows.dense)
        assert relative_error(flat(blocks(rows)), dense) < GRADIENT[torch.float64]


class Scales(nn.Module):
    """Two factors used outside of the module that owns them; one is zero, as at LoRA's start."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterDict({"a": torch.rand(2, 8), "b": torch.zeros(8, 2)})

    def forward(self, x):
        return x @ self.factors["a"].T @ self.factors["b"].T


class Looks(Scales):
    """The same where the first one's module is called for a look alone, without gradients."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2, bias=False)

    def forward(self, x):
        with torch.no_grad():
            self.linear(x)
        return super().forward(x) + x @ self.linear.weight.T @ self.factors["b"].T


@pytest.mark.parametrize("middle", [Scales, Looks])
def test_a_zero_gradient_proves_nothing(middle):
    """At its start the first factor's gradient is zero; its rows must not stay so."""
    model, batch, looped = Toy(middle()).double(), safety_batch(), set()
    factored(model, batch, looped)
    with torch.no_grad():
        model.middle.factors["b"].normal_()
    dense = flat(looped_rows(model, trainable(model), batch))
    _, rows, _ = factored(model, batch, looped, verify=False)
    assert relative_error(flat(blocks(rows)), dense) < GRADIENT[torch.float64]


def test_all_parameters_looped():
    model, batch, looped = Toy(Scales()).double(), safety_batch(), set()
    model.requires_grad_(False)
    model.middle.factors["b"].requires_grad_(True)
    dense = flat(looped_rows(model, trainable(model), batch))
    for verify in (True, False):
        _, rows, runs = factored(model, batch, looped, verify=verify)
        assert runs == [5, 1, 1, 1, 1, 1]
        assert relative_error(flat(blocks(rows)), dense) < GRADIENT[torch.float64]


def test_half_precision_factors():
    model, batch = tiny_llama(), safety_batch()
    _, exact, _ = factored(model, batch)
    _, rows, _ = factored(model, batch, dtype=torch.bfloat16)
    assert {t.dtype for s in rows.sites for t in (s.right, *s.left.values()) if t.dim() == 2} == {
        torch.bfloat16
    }
    assert rows.nbytes < 0.6 * exact.nbytes
    assert relative_error(flat(blocks(rows)), flat(blocks(exact))) < GRADIENT[torch.bfloat16]


def test_micro_batches_are_put_in_order():
    model, batch = tiny_llama(tied=True, dtype=torch.float64), safety_batch()
    parts = []
    for positions in ([3, 0], [1, 4, 2]):
        some = {name: tensor[positions] for name, tensor in batch.items()}
        losses, rows, _ = factored(model, some)
        parts.append((positions, losses, rows))
    losses, rows = in_order(parts)
    _, whole, _ = factored(model, batch)
    assert relative_error(losses, refusal_nll(model, batch).detach()) < GRADIENT[torch.float64]
    assert relative_error(flat(blocks(rows)), flat(blocks(whole))) < GRADIENT[torch.float64]


COUNTS = [3, 0, 4, 2]


def drawn(counts=COUNTS, seed=0, dtype=torch.float64):
    """A linear layer, one with the same input, a tied embedding, and a vector."""
    g = torch.Generator().manual_seed(seed)
    total = sum(counts)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    everywhere = torch.arange(total)
    sites = [
        Factors(normal(total, 5), {0: normal(total, 7), 1: normal(total, 3)}, counts, everywhere),
        Factors(normal(total, 6), {2: normal(total, 9)}, counts, everywhere),
        Factors(normal(total, 6), {2: torch.randint(9, (total,), generator=g)}, counts, everywhere),
    ]
    shapes = [torch.Size(s) for s in [(7, 5), (3, 5), (9, 6), (4,), (2, 2)]]
    scale = torch.linspace(0.5, 2, len(counts), dtype=torch.float64)
    return FactoredRows(shapes, [dtype] * 5, sites, {3: normal(len(counts), 4)}, scale)


def lacking(rows, site):
    """The same without one of the factors' places."""
    return rows._with([s for i, s in enumerate(rows.sites) if i != site], rows.dense, rows.scale)


def matrices(rows):
    """The definition: Σ_t l_t r_tᵀ, one token after the other."""
    out = [torch.zeros(len(rows), *shape, dtype=torch.float64) for shape in rows.shapes]
    for site in rows.sites:
        for index, left in site.left.items():
            for token, owner in enumerate(site.owners.tolist()):
                l_t = left[token].double()
                if left.dim() == 1:
                    l_t = torch.eye(rows.shapes[index][0], dtype=torch.float64)[left[token]]
                out[index][owner] += torch.outer(l_t, site.right[site.places[token]].double())
    for index, dense in rows.dense.items():
        out[index] += dense
    return [x * rows.scale.view(-1, *[1] * (x.dim() - 1)) for x in out]


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temporary", [1, 1 << 24])
@pytest.mark.parametrize("by_tokens", [True, False])
def test_inner_products_equal_the_definition(by_tokens, temporary, stored, monkeypatch):
    monkeypatch.setattr(FactoredRows, "_by_tokens", lambda *_: by_tokens)
    monkeypatch.setattr(module, "_TEMPORARY", temporary)
    one, two = drawn().stored_as(stored), drawn([1, 5], seed=1).stored_as(stored)
    assert relative_error(flat(blocks(one)), flat(matrices(one))) < 1e-14
    expected = flat(matrices(one)) @ flat(matrices(two)).T
    assert relative_error(one.inner(two), expected) < 1e-13
    expected = flat(matrices(one)) @ flat(matrices(one)).T
    assert relative_error(one.products(), expected) < 1e-13
    parts = [one.products_of(i) for i in range(len(one.shapes))]
    assert relative_error(sum(parts), expected) < 1e-13
    for some in (lacking(two, 1), lacking(two, 2), two.with_dense({2: two.unscaled(2) + 1})):
        expected = flat(matrices(one)) @ flat(matrices(some)).T
        assert relative_error(one.inner(some), expected) < 1e-13
        assert relative_error(some.inner(one), expected.T) < 1e-13
    vector = [torch.randn(s).double() for s in one.shapes]
    along = sum(one.along(i, v.float()) for i, v in enumerate(vector))
    whole = torch.cat([v.flatten() for v in vector])
    assert relative_error(along, flat(matrices(one)) @ whole) < 1e-13
    weights = torch.randn(len(one), dtype=torch.float64)
    moved = [v.clone() for v in vector]
    for i, v in enumerate(moved):
        one.add_into(i, v, weights)
    step = torch.cat([v.flatten() for v in moved]) - whole
    assert relative_error(step, weights @ flat(matrices(one))) < 1e-13
    single = [torch.zeros(s) for s in one.shapes]
    for i, v in enumerate(single):
        one.add_into(i, v, weights)
    step = torch.cat([v.flatten() for v in single])
    assert relative_error(step, weights @ flat(matrices(one))) < 1e-6


def test_the_cheaper_contraction_is_chosen():
    def rows(tokens, size):
        left = {0: torch.zeros(tokens, size)}
        site = Factors(torch.zeros(tokens, size), left, [tokens], torch.arange(tokens))
        return FactoredRows([torch.Size((size, size))], [torch.float32], [site], {}, torch.ones(1))

    few, many = rows(2, 64), rows(512, 64)
    assert few._by_tokens(few, 0)
    assert not many._by_tokens(many, 0)
    some = rows(48, 64)  # with itself, the matrices of one side alone have to be formed
    assert not some._by_tokens(some, 0)
    assert some._by_tokens(rows(48, 64), 0)


def test_operations_on_rows_equal_those_on_matrices():
    one, two = drawn(), drawn([1, 5], seed=1)
    a, b = flat(matrices(one)), flat(matrices(two))
    assert relative_error(flat(blocks(one.select([3, 1, 0]))), a[[3, 1, 0]]) < 1e-14
    joined = one.followed_by(two)
    assert relative_error(flat(blocks(joined)), torch.cat([a, b])) < 1e-14
    factors = torch.tensor([2.0, 1.0, -1.0, 0.5])
    assert relative_error(flat(blocks(one.scaled(factors))), factors[:, None] * a) < 1e-14
    given = one.with_dense({0: torch.ones(4, 7, 5, dtype=torch.float64)})
    assert 0 not in given.sites[0].left
    alone = one.with_dense({2: torch.ones(4, 9, 6, dtype=torch.float64)})
    assert len(alone.sites) == 1, "a place without a weight is not kept"
    assert torch.equal(given.block(0)[0], torch.full((7, 5), 0.5, dtype=torch.float64))
    noise = one.noise(torch.Generator().manual_seed(0))
    assert noise.products().shape == (4, 4)
    assert relative_error(noise.products(), one.products()) > 0.1
    assert torch.equal(noise.scale, torch.ones(4))


@pytest.mark.parametrize("change", ["site 0", "site 1", "site 2", "a site twice"])
def test_passes_that_differ_in_their_places_are_put_together(change):
    """A layer that one of them has not called, or has called twice."""
    one, two = drawn(), drawn([1, 5], seed=1)
    if change == "a site twice":
        one = one._with([*one.sites, *drawn(seed=2).sites[:1]], one.dense, one.scale)
    else:
        two = lacking(two, int(change[-1]))
    for pair in ((one, two), (two, one)):
        joined = pair[0].followed_by(pair[1])
        expected = torch.cat([flat(matrices(rows)) for rows in pair])
        assert relative_error(flat(blocks(joined)), expected) < 1e-14


def test_the_magnitude_is_that_of_the_tokens_where_nothing_cancels():
    rows = drawn()
    for index in range(len(rows.shapes)):
        each = [torch.zeros(0)]
        for site in rows.sites:
            if index in site.left:
                left = site.left[index].double()
                left = left.norm(dim=1) if left.dim() == 2 else torch.ones(len(left))
                each.append(left * site.right.norm(dim=1))
        each += [rows.dense[index].flatten()] if index in rows.dense else []
        assert float(rows.magnitude(index)) == pytest.approx(float(torch.cat(each).norm()))


@pytest.mark.parametrize("size", [1e-15, 1, 1e15])
def test_equal_inputs_are_kept_once(size):
    rows = drawn()
    rows.sites[0].right.mul_(size)
    twice = rows.followed_by(rows.scaled(torch.full((4,), 3.0)))
    twice.sites[0].right[len(rows.sites[0].right) :] *= 1 + 1e-14
    compact = twice.compact()
    assert [len(s.right) for s in compact.sites] == [len(s.right) for s in rows.sites]
    assert relative_error(flat(blocks(compact)), flat(matrices(twice))) < 1e-12
    assert relative_error(compact.products(), twice.products()) < 1e-12
    again = compact.select([0, 2])
    assert [len(s.right) for s in again.sites] == [7, 7, 7]
    close = drawn()
    close.sites[0].right.mul_(size)
    close.sites[0].right[1] = close.sites[0].right[0] * (1 + 1e-9)
    assert len(close.compact().sites[0].right) == len(close.sites[0].right)


def test_inputs_in_half_precision_are_one_if_they_are_equal():
    rows = drawn().stored_as(torch.bfloat16)
    right = rows.sites[0].right
    right[0] = right[1] = 1
    right[2] = 0
    right[3] = right[2]
    right[4] = 1
    right[4, 0] += torch.finfo(torch.bfloat16).eps
    compact = rows.compact()
    assert len(compact.sites[0].right) == len(right) - 2
    assert torch.equal(flat(blocks(compact)), flat(blocks(rows)))


def test_places_without_a_token_are_compact():
    rows = drawn([0, 0]).compact()
    assert not rows.products().any() or rows.dense
    assert not any(len(site.right) for site in rows.sites)


def test_state_survives_a_file_and_bad_ones_are_refused():
    rows = drawn().compact()
    params = [torch.zeros(s, dtype=torch.float64) for s in rows.shapes]
    file = io.BytesIO()
    torch.save(rows.state_dict(), file)
    file.seek(0)
    again = FactoredRows.from_state(torch.load(file, weights_only=True), params)
    assert torch.equal(flat(blocks(again)), flat(blocks(rows)))
    for shape in ((8, 5), (7, 6)):
        with pytest.raises(ValueError, match="factors of parameter 0 do not fit"):
            FactoredRows.from_state(rows.state_dict(), [torch.zeros(shape), *params[1:]])
    with pytest.raises(ValueError, match="factors of parameter 2 do not fit"):
        FactoredRows.from_state(rows.state_dict(), params[:2])
    with pytest.raises(ValueError, match="rows of parameter 3 do not fit"):
        FactoredRows.from_state(rows.state_dict(), params[:3])
    with pytest.raises(ValueError, match="rows of parameter 3 do not fit"):
        FactoredRows.from_state(rows.state_dict(), [*params[:3], torch.zeros(5)])


@pytest.mark.parametrize("token", [-1, 9])
def test_tokens_outside_of_an_embedding_are_refused(token):
    rows = drawn()
    params = [torch.zeros(s, dtype=torch.float64) for s in rows.shapes]
    rows.sites[2].left[2][3] = token
    with pytest.raises(ValueError, match="factors of parameter 2 do not fit"):
        FactoredRows.from_state(rows.state_dict(), params)


BROKEN = ["examples", "tokens", "negative", "no numbers", "places", "places before", "weights"]


@pytest.mark.parametrize("broken", BROKEN)
def test_factors_that_do_not_fit_each_other_are_refused(broken):
    rows = drawn()
    params = [torch.zeros(s, dtype=torch.float64) for s in rows.shapes]
    state = rows.state_dict()
    right, left, counts, places = state["sites"][0]
    state["sites"][0] = {
        "examples": [right, left, [*counts, 0], places],
        "tokens": [right, left, [*counts[:-1], counts[-1] + 1], places],
        "no numbers": [right, left, [float(n) for n in counts], places],
        "negative": [right, left, [-1, 1, 4, 5], places],
        "places": [right, left, counts, places + 1],
        "places before": [right, left, counts, places - 1],
        "weights": [right, {}, counts, places],
    }[broken]
    with pytest.raises(ValueError, match="factors of a layer do not fit each other"):
        FactoredRows.from_state(state, params)


class Counts(TorchDispatchMode):
    """Counts how often the tokens' examples are worked out: a GPU is given numbers each time."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "repeat_interleave" in function._schema.name
        return function(*args, **(kwargs or {}))


def test_the_tokens_examples_are_worked_out_once():
    model = with_lora(tiny_llama())
    _, rows = SafetyProbe(model, [safety_batch()]).factored(trainable(model))
    counts = []
    for _ in range(2):
        with Counts() as counted:
            for index, p in enumerate(trainable(model)):
                rows.along(index, p)
        counts.append(counted.count)
    assert counts[0] > 0
    assert counts[1] == 0
