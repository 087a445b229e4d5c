"""DeepSpeed ZeRO 1 and 2 train what one process trains (gloo, on the CPU)."""

from __future__ import annotations

import deepspeed_runs as work
import pytest
import torch
from distributed_runs import in_turn
from processes import run_ranks
from tiny_models import safety_batch, tiny_llama, trainable

from safeopt import SafetyProbe
from safeopt.distributed import Range

pytest.importorskip("deepspeed")

RUNS = {
    "zero1": (work.run, 1),
    "zero2": (work.run, 2),
    "zero2 lora": (work.run, 2, True),
}
TASKS = {
    1: {"zero2": RUNS["zero2"], "hooked": (work.hooked,)},
    2: {
        **RUNS,
        "save": (work.save, 2, work.MIDDLE),
        "resume": (work.resume, 2, work.MIDDLE),
        "uninterrupted": (work.uninterrupted, 2, work.MIDDLE),
        "half": (work.half, 1),
        "unprotected": (work.with_a_group_unprotected,),
        "clipped": (work.clipped, 2),
        "overflow": (work.not_finite_on_one_rank,),
        "warned": (work.not_finite_but_warned,),
        "skipped": (work.skipped_batch,),
        "failed": (work.failed_refresh,),
        "offloaded": (work.offloaded,),
        "destroyed": (work.destroyed,),
        "refusals": (work.refusals,),
        "example": (work.example,),
    },
    3: RUNS,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[ranks][task]: what each rank has returned."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for ranks, tasks in TASKS.items():
        placed = [
            (task[0], folder / "run", *task[1:])
            if name in ("save", "resume", "example", "refusals")
            else task
            for name, task in tasks.items()
        ]
        answers = run_ranks(ranks, work.without_compiling, placed)
        found[ranks] = dict(zip(tasks, zip(*answers, strict=True), strict=True))
    return found


@pytest.fixture(scope="module")
def one():
    """The same runs in one process without DeepSpeed."""
    runs = [(), (True,), (False, True), (False, False, work.CLIP)]
    ((full, lora, partly, clipped),) = run_ranks(
        0, in_turn, [(work.run_one, *given) for given in runs]
    )
    more = {"unprotected": partly, "clipped": clipped}
    return {"zero1": full, "zero2": full, "zero2 lora": lora, **more}


def assert_same_run(found, expected, tolerance):
    """All ranks hold the same bits, and they are those of one process up to rounding."""
    for mine in found:
        assert all(map(torch.equal, mine["params"], found[0]["params"]))
        assert mine["losses"] == found[0]["losses"]
        assert mine["looped"] == 0
    for a, b in zip(found[0]["params"], expected["params"], strict=True):
        assert (a - b).abs().max() <= tolerance
    assert len(expected["losses"]) == 4  # the first look and three refreshes
    losses, wanted = (torch.tensor(x["losses"]) for x in (found[0], expected))
    assert (losses - wanted).abs().max() <= 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_trains_what_one_process_trains(results, one, ranks, name):
    found = results[ranks][name]
    assert_same_run(found, one[name], 1e-5)
    parts = [mine["bytes"] for mine in found]
    assert sum(parts) == one[name]["bytes"]
    assert max(parts) < 1.1 * one[name]["bytes"] / ranks, "each rank keeps its part of the basis"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gradients_that_the_pull_keeps_have_a_coupling(results, one, ranks):
    for mine in results[ranks]["zero2"]:
        assert mine["coupling"] == pytest.approx(one["zero2"]["coupling"], rel=1e-3)
    assert all(mine["coupling"] is None for mine in results[ranks]["zero2 lora"])


@pytest.mark.slow
def test_the_rate_is_that_of_the_step(results):
    assert results[1]["hooked"] == (work.RATE,)


@pytest.mark.slow
def test_one_rank_takes_the_same_bits(results, one):
    assert_same_run(results[1]["zero2"], one["zero2"], 0)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(results):
    for mine, other in zip(results[2]["resume"], results[2]["uninterrupted"], strict=True):
        assert all(map(torch.equal, mine["params"], other["params"]))
        assert mine["losses"] == other["losses"]
        assert mine["tokens"] == other["tokens"]


@pytest.mark.slow
def test_float32_numbers_are_protected_and_the_weights_are_their_rounding(results):
    for mine in results[2]["half"]:
        assert mine["params"][0].dtype == torch.bfloat16
        assert all(mine["rounded"])
        assert mine["outside"] < 1e-5, "the map puts c back in float32, not in bfloat16"
        assert mine["moved"] > 0.1


@pytest.mark.slow
def test_a_group_may_be_left_unprotected(results, one):
    assert_same_run(results[2]["unprotected"], one["unprotected"], 1e-5)


@pytest.mark.slow
def test_gradients_are_clipped_for_the_pull_as_well(results, one):
    assert_same_run(results[2]["clipped"], one["clipped"], 1e-5)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_step(results):
    for mine in results[2]["overflow"]:
        assert mine["error"].startswith("FloatingPointError: the task gradient is not finite")
        assert mine["unmoved"]
        assert mine["steps"] == 1
    for mine in results[2]["warned"]:
        assert mine["warning"].startswith("safeopt: this step is not protected")
        assert mine["steps"] == 1


@pytest.mark.slow
def test_a_batch_that_was_refused_is_not_added_to_the_next(results):
    for mine in results[2]["skipped"]:
        assert mine["error"].startswith("FloatingPointError: the task gradient is not finite")
        assert mine["steps"] == 2
        assert all(mine["rounded"])


@pytest.mark.slow
def test_numbers_that_deepspeed_has_moved_are_protected(results):
    for mine, other in zip(results[2]["offloaded"], results[2]["zero2"], strict=True):
        assert all(map(torch.equal, mine["params"], other["params"]))
        assert mine["losses"] == other["losses"]


@pytest.mark.slow
def test_an_engine_that_was_destroyed_leaves_an_ordinary_model(results):
    for mine in results[2]["destroyed"]:
        assert mine == {"later": True, "at the end": False}


@pytest.mark.slow
def test_a_refresh_that_fails_leaves_the_step_without_it(results):
    """Masters and weights are those after the step, on all ranks, and training goes on."""
    for mine in results[2]["failed"]:
        assert mine["error"] == "RuntimeError: in the middle"
        assert all(mine["rounded"])
        assert mine["outside"] < 1e-5
        assert mine["after"] == [0, 7], "it is tried again after the next step"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no engine", "TypeError: engine=Linear: expected the engine that deepspeed.initialize"),
        ("stage 0", "TypeError: engine: ZeRO stage 0 cannot be protected; use stage 1 or 2"),
        ("twice", "ValueError: engine: it is protected already; call protect once"),
        ("round robin", "TypeError: engine: with round_robin_gradients DeepSpeed mistakes"),
        ("bfloat16 optimizer", "TypeError: engine: with grad_accum_dtype fp32 and bfloat16 "),
        ("sequences", "TypeError: engine: expert, tensor, sequence and pipeline parallelism"),
        ("another model", "ValueError: params: 21 of 21 parameters do not belong to the probe's"),
        ("option", "TypeError: options: ranks is unknown; expected some of: rank, "),
        ("policy", 'ValueError: on_refresh_error="stop": expected one of "raise", "warn"'),
        ("nothing left", "ValueError: engine: no parameter is left to protect"),
        ("engine in a probe", "TypeError: model=DeepSpeedEngine: DeepSpeed needs the model itself"),
        ("plain checkpoint", 'ValueError: checkpoint: it has no "safeopt" entry'),
        ("ours inside", "ValueError: params: 1 of 1 parameters do not belong to the probe's model"),
    ],
)
def test_what_cannot_be_protected_is_refused(results, case, message):
    for mine in results[2]["refusals"]:
        assert mine[case].startswith(message)


@pytest.mark.slow
def test_an_example_runs(results):
    for output in results[2]["example"]:
        assert output >= {"latest"}


def test_zero_3_is_refused():
    """It marks its parameters."""
    model = tiny_llama(layers=1)
    trainable(model)[0].ds_id = 0
    with pytest.raises(TypeError, match=r"DeepSpeed ZeRO 3 .* use stage 1 or 2"):
        SafetyProbe(model, [safety_batch()])


@pytest.mark.parametrize(("start", "length"), [(0, 12), (0, 0), (5, 3), (4, 4), (2, 9), (11, 1)])
def test_a_range_of_a_matrix(start, length):
    whole = torch.arange(24.0).view(2, 3, 4)  # two examples of a matrix (3, 4)
    part = Range(start, length, torch.Size((3, 4)))
    cut = part.cut(whole, leading=1)
    assert torch.equal(cut, whole.flatten(1)[:, start : start + length])
    assert part.whole(cut.shape, leading=1) == whole.shape
    some, inside = part.lines()
    assert torch.equal(whole[:, some].flatten(1)[:, inside], cut)


def test_a_range_of_a_number():
    whole = torch.arange(3.0)  # of three examples
    part = Range(0, 1, torch.Size(()))
    assert torch.equal(part.cut(whole, leading=1), whole.unsqueeze(1))
    assert part.whole(torch.Size((3, 1)), leading=1) == (3,)
    assert Range(0, 0, torch.Size(())).cut(whole, leading=1).shape == (3, 0)
