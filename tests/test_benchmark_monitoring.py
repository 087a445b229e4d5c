"""The monitor on real runs, here on the toy model: what is written agrees with itself."""

from __future__ import annotations

import json

from rich.console import Console

from benchmarks.config import CONFIGS, MethodConfig, load_config
from benchmarks.monitoring import Watch, monitoring
from benchmarks.records import FILE


def config(*methods, steps=6):
    base = load_config(CONFIGS / "optimizers-tiny.yaml")
    chosen = tuple(MethodConfig.model_validate(method) for method in methods)
    return base.model_copy(update={"methods": chosen, "seeds": (0,), "steps": steps})


def test_unprotected_runs_are_rolled_back_and_protected_ones_are_judged(tmp_path):
    both = config({"name": "adamw"}, {"name": "projected_adamw", "held": True})
    watch = Watch(budget=1e-4, every=2, examples=4)
    found = monitoring(both, watch, tmp_path, Console(quiet=True))
    assert json.loads((tmp_path / FILE).read_text())["protected_runs"] == found["protected_runs"]
    plain, ours = found["runs"]
    assert (plain["protected"], ours["protected"]) == (False, True)
    assert plain["rollbacks"] == sum(check["rolled_back"] for check in plain["checks"]) > 0
    assert ours["rollbacks"] == 0
    assert [check["step"] for check in ours["checks"]] == [2, 4, 6]
    for run in found["runs"]:
        for check in run["checks"]:
            limit = found["start"]["alignment_loss"] + watch.budget
            assert check["unseen_within"] == (check["unseen_alignment_loss"] <= limit)
    counts = found["protected_runs"]
    judged = [(check["alarm"], check["unseen_within"]) for check in ours["checks"]]
    assert counts == {
        "checks": 3,
        "alarms": judged.count((True, True)) + judged.count((True, False)),
        "false_alarms": judged.count((True, True)),
        "missed": judged.count((False, False)),
    }
