"""Packed rows against one plain sequence per completion: every token, every gradient."""

import copy
import math
import random

import pytest
import torch

from conftest import random_groups, tiny_args
from spo_tree import Completion, Group, pack, policy_step, row_inputs, score_tokens

T = 0.7
BUDGETS = [15, 24, 40, 64, 10_000]


@pytest.fixture
def groups():
    return random_groups(random.Random(0))


def packed_args(budget, **changes):
    return tiny_args(pack_tokens=budget, temperature=T, kl_coef=0.1, **changes)


def plain_logprobs(model, context, token_ids):
    """log-softmax(logits / T) of one sequence that is not packed, by the library's own plain pass."""
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([context + token_ids], device=model.device)).logits[0, len(context) - 1 : -1]
    targets = torch.tensor(token_ids, device=model.device)[:, None]
    return (logits.float() / T).log_softmax(-1).gather(1, targets)[:, 0]


def completions(groups):
    """Those of groups or rows, in their order."""
    return [completion for group in groups for completion in group.completions]


def test_worked_example_of_the_docstring():
    (row,) = pack([Group(0, 1, [10, 11], [Completion([12, 13], []), Completion([14, 15], [])])], 100)
    assert row.token_ids == [10, 11, 12, 13, 14, 15]
    assert row.position_ids == [0, 1, 2, 3, 2, 3]
    assert row.visible_until == [6, 6, 4, 4, 6, 6]
    assert row.pred == [-1, 0, 1, 2, 1, 4]
    assert row.indices == [2, 3, 4, 5]


@pytest.mark.parametrize("budget, attention", [*((budget, "dense") for budget in BUDGETS), (128, "flex")])
def test_every_token_equals_one_sequence_per_completion(model, groups, budget, attention):
    rows = pack(groups, budget)
    assert all(len(row.token_ids) <= budget for row in rows)
    assert completions(rows) == completions(groups)  # each one once
    once = sum(len(group.context) for group in groups) + sum(len(c.token_ids) for c in completions(groups))
    total = sum(len(row.token_ids) for row in rows)
    assert total == once if budget > 100 else total > once  # contexts are repeated in the next row
    with torch.compiler.set_stance("force_eager"):  # else FlexAttention is compiled to C++ for a minute
        score_tokens(model, groups, "ref_logprobs", packed_args(budget, attention=attention))
    with torch.no_grad():
        for group in groups:
            for completion in group.completions:
                expected = plain_logprobs(model, group.context, completion.token_ids).tolist()
                assert completion.ref_logprobs == pytest.approx(expected, abs=5e-5)
                assert completion.old_logprobs == completion.sampler_logprobs == []


@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_token_sees_its_own_sequence_and_nothing_else(model, groups, budget, attention):
    """Also in the block mask of FlexAttention, for which rows are padded to one length."""
    contexts = {id(c): group.context for group in groups for c in group.completions}
    args = packed_args(budget, attention=attention)
    for row in pack(groups, budget):
        inputs = row_inputs(row, model, args)
        mask, index = inputs["attention_mask"], torch.arange(inputs["input_ids"].numel())
        if attention == "flex":
            assert len(index) % budget == 0
            mask = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
        mask = mask.squeeze()
        assert mask.diagonal().all()
        assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, len(mask))
        indices = iter(row.indices)
        for completion in row.completions:
            sequence = contexts[id(completion)] + completion.token_ids
            for length, q in zip(range(len(contexts[id(completion)]) + 1, len(sequence) + 1), indices):
                assert [row.token_ids[k] for k in mask[q].nonzero()[:, 0]] == sequence[:length]
                before = mask[row.pred[q]].nonzero()[:, 0]  # the sequence that the token is predicted from
                assert [row.token_ids[k] for k in before] == sequence[: length - 1]
                assert row.position_ids[q] == length - 1
        assert not list(indices)


def test_what_is_longer_than_the_budget_gets_its_own_row():
    group = Group(0, 1, list(range(3, 23)), [Completion(list(range(3, 13)), []), Completion([5, 6], [])])
    assert [len(row.token_ids) for row in pack([group], 16)] == [30, 22] and pack([], 16) == []


# ------------------------------------------------------------------------------------------------ policy_step
@pytest.fixture
def scored(model, groups):
    """Old and reference log-probs near the model's: some ratios are clipped. Some advantages are 0."""
    rng = random.Random(1)
    score_tokens(model, groups, "old_logprobs", packed_args(10_000))
    for completion in completions(groups):
        logprobs = completion.old_logprobs
        completion.old_logprobs = [min(x + rng.gauss(0, 0.3), -1e-3) for x in logprobs]
        completion.ref_logprobs = [min(x + rng.gauss(0, 0.3), -1e-3) for x in logprobs]
        completion.advantages = [rng.choice([-0.5, 0.0, 0.25])] * len(logprobs)
    return groups


def step(model, groups, budget, **changes):
    """The gradient that a step applies, before it was clipped to norm 1, and the step's metrics."""
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    metrics = policy_step(policy, optimizer, groups, packed_args(budget, **changes))
    moves = [(a - b).flatten() for a, b in zip(model.parameters(), policy.parameters())]
    return torch.cat(moves).detach() * max(metrics["losses/grad_norm"], 1.0), metrics


def plain_step(model, groups):
    """The same from one plain sequence per completion, with mask, loss and clipping written out."""
    model.zero_grad()
    losses, kls, clipped, old_kls = [], [], [], []
    for group in groups:
        for c in group.completions:
            logprobs = plain_logprobs(model, group.context, c.token_ids)
            for logprob, advantage, old, ref in zip(logprobs, c.advantages, c.old_logprobs, c.ref_logprobs):
                if advantage != 0 and math.exp(old) < 0.9:
                    ratio = (logprob - old).exp()
                    bound = 1.2 if advantage > 0 else 0.8
                    beyond = ratio > bound if advantage > 0 else ratio < bound
                    losses.append(-(bound if beyond else ratio) * advantage)
                    kls.append((ref - logprob).exp() - (ref - logprob) - 1)
                    clipped.append(float(not 0.8 <= ratio <= 1.2))
                    old_kls.append(ratio.item() - 1 - (logprob.item() - old))
    Z = len(losses)
    ((sum(losses) + 0.1 * sum(kls)) / Z).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    sums = {"policy": sum(losses).item(), "kl": sum(kls).item(), "clip_fraction": sum(clipped)}
    metrics = {f"losses/{name}": value / Z for name, value in (sums | {"approx_kl": sum(old_kls)}).items()}
    return gradient, metrics | {"losses/loss_tokens": Z, "losses/grad_norm": gradient.norm().item()}


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_step_equals_one_sequence_per_completion(model, scored, budget):
    """The same gradient and metrics for every budget, in any order of groups and siblings."""
    expected, metrics = plain_step(model, scored)
    assert metrics["losses/loss_tokens"] > 20 and expected.norm() > 0.1
    assert 0 < metrics["losses/clip_fraction"] < 1
    for _ in range(2):
        gradient, packed_metrics = step(model, scored, budget)
        assert (gradient - expected).abs().max() < 1e-5
        assert packed_metrics == pytest.approx(metrics, rel=1e-4)
        scored.reverse()
        for group in scored:
            group.completions.reverse()


def test_masked_tokens_get_exactly_no_gradient(model, scored):
    """Z = 0: no step. Without the mask, all tokens with an advantage are in the loss."""
    for completion in completions(scored):
        completion.old_logprobs = [-0.01] * len(completion.token_ids)  # p_old = .99, above the threshold
    for groups in (scored, []):  # a rank may have drawn nothing
        metrics = policy_step(model, None, groups, packed_args(64))  # Adam's momentum would move the weights
        assert not any(metrics.values()) and all(p.grad is None for p in model.parameters())
    _, metrics = step(model, scored, 64, prob_mask=False)
    advantages = [a for completion in completions(scored) for a in completion.advantages]
    assert metrics["losses/loss_tokens"] == sum(a != 0 for a in advantages) > 20


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(model, scored):
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    next(c for c in completions(scored) if any(c.advantages)).advantages[0] = math.inf
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(RuntimeError, match="non-finite"):
        policy_step(policy, optimizer, scored, packed_args(512, prob_mask=False))
    assert not optimizer.state
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


# ------------------------------------------------------------------------------------------------------- bf16
@pytest.fixture
def smooth(model):
    """A model that bf16 changes by less than a hundredth; the other one's gradients would be noise in it."""
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.initializer_range = 0.05
    return type(model)(config).eval()


@pytest.fixture
def apart(smooth, groups):
    """Log-probs like `scored`, but no ratio is so near to a clipping bound that rounding decides."""
    rng = random.Random(1)
    score_tokens(smooth, groups, "old_logprobs", packed_args(10_000))
    for completion in completions(groups):
        logprobs = completion.old_logprobs
        completion.old_logprobs = [x + rng.choice([-0.4, -0.05, 0.05, 0.4]) for x in logprobs]
        completion.ref_logprobs = [x + rng.gauss(0, 0.3) for x in logprobs]
        completion.advantages = [rng.choice([-0.5, 0.0, 0.25])] * len(logprobs)
    return groups


def bf16_gap(model, groups, attention, checkpointing):
    """|packed bf16 gradient - plain fp32 gradient| as a share of the latter's norm."""
    expected, metrics = plain_step(model, groups)
    assert metrics["losses/loss_tokens"] > 20 and 0.1 < metrics["losses/clip_fraction"] < 0.9
    policy = copy.deepcopy(model)
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train()
    with torch.autocast(model.device.type, torch.bfloat16):
        gradient, packed_metrics = step(policy, groups, 128, attention=attention)
    assert packed_metrics == pytest.approx(metrics, rel=0.05, abs=1e-3)
    return ((gradient - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_gradients_agree_to_a_few_per_cent(smooth, apart, checkpointing):
    gap = bf16_gap(smooth, apart, "dense", checkpointing)
    assert 1e-4 < gap < 0.03  # it was not fp32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_and_dense_gradients_agree_on_a_gpu(smooth, apart, checkpointing):
    for attention in ("flex", "dense"):
        assert bf16_gap(smooth.cuda(), apart, attention, checkpointing) < 0.03
