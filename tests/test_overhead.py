"""`python -m benchmarks overhead` on a toy: what is counted, in which order, what is written."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks import tiny
from benchmarks.__main__ import app
from benchmarks.config import CONFIGS
from benchmarks.overhead import optimizer_step, timing, training_step
from benchmarks.overhead.run import TARGETS


def test_runs_are_interleaved_and_the_warm_up_is_not_counted(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing, "clock", lambda: clock[0])
    monkeypatch.setattr(timing, "process_time", lambda: clock[0] / 2)

    def run(name, seconds):
        calls.append(name)
        clock[0] += seconds * len(calls)  # the machine slows down

    seconds, busy = timing.interleaved(
        {"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)}, rounds=3, warm_up=1
    )
    assert "".join(calls) == "abbaabba"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert seconds["b"] == [6.0, 12.0, 14.0]
    assert timing.ratio(seconds, "b", "a") == pytest.approx(14 / 8)  # of 6/4, 12/5 and 14/8
    assert timing.milliseconds(seconds)["a"] == 5000.0
    assert busy["a"] == [2.0, 2.5, 4.0]


def test_a_result_is_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 2)
    monkeypatch.setattr(optimizer_step, "SHAPES", [(2, 40), (40, 2)])
    tiny._kept_state.cache_clear()
    config = yaml.safe_load((CONFIGS / "demo-tiny.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"batch_size": 2}), encoding="utf-8")
    taken = []
    pulled = []
    original = training_step._Rival.step

    def step(self):
        before = [p.detach().clone() for p in self.optimizer.param_groups[0]["params"]]
        passes = None if self.adapter == "AdamW" else self.optimizer.safety.passes.forward
        original(self)
        moved = any(
            not p.equal(b)
            for p, b in zip(self.optimizer.param_groups[0]["params"], before, strict=True)
        )
        if passes is not None:
            assert self.optimizer.safety.passes.forward == passes, "a refresh was timed"
            pull = self.optimizer.safety.pull
            pulled.append(pull is not None and pull.trace > 0)
        taken.append((self.adapter, moved))

    monkeypatch.setattr(training_step._Rival, "step", step)
    arguments = ["overhead", "--config", str(path), "--rounds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    tiny._kept_state.cache_clear()
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(TARGETS) == set(result["targets"]) < set(result)
    assert all(result[name] > 0 for name in ("elastic_optimizer_step_ratio", *TARGETS))
    assert "ProjectedAdamW, elastic" in result["optimizer_step_milliseconds"]
    assert all(result["cpu_time"][name] > 0 for name in TARGETS)
    assert result["rank"]["optimizer_step"] == 32
    assert 25 <= result["rank"]["training_step"] <= 32
    assert result["parameters"]["optimizer_step"] == 160
    assert len(taken) == 3 * 5  # two rounds of warm-up, one measured
    assert sum(pulled) == 3, "one of the optimizers pulls, in every step"
    assert all(moved for _, moved in taken)
    assert all(name in done.output for name in ("elastic_optimizer_step_ratio", *TARGETS))
