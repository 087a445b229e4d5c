"""The example's analytic system equals its closed forms, and the whole example runs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "orthogonality_is_unstable.py"


def test_the_analytic_system_follows_the_law():
    names = runpy.run_path(str(EXAMPLE))
    found = names["analytic"]()
    assert found["coupling"]["measured"] == pytest.approx(found["coupling"]["exact"], rel=1e-6)
    assert found["overlap"] == pytest.approx(0, abs=1e-6)
    assert found["fit"]["exponent"] == pytest.approx(4, abs=0.1)
    assert found["verdict"] == "at risk"
    breach = found["breach"]
    assert breach["forecast"] == pytest.approx(breach["measured"], rel=0.05)
    model = names["Analytic"]()
    for step, rise in found["curve"]:
        assert rise == pytest.approx(model.rise(step, 2e-3), rel=1e-6, abs=1e-14)


def test_the_example_runs_and_writes_its_plots(tmp_path):
    root = EXAMPLE.parents[1]
    settings = {"SAFEOPT_TINY": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--out", str(tmp_path)],
        env=os.environ | settings, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "instability.json").read_text())
    raw, orthogonal = (run["fit"]["exponent"] for run in results["transformer"])
    assert orthogonal > raw + 0.5, "made orthogonal, the loss starts later and rises faster"
    assert (tmp_path / "analytic.svg").read_text().startswith("<?xml")
