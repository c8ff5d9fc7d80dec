"""Policy loss, mask and KL, each against a formula written out differently."""

import math

import pytest
import torch

from spo_tree import PRESETS, kl_k3, learning_rate_at, loss_mask, policy_loss, seed_for


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",  # gradient with respect to log pi
    [
        (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0),  # on-policy: the policy gradient
        (1.5, 1.0, -1.2, 0.0), (1.5, -1.0, 1.5, 1.5),  # too likely: clipped only where the push would go further
        (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0),  # too unlikely: the same, mirrored
    ],
)  # fmt: skip
def test_clipped_surrogate(ratio, advantage, loss, gradient):
    logprob = torch.tensor([math.log(0.3 * ratio)], requires_grad=True)
    value = policy_loss(logprob, torch.tensor([math.log(0.3)]), torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-6) and logprob.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_k3_is_never_negative_zero_at_equality_and_unbiased():
    p, q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    k3 = kl_k3(p.log(), q.log())
    assert (k3 >= 0).all() and kl_k3(p.log(), p.log()).abs().max() == 0
    assert (p * k3).sum() == pytest.approx((p * (p.log() - q.log())).sum().item(), abs=1e-12)  # E_p[k3] = KL(p || q)
    logp = p.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_k3(x, q.log()), logp)


def test_mask_is_strict_and_excludes_zero_advantages():
    old = torch.tensor([0.5, 0.9, 0.8999, 0.99, 0.5]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0])
    assert loss_mask(advantages, old, 0.9).tolist()[:1] + loss_mask(advantages, old, 0.9).tolist()[2:] == [True, True, False, False]
    assert loss_mask(torch.ones(2), torch.tensor([0.0, -1.0]), 1.0).tolist() == [False, True]  # p = rho is not below rho
    assert loss_mask(advantages, old, math.inf).tolist() == [True, True, True, True, False]  # --no-prob-mask


def test_learning_rate():
    args = PRESETS["gsm8k"]  # 1,000 iterations: 30 of warm-up
    rates = [learning_rate_at(i, 2.0, args) / 2.0 for i in (1, 30, 31, 515, 1000)]
    assert rates == pytest.approx([1 / 30, 1, 970 / 971, 486 / 971, 1 / 971])
    assert {learning_rate_at(i, 0.5, PRESETS["tiny"]) for i in (1, 20, 40)} == {0.5}


def test_seeds_differ_by_every_part():
    seeds = [seed_for(*parts) for parts in [(1, 2, 0, "a"), (1, 2, 0, "b"), (1, 2, 1, "a"), (1, 3, 0, "a"), (2, 2, 0, "a"), (12, 0, "a")]]
    assert len(set(seeds)) == len(seeds) and seed_for(1, 2, 0, "a") == seeds[0]
