"""Values and advantages of SPO-tree against brute force."""

import random
import statistics

import pytest

from spo_tree import Node, paths, segment_advantages, sibling_groups, tree_values


def leaf(reward: float) -> Node:
    return Node([7, 7], value=reward)


def random_tree(rng: random.Random, depth: int) -> Node:
    if depth == 0 or rng.random() < 0.2:
        return leaf(float(rng.random() < 0.5))
    return Node([rng.randrange(3, 40) for _ in range(rng.randint(1, 5))], [random_tree(rng, depth - 1) for _ in range(rng.randint(1, 4))])


def descendants(root: Node) -> list[Node]:
    return [path[-1] for path in paths(root)]


def expected_reward(node: Node) -> float:
    """Enumerates every path to a leaf with its probability: each child is equally likely."""
    open_nodes, total = [(node, 1.0)], 0.0
    while open_nodes:
        here, probability = open_nodes.pop()
        if not here.children:
            total += probability * here.value
        open_nodes += [(child, probability / len(here.children)) for child in here.children]
    return total


@pytest.mark.parametrize("seed", range(50))
def test_values_and_advantages_equal_enumeration(seed):
    rng = random.Random(seed)
    root = Node([1], [random_tree(rng, 3) for _ in range(rng.randint(1, 4))])
    expected = {id(node): expected_reward(node) for node in [root, *descendants(root)]}
    assert tree_values(root) == pytest.approx(expected[id(root)], abs=1e-12)
    segment_advantages(root)
    for parent in [root, *descendants(root)]:
        for child in parent.children:
            assert child.value == pytest.approx(expected[id(child)], abs=1e-12)
            assert len(child.advantages) == len(child.token_ids)
            assert child.advantages == pytest.approx([expected[id(child)] - expected[id(parent)]] * len(child.token_ids), abs=1e-8)
        if parent.children:
            assert sum(child.advantages[0] for child in parent.children) == pytest.approx(0, abs=1e-7)


def test_published_example():
    """The tree a = 1, b = (1 0 1), f = (0 0 0), whose advantages the authors' code was seen to compute."""
    a, b, f = leaf(1), Node([5], [leaf(1), leaf(0), leaf(1)]), Node([6], [leaf(0), leaf(0), leaf(0)])
    root = Node([1], [a, b, f])
    assert tree_values(root) == pytest.approx(5 / 9)
    segment_advantages(root)
    assert [node.advantages[0] for node in (a, b, f)] == pytest.approx([4 / 9, 1 / 9, -5 / 9])
    assert [node.advantages[0] for node in b.children] == pytest.approx([1 / 3, -2 / 3, 1 / 3])
    assert [node.advantages[0] for node in f.children] == [0, 0, 0]
    groups = sibling_groups(root, question=3, iteration=8)
    assert sorted((tuple(group.token_ids), len(group.children)) for group in groups) == [((1,), 3), ((1, 5), 3)]


def test_means_of_thirds_cancel_exactly():
    """0.1 + 0.2 arithmetic must not turn an advantage of zero into a training example."""
    children = [Node([5], [leaf(1), leaf(0), leaf(0)]) for _ in range(3)]
    root = Node([1], [*children, Node([6], [Node([7], [leaf(1), leaf(0), leaf(0)])])])
    tree_values(root)
    segment_advantages(root)
    assert all(child.advantages == [0.0] for child in root.children)


def test_normalized_advantages_have_unit_spread():
    root = Node([1], [leaf(1), leaf(0), leaf(0), leaf(0)])
    tree_values(root)
    segment_advantages(root, normalize=True)
    advantages = [child.advantages[0] for child in root.children]
    assert statistics.pstdev(advantages) == pytest.approx(1, abs=1e-6)
    assert advantages[0] == pytest.approx(3**0.5, abs=1e-6)
    thirds = Node([1], [leaf(0.7), leaf(0.7), leaf(0.7)])  # their mean is not 0.7 in floating point
    tree_values(thirds)
    segment_advantages(thirds, normalize=True)
    assert all(child.advantages == [0, 0] for child in thirds.children)
    same = Node([1], [leaf(1), leaf(1)])
    tree_values(same)
    segment_advantages(same, normalize=True)
    assert [child.advantages for child in same.children] == [[0, 0], [0, 0]]


def test_sibling_groups_keep_context_and_drop_zeros():
    rng = random.Random(0)
    root = Node([1, 2], [random_tree(rng, 3) for _ in range(4)])
    tree_values(root)
    segment_advantages(root)
    contexts = {}

    def walk(node, context):
        for child in node.children:
            contexts.setdefault(tuple(context), []).append(child)
            walk(child, context + child.token_ids)

    walk(root, root.token_ids)
    grouped = sibling_groups(root, 0, 1)
    assert sum(len(group.children) for group in grouped) == sum(any(node.advantages) for node in descendants(root)) > 0
    for group in grouped:
        assert all(any(child.advantages) and not child.children for child in group.children)
        assert all(child.token_ids in [node.token_ids for node in contexts[tuple(group.token_ids)]] for child in group.children)
