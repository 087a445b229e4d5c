"""RefreshPolicy: its schedules, listed."""

import math

import pytest

from safeopt import RefreshPolicy


def schedule(policy, steps):
    """Steps after which a run without drift refreshes."""
    refreshed, last = [], 0
    for step in range(1, steps + 1):
        if policy.due(step, last):
            refreshed.append(step)
            last = step
    return refreshed


def test_default_schedule():
    expected = [2, 4, 7, 13, 23, 41, 72, 126, 221, 387, 587, 787, 987]
    assert schedule(RefreshPolicy(), 1000) == expected


def test_geometric_schedule():
    assert schedule(RefreshPolicy.geometric(), 700) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 456, 656]
    assert schedule(RefreshPolicy.geometric(1, 3, 50), 150) == [1, 3, 9, 27, 77, 127]


def test_fixed_schedule():
    assert schedule(RefreshPolicy.fixed(25), 110) == [25, 50, 75, 100]
    assert schedule(RefreshPolicy.fixed(1), 4) == [1, 2, 3, 4]
    assert not RefreshPolicy.fixed(25).due(3, 0, drift=1e9)
    assert not RefreshPolicy.geometric(10).due(3, 0, drift=1e9)


def test_growth_one_keeps_the_interval():
    assert schedule(RefreshPolicy(first=3, growth=1), 12) == [3, 6, 9, 12]


def test_drift_trigger():
    policy = RefreshPolicy(first=10, drift=0.1)
    assert not policy.due(1, 0)
    assert not policy.due(1, 0, drift=0.1)
    assert policy.due(1, 0, drift=0.11)
    assert not RefreshPolicy(first=10, drift=None).due(1, 0, drift=math.inf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 0}, "first=0"),
        ({"first": 1.5}, r"first=1\.5"),
        ({"growth": 0.9}, r"growth=0\.9"),
        ({"growth": math.nan}, "growth=nan"),
        ({"growth": math.inf}, "growth=inf"),
        ({"first": 10, "every": 5}, "every=5"),
        ({"every": math.inf}, "every=inf"),
        ({"drift": 0.0}, r"drift=0\.0"),
        ({"drift": -1.0}, r"drift=-1\.0"),
        ({"drift": math.nan}, "drift=nan"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RefreshPolicy(**arguments)


def test_policy_is_frozen():
    with pytest.raises(AttributeError):
        RefreshPolicy().first = 3


@pytest.mark.parametrize("every", [0, 2.5])
def test_errors_of_fixed_name_its_argument(every):
    with pytest.raises(ValueError, match=f"every={every}"):
        RefreshPolicy.fixed(every)
