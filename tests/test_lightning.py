"""Lightning: what it saves and validates is restored, and a resumed run is the same run."""

from __future__ import annotations

import inspect
import pickle

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import safety_batch, tiny_llama, trainable, with_lora

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM, safeguard
from safeopt.integrations.lightning import SafetyCallback


class Module(lightning.LightningModule):
    def __init__(self, kind="ProjectedAdamW"):
        super().__init__()
        self.model = with_lora(tiny_llama())
        self.kind = kind
        self.validated = []

    def training_step(self, batch):
        return self.model(**batch).loss

    def validation_step(self, batch):
        if not self.trainer.sanity_checking:
            self.validated.append([p.detach().clone() for p in trainable(self.model)])
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        params = trainable(self.model)
        if self.kind == "plain":
            return torch.optim.SGD(params, lr=0.1)
        probe = SafetyProbe(self.model, [safety_batch(), safety_batch(seed=1)])
        options = {"rank": 4, "refresh": RefreshPolicy.fixed(2)}
        if self.kind == "safeguard":
            return safeguard(torch.optim.SGD(params, lr=0.1), probe, **options)
        if self.kind == "ProjectedAdamW":
            return ProjectedAdamW(params, lr=1e-2, probe=probe, **options)
        return SafetySAM(params, lr=1e-2, probe=probe, mode=self.kind, rho=0.3, **options)


class Loader:
    """Batches that are continued in the middle of an epoch, as torchdata's stateful loader does."""

    def __init__(self):
        ids = [(torch.arange(6) * (i + 3)) % 30 + 4 for i in range(16)]
        rows = [{"input_ids": x, "labels": x} for x in ids]
        self.batches = list(torch.utils.data.DataLoader(rows, batch_size=2))
        self.at = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def fit(folder, kind="ProjectedAdamW", *, resume=None, steps=6, validate=False, **options):
    torch.manual_seed(0)
    module = Module(kind)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saver, SafetyCallback()], **options,
    )  # fmt: skip
    # Newer versions ask how to load a checkpoint; ours holds plain tensors and numbers.
    safely = "weights_only" in inspect.signature(trainer.fit).parameters and resume is not None
    trainer.fit(
        module,
        Loader(),
        Loader() if validate else None,
        ckpt_path=resume,
        **({"weights_only": True} if safely else {}),
    )
    return module, trainer


def final(module):
    return [p.detach().clone() for p in trainable(module.model)]


@pytest.mark.parametrize("kind", ["ProjectedAdamW", "safeguard", "lookahead", "two_pass"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    whole, first = fit(tmp_path, kind)
    resumed, second = fit(tmp_path / "again", kind, resume=tmp_path / "step=3.ckpt")
    histories = [trainer.optimizers[0].safety.history for trainer in (first, second)]
    assert histories[0] == histories[1]
    assert {0, 3, 6} <= {entry.step for entry in histories[0]}, "every save was measured"
    assert all(map(torch.equal, final(whole), final(resumed)))


def test_lookahead_validates_and_saves_unperturbed_weights(tmp_path):
    module, trainer = fit(
        tmp_path, "lookahead", validate=True, val_check_interval=3, limit_val_batches=1
    )
    safety = trainer.optimizers[0].safety
    assert {3, 6} <= {entry.step for entry in safety.history}
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert all(torch.equal(saved[n], p) for n, p in zip(names, module.validated[0], strict=True))
    assert all(map(torch.equal, module.validated[-1], final(module)))


def test_the_figures_are_logged(tmp_path):
    _, trainer = fit(tmp_path, steps=3)
    assert {"alignment_loss", "alignment_predicted", "coupling"} <= set(trainer.logged_metrics)


def test_the_module_is_left_without_the_hook(tmp_path):
    module, trainer = fit(tmp_path, steps=2)
    passes = trainer.optimizers[0].safety.passes.forward
    trainer.optimizers[0].safety.step_count += 1  # as if a step had been taken since
    module.state_dict()
    assert trainer.optimizers[0].safety.passes.forward == passes


def test_an_interrupted_fit_is_forgotten_by_the_next(tmp_path, monkeypatch):
    """Lightning tears nothing down after an exception."""

    class Interrupted(Exception):
        pass

    def training_step(self, batch):
        if self.global_step == 1:
            raise Interrupted
        return self.model(**batch).loss

    module, callback = Module(), SafetyCallback()
    options = {
        "accelerator": "cpu", "max_steps": 3, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    first = lightning.Trainer(callbacks=[callback], **options)
    with monkeypatch.context() as patched:
        patched.setattr(Module, "training_step", training_step)
        with pytest.raises(Interrupted):
            first.fit(module, Loader())
    copied = pickle.loads(pickle.dumps(module))
    assert all(map(torch.equal, final(copied), final(module)))
    copied.state_dict()
    (old,) = first.optimizers
    passes = old.safety.passes.forward
    lightning.Trainer(callbacks=[SafetyCallback()], **options).fit(module, Loader())
    module.state_dict()
    assert old.safety.step_count == 1
    assert old.safety.passes.forward == passes, "its optimizer is not asked to restore"
    lightning.Trainer(callbacks=[callback], **options).fit(module, Loader())
    assert not module._state_dict_pre_hooks


def test_what_cannot_be_protected_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(TypeError, match="returned SGD, which is not protected"):
        fit(tmp_path, "plain")
    with pytest.raises(ValueError, match='accumulate_grad_batches=2: mode="two_pass"'):
        fit(tmp_path, "two_pass", accumulate_grad_batches=2)


def test_accumulated_gradients_count_as_one_step(tmp_path):
    _, trainer = fit(tmp_path, "lookahead", accumulate_grad_batches=2, steps=2)
    assert trainer.optimizers[0].safety.step_count == 2
