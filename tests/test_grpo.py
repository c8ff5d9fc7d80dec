"""GRPO's advantages, and what a question is worth whose answers all earn the same."""

import itertools
import statistics

import pytest

from conftest import SMALL
from grpo import group_advantages
from test_run import metrics


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


FLAGS = [[], ["--leave-one-out"], ["--no-normalize-advantages"], ["--prob-mask"]]


@pytest.mark.parametrize("flags", FLAGS)
def test_questions_with_equal_rewards_are_left_out_and_counted(run_script, tmp_path, flags):
    flags = [*SMALL["grpo.py"], *flags, "--num-questions", 12, "--num-epochs", 1, "--num-iterations", 1]
    assert run_script("grpo.py", *flags, "--run-dir", tmp_path / "run")[0] == 0
    row = metrics(tmp_path / "run")[1]
    left_out = row["answers/zero_advantage_fraction"]
    assert 0 < left_out < 1
    kept = row["rollout/generated_tokens_total"] * (1 - left_out)
    trained = row["rollout/trained_tokens_total"]
    if "--prob-mask" in flags:
        assert 0 < trained < 0.4 * kept
    else:  # every token of every other answer, the end of sequence included
        assert trained == pytest.approx(kept, rel=0.2)
