"""An ordinary Trainer on two processes (DDP, FSDP2, ZeRO; gloo) trains what it trains on one."""

from __future__ import annotations

import pytest
import torch
import trainer_runs as work
from accelerate_runs import HAS_FSDP2
from deepspeed_runs import without_compiling
from processes import run_ranks

pytestmark = pytest.mark.slow

CASES = [("ddp", kind) for kind in work.KINDS]
CASES += [("fsdp2", kind) for kind in ("safeguard", "lookahead") if HAS_FSDP2]
CASES += [("zero2", "safeguard")]
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPPeftModel",
    "zero2": "DeepSpeedEngine",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[layout, kind, resumed]: what each rank has returned."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [("one", kind, None) for kind in work.KINDS]
    again = [("one", kind, folder / f"ddp-{kind}") for kind in work.KINDS]
    both = [(*case, None) for case in CASES]
    both += [(*case, folder / "-".join(case)) for case in CASES]
    # Accelerate's state, one for the whole process, holds DeepSpeed's configuration.
    zero = [run for run in both if run[0] == "zero2"]
    found = {}
    for ranks, runs in (
        (2, [run for run in both if run not in zero]),
        (2, zero),
        (0, [*alone, *again]),
    ):
        tasks = [
            (
                work.train,
                folder / f"{layout}-{kind}{'-again' * bool(resume)}",
                layout,
                kind,
                resume,
            )
            for layout, kind, resume in runs
        ]
        answers = zip(*run_ranks(ranks, without_compiling, tasks), strict=True)
        for (layout, kind, resume), each in zip(runs, answers, strict=True):
            found[layout, kind, resume is not None] = each
    twice = (work.train_twice, folder / "twice", "zero2", "safeguard")
    (found["twice"],) = zip(*run_ranks(2, without_compiling, [twice]), strict=True)
    return found


def assert_same(found, expected, tolerance):
    for mine in found:
        assert all(map(torch.equal, mine["params"], found[0]["params"])), "ranks have parted"
        assert mine["losses"] == found[0]["losses"]
        assert mine["steps"] == work.STEPS
        assert mine["refreshes"] == expected["refreshes"]
        for one, other in zip(mine["params"], expected["params"], strict=True):
            assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_two_processes_train_what_one_trains(results, layout, kind):
    found, (expected,) = results[layout, kind, False], results["one", kind, False]
    assert [mine["wrapped"] for mine in found] == [WRAPPERS[layout]] * 2
    assert {6, 9, 15, 18, 20} <= set(expected["refreshes"]), "refreshes, checkpoints and the end"
    assert_same(found, expected, 1e-5)
    share = 0.65 if layout == "ddp" else 1.0  # lengths differ, and an odd number is made even
    for mine in found:
        assert mine["backward_tokens"] <= share * expected["backward_tokens"]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(results, layout, kind):
    assert_same(results[layout, kind, True], results[layout, kind, False][0], 0)


@pytest.mark.parametrize("kind", work.KINDS)
def test_a_checkpoint_of_two_processes_resumes_on_one(results, kind):
    assert_same(results["one", kind, True], results["one", kind, False][0], 1e-5)


def test_another_engine_for_the_same_model_keeps_the_aligned_models_loss(results):
    for mine in results["twice"]:
        assert mine["reference"] == mine["first"]
        assert mine["steps"] == 2 * work.STEPS
