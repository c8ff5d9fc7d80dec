"""Values and advantages of SPO-tree against brute force."""

import random
import statistics

import pytest

from spo_tree import Completion, Group, learnable_groups, segment_advantages, tree_values


def family(values, parent=None, context=(1,)):
    """A group whose children have these values."""
    children = [Completion([7, 7], [], value=value) for value in values]
    return Group(3, 8, list(context), children, parent=parent)


def random_tree(rng, depth=3):
    """The groups of a tree, parents before children; leaves have a reward, inner nodes a wrong value."""
    groups, level = [], [Group(0, 1, [1])]
    for height in reversed(range(depth)):
        groups += level
        children = []
        for group in level:
            for _ in range(rng.randint(1, 4)):
                token_ids = rng.choices(range(3, 40), k=rng.randint(1, 5))
                child = Completion(token_ids, [], value=float(rng.random() < 0.5))
                group.completions.append(child)
                if height and rng.random() < 0.8:
                    child.value = -9.0
                    children.append(Group(0, 1, group.context + token_ids, parent=child))
        level = children
    return groups


def expected_reward(groups, group):
    """Enumerates every path to a leaf with its probability: each child is equally likely."""
    below = {id(other.parent): other for other in groups}
    open_groups, total = [(group, 1.0)], 0.0
    while open_groups:
        here, probability = open_groups.pop()
        for child in here.completions:
            share = probability / len(here.completions)
            if id(child) in below:
                open_groups.append((below[id(child)], share))
            else:
                total += share * child.value
    return total


def advantages(group):
    return [child.advantages[0] for child in group.completions]


def with_advantages(groups, normalize=False):
    tree_values(groups)
    for group in groups:
        segment_advantages(group, normalize)
    return groups


@pytest.mark.parametrize("seed", range(50))
def test_values_and_advantages_equal_enumeration(seed):
    """Of two trees at once."""
    rng = random.Random(seed)
    trees = [random_tree(rng), random_tree(rng)]
    groups = sorted(trees[0] + trees[1], key=lambda group: len(group.context))  # the trees' levels are mixed
    rewards = {id(child): child.value for group in groups for child in group.completions}
    expected = {id(group): expected_reward(tree, group) for tree in trees for group in tree}
    with_advantages(groups)
    inner = {id(group.parent): group for group in groups}
    for group in groups:
        assert group.value == pytest.approx(expected[id(group)], abs=1e-12)
        for child in group.completions:
            value = expected[id(inner[id(child)])] if id(child) in inner else rewards[id(child)]
            assert child.value == pytest.approx(value, abs=1e-12)
            one_each = [value - expected[id(group)]] * len(child.token_ids)
            assert child.advantages == pytest.approx(one_each, abs=1e-8)
        assert sum(advantages(group)) == pytest.approx(0, abs=1e-7)
    kept = iter(learnable_groups(groups))
    for group in groups:
        learning = [child for child in group.completions if abs(child.advantages[0]) > 1e-8]
        if learning:
            waiting = next(kept)
            assert waiting.completions == learning and waiting.context == group.context
            assert waiting.parent is None  # a group in the buffer does not hold the tree above it
    assert not list(kept)


def test_published_example():
    """The tree a = 1, b = (1 0 1), f = (0 0 0), whose advantages the authors' code was seen to compute."""
    root = family([1, 0, 0])
    _, b, f = root.completions
    groups = with_advantages([root, family([1, 0, 1], b, (1, 5)), family([0, 0, 0], f, (1, 6))])
    assert root.value == pytest.approx(5 / 9)
    assert advantages(root) == pytest.approx([4 / 9, 1 / 9, -5 / 9])
    assert advantages(groups[1]) == pytest.approx([1 / 3, -2 / 3, 1 / 3])
    assert advantages(groups[2]) == [0, 0, 0]
    kept = [(group.question, group.iteration, group.context) for group in learnable_groups(groups)]
    assert kept == [(3, 8, [1]), (3, 8, [1, 5])]


def test_means_of_thirds_cancel_exactly():
    """0.1 + 0.2 arithmetic must not turn an advantage of zero into a training example."""
    root = family([0, 0, 0, 0])
    groups = [root, *(family([1, 0, 0], child, [9]) for child in root.completions[:3])]
    middle = family([0], root.completions[3])  # one third as the mean of one node, which has three leaves
    groups = with_advantages([*groups, middle, family([1, 0, 0], middle.completions[0], [9])])
    assert advantages(root) == [0.0] * 4 and advantages(middle) == [0.0]
    assert [group.context for group in learnable_groups(groups)] == [[9]] * 4
    for normalize in (False, True):
        (equal,) = with_advantages([family([0.7, 0.7, 0.7])], normalize)  # whose mean is not exactly .7
        assert advantages(equal) == [0, 0, 0]


@pytest.mark.parametrize("values", [[1, 0, 0, 0], [0.5, 1, 0.25]])
def test_normalized_advantages_have_unit_spread(values):
    (group,) = with_advantages([family(values)], normalize=True)
    assert statistics.pstdev(advantages(group)) == pytest.approx(1, abs=1e-6)
    (plain,) = with_advantages([family(values)])
    ratio = statistics.pstdev(values)
    assert [ratio * a for a in advantages(group)] == pytest.approx(advantages(plain), abs=1e-6)
