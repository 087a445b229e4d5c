"""Curvature operators against dense float64 matrices that are built without them."""

import pytest
import torch
from test_krylov import SOLVERS, flat, rounded_products, subspace_angle
from test_per_example import TokensFirst, Toy, looped_rows
from test_probe import BART, of_family
from tiny_models import (
    safety_batch,
    single,
    tiny_gpt2,
    tiny_llama,
    trainable,
    with_lora,
)
from tolerances import EIGENVALUE, GRADIENT, relative_error
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from safeopt import SafetyProbe
from safeopt.curvature.basis import inner_products
from safeopt.curvature.operators import FisherOperator, GGNOperator, HessianOperator
from safeopt.curvature.operators.objective import equal_data
from safeopt.curvature.solvers import gram
from safeopt.losses import ReferenceKL, refusal_nll

EXACT = ("double", "forward")
BATCHES = [safety_batch(), safety_batch(seed=1)]
LOSSES = ("nll", "causal_lm")
NLL_EXAMPLES = 10
# GPT-2 computes in float64 throughout; Llama's norms and rotary embeddings are always in float32.
MODEL = tiny_gpt2(dtype=torch.float64).eval()


def some(name):
    return any(
        part in name for part in ("ln_1.weight", "ln_2.bias", "mlp.c_proj.bias", "attn.c_proj.bias")
    )


PARAMS = {name: p for name, p in MODEL.named_parameters() if some(name)}
SIZE = sum(p.numel() for p in PARAMS.values())


def outputs(vector):
    """Logits and targets of all tokens that count, as a function of the chosen parameters."""
    values = dict(zip(PARAMS, unflatten(vector), strict=True))
    logits, targets, weights = [], [], []
    for batch in BATCHES:
        for row in range(len(batch["input_ids"])):
            example = single(batch, row)
            ids, labels = example["input_ids"], example["labels"][0, 1:]
            out = functional_call(MODEL, values, (), {"input_ids": ids}).logits[0, :-1]
            kept = labels != -100
            logits.append(out[kept])
            targets.append(labels[kept])
            weights.append(torch.full((int(kept.sum()),), 1 / int(kept.sum()), dtype=torch.float64))
    return torch.cat(logits), torch.cat(targets), torch.cat(weights)


def unflatten(vector):
    parts = vector.split([p.numel() for p in PARAMS.values()])
    return [x.view(p.shape) for x, p in zip(parts, PARAMS.values(), strict=True)]


def point():
    return torch.cat([p.detach().flatten() for p in PARAMS.values()])


def token_weights(loss, weights):
    return weights / NLL_EXAMPLES if loss == "nll" else torch.full_like(weights, 1 / len(weights))


@pytest.fixture(scope="module")
def dense():
    """Hessians, GGNs and Fisher matrices by automatic differentiation of one flat vector."""
    with sdpa_kernel(SDPBackend.MATH):
        return _dense()


def _dense():
    matrices = {}
    jacobian = torch.func.jacrev(lambda x: outputs(x)[0], chunk_size=64)(point())
    logits, targets, weights = (x.detach() for x in outputs(point()))
    p = logits.softmax(-1).detach()
    middle = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    for loss in LOSSES:
        w = token_weights(loss, weights)
        matrices["ggn", loss] = _sandwich(jacobian, w, middle)

        def value(x, w=w):
            logits = outputs(x)[0]
            picked = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            return -(w * picked).sum()

        matrices["hessian", loss] = _second(value)
    rows = []
    for batch in BATCHES:
        for row in range(len(batch["input_ids"])):
            loss = refusal_nll(MODEL, single(batch, row)).sum()
            gradients = torch.autograd.grad(loss, list(PARAMS.values()))
            rows.append(torch.cat([g.flatten() for g in gradients]))
    rows = torch.stack(rows)
    matrices["fisher", "nll"] = rows.T @ rows / len(rows)
    lengths = torch.tensor(
        [
            int((single(b, r)["labels"][0, 1:] != -100).sum())
            for b in BATCHES
            for r in range(len(b["input_ids"]))
        ]
    )
    summed = rows * lengths.unsqueeze(1)
    matrices["fisher", "causal_lm"] = summed.T @ summed / lengths.sum()
    return {key: matrix.detach() for key, matrix in matrices.items()}


def _second(value):
    """Reverse over reverse, row by row; forward-mode rules would be less trustworthy."""
    x = point().requires_grad_()
    (first,) = torch.autograd.grad(value(x), x, create_graph=True)
    return torch.stack([torch.autograd.grad(g, x, retain_graph=True)[0] for g in first])


def _sandwich(jacobian, weights, middle):
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for j, w, m in zip(jacobian, weights, middle, strict=True):
        total += w * j.T @ m @ j
    return total.detach()


def build(name, loss, kind="double", **options):
    options = {"params": some, "micro_batch_size": 3, **options}
    if name == "fisher":
        return FisherOperator(MODEL, BATCHES, loss, **options)
    operator = HessianOperator if name == "hessian" else GGNOperator
    return operator(MODEL, BATCHES, loss, products=kind, **options)


CASES = [
    *[(name, kind) for name in ("hessian", "ggn") for kind in EXACT],
    ("fisher", "gradients"),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_dense_matrix(name, kind, loss, dense):
    if kind == "forward":  # it has no graph to share: a few columns only
        operator = build(name, loss, kind)
        columns = [0, SIZE // 2, SIZE - 1]
        block = torch.eye(SIZE, dtype=torch.float64)[columns]
        sizes = [p.numel() for p in operator.params]
        parts = block.split(sizes, dim=1)
        vectors = [x.reshape(-1, *p.shape) for x, p in zip(parts, operator.params, strict=True)]
        actual = torch.cat([x.reshape(len(columns), -1) for x in operator.matmat(vectors)], dim=1)
        assert relative_error(actual, dense[name, loss][columns]) < GRADIENT[torch.float64]
    else:
        actual = build(name, loss, kind).to_dense()
        assert relative_error(actual, dense[name, loss]) < GRADIENT[torch.float64]


@pytest.mark.parametrize(
    ("name", "kind", "solver"),
    [(*case, "lanczos") for case in CASES]
    + [(*case, "block_krylov") for case in CASES if case[1] != "forward"],  # for time
)
def test_top_eigenpairs(name, kind, solver, dense):
    values, vectors = torch.linalg.eigh(dense[name, "nll"])
    order = values.abs().argsort(descending=True)[:4]
    result = SOLVERS[solver](
        build(name, "nll", kind, micro_batch_size=16, keep=2), 4, tolerance=1e-6
    )
    assert result.converged
    gap = (result.eigenvalues - values[order]).abs() / values[order].abs()
    assert gap.max() < EIGENVALUE[torch.float64]
    assert subspace_angle(flat(result.basis), vectors.T[order]) < 1e-5


def test_task_loss_of_hugging_face(dense):
    """``"causal_lm"`` on one batch is ``model(**batch).loss``; several numbers are averaged."""
    batch = BATCHES[0]
    ids = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    by_name = HessianOperator(MODEL, [ids], "causal_lm", params=some, micro_batch_size=2)
    by_model = HessianOperator(
        MODEL, [ids], lambda model, b: model(**b).loss, params=some, micro_batch_size=2
    )
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).double() for p in by_name.params]
    for a, b in zip(by_name.matvec(vector), by_model.matvec(vector), strict=True):
        assert relative_error(a, b) < 1e-6  # Hugging Face computes the loss in float32
    twice = HessianOperator(MODEL, [ids, ids], by_model.objective.loss, params=some)
    for a, b in zip(twice.matvec(vector), by_model.matvec(vector), strict=True):
        assert relative_error(a, b) < GRADIENT[torch.float64]


def test_alignment_loss_of_a_probe():
    """Any loss with a value for each example, also the KL to a reference."""
    probe = SafetyProbe(MODEL, BATCHES, loss="kl")
    probe.value()
    hessian = HessianOperator(MODEL, BATCHES, probe.loss, params=some)
    assert isinstance(probe.loss, ReferenceKL)
    # At the reference the full KL's Hessian is the GGN; the cached top 32 of 40 classes are near.
    ggn = GGNOperator(MODEL, BATCHES, probe.loss, params=some)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).double() for p in ggn.params]
    a, b = (torch.cat([x.flatten() for x in o.matvec(vector)]) for o in (hessian, ggn))
    assert relative_error(a, b) < 0.1


def test_batches_do_not_matter(dense):
    """Micro-batches, their number and what is kept change the passes, not the products."""
    columns = torch.eye(SIZE, dtype=torch.float64)[[1, SIZE // 2]]
    vectors = [
        x.reshape(2, *p.shape)
        for x, p in zip(
            columns.split([p.numel() for p in PARAMS.values()], dim=1), PARAMS.values(), strict=True
        )
    ]
    for options in ({"micro_batch_size": 1}, {"micro_batch_size": 16, "keep": 0}):
        for name in ("hessian", "ggn", "fisher"):
            parts = build(name, "causal_lm", **options).matmat(vectors)
            actual = torch.cat([x.reshape(2, -1) for x in parts], dim=1)
            expected = columns @ dense[name, "causal_lm"]
            assert relative_error(actual, expected) < GRADIENT[torch.float64]


def test_sampled_fisher_estimates_the_ggn(dense):
    for loss in LOSSES:
        expected = dense["ggn", loss]
        total = torch.zeros_like(expected)
        for seed in range(30):
            rows = build("fisher", loss, labels="sampled", seed=seed, micro_batch_size=16).rows()
            rows = torch.cat([row.flatten(1) for row in rows], dim=1)
            total += rows.T @ rows / 30
        error = relative_error(total, expected)
        single_error = relative_error(
            build("fisher", loss, labels="sampled", seed=0).to_dense(), expected
        )
        assert error < 0.4
        assert error < 0.4 * single_error


def test_sampled_labels_are_the_same_at_every_product():
    operator = build("fisher", "nll", labels="sampled", seed=3)
    vector = [torch.ones_like(p) for p in operator.params]
    state = torch.get_rng_state()
    first = operator.matvec(vector)
    with operator.retained():
        kept = [operator.matvec(vector) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    for other in kept:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_sampled_labels_stand_where_labels_stood():
    """Others in each micro-batch, none in the prompts, and the user's own are as they were."""
    batch = safety_batch()
    labels = batch["labels"].clone()
    operator = FisherOperator(MODEL, [batch], labels="sampled", params=some)
    first, second = (operator._with_sampled_labels(batch, index)["labels"] for index in (0, 1))
    assert torch.equal(batch["labels"], labels)
    for drawn in (first, second):
        assert torch.equal(drawn == -100, labels == -100)
    assert not torch.equal(first, second)


def test_fisher_equals_gram(dense):
    operator = build("fisher", "nll")
    rows = operator.rows()
    values, basis = gram(rows, 4)
    result = SOLVERS["lanczos"](operator, 4, tolerance=1e-9)
    assert relative_error(result.eigenvalues, values) < EIGENVALUE[torch.float64]
    assert (
        inner_products(basis.blocks, result.basis.blocks).abs().diagonal().sub(1).abs().max() < 1e-8
    )
    assert abs(operator.trace() - float(dense["fisher", "nll"].trace())) < 1e-10
    assert operator.counts.products > 0


def test_trace(dense):
    for name in ("hessian", "ggn"):
        exact = float(dense[name, "nll"].trace())
        estimate = build(name, "nll").trace(60, seed=1)
        assert abs(estimate - exact) < 0.1 * float(dense[name, "nll"].norm())


def test_lora_tied_and_frozen_models():
    models = {
        "lora": with_lora(tiny_llama(dtype=torch.float64, layers=1), rank=1),
        "tied": tiny_llama(dtype=torch.float64, layers=1, hidden=4, tied=True),
    }
    for p in list(models["tied"].parameters())[3:]:
        p.requires_grad_(False)
    for model in models.values():
        batches = [safety_batch()]
        params = trainable(model)
        with sdpa_kernel(SDPBackend.MATH):
            loss = refusal_nll(model.eval(), batches[0]).mean()
            first = torch.autograd.grad(loss, params, create_graph=True)
        first = torch.cat([g.flatten() for g in first])
        rows = [torch.autograd.grad(g, params, retain_graph=True) for g in first]
        expected = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
        actual = HessianOperator(model, batches, products="double").to_dense()
        assert relative_error(actual, expected) < 1e-6  # float32 inside of Llama
        ggn, fisher = GGNOperator(model, batches), FisherOperator(model, batches)
        for matrix in (ggn.to_dense(), fisher.to_dense()):
            assert relative_error(matrix, matrix.T) < 1e-6
            assert torch.linalg.eigvalsh(matrix)[0] > -1e-6 * matrix.norm()
        assert relative_error(torch.tensor(fisher.trace()), fisher.to_dense().trace()) < 1e-6


def test_bfloat16_vectors_are_float32():
    model = with_lora(tiny_llama(dtype=torch.bfloat16))
    exact = with_lora(tiny_llama(dtype=torch.bfloat16)).float()
    generator = torch.Generator().manual_seed(0)
    for build_operator in (HessianOperator, GGNOperator, FisherOperator):
        operator, reference = (build_operator(m, [safety_batch()]) for m in (model, exact))
        vector = [torch.randn(p.shape, generator=generator) for p in operator.params]
        actual, expected = operator.matvec(vector), reference.matvec(vector)
        assert operator.dtype == torch.float32
        assert {x.dtype for x in actual} == {torch.float32}
        a, b = (torch.cat([x.flatten() for x in y]) for y in (actual, expected))
        assert relative_error(a, b) < 2 * GRADIENT[torch.bfloat16]


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, FisherOperator])
def test_vectors_of_any_dtype(operator):
    curvature = operator(tiny_llama(), [safety_batch()], micro_batch_size=4)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).bfloat16() for p in curvature.params]
    expected = curvature.matvec([x.float() for x in vector])
    for dtype in (torch.bfloat16, torch.float64):
        actual = curvature.matvec([x.to(dtype) for x in vector])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("products", ["auto", "finite"])
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_rounded_products_of_training_are_not_used(operator, products):
    """Of the rounding of eight bits finite differences would leave nothing."""
    model = tiny_llama(hidden=64)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in trainable(model)]
    expected = operator(model, [safety_batch()], products="double").matvec(vector)
    with rounded_products():
        actual = operator(model, [safety_batch()], products=products).matvec(vector)
    a, b = (torch.cat([x.flatten() for x in y]) for y in (actual, expected))
    assert relative_error(a, b) < (1e-6 if products == "auto" else 1e-2)


@pytest.mark.parametrize("some_rows", [slice(2), slice(-2, None)], ids=["first", "last"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["hessian", "ggn", "fisher"])
def test_examples_without_a_label_count_as_they_do_in_a_larger_batch(name, loss, some_rows):
    """Some micro-batches have no label: also those on which backends are tried, and the last."""
    batch = safety_batch()
    batch["labels"][some_rows] = -100
    operator = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": FisherOperator}[name]
    whole, cut = (operator(MODEL, [batch], loss, params=some, micro_batch_size=n) for n in (5, 1))
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).double() for p in whole.params]
    a, b = (torch.cat([x.flatten() for x in o.matvec(vector)]) for o in (cut, whole))
    assert float(b.norm()) > 0
    assert relative_error(a, b) < 1e-10
    if name == "fisher":
        assert relative_error(flat_rows(cut), flat_rows(whole)) < 1e-10
    batch["labels"][:] = -100
    with pytest.raises((ValueError, RuntimeError), match="labels: every entry is -100"):
        operator(MODEL, [batch], loss, params=some).matvec(vector)


@pytest.mark.parametrize("name", ["hessian", "ggn", "fisher"])
def test_a_label_on_the_first_token_counts_no_more_behind_padding(name):
    """Nothing predicts it: neither its loss nor its weight is that of a labelled token."""
    batch = safety_batch()
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    operator = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": FisherOperator}[name]
    padded = operator(MODEL, [batch], "causal_lm", params=some)
    alone = operator(MODEL, [single(batch, row) for row in range(5)], "causal_lm", params=some)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).double() for p in padded.params]
    a, b = (torch.cat([x.flatten() for x in o.matvec(vector)]) for o in (padded, alone))
    assert relative_error(a, b) < GRADIENT[torch.float64]


@pytest.mark.parametrize(("side", "size"), [("left", 4), ("right", 4), ("left", 16)])
@pytest.mark.parametrize("name", ["hessian", "ggn", "sampled", "fisher"])
def test_models_that_read_padding_are_given_none(name, side, size):
    """BART's decoder counts padding as positions: as if every example came alone."""
    model = of_family("Bart", d_model=16, pad_token_id=0, **BART).double()
    batch = safety_batch(side=side)
    operators = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": FisherOperator}
    options = {"labels": "sampled"} if name == "sampled" else {}
    operator = operators.get(name, FisherOperator)
    actual = operator(model, [batch], micro_batch_size=size, **options)
    batches = []  # by their lengths, without padding: sampled labels are those of a pass
    for rows in ((0,), (2,), (1, 3, 4)):
        parts = [single(batch, row) for row in rows]
        batches.append({key: torch.cat([part[key] for part in parts]) for key in batch})
    expected = operator(model, batches, **options)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).double() for p in actual.params]
    a, b = (torch.cat([x.flatten() for x in o.matvec(vector)]) for o in (actual, expected))
    assert relative_error(a, b) < GRADIENT[torch.float64]


def test_a_part_of_a_batch_is_run_without_the_padding_of_the_others():
    """Of transformers 4.51 some models, such as Bamba, read it where a row is alone."""
    lengths = []
    hook = MODEL.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with hook:
        for name in ("hessian", "ggn", "fisher"):
            operator = build(name, "nll", micro_batch_size=1)
            lengths.clear()
            list(operator._all_parts())
            assert set(lengths) == {5, 10, 7}, name


def test_a_square_batch_of_a_layer_with_tokens_first():
    """Five examples of five tokens: the layer's rows are tokens, and the sum is right."""
    model = Toy(TokensFirst()).double()
    batch = safety_batch(prompts=(3,) * 5, responses=(2,) * 5)
    operator = FisherOperator(model, [batch])
    expected = torch.cat([x.flatten(1) for x in looped_rows(model, operator.params, batch)], dim=1)
    assert relative_error(flat_rows(operator), expected / 5**0.5) < GRADIENT[torch.float64]
    assert operator.counts.forward == (1 + 1) + (1 + 4)


def test_the_examples_of_a_loop_are_run_without_padding():
    model = Toy(TokensFirst()).double()
    batch = safety_batch(prompts=(2, 1, 2, 1, 3), responses=(1, 1, 2, 2, 2))
    alone = []

    def note(module, args, kwargs):
        if len(kwargs["input_ids"]) == 1:
            alone.append(kwargs["input_ids"].shape[1])

    with model.register_forward_pre_hook(note, with_kwargs=True):
        FisherOperator(model, [batch]).trace()
    assert set(alone) == {2, 3, 4, 5}
    assert alone.count(5) == 1


def flat_rows(fisher):
    return torch.cat([row.flatten(1) for row in fisher.rows()], dim=1)


@pytest.mark.parametrize("name", ["hessian", "ggn", "fisher"])
def test_matmat_is_matvecs_and_symmetric(name):
    operator = build(name, "nll")
    generator = torch.Generator().manual_seed(0)
    block = [torch.randn(3, *p.shape, generator=generator).double() for p in operator.params]
    products = operator.matmat(block)
    for j in range(3):
        for one, many in zip(operator.matvec([x[j] for x in block]), products, strict=True):
            assert relative_error(many[j], one) < 1e-12
    small = inner_products(block, products)
    assert (small - small.T).abs().max() < 1e-10 * small.abs().max()


def test_passes_are_counted_and_shared():
    """Ten examples in four micro-batches; inside `retained` the kept ones are run once."""
    expected = {
        "hessian": [(4, 4, 20), (7, 7, 20), (4, 4, 20)],
        "ggn": [(4, 24, 20), (7, 27, 20), (4, 24, 20)],
        "fisher": [(4, 4, 0), (7, 7, 0), (4, 4, 0)],
    }
    for name, triples in expected.items():
        for keep, blocks, counts in ((1, 1, triples[0]), (1, 2, triples[1]), (9, 2, triples[2])):
            operator = build(name, "nll", keep=keep)
            if name != "fisher":
                operator.chosen_products()
            before = operator.counts.as_dict()
            with operator.retained():
                for size in (5,) if blocks == 1 else (2, 3):
                    operator.matmat([torch.ones(size, *p.shape).double() for p in operator.params])
            after = operator.counts.as_dict()
            spent = {key: after[key] - before[key] for key in after}
            assert spent["products"] == 5
            assert (spent["forward"], spent["backward"], spent["double_backward"]) == counts


@pytest.mark.parametrize("protected", [True, False])
def test_retained_notices_changed_parameters(protected):
    model = tiny_gpt2(dtype=torch.float64)
    operator = HessianOperator(model, BATCHES, params=some, products="double")
    vector = [torch.ones_like(p) for p in operator.params]
    changed = operator.params[0] if protected else model.transformer.ln_f.weight
    with operator.retained():
        operator.matvec(vector)
        with torch.no_grad():
            changed.add_(0.5)
        inside = operator.matvec(vector)
    for a, b in zip(inside, operator.matvec(vector), strict=True):
        assert torch.equal(a, b)


def test_retained_inside_of_retained_keeps_what_is_kept():
    """Until the outer one ends, for a caller of several solvers."""
    operator = build("fisher", "nll", keep=9)
    vector = [torch.ones_like(p) for p in operator.params]
    with operator.retained():
        operator.matvec(vector)
        spent = operator.counts.forward
        for _ in range(2):
            with operator.retained():
                operator.matvec(vector)
        assert operator.counts.forward == spent
    operator.matvec(vector)
    assert operator.counts.forward == 2 * spent


def test_parameters_of_two_dtypes_have_vectors_of_the_coarser_one():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64), nn.Linear(2, 1, bias=False))

    def loss(model, x):
        return 0.5 * model[1](model[0](x).float()).square().sum(1)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = HessianOperator(model, [x], loss)
    assert operator.dtype == torch.float32
    result = SOLVERS["lanczos"](operator, 1)
    assert result.converged
    expected = HessianOperator(model.double(), [x], loss_in_float64).to_dense()
    largest = torch.linalg.eigvalsh(expected).abs().max()
    assert result.eigenvalues[0].abs() == pytest.approx(float(largest), rel=1e-4)


def loss_in_float64(model, x):
    return 0.5 * model(x).square().sum(1)


class Reversing(list):
    """Batches in another order at every other reading, as from a loader that shuffles."""

    readings = 0

    def __iter__(self):
        self.readings += 1
        return iter(self[:: 1 if self.readings % 2 else -1])


@pytest.mark.parametrize("name", ["hessian", "fisher"])
def test_data_that_changes_inside_of_a_solver_is_refused(name):
    """The kept micro-batch is not to be counted a second time in the place of another one."""
    choices = {"params": some} if name == "fisher" else {"params": some, "products": "double"}
    operator = (FisherOperator if name == "fisher" else HessianOperator)(
        MODEL, Reversing(BATCHES), **choices
    )
    vector = [torch.ones_like(p) for p in operator.params]
    expected = build(name, "nll").matvec(vector)
    for _ in range(2):
        for actual, e in zip(operator.matvec(vector), expected, strict=True):
            assert relative_error(actual, e) < GRADIENT[torch.float64]
    with operator.retained():
        operator.matvec(vector)
        with pytest.raises(ValueError, match=r"batches: .* give list\(loader\)"):
            operator.matvec(vector)


def test_chosen_parameters_keep_their_order():
    params = [list(PARAMS.values())[i] for i in (3, 0)]
    operator = build("hessian", "nll", params=params)
    assert operator.params[0] is params[0]
    assert operator.names == [list(PARAMS)[3], next(iter(PARAMS))]
    assert operator.shapes == [p.shape for p in params]


def test_scalar_parameters_and_other_data():
    """Not only language models: tuples of tensors, parameters of one number and of none."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.none = nn.Parameter(torch.ones(0, 3, dtype=torch.float64))

    def loss(model, batch):
        x, y = batch.values() if isinstance(batch, dict) else batch
        return 0.5 * (model.scale * x @ model.weight - y) ** 2

    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    batches = [(x, torch.zeros(2).double())]
    named = [{"x": x, "y": torch.zeros(2).double()}]
    model = Scaled()
    dense, fisher = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    for a, b in x:  # f = s(aw₁ + bw₂): H = ∇f∇fᵀ + f∇²f with s = 2, w = (1, 1)
        g = torch.stack([a + b, 2 * a, 2 * b])
        second = torch.tensor([[0, a, b], [a, 0, 0], [b, 0, 0]]).double()
        dense += (torch.outer(g, g) + 2 * (a + b) * second) / 2
        fisher += 4 * (a + b) ** 2 * torch.outer(g, g) / 2  # ∇½f² = f∇f
    assert (HessianOperator(model, batches, loss).to_dense() - dense).abs().max() < 1e-12
    assert (FisherOperator(model, named, loss).to_dense() - fisher).abs().max() < 1e-12
    with pytest.raises(ValueError, match="dict of tensors"):
        FisherOperator(model, batches, loss).matvec(
            [torch.ones(()), torch.ones(2), torch.ones(0, 3)]
        )


def test_equal_data_by_value():
    x = torch.tensor([1.0, torch.nan])
    batch = {"x": x, "more": (torch.tensor([True]), ["text", torch.arange(3)])}
    again = {"x": x.clone(), "more": (torch.tensor([True]), ["other", torch.arange(3)])}
    assert equal_data(batch, again)  # NaN included; what is no tensor is not compared
    assert not equal_data(batch, {**again, "x": x[:1]})
    assert not equal_data(batch, {**again, "x": torch.zeros(3)})
    assert not equal_data(batch, {**again, "x": x.nan_to_num(2.0)})
    assert not equal_data(batch, {**again, "more": (torch.tensor([False]), ["", torch.arange(3)])})
    assert not equal_data(batch, {**again, "further": x})
    assert not equal_data(batch, {**again, "more": again["more"][:1]})


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="read only once"):
        HessianOperator(MODEL, iter(BATCHES))
    with pytest.raises(ValueError, match="params: none of"):
        HessianOperator(MODEL, BATCHES, params=lambda name: "lora" in name)
    with pytest.raises(ValueError, match="frozen or no parameters"):
        HessianOperator(MODEL, BATCHES, params=[nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match='loss="mse"'):
        HessianOperator(MODEL, BATCHES, "mse")
    with pytest.raises(TypeError, match="loss=3"):
        HessianOperator(MODEL, BATCHES, 3)
    with pytest.raises(TypeError, match="model=int"):
        HessianOperator(3, BATCHES)
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        HessianOperator(MODEL, BATCHES, micro_batch_size=0)
    with pytest.raises(ValueError, match="keep=-1"):
        HessianOperator(MODEL, BATCHES, keep=-1)
    with pytest.raises(ValueError, match="closed form needs the logits"):
        GGNOperator(MODEL, BATCHES, lambda model, batch: model(**batch).loss)
    with pytest.raises(ValueError, match='labels="true"'):
        FisherOperator(MODEL, BATCHES, labels="true")
    with pytest.raises(ValueError, match="labels can be sampled"):
        FisherOperator(MODEL, BATCHES, lambda model, batch: model(**batch).loss, labels="sampled")
    with pytest.raises(ValueError, match="one row for each example"):
        FisherOperator(MODEL, BATCHES, lambda model, batch: model(**batch).loss).trace()
    with pytest.raises(ValueError, match="batches: empty"):
        HessianOperator(MODEL, [], params=some).matvec(
            [torch.ones_like(p) for p in PARAMS.values()]
        )
    operator = build("hessian", "nll")
    with pytest.raises(ValueError, match="vectors: 1 tensors"):
        operator.matmat([torch.ones(1, 3)])
    with pytest.raises(ValueError, match=r"vectors: .*expected one of shape"):
        operator.matmat([torch.ones(1 + i % 2, *p.shape) for i, p in enumerate(operator.params)])
    with pytest.raises(ValueError, match="to_dense"):
        HessianOperator(tiny_llama(hidden=64), BATCHES).to_dense()


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_curvlinops_agrees(name):
    """An independent public implementation, on a loss both can state: all tokens, no padding.

    Without LayerNorm's weights: their forward-over-reverse products are wrong in torch 2.13.
    """
    curvlinops = pytest.importorskip("curvlinops")
    ids = safety_batch((4, 4, 4), (4, 4, 4))["input_ids"]

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(input_ids=x).logits[:, :-1].flatten(0, 1)

    params = [p for n, p in MODEL.named_parameters() if "c_proj" in n]
    theirs = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}
    operator = theirs[name](
        Logits(MODEL), nn.CrossEntropyLoss(), params, [(ids, ids[:, 1:].flatten())],
        check_deterministic=False,
    )  # fmt: skip
    ours = {"hessian": HessianOperator, "ggn": GGNOperator}[name](
        MODEL, [{"input_ids": ids, "labels": ids}], "causal_lm", params=params
    )
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).double() for p in ours.params]
    with sdpa_kernel(SDPBackend.MATH):
        expected = operator @ vector
    for a, b in zip(ours.matvec(vector), expected, strict=True):
        assert relative_error(a, b) < GRADIENT[torch.float64]
