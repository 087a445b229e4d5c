"""Two devices on a machine that has none: tensors in its memory that refuse to meet.

`elsewhere` moves a module to a device of a type that torch knows and this machine lacks; inside
`simulated` its tensors are computed with on the CPU, and an operation on tensors of different
devices raises an error, as it does on GPUs.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, FIRST, SECOND = (torch.device(name) for name in ("cpu", "xla:0", "xla:1"))
# What may read tensors of several devices; of indices only those on the CPU.
_MOVES = {"copy_", "_to_copy"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Placed(Tensor):
    """A tensor on the CPU that says that it lies elsewhere."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, place):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="cpu",
        )  # fmt: skip

    def __init__(self, held, place):
        self.held = held
        self.place = place

    @property
    def device(self):
        return self.place

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def on_cpu(x):
    """A tensor's numbers."""
    return x.held if isinstance(x, Placed) else x


def _placed(x, place):
    return Placed(x, place) if isinstance(x, Tensor) and place != CPU else x


def _same(function, places):
    if len(places) > 1:
        raise RuntimeError(f"{function}: tensors on {sorted(map(str, places))}")


def _run(function, args, kwargs):
    name = function._schema.name.removeprefix("aten::")
    held, named = tree_map(on_cpu, (args, kwargs))
    if name.startswith("_foreach_"):
        lists = [x for x in args if isinstance(x, (list, tuple)) and isinstance(x[0], Tensor)]
        for tensors in zip(*lists, strict=True):
            _same(function, {x.device for x in tensors})
        found = function(*held, **named)
        return found and [_placed(x, y.device) for x, y in zip(found, lists[0], strict=True)]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    numbers = [x for x in tensors if x.dim() == 0 and x.device == CPU]  # they may go anywhere
    places = [x.device for x in tensors if not any(x is y for y in numbers)] or [CPU]
    if name in _INDEXES:
        _same(function, {places[0], *places[1:]} - {CPU} | {places[0]})
    elif name not in _MOVES:
        _same(function, set(places))
    place = places[0]
    if kwargs.get("device") is not None:
        place, named["device"] = torch.device(kwargs["device"]), CPU
    found = function(*held, **named)
    if function._schema.is_mutable and name.endswith("_"):
        return args[0]
    return tree_map(lambda x: _placed(x, place), found)


class _Move(torch.autograd.Function):
    """Autograd would not see that the device is another one."""

    @staticmethod
    def forward(ctx, x, device, dtype):
        ctx.before = x.device, x.dtype
        return torch.ops.aten._to_copy(x, device=device, dtype=dtype)

    @staticmethod
    def backward(ctx, gradient):
        return moved(gradient, *ctx.before), None, None


def moved(x, device, dtype=None):
    """``x.to(device, dtype)``, also where autograd is to follow."""
    device, dtype = torch.device(device), dtype or x.dtype
    return x if (x.device, x.dtype) == (device, dtype) else _Move.apply(x, device, dtype)


class _Places(TorchFunctionMode):
    """Calls that torch answers by the device of the memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("to", "cpu") and isinstance(args[0], Tensor):
            device, dtype = args[0].device if name == "to" else CPU, args[0].dtype
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, Tensor):
                    device, dtype = value.device, value.dtype
                elif isinstance(value, (str, torch.device)):
                    device = torch.device(value)
                elif isinstance(value, torch.dtype):
                    dtype = value
            return moved(args[0], device, dtype)
        if name == "new_tensor":
            return moved(function(*args, **kwargs), args[0].device)
        if name == "tensor" and kwargs.get("device") is not None:
            return moved(function(*args, **{**kwargs, "device": CPU}), kwargs["device"])
        return function(*args, **kwargs)


class _Run(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextmanager
def simulated():
    """Tensors can be made and moved anywhere inside."""
    with ExitStack() as stack:
        stack.enter_context(_Places())
        stack.enter_context(_Run())
        yield


def elsewhere(module: nn.Module, device: torch.device) -> nn.Module:
    """Put new parameters, on a device, in the place of a module's own."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                there = nn.Parameter(_placed(p.detach().clone(), device), p.requires_grad)
                part._parameters[name] = there
    return module
