"""The replay buffer of sibling groups."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from spo_tree import (Node, SiblingGroup, draw_groups, load_optimizer, num_children, optimizer_tensors, save_checkpoint,
                      split_minibatches)


def make_buffer(sizes: dict[int, list[int]]) -> list[SiblingGroup]:
    """Groups of the given sizes for each question; every segment has a token of its own."""
    token = iter(range(10**6))
    return [
        SiblingGroup([0], [Node([next(token)], old_logprobs=[-0.1 * size], advantages=[1.0]) for _ in range(size)], question=question)
        for question, groups in sizes.items() for size in groups
    ]


def tokens(groups):
    return [node.token_ids[0] for group in groups for node in group.children]


@pytest.mark.parametrize("seed", range(20))
def test_limits_hold_and_nothing_is_lost_or_drawn_twice(seed):
    rng = random.Random(seed)
    buffer = make_buffer({question: [rng.randint(2, 6) for _ in range(rng.randint(1, 40))] for question in range(12)})
    taken, kept = draw_groups(buffer, per_question=32, per_iteration=200, rng=rng)
    drawn = Counter()
    for group in taken:
        drawn[group.question] += len(group.children)
    assert max(drawn.values()) <= 32 and sum(drawn.values()) <= 200
    assert sorted(tokens(taken) + tokens(kept)) == sorted(tokens(buffer))
    if num_children(buffer) > 300 and len([q for q in drawn if drawn[q] >= 12]) == 12:
        assert sum(drawn.values()) > 200 - 6  # as many as fit


def test_questions_share_evenly():
    buffer = make_buffer({0: [4] * 30, 1: [4] * 30, 2: [4] * 30, 3: [4]})
    taken, _ = draw_groups(buffer, per_question=100, per_iteration=4 * 13, rng=random.Random(0))
    assert Counter(group.question for group in taken) == {0: 4, 1: 4, 2: 4, 3: 1}


def test_iterations_empty_the_buffer_without_repeats():
    buffer, seen = make_buffer({question: [3] * 10 for question in range(4)}), []
    for iteration in range(4):
        taken, buffer = draw_groups(buffer, per_question=9, per_iteration=1000, rng=random.Random(iteration))
        seen += tokens(taken)
    assert len(seen) == len(set(seen)) == 120 - len(tokens(buffer))
    assert Counter(seen).most_common(1)[0][1] == 1 and len(seen) == 4 * 9 * 3 + 4 * 3


def test_draw_depends_on_the_generator_only():
    buffer = make_buffer({question: [2, 3, 4] for question in range(6)})
    first, second, other = (draw_groups(buffer, 6, 20, random.Random(seed))[0] for seed in (1, 1, 2))
    assert tokens(first) == tokens(second) != tokens(other)


def test_survives_a_checkpoint(tmp_path):
    buffer = make_buffer({5: [2, 3]})
    buffer[0].children[0].old_logprobs = [-0.1234567890123456789, float.fromhex("-0x1.fffffep-3")]
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters())
    weight(torch.ones(2)).sum().backward()
    optimizer.step()
    policy = SimpleNamespace(save_pretrained=Path.mkdir, parameters=weight.parameters, device=torch.device("cpu"))
    policy.save_pretrained = lambda path: path.mkdir(parents=True)
    state = {"iteration": 7, "world_size": 1, "elapsed_s": 0.1}
    tensors, records = {"optimizer": optimizer_tensors(optimizer)}, {"buffer": [dataclasses.asdict(group) for group in buffer]}
    save_checkpoint(tmp_path, policy, SimpleNamespace(save_pretrained=lambda path: None), tensors, state, records)
    fresh, path = torch.optim.AdamW(weight.parameters()), tmp_path / "checkpoints" / "000007"
    load_optimizer(fresh, load_file(path / "optimizer.safetensors"))
    assert json.loads((path / "buffer-0.json").read_text()) == records["buffer"] and json.loads((path / "state.json").read_text()) == state
    for before, after in zip(optimizer.state.values(), fresh.state.values()):
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"} and all(torch.equal(before[k], after[k]) for k in before)


def test_minibatches_hold_whole_groups_in_order_and_are_even():
    groups = make_buffer({0: [6, 6, 5, 2, 6, 3, 1]})
    batches = split_minibatches(groups, 3)
    assert [[len(group.children) for group in batch] for batch in batches] == [[6, 6], [5, 2], [6, 3, 1]]
    assert split_minibatches([], 2) == [[], []]  # a rank without segments makes as many steps as the others
    for seed in range(30):
        rng = random.Random(seed)
        groups = make_buffer({0: [rng.randint(2, 6) for _ in range(rng.randint(1, 200))]})
        total = num_children(groups)
        batches = split_minibatches(groups, max(round(total / 64), 1))
        assert [id(group) for batch in batches for group in batch] == [id(group) for group in groups]
        assert all(abs(num_children(batch) - total / len(batches)) <= 6 for batch in batches)  # no runt
    for sizes, count in (([4, 8], 2), ([2, 8, 8, 3], 3), ([8, 2, 2, 2], 4), ([1, 1, 8], 3)):  # none is empty
        assert all(split_minibatches(make_buffer({0: sizes}), count)), sizes
    for seed in range(300):  # groups of about the size of a minibatch, as answers to a question with --minibatch-size 8
        groups = make_buffer({0: [random.Random(seed * 100 + k).randint(3, 8) for k in range(8)]})
        batches = split_minibatches(groups, max(round(num_children(groups) / 8), 1))
        assert all(batches)


def test_a_large_group_after_small_ones_does_not_break_the_cap():
    for seed in range(20):
        taken, _ = draw_groups(make_buffer({0: [2, 6, 2, 6, 3]}), per_question=9, per_iteration=100, rng=random.Random(seed))
        assert num_children(taken) <= 9


def test_draw_stops_at_the_caps():
    buffer = make_buffer({0: [6, 6, 2, 2], 1: [6, 6, 2, 2]})
    for seed in range(20):
        taken, kept = draw_groups(buffer, per_question=9, per_iteration=100, rng=random.Random(seed))
        assert len(taken) + len(kept) == 8 and all(isinstance(group, SiblingGroup) for group in kept)
        assert draw_groups(buffer, per_question=100, per_iteration=5, rng=random.Random(seed))[1]
