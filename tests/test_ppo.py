"""PPO's own parts: generalized advantage estimation, whitening, the critic and its update."""

import dataclasses
import itertools
import random

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, SMALL, tiny_args
from ppo import Completion, Critic, Group, critic_step, gae, loss_mask, score_values, value_loss, whiten
from test_run import metrics


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_sum_of_discounted_errors(gae_lambda):
    rng = random.Random(0)
    for length, reward in itertools.product((1, 2, 7, 40), (0.0, 1.0)):
        values = [rng.random() for _ in range(length)]
        rewards, after = [0.0] * (length - 1) + [reward], [*values[1:], 0.0]  # the value after the end is 0
        deltas = [r + v_next - v for r, v_next, v in zip(rewards, after, values)]
        expected = [sum(gae_lambda**l * deltas[t + l] for l in range(length - t)) for t in range(length)]
        assert gae(values, reward, gae_lambda) == pytest.approx(expected)
    assert gae([0.1 + 0.2, 0.3], 0.3, gae_lambda) == [0.0, 0.0]  # rounding is no advantage


@pytest.mark.parametrize(
    "value, old_value, reward, loss, gradient",
    [
        (0.5, 0.5, 1.0, 0.125, -0.5),  # unclipped: 1/2 (V - R)^2
        (0.8, 0.5, 1.0, 0.045, 0.0),  # moved further than .2 towards the reward: no gain from it
        (0.1, 0.5, 1.0, 0.405, -0.9),  # moved away: the larger, unclipped error counts
        (1.2, 0.5, 0.0, 0.72, 1.2),
    ],
)
def test_value_loss(value, old_value, reward, loss, gradient):
    values = torch.tensor([value], requires_grad=True)
    result = value_loss(values, torch.tensor([old_value]), torch.tensor([reward]), 0.2)
    result.sum().backward()
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


def make_groups(seed=0, count=3):
    """Prompts with random answers; every answer has advantages, old probabilities and a reward."""
    rng = random.Random(seed)
    groups = []
    for question in range(count):
        context = [rng.randrange(3, 300) for _ in range(rng.randint(2, 9))]
        groups.append(Group(question, 1, context))
        for _ in range(3):
            length = rng.randint(1, 12)
            answer = Completion([rng.randrange(3, 300) for _ in range(length)], [])
            answer.value = float(rng.random() < 0.5)
            answer.advantages = [rng.choice([0.0, rng.gauss(1, 2)]) for _ in range(length)]
            answer.old_logprobs = [rng.choice([-0.01, -1.0]) for _ in range(length)]
            groups[-1].completions.append(answer)
    return groups


def flat(groups, name):
    """An attribute of all answers as one tensor."""
    answers = itertools.chain(*(group.completions for group in groups))
    return torch.tensor([number for answer in answers for number in getattr(answer, name)])


@pytest.mark.parametrize("prob_mask", [True, False])
def test_whitening_is_over_the_loss_tokens_of_the_whole_minibatch(prob_mask):
    groups, args = make_groups(), tiny_args("ppo.py", prob_mask=prob_mask)
    before = [dataclasses.asdict(group) for group in groups]
    whitened = whiten(groups, args)
    old, new = flat(groups, "advantages"), flat(whitened, "advantages")
    mask = loss_mask(old, flat(groups, "old_logprobs"), 0.9 if prob_mask else float("inf"))
    assert 5 < mask.sum() < len(mask) and torch.equal(old[~mask], new[~mask])  # what is masked stays masked
    assert torch.allclose(new[mask], (old[mask] - old[mask].mean()) / old[mask].std(correction=0), atol=1e-5)
    # a second epoch starts from the same advantages
    assert [dataclasses.asdict(group) for group in groups] == before
    for answer in (answer for group in groups for answer in group.completions):
        answer.advantages = [0.0] * len(answer.token_ids)
    assert not flat(whiten(groups, args), "advantages").any() and whiten([], args) == []


def make_critic():
    torch.manual_seed(0)
    return Critic(tiny_args("ppo.py"), torch.device("cpu")).eval()


def alone(critic, prompt, answer):
    """V before each token of the answer, from the bare sequence: the state before token t ends at t - 1."""
    hidden = critic.backbone(torch.tensor([prompt + answer])).last_hidden_state[0]
    return critic.head(hidden)[len(prompt) - 1 : -1, 0]


@pytest.mark.parametrize("budget", [24, 40, 384])
@torch.no_grad()
def test_values_of_packed_rows_are_those_of_single_sequences(budget):
    critic, groups = make_critic(), make_groups()
    values = score_values(critic, groups, tiny_args("ppo.py", pack_tokens=budget))
    assert len(values) == 9
    for group in groups:
        for answer in group.completions:
            expected = alone(critic, group.context, answer.token_ids)
            assert torch.allclose(torch.tensor(values[answer]), expected, atol=1e-5)


@pytest.mark.parametrize("budget", [24, 384])
def test_critic_step_equals_the_naive_computation(budget):
    critic, groups, rng = make_critic(), make_groups(5), random.Random(3)
    old = score_values(critic, groups, tiny_args("ppo.py"))
    # as after some steps on other minibatches: the values have moved
    old = {answer: [value + rng.gauss(0, 0.3) for value in values] for answer, values in old.items()}
    errors = []
    for group in groups:
        for answer in group.completions:
            values, before = alone(critic, group.context, answer.token_ids), torch.tensor(old[answer])
            clipped = before + (values - before).clamp(-0.2, 0.2)
            both = [(values - answer.value) ** 2, (clipped - answer.value) ** 2]
            errors.append(0.5 * torch.stack(both).amax(0))
    loss = torch.cat(errors).mean()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in critic.parameters()])
    critic.zero_grad()
    start = torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    numbers = critic_step(critic, optimizer, groups, old, tiny_args("ppo.py", pack_tokens=budget))
    assert numbers["losses/value"] == pytest.approx(loss.item(), rel=1e-5)
    norm = numbers["critic/grad_norm"]
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4)
    moved = start - torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])
    assert (moved - expected / max(norm, 1.0)).norm() < 1e-4 * moved.norm()


def test_only_the_critic_learns_during_its_warm_up(run_script, tmp_path):
    flags = [*SMALL["ppo.py"], "--num-iterations", 2, "--critic-warmup-iterations", 2]
    flags += ["--num-questions", 16, "--minibatch-size", 16]
    assert run_script("ppo.py", *flags, "--run-dir", tmp_path / "run")[0] == 0
    start, end = (load_file(path / "model/model.safetensors") for path in (ROOT / "tiny", tmp_path / "run"))
    assert all(torch.equal(start[name], end[name]) for name in start)
    rows = metrics(tmp_path / "run")
    assert rows[2]["rollout/trained_tokens_total"] == rows[2]["losses/optimizer_steps"] == 0
    assert rows[1]["critic/grad_norm"] > 0 and "losses/policy" not in rows[2]
    assert abs(rows[1]["critic/explained_variance"]) < 0.01  # V is near 0 at first
