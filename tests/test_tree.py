"""The trees of SPO-tree, their values and advantages, against brute force."""

import itertools
import math
import random
import statistics

import pytest

from conftest import tiny_args
from spo_tree import Completion, Group, learnable_groups, sample_trees, segment_advantages, tree_values


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


def test_a_level_counts_by_its_number_of_nodes():
    """The expected gradient of a 3-2 tree, over all trees of a policy of two binary tokens a and b.

    It is the policy gradient with the part of each level multiplied by (B - 1) / B times its number of nodes.
    """
    p, q = 0.3, {0: 0.6, 1: 0.2}  # P(a = 1), and P(b = 1) after each a
    reward = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 0.0}
    value = {a: q[a] * reward[a, 1] + (1 - q[a]) * reward[a, 0] for a in (0, 1)}
    policy_gradient = [p * (1 - p) * (value[1] - value[0])]  # in the logit of P(a = 1), then of P(b = 1)
    for a in (0, 1):
        policy_gradient.append((p if a else 1 - p) * q[a] * (1 - q[a]) * (reward[a, 1] - reward[a, 0]))
    gradient = [0.0, 0.0, 0.0]
    for tokens in itertools.product((0, 1), repeat=9):
        first, second = tokens[:3], [tokens[3:5], tokens[5:7], tokens[7:]]
        root = family([0.0] * 3)
        groups = [root]
        probability = math.prod(p if a else 1 - p for a in first)
        for a, pair, parent in zip(first, second, root.completions):
            groups.append(family([reward[a, b] for b in pair], parent))
            probability *= math.prod(q[a] if b else 1 - q[a] for b in pair)
        with_advantages(groups)
        for a, pair, advantage, group in zip(first, second, advantages(root), groups[1:]):
            gradient[0] += probability * advantage * (a - p)  # d log pi / d logit = token - probability
            for b, own_advantage in zip(pair, advantages(group)):
                gradient[1 + a] += probability * own_advantage * (b - q[a])
    weights = [3 * 2 / 3, 6 * 1 / 2, 6 * 1 / 2]
    assert gradient == pytest.approx([weight * part for weight, part in zip(weights, policy_gradient)])


END = 2


class Sampler:
    """In place of a model: random tokens behind any context, and what it was asked for."""

    def __init__(self, seed):
        self.rng, self.calls = random.Random(seed), []

    def __call__(self, contexts, n, max_new_tokens, temperature, top_p, seed):
        self.calls.append((contexts, n, max_new_tokens, temperature, top_p, seed))
        return [[self.completion(limit) for _ in range(n)] for limit in max_new_tokens]

    def completion(self, limit):
        token_ids = []
        while len(token_ids) < limit and END not in token_ids:
            token_ids.append(self.rng.choice([END, *range(10, 18)]))
        return Completion(token_ids, [-1.0] * len(token_ids), finished=token_ids[-1] == END)


SHAPES = {  # branch factors, segment tokens, limit of an answer; lengths at which segments may be cut
    "one level": ([5], [9], 6, [6]),
    "one number for all levels": ([3, 2, 2], [4], 30, [4, 4, 22]),
    "a number for each level": ([2, 3, 2], [2, 5], 30, [2, 5, 23]),
    "the limit cuts on the first level": ([4, 3], [9], 5, [5]),
    "the limit cuts on a level in between": ([2, 3, 2, 2], [3, 4, 9], 6, [3, 3]),
    "a level ends at the limit": ([2, 2, 2], [3], 6, [3, 3]),
    "a factor of 1": ([1, 4, 1], [3], 12, [3, 3, 6]),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", SHAPES)
def test_sample_trees(name, seed):
    factors, segment_tokens, longest, limits = SHAPES[name]
    args = tiny_args(
        branch_factors=tuple(factors), segment_tokens=tuple(segment_tokens), max_response_tokens=longest,
        temperature=0.7, top_p=0.8,
    )  # fmt: skip
    roots, sample = [Group(question, 3, [1, 30 + question]) for question in (4, 5, 6)], Sampler(seed)
    groups, leaves = sample_trees(list(roots), sample, random.Random(seed), args)

    # Down from the roots: the parts of the levels, what continues them, and with what probability one ends.
    below = {group.parent: group for group in groups if group.parent}
    level, expected, calls, ordered = [(root, 0, 1.0) for root in roots], [], [], []
    for factor, limit in zip(factors, limits):
        if level:
            contexts = [group.context for group, _, _ in level]
            calls.append((contexts, factor, [limit] * len(level), 0.7, 0.8))
        next_level = []
        for group, length, probability in level:
            ordered.append(group)
            assert len(group.completions) == factor and group.iteration == 3
            for child in group.completions:
                child_length = length + len(child.token_ids)
                if child.token_ids[-1] != END and child_length < longest:
                    next_group = below.pop(child)
                    assert next_group.context == group.context + child.token_ids
                    assert next_group.question == group.question and len(child.token_ids) == limit
                    next_level.append((next_group, child_length, probability / factor))
                else:
                    expected.append((group, child, pytest.approx(probability / factor)))
        level = next_level
    assert not level and not below and groups == ordered and leaves == expected
    assert groups[:3] == roots and sum(share for *_, share in leaves) == pytest.approx(3)
    assert [call[:5] for call in sample.calls] == calls
    seeds = [call[5] for call in sample.calls]
    assert len(set(seeds)) == len(seeds) and all(type(seed) is int for seed in seeds)
    for _, child, _ in leaves:
        child.value = float(len(child.token_ids))
    tree_values(groups)  # of a root: the mean over all ways down from it
    mean = sum(share * child.value for _, child, share in leaves) / 3
    assert statistics.fmean(root.value for root in roots) == pytest.approx(mean)
