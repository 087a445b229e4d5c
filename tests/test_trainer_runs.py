"""Whole runs with Trainer: `protect`, its optimizers, resuming, and what users switch on."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documents import HARMFUL, HARMLESS, REFUSAL, aligned_llama, write_files
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_tokenizer, trainable, with_lora
from transformers import Trainer, TrainerCallback, TrainingArguments

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM
from safeopt.data import safety_batches
from safeopt.integrations.trainer import SafetyTrainerMixin, optimizer_cls_and_kwargs, protect
from safeopt.integrations.transformers import SafetyCallback, safety_of, unwrapped


class SafetyTrainer(SafetyTrainerMixin, Trainer):
    pass


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 3)) % 30 + 4
        return {"input_ids": ids, "labels": ids.clone()}


def tiny_probe(model, **options):
    return SafetyProbe(
        model, safety_batches(tiny_tokenizer(), HARMFUL, [REFUSAL] * len(HARMFUL)), **options
    )


def build(folder, cls=SafetyTrainer, *, model=None, callbacks=(), protected=None, **options):
    """An unprotected Trainer of four optimizer steps."""
    choices = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],  # older versions do not find them behind PEFT
    }
    return cls(
        model=with_lora(tiny_llama()) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **(choices | options)),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        **(protected or {}),
    )


def guarded(folder, optimizer=None, *, options=(), **choices):
    """A protected Trainer."""
    trainer = build(folder, **choices)
    protect(trainer, tiny_probe(trainer.model), optimizer=optimizer, rank=4, **dict(options))
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainable(trainer.model)]


def base_optimizer(trainer):
    return unwrapped(trainer.optimizer)


@pytest.fixture
def files(tmp_path):
    write_files(tmp_path)
    return tmp_path


def aligned():
    return with_lora(aligned_llama(), random_b=False)


def test_protect_reads_files_and_keeps_trainers_optimizer(files):
    trainer = build(files / "out", model=aligned())
    callback = protect(trainer, files / "prompts.jsonl", harmless=files / "harmless.jsonl", rank=4)
    trainer.train()
    optimizer = base_optimizer(trainer)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert len(safety_of(optimizer).probe) == len(HARMFUL)
    assert safety_of(optimizer).probe.held_count == len(HARMLESS)
    assert safety_of(optimizer).probe.opening == 4
    assert callback.last.step == 4
    assert "alignment_loss" in trainer.state.log_history[0]
    assert optimizer.param_groups[0]["lr"] < 1e-2, "the scheduler acts on the same optimizer"


@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_refusals_that_the_model_would_not_say_are_refused(files, loss):
    (files / "other.jsonl").write_text('{"prompt": "w4 w5 w6", "response": "w39 w4 w17"}\n' * 9)
    trainer = build(files / "out", model=aligned())
    with pytest.raises(ValueError, match=r"other\.jsonl are unlikely under the model"):
        protect(trainer, files / "other.jsonl", loss=loss)
    assert trainer.optimizer_cls_and_kwargs is None, "the trainer is as it was"


def test_a_probe_that_the_model_would_not_follow_is_told(tmp_path, caplog):
    for model, told in ((with_lora(tiny_llama()), True), (aligned(), False)):
        caplog.clear()
        protect(build(tmp_path, model=model), tiny_probe(model))
        found = [r.getMessage() for r in caplog.records if r.name == "safeopt"]
        assert any("the responses in the probe are unlikely" in text for text in found) == told


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"zero_stage": 3}, "trainer: DeepSpeed ZeRO 3 takes the parameters apart"),
        ({"fsdp_version": 1}, r"trainer: FullyShardedDataParallel \(FSDP1\) flattens parameters"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "safety: with cpu_ram_efficient"),
    ],
)
def test_sharding_that_cannot_be_protected_is_refused_at_once(files, plugin, message):
    trainer = build(files / "out", model=aligned())
    trainer.is_deepspeed_enabled = "zero_stage" in plugin
    trainer.is_fsdp_enabled = not trainer.is_deepspeed_enabled
    kind = "deepspeed_plugin" if trainer.is_deepspeed_enabled else "fsdp_plugin"
    state = SimpleNamespace(**{kind: SimpleNamespace(**plugin)})
    trainer.accelerator = SimpleNamespace(state=state)
    with pytest.raises((TypeError, ValueError), match=message):
        protect(trainer, files / "prompts.jsonl")
    assert trainer.optimizer_cls_and_kwargs is None, "the trainer is as it was"


@pytest.mark.parametrize("name", ["projected-adamw", "safety-sam", "preconditioned-sgd"])
def test_each_optimizer_takes_the_training_arguments(tmp_path, name):
    choices = {"weight_decay": 0.1, "adam_beta1": 0.8, "lr_scheduler_type": "constant"}
    trainer = guarded(tmp_path, name, **choices)
    trainer.train()
    group = base_optimizer(trainer).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.1)
    if name != "preconditioned-sgd":
        assert group["betas"][0] == 0.8
    assert safety_of(base_optimizer(trainer)).step_count == 4


def test_a_given_optimizer_and_given_class_are_protected(tmp_path):
    model = with_lora(tiny_llama())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    first = build(tmp_path, model=model, protected={"optimizers": (optimizer, None)})
    protect(first, tiny_probe(model), rank=4)
    assert safety_of(optimizer).config.rank == 4
    second = build(tmp_path, protected={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})})
    protect(second, tiny_probe(second.model), rank=4)
    second.train()
    assert type(base_optimizer(second)) is torch.optim.SGD
    assert safety_of(base_optimizer(second)).step_count == 4


def test_the_factory_fits_trainers_own_argument(tmp_path):
    model = with_lora(tiny_llama())
    args = TrainingArguments(str(tmp_path), learning_rate=3e-3)
    pair = optimizer_cls_and_kwargs(args, tiny_probe(model), "projected-adamw", rank=4)
    trainer = build(
        tmp_path,
        model=model,
        protected={"optimizer_cls_and_kwargs": pair},
        callbacks=[SafetyCallback()],
    )
    trainer.train()
    assert type(base_optimizer(trainer)) is ProjectedAdamW


def test_a_factory_of_transformers_is_protected_as_well(tmp_path):
    pytest.importorskip("transformers.trainer_optimizer", reason="transformers 4 has no factories")

    def factory():
        return lambda model, lr: torch.optim.SGD(trainable(model), lr=lr)

    trainer = build(tmp_path, protected={"optimizer_cls_and_kwargs": (factory, {"lr": 0.1})})
    protect(trainer, tiny_probe(trainer.model), rank=3)
    trainer.train()
    assert safety_of(base_optimizer(trainer)).config.rank == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, 'optimizer="adam": expected one of projected-adamw'),
        ({"harmless": "x.jsonl"}, "harmless, loss: a probe was given"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match=message):
        protect(trainer, tiny_probe(trainer.model), **options)
    assert trainer.optimizer_cls_and_kwargs is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nrak": 3}, TypeError, "options: nrak is unknown"),
        ({"optimizer": "projected-adamw", "nrak": 3}, TypeError, "nrak"),
        ({"optimizer": "safety-sam", "rho": -1}, ValueError, "rho=-1"),
        ({"rank": 0}, ValueError, "rank=0"),
    ],
)
def test_wrong_options_are_told_before_training(tmp_path, options, error, message):
    trainer = build(tmp_path)
    with pytest.raises(error, match=message):
        protect(trainer, tiny_probe(trainer.model), **options)
    assert trainer.optimizer_cls_and_kwargs is None


@pytest.mark.parametrize("again", [{}, {"optimizer": "safety-sam"}], ids=["same", "another"])
def test_a_second_protection_is_refused_and_leaves_the_first(tmp_path, again):
    """As in a notebook's cell that is run twice: told at once, and the run still starts."""
    trainer = guarded(tmp_path, "projected-adamw")
    with pytest.raises(ValueError, match="trainer: it is protected already; call protect once"):
        protect(trainer, tiny_probe(trainer.model), **again)
    trainer.train()
    assert isinstance(base_optimizer(trainer), ProjectedAdamW)
    assert safety_of(base_optimizer(trainer)).step_count == 4


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass_are_refused(tmp_path, name):
    """Their gradients are gone when their step is called: every step would seem to move nothing."""
    trainer = build(tmp_path, optim=name)
    with pytest.raises(ValueError, match=f'optim="{name}": it moves the parameters inside'):
        protect(trainer, tiny_probe(trainer.model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "processing_class: the trainer has no tokenizer"),
        (SimpleNamespace(tokenizer=tiny_tokenizer()), "processing_class=SimpleNamespace: it is no"),
    ],
    ids=["none", "processor"],
)
def test_prompts_are_not_read_without_a_tokenizer(files, given, message):
    trainer = build(files / "out", model=aligned())
    trainer.processing_class = given
    with pytest.raises(ValueError, match=message):
        protect(trainer, files / "prompts.jsonl")


def test_several_devices_of_one_process(tmp_path):
    """Trainer wraps the model in `DataParallel` by itself; on a CPU that runs the model inside.

    It also divides the loss by the devices' number, as if all had a part: Adam hardly notices.
    """
    measured = []
    for devices in (1, 2):
        trainer = guarded(
            tmp_path,
            "safety-sam",
            options={"mode": "two_pass", "rho": 0.1},
            per_device_train_batch_size=4 // devices,
        )
        if devices > 1:
            trainer.args._n_gpu = devices
            trainer._train_batch_size = trainer.args.train_batch_size
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.DataParallel) == (devices > 1)
        measured.append([x.alignment_loss for x in safety_of(base_optimizer(trainer)).history])
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)
    assert len(measured[0]) > 2


def test_a_model_that_training_makes_anew_is_refused(tmp_path):
    trainer = build(tmp_path)
    trainer.model_init = lambda: with_lora(tiny_llama())
    with pytest.raises(ValueError, match="model_init: train\\(\\) makes the model anew"):
        protect(trainer, tiny_probe(trainer.model))


def test_two_passes_need_the_mixin(tmp_path):
    trainer = build(tmp_path, Trainer)
    with pytest.raises(TypeError, match="derive it from SafetyTrainerMixin"):
        protect(trainer, tiny_probe(trainer.model), optimizer="safety-sam", mode="two_pass")


class Count:
    """Counts a model's forward passes in training."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, model, args):
        self.count += model.training


def test_two_passes_with_accumulation_equal_a_loop_by_hand(tmp_path):
    model = with_lora(tiny_llama())
    trainer = build(
        tmp_path, model=model, gradient_accumulation_steps=2, max_grad_norm=0.5, max_steps=3,
        lr_scheduler_type="constant",
    )  # fmt: skip
    twin = copy.deepcopy(model)
    protect(trainer, tiny_probe(model), optimizer="safety-sam", rank=4, rho=0.05, mode="two_pass")
    count = Count(model)
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    trainer.train()
    assert count.count == 3 * 2 * 2

    optimizer = SafetySAM(
        [{"params": trainable(twin)}], probe=tiny_probe(twin), rank=4, rho=0.05, mode="two_pass",
        lr=1e-2, weight_decay=0.0,
    )  # fmt: skip
    twin.train()
    for step in range(3):
        micro = batches[2 * step : 2 * step + 2]

        def closure(micro=micro):
            optimizer.zero_grad()
            tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
            for batch in micro:
                twin(**batch, num_items_in_batch=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable(twin), 0.5)
            return 0.0

        optimizer.step(closure)
    optimizer.restore()
    for left, right in zip(weights(trainer), trainable(twin), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


class Interrupted(Exception):
    pass


def test_an_interrupted_step_leaves_nothing_for_the_next_run(tmp_path):
    """The first of two micro-batches was kept for the second pass when training broke off."""

    class Broken(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and not self.broken:
                self.broken = True
                raise Interrupted

        broken = False

    trainer = guarded(
        tmp_path, "safety-sam", options=TWO_PASS, callbacks=[Broken()], max_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    with pytest.raises(Interrupted):
        trainer.train()
    count = Count(trainer.model)
    trainer.train()
    assert count.count == 2 * 2 * 2


def test_two_passes_find_the_batch_size_that_fits(tmp_path):
    """The micro-batch that did not fit is not run again beside the smaller ones."""
    trainer = guarded(
        tmp_path, "safety-sam", options=TWO_PASS, max_steps=2, auto_find_batch_size=True,
        per_device_train_batch_size=4,
    )  # fmt: skip

    def small_only(model, args, kwargs):
        if model.training and len(kwargs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(small_only, with_kwargs=True)
    trainer.train()
    assert trainer.state.train_batch_size == 2
    assert trainer.state.global_step == 2


TWO_PASS = {"mode": "two_pass"}
KINDS = {
    "safeguard": (None, {}),
    "ProjectedAdamW": ("projected-adamw", {}),
    "PreconditionedSGD": ("preconditioned-sgd", {}),
    "SafetySAM lookahead": ("safety-sam", {}),
    "SafetySAM two_pass": ("safety-sam", TWO_PASS),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def test_a_smaller_batch_size_found_late_keeps_the_reference(tmp_path):
    """Training begins again with a model that has drifted, which must not pass for the aligned."""
    trainer = guarded(
        tmp_path, "safety-sam", auto_find_batch_size=True, per_device_train_batch_size=4
    )
    references = []

    def full(model, args, kwargs):
        if model.training and len(kwargs["input_ids"]) > 3 and trainer.state.global_step == 2:
            references.append(safety_of(base_optimizer(trainer)).reference)
            raise RuntimeError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(full, with_kwargs=True)
    trainer.train()
    assert trainer.state.train_batch_size < 4
    assert trainer.state.global_step == 4
    safety = safety_of(base_optimizer(trainer))
    assert set(references) == {safety.reference}
    assert [entry.step for entry in safety.history].count(0) == 1


@pytest.mark.parametrize("adapter", [True, False])
def test_the_probe_hears_no_noise_of_neftune(tmp_path, adapter):
    """Its hook stands on the embedding, which trains where there is no adapter."""
    trainer = guarded(
        tmp_path, model=None if adapter else tiny_llama(), neftune_noise_alpha=50.0, max_steps=2
    )
    model, run = trainer.model, trainer.training_step
    probe, embedding, heard = tiny_probe(model), model.get_input_embeddings(), []
    params = trainable(model) if adapter else [embedding.weight]

    def look():
        rows = probe.per_example(params).rows
        return [probe.values(), *probe.gradient(params)[1], *rows]

    quiet = look()

    def training_step(model, inputs, *args):
        assert embedding._forward_hooks, "the noise is on"
        if not heard:
            heard.append(all(map(torch.equal, look(), quiet)))
        return run(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    assert heard == [True]
    assert safety_of(base_optimizer(trainer)).step_count == 2


@pytest.mark.parametrize("largest", [0.05, 0.0], ids=["clipped", "unclipped"])
def test_the_pull_counts_the_gradients_that_the_optimizer_sees(tmp_path, largest):
    """Those of a whole step, after its micro-batches were accumulated and the norm was clipped."""
    model = with_lora(tiny_llama())
    params, norms, total = trainable(model), [], 0.0
    optimizer = torch.optim.SGD(params, lr=0.1)

    def count(optimizer, args, kwargs):
        nonlocal total
        total = total + torch.cat([p.grad.flatten() for p in params]).square()
        norms.append(float(torch.cat([p.grad.flatten() for p in params]).norm()))

    optimizer.register_step_pre_hook(count)
    trainer = build(
        tmp_path, model=model, protected={"optimizers": (optimizer, None)}, max_steps=3,
        max_grad_norm=largest, gradient_accumulation_steps=2,
    )  # fmt: skip
    protect(trainer, tiny_probe(model), rank=4, elastic=0.1)
    trainer.train()
    assert all(largest * 0.99 < norm for norm in norms)
    assert (max(norms) <= 0.05) == (largest > 0)
    counted = torch.cat([block[2].flatten() for block in safety_of(optimizer).pull.blocks])
    torch.testing.assert_close(counted, total)


@kinds
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    name, options = KINDS[kind]
    choices = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
        "options": options | {"refresh": RefreshPolicy.fixed(2)},
    }  # fmt: skip
    whole = guarded(tmp_path, name, **choices)
    whole.train()
    resumed = guarded(tmp_path, name, **choices)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert safety_of(base_optimizer(resumed)).history == safety_of(base_optimizer(whole)).history
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_a_checkpoint_without_the_optimizers_state_is_refused(tmp_path):
    """Trainer would go on without it, and the drifted model would pass for the aligned one."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    guarded(tmp_path, **saving).train()
    resumed = guarded(tmp_path, **saving)
    with pytest.raises(ValueError, match="resume_from_checkpoint: the checkpoint holds no state"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resumed_run_measures_the_distance_from_the_same_reference(files):
    """With KL the reference is the aligned model, though the checkpoint's has drifted from it."""

    def build_kl():
        trainer = build(files / "out", model=aligned(), save_strategy="steps", save_steps=2)
        protect(trainer, files / "prompts.jsonl", loss="kl", rank=4, refresh=RefreshPolicy.fixed(1))
        return trainer

    whole = build_kl()
    whole.train()
    resumed = build_kl()
    resumed.train(resume_from_checkpoint=str(files / "out" / "checkpoint-2"))
    history = safety_of(base_optimizer(whole)).history
    assert history == safety_of(base_optimizer(resumed)).history
    assert history[0].alignment_loss == pytest.approx(0, abs=1e-6)
    assert history[-1].alignment_loss > 1e-4
    assert all(map(torch.equal, weights(resumed), weights(whole)))


class Recorder(TrainerCallback):
    """Copies the parameters when Trainer's evaluation runs, and when it saves."""

    def __init__(self):
        self.evaluated, self.saved = {}, {}

    def on_prediction_step(self, args, state, control, model, **kwargs):
        self.evaluated[state.global_step] = [p.detach().clone() for p in trainable(model)]

    def on_save(self, args, state, control, model, **kwargs):
        self.saved[state.global_step] = [p.detach().clone() for p in trainable(model)]


def adapter_file(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return [tensors[name] for name in sorted(tensors)]


def adapter_weights(trainer):
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return [named[name].detach() for name in sorted(named)]


def test_lookahead_evaluates_and_saves_unperturbed_parameters(tmp_path):
    recorder = Recorder()
    trainer = guarded(
        tmp_path, "safety-sam", options={"rho": 0.5}, callbacks=[recorder], max_steps=4,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    optimizer_held = []
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        optimizer = base_optimizer(trainer)
        with optimizer.unperturbed():
            optimizer_held.append([p.detach().clone() for p in trainable(trainer.model)])
        moved = zip(optimizer_held[-1], trainable(trainer.model), strict=True)
        if trainer.state.global_step:
            assert any(not torch.equal(a, b) for a, b in moved), "trains at θ + ε"
        return loss

    trainer.training_step = training_step
    trainer.train()
    for at in (1, 3):  # what was evaluated after a step is what the next step starts from
        assert all(map(torch.equal, recorder.evaluated[at], optimizer_held[at]))
    for at in (2, 4):
        assert all(map(torch.equal, recorder.evaluated[at], recorder.saved[at]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_evaluation_before_the_first_step_is_of_the_aligned_model(tmp_path, smoothing):
    """And with label smoothing, which takes the labels away from the model."""
    recorder = Recorder()
    trainer = guarded(
        tmp_path, "safety-sam", options={"rho": 0.5}, callbacks=[recorder], eval_on_start=True,
        eval_strategy="steps", eval_steps=4, label_smoothing_factor=smoothing,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert all(map(torch.equal, recorder.evaluated[0], before))
    assert "alignment_loss" not in trainer.state.log_history[0], "nothing was measured yet"
    assert "alignment_loss" in trainer.state.log_history[1]


def test_the_best_model_is_loaded_as_it_was_saved(tmp_path):
    trainer = guarded(
        tmp_path, "safety-sam", max_steps=6, learning_rate=0.3, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert all(map(torch.equal, adapter_weights(trainer), adapter_file(best)))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_the_best_model_is_not_loaded_into_perturbed_parameters(tmp_path):
    class Stop(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = guarded(
        tmp_path, "safety-sam", options={"rho": 0.3}, callbacks=[Stop()], eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    trainer.evaluate()  # it returns to unperturbed parameters, which nobody may have written to


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = guarded(tmp_path)
    plain.train()
    saving = guarded(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    saving.model.enable_input_require_grads()  # newer versions of Trainer do it themselves
    saving.train()
    for left, right in zip(weights(plain), weights(saving), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiling_changes_nothing(tmp_path):
    plain = guarded(tmp_path)
    plain.train()
    torch._dynamo.utils.counters.clear()
    compiled = guarded(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for left, right in zip(weights(plain), weights(compiled), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["safeguard", "SafetySAM lookahead", "SafetySAM two_pass"])
def test_float16_with_a_gradient_scaler(tmp_path, kind):
    """Accelerate makes a scaler on GPUs only, and is given one here."""
    name, options = KINDS[kind]

    def run(scale):
        trainer = guarded(tmp_path, name, options=options, fp16=scale is not None)
        if scale is not None:
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", scale, backoff_factor=2**-12)
        seen, before = set(), torch.cat([p.flatten() for p in weights(trainer)])
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        trainer.train()
        moved = torch.cat([p.flatten() for p in weights(trainer)]) - before
        return moved, seen, safety_of(base_optimizer(trainer)).step_count

    exact, _, _ = run(None)
    moved, seen, steps = run(2.0**12)
    assert (seen, steps) == ({torch.float16}, 4)
    assert (moved - exact).norm() < 0.1 * exact.norm()
    moved, _, steps = run(2.0**24)
    assert steps == 3, "a step that overflows is skipped"
    assert bool(moved.isfinite().all())


@pytest.mark.parametrize("kind", ["safeguard", "SafetySAM two_pass"])
def test_mixed_precision_trains_float32_parameters(tmp_path, kind):
    name, options = KINDS[kind]
    trainer = guarded(tmp_path, name, options=options, bf16=True)
    seen = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}, "the task's passes and the probe's alike"
    assert {p.dtype for p in trainable(trainer.model)} == {torch.float32}
    assert safety_of(base_optimizer(trainer)).step_count == 4
