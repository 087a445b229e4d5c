"""Frontiers, matched task loss, bootstrap, the choice on val, the task's metrics: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.config import ConfigError, MethodConfig, RunConfig, SweepConfig, TuningConfig
from benchmarks.frontier import Outcome, Samples, at_task_loss, matched, nondominated
from benchmarks.metrics import final_number, metric_of, rouge_l, similarity
from benchmarks.records import RefusalNLL
from benchmarks.separation import interval, separation
from benchmarks.sweep import choose

# --- frontier ---


def test_dominated_points_are_left_out():
    front = [Outcome(1.0, 0.5), Outcome(1.2, 0.3), Outcome(1.5, 0.1)]
    dominated = [Outcome(1.2, 0.4), Outcome(1.3, 0.3), Outcome(2.0, 0.1)]
    assert nondominated([*dominated, *front[::-1], front[0]]) == front
    assert nondominated([]) == []


def test_the_frontier_is_interpolated_and_never_extrapolated():
    points = [Outcome(1.0, 0.5), Outcome(1.2, 0.3), Outcome(1.3, 0.4), Outcome(1.4, 0.1)]
    assert at_task_loss(points, 0.99) is None
    assert at_task_loss(points, 1.0) == 0.5
    assert at_task_loss(points, 1.1) == pytest.approx(0.4)
    assert at_task_loss(points, 1.35) == pytest.approx(0.3 - 0.75 * 0.2)
    assert at_task_loss(points, 9.0) == 0.1
    assert at_task_loss([], 1.0) is None


# --- matched task loss ---


def samples(task: float, alignment: np.ndarray) -> Samples:
    return Samples(np.full(len(alignment), task), alignment)


def test_figures_at_matched_task_loss_are_the_closed_form():
    seeds, prompts = 3, 20
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 0.2, prompts)
    rise = rng.uniform(0.5, 1.5, (seeds, prompts))
    methods = {
        "adamw": [samples(1.0, start + rise)],
        "ours": [samples(0.98, start + 0.2 * rise), samples(1.02, start + 0 * rise)],
        "slow": [samples(1.05, start + 0 * rise)],
    }
    found = matched(methods, "adamw", start, tolerance=0, replicates=200)
    slow = found["slow"]
    assert (slow.alignment, slow.removed, slow.reached) == (None, None, 0)
    # Where it ends, the baseline has the alignment loss of its only point.
    assert (slow.own.value, slow.own.low) == pytest.approx((1, 1))
    assert found["ours"].own.value == pytest.approx(0.8)
    # Half way between a fifth of the rise and none of it, in every replicate: no width at all.
    removed = found["ours"].removed
    assert (removed.value, removed.low, removed.high) == pytest.approx((0.9, 0.9, 0.9))
    assert found["ours"].alignment.value == pytest.approx((start + 0.1 * rise).mean())
    assert found["ours"].alignment.high - found["ours"].alignment.low > 0.02
    assert found["ours"].reached == 1
    base = found["adamw"].removed
    assert (base.value, base.low, base.high) == pytest.approx((0, 0, 0))


def test_a_method_is_also_compared_with_the_baseline_s_frontier_where_it_ends():
    start = np.zeros(5)
    ones = np.ones((2, 5))
    methods = {
        "adamw": [samples(1.0, ones), samples(1.4, 0.2 * ones)],
        "ours": [samples(1.2, 0.15 * ones)],
        "better": [samples(0.9, 0.5 * ones)],
    }
    found = matched(methods, "adamw", start, tolerance=0, replicates=50)
    assert found["ours"].removed is None
    assert found["ours"].own.value == pytest.approx(1 - 0.15 / 0.6)  # AdamW has 0.6 at 1.2
    assert found["better"].own.value == found["better"].removed.value == pytest.approx(0.5)
    assert found["adamw"].own.value == pytest.approx(0)


def test_a_method_that_reaches_the_task_loss_with_some_seeds_only():
    start = np.zeros(4)
    methods = {
        "adamw": [samples(1.0, np.ones((4, 4)))],
        "ours": [Samples(np.array([0.9, 0.9, 0.9, 1.2]), np.zeros((4, 4)))],
    }
    found = matched(methods, "adamw", start, tolerance=0, replicates=2000)["ours"]
    # It fails where the fourth seed is drawn at least twice: 1 − (3⁴ + 4·3³)/4⁴.
    assert found.reached == pytest.approx((81 + 108) / 256, abs=0.04)
    assert found.removed.value == 1


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    rng = np.random.default_rng(1)
    prompts = rng.normal(1.0, 0.3, 400)
    found = matched(
        {"adamw": [samples(1.0, prompts[None])]}, "adamw", np.zeros(400), replicates=4000
    )["adamw"].alignment
    half = 1.96 * prompts.std() / 20
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.value == pytest.approx(half, rel=0.1)


def test_nothing_is_removed_where_nothing_rose_and_shapes_must_fit():
    start = np.ones(3)
    methods = {"adamw": [samples(1.0, np.full((2, 3), 0.5))]}
    assert matched(methods, "adamw", start, replicates=20)["adamw"].removed is None
    with pytest.raises(ValueError, match="seeds and prompts are paired"):
        matched({**methods, "ours": [samples(1.0, np.ones((1, 3)))]}, "adamw", start)


# --- separation ---


def scores(harmful, harmless) -> RefusalNLL:
    return RefusalNLL(harmful=list(harmful), harmless=list(harmless))


def test_the_interval_of_separation_is_that_of_hanley_and_mcneil():
    """Their standard error of the area (1982), for one model and many prompts."""
    rng = np.random.default_rng(0)
    run = scores(rng.exponential(1, 300), rng.exponential(3, 200))
    area = separation(run)
    # Exponential scores are their exact case: the area is 3/(1 + 3).
    assert area == pytest.approx(0.75, abs=0.05)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    square = area * (1 - area) + 199 * (q1 - area**2) + 299 * (q2 - area**2)
    half = 1.96 * (square / (200 * 300)) ** 0.5
    found = interval([run], replicates=4000)
    assert found.value == area
    assert found.value - found.low == pytest.approx(half, rel=0.15)
    assert found.high - found.value == pytest.approx(half, rel=0.15)


def test_seeds_and_prompts_of_separation_are_drawn_alike_for_every_method():
    rng = np.random.default_rng(1)
    low, high = rng.normal(0, 1, (2, 30)), rng.normal(1, 1, (2, 20))
    runs = [scores(a, b) for a, b in zip(low, high, strict=True)]
    # Another scale, the same order: the same areas in every draw.
    scaled = [scores(np.exp(a), np.exp(b)) for a, b in zip(low, high, strict=True)]
    assert interval(runs) == interval(scaled)
    both, alone = interval(runs), interval(runs[:1])
    assert both.value == pytest.approx(np.mean([separation(run) for run in runs]))
    assert both.high - both.low < alone.high - alone.low
    perfect = interval([scores([0.1, 0.2], [1.0, 2.0])])
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)
    assert separation(scores([1.0, 2.0], [1.0, 2.0])) == 0.5


# --- the choice on val ---


class Ran:
    """What `choose` reads of a result."""

    def __init__(self, ends: dict[str, tuple[float, float]]) -> None:
        self.records = [
            type("R", (), {"method": key, "task_loss": _end(t), "alignment_loss": _end(a)})
            for key, (t, a) in ends.items()
        ]


def _end(value: float):
    return type("S", (), {"end": value})


def points() -> tuple[MethodConfig, ...]:
    adamw = MethodConfig(name="adamw", grid={"learning_rate": (1e-3, 2e-3)})
    replay = MethodConfig(name="replay", grid={"weight": (0.5, 1.0, 2.0, 4.0)})
    return (*adamw.points(), *replay.points())


def test_grid_points_have_telling_labels_and_the_options():
    found = points()
    assert [p.key for p in found[:3]] == [
        "adamw[learning_rate=0.001]", "adamw[learning_rate=0.002]", "replay[weight=0.5]",
    ]  # fmt: skip
    assert found[1].learning_rate == 2e-3
    assert found[2].options().weight == 0.5
    assert {p.family for p in found[2:]} == {"replay"}
    both = MethodConfig(name="replay", grid={"weight": (1.0, 2.0), "every": (1, 2)}).points()
    assert [p.key for p in both][-1] == "replay[weight=2,every=2]"


def test_the_choice_is_the_safest_within_tolerance_of_the_best_baseline():
    val = {
        "adamw[learning_rate=0.001]": (1.10, 0.3),
        "adamw[learning_rate=0.002]": (1.00, 0.6),
        "replay[weight=0.5]": (0.99, 0.3),
        "replay[weight=1]": (1.01, 0.2),
        "replay[weight=2]": (1.02, 0.1),  # safer, but above 1.00 + 1%
        "replay[weight=4]": (1.03, 0.4),  # dominated
    }
    chosen = choose(points(), Ran(val), TuningConfig(points=3))
    assert [p.key for p in chosen["adamw"]] == [
        "adamw[learning_rate=0.002]", "adamw[learning_rate=0.001]",
    ]  # fmt: skip
    assert [p.options().weight for p in chosen["replay"]] == [1.0, 2.0, 0.5]
    # Nothing within the tolerance: the one that comes nearest.
    far = {key: (task + 1 if "replay" in key else task, a) for key, (task, a) in val.items()}
    chosen = choose(points(), Ran(far), TuningConfig(points=1))
    assert [p.options().weight for p in chosen["replay"]] == [0.5]
    # Points that have failed are no choice; a method without any is told.
    del val["replay[weight=1]"]
    assert choose(points(), Ran(val), TuningConfig())["replay"][0].options().weight == 0.5
    with pytest.raises(ConfigError, match="replay: no grid point has finished"):
        choose(points(), Ran({k: v for k, v in val.items() if "adamw" in k}), TuningConfig())


def plain() -> dict:
    return {
        "model": {"name": "tiny"},
        "task": {"name": "tiny", "val_examples": 4},
        "steps": 4,
        "learning_rate": 1e-3,
        "seeds": [0, 1, 2],
        "methods": [{"name": "adamw"}, {"name": "replay", "grid": {"weight": [1.0, 2.0]}}],
        "tuning": {"seeds": [0]},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": {"split": "val"}}, "a sweep chooses on"),
        ({"task": {"name": "tiny"}}, "val_examples=0"),
        ({"methods": [{"name": "replay"}]}, "a sweep needs adamw"),
        (
            {"methods": [{"name": "adamw"}, {"name": "replay", "grid": {"weight": [0]}}]},
            "weight=0: Input should be greater",
        ),
        (
            {"methods": [{"name": "adamw"}, {"name": "replay", "grid": {"wieght": [1]}}]},
            "wieght: no such setting",
        ),
        (
            {"methods": [{"name": "adamw", "grid": {"learning_rate": [0.01, 1e-2]}}]},
            r"adamw\[learning_rate=0\.01\]: the grids have this point twice",
        ),
        ({"tuning": {"seeds": [3, 3]}}, r"tuning\.seeds=\[3, 3\]: each seed may stand there once"),
    ],
)
def test_sweeps_that_cannot_be_fair_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SweepConfig.model_validate({**plain(), **change})


def test_a_grid_needs_a_sweep_and_stages_are_plain_configs():
    sweep = SweepConfig.model_validate(plain())
    long = sweep.stage("test", sweep.methods[:1], sweep.seeds, times=4)
    assert type(long) is RunConfig
    assert (long.steps, long.evaluation.every, long.evaluation.split) == (16, 16, "test")
    val = sweep.stage("val", sweep.methods[1].points(), (0,))
    assert (val.evaluation.split, val.seeds, len(val.methods)) == ("val", (0,), 2)
    assert val.evaluation.per_prompt, "the leaderboard needs them"
    with pytest.raises(ValueError, match="a grid needs a sweep"):
        RunConfig.model_validate({k: v for k, v in plain().items() if k != "tuning"})


def test_vary_makes_one_entry_for_each_value():
    config = RunConfig.model_validate(
        {
            **{k: v for k, v in plain().items() if k != "tuning"},
            "methods": [
                {"name": "adamw"},
                {
                    "name": "projected_adamw",
                    "held": True,
                    "vary": {"rank": [4, 8], "mode": ["damp"]},
                },
            ],
        }
    )
    ours = config.methods[1:]
    assert [(m.key, m.family) for m in ours] == [
        ("rank=4", "rank"), ("rank=8", "rank"), ("mode=damp", "mode"),
    ]  # fmt: skip
    assert ours[0].options().arguments()["rank"] == 4
    assert all(m.options().held for m in ours)
    # What is stored with a result reads back as the same config.
    assert RunConfig.model_validate(config.as_json()) == config


# --- metrics ---


def test_metrics_are_their_closed_forms():
    assert rouge_l("the cat sat", "the cat lay down") == pytest.approx(2 * 2 / 7)
    assert rouge_l("The cat!", "the CAT") == 1
    assert rouge_l("", "the cat") == rouge_l("dog", "cat") == 0
    assert final_number("so 12 and then 1,250 apples", "#### 1250") == 1
    assert final_number("1250.5", "#### 1250") == 0
    assert final_number("no idea", "#### 3") == 0
    assert final_number("-3.0", "-3") == 1
    assert similarity("abcd", "bcde") == pytest.approx(2 * 3 / 8)
    assert metric_of("gsm8k") == ("right final numbers", final_number)
    assert metric_of("some/dataset")[1] is rouge_l
