"""Packed rows against one sequence per segment: every token, every gradient."""

import copy
import math
import random

import pytest
import torch

import spo_tree
from conftest import tiny_args
from spo_tree import Node, pack, packed_attention, policy_step, score_tokens, token_logprobs

T = 0.7


def random_tree(rng, depth=3, branch=(3, 4)):
    def grow(level):
        node = Node([rng.randrange(3, 40) for _ in range(rng.randint(1, 6))])
        if level < depth and (level == 0 or rng.random() < 0.8):
            node.children = [grow(level + 1) for _ in range(rng.randint(*branch))]
        return node

    return grow(0)


def descendants(root):
    return [path[-1] for path in spo_tree.paths(root)]


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
    logits = model(torch.tensor([context + token_ids], device=model.device)).logits[0, len(context) - 1 : -1].float() / T
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids, device=model.device)[:, None])[:, 0]


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
    assert row.scored == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("budget", [24, 40, 64, 128, 10_000])
def test_every_token_equals_one_sequence_per_segment(model, trees, budget):
    rows = pack(trees, budget)
    assert all(len(row.token_ids) <= budget for row in rows)
    scored = [node for row in rows for node in row.segments]
    assert sorted(map(id, scored)) == sorted(id(node) for tree in trees for node in descendants(tree))  # each exactly once
    for tree in trees:
        score_tokens(model, [tree], "old_logprobs", tiny_args(pack_tokens=budget, temperature=T))
    worst = 0.0
    with torch.no_grad():
        for tree in trees:
            for node, context in paths(tree):
                assert len(node.old_logprobs) == len(node.token_ids)
                worst = max(worst, (naive_logprobs(model, context, node.token_ids) - torch.tensor(node.old_logprobs)).abs().max().item())
    assert worst < 5e-5


def test_trees_in_one_row_do_not_see_each_other(model, trees):
    score_tokens(model, trees, "old_logprobs", tiny_args(pack_tokens=10_000, temperature=T))
    together = [node.old_logprobs for tree in trees for node in descendants(tree)]
    for tree in trees:
        score_tokens(model, [tree], "old_logprobs", tiny_args(pack_tokens=10_000, temperature=T))
    alone = [node.old_logprobs for tree in trees for node in descendants(tree)]
    assert max(abs(a - b) for x, y in zip(together, alone) for a, b in zip(x, y)) < 5e-5


def test_predecessor_of_a_first_token_is_the_parents_last(model, trees):
    """The classic mistake, t - 1, is nats wrong on the first token of every sibling but the first."""
    (row,) = pack(trees[:1], 10_000)
    right = token_logprobs(model, row, row.scored, T)
    row.pred = [t - 1 for t in range(len(row.token_ids))]
    assert (token_logprobs(model, row, row.scored, T) - right).abs().max() > 1


def test_mask_admits_ancestors_only(trees):
    (row,) = pack(trees[:2], 10_000)
    mask = packed_attention(row, "dense", torch.device("cpu"))[0, 0]
    context_lengths = {id(node): len(context) for tree in trees[:2] for node, context in paths(tree)}
    starts = [row.scored[sum(len(other.token_ids) for other in row.segments[:i])] for i in range(len(row.segments))]
    # token q sees exactly as many tokens as its position says, itself included
    assert mask.sum(1).tolist() == [position + 1 for position in row.position_ids]
    for node, start in zip(row.segments, starts):
        length = context_lengths[id(node)]
        assert row.position_ids[start] == length and row.position_ids[row.pred[start]] == length - 1


def step_gradient(model, trees, budget, **changes):
    """The gradient that one optimizer step of the training loop applies, with Z and the step's sums."""
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    args = tiny_args(pack_tokens=budget, temperature=T, kl_coef=0.1, **changes)
    Z, norm, sums = policy_step(policy, optimizer, trees, args)
    moved = torch.cat([(before - after).flatten() for before, after in zip(model.parameters(), policy.parameters())]).detach()
    return moved * max(norm, 1.0), Z, sums  # the step clips the norm to 1


def naive_gradient(model, trees):
    """The same with one unpacked sequence per segment, and the loss written out: no mask function, no clip function."""
    model.zero_grad()
    terms = []
    for tree in trees:
        for node, context in paths(tree):
            for t, logprob in enumerate(naive_logprobs(model, context, node.token_ids)):
                advantage, old, ref = node.advantages[t], node.old_logprobs[t], node.ref_logprobs[t]
                if advantage != 0 and math.exp(old) < 0.9:
                    ratio = (logprob - old).exp()
                    bound = 1.2 if advantage > 0 else 0.8
                    clipped = ratio > bound if advantage > 0 else ratio < bound
                    surrogate = (bound if clipped else ratio) * advantage
                    terms.append(-surrogate + 0.1 * ((ref - logprob).exp() - (ref - logprob) - 1))
    (sum(terms) / len(terms)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return gradient, len(terms)


@pytest.fixture
def scored_trees(model, trees):
    """Trees with old and reference log-probs near the model's, so that some ratios are clipped, and advantages with zeros."""
    rng = random.Random(1)
    score_tokens(model, trees, "old_logprobs", tiny_args(pack_tokens=10_000, temperature=T))
    for tree in trees:
        for node in descendants(tree):
            node.ref_logprobs = [min(x + rng.gauss(0, 0.3), -1e-3) for x in node.old_logprobs]
            node.old_logprobs = [min(x + rng.gauss(0, 0.3), -1e-3) for x in node.old_logprobs]
            node.advantages = [rng.choice([-0.5, 0.0, 0.25])] * len(node.token_ids)
    return trees


def test_gradients_equal_one_sequence_per_segment(model, scored_trees):
    expected, Z = naive_gradient(model, scored_trees)
    packed, packed_Z, sums = step_gradient(model, scored_trees, 10_000)
    assert Z == packed_Z == sums[0] > 100 and expected.norm() > 0.1 and 0 < sums[3] < Z
    assert (packed - expected).abs().max() < 1e-5


@pytest.mark.parametrize("budget", [24, 48, 100])
def test_gradients_do_not_depend_on_budget_or_order(model, scored_trees, budget):
    expected, _, sums = step_gradient(model, scored_trees, 10_000)
    shuffled = scored_trees[::-1]
    for tree in shuffled:
        tree.children.reverse()
    gradient, _, shuffled_sums = step_gradient(model, shuffled, budget)
    assert (gradient - expected).abs().max() < 1e-5
    assert torch.allclose(sums, shuffled_sums, rtol=1e-4)


def test_masked_and_zero_advantage_tokens_get_exactly_no_gradient(model, scored_trees):
    for tree in scored_trees:
        for node in descendants(tree):
            if any(node.advantages):
                node.old_logprobs = [-0.01] * len(node.token_ids)  # p_old = .99, above the threshold
    gradient, Z, _ = step_gradient(model, scored_trees, 10_000)
    assert Z == 0 and not gradient.any()
    _, Z, _ = step_gradient(model, scored_trees, 10_000, prob_mask=False)
    assert Z == sum(advantage != 0 for tree in scored_trees for node in descendants(tree) for advantage in node.advantages) > 100


@pytest.mark.parametrize("planted", ["advantage", "weight"])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(model, scored_trees, planted):
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    if planted == "advantage":
        next(node for tree in scored_trees for node in descendants(tree) if any(node.advantages)).advantages[0] = math.inf
    else:
        policy.lm_head.weight.data[5, 5] = math.nan
    before = [parameter.clone() for parameter in policy.parameters()]
    Z, norm, _ = policy_step(policy, optimizer, scored_trees, tiny_args(pack_tokens=512, temperature=T, prob_mask=False))
    assert Z > 0 and not math.isfinite(norm) and not optimizer.state
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, policy.parameters()))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_padding_changes_nothing(model, scored_trees):
    """Rows filled up to the budget, as FlexAttention wants them, give the same log-probs."""
    plain, padded = pack(scored_trees, 128), pack(scored_trees, 128, pad=True)
    assert {len(row.token_ids) for row in padded} == {128} and len(plain) == len(padded)
    with torch.no_grad():
        for a, b in zip(plain, padded):
            assert a.scored == b.scored and len(a.token_ids) < 128
            assert {len(x) for x in (b.token_ids, b.position_ids, b.subtree_end, b.pred)} == {128}
            assert (token_logprobs(model, a, a.scored, T) - token_logprobs(model, b, b.scored, T)).abs().max() < 5e-5


def test_flex_mask_admits_the_same_pairs(trees):
    for row in pack(trees, 128, pad=True):
        dense = packed_attention(row, "dense", torch.device("cpu"))[0, 0]
        block_mask = packed_attention(row, "flex", torch.device("cpu"))
        index = torch.arange(len(row.token_ids))
        admitted = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
        assert torch.equal(admitted, dense) and dense.diagonal().all()


def test_flex_attention_gives_the_same_logprobs(model, trees):
    """FlexAttention has no backward pass on a CPU: there the forward pass is compared, and the gradients where there is a GPU."""
    with torch.no_grad():
        for row in pack(trees, 128, pad=True):
            flex, dense = (token_logprobs(model, row, row.scored, T, attention) for attention in ("flex", "dense"))
            assert (flex - dense).abs().max() < 5e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_dense_and_padded_gradients_agree_on_a_gpu(model, scored_trees, checkpointing):
    """Under bf16 autocast the three ways round differently: their gradients agree to a few per cent of the norm."""
    policy = copy.deepcopy(model).cuda()
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train()
    flex, Z, _ = step_gradient(policy, scored_trees, 512, attention="flex")
    dense, dense_Z, _ = step_gradient(policy, scored_trees, 512, attention="dense")
    expected, naive_Z = naive_gradient(copy.deepcopy(model).cuda(), scored_trees)
    assert Z == dense_Z == naive_Z
    for gradient in (flex, dense):
        assert (gradient - expected).norm() < 0.03 * expected.norm()
    assert (flex - dense).norm() < 0.03 * expected.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_minibatch_without_loss_tokens_is_skipped_on_a_gpu(model):
    """Without any gradient clip_grad_norm_ returns a tensor on the CPU."""
    policy = copy.deepcopy(model).cuda()
    Z, norm, _ = policy_step(policy, torch.optim.AdamW(policy.parameters()), [Node([1, 2], [Node([3], old_logprobs=[-1.0], advantages=[0.0])])],
                             tiny_args())
    assert Z == norm == 0


def test_a_path_longer_than_the_budget_gets_its_own_row(model):
    tree = Node(list(range(3, 23)), [Node(list(range(3, 13))), Node([5, 6])])
    rows = pack([tree], 16)
    assert [len(row.segments) for row in rows] == [1, 1]
