"""Accelerate with FSDP2 on two processes trains what one process trains, and resumes it."""

from __future__ import annotations

import accelerate_runs
import distributed_runs
import pytest
import torch
from processes import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not accelerate_runs.HAS_FSDP2, reason="this Accelerate has no FSDP2"),
]

SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
WHOLE = {"state_dict_type": "FULL_STATE_DICT"}
CASES = {
    "all parameters": ("ProjectedAdamW", {}, SHARDED),
    "weights read by the first process": (
        "ProjectedAdamW", {}, {**WHOLE, "cpu_ram_efficient_loading": True},
    ),
    "safeguard": ("safeguard(SGD)", {}, WHOLE),
    "lookahead, LoRA": ("SafetySAM", {"mode": "lookahead", "lora": True}, SHARDED),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(what each rank found uninterrupted, resumed; one process without Accelerate), by case."""
    folder = tmp_path_factory.mktemp("states")
    saved = {key: folder / str(number) for number, key in enumerate(CASES)}
    tasks = [(save, *case, saved[key]) for key, case in CASES.items()]
    tasks += [(load, *case, saved[key]) for key, case in CASES.items()]
    two = list(zip(*run_ranks(2, distributed_runs.in_turn, tasks), strict=True))
    plain = [(distributed_runs.run, "one", *case[:2]) for case in CASES.values()]
    (one,) = run_ranks(0, distributed_runs.in_turn, plain)
    return dict(
        zip(CASES, zip(two[: len(CASES)], two[len(CASES) :], one, strict=True), strict=True)
    )


def save(*task):
    return accelerate_runs.train(*task[:-1], save=task[-1])


def load(*task):
    return accelerate_runs.train(*task[:-1], load=task[-1])


@pytest.mark.parametrize("key", CASES)
def test_two_processes_train_what_one_trains(results, key):
    found, _, expected = results[key]
    for mine in found:
        assert mine["sharded"].startswith("FSDP")
        assert sum(mine["parts"]) > 0
        assert all(map(torch.equal, mine["params"], found[0]["params"])), "ranks have parted"
        assert mine["losses"] == found[0]["losses"]
        for one, other in zip(mine["params"], expected["params"], strict=True):
            assert (one - other).abs().max() < 1e-5
    assert len(expected["losses"]) == 4, "the first look and three refreshes"
    assert sum(mine["bytes"] for mine in found) == expected["bytes"], "each holds its part of U"


@pytest.mark.parametrize("key", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(results, key):
    whole, resumed, _ = results[key]
    for mine, its in zip(whole, resumed, strict=True):
        assert its["losses"] == mine["losses"]
        assert all(map(torch.equal, its["params"], mine["params"]))
