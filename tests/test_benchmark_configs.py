"""Every shipped config is valid and runs, small, through the code that runs it in earnest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import tiny
from benchmarks.config import CONFIGS, ConfigError, RunConfig, SweepConfig, TaskConfig, load_config
from benchmarks.data import hub
from benchmarks.dry_run import shrunk
from benchmarks.methods import METHODS
from benchmarks.run import run
from benchmarks.tasks import examples_of

QUIET = Console(quiet=True)
PAPER = sorted(path for path in (CONFIGS / "paper").glob("*.yaml") if path.stem != "base")
SWEEPS = [
    CONFIGS / f"{name}.yaml"
    for name in ("core-smollm2", "smollm2-separation", "smollm2-gsm8k", "smollm2-summaries")
]


def dry(path: Path) -> RunConfig:
    """The config's first grid point of every method, small."""
    config = shrunk(load_config(path))
    if not isinstance(config, SweepConfig):
        return config
    points = tuple(method.points()[0] for method in config.methods)
    return config.stage("test", points, config.seeds)


@pytest.mark.parametrize("path", PAPER + SWEEPS, ids=lambda path: path.stem)
def test_configs_are_valid_sweeps_with_enough_methods_and_seeds(path: Path):
    config = load_config(path)
    assert isinstance(config, SweepConfig)
    assert len(config.seeds) >= 3
    assert len(config.methods) >= (10 if path.stem == "core-smollm2" else 5)


def test_the_paper_s_rows_are_there():
    stems = {path.stem for path in PAPER}
    assert {"llama-2-7b-summarisation", "falcon-40b-code", "mistral-7b-question-answering"} <= stems
    for model in ("qwen3-1.7b", "llama-3.2-3b"):
        assert len({stem for stem in stems if stem.startswith(model)}) == 7


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_no_rival_sees_fewer_safety_examples_than_ours(path: Path):
    """In runs this long a pool of 32 would come round more than ten times."""
    for method in load_config(path).methods:
        if hasattr(method.options(), "examples") and not hasattr(method.options(), "held"):
            assert method.options().examples is None, method.key


def test_the_tiny_sweep_has_every_method():
    config = load_config(CONFIGS / "tiny-sweep.yaml")
    assert {method.name for method in config.methods} >= set(METHODS)
    assert len(config.seeds) == 5
    assert config.long == 4


# One architecture each; the data sets are covered below, without a model.
@pytest.mark.parametrize(
    "name",
    [
        "paper/llama-2-7b-summarisation",
        "paper/falcon-40b-code",
        "paper/mistral-7b-question-answering",
        "paper/qwen3-1.7b-gsm8k",
        "paper/llama-3.2-3b-alpaca",
        "core-smollm2",
        "smollm2-gsm8k",
        "smollm2-summaries",
    ],
)
def test_dry_runs_take_the_code_of_the_real_ones(name: str, tmp_path: Path):
    config = dry(CONFIGS / f"{name}.yaml")
    if name not in ("core-smollm2", "paper/falcon-40b-code"):  # these two run all methods
        fields = config.model_dump()
        fields["methods"] = [
            m for m in fields["methods"] if m["name"] in ("adamw", "projected_adamw")
        ]
        config = RunConfig.model_validate(fields)
    result = run(config, tmp_path, QUIET)
    assert len(result.records) == len(config.methods)
    assert result.config["model"]["dry"]
    assert result.records[0].steps == 2


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_data_set_s_columns_become_conversations(path: Path):
    task = load_config(path).task
    (first, *_) = examples_of(task, dry=True)
    prompt, response = tiny.task()[0]
    wanted = f"{task.instruction}\n\n{prompt}" if task.instruction else prompt
    assert [m["content"] for m in first.messages] == [wanted, response]


def test_a_config_can_extend_another(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "model: {name: tiny}\ntask: {name: tiny, max_length: 9}\nsteps: 2\nlearning_rate: 0.1\n"
        "methods: [{name: adamw}]\n",
        encoding="utf-8",
    )
    (tmp_path / "b.yaml").write_text(
        "extends: a.yaml\ntask: {eval_examples: 3}\nmethods: [{name: sam}]\n", encoding="utf-8"
    )
    config = load_config(tmp_path / "b.yaml")
    assert (config.task.max_length, config.task.eval_examples) == (9, 3)
    assert [method.name for method in config.methods] == ["sam"]
    (tmp_path / "c.yaml").write_text("extends: absent.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("extends: e.yaml\n", encoding="utf-8")
    (tmp_path / "e.yaml").write_text("extends: d.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"d\.yaml: extends itself, by way of e\.yaml"):
        load_config(tmp_path / "d.yaml")


def test_numbers_need_no_point(tmp_path: Path):
    """As in every other reader of YAML, and in JSON."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {name: tiny}\ntask: {name: tiny}\nsteps: 2\nlearning_rate: 2e-3\n"
        "methods: [{name: projected_adamw, budget: 1e-2, damping: .5E+1}]\n",
        encoding="utf-8",
    )
    (method,) = load_config(path).methods
    assert method.model_extra == {"budget": 0.01, "damping": 5.0}


# --- other people's data ---


def test_rows_of_any_form_become_conversations(tmp_path: Path):
    rows = [
        {"q": "one?", "a": "1"},
        {"q": "one?", "a": "again"},  # a prompt counts once
        {"q": "two?", "a": {"text": ["2", "II"], "start": [0, 1]}},
        {"q": "", "a": "no prompt"},
        {"q": "no response", "a": None},
        {"q": "no column"},
        {"q": "half a pair \ud83d", "a": "no tokenizer takes it"},
        ["no object"],
    ]
    found = hub.examples(rows, "d", prompt="q", response="a", instruction="Answer.")
    assert [(e.prompt[0]["content"], e.response) for e in found] == [
        ("Answer.\n\none?", "1"), ("Answer.\n\ntwo?", "2"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no column b; the columns are a, q"):
        hub.examples(rows, "d", prompt="q", response="b")
    with pytest.raises(ConfigError, match=r"row 1: found the keys .* task\.prompt"):
        hub.examples(rows, "d", prompt=None, response=None)
    with pytest.raises(ConfigError, match="no row has both"):
        hub.examples(rows[3:], "d", prompt="q", response="a")

    file = tmp_path / "data.jsonl"
    lines = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Nothing.", "output": ""},
        ["no object"],
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8-sig")
    found = examples_of(TaskConfig(name=str(file)))
    assert [(e.prompt[0]["content"], e.response) for e in found] == [
        ("Add.\n\n1 2", "3"), ("hi", "ho"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="it cannot be loaded"):
        examples_of(TaskConfig(name=str(tmp_path / "absent.jsonl")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "poetry"}, "expected codeio, gsm8k"),
        ({"name": "a/b", "prompt": "q"}, "name both columns or neither"),
        ({"name": "codeio", "prompt": "q", "response": "a"}, "are for other data"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate(fields)
