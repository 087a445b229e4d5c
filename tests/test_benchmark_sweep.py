"""A whole sweep on the tiny model: stages, resuming, leaderboard, ablation, submission checks."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from full_disk import assert_pages_survive
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import tiny
from benchmarks.__main__ import app, console
from benchmarks.ablation import ablation
from benchmarks.charts import scale
from benchmarks.config import ConfigError, MethodConfig, RunConfig, SweepConfig
from benchmarks.frontier import Outcome
from benchmarks.leaderboard import _frontier, leaderboard, markdown
from benchmarks.records import Failure, read_result, write_result
from benchmarks.run import run
from benchmarks.standings import standings
from benchmarks.submit import check_method, check_result
from benchmarks.sweep import sweep

QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def short_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "STEPS", 60)
        tiny._kept_state.cache_clear()
        yield
    tiny._kept_state.cache_clear()


def plain() -> dict:
    return {
        "model": {"name": "tiny"},
        "task": {"name": "tiny", "max_length": 64, "eval_examples": 8, "val_examples": 8},
        "batch_size": 8,
        "steps": 4,
        "learning_rate": 2e-3,
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "seeds": [0, 1],
        "tuning": {"seeds": [5]},
        "long": 2,
        "methods": [
            {"name": "adamw", "grid": {"learning_rate": [2e-3, 4e-3]}},
            {"name": "replay", "grid": {"weight": [1.0, 3.0]}},
            {"name": "projected_adamw", "held": True, "learning_rate": 4e-3},
        ],
        "evaluation": {
            "every": 2,
            "alignment_prompts": 6,
            "refusal_prompts": 4,
            "over_refusal_prompts": 4,
            "new_tokens": 4,
            "harmless_kl": True,
            "separation": True,
            "metric_examples": 2,
        },
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "sweep.yaml"
    path.write_text(yaml.safe_dump(plain()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    assert sweep(SweepConfig.model_validate(plain()), out, QUIET) == 0
    for stage in ("val", "test", "long"):  # as from a clean checkout
        path = out / stage / "result.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        result["environment"]["commit"] = "0" * 40
        path.write_text(json.dumps(result), encoding="utf-8")
    return out


def test_the_stages_are_tuned_published_and_long(folder: Path):
    val, test, long = (read_result(folder / stage) for stage in ("val", "test", "long"))
    assert (len(val.records), len(long.records)) == (5, 6)
    # Both seeds of every choice, and of the other grid points that are on their frontiers.
    assert len(test.records) == 2 * len(test.config["methods"])
    assert 3 <= len(test.config["methods"]) <= 5
    assert {record.seed for record in val.records} == {5}
    assert {record.seed for record in test.records} == {0, 1}
    assert {record.steps for record in long.records} == {8}
    assert val.start.task_loss != test.start.task_loss  # other held-out examples
    assert val.start.prompts != test.start.prompts  # other prompts
    assert test.start.prompts == long.start.prompts
    best = min(
        (r for r in val.records if r.method.startswith("adamw")), key=lambda r: r.task_loss.end
    )
    assert test.config["methods"][0]["label"] == best.method


def test_a_sweep_goes_on_where_it_was_left(folder: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "long")
    result = read_result(out / "test")
    whole = result.model_dump()
    result.records.pop()
    (out / "test" / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    methods = [*plain()["methods"], {"name": "sam"}]  # and another method takes part
    changed = SweepConfig.model_validate({**plain(), "methods": methods, "long": None})
    ran = []
    from benchmarks.bench import Bench

    inner = Bench.run
    monkeypatch.setattr(
        Bench,
        "run",
        lambda self, m, seed, *rest: ran.append((m.name, seed)) or inner(self, m, seed, *rest),
    )
    assert sweep(changed, out, QUIET) == 0
    lost = whole["records"][-1]
    assert ran == [("sam", 5), ("sam", 0), ("projected_adamw", lost["seed"]), ("sam", 1)]
    again = read_result(out / "test")
    found = again.find(lost["method"], lost["seed"])
    assert found.curve[-1].prompts == lost["curve"][-1]["prompts"]
    assert again.records[0].model_dump() == whole["records"][0]
    kept = (out / "sweep.json").read_bytes()
    for other in ({"steps": 5}, {"seeds": [0, 1, 2]}):  # refused by val, and by test only
        with pytest.raises(ConfigError, match="the result of another config"):
            sweep(SweepConfig.model_validate({**plain(), **other}), out, QUIET)
        assert (out / "sweep.json").read_bytes() == kept, "it says what was run"


def test_methods_can_be_taken_out_although_nothing_is_left_to_run(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    result = read_result(out / "test")
    result.failures = [Failure(method="projected_adamw", seed=0, error="gone with its method")]
    write_result(result, out / "test")
    fewer = SweepConfig.model_validate({**plain(), "methods": plain()["methods"][:2]})
    assert sweep(fewer, out, QUIET) == 0
    found = standings(out)
    assert {row.method for row in found.rows} == {"adamw", "replay"}
    assert found.failures == ()


def test_the_leaderboard_shows_every_method_with_its_interval(folder: Path):
    found = standings(folder)
    assert {row.method for row in found.rows} == {"adamw", "replay", "projected_adamw"}
    base = next(row for row in found.rows if row.method == "adamw")
    test = read_result(folder / "test")
    ends = [r.task_loss.end for r in test.records if r.method == test.config["methods"][0]["label"]]
    assert base.task == pytest.approx(sum(ends) / 2)
    assert found.target == pytest.approx(1.01 * base.task)
    assert base.removed is None or base.removed.value == pytest.approx(0)
    for row in found.rows:
        assert row.long_rise is not None
        assert row.passes[0] == 4
        assert len(row.curves) == 2
    assert [row.ours for row in found.rows if row.method == "projected_adamw"] == [True]

    done = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    assert page.count("<tr class=") == 3
    assert page.count('role="img"') == 4
    text = (folder / "leaderboard.md").read_text(encoding="utf-8")
    assert text == markdown(found)
    assert "**projected_adamw**" in text
    assert "| adamw | baseline |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {10}
    start = found.start_separation
    assert start.value == found.test.start.separation
    assert f"| {start.value:.3f} [{start.low:.3f}, {start.high:.3f}] | |" in table[2]
    for row in found.rows:
        assert row.separation_interval.value == pytest.approx(row.separation)
        shown = f"[{row.separation_interval.low:.3f}, {row.separation_interval.high:.3f}]"
        assert shown in page
        assert shown in text
    pages = (folder / "leaderboard.md", folder / "leaderboard.html")
    assert_pages_survive(lambda: leaderboard(folder, QUIET), *pages)


def test_who_had_harmless_prompts_is_told(folder: Path):
    leaderboard(folder, QUIET)
    told = "Beside harmful prompts, projected adamw had harmless ones to keep answered"
    assert told in (folder / "leaderboard.md").read_text(encoding="utf-8")
    assert told in (folder / "leaderboard.html").read_text(encoding="utf-8")
    for fields, given in (
        ({"name": "replay", "answers": 3}, True),
        ({"name": "repair"}, True),
        ({"name": "kl_reference"}, False),
    ):
        assert MethodConfig.model_validate(fields).given_harmless() == given


def test_results_from_before_the_prompts_scores_have_no_interval(folder: Path, tmp_path: Path):
    whole = standings(folder)
    path = tampered(folder, tmp_path / "some", "test", one_without_scores) / "test"
    found = standings(path.parent)
    assert sum(row.separation_interval is None for row in found.rows) == 1
    assert found.start_separation is not None
    older = standings(tampered(folder, tmp_path / "all", "test", without_scores))
    assert older.start_separation is None
    for row, other in zip(older.rows, whole.rows, strict=True):
        assert (row.separation, row.separation_interval) == (other.separation, None)
    text = markdown(older)
    assert "Its 95% intervals" in markdown(whole)
    assert "Its 95% intervals" not in text
    assert f"| {older.test.start.separation:.3f} | |" in text
    leaderboard(tmp_path / "all", QUIET)


def test_the_records_order_is_of_no_consequence(folder: Path, tmp_path: Path):
    """An interrupted sweep has them in the order in which they were finished."""

    def backwards(result: dict) -> None:
        first = result["records"][0]["method"]
        mine = [r for r in result["records"] if r["method"] == first]
        result["records"] = mine[::-1] + [r for r in result["records"] if r["method"] != first]

    found = standings(tampered(folder, tmp_path / "out", "test", backwards))
    assert found.rows == standings(folder).rows


def test_a_line_joins_what_no_other_point_dominates(folder: Path):
    found = standings(folder)
    row = found.rows[0]
    worse = Outcome(row.task + 0.1, row.alignment + 0.1)
    drawn = _frontier(replace(found, rows=(replace(row, points=(row.points[0], worse)),)))
    (method,) = drawn["methods"]
    assert len(method["others"]) == 1
    assert method["line"].count("L") == 0


def test_the_terminal_tells_grid_points_apart(folder: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(folder / "val", tmp_path / "val")
    # COLUMNS is not looked at any more where it was set when the module was imported.
    monkeypatch.setattr(console, "_width", 200)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "val")], catch_exceptions=False)
    assert "adamw[learning_rate=0.002]" in done.output
    assert "adamw[learning_rate=0.004]" in done.output


def test_failed_and_missing_runs_are_told(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    result = read_result(out / "test")
    key = next(m["label"] for m in result.config["methods"] if m["name"] == "projected_adamw")
    lost = next(r for r in result.records if r.method == key)
    result.records.remove(lost)
    changed = result.model_dump(mode="json")
    changed["failures"] = [{"method": key, "seed": lost.seed, "error": "out of <memory>"}]
    (out / "test" / "result.json").write_text(json.dumps(changed), encoding="utf-8")
    assert "projected_adamw" not in {row.method for row in standings(out).rows}
    CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False)
    page = (out / "leaderboard.html").read_text(encoding="utf-8")
    assert "out of &lt;memory&gt;" in page


def test_no_other_point_takes_the_place_of_the_choice(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    long = read_result(out / "long")
    ours = next(m for m in long.config["methods"] if m["name"] == "projected_adamw")
    ours["learning_rate"] = 1e-3  # left from an earlier choice
    write_result(long, out / "long")
    rises = {row.method: row.long_rise for row in standings(out).rows}
    assert {method for method, rise in rises.items() if rise is None} == {"projected_adamw"}

    result = read_result(out / "test")
    choice, other = (m["label"] for m in result.config["methods"] if m["name"] == "adamw")
    result.records = [r for r in result.records if (r.method, r.seed) != (choice, 0)]
    assert sum(record.method == other for record in result.records) == 2
    write_result(result, out / "test")
    with pytest.raises(ConfigError, match="adamw has not finished with every seed"):
        standings(out)

    result = read_result(folder / "test")
    result.records = [r for r in result.records if r.method.split("[")[0] != "projected_adamw"]
    write_result(result, out / "test")
    found = standings(out)
    assert "projected_adamw" not in {row.method for row in found.rows}
    assert found.failures == ("test: projected_adamw: what was chosen has not run with every seed",)


def test_a_result_whose_method_is_gone_is_told(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    result = read_result(out / "test")
    result.config["methods"][-1]["name"] = "gone.py:Mine"
    write_result(result, out / "test")
    for read in (standings, check_result):
        with pytest.raises(ConfigError, match=r"gone\.py:Mine'?: this method cannot"):
            read(out)


def test_an_ablation_has_a_panel_for_each_option(tmp_path: Path):
    fields = {k: v for k, v in plain().items() if k not in ("tuning", "long")}
    fields["methods"] = [
        {"name": "adamw"},
        {"name": "projected_adamw", "vary": {"rank": [1, 4], "held": [True]}},
    ]
    run(RunConfig.model_validate(fields), tmp_path, QUIET)
    done = CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "ablation.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 3
    assert page.count('class="small"') == 4 * 2
    lines = (tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1:3] for line in lines[3:]] == [
        [" rank ", " 1 "], [" rank ", " 4 "], [" held ", " true "],
    ]  # fmt: skip
    assert all(len(line.split("|")) == 9 for line in lines)
    seeds = [line.split("|")[6].split(",") for line in lines[2:]]
    assert {len(rates) for rates in seeds} == {len(fields["seeds"])}
    pages = (tmp_path / "ablation.md", tmp_path / "ablation.html")
    assert_pages_survive(lambda: ablation(tmp_path, QUIET), *pages)


def test_the_grid_points_of_a_stage_are_no_ablation(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "val", tmp_path / "val")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "val")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    pages = {path.name for path in (tmp_path / "val").iterdir()}
    assert "report.html" in pages
    assert "ablation.html" not in pages
    assert "adamw[learning rate=0.002]" in (tmp_path / "val" / "report.html").read_text("utf-8")


def test_scales_have_round_ticks_and_hold_everything():
    found = scale([0.013, 0.087], 0, 100)
    assert [label for _, label in found.ticks] == ["0.02", "0.04", "0.06", "0.08"]
    assert 0 <= found(0.013) < found(0.087) <= 100
    assert scale([3.0, 3.0], 10, 20)(3.0) == pytest.approx(15)
    assert scale([1, 5, float("inf")], 0, 1, zero=True).low == 0
    assert scale([1000, 9000], 300, 0)(1000) > scale([1000, 9000], 300, 0)(9000)


def test_a_scale_is_logarithmic_where_small_values_would_fall_together():
    found = scale([0.008, 0.02, 4.0], 0, 100, zero=True, wide=True)
    assert found.log
    assert [label for _, label in found.ticks] == ["0.01", "0.1", "1"]
    assert 0 <= found(0.008) < found(0.02) - 10 < found(4.0) <= 100
    for values in ([0.0, 0.02, 4.0], [-1.0, 500.0], [0.1, 4.0]):
        assert not scale(values, 0, 100, zero=True, wide=True).log


def test_the_terminal_shows_every_column_in_80_characters(folder: Path, tmp_path: Path):
    out = tmp_path / "sweep"
    shutil.copytree(folder, out)
    narrow = Console(record=True, width=80)
    leaderboard(out, narrow)
    found, shown = standings(out), narrow.export_text()
    for row in found.rows:
        assert f"{row.separation:.3f}" in shown
        assert f"{row.share:.1%}" in shown
    head = shown[: shown.index("─")].split()
    assert head.count("ration") == 1
    assert head[-1] == "safety"


# --- submissions ---


def test_an_honest_result_passes(folder: Path, config: Path):
    answered, problems = check_result(folder, config)
    assert problems == []
    assert answered.model.name == "tiny"
    done = CliRunner().invoke(app, ["submit", str(folder), "--config", str(config)])
    assert done.exit_code == 0, done.output
    assert "passes" in done.output


def test_the_config_that_a_result_answers_is_found(
    folder: Path, config: Path, tmp_path: Path, monkeypatch
):
    """Not the first one with its model and task: that may be a shorter form."""
    shutil.copy(config, tmp_path / "sweep.yaml")
    short = {"extends": "sweep.yaml", "seeds": [0], "long": None}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
    monkeypatch.setattr("benchmarks.submit.CONFIGS", tmp_path)
    answered, problems = check_result(folder)
    assert answered.seeds == (0, 1)
    assert problems == []


def tampered(folder: Path, out: Path, stage: str, change) -> Path:
    shutil.copytree(folder, out)
    path = out / stage / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")
    return out


def better(result: dict) -> None:
    for record in result["records"]:
        record["alignment_loss"]["end"] *= 0.5


def better_curve(result: dict) -> None:
    better(result)
    for record in result["records"]:
        record["curve"][-1]["alignment_loss"] *= 0.5


def more_steps(result: dict) -> None:
    result["config"]["steps"] = 8


def one_seed_less(result: dict) -> None:
    result["records"] = [r for r in result["records"] if r["seed"] != 1]


def other_choice(result: dict) -> None:
    """Another weight than the one that the runs on val choose, everywhere."""
    for entry in result["config"]["methods"]:
        if entry["name"] == "replay":
            old, entry["weight"] = entry["label"], 7.0
            entry["label"] = f"{old}*"
            for record in result["records"]:
                if record["method"] == old:
                    record["method"] = entry["label"]


def without_scores(result: dict) -> None:
    """As written before they were kept."""
    for holder in (result["start"], *result["records"]):
        del holder["refusal_nll"]


def one_without_scores(result: dict) -> None:
    del result["records"][0]["refusal_nll"]


def better_separation(result: dict) -> None:
    for record in result["records"]:
        record["separation"]["end"] = 0.99


def easier_prompts(result: dict) -> None:
    """Without one that is hard to tell apart."""
    for record in result["records"]:
        record["refusal_nll"]["harmless"].pop()


def lucky_rate(result: dict) -> None:
    result["records"][0]["refusal_rate"]["end"] = 0.99


def uncommitted(result: dict) -> None:
    result["environment"]["commit"] += "+"


def continued_uncommitted(result: dict) -> None:
    result["continued"] = [result["environment"] | {"commit": "1" * 40 + "+"}]


def weak_baseline(result: dict) -> None:
    for entry in result["config"]["methods"]:
        if entry["label"] == "adamw[learning_rate=0.004]":
            entry["learning_rate"] = 0.4


def other_rate(result: dict) -> None:
    result["config"]["learning_rate"] = 0.1


def other_start(result: dict) -> None:
    """The leaderboard counts the rise from here."""
    result["start"]["prompts"] = [2 * loss for loss in result["start"]["prompts"]]


def free_of_charge(result: dict) -> None:
    for record in result["records"]:
        record["seconds"]["total"] -= record["seconds"]["safety"]
        record["seconds"]["safety"] = 0.0


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (better, "test", "alignment_loss.end"),
        (better_curve, "test", "step 4's alignment loss"),
        (more_steps, "test", "config.steps: 8, the published config has 4"),
        (more_steps, "val", "val: config.steps"),
        (one_seed_less, "test", "seed 1: no record"),
        (other_choice, "test", "not what the runs on val choose"),
        (better_separation, "test", "separation.end: 0.99, but the prompts' scores give"),
        (easier_prompts, "test", "refusal_nll at the end: not of 4 and 4 prompts"),
        (without_scores, "test", "refusal_nll at the start: not of 4 and 4 prompts"),
        (lucky_rate, "test", "is no share of 4 prompts"),
        (uncommitted, "test", "not committed"),
        (continued_uncommitted, "test", "not committed"),
        (weak_baseline, "val", "adamw has another grid than the published one"),
        (other_rate, "test", "config.learning_rate: 0.1, the published config has 0.002"),
        (other_start, "test", "not those of the start"),
        (free_of_charge, "test", "no time for safety passes"),
        (better, "long", "long: adamw"),
        (one_seed_less, "long", "seed 1: no record"),
    ],
)
def test_results_that_were_changed_are_refused(
    folder: Path, config: Path, tmp_path: Path, change, stage: str, message: str
):
    _, problems = check_result(tampered(folder, tmp_path / "out", stage, change), config)
    assert any(message in problem for problem in problems), problems


def test_the_long_runs_are_part_of_a_result(folder: Path, config: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "long")
    with pytest.raises(ConfigError, match=r"long.result\.json: not there"):
        check_result(out, config)


def test_methods_are_checked_by_what_they_do(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import random\n"
        "from benchmarks.methods.adamw import AdamW\n"
        "from benchmarks.methods.base import joined\n"
        "from safeopt import refusal_nll\n"
        "class Good(AdamW):\n"
        "    def after_backward(self):\n"
        "        batch = joined(self.setup.safety[:2])\n"
        "        with self.cost.clock():\n"
        "            refusal_nll(self.setup.model, batch).mean().backward()\n"
        "        self.cost.add(batch, backward=True)\n"
        "class Hides(Good):\n"
        "    def after_backward(self):\n"
        "        refusal_nll(self.setup.model, joined(self.setup.safety[:2])).mean().backward()\n"
        "class Idle(AdamW):\n"
        "    def step(self, task_loss):\n"
        "        return float(task_loss().detach())\n"
        "class Chance(AdamW):\n"
        "    def after_backward(self):\n"
        "        for p in self.setup.params:\n"
        "            p.grad *= random.SystemRandom().random()\n"
        "            p.grad.pow_(3)\n"
        "class Raises(AdamW):\n"
        "    def finish(self):\n"
        "        raise KeyError('x')\n",
        encoding="utf-8",
    )
    assert check_method(f"{file}:Good") == []
    for name, message in (
        ("Hides", "count every pass"),
        ("Idle", "it does not learn"),
        ("Chance", "two runs with one seed differ"),
        ("Raises", "it raises KeyError"),
    ):
        problems = check_method(f"{file}:{name}")
        assert any(message in problem for problem in problems), (name, problems)
    done = CliRunner().invoke(app, ["submit", "--method", f"{file}:Hides"])
    assert done.exit_code == 1
    assert "count every pass" in done.output.replace("\n", " ")
