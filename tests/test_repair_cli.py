"""`safeopt repair` as a user runs it, on a tiny model that has forgotten its refusals."""

# ruff: noqa: F401, F811
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_finetune import config, files  # the fixture `files` is shared
from tiny_models import tiny_llama
from typer.testing import CliRunner

from benchmarks.tiny import REFUSAL
from safeopt.cli.app import app
from safeopt.files import write_json
from safeopt.finetuning.prepare import prepare
from safeopt.finetuning.run import run


@pytest.fixture(scope="module")
def forgotten(files, tmp_path_factory):
    """Results of fine-tuning without protection, as an adapter and as a whole model."""
    folders = {}
    for full in (False, True):
        out = tmp_path_factory.mktemp("forgotten")
        rate = 2e-3 if full else 5e-3
        choices = {"optimizer": "adamw", "full": full, "max_steps": 24, "learning_rate": rate}
        folders[full] = run(prepare(config(files, out, **choices))).folder
    return folders


def arguments(files, model, out, *more):
    return [
        "repair",
        *("--model", str(model), "--reference", str(files / "model")),
        *("--safety", str(files / "safety.jsonl"), "--out", str(out), *more),
    ]


def invoke(*given):
    return CliRunner().invoke(app, list(given), catch_exceptions=False)


@pytest.mark.parametrize("full", [False, True])
def test_a_model_is_repaired(files, forgotten, tmp_path, full):
    out = tmp_path / "out"
    data = ("--train", str(files / "train.jsonl"), "--harmless", str(files / "harmless.jsonl"))
    done = invoke(*arguments(files, forgotten[full], out, *data))
    assert done.exit_code == 0, done.output
    report = json.loads((out / "repair.json").read_text())
    assert report["alignment_before"] > 10 * report["reference"]
    gained = report["alignment_before"] - report["alignment_after"]
    assert gained > 0.9 * (report["alignment_before"] - report["reference"])
    assert report["task_after"] < 1.05 * report["task_before"]
    assert report["config"]["refreshes"] == 5
    assert f"{report['alignment_after']:.4f}" in done.output
    name = "model/model.safetensors" if full else "adapter/adapter_model.safetensors"
    source = forgotten[full] / name.split("/")[1]
    before, after = load_file(source), load_file(out / name)
    assert before.keys() == after.keys()
    assert any(not before[key].equal(after[key]) for key in before)
    assert (out / "model" / "tokenizer_config.json").exists() == full
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "no working folder is left"
    assert sorted(path.name for path in out.iterdir()) == [name.split("/")[0], "repair.json"]


@pytest.mark.parametrize("full", [False, True])
def test_models_without_chat_template_take_one_from_a_file(files, forgotten, tmp_path, full):
    plain = {
        name: shutil.copytree(folder, tmp_path / name)
        for name, folder in (("aligned", files / "model"), ("tuned", forgotten[full]))
    }
    for folder in plain.values():
        template = (folder / "chat_template.jinja").rename(tmp_path / "template.jinja")
    chosen = (*arguments(files, plain["tuned"], tmp_path / "out"), "--refreshes", "1")
    chosen = (*chosen, "--reference", str(plain["aligned"]))
    done = invoke(*chosen)
    assert done.exit_code == 2
    assert "--chat-template FILE" in done.output
    done = invoke(*chosen, "--chat-template", str(template))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "repair.json").read_text())
    assert report["config"]["chat_template"] == str(template)
    assert report["alignment_after"] < report["alignment_before"]


def test_a_model_with_other_tokens_is_refused(files, tmp_path):
    tiny_llama(vocab_size=8).save_pretrained(tmp_path / "model")
    shutil.copy(files / "model" / "tokenizer.json", tmp_path / "model")
    shutil.copy(files / "model" / "tokenizer_config.json", tmp_path / "model")
    done = invoke(*arguments(files, tmp_path / "model", tmp_path / "out"))
    assert done.exit_code == 2
    assert f"model={tmp_path / 'model'}: a prompt with its refusal has the token" in done.output


def test_without_task_data_the_cost_is_said_to_be_unknown(files, forgotten, tmp_path, caplog):
    tmp_path.joinpath("out").mkdir()  # an empty folder is welcome
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", "--refreshes", "1"))
    assert done.exit_code == 0, done.output
    assert "give --train" in done.output
    assert "above its limit" in caplog.text
    assert json.loads((tmp_path / "out" / "repair.json").read_text())["task_before"] is None


@pytest.mark.parametrize("link", [False, True])
def test_an_empty_folder_may_be_a_link_or_the_present_one(
    files, forgotten, tmp_path, monkeypatch, link
):
    folder, other = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    other.symlink_to(folder)
    kept = folder.stat().st_ino
    monkeypatch.chdir(folder)
    done = invoke(*arguments(files, forgotten[False], other if link else ".", "--refreshes", "1"))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "repair.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]
    assert folder.stat().st_ino == kept, "a shell that stands in it would see nothing"


def test_a_result_that_cannot_be_moved_is_kept_and_named(files, forgotten, tmp_path, monkeypatch):
    def write(path, value):
        (path.parent.parent / "adapter" / "in the way").mkdir(parents=True)
        return write_json(path, value)

    monkeypatch.setattr("safeopt.finetuning.repair.write_json", write)
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", "--refreshes", "1"))
    assert done.exit_code == 2
    kept = tmp_path / "out" / "repair.partial"
    assert f"out={tmp_path / 'out'}: the result could not be moved there" in done.output
    assert f"kept in {kept}" in done.output
    assert (kept / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert json.loads((kept / "repair.json").read_text())["steps"]


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        (False, "is that of a repair that still runs or was killed; remove it if none runs"),
        (True, "is the result of a repair that was not moved to its place; move it to"),
    ],
)
def test_what_an_earlier_repair_left_is_told_and_kept(files, forgotten, tmp_path, whole, words):
    left = tmp_path / "out" / "repair.partial"
    (left / "adapter").mkdir(parents=True)
    if whole:
        write_json(left / "repair.json", {})
    done = invoke(*arguments(files, "no/such-model", tmp_path / "out"))
    assert done.exit_code == 2, done.output
    assert f"out={tmp_path / 'out'}: {left} {words}" in done.output
    assert (left / "adapter").is_dir()
    shutil.rmtree(left)
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", "--refreshes", "1"))
    assert done.exit_code == 0, done.output


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    files, forgotten, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("", encoding="utf-8")
    below = tmp_path / "file" / "out"
    done = invoke(*arguments(files, "no/such-model", below))
    assert f"out={below}: {tmp_path / 'file'} is a file" in done.output
    monkeypatch.setattr("os.access", lambda path, mode, **options: not mode & os.W_OK)
    done = invoke(*arguments(files, "no/such-model", tmp_path / "a" / "b"))
    assert f"out={tmp_path / 'a' / 'b'}: {tmp_path} is write-protected" in done.output


@pytest.mark.parametrize("seed", [None, 2])
def test_a_model_that_has_lost_nothing_is_written_as_it_is(files, tmp_path, seed):
    more = []
    if seed is not None:  # the trial examples are harder than the others
        lines = (files / "safety.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = tmp_path / "prompts.jsonl"
        refusals = [REFUSAL[: len(REFUSAL) // (1 + i % 2)].strip() for i in range(len(lines))]
        rows = [{**json.loads(x), "response": y} for x, y in zip(lines, refusals, strict=True)]
        prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        more = ["--safety", str(prompts), "--seed", str(seed)]
    done = invoke(*arguments(files, files / "model", tmp_path / "out", *more))
    assert done.exit_code == 0, done.output
    assert "0 steps" in done.output
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (files / "model", tmp_path / "out" / "model")
    )
    assert all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--model", "no/such-model"), "model=no/such-model"),
        (("--reference", "no/such-model"), "reference=no/such-model"),
        (("--safety", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--train", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--harmless", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--budget", "-1"), "budget=-1"),
        (("--refreshes", "0"), "refreshes=0"),
        (("--examples", "0"), "examples=0"),
        (("--max-length", "1"), "max_length=1"),
        (("--seed", "-1"), "seed=-1"),
        (("--out", __file__), "expected a new or empty folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(files, forgotten, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", *change))
    assert done.exit_code == 2, done.output
    assert words in done.output.replace("\n", "")
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_run_is_told_from_its_result(files, forgotten, tmp_path):
    for result in forgotten.values():
        done = invoke(*arguments(files, result.parent, tmp_path / "out"))
        assert done.exit_code == 2, done.output
        assert f"model={result.parent}: this is the folder of a run; give its result, {result}" in (
            done.output
        )


def test_a_prompt_is_to_be_refused_or_it_is_not(files, forgotten, tmp_path):
    both = ("--harmless", str(files / "safety.jsonl"))
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", *both))
    assert done.exit_code == 2, done.output
    assert "harmless: 16 of 16 prompts are safety prompts, too" in done.output
    assert not (tmp_path / "out").exists()


def test_too_few_safety_prompts_are_named(files, forgotten, tmp_path):
    few = tmp_path / "safety.jsonl"
    lines = (files / "safety.jsonl").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(lines[:8]), encoding="utf-8")
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", "--safety", str(few)))
    assert done.exit_code == 2, done.output
    assert f"safety: refused prompts in {few}: 8; at least 9" in done.output.replace("\n", "")


def test_an_adapter_of_another_model_is_one_sentence(files, forgotten, tmp_path):
    other = tmp_path / "adapter"
    shutil.copytree(forgotten[False], other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))
    done = invoke(*arguments(files, other, tmp_path / "out"))
    assert done.exit_code == 2, done.output
    assert "does not fit the reference" in done.output.replace("\n", " ")


@pytest.mark.parametrize("change", ["lacks some", "lacks a saved module", "has more"])
def test_an_adapter_is_put_on_whole_or_not_at_all(files, forgotten, tmp_path, change):
    other = shutil.copytree(forgotten[False], tmp_path / "adapter")
    weights = load_file(other / "adapter_model.safetensors")
    first = min(weights)
    if change == "lacks some":
        del weights[first]
        words = "Found missing adapter keys"
    elif change == "lacks a saved module":
        settings = json.loads((other / "adapter_config.json").read_text())
        write_json(other / "adapter_config.json", {**settings, "modules_to_save": ["lm_head"]})
        words = "it lacks 'base_model.model.lm_head.weight'"
    else:
        weights[first.replace(".0.", ".7.", 1)] = weights[first].clone()
        words = f"there is no place in it for {first.replace('.0.', '.7.', 1)}"
    save_file(weights, other / "adapter_model.safetensors")
    done = invoke(*arguments(files, other, tmp_path / "out"))
    assert done.exit_code == 2, done.output
    assert f"model={other}: the adapter does not fit the reference" in done.output
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_one_sentence(files, forgotten, tmp_path):
    damaged = shutil.copytree(forgotten[False], tmp_path / "adapter")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    done = invoke(*arguments(files, damaged, tmp_path / "out"))
    assert done.exit_code == 2, done.output
    assert f"model={damaged}: its weights cannot be read" in done.output
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_half_written(files, forgotten, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safeopt.finetuning.repair.write_json", fail)
    done = invoke(*arguments(files, forgotten[False], tmp_path / "out", "--refreshes", "1"))
    assert done.exit_code == 2
    assert "no space left" in done.output
    assert not list(tmp_path.iterdir())


def test_a_reference_is_named_as_that(files, forgotten, tmp_path):
    out = tmp_path / "out"
    done = invoke(*arguments(files, forgotten[False], out), "--reference", str(tmp_path))
    assert done.exit_code == 2
    assert f"error: reference={tmp_path}: expected the folder" in done.output


def test_responses_that_the_reference_would_not_say_are_refused(files, forgotten, tmp_path):
    out = tmp_path / "out"
    data = ("--safety", str(files / "train.jsonl"))
    done = invoke(*arguments(files, forgotten[False], out), *data)
    assert done.exit_code == 2, done.output
    assert "are unlikely under the model" in done.output
    assert not out.exists()


def test_a_model_that_is_within_its_limit_is_said_to_be(files, tmp_path):
    done = invoke(*arguments(files, files / "model", tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "within its limit already: nothing was changed" in done.output
