"""`safeopt finetune`: what a run leaves behind, what it may resume, and errors in one sentence."""

# ruff: noqa: F401, F811
from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import arguments, config, files  # the fixture `files` is shared
from transformers import AutoTokenizer
from typer.testing import CliRunner

import safeopt
from benchmarks import tiny
from safeopt.cli.app import app
from safeopt.finetuning.finished import load_finished
from safeopt.finetuning.prepare import prepare
from safeopt.finetuning.run import run
from safeopt.optim import optimizers


@pytest.mark.parametrize("name", optimizers())
def test_every_optimizer_of_the_table_trains_and_resumes(name, files, tmp_path):
    rate = "0.2" if optimizers()[name].needs.startswith("a learning rate") else "2e-3"
    chosen = ("--optimizer", name, "--learning-rate", rate)
    done = CliRunner().invoke(
        app, arguments(files, tmp_path / "whole", *chosen), catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert report["config"]["optimizer"] == name
    assert report["opening"] == 4
    assert {m["step"] for m in report["measurements"]} >= {0, 4, 8}
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    short = config(files, tmp_path / "cut", optimizer=name, learning_rate=float(rate), max_steps=8)
    steps = []
    run(prepare(short), lambda progress: steps.append(progress.step), lambda: len(steps) == 3)
    run(prepare(dataclasses.replace(short, resume=True)))
    ends = [
        load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")
        for folder in ("whole", "cut")
    ]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


def test_overwriting_leaves_nothing_of_the_run_before(files, tmp_path):
    run(prepare(config(files, tmp_path)))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    again = run(prepare(config(files, tmp_path, overwrite=True, max_steps=2)))
    assert again.report["steps"] == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "notes.txt").exists(), "only what a run writes is removed"


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("mode", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize(
    ("place", "out", "words"),
    [
        ("work/model", "work", "is"),
        ("work/adapter", "link", "is"),
        ("link/checkpoint-4", "work", "is"),
        ("work/model/deep", "work", "lies in"),
    ],
)
def test_a_run_does_not_write_where_its_model_lies(files, tmp_path, mode, place, out, words):
    (tmp_path / "work").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    model = shutil.copytree(files / "model", tmp_path / place, dirs_exist_ok=True)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"model={model}: it {words} .*, which the run writes"):
        prepare(config(files, tmp_path / out, model=str(model), full=True, **mode))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["train", "safety", "harmless", "chat_template"])
def test_starting_again_does_not_remove_the_data(files, tmp_path, name):
    folder = tmp_path / "adapter"
    folder.mkdir()
    inside = shutil.copy(files / "train.jsonl", folder / "mine.txt")
    outside = shutil.copy(files / "train.jsonl", tmp_path / "mine.txt")
    link = folder / "link.txt"
    link.symlink_to(outside)
    before = contents(tmp_path)
    for path in (inside, link):
        with pytest.raises(ValueError, match=f"{name}={path}: it lies in {folder}, which"):
            prepare(config(files, tmp_path, overwrite=True, **{name: path}))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["run.json", "curves.png"])
def test_the_data_is_not_overwritten_by_a_file_of_the_run(files, tmp_path, name):
    mine = shutil.copy(files / "train.jsonl", tmp_path / name)
    with pytest.raises(ValueError, match=f"train={mine}: it is {mine}, which the run writes"):
        prepare(config(files, tmp_path, overwrite=True, train=mine))
    assert mine.read_bytes() == (files / "train.jsonl").read_bytes()


def test_a_link_may_lead_to_a_folder_that_is_not_there_yet(files, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "not" / "yet")
    run(prepare(config(files, tmp_path / "link", max_steps=1)))
    assert (tmp_path / "not" / "yet" / "run.json").is_file()


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_the_result_of_another_run_is_a_run(files, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=rf"holds a run already \({name}\)"):
        prepare(config(files, tmp_path))


def test_starting_again_removes_a_link_and_not_what_it_leads_to(files, tmp_path):
    (tmp_path / "real").mkdir()
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.symlink_to("real")
    run(prepare(config(files, out, max_steps=1)))
    (out / "adapter").rename(kept)
    (out / "adapter").symlink_to(kept)
    before = contents(kept)
    again = run(prepare(config(files, out, max_steps=2, overwrite=True)))
    assert again.report["steps"] == 2
    assert contents(kept) == before
    assert not (out / "adapter").is_symlink()
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_a_resumed_run_keeps_its_choices(files, tmp_path):
    run(prepare(config(files, tmp_path, max_steps=2)))
    for change in ({"optimizer": "adamw"}, {"lora_rank": 4}, {"train": files / "harmless.jsonl"}):
        with pytest.raises(ValueError, match=f"was started with {next(iter(change))}="):
            prepare(config(files, tmp_path, resume=True, **change))
    longer = run(prepare(config(files, tmp_path, resume=True, max_steps=4)))
    assert longer.report["steps"] == 4
    (tmp_path / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="which says what was started"):
        prepare(config(files, tmp_path, resume=True))


SHORT = {"max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A finished run with two checkpoints."""
    out = tmp_path_factory.mktemp("finished")
    run(prepare(config(files, out, **SHORT)))
    return out


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
     "adapter_model.safetensors"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_with_the_one_to_take_instead(
    name, finished, files, tmp_path
):
    out = shutil.copytree(finished, tmp_path / "out")
    again = config(files, out, resume=True, **SHORT)
    earlier, last = out / "checkpoint-2", out / "checkpoint-4"
    for checkpoint in (last, earlier):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="was cut off or is damaged") as refused:
            prepare(again)
        message = str(refused.value)
        assert message.startswith(f"resume: {last / name} ")
        assert "\n" not in message
        if checkpoint is last:
            assert message.endswith(f"; remove {last} to continue from checkpoint-2")
        else:
            assert message.endswith("no earlier checkpoint is whole; start again with --overwrite")
    (last / name).unlink()
    with pytest.raises(ValueError, match=rf"resume: .*{name} is missing|holds no weights"):
        prepare(again)


def test_what_is_left_of_a_damaged_run_is_resumed(finished, files, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-4")
    resumed = run(prepare(config(files, out, resume=True, **SHORT)))
    ends = [load_file(x / "adapter" / "adapter_model.safetensors") for x in (finished, out)]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    assert resumed.report["steps"] == 4


def test_a_damaged_result_has_no_profile(finished, files, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    weights = out / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"run={out / 'adapter'}: its weights cannot be read"):
        load_finished(out, None, 8)


def test_a_profile_is_not_made_where_it_cannot_be_written(finished, monkeypatch):
    monkeypatch.setattr("safeopt.diagnostics.profile.curvature_profile", None)
    wrong = CliRunner().invoke(app, ["profile", "--run", str(finished), "--out", __file__])
    assert wrong.exit_code == 2, wrong.output
    assert f"out={__file__}: it is a file; expected a folder" in wrong.output


def changed(report, **entries):
    return json.dumps({**report, **entries})


MALFORMED = {
    "it is no JSON file": lambda report: json.dumps(report)[:-9],
    "it holds list": lambda report: "[]",
    "config is missing": lambda report: "{}",
    "config=3": lambda report: changed(report, config=3),
    "config.model is missing": lambda report: changed(report, config={}),
    "seconds='1'": lambda report: changed(report, seconds="1"),
    "log holds something": lambda report: changed(report, log=[3]),
    "without alignment_loss": lambda report: changed(report, measurements=[{"step": 0}]),
}


@pytest.mark.parametrize("words", MALFORMED)
def test_a_malformed_report_is_named(words, finished, files, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "run.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(MALFORMED[words](report), encoding="utf-8")
    for use in (
        lambda: prepare(config(files, out, resume=True, **SHORT)),
        lambda: load_finished(out, None, 8),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            use()
        assert str(refused.value).startswith(f"{path}: ")


def test_the_adapter_loads_as_a_causal_language_model(files, tmp_path):
    from peft import AutoPeftModelForCausalLM

    outcome = run(prepare(config(files, tmp_path, max_steps=2)))
    loaded = AutoPeftModelForCausalLM.from_pretrained(outcome.folder)
    assert loaded.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=1).shape == (1, 3)


def test_a_model_without_chat_template_takes_one_from_a_file(files, tmp_path):
    plain = tmp_path / "model"
    shutil.copytree(files / "model", plain)
    template = (plain / "chat_template.jinja").rename(tmp_path / "template.jinja")
    with pytest.raises(ValueError, match=r"no chat template.*--chat-template FILE"):
        prepare(config(files, tmp_path / "out", model=str(plain)))
    prepared = prepare(config(files, tmp_path / "out", model=str(plain), chat_template=template))
    assert prepared.inputs.refused == (16, 16)


def test_a_chat_template_that_cannot_be_read_is_named(files, tmp_path):
    (tmp_path / "no-text").write_bytes(b"\xff")
    for name, words in (("no-text", "not UTF-8 text"), (".", "it is no regular file")):
        path = tmp_path / name
        with pytest.raises((ValueError, FileNotFoundError), match=f"chat_template={path}: {words}"):
            prepare(config(files, tmp_path / "out", chat_template=path))


@pytest.mark.parametrize("expression", ["1 / 0", "messages[9].content", "none + 1", "x.y.z"])
def test_a_chat_template_that_ends_in_an_error_is_named(files, tmp_path, expression):
    template = tmp_path / "template.jinja"
    template.write_text("{{ " + expression + " }}", encoding="utf-8")
    with pytest.raises(ValueError, match="chat template: it does not take a conversation"):
        prepare(config(files, tmp_path / "out", chat_template=template))


def test_a_chat_template_that_drops_the_messages_is_named(files, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=f"chat template: .* response in {files / 'train.jsonl'}"):
        prepare(config(files, tmp_path / "out", chat_template=template))


@pytest.mark.parametrize("command", ["finetune", "diagnose", "profile", "repair"])
def test_several_processes_are_refused(command, files, finished, tmp_path, monkeypatch):
    """As torchrun starts them: all would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    inputs = [f"--{name}={files / name}" for name in ("model", "train.jsonl", "safety.jsonl")]
    inputs = [given.replace(".jsonl=", "=") for given in inputs]
    out = f"--out={tmp_path / 'out'}"
    given = {
        "finetune": [*inputs, out],
        "diagnose": [*inputs, out],
        "profile": [f"--run={finished}", out],
        "repair": [*inputs, f"--reference={files / 'model'}", out],
    }
    done = CliRunner().invoke(app, [command, *given[command]])
    assert done.exit_code == 2, done.output
    assert "WORLD_SIZE=2: the safeopt command runs in one process" in done.output
    assert "safeopt.integrations.trainer.protect" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_versions_are_those_that_ran(finished):
    versions = json.loads((finished / "run.json").read_text(encoding="utf-8"))["versions"]
    assert versions["safeopt"] == safeopt.__version__
    assert versions["torch"] == torch.__version__


def test_prompts_that_the_model_does_not_refuse_are_told(files, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    parts = [(files / f"{name}.jsonl").read_text() for name in ("safety", "harmless")]
    mixed.write_text("\n".join(parts), encoding="utf-8")
    chosen = ("--safety", str(mixed), "--max-steps", "1")
    done = CliRunner().invoke(app, arguments(files, tmp_path / "out", *chosen))
    assert done.exit_code == 0, done.output
    assert "16 of 24 safety prompts are used" in done.output
    assert "the model does not refuse the other safety prompts" in done.output


def test_a_tokenizer_needs_no_padding_token(files, tmp_path):
    """Nor an end token that could take its place."""
    model = shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    safety = [json.loads(line) for line in (files / "safety.jsonl").read_text().splitlines()]
    data = {
        "train": [{"prompt": "how " * length, "response": "i"} for length in range(1, 9)],
        "safety": [line | {"response": tiny.REFUSAL} for line in safety],
    }
    for name, lines in data.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    paths = {name: tmp_path / f"{name}.jsonl" for name in data}
    done = run(prepare(config(files, tmp_path / "out", model=str(model), max_steps=1, **paths)))
    assert done.finished


@pytest.mark.parametrize("name", ["train", "safety", "harmless"])
def test_tokens_that_the_model_does_not_know_are_refused(files, tmp_path, name):
    model = shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(model)
    path = tmp_path / f"{name}.jsonl"
    line = {"prompt": "unheard", "response": "i"}
    path.write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(
        ValueError, match=f"{name}: .* in {path} .*has the token {len(tokenizer) - 1}"
    ):
        prepare(config(files, tmp_path / "out", model=str(model), **{name: path}))


def test_a_prompt_is_to_be_refused_or_it_is_not(files, tmp_path):
    both = tmp_path / "harmless.jsonl"
    parts = [(files / f"{name}.jsonl").read_text("utf-8") for name in ("harmless", "safety")]
    both.write_text("\n".join(parts), encoding="utf-8")
    with pytest.raises(ValueError, match="harmless: 16 of 24 prompts are safety prompts, too"):
        prepare(config(files, tmp_path / "out", harmless=both))


def test_a_safety_conversation_needs_its_refusal(files, tmp_path):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    path = tmp_path / "safety.jsonl"
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"3 messages .* has no response"):
        prepare(config(files, tmp_path / "out", safety=path))


def test_the_report_says_what_the_run_did_to_alignment(files, tmp_path):
    done = CliRunner().invoke(app, arguments(files, tmp_path / "safe"), catch_exceptions=False)
    assert "{'loss'" not in done.output, "Trainer's own lines would tear the progress bar apart"
    safe = json.loads((tmp_path / "safe" / "run.json").read_text())["alignment_loss"]
    assert safe["end"] == pytest.approx(safe["start"], 0.2)
    plain = run(prepare(config(files, tmp_path / "plain", optimizer="adamw", max_steps=2)))
    assert plain.report["alignment_loss"]["start"] == safe["start"]
    assert plain.report["alignment_loss"]["end"] != safe["start"], (
        "measured without protection, too"
    )


@pytest.mark.parametrize(
    ("optimizer", "rate", "words"),
    [
        ("adamw", "1e37", "failed: the model is ruined: its losses are no finite numbers; start"),
        ("projected-adamw", "0.5", "failed: alignment was not kept: its loss has risen by "),
        ("adamw", "0.5", None),
    ],
)
def test_a_result_that_is_not_to_be_used_fails(files, tmp_path, optimizer, rate, words):
    chosen = ("--optimizer", optimizer, "--learning-rate", rate, "--logging-steps", "2")
    done = CliRunner().invoke(app, arguments(files, tmp_path, *chosen), catch_exceptions=False)
    assert done.exit_code == (0 if words is None else 1), done.output
    report = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert report["finished"]
    assert (tmp_path / "curves.png").exists()
    if words is None:
        assert "failed" not in done.output
        assert report["failure"] is None
    else:
        assert words in done.output
        assert f"failed: {report['failure']}\n" in done.output


def test_too_little_memory_is_one_sentence(files, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr("safeopt.finetuning.run.run", full)
    done = CliRunner().invoke(app, arguments(files, tmp_path / "out"))
    assert done.exit_code == 2
    assert "error: the device has no memory left (CUDA out of memory. Tried to" in done.output
    assert "a smaller --batch-size" in done.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--warmup-steps", "-1"), "warmup_steps=-1"),
        (("--train", "[/x].jsonl"), "[/x].jsonl: there is no such file"),
        (("--chat-template", "none.jinja"), "chat_template=none.jinja"),
        (("--out", __file__), "it is a file"),
        (("--epochs", "inf"), "epochs=inf"),
        (("--learning-rate", "inf"), "learning_rate=inf"),
        (("--weight-decay", "inf"), "weight_decay=inf"),
        (("--elastic", "-1"), "elastic=-1"),
        (("--elastic", "inf"), "elastic=inf"),
        (("--seed", "-1"), "seed=-1"),
        (("--full", "--lora-rank", "4"), "full, lora_rank=4: all parameters or an adapter"),
        (("--full", "--lora-alpha", "8"), "full, lora_alpha=8: all parameters or an adapter"),
        (("--seed", str(2**32)), f"seed={2**32}"),
    ],
)
def test_more_wrong_arguments_are_one_sentence(files, tmp_path, change, words):
    done = CliRunner().invoke(app, arguments(files, tmp_path / "out", *change))
    assert done.exit_code == 2, done.output
    assert words in done.output.replace("\n", "")
    assert not (tmp_path / "out").exists()
