"""Where parameters and safety examples lie when several processes train one model.

Four layouts; without a process group everything here does nothing:

=====================  ==================  =======================  =============================
                       parameters, basis   sums over parameters     safety examples
=====================  ==================  =======================  =============================
one process            whole               --                       all
DDP                    whole, everywhere   averaged over the ranks  split over the ranks
FSDP2 (`fully_shard`)  a part each         summed over the ranks    losses split; gradients: every
HSDP                   a part each, R×     summed, divided by R     rank, its own part of each
DeepSpeed ZeRO 1, 2    a part each of the  summed over the ranks    as with FSDP2
                       float32 masters
=====================  ==================  =======================  =============================

Every sum over parameters ends in an all-reduce over all ranks, divided by the number of ranks that
hold the same part. All ranks therefore see the same bits and take the same decisions: whether to
refresh, which step to take back. Whole parameters (DDP) get the per-example gradients of all ranks
by an all-gather. Parts need none: every rank runs the examples, as it gathers the weights anyway,
and keeps its own part of the gradients.

Under ZeRO the model holds all weights whole, in its own dtype, and the optimizer moves a `Master`
of each. Everything that reads or writes weights between the passes (coordinates, steps inside the
subspace) works on the masters; what was written is published to the model's weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _loaded(module: str, name: str) -> Any:
    """A class of a module that may not be loaded; then nothing is an instance of it."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which every rank holds a part."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself where that is all of it."""
    (part,) = locals_of([tensor])
    assert part is not None
    return part


def locals_of(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`local` of many tensors, quick where there are hundreds; None stays None."""
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    found: list[Tensor | None] = []
    for t in tensors:
        master = master_of(t)
        if master is not None:
            found.append(master.values())
        else:
            found.append(t.to_local() if isinstance(t, sharded) else t)
    return found


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a process holds: some entries along one dimension.

    Attributes:
        dim: the dimension.
        start: the first entry.
        length: number of entries; 0 where there are more processes than entries.
        size: number of entries of the whole parameter.
    """

    dim: int
    start: int
    length: int
    size: int

    def cut(self, whole: Tensor, leading: int = 0) -> Tensor:
        """This part of a tensor whose dimension ``leading`` is the parameter's first."""
        return whole.narrow(self.dim + leading, self.start, self.length)

    def whole(self, shape: torch.Size, leading: int = 0) -> torch.Size:
        """The shape of the tensor of which ``shape`` is this part's."""
        sizes = list(shape)
        sizes[self.dim + leading] = self.size
        return torch.Size(sizes)


@dataclass(frozen=True)
class Range:
    """As `Part`, of a parameter that is cut as one long vector.

    Attributes:
        start: the first entry.
        length: number of entries; 0 where other processes hold them all.
        shape: of the parameter.
    """

    start: int
    length: int
    shape: torch.Size

    def cut(self, whole: Tensor, leading: int = 0) -> Tensor:
        """As `Part.cut`; the result has one dimension beside the leading ones."""
        flat = whole.reshape(*whole.shape[:leading], -1)
        return flat.narrow(leading, self.start, self.length)

    def whole(self, shape: torch.Size, leading: int = 0) -> torch.Size:
        """As `Part.whole`."""
        return torch.Size((*shape[:leading], *self.shape))

    def lines(self) -> tuple[slice, slice]:
        """The rows of a matrix in which the range lies, and the range among their entries."""
        width = self.shape[1]
        first, last = self.start // width, -(-(self.start + self.length) // width)
        return slice(first, last), slice(begin := self.start - first * width, begin + self.length)


class Master(Protocol):
    """The float32 numbers, this process's range of them, that the optimizer moves for a parameter.

    Attributes:
        range: which entries of the parameter they are.
        group: the ranks that hold the others.
    """

    range: Range
    group: dist.ProcessGroup

    def values(self) -> Tensor:
        """The numbers themselves, shape ``(range.length,)``."""
        ...

    def publish(self) -> None:
        """Bring what was written to the masters of all parameters into the model's weights.

        All ranks call it together.
        """
        ...


_MASTER = "_safeopt_master"


def set_master(p: Tensor, master: Master | None) -> None:
    """Make ``master`` what optimizers move in place of a model's parameter; None: itself again."""
    setattr(p, _MASTER, master)


def master_of(p: Tensor | None) -> Master | None:
    """The master of a parameter; None where the optimizer moves the parameter itself."""
    return getattr(p, _MASTER, None)


def _nothing() -> None:
    """What is called after a write that concerns no other rank; a lambda cannot be pickled."""


class Layout:
    """How some parameters lie over the processes.

    Args:
        parts: for each parameter the part that this process holds, None for all of it.
        group: the ranks that train the model; None if there is one process.
        replicas: number of ranks that hold the same part.
        publish: called after a part was written to, by all ranks.
    """

    def __init__(
        self,
        parts: Sequence[Part | Range | None],
        group: dist.ProcessGroup | None = None,
        replicas: int = 1,
        publish: Callable[[], None] = _nothing,
    ) -> None:
        self.parts = list(parts)
        self.replicas = replicas
        self.publish = publish
        self._group = group
        self._size = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of(cls, params: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Layout:
        """The layout of parameters.

        Args:
            params: all of them whole, or all of them sharded by ``fully_shard``.
            group: the ranks that hold copies of whole parameters, as DDP does; None if other
                processes, should there be any, are nothing to this one.

        Raises:
            TypeError: if they are laid out in another way.
        """
        if any(getattr(p, "_fsdp_flattened", False) for p in params):
            raise TypeError(f"params: {FSDP1}")
        masters = [master for p in params if (master := master_of(p)) is not None]
        if masters and len(masters) == len(params):
            ranges = [master.range for master in masters]
            return cls(ranges, masters[0].group, publish=masters[0].publish)
        sharded = [p for p in params if is_sharded(p)]
        if not sharded:
            replicas = 1 if group is None else dist.get_world_size(group)
            return cls([None] * len(params), group, replicas)
        if len(sharded) < len(params):
            raise TypeError(
                f"params: {len(sharded)} of {len(params)} protected parameters are sharded and the "
                "others are not; shard all of them with fully_shard, or use protect=False"
            )
        mesh: Any = sharded[0].device_mesh  # type: ignore[attr-defined]
        return cls(
            [_part(p, mesh) for p in sharded],
            _group_of(mesh),
            mesh.size() // mesh.size(_sharded_dim(sharded[0])),
        )

    @property
    def sharded(self) -> bool:
        """Whether this process holds parts of the parameters only."""
        return any(part is not None for part in self.parts)

    def require_whole(self, what: str) -> None:
        """Raise a TypeError that names ``what`` if this process holds parts only."""
        if self.sharded:
            raise TypeError(
                f"{what}: it needs whole parameters, and these are sharded; run it before "
                "fully_shard, on one process, or after DeepSpeed's engine.destroy()"
            )

    def sum(self, values: Tensor) -> Tensor:
        """Complete sums over the parameters: one all-reduce of ``values``, in place.

        Args:
            values: this process's part of the sums; the same shape everywhere.

        Returns:
            ``values``, the same bits on all ranks.
        """
        if self._size > 1:
            dist.all_reduce(values, group=self._group)
            values /= self.replicas
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set on some rank: one all-reduce of one number where parts differ."""
        if self._size == 1 or not self.sharded:
            return flag
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    def share(self, count: int) -> list[int]:
        """This process's share of ``count`` things: as many for every process, the last repeated.

        Equally many, as the forward passes of sharded models are run by all ranks together.
        """
        each = -(-count // self._size)
        return [min(self._rank * each + i, count - 1) for i in range(each)]

    def gather(self, values: Tensor, count: int) -> Tensor:
        """What all processes have found for their shares, in order; the same bits on all ranks.

        Args:
            values: one row for each thing of `share`.
            count: number of things.
        """
        if self._size == 1:
            return values
        found = values.new_empty((self._size * len(values), *values.shape[1:]))
        dist.all_gather(list(found.split(len(values))), values.contiguous(), group=self._group)
        return found[:count]


# One process, or processes that do not concern each other.
ALONE = Layout([])


def undivided(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """The module inside of ``DistributedDataParallel`` and its ranks; others are left as they are.

    Inside of ``DataParallel``, too: its copies on other devices would be hidden from hooks, and
    safety examples are too few to divide.

    Raises:
        TypeError: for wrappers that cannot be supported, naming the alternative.
    """
    wrapper = getattr(model, "_orig_mod", model)  # it may have been compiled after it was wrapped
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return wrapper.module, wrapper.process_group
    if isinstance(wrapper, nn.DataParallel):
        model = wrapper.module
    refuse_unsupported(model)
    return model, None


def refuse_unsupported(model: nn.Module) -> None:
    """Raise a TypeError for FullyShardedDataParallel and DeepSpeed's, naming the alternative."""
    flat = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if any(isinstance(module, flat) for module in model.modules()):
        raise TypeError(f"model: {FSDP1}")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise TypeError(f"model: {ZERO_3}")
    if isinstance(model, _loaded("deepspeed", "DeepSpeedEngine")):
        raise TypeError(f"model=DeepSpeedEngine: {ENGINE}")


FSDP1 = (
    "FullyShardedDataParallel (FSDP1) flattens parameters and cannot be protected; use "
    "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in Accelerate) instead"
)
ZERO_3 = (
    "DeepSpeed ZeRO 3 takes the parameters apart, which cannot be protected; use stage 1 or 2 with "
    "safeopt.integrations.deepspeed.protect, or torch.distributed.fsdp.fully_shard (FSDP2; "
    "fsdp_version: 2 in Accelerate)"
)
ENGINE = (
    "DeepSpeed needs the model itself in the probe (engine.module), an ordinary optimizer in "
    "deepspeed.initialize, and then safeopt.integrations.deepspeed.protect(engine, probe)"
)


def reshard(model: nn.Module) -> None:
    """Free the whole weights that passes of a model under ``fully_shard`` have left in place.

    Otherwise the next pass would not see what has been written to the parts since.
    """
    sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if sharded else ():
        if isinstance(module, sharded):
            module.reshard()


def sharded_gradients(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss that all ranks have computed on the same examples.

    ``torch.autograd.grad`` does not know the parts, so this is ``backward``: ``fully_shard``
    averages the equal gradients of all ranks and gives each its part. Gradients that were there
    before are lost.

    Args:
        loss: a scalar.
        params: parameters of a model under ``fully_shard``, or with masters: autograd knows the
            whole weights of these, and their gradients stay.
    """
    masters = [master_of(p) for p in params]
    if any(masters):
        whole = torch.autograd.grad(loss, list(params), allow_unused=True)
        pairs = zip(masters, whole, strict=True)
        return [m.range.cut(g) if m is not None and g is not None else g for m, g in pairs]
    for p in params:
        p.grad = None
    loss.backward()
    found = [p.grad for p in params]
    for p in params:
        p.grad = None
    return found


def _sharded_dim(p: Any) -> int:
    """The mesh dimension along which a DTensor is sharded."""
    dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    shard = _loaded("torch.distributed.tensor", "Shard")
    if len(dims) != 1 or type(p.placements[dims[0]]) is not shard:
        raise TypeError(
            f"params: a protected parameter has the placements {p.placements}; supported are those "
            "of fully_shard over data-parallel ranks (FSDP2 and HSDP), not tensor parallelism"
        )
    return dims[0]


def _part(p: Any, mesh: Any) -> Part:
    if p.device_mesh != mesh:
        raise TypeError(
            "params: the protected parameters are sharded over different device meshes; use one "
            "mesh for all of them"
        )
    mesh_dim = _sharded_dim(p)
    dim = p.placements[mesh_dim].dim
    size = p.shape[dim]
    chunk = -(-size // mesh.size(mesh_dim))  # as torch.chunk cuts
    start = min(mesh.get_local_rank(mesh_dim) * chunk, size)
    return Part(dim, start, min(chunk, size - start), size)


def _group_of(mesh: Any) -> dist.ProcessGroup:
    """All ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() != dist.get_world_size():
        raise TypeError(
            f"params: sharded over a {mesh.ndim}-dimensional mesh of {mesh.size()} of "
            f"{dist.get_world_size()} processes; such a mesh must hold all of them"
        )
    world = dist.group.WORLD
    assert world is not None
    return world
