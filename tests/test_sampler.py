"""The transformers sampler: its tokens follow the model's distribution, its log-probs are the trainer's."""

import math
from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import tiny_args
from spo_tree import Completion, Group, check_sampler, sample_transformers, score_tokens

CONTEXTS = [[1, 5, 6], [1, 9, 8, 7, 6, 5, 4], [1, 30], [1, 5, 6, 11]]
LIMITS = [6, 1, 20, 9]


def nucleus(model, context, temperature, top_p):
    """Probabilities of the next token: the likeliest tokens whose sum reaches top_p, renormalised."""
    with torch.no_grad():
        probs = (model(torch.tensor([context])).logits[0, -1] / temperature).softmax(-1).tolist()
    kept, mass = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if mass < top_p:
            kept[token] = probs[token]
            mass += probs[token]
    return {token: prob / mass for token, prob in kept.items()}


def assert_distribution(drawn, probs):
    """Chi-square test; tokens that are expected fewer than five times are counted as one."""
    n, counts = len(drawn), Counter(drawn)
    assert set(counts) <= set(probs)
    common = [token for token, prob in probs.items() if n * prob >= 5]
    pairs = [(counts[token], n * probs[token]) for token in common]
    rest = n - sum(expected for _, expected in pairs)
    if rest > 1:
        pairs.append((n - sum(count for count, _ in pairs), rest))
    chi_square, degrees = sum((count - expected) ** 2 / expected for count, expected in pairs), len(pairs) - 1
    assert degrees > 1 and chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.6)])
def test_draws_follow_the_distribution(model, temperature, top_p):
    """Of the first token, and of the second behind the most frequent first, after rows were dropped."""
    context, first = CONTEXTS[0], nucleus(model, CONTEXTS[0], temperature, top_p)
    ends = [token for token in sorted(first, key=first.get)[-3:-1]]  # frequent, so that many rows are dropped
    (sampled,) = sample_transformers(model, ends, [context], 6000, [2], temperature, top_p, seed=1)
    assert_distribution([c.token_ids[0] for c in sampled], first)
    for c in sampled[:100]:
        assert c.sampler_logprobs[0] == pytest.approx(math.log(first[c.token_ids[0]]), abs=1e-5)
    token = max(first, key=first.get)
    second = nucleus(model, [*context, token], temperature, top_p)
    assert_distribution([c.token_ids[1] for c in sampled if c.token_ids[0] == token], second)


@pytest.mark.parametrize("max_sequences", [1, 5, 256])
@pytest.mark.parametrize("temperature, positions", [(0.7, "rotary"), (1.0, "rotary"), (1.0, "learned")])
def test_logprobs_equal_the_trainers(model, temperature, positions, max_sequences):
    """Whatever is padded on the left in a batch, and whichever rows are dropped."""
    if positions == "learned":  # absolute ones, which show an offset that rotary positions do not
        size = dict(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3)).eval()
    sampled = sample_transformers(model, [2], CONTEXTS, 3, LIMITS, temperature, 1.0, 3, max_sequences)
    groups = [Group(0, 1, context, completions) for context, completions in zip(CONTEXTS, sampled)]
    score_tokens(model, groups, "old_logprobs", tiny_args(pack_tokens=64, temperature=temperature))
    for group in groups:
        for completion in group.completions:
            assert completion.sampler_logprobs == pytest.approx(completion.old_logprobs, abs=2e-5)
    assert sum(len(completion.token_ids) for group in groups for completion in group.completions) > 30


def test_lengths_and_ends(model):
    sampled = sample_transformers(model, [2, 17], CONTEXTS, 40, LIMITS, 1.0, 1.0, seed=0)
    assert len(sampled) == 4 and {len(completions) for completions in sampled} == {40}
    for completions, limit in zip(sampled, LIMITS):
        for c in completions:
            assert 1 <= len(c.token_ids) == len(c.sampler_logprobs) <= limit
            assert c.finished == (c.token_ids[-1] in (2, 17))  # also as the last token
            assert not {2, 17} & set(c.token_ids[:-1])
            assert c.finished or len(c.token_ids) == limit
    assert sum(c.finished for completions in sampled for c in completions) > 20
    assert len({tuple(c.token_ids) for c in sampled[2]}) > 10  # siblings differ
    assert sample_transformers(model, [2], [], 3, [], 1.0, 1.0, seed=0) == []


FP32, BF16, NUCLEUS = torch.device("cpu"), torch.device("cuda"), -math.log(0.8)
GAPS = {
    "fp32, rounding": (FP32, 1.0, 0.5, 9e-4, True),
    "fp32, one token": (FP32, 1.0, 0.001, 2e-3, False),
    "fp32, within the nucleus": (FP32, 0.8, 1.0, NUCLEUS, True),
    "fp32, a nucleus that was not asked for": (FP32, 1.0, 1.0, NUCLEUS, False),
    "bf16, rounding": (BF16, 1.0, 0.9, -0.1, True),
    "bf16, wrong in the mean": (BF16, 1.0, 0.9, -0.12, False),
    "bf16, few far tokens": (BF16, 1.0, 0.009, 3.0, True),
    "bf16, many far tokens": (BF16, 1.0, 0.011, 1.1, False),
    "bf16, beyond the nucleus": (BF16, 0.8, 1.0, NUCLEUS + 0.11, False),
    "fp32, not a number": (FP32, 1.0, 0.001, math.nan, False),
    "not a number": (BF16, 1.0, 0.001, math.nan, False),
}


@pytest.mark.parametrize("name", GAPS)
def test_check_of_the_sampler(name):
    """At a temperature of .5: in bf16 .1 in the mean and 1.0 for 99 % of the tokens are rounding."""
    device, top_p, share, gap, passes = GAPS[name]
    gaps = [0.0] * round(1000 * (1 - share)) + [gap] * round(1000 * share)
    scored = Completion([7] * 1000, gaps, old_logprobs=[0.0] * 1000)
    args = tiny_args(temperature=0.5)
    if passes:
        assert check_sampler([Group(0, 1, [7], [scored])], top_p, args, device) == pytest.approx(sum(gaps) / 1000)
        return
    with pytest.raises(SystemExit) as exit:
        check_sampler([Group(0, 1, [7], [scored])], top_p, args, device)
    assert exit.value.code.startswith("error: log-probs of sampler and trainer differ")
