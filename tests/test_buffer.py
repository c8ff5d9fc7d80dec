"""The replay buffer of sibling groups, and how they are dealt to optimizer steps."""

import random
from collections import Counter

import pytest

from spo_tree import Completion, Group, deal, draw_groups


def make_buffer(sizes: dict[int, list[int]]) -> list[Group]:
    """Groups of the given sizes for each question; all completions are equal but in identity."""
    return [
        Group(question, 1, [0], [Completion([5], [-0.1], advantages=[1.0]) for _ in range(size)])
        for question, groups in sizes.items() for size in groups
    ]  # fmt: skip


def segments(groups) -> Counter:
    """Segments of each question."""
    count = Counter()
    for group in groups:
        count[group.question] += len(group.completions)
    return count


@pytest.mark.parametrize("seed", range(60))
def test_caps_hold_and_what_has_room_is_taken(seed):
    rng = random.Random(seed)
    sizes = {question: [rng.randint(1, 6) for _ in range(rng.randint(1, 20))] for question in range(12)}
    per_question, per_iteration = rng.choice([6, 9, 32, 100]), rng.choice([6, 40, 200, 1000])
    buffer = make_buffer(sizes)
    before = list(buffer)
    taken = draw_groups(buffer, per_question, per_iteration, rng)
    ids = {id(group) for group in taken}
    assert len(ids) == len(taken) and ids <= {id(group) for group in buffer} and buffer == before
    drawn = segments(taken)
    assert max(drawn.values()) <= per_question and drawn.total() <= per_iteration
    for group in buffer:  # what was left had no room
        size = len(group.completions)
        if id(group) not in ids:
            assert drawn[group.question] + size > per_question or drawn.total() + size > per_iteration
    assert draw_groups([], per_question, per_iteration, rng) == []


def test_every_group_is_drawn_equally_often():
    """A group of six segments as often as one of two, while there is room for either."""
    buffer = make_buffer({0: [2, 6], 1: [4]})
    seen = Counter(id(draw_groups(buffer, 6, 6, random.Random(seed))[0]) for seed in range(3000))
    assert all(900 < seen[id(group)] < 1100 for group in buffer)


@pytest.mark.parametrize("sizes, minibatch_size, dealt", [
    ([4] * 5, 8, ["ace", "bd"]),
    ([4] * 5, 7, ["ad", "be", "c"]),
    ([1, 1, 1], 1, ["a", "b", "c"]),
    ([2, 6], 100, ["ab"]),
    ([], 4, [""]),
])  # fmt: skip
def test_groups_are_dealt_in_turn(sizes, minibatch_size, dealt):
    """To steps of about that size; test_ranks.py has two ranks."""
    groups = make_buffer({ord("a") + k: [size] for k, size in enumerate(sizes)})
    minibatches = deal(groups, minibatch_size)
    assert ["".join(chr(group.question) for group in minibatch) for minibatch in minibatches] == dealt
