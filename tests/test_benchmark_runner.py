"""Runs in processes and on Ray: equal to runs in one process, and a crash costs one run only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scipy.stats import mannwhitneyu

from benchmarks.bench import Bench
from benchmarks.config import ConfigError, RunConfig
from benchmarks.jobs import Processes, RayCluster, _serve_parent, _started
from benchmarks.records import read_result
from benchmarks.run import run
from benchmarks.separation import separation
from benchmarks.tasks import refusal_row

QUIET = Console(quiet=True)

METHODS = """
import os, signal
from benchmarks.methods.adamw import AdamW

class Raises(AdamW):
    def after_step(self):
        raise RuntimeError("a bug of its own")

class Dies(AdamW):
    def after_step(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Diverges(AdamW):
    def after_step(self):
        for parameter in self.setup.params:
            parameter.data.fill_(float("nan"))
"""


def config(methods: list[dict], seeds: tuple[int, ...] = (0,)) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "tiny"},
            "task": {"name": "tiny", "max_length": 64, "eval_examples": 8, "val_examples": 8},
            "batch_size": 8,
            "steps": 4,
            "learning_rate": 2e-3,
            "lora": {"target_modules": ["q_proj", "v_proj"]},
            "seeds": list(seeds),
            "threads": 1,
            "methods": methods,
            "evaluation": {
                "every": 2,
                "alignment_prompts": 6,
                "refusal_prompts": 4,
                "over_refusal_prompts": 4,
                "new_tokens": 4,
                "harmless_kl": True,
                "separation": True,
                "per_prompt": True,
                "metric_examples": 2,
            },
        }
    )


def comparable(result) -> dict:
    """Everything but timings, memory and where it was run."""

    def without(value):
        if isinstance(value, dict):
            gone = ("seconds", "peak_bytes", "environment")
            return {key: without(inner) for key, inner in value.items() if key not in gone}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return without(result.model_dump(mode="json"))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The reference: all runs in this process."""
    return run(
        config([{"name": "adamw"}, {"name": "replay"}], (0, 1)), _new(tmp_path_factory), QUIET
    )


def _new(factory) -> Path:
    return factory.mktemp("result")


def test_a_record_has_what_the_config_asks_for(here):
    record = here.records[0]
    assert [(r.method, r.seed) for r in here.records] == [
        ("adamw", 0), ("replay", 0), ("adamw", 1), ("replay", 1),
    ]  # fmt: skip
    for point in record.curve:
        assert sum(point.prompts) / 6 == pytest.approx(point.alignment_loss, rel=1e-4)
    assert record.harmless_kl > 0
    assert 0 <= record.task_metric.end <= 1
    assert record.separation.start == here.start.separation == separation(here.start.refusal_nll)
    assert record.separation.end == separation(record.refusal_nll)
    assert (len(record.refusal_nll.harmful), len(record.refusal_nll.harmless)) == (4, 4)
    assert len(here.start.answers) == 4


def test_separation_is_the_area_under_the_roc_curve():
    bench = Bench(config([{"name": "adamw"}]))
    material, tokenizer = bench.material, bench.evaluator.tokenizer

    def score(prompt: str) -> float:
        """The refusal's log-likelihood, one example at a time."""
        row = refusal_row(tokenizer, prompt)
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = bench.model(ids[None]).logits[0, :-1].double()
        where = labels[1:] != -100
        return float(logits.log_softmax(-1)[where].gather(1, labels[1:][where, None]).sum())

    harmful, harmless = (
        [score(prompt) for prompt in prompts] for prompts in (material.harmful, material.harmless)
    )
    area = mannwhitneyu(harmful, harmless).statistic / (len(harmful) * len(harmless))
    assert bench.measure_start().separation == area
    # Prompts that cannot be told apart.
    bench.evaluator.material = replace(material, harmless=material.harmful)
    assert separation(bench.evaluator.refusal_nll(bench.model)) == 0.5


def test_prompts_scores_are_kept_for_intervals_only():
    wanted = config([{"name": "adamw"}])
    bench = Bench(wanted.model_copy(update={"evaluation": wanted.evaluation.model_copy(
        update={"per_prompt": False}
    )}))  # fmt: skip
    start = bench.measure_start()
    record = bench.run(bench.config.methods[0], 0, start, lambda *_: None, lambda _: None)
    assert start.refusal_nll is record.refusal_nll is None
    assert record.separation.start == start.separation is not None


def test_processes_give_the_same_json_as_one_process(here, tmp_path: Path):
    both = run(
        config([{"name": "adamw"}, {"name": "replay"}], (0, 1)), tmp_path, QUIET, Processes(2)
    )
    assert comparable(both) == comparable(here)
    assert comparable(read_result(tmp_path)) == comparable(here)


def test_a_crash_costs_one_run_and_is_tried_again(here, tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text(METHODS, encoding="utf-8")
    broken = [{"name": f"{file}:{name}", "label": name} for name in ("Raises", "Dies", "Diverges")]
    wanted = config([*broken, {"name": "adamw"}])
    result = run(wanted, tmp_path / "out", QUIET, Processes(2))
    assert [record.method for record in result.records] == ["adamw"]
    assert result.records[0].curve[-1].task_loss == here.records[0].curve[-1].task_loss
    errors = {failure.method: failure.error for failure in result.failures}
    assert errors["Raises"].startswith("RuntimeError: a bug of its own (broken.py:")
    assert "SIGKILL" in errors["Dies"]
    assert "DivergedError: step 2: task loss nan" in errors["Diverges"]

    file.write_text(METHODS.replace("raise RuntimeError", "str"), encoding="utf-8")
    again = run(wanted, tmp_path / "out", QUIET, Processes(2))
    assert [record.method for record in again.records] == ["Raises", "adamw"]
    assert [failure.method for failure in again.failures] == ["Dies", "Diverges"]


def test_what_the_starting_point_lacks_is_told_as_in_one_process(tmp_path: Path):
    fields = config([{"name": "adamw"}]).as_json()
    fields["evaluation"]["refusal_prompts"] = 10_000
    with pytest.raises(ConfigError, match="refusal_prompts=10000: there are only"):
        run(RunConfig.model_validate(fields), tmp_path, QUIET, Processes(1))


def _working(connection) -> None:
    _serve_parent()
    connection.send("at work")
    time.sleep(3600)


def _killed(connection) -> None:
    """A parent that is killed while its child is at work."""
    work, child = _started(_working)
    assert work.recv() == "at work"
    connection.send(child.pid)
    os.kill(os.getpid(), signal.SIGKILL)


def test_child_processes_end_with_their_parent():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    parent = context.Process(target=_killed, args=(theirs,))
    parent.start()
    theirs.close()
    child = ours.recv()
    parent.join()
    limit = time.monotonic() + 120
    while _runs(child) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ray_gives_the_same_json_as_one_process(here, tmp_path: Path):
    pytest.importorskip("ray")
    file = tmp_path / "broken.py"
    file.write_text(METHODS, encoding="utf-8")
    wanted = config([{"name": "adamw"}, {"name": f"{file}:Raises", "label": "Raises"}])
    terminated = signal.getsignal(signal.SIGTERM)
    result = run(wanted, tmp_path / "out", QUIET, RayCluster("local", threads=1))
    assert signal.getsignal(signal.SIGTERM) is terminated
    (record,) = comparable(result)["records"]
    assert record == comparable(here)["records"][0]
    (failure,) = result.failures
    assert failure.error.startswith("RuntimeError: a bug of its own")
