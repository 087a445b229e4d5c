"""An ordinary Trainer on two processes (DDP over gloo) trains what it trains on one."""

from __future__ import annotations

import pytest
import torch
import trainer_runs as work
from distributed_runs import in_turn
from processes import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[layout, kind]: what each rank has returned."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, ranks, jobs in (
        ("one", 0, [("train", kind, None) for kind in work.KINDS]),
        (
            "two",
            2,
            [("train", kind, None) for kind in work.KINDS]
            + [("resume", kind, folder / f"two-{kind}") for kind in work.KINDS],
        ),
        ("one again", 0, [("resume", kind, folder / f"two-{kind}") for kind in work.KINDS]),
    ):
        tasks = [
            (work.train, folder / f"{name}-{kind}{'-resumed' if resume else ''}", kind, resume)
            for _, kind, resume in jobs
        ]
        answers = zip(*run_ranks(ranks, in_turn, tasks), strict=True)
        found |= {(name, *job[:2]): each for job, each in zip(jobs, answers, strict=True)}
    return found


kinds = pytest.mark.parametrize("kind", work.KINDS)


def assert_same(found, expected, tolerance):
    for mine in found:
        assert all(map(torch.equal, mine["params"], found[0]["params"])), "ranks have parted"
        assert mine["losses"] == found[0]["losses"]
        assert mine["steps"] == work.STEPS
        assert mine["refreshes"] == expected["refreshes"]
        for one, other in zip(mine["params"], expected["params"], strict=True):
            assert (one - other).abs().max() <= tolerance


@kinds
def test_two_processes_train_what_one_trains(results, kind):
    found, (expected,) = results["two", "train", kind], results["one", "train", kind]
    assert [mine["wrapped"] for mine in found] == ["DistributedDataParallel"] * 2
    assert {6, 9, 15, 18, 20} <= set(expected["refreshes"]), "refreshes, checkpoints and the end"
    assert_same(found, expected, 1e-5)


@kinds
def test_a_resumed_run_equals_an_uninterrupted_one(results, kind):
    assert_same(results["two", "resume", kind], results["two", "train", kind][0], 0)


@kinds
def test_a_checkpoint_of_two_processes_resumes_on_one(results, kind):
    assert_same(results["one again", "resume", kind], results["one", "train", kind][0], 1e-5)
