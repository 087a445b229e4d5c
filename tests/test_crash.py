"""Training that is killed at a random step, and resumed in another process, ends bit-identical."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crash_run import BUILD, build, main

import safeopt

ROOT = Path(__file__).parents[1]  # the child imports the safeopt beside it, wherever it starts
STEPS = 10
# What torch.load raises depends on where the file ends.
HALF_A_FILE = (RuntimeError, EOFError, OSError, pickle.UnpicklingError)


def latest(folder: Path) -> Path:
    return max(folder.glob("step-*.pt"), key=lambda path: int(path.stem.split("-")[1]))


def assert_same(left, right):
    """Two states, equal bit for bit but for the clock."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            if key != "seconds":
                assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left.nan_to_num(), right.nan_to_num())
    else:
        assert left == right


@pytest.mark.slow
def test_killed_and_resumed_runs_end_bit_identical(tmp_path, request):
    """All optimizers at once, each in its own process, killed with SIGKILL in the middle of work.

    The step at which each is killed is random and different every time this test runs.
    """
    running = {}
    request.addfinalizer(lambda: [process.kill() for process in running.values()])
    for name in BUILD:
        folder = tmp_path / name
        folder.mkdir()
        running[name] = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("crash_run.py"), name, folder, str(10**6)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    for name, process in running.items():
        assert process.stdout.readline().strip() == safeopt.__file__
        at = random.randint(3, STEPS - 1)
        while int(process.stdout.readline()) < at:  # ValueError: it has ended by itself
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # The pipe may hold steps that were made meanwhile; what counts is the last checkpoint.
        for path in (tmp_path / name).glob("step-*.pt"):
            if int(path.stem.split("-")[1]) > at:
                path.unlink()
        main(name, tmp_path / name, STEPS)  # resumed, in this process
        whole = tmp_path / f"{name}-whole"
        whole.mkdir()
        main(name, whole, STEPS)
        ends = [torch.load(latest(f), weights_only=True) for f in (tmp_path / name, whole)]
        assert ends[0]["step"] == STEPS
        assert_same(*ends)
        assert ends[0]["optimizer"]["safety"]["last_refresh"] == 9


@pytest.mark.parametrize("name", BUILD)
def test_half_a_file_is_no_checkpoint(name, tmp_path):
    """A checkpoint cut off anywhere does not load; one whose bytes were changed is refused too."""
    main(name, tmp_path, 4)
    path = latest(tmp_path)
    whole = path.read_bytes()
    for part in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(HALF_A_FILE):
            torch.load(path, weights_only=True)
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)["optimizer"]
    model, optimizer = build(name)
    before = [p.detach().clone() for p in model.parameters()]
    tampered = {
        "no geometry": {k: v for k, v in state.items() if k != "safety"},
        "another version": {**state, "safety": {**state["safety"], "version": 1}},
        "no subspace entry": {
            **state,
            "safety": {k: v for k, v in state["safety"].items() if k != "subspace"},
        },
        "a negative count": {**state, "safety": {**state["safety"], "step_count": -4}},
    }
    for bad in tampered.values():
        with pytest.raises(ValueError, match="state_dict") as refused:
            optimizer.load_state_dict(bad)
        assert re.fullmatch(r"state_dict.+", str(refused.value)), "one sentence, no traceback"
        assert optimizer.safety.step_count == 0
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.load_state_dict(state)
    assert optimizer.safety.step_count == 4
