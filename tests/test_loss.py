"""Policy loss, mask and KL, each against a formula written out differently."""

import math

import pytest
import torch

from spo_tree import PRESETS, kl_k3, learning_rate_at, loss_mask, policy_loss


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",  # gradient with respect to log pi
    [
        (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0),  # on-policy: the policy gradient
        (1.5, 1.0, -1.2, 0.0), (1.5, -1.0, 1.5, 1.5),  # too likely: clipped where the push goes further
        (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0),  # too unlikely: the same, mirrored
    ],
)  # fmt: skip
def test_clipped_surrogate(ratio, advantage, loss, gradient):
    logprob = torch.tensor([math.log(0.3 * ratio)], requires_grad=True)
    value = policy_loss(logprob, torch.tensor([math.log(0.3)]), torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_k3_is_never_negative_zero_at_equality_and_unbiased():
    p, q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    k3 = kl_k3(p.log(), q.log())
    assert (k3 >= 0).all() and kl_k3(p.log(), p.log()).abs().max() == 0
    assert (p * k3).sum() == pytest.approx((p * (p.log() - q.log())).sum().item(), abs=1e-12)  # KL(p || q)
    assert torch.autograd.gradcheck(lambda x: kl_k3(x, q.log()), p.log().requires_grad_())


@pytest.mark.parametrize(
    "threshold, expected",
    [(0.9, [1, 0, 0, 1, 0]), (1.0, [1, 0, 1, 1, 0]), (math.inf, [1, 1, 1, 1, 0])],  # inf: --no-prob-mask
)
def test_mask_is_strict_and_excludes_zero_advantages(threshold, expected):
    """A probability of exactly 1 is not below a threshold of 1."""
    old = torch.tensor([0.5, 1.0, 0.95, 0.89, 0.5]).log()
    assert loss_mask(torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]), old, threshold).tolist() == expected


def test_learning_rate():
    args = PRESETS["gsm8k"]  # 1,000 iterations: 30 of warm-up
    rates = [learning_rate_at(i, 2.0, args) / 2.0 for i in (1, 30, 31, 515, 1000)]
    assert rates == pytest.approx([1 / 30, 1, 970 / 971, 486 / 971, 1 / 971])
    assert {learning_rate_at(i, 0.5, PRESETS["tiny"]) for i in (1, 20, 40)} == {0.5}
