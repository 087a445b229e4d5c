"""`safeopt finetune`: what is resumed, and what an error in the middle leaves as it was."""

# ruff: noqa: F401, F811
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import arguments, config, files  # the fixture `files` is shared
from test_finetune_cli import SHORT, contents, finished
from typer.testing import CliRunner

from safeopt.cli.app import app
from safeopt.cli.finetune import _description
from safeopt.finetuning.prepare import prepare
from safeopt.finetuning.run import run


@pytest.mark.parametrize("steps", [4, 3])
def test_a_finished_run_takes_no_further_step(steps, finished, files, tmp_path):
    """As it is resumed by a cluster that starts the same command again."""
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "adapter")  # as if killed after the last checkpoint
    shown = []
    again = run(
        prepare(config(files, out, resume=True, **SHORT | {"max_steps": steps})), shown.append
    )
    assert again.finished
    last = [entry["loss"] for entry in again.report["log"] if "loss" in entry][-1]
    expected = (4, steps, last, None)  # no time was spent that safety could have had a share of
    assert [(x.step, x.max_steps, x.task_loss, x.safety_share) for x in shown] == [expected]
    assert "of the time" not in _description(shown[0])
    assert again.report["steps"] == 4
    assert not (out / "checkpoint-5").exists()
    before = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert again.report["measurements"] == before["measurements"]
    assert again.report["alignment_loss"] == before["alignment_loss"]
    ends = [load_file(x / "adapter" / "adapter_model.safetensors") for x in (finished, out)]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("name", ["train", "safety"])
def test_data_that_has_changed_is_not_resumed(name, files, tmp_path):
    path = shutil.copy(files / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    out = tmp_path / "out"
    run(prepare(config(files, out, max_steps=1, **{name: path})))
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / path.name)
    again = config(files, out, max_steps=2, resume=True, **{name: moved})
    prepare(again)
    lines = moved.read_text(encoding="utf-8").splitlines()
    moved.write_text("\n".join(reversed(lines)), encoding="utf-8")
    before = contents(out)
    with pytest.raises(ValueError, match=f"resume: {name}={moved} has changed since the run in"):
        prepare(again)
    assert contents(out) == before


def test_a_model_of_the_same_last_name_is_another_one(finished, files, tmp_path):
    """Hub names end alike, and folders too; one that was moved is the same model."""
    out = shutil.copytree(finished, tmp_path / "out")
    copy = shutil.copytree(files / "model", tmp_path / "copy" / "model")
    for other in (copy, "somebody/model"):
        with pytest.raises(ValueError, match=f"was started with model={files / 'model'}, now it"):
            prepare(config(files, out, resume=True, model=str(other), **SHORT))
    path = out / "run.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    for was, same in (
        (tmp_path / "gone" / "model", copy),  # moved
        (copy, tmp_path / "copy" / ".." / "copy" / "model"),
    ):
        report["config"]["model"] = str(was)
        path.write_text(json.dumps(report), encoding="utf-8")
        prepare(config(files, out, resume=True, model=str(same), **SHORT))
    report["config"]["model"] = "org-a/chat"
    path.write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(ValueError, match="model=org-a/chat, now it is org-b/chat"):
        prepare(config(files, out, resume=True, model="org-b/chat", **SHORT))


def test_a_checkpoint_that_does_not_load_changes_nothing(finished, files, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["safety"]["version"] = 1
    torch.save(state, path)
    before = contents(out)
    with pytest.raises(ValueError, match="version 1; this safeopt reads"):
        run(prepare(config(files, out, resume=True, max_steps=6)))
    done = CliRunner().invoke(app, arguments(files, out, "--resume", "--save-steps", "2"))
    assert done.exit_code == 2
    assert "\nerror: " in done.output, "the progress before it ends its line"
    assert contents(out) == before


def test_what_trainer_refuses_removes_no_earlier_run(finished, files, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    before = contents(out)

    def refuse(*args, **kwargs):
        raise ValueError("no such model")

    monkeypatch.setattr("safeopt.finetuning.run.Trainer", refuse)
    with pytest.raises(ValueError, match="no such model"):
        run(prepare(config(files, out, overwrite=True)))
    assert contents(out) == before


def test_a_killed_run_has_told_what_it_did_until_its_checkpoint(files, tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        run(prepare(config(files, tmp_path, **SHORT)), kill)
    report = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert not report["finished"]
    assert report["steps"] == 2
    assert [entry["step"] for entry in report["log"]] == [1, 2]
    assert report["seconds"] > 0
    resumed = run(prepare(config(files, tmp_path, resume=True, **SHORT)))
    assert resumed.report["seconds"] > report["seconds"], "the time before it was killed is kept"


def test_a_run_without_a_checkpoint_is_started_again_as_the_error_says(files, tmp_path):
    def kill(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepare(config(files, tmp_path, **SHORT)), kill)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; start it with --overwrite"):
        prepare(config(files, tmp_path, resume=True, **SHORT))
    prepare(config(files, tmp_path, overwrite=True, **SHORT))


def test_too_few_safety_prompts_are_named(files, tmp_path):
    few = tmp_path / "safety.jsonl"
    lines = (files / "safety.jsonl").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(lines[:4]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"safety: refused prompts in {few}: 4; at least 5 are"):
        prepare(config(files, tmp_path / "out", safety=few))
    prepare(config(files, tmp_path / "out", safety=few, optimizer="adamw"))


def test_examples_of_which_no_response_is_left_are_counted(files, tmp_path):
    path = tmp_path / "train.jsonl"
    lines = (files / "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    long = json.dumps({"prompt": "how " * 99, "response": "i"})
    path.write_text("\n".join([*lines, long, long]), encoding="utf-8")
    chosen = ("--train", str(path), "--max-length", "64", "--max-steps", "1")
    done = CliRunner().invoke(app, arguments(files, tmp_path / "out", *chosen))
    assert done.exit_code == 0, done.output
    shown = done.output.replace("\n", " ")
    assert "8 of 10 training examples and 16 of 16 safety prompts are used" in shown
    assert "the prompts of the other training examples fill max_length=64" in shown
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (report["train_examples"], report["train_examples_given"]) == (8, 10)
