"""Protection for a Hugging Face Trainer that exists already, and for TRL's trainers.

Two lines protect a script; `protect` finds the model, the tokenizer and the optimizer in it::

    trainer = SFTTrainer(...)                    # as before
    protect(trainer, "harmful_prompts.jsonl")
    trainer.train()

`optimizer_cls_and_kwargs` gives Trainer's argument of that name where the probe is made by hand,
`SafetyTrainerMixin` makes `SafetySAM`'s second pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from safeopt.integrations.versions import require

require("transformers", "accelerate")

from transformers import Trainer, TrainingArguments

from safeopt.distributed import FSDP1, ZERO_3
from safeopt.integrations.bitsandbytes import keep_trainable
from safeopt.integrations.transformers import SafetyCallback, SafetyLog, install, unwrapped
from safeopt.losses import Batch, refusal_nll
from safeopt.optim import PreconditionedSGD, SafetySAM, optimizers, safeguard
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.portable import in_process_group
from safeopt.optim.safeguard import config_of
from safeopt.probe import OPENING, SafetyProbe
from safeopt.safety_examples import alignment_loss, check_likely, read_safety_batches, unlikely

logger = logging.getLogger("safeopt")


def protect(
    trainer: Trainer,
    safety: SafetyProbe | str | Path,
    *,
    harmless: str | Path | None = None,
    loss: Literal["nll", "kl"] = "nll",
    optimizer: str | None = None,
    **options: Any,
) -> SafetyCallback:
    """Protect a Trainer that has not trained yet.

    Args:
        trainer: a Trainer, TRL's SFTTrainer or DPOTrainer, or another that derives from it. The
            optimizer that it was given, or would create from its arguments, is protected. Layers
            of a 4-bit base are kept trainable, see `safeopt.integrations.bitsandbytes`.
        safety: JSON lines with harmful prompts (where a line has no response, the model's own
            refusal is taken; of each refusal the first four tokens are protected), or a probe whose
            model is the trainer's; where the model would not say a probe's refusals, a warning is
            logged.
        harmless: JSON lines with prompts that must not become refused; with a file only.
        loss: see `SafetyProbe`; with a file only. The reference of ``"kl"`` is the model as it is
            now or, with adapters, what `safeopt.integrations.peft` chooses.
        optimizer: a name from `safeopt.optimizers` to take the place of the trainer's optimizer.
        **options: of that optimizer, otherwise of `safeopt.safeguard`: ``rank``, ``budget``, ….

    Returns:
        The callback, which restores alignment before checkpoints and at the end.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: if the version of TRL or bitsandbytes is too old.
        TypeError: if ``mode="two_pass"`` is asked of a trainer without `SafetyTrainerMixin`, an
            option is unknown, the model has adapters that cannot be protected, or the trainer
            shards with DeepSpeed ZeRO 3 or FSDP1.
        ValueError: if a file is malformed, there is nothing to protect (the model does not refuse,
            or would not say the file's responses), or ``optimizer`` is given although the trainer
            has an optimizer or DeepSpeed; if a file is given, but the weights come with training
            only (``cpu_ram_efficient_loading``); if the trainer is protected already or has a
            ``model_init``, or an option is out of its range; see also `optimizer_cls_and_kwargs`.

    Cost: an answer of 32 tokens for each prompt that has no response, and one forward pass on at
    most 32 examples; then as `ProjectedAdamW`.
    """
    has_weights = _has_weights(trainer)
    if any(type(callback) is SafetyLog for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "trainer: it is protected already; call protect once, and make a new Trainer for other "
            "prompts or options"
        )
    if getattr(trainer, "model_init", None) is not None:
        raise ValueError(
            "model_init: train() makes the model anew, and the one that is looked at now would not "
            "be trained; give the Trainer a model"
        )
    if any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__):
        require("trl")
    if keep_trainable(trainer.model):  # type: ignore[arg-type]
        require("bitsandbytes")
    if _has_adapters(trainer.model):
        from safeopt.integrations.peft import check_adapters

        check_adapters(trainer.model)  # type: ignore[arg-type]
    if not isinstance(safety, SafetyProbe):
        if not has_weights:
            raise ValueError(
                "safety: with cpu_ram_efficient_loading all processes but the first have no "
                "weights before training, and the model cannot be looked at; set it to false in "
                "fsdp_config, or give a SafetyProbe"
            )
        probe = read_probe(
            trainer.model,
            trainer.processing_class,
            safety,
            harmless,
            loss,
            opening=OPENING if loss == "nll" else None,
        )
    elif harmless is not None or loss != "nll":
        raise ValueError("harmless, loss: a probe was given, which has its own; leave them out")
    else:
        probe = safety
        if has_weights and probe.loss is refusal_nll:
            found = unlikely(alignment_loss(probe), "the probe")
            if found is not None:
                logger.warning(found)
    if options.get("mode") == "two_pass" and not isinstance(trainer, SafetyTrainerMixin):
        raise TypeError(
            f'mode="two_pass": {type(trainer).__name__} makes one pass a step; derive it from '
            'SafetyTrainerMixin, or use mode="lookahead"'
        )
    if trainer.is_deepspeed_enabled:
        if optimizer is not None:
            raise ValueError(
                f'optimizer="{optimizer}": DeepSpeed steps on vectors of its own; leave it out, '
                "and the optimizer of the arguments or of DeepSpeed's configuration is protected"
            )
        _protect_engine(trainer, probe, options)
        return install(trainer)
    given = trainer.optimizer
    if given is not None:
        if optimizer is not None:
            raise ValueError(
                f'optimizer="{optimizer}": the trainer has {type(given).__name__} already; leave '
                "one of them out"
            )
        safeguard(given, probe, **options)
    elif optimizer is None and trainer.optimizer_cls_and_kwargs is not None:
        build, arguments = trainer.optimizer_cls_and_kwargs
        trainer.optimizer_cls_and_kwargs = (_guarded(build, probe, options), arguments)
    else:
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs(
            trainer.args, probe, optimizer, model=trainer.model, **options
        )
    if trainer.args.world_size > 1 and in_process_group() and not trainer.is_fsdp_enabled:
        probe.divide(dist.group.WORLD)  # Trainer wraps the model later
    return install(trainer)


def optimizer_cls_and_kwargs(
    args: TrainingArguments,
    probe: SafetyProbe,
    optimizer: str | None = None,
    *,
    model: Any = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """The value of Trainer's argument of this name: a protected optimizer by training arguments.

    Args:
        args: learning rate, betas, epsilon and weight decay are taken from here.
        probe: the safety examples.
        optimizer: a name from `safeopt.optimizers`; by default ``args.optim``, safeguarded.
        model: for optimizers of ``args.optim`` that look at the model (GaLore, APOLLO, …).
        **options: of the optimizer, or of `safeopt.safeguard`.

    Returns:
        What builds the optimizer from groups of parameters, and its keyword arguments.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if ``optimizer`` is unknown, ``args.optim`` steps inside the backward pass (LOMO
            and the layer-wise ones), or an option is out of its range.
    """
    if optimizer is None:
        name = getattr(args.optim, "value", args.optim)
        if "lomo" in name or "layerwise" in name:
            raise ValueError(
                f'optim="{name}": it moves the parameters inside the backward pass, where they '
                "cannot be protected; use another one"
            )
        build, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return _guarded(build, probe, options), arguments
    known = optimizers()
    if optimizer not in known:
        raise ValueError(f'optimizer="{optimizer}": expected one of {", ".join(known)}')
    cls = known[optimizer].cls
    chosen: dict[str, Any] = {"lr": args.learning_rate, "probe": probe}
    if not issubclass(cls, PreconditionedSGD):
        chosen |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    arguments = chosen | options
    cls([nn.Parameter(torch.zeros(1))], **arguments)  # wrong options are told now, not in train()
    return cls, arguments


class SafetyTrainerMixin:
    """Makes the second pass of ``SafetySAM(mode="two_pass")`` in any Trainer.

    Put it before the trainer's class; with other optimizers it changes nothing::

        class SafetySFTTrainer(SafetyTrainerMixin, SFTTrainer):
            pass

    The micro-batches of a step are kept on their device until the last one, then run again at
    θ + ε. Gradients are clipped after that; ε depends on their direction only. What a trainer logs
    during a pass (TRL's token accuracy) averages both passes; the loss is that of the first.

    Cost: twice the passes, and the memory of the step's micro-batches.
    """

    _micro_batches: list[dict[str, Any]]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what an interrupted step has left behind is forgotten."""
        self._micro_batches = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run a micro-batch and, where it is the step's last, all of them again at θ + ε."""
        run: Callable[..., Tensor] = super().training_step  # type: ignore[misc]
        optimizer = unwrapped(getattr(self, "optimizer", None))
        if not (isinstance(optimizer, SafetySAM) and optimizer.mode == "two_pass"):
            return run(model, inputs, *args)
        kept = self._micro_batches
        kept.append(dict(inputs))  # some trainers take entries out
        try:
            loss = run(model, inputs, *args)
            accelerator = self.accelerator  # type: ignore[attr-defined]
            if accelerator.sync_gradients:
                with optimizer.second_pass():
                    for index, batch in enumerate(kept):
                        last = index == len(kept) - 1
                        with nullcontext() if last else accelerator.no_sync(model):
                            run(model, batch, *args)
                kept.clear()
        except BaseException:
            kept.clear()  # auto_find_batch_size begins again with smaller ones
            raise
        return loss


def _has_weights(trainer: Any) -> bool:
    """Whether every process has the model's weights before training.

    Raises:
        TypeError: if the trainer shards in a way that cannot be protected.
    """
    if trainer.is_deepspeed_enabled:
        if trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise TypeError(f"trainer: {ZERO_3}")
        return True
    if not trainer.is_fsdp_enabled:
        return True
    plugin = trainer.accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) == 1:
        raise TypeError(f"trainer: {FSDP1}")
    return not plugin.cpu_ram_efficient_loading


def _protect_engine(trainer: Any, probe: SafetyProbe, options: Mapping[str, Any]) -> None:
    """Protect the DeepSpeed engine that ``train()`` will make, before it loads a checkpoint."""
    from safeopt.integrations import deepspeed

    _check_options(options)
    prepare = trainer.accelerator.prepare
    before: list[SafetyGeometry] = []

    def prepare_and_protect(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        for each in prepared if isinstance(prepared, tuple) else (prepared,):
            if hasattr(each, "zero_optimization_stage"):
                optimizer = deepspeed.protect(each, probe, **options)
                if before:  # auto_find_batch_size begins again, with a model that was trained
                    optimizer.continue_from(before.pop())
                before.append(optimizer.safety)
        return prepared

    trainer.accelerator.prepare = prepare_and_protect


def read_probe(
    model: Any,
    tokenizer: Any,
    safety: str | Path,
    harmless: str | Path | None = None,
    loss: Literal["nll", "kl"] = "nll",
    *,
    opening: int | None = None,
) -> SafetyProbe:
    """The probe that a file describes, of an aligned model that may have adapters.

    Args:
        model: the model that is trained; it is the reference as it is now, see `protect`.
        tokenizer: its tokenizer.
        safety: see `protect`.
        harmless: see `protect`.
        loss: see `protect`.
        opening: see `SafetyProbe`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there is no tokenizer, a file is malformed, or there is nothing to protect.
    """
    need_tokenizer(tokenizer)
    batches, held = read_safety_batches(model, tokenizer, safety, harmless)
    check_likely(build_probe(model, batches, held), str(safety))
    return build_probe(model, batches, held, loss, opening)


def need_tokenizer(tokenizer: Any) -> None:
    """Raise a ValueError if a trainer has no tokenizer to read prompts with."""
    if tokenizer is None:
        raise ValueError(
            "processing_class: the trainer has no tokenizer to read the prompts with; give it "
            "processing_class=tokenizer, or give a SafetyProbe"
        )
    if not hasattr(tokenizer, "get_chat_template"):  # a processor of texts and images
        raise ValueError(
            f"processing_class={type(tokenizer).__name__}: it is no tokenizer, with which the "
            "prompts could be read; give a SafetyProbe with safety_batches(tokenizer, ...)"
        )


def build_probe(
    model: Any,
    batches: Sequence[Batch],
    held: Sequence[Batch] = (),
    loss: Literal["nll", "kl"] = "nll",
    opening: int | None = None,
) -> SafetyProbe:
    """The probe of a model that may have adapters."""
    if _has_adapters(model):
        from safeopt.integrations.peft import safety_probe

        return safety_probe(model, batches, held=held, loss=loss, opening=opening)
    probe = SafetyProbe(model, batches, held=held, loss=loss, opening=opening)
    if loss == "kl":
        probe.value([0])  # the first use keeps the reference: before a checkpoint is loaded
    return probe


def _has_adapters(model: Any) -> bool:
    """Whether it is a PEFT model; peft need not be installed."""
    return any(cls.__name__ == "PeftModel" for cls in type(model).__mro__)


def _guarded(build: Any, probe: SafetyProbe, options: dict[str, Any]) -> Any:
    """What builds the same optimizer, safeguarded, and looks like ``build`` to Trainer.

    Trainer tells optimizer classes from factories, which are called twice: with nothing, and then
    with the model.
    """
    _check_options(options)
    if not isinstance(build, type):

        def factory() -> Callable[..., Optimizer]:
            inner = build()
            return lambda model, **kwargs: safeguard(inner(model, **kwargs), probe, **options)

        return factory

    class Guarded(build):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # An instance of ``build`` itself, so that copies and pickles find its class.
            return safeguard(build(*args, **kwargs), probe, **options)

    Guarded.__name__, Guarded.__module__ = build.__name__, build.__module__
    return Guarded


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `safeopt.safeguard` before the optimizer is built, in ``train()``."""
    config_of({name: value for name, value in options.items() if name != "on_refresh_error"})
