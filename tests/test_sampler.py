"""The transformers sampler: its tokens follow the model's distribution and its log-probs are the trainer's."""

import math
from collections import Counter

import pytest
import torch

from conftest import tiny_args
from spo_tree import Node, sample_transformers, score_tokens

PREFIXES = [[1, 5, 6], [1, 9, 8, 7, 6, 5, 4], [1, 30], [1, 5, 6, 11]]


@pytest.mark.parametrize("max_rows", [1, 5, 256])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_the_trainers(model, temperature, max_rows):
    sampled = sample_transformers(model, [2], PREFIXES, 3, [6, 1, 20, 9], temperature, 1.0, seed=3, max_rows=max_rows)
    roots = [Node(prefix, [Node(c.token_ids, sampler_logprobs=c.logprobs) for c in row]) for prefix, row in zip(PREFIXES, sampled)]
    score_tokens(model, roots, "old_logprobs", tiny_args(pack_tokens=64, temperature=temperature))
    gaps = [abs(a - b) for root in roots for node in root.children for a, b in zip(node.sampler_logprobs, node.old_logprobs)]
    assert max(gaps) < 2e-5 and len(gaps) > 30


def test_lengths_and_ends(model):
    limits = [6, 1, 20, 9]
    sampled = sample_transformers(model, [2, 17], PREFIXES, 40, limits, 1.0, 1.0, seed=0)
    for row, limit in zip(sampled, limits):
        assert len(row) == 40
        for completion in row:
            assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= limit
            assert completion.finished == (completion.token_ids[-1] in (2, 17))  # either id ends an answer, also as the last token
            assert not {2, 17} & set(completion.token_ids[:-1])
            assert completion.finished or len(completion.token_ids) == limit
    assert len({tuple(completion.token_ids) for completion in sampled[2]}) > 10  # siblings differ


def test_follows_the_distribution(model):
    with torch.no_grad():
        probs = (model(torch.tensor([PREFIXES[0]])).logits[0, -1] / 0.8).softmax(-1)
    n = 4000
    counts = Counter(c.token_ids[0] for c in sample_transformers(model, [2], PREFIXES[:1], n, [1], 0.8, 1.0, seed=1)[0])
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1 / n


def test_top_p_keeps_the_nucleus_and_renormalises(model):
    with torch.no_grad():
        probs = model(torch.tensor([PREFIXES[0]])).logits[0, -1].softmax(-1)
    order = probs.argsort(descending=True).tolist()
    nucleus, mass = [], 0.0
    for token in order:
        nucleus.append(token)
        mass += probs[token].item()
        if mass >= 0.8:
            break
    sampled = sample_transformers(model, [2], PREFIXES[:1], 500, [1], 1.0, 0.8, seed=1)[0]
    assert {c.token_ids[0] for c in sampled} <= set(nucleus) and len(nucleus) < 40
    for completion in sampled:
        assert completion.logprobs[0] == pytest.approx(math.log(probs[completion.token_ids[0]].item() / mass), abs=1e-5)


def test_seed_decides(model):
    first, second, other = (sample_transformers(model, [2], PREFIXES, 2, [8] * 4, 1.0, 1.0, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
