"""What protection will cost, from a model's configuration alone.

The model is built on the meta device: shapes without weights. From them follow the bytes of
parameters, gradients, AdamW's state and each kind of basis, and, with a few stated assumptions, the
work of a refresh and of a step in units of a training step. One token costs one multiplication for
each weight of a matrix in the forward pass and two in the backward pass, one of them for the
weight's own gradient, which a frozen weight has not: a training step on T tokens costs 3·T units,
with adapters 2·T. Attention's own products are left out on both sides.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeopt.curvature.bases.compressed import SMALL
from safeopt.curvature.bases.tucker import STORED
from safeopt.curvature.refresh import RefreshPolicy
from safeopt.finetuning.adapter import default_lora
from safeopt.losses import forward_arguments
from safeopt.models import cause_of
from safeopt.optim.config import SafetyConfig
from safeopt.optim.examples import held_beside
from safeopt.probe import OPENING

logger = logging.getLogger("safeopt")

# What an adapter's gradients, moments and bases are kept in, and bases of half-precision models,
# but for the compressed ones' matrices.
_FLOAT32 = 4
_ARCHITECTURES = files("safeopt") / "architectures"


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; all of it is printed with the figures.

    Args:
        tokens_per_step: tokens of one training step, over all devices.
        tokens_per_example: tokens of a safety prompt with its refusal's opening.
        response_tokens: those of them that are the opening.
        examples: safety and held examples of one refresh.
        window: examples that span the subspace.
        interval: steps between two refreshes once the first ones are over.
        side_rank: r of the compressed basis. It is really chosen by energy: on SmolLM2-135M 32
            directions take half of what 128 says after one look, a sixth more during training.
    """

    tokens_per_step: int = 16384
    tokens_per_example: int = 64
    response_tokens: int = OPENING
    examples: int = SafetyConfig.examples + held_beside(SafetyConfig.examples)
    window: int = SafetyConfig.window
    interval: int = RefreshPolicy.every
    side_rank: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}={value!r}: expected a whole number, at least 1")


@dataclass(frozen=True)
class BasisPlan:
    """One kind of basis.

    Attributes:
        nbytes: on each device. Sharded parameters know the dense kind only: over several devices
            the others stand whole, as they do where parameters are whole, under DDP.
        step_share: its work at each step, as a share of the training step's: the coordinates of
            the gradient and of the parameters, and the step back.
    """

    nbytes: int
    step_share: float


@dataclass(frozen=True)
class Plan:
    """What a protected run takes. Bytes are those of one device.

    Attributes:
        model: its name.
        parameters: of the whole model.
        trained: of them, or of the adapter, those that are trained and protected.
        rank: directions k.
        lora: rank of the adapter; None where all parameters are trained.
        world_size: devices.
        dtype: of the model's parameters.
        quantised: whether the configuration is of quantised weights; they are counted as if not.
        parameter_bytes: the model's and the adapter's parameters.
        gradient_bytes: gradients of the trained ones.
        optimizer_bytes: AdamW's two moments.
        bases: each kind of basis.
        pull_bytes: of the pull to the aligned model, which a dense or int8 basis has beside it;
            over several devices that of the dense one.
        refresh_passes: forward and backward passes of one refresh.
        refresh_tokens: tokens that go through them.
        refresh_share: their share of the training time, in the long run; the linear algebra of
            the new basis comes on top.
        assumptions: behind the figures.
    """

    model: str
    parameters: int
    trained: int
    rank: int
    lora: int | None
    world_size: int
    dtype: str
    quantised: bool
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    bases: dict[str, BasisPlan]
    pull_bytes: int
    refresh_passes: int
    refresh_tokens: int
    refresh_share: float
    assumptions: Assumptions


def architectures() -> list[str]:
    """Names of the built-in architectures."""
    names = (entry.name for entry in _ARCHITECTURES.iterdir())
    return sorted(name[: -len(".json")] for name in names if name.endswith(".json"))


def plan(
    model: str,
    rank: int = SafetyConfig.rank,
    *,
    lora: int | None = 8,
    world_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    assumptions: Assumptions | None = None,
) -> Plan:
    """Work out what a protected run takes; no weight is loaded.

    Args:
        model: one of `architectures`, a ``config.json`` or its folder, or a hub name, of which only
            the configuration is fetched.
        rank: directions of the safety subspace, at least 1.
        lora: rank of an adapter where PEFT puts it by default, kept in float32; None trains all
            parameters.
        world_size: devices over which parameters, gradients, moments, the pull and a dense basis
            are sharded (FSDP2). The other kinds of basis are refused there, see `BasisPlan`.
        dtype: of parameters and, without an adapter, their gradients and moments.
        assumptions: see `Assumptions`.

    Raises:
        ValueError: if ``model`` is not found or is no causal language model, or a number is out of
            its range.
    """
    assumed = Assumptions() if assumptions is None else assumptions
    for name, value in (("rank", rank), ("lora", lora), ("world_size", world_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    config = load_config(model)
    network = meta_model(config, model)
    total = sum(p.numel() for p in network.parameters())
    layers = _linear_layers(network)
    if lora is None:
        plain = {name: entry for name, entry in layers.items() if _is_factored(entry[0])}
        whole_ids = _kept_whole(network, {layer for layer, _ in plain.values()})
        shapes = [p.shape for p in network.parameters()]
        whole = [id(p) in whole_ids for p in network.parameters()]
        trained_layers = _sites(plain, assumed, set())
        size, own = dtype.itemsize, 0
    else:
        adapters = _adapters(network, lora, model)
        shapes = [shape for _, shape in adapters]
        whole = [name not in layers for name, _ in adapters]
        trained_layers = _sites(layers, assumed, {name for name, _ in adapters}, lora)
        size, own = _FLOAT32, _FLOAT32 * sum(s.numel() for s in shapes)
    trained = sum(shape.numel() for shape in shapes)
    share = 1 / ((3 if lora is None else 2) * assumed.tokens_per_step * total)
    direct = rank * trained
    compressed, work = _compressed(shapes, whole, rank, assumed.side_rank)
    factored, passes = trained_layers
    rows = assumed.window * sum(s.numel() for s, kept in zip(shapes, whole, strict=True) if kept)
    bases = {
        "dense": BasisPlan(_FLOAT32 * direct // world_size, 3 * direct * share),
        "int8": BasisPlan(direct * 17 // 16, 3 * direct * share),
        "factored": BasisPlan(
            factored * dtype.itemsize + _FLOAT32 * rows, 3 * (passes + rows) * share
        ),
        "compressed": BasisPlan(compressed, 3 * work * share),
    }
    tokens = assumed.examples * assumed.tokens_per_example
    return Plan(
        model=model,
        parameters=total,
        trained=trained,
        rank=rank,
        lora=lora,
        world_size=world_size,
        dtype=str(dtype).removeprefix("torch."),
        quantised=getattr(config, "quantization_config", None) is not None,
        parameter_bytes=(total * dtype.itemsize + own) // world_size,
        gradient_bytes=trained * size // world_size,
        optimizer_bytes=2 * trained * size // world_size,
        bases=bases,
        pull_bytes=3 * _FLOAT32 * trained // world_size,
        refresh_passes=2,
        refresh_tokens=tokens,
        refresh_share=tokens / (tokens + assumed.interval * assumed.tokens_per_step),
        assumptions=assumed,
    )


def load_config(model: str) -> Any:
    """The configuration that a name, a file or a folder stands for.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoConfig

    path = Path(model)
    built_in = _ARCHITECTURES / f"{model}.json"
    try:
        if model in architectures():
            return AutoConfig.for_model(**json.loads(built_in.read_text("utf-8")))
        if path.is_file():
            return AutoConfig.for_model(**json.loads(path.read_text("utf-8")))
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # a configuration that is wrong can end in any of them
        raise ValueError(
            f"model={model}: expected one of {', '.join(architectures())}, a config.json, its "
            f"folder or a hub name ({cause_of(error)})"
        ) from error


def meta_model(config: Any, name: str) -> nn.Module:
    """The model of a configuration without its weights.

    Raises:
        ValueError: if it is no causal language model, or the configuration is wrong.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            network: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a configuration that is wrong can end in any of them
        raise ValueError(f"model={name}: {cause_of(error)}") from error
    return network.eval()


def _is_factored(layer: nn.Module) -> bool:
    """Whether `safeopt.per_example` knows a layer's gradient as a product of two factors.

    Others, such as GPT-2's and Falcon's own linear layers, keep a gradient for each example, and so
    do those that `_linear_layers` leaves out.
    """
    return type(layer).forward in (nn.Linear.forward, nn.Embedding.forward)


def _kept_whole(network: nn.Module, factored: set[Any]) -> set[int]:
    """Identities of the parameters whose gradients are kept for each example, not as factors."""
    factored = factored | {x for x in network.modules() if type(x).forward is nn.Embedding.forward}
    owned = [(x, name, p) for x in network.modules() for name, p in x.named_parameters("", False)]
    return {id(p) for x, name, p in owned if not (x in factored and name == "weight")}


def _sides(layer: Any) -> tuple[int, int]:
    """d_in and d_out of a linear layer; GPT-2's is transposed."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _linear_layers(network: nn.Module) -> dict[str, tuple[Any, int]]:
    """Linear layers by name, each with a number that layers with the same input share.

    Those that are given the tokens of all examples in one row, as OPT's, are left out: see
    `safeopt.per_example`. Where the model does not run without weights, each layer counts as one
    with its own input.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    names = {x: name for name, x in network.named_modules() if isinstance(x, kinds)}
    found: dict[str, tuple[Any, int]]
    found = {name: (layer, -number) for number, (layer, name) in enumerate(names.items(), start=1)}
    inputs: list[torch.Tensor] = []  # kept, so that no two of them have the same identity
    flattened: set[str] = set()

    def note(layer: Any, args: Any) -> None:
        inputs.append(args[0])
        found[names[layer]] = (layer, id(args[0]))
        if args[0].dim() < 3:
            flattened.add(names[layer])

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # A mask that is ready: to make one, transformers looks at values, which a meta tensor lacks.
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, device="meta")
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in forward_arguments(network):  # OPT would count them from a plain mask
        arguments["position_ids"] = ids
    network.to(torch.bfloat16)  # experts' products know no other dtype on the meta device
    try:
        with torch.no_grad():
            network(**arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        logger.info("the model does not run on the meta device: %s", error)
    finally:
        for handle in handles:
            handle.remove()
    return {name: entry for name, entry in found.items() if name not in flattened}


def _adapters(network: nn.Module, rank: int, name: str) -> list[tuple[str, torch.Size]]:
    """The matrices of the default adapter, each with the module that it is put on.

    PEFT puts it there: only it knows where, above all in mixtures of experts.

    Raises:
        ValueError: if it finds no place.
    """
    from peft import get_peft_model

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model: Any = get_peft_model(network, default_lora(network, rank, rank))
    except ValueError as error:
        raise ValueError(f"model={name}: {cause_of(error)}") from error
    trained = [
        (key, p.shape) for key, p in model.get_base_model().named_parameters() if p.requires_grad
    ]
    return [(key.split(".lora_")[0], shape) for key, shape in trained]


def _sites(
    layers: dict[str, tuple[Any, int]],
    assumed: Assumptions,
    targets: set[str],
    lora: int | None = None,
) -> tuple[int, int]:
    """Numbers that the factored basis keeps, and its multiplications for one pass."""
    tokens = assumed.window * assumed.tokens_per_example
    responses = assumed.window * assumed.response_tokens
    seen: set[int] = set()
    numbers = work = 0
    for name, (layer, source) in layers.items():
        if lora is not None and name not in targets:
            continue
        count = responses if name.endswith("lm_head") else tokens
        a, b = _sides(layer)
        numbers += 0 if source in seen else count * a
        seen.add(source)
        if lora is None:
            numbers, work = numbers + count * b, work + count * a * b
        else:  # the adapter's first factor writes r numbers and its second one reads them
            numbers, work = numbers + count * (2 * lora + b), work + count * lora * (a + b)
        if lora is None and name.endswith("lm_head"):
            numbers += tokens * a  # the embedding: a gradient for each token read
    return numbers, work


def _compressed(
    shapes: list[torch.Size], whole: list[bool], rank: int, side: int
) -> tuple[int, int]:
    """Bytes that the compressed basis takes, and its multiplications for one pass."""
    nbytes, work = 8 * rank * rank, 0  # W is float64
    for shape, kept_whole in zip(shapes, whole, strict=True):
        if not kept_whole and min(shape) > SMALL:
            r_b, r_a = (min(side, size) for size in shape)
            numbers = r_b * shape[0] + r_a * shape[1] + rank * r_b * r_a
            nbytes += STORED.itemsize * numbers
            work += min(r_b, r_a) * shape.numel() + r_b * r_a * (min(shape) + rank)
        else:
            nbytes += _FLOAT32 * rank * shape.numel()
            work += rank * shape.numel()
    return nbytes, work
