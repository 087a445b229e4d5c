"""CurvatureOperator: what all curvature matrices share.

An operator is a symmetric n×n matrix C over the chosen parameters, known by its products. A vector
is a list of tensors, one for each parameter; a block of k vectors is a list of tensors of shape
``(k, *p.shape)``, as in `safeopt.curvature.basis.DenseBasis`. Both are in float32 (float64 for
float64 parameters), whatever the parameters' own dtype.

Batches are read anew for every block of products and cut into micro-batches, so that memory does
not grow with the data. All k products of a block share the work of one pass over the data; inside
`CurvatureOperator.retained` the first ``keep`` micro-batches are kept between blocks, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from safeopt.batches import require_size
from safeopt.curvature.density import hutch_pp
from safeopt.curvature.operators.objective import Loss, Objective, equal_data, micro_batches
from safeopt.isolation import untouched
from safeopt.losses import IGNORE, reads_padding, trimmed
from safeopt.rows import as_matrix, exact_products, row_dtype

ParameterFilter = Callable[[str], bool]
# A dense matrix beyond this is a mistake: 20,000 parameters are 3.2 GB in float64.
_DENSE_LIMIT = 20_000


@dataclass
class ProductCounter:
    """What an operator's products cost so far. Passes are counted for each micro-batch.

    Attributes:
        products: matrix-vector products.
        forward: forward passes, those that carry tangents included.
        backward: backward passes, those that build a graph or carry tangents included.
        double_backward: passes through the graph of a gradient.
        tangent: passes that carried forward-mode tangents.
    """

    products: int = 0
    forward: int = 0
    backward: int = 0
    double_backward: int = 0
    tangent: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters as plain numbers."""
        return asdict(self)


class Part(Protocol):
    """A micro-batch made ready for products."""

    @property
    def weight(self) -> float:
        """Its share of W, known after its first product."""

    def add_products(self, vectors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Add this micro-batch's unnormalised products with ``vectors`` to ``out``."""


PartT = TypeVar("PartT", bound=Part)


class CurvatureOperator(ABC, Generic[PartT]):
    """A curvature matrix of the loss A(θ) = (1/W) Σ_i ℓ_i(θ).

    Args:
        model: the module itself, not a data-parallel wrapper. It runs in evaluation mode and is
            left as it was.
        batches: batches that can be read more than once: a list or a data loader. With a loss
            known by name, dicts of tensors as described in `safeopt.losses`.
        loss: ``"nll"``, ``"causal_lm"`` or a function ``(model, batch)`` that returns one loss for
            each example or one number; see `safeopt.curvature.operators.objective`.
        params: which trainable parameters: a test of their names, the parameters themselves in the
            order wanted, or None for all.
        micro_batch_size: the largest number of examples in one pass, at least 1.
        keep: how many micro-batches stay in memory inside `retained`, at least 0. More cost
            memory and save time.

    Raises:
        TypeError: if ``model`` is no module or ``loss`` neither a name nor callable.
        ValueError: if ``batches`` can be read only once, no parameter is chosen, a chosen one is
            frozen or foreign to the model, or a number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss = "nll",
        *,
        params: ParameterFilter | Sequence[nn.Parameter] | None = None,
        micro_batch_size: int = 16,
        keep: int = 1,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__}: expected a torch.nn.Module")
        if isinstance(batches, Iterator):
            raise ValueError(
                f"batches={type(batches).__name__}: can be read only once, and every block of "
                "products reads the data; give a list or a data loader"
            )
        require_size("micro_batch_size", micro_batch_size)
        if keep < 0:
            raise ValueError(f"keep={keep}: a number of micro-batches, at least 0")
        self.model = model
        self.objective = Objective(loss)
        self.names, self.params = _chosen(model, params)
        self.counts = ProductCounter()
        self._batches = batches
        self._micro_batch_size = micro_batch_size
        self._splits: bool | None = None
        self._keep = keep
        self._parts: dict[int, tuple[Any, PartT]] | None = None  # with what they were made of
        self._versions: list[int] = []

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters."""
        return [p.shape for p in self.params]

    @property
    def size(self) -> int:
        """Number of parameters n."""
        return sum(p.numel() for p in self.params)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors: float64 if all parameters are, else float32."""
        dtypes = {row_dtype(p) for p in self.params}
        return torch.float64 if dtypes == {torch.float64} else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.params[0].device

    def matvec(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return C·v: one product.

        Args:
            vector: one tensor for each parameter, with its shape.
        """
        return [out[0] for out in self.matmat([x.unsqueeze(0) for x in vector])]

    def matmat(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return C·v for k vectors: k products that share their passes over the data.

        Args:
            vectors: one tensor for each parameter, shape ``(k, *p.shape)``.

        Returns:
            Likewise, in float32 (float64 for float64 parameters).

        Raises:
            ValueError: if shapes do not fit or there is no example.
        """
        counts = {x.shape[:1] for x in vectors}
        if len(counts) != 1 or [x.shape[1:] for x in vectors] != self.shapes:
            raise ValueError(
                f"vectors: {len(vectors)} tensors, shapes {[tuple(x.shape) for x in vectors][:4]}; "
                f"expected one of shape (k, *p.shape) for each of {len(self.params)} parameters"
            )
        vectors = [x.to(p.device, row_dtype(p)) for x, p in zip(vectors, self.params, strict=True)]
        out = [torch.zeros_like(x) for x in vectors]
        total = 0.0
        self.counts.products += vectors[0].shape[0]
        with self._looking():
            for part in self._all_parts():
                part.add_products(vectors, out)
                total += part.weight
        for tensor in out:
            tensor /= total
        return out

    def trace(self, products: int = 48, seed: int = 0) -> float:
        """Estimate the trace by Hutch++ (`safeopt.curvature.density.hutch_pp`).

        Args:
            products: number of products to spend, at least 3.
            seed: seed of the random vectors.
        """
        return hutch_pp(self, products, seed=seed).value

    def to_dense(self) -> Tensor:
        """Return C as an ``(n, n)`` matrix: n products. For tests.

        Raises:
            ValueError: if there are more than 20,000 parameters.
        """
        if self.size > _DENSE_LIMIT:
            raise ValueError(
                f"to_dense: {self.size} parameters need {8 * self.size**2 / 1e9:.0f} GB; "
                "choose fewer with params=, or use matmat"
            )
        eye = torch.eye(self.size, dtype=self.dtype, device="cpu")
        sizes = [p.numel() for p in self.params]
        blocks = [
            part.reshape(self.size, *p.shape).to(p.device)
            for part, p in zip(eye.split(sizes, dim=1), self.params, strict=True)
        ]
        columns = [as_matrix(out).to(self.device) for out in self.matmat(blocks)]
        return torch.cat(columns, dim=1)

    @contextmanager
    def retained(self) -> Iterator[None]:
        """Keep up to ``keep`` micro-batches ready between products, for as long as this lasts.

        A product then costs what lies behind the common part only. Memory: the activations and
        graphs of the kept micro-batches. The parameters must not change in the meantime; in-place
        changes are noticed, writes through ``.data`` are not. Nor may the batches: a product raises
        ValueError where another one comes in a kept one's place, as from a loader that shuffles.
        """
        if self._parts is not None:
            yield
            return
        self._parts = {}
        try:
            yield
        finally:
            self._parts = None

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Passes that leave no trace, with gradients and without reduced-precision products.

        Their rounding is far above that of float32, which finite differences count on. Layers may
        lie on several devices.
        """
        cpu, cuda = (exact_products(torch.device(x), autocast=True) for x in ("cpu", "cuda"))
        with untouched(self.model), torch.enable_grad(), cpu, cuda:
            yield

    @abstractmethod
    def _part(self, batch: Any, index: int) -> PartT:
        """Make micro-batch number ``index`` ready; it may have no labelled token."""

    def _all_parts(self) -> Iterator[PartT]:
        versions = [p._version for p in self.model.parameters()]
        if self._parts is not None and versions != self._versions:
            self._parts.clear()
        self._versions = versions
        index, targets = -1, False
        for index, batch in enumerate(self._micro_batches()):
            targets |= self.objective.has_targets(batch)
            if self._parts is None or index >= self._keep:
                yield self._part(batch, index)
                continue
            if index not in self._parts:
                self._parts[index] = batch, self._part(batch, index)
            known, part = self._parts[index]
            if not equal_data(known, batch):
                raise ValueError(
                    f"batches: micro-batch {index} is not that of the product before; a solver "
                    "needs the same data in the same order at every product, so of a loader that "
                    "shuffles give list(loader)"
                )
            yield part
        if index < 0:
            raise ValueError("batches: empty; a curvature needs at least one example")
        if not targets:
            raise ValueError(f"labels: every entry is {IGNORE}; a curvature needs labelled tokens")

    def _micro_batches(self) -> Iterator[Any]:
        if self._splits is None:
            self._splits = self._splittable()
        return self._cut(self._micro_batch_size if self._splits else None)

    def _cut(self, size: int | None) -> Iterator[Any]:
        """Micro-batches of at most ``size`` rows, padded no more than these need, or not at all."""
        if not self.objective.is_cross_entropy:
            return micro_batches(self._batches, size, self.device)
        pad = not reads_padding(self.model)
        return map(trimmed, micro_batches(self._batches, size, self.device, pad=pad))

    def _splittable(self) -> bool:
        """Look at the loss of a few examples: what is one number for a batch cannot be cut."""
        if self.objective.is_cross_entropy:
            return True
        with untouched(self.model), torch.no_grad():
            self.counts.forward += 1
            return self.objective.losses(self.model, self._first_examples(2)).dim() == 1

    def _first_examples(self, count: int) -> Any:
        """The first ``count`` examples or fewer; the first batch where it cannot be cut.

        Examples without a labelled token are passed over, unless there are no others.
        """
        batch = None
        for batch in self._cut(min(count, self._micro_batch_size)):
            if self.objective.has_targets(batch):
                break
        if batch is None:
            raise ValueError("batches: empty; a curvature needs at least one example")
        return batch


def _chosen(
    model: nn.Module, params: ParameterFilter | Sequence[nn.Parameter] | None
) -> tuple[list[str], list[nn.Parameter]]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params is None or callable(params):
        chosen = {name: p for name, p in trainable.items() if params is None or params(name)}
    else:
        names = {id(p): name for name, p in trainable.items()}
        strangers = [i for i, p in enumerate(params) if id(p) not in names]
        if strangers:
            raise ValueError(
                f"params: entries {strangers[:8]} are frozen or no parameters of the model; "
                "call requires_grad_(True) on what is frozen"
            )
        chosen = {names[id(p)]: p for p in params}
    if not chosen:
        raise ValueError(
            f"params: none of {len(trainable)} trainable parameters is chosen; a filter sees names "
            f"such as {list(trainable)[:2]}, and frozen parameters need requires_grad_(True)"
        )
    return list(chosen), list(chosen.values())
