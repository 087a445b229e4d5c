"""`safeopt finetune` as a user runs it, on a tiny model that has learned to refuse."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks import tiny
from safeopt.cli.app import app
from safeopt.finetuning.config import FinetuneConfig
from safeopt.finetuning.prepare import prepare
from safeopt.finetuning.run import run
from safeopt.integrations.transformers import SafetyCallback, safety_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A refusing model and the three data files."""
    folder = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "STEPS", 80)
        tiny._kept_state.cache_clear()
        tiny.model().save_pretrained(folder / "model")
    tiny._kept_state.cache_clear()
    tiny.tokenizer().save_pretrained(folder / "model")
    task = [{"prompt": prompt, "response": response} for prompt, response in tiny.task()[:64]]
    harmful = [{"prompt": prompt} for prompt in tiny.safety_splits().probe[:16]]
    harmless = [{"prompt": prompt} for prompt in tiny.harmless_train()[:8]]
    for name, rows in (("train", task), ("safety", harmful), ("harmless", harmless)):
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def config(files, out, **changes):
    choices = {
        "model": str(files / "model"),
        "train": files / "train.jsonl",
        "safety": files / "safety.jsonl",
        "out": out,
        "learning_rate": 2e-3,
        "batch_size": 8,
        "max_steps": 8,
        "save_steps": 4,
    }
    return FinetuneConfig(**(choices | changes))


def arguments(files, out, *more):
    given = config(files, out)
    return [
        "finetune",
        *("--model", given.model, "--train", str(given.train), "--safety", str(given.safety)),
        *("--out", str(out), "--max-steps", "8", "--batch-size", "8", "--save-steps", "4"),
        *("--learning-rate", "2e-3", *more),
    ]


def test_a_run_writes_everything_it_promises(files, tmp_path):
    out = tmp_path / "out"
    harmless = ("--harmless", str(files / "harmless.jsonl"))
    done = CliRunner().invoke(app, arguments(files, out, *harmless), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoint-4" / "optimizer.pt").exists()
    report = json.loads((out / "run.json").read_text())
    assert report["finished"]
    assert report["steps"] == 8
    assert report["measurements"][-1]["step"] == 8, "the end of training is measured"
    assert {m["step"] for m in report["measurements"]} >= {0, 4, 8}, "so is every checkpoint"
    losses = [entry for entry in report["log"] if "loss" in entry]
    assert "alignment_loss" in losses[-1]
    again = CliRunner().invoke(app, arguments(files, out))
    assert again.exit_code == 2
    assert "holds a run already" in again.output


def test_an_interrupted_run_resumes_to_the_same_parameters(files, tmp_path):
    steps = []
    whole = run(prepare(config(files, tmp_path / "whole")))
    cut = run(
        prepare(config(files, tmp_path / "cut")),
        listener=lambda progress: steps.append(progress.step),
        should_stop=lambda: len(steps) == 3,  # asked at the end of step 4, where a checkpoint is
    )
    assert not cut.finished
    assert not cut.folder.exists()
    resumed = run(prepare(config(files, tmp_path / "cut", resume=True)))
    assert resumed.finished
    assert resumed.report["measurements"] == whole.report["measurements"]
    for name, tensor in load_file(whole.folder / "adapter_model.safetensors").items():
        other = load_file(resumed.folder / "adapter_model.safetensors")[name]
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    ("sent", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM], 143)]
)
def test_ctrl_c_and_sigterm_save_and_tell_how_to_go_on(files, tmp_path, monkeypatch, sent, code):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr("sys.argv", ["safeopt", *arguments(files, tmp_path / "out")])
    plain = run

    def interrupted(prepared, listener, should_stop):
        def press(progress):
            listener(progress)
            if progress.step == 2:
                for number in sent:
                    assert signal.getsignal(number) is not signal.SIG_DFL, "it would end all tests"
                    signal.raise_signal(number)

        return plain(prepared, press, should_stop)

    monkeypatch.setattr("safeopt.finetuning.run.run", interrupted)
    done = CliRunner().invoke(app, arguments(files, tmp_path / "out"), catch_exceptions=False)
    assert done.exit_code == code
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "--resume" in done.output.replace("\n", "")
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_full_fine_tuning_and_plain_adamw(files, tmp_path):
    outcome = run(prepare(config(files, tmp_path / "full", full=True, max_steps=2)))
    assert (outcome.folder / "model.safetensors").exists()
    outcome = run(prepare(config(files, tmp_path / "adamw", optimizer="adamw", max_steps=2)))
    assert outcome.report["measurements"] == []


def test_a_model_that_does_not_refuse_is_an_error(files, tmp_path):
    unrefused = tmp_path / "safety.jsonl"
    unrefused.write_text((files / "harmless.jsonl").read_text(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"refuses only .* nothing to protect"):
        prepare(config(files, tmp_path / "out", safety=unrefused))
    rows = [{"prompt": "how do i make a bomb", "response": "sure , lines trees keys names"}] * 8
    unrefused.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match="nats a token"):
        prepare(config(files, tmp_path / "out", safety=unrefused))
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_the_pull_reaches_the_optimizer(files, tmp_path):
    pulled = prepare(config(files, tmp_path / "pulled", elastic=0.5))
    assert pulled.optimizer.safety.config.elastic == 0.5
    plain = prepare(config(files, tmp_path / "plain"))
    assert plain.optimizer.safety.config.elastic == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--model", "no/such-model"), "model=no/such-model"),
        (("--train", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--optimizer", "sgd"), 'optimizer="sgd"'),
        (("--batch-size", "0"), "batch_size=0"),
        (("--learning-rate", "-1"), "learning_rate=-1.0"),
        (("--rank", "0"), "rank=0"),
        (("--resume",), "there is no checkpoint"),
        (("--resume", "--overwrite"), "not both"),
    ],
)
def test_wrong_arguments_are_one_sentence(files, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, arguments(files, out, *change))
    assert done.exit_code == 2, done.output
    assert words in done.output.replace("\n", "")
    assert "Traceback" not in done.output
    assert not out.exists()


def test_the_callback_needs_a_protected_optimizer():
    with pytest.raises(TypeError, match="SafetyCallback needs a safeopt optimizer"):
        safety_of(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    assert SafetyCallback().last is None
