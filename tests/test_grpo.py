"""GRPO's advantages."""

import itertools
import statistics

import pytest

from grpo import group_advantages


@pytest.mark.parametrize("rewards", list(itertools.product([0.0, 1.0], repeat=4)) + [[0.25, 0.5, 1.0]])
def test_group_advantages(rewards):
    n, mean, std = len(rewards), statistics.fmean(rewards), statistics.pstdev(rewards)
    if std == 0:
        for flags in itertools.product([True, False], repeat=2):
            assert group_advantages(rewards, *flags) == [0.0] * n
        return
    assert group_advantages(rewards) == pytest.approx([(r - mean) / std for r in rewards])
    assert group_advantages(rewards, normalize=False) == pytest.approx([r - mean for r in rewards])
    others = [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    for normalize in (True, False):  # RLOO never divides
        assert group_advantages(rewards, normalize, leave_one_out=True) == pytest.approx(others)


def test_thirds_cancel_exactly():
    # .30000000000000004 - .3 is rounding, not a difference
    assert group_advantages([0.1 + 0.2, 0.3, 0.3]) == [0.0] * 3
