"""Packed rows against one sequence per segment: every token, every gradient."""

import random

import pytest
import torch

from spo_tree import Node, attention_mask, descendants, kl_k3, loss_mask, pack, policy_loss, score_tokens, token_logprobs

T = 0.7


def random_tree(rng, depth=3, branch=(3, 4)):
    def grow(level):
        node = Node([rng.randrange(3, 40) for _ in range(rng.randint(1, 6))])
        if level < depth and (level == 0 or rng.random() < 0.8):
            node.children = [grow(level + 1) for _ in range(rng.randint(*branch))]
        return node

    return grow(0)


def paths(root):
    """(segment, its full context) for every segment below the root."""
    stack, found = [(root, root.token_ids)], []
    while stack:
        node, context = stack.pop()
        found += [(child, context) for child in node.children]
        stack += [(child, context + child.token_ids) for child in node.children]
    return found


def naive_logprobs(model, context, token_ids):
    """log-softmax(logits / T) of one unpacked sequence."""
    logits = model(torch.tensor([context + token_ids])).logits[0, len(context) - 1 : -1].float() / T
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


@pytest.fixture
def trees():
    rng = random.Random(0)
    return [random_tree(rng) for _ in range(4)]


def test_worked_example_of_the_docstring():
    tree = Node([10, 11], [Node([12, 13], [Node([14]), Node([15])]), Node([16])])
    (row,) = pack([tree], 100)
    assert row.token_ids == [10, 11, 12, 13, 14, 15, 16]
    assert row.position_ids == [0, 1, 2, 3, 4, 4, 2]
    assert row.subtree_end == [7, 7, 6, 6, 5, 6, 7]
    assert row.pred == [-1, 0, 1, 2, 3, 3, 1]
    assert row.scored() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("budget", [24, 40, 64, 128, 10_000])
def test_every_token_equals_one_sequence_per_segment(model, trees, budget):
    rows = pack(trees, budget)
    assert all(len(row.token_ids) <= budget for row in rows)
    scored = [node for row in rows for node in row.segments]
    assert sorted(map(id, scored)) == sorted(id(node) for tree in trees for node in descendants(tree))  # each exactly once
    for tree in trees:
        score_tokens(model, [tree], "old_logprobs", budget, T)
    worst = 0.0
    with torch.no_grad():
        for tree in trees:
            for node, context in paths(tree):
                assert len(node.old_logprobs) == len(node.token_ids)
                worst = max(worst, (naive_logprobs(model, context, node.token_ids) - torch.tensor(node.old_logprobs)).abs().max().item())
    assert worst < 2e-5


def test_trees_in_one_row_do_not_see_each_other(model, trees):
    score_tokens(model, trees, "old_logprobs", 10_000, T)
    together = [node.old_logprobs for tree in trees for node in descendants(tree)]
    for tree in trees:
        score_tokens(model, [tree], "old_logprobs", 10_000, T)
    alone = [node.old_logprobs for tree in trees for node in descendants(tree)]
    assert max(abs(a - b) for x, y in zip(together, alone) for a, b in zip(x, y)) < 2e-5


def test_predecessor_of_a_first_token_is_the_parents_last(model, trees):
    """The classic mistake, t - 1, is nats wrong on the first token of every sibling but the first."""
    (row,) = pack(trees[:1], 10_000)
    right = token_logprobs(model, row, row.scored(), T)
    row.pred = [t - 1 for t in range(len(row.token_ids))]
    assert (token_logprobs(model, row, row.scored(), T) - right).abs().max() > 1


def test_mask_admits_ancestors_only(trees):
    (row,) = pack(trees[:2], 10_000)
    mask = attention_mask(row, torch.device("cpu"))[0, 0]
    owner = [None] * len(row.token_ids)  # the path of nodes above and including each token
    for tree in trees[:2]:
        for node, context in paths(tree):
            owner[row.starts[[id(x) for x in row.segments].index(id(node))]] = len(context)
    # token q sees exactly as many tokens as its position says, itself included
    assert mask.sum(1).tolist() == [position + 1 for position in row.position_ids]
    for t, context_length in enumerate(owner):
        if context_length is not None:
            assert row.position_ids[t] == context_length and row.position_ids[row.pred[t]] == context_length - 1


def update_gradient(model, trees, budget, naive=False):
    """The gradient of one minibatch exactly as the training loop forms it, or with one sequence per segment."""
    model.zero_grad()
    if naive:
        rows = [(None, node, context) for tree in trees for node, context in paths(tree)]
    else:
        rows = [(row, None, None) for row in pack(trees, budget)]
    terms = []
    for row, node, context in rows:
        nodes = [node] if naive else row.segments
        advantages, old, ref = (torch.tensor([x for n in nodes for x in getattr(n, f)]) for f in ("advantages", "old_logprobs", "ref_logprobs"))
        mask = loss_mask(advantages, old, 0.9)
        if mask.any():
            if naive:
                logprobs = naive_logprobs(model, context, node.token_ids)[mask]
            else:
                logprobs = token_logprobs(model, row, [t for t, m in zip(row.scored(), mask.tolist()) if m], T)
            terms.append((policy_loss(logprobs, old[mask], advantages[mask], 0.2) + 0.1 * kl_k3(logprobs, ref[mask])))
    Z = sum(len(term) for term in terms)
    for term in terms:
        (term.sum() / Z).backward(retain_graph=False)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), Z


@pytest.fixture
def scored_trees(model, trees):
    """Trees with old and reference log-probs near the model's, so that some ratios are clipped, and advantages with zeros."""
    rng = random.Random(1)
    score_tokens(model, trees, "old_logprobs", 10_000, T)
    for tree in trees:
        for node in descendants(tree):
            node.ref_logprobs = [min(x + rng.gauss(0, 0.3), -1e-3) for x in node.old_logprobs]
            node.old_logprobs = [min(x + rng.gauss(0, 0.3), -1e-3) for x in node.old_logprobs]
            node.advantages = [rng.choice([-0.5, 0.0, 0.25])] * len(node.token_ids)
    return trees


def test_gradients_equal_one_sequence_per_segment(model, scored_trees):
    expected, Z = update_gradient(model, scored_trees, 0, naive=True)
    packed, packed_Z = update_gradient(model, scored_trees, 10_000)
    assert Z == packed_Z > 100 and expected.norm() > 0.1
    assert (packed - expected).abs().max() < 1e-5


@pytest.mark.parametrize("budget", [24, 48, 100])
def test_gradients_do_not_depend_on_budget_or_order(model, scored_trees, budget):
    expected, _ = update_gradient(model, scored_trees, 10_000)
    shuffled = scored_trees[::-1]
    for tree in shuffled:
        tree.children.reverse()
    gradient, _ = update_gradient(model, shuffled, budget)
    assert (gradient - expected).abs().max() < 1e-5


def test_masked_and_zero_advantage_tokens_get_exactly_no_gradient(model, scored_trees):
    for tree in scored_trees:
        for node in descendants(tree):
            if any(node.advantages):
                node.old_logprobs = [-0.01] * len(node.token_ids)  # p_old = .99, above the threshold
    terms = []
    for row in pack(scored_trees, 10_000):
        advantages, old = (torch.tensor([x for n in row.segments for x in getattr(n, f)]) for f in ("advantages", "old_logprobs"))
        terms.append(loss_mask(advantages, old, 0.9).sum().item())
    assert sum(terms) == 0


def test_a_path_longer_than_the_budget_gets_its_own_row(model):
    tree = Node(list(range(3, 23)), [Node(list(range(3, 13))), Node([5, 6])])
    rows = pack([tree], 16)
    assert [len(row.segments) for row in rows] == [1, 1]
