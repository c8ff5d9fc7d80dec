"""PPO's own parts: generalized advantage estimation, whitening, the critic and its update."""

import dataclasses
import random

import pytest
import torch

from conftest import ROOT, SMALL, tiny_args
from ppo import Critic, Node, Response, critic_step, gae, loss_mask, pack, score_values, value_loss, whiten_advantages
from test_run import metrics


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_sum_of_discounted_errors(gae_lambda):
    rng = random.Random(0)
    for length in (1, 2, 7, 40):
        for reward in (0.0, 1.0):
            values = [rng.random() for _ in range(length)]
            rewards, after = [0.0] * (length - 1) + [reward], [*values[1:], 0.0]  # the value after the end is 0
            deltas = [r + v_next - v for r, v_next, v in zip(rewards, after, values)]
            brute_force = [sum(gae_lambda**l * deltas[t + l] for l in range(length - t)) for t in range(length)]
            assert gae(values, reward, gae_lambda) == pytest.approx(brute_force)


def test_gae_with_lambda_one_is_reward_minus_value():
    assert gae([0.5, 0.8, 0.2], 1.0, 1.0) == pytest.approx([0.5, 0.2, 0.8])
    assert gae([0.5, 0.8, 0.2], 1.0, 0.0) == pytest.approx([0.3, -0.6, 0.8])
    assert gae([], 1.0, 1.0) == []


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
    assert result.item() == pytest.approx(loss, abs=1e-6) and values.grad.item() == pytest.approx(gradient, abs=1e-6)


def make_trees(seed=0, count=3, answers=3):
    """Prompts with random answers; every answer has advantages, old probabilities and a reward."""
    rng = random.Random(seed)
    trees = []
    for _ in range(count):
        children = []
        for _ in range(answers):
            length = rng.randint(1, 12)
            child = Response([rng.randrange(3, 300) for _ in range(length)], value=float(rng.random() < 0.5))
            child.advantages = [rng.choice([0.0, rng.gauss(1, 2)]) for _ in range(length)]
            child.old_logprobs = [rng.choice([-0.01, -1.0]) for _ in range(length)]
            children.append(child)
        trees.append(Node([rng.randrange(3, 300) for _ in range(rng.randint(2, 9))], children))
    return trees


@pytest.mark.parametrize("prob_mask", [True, False])
def test_whitening_is_over_the_loss_tokens_of_the_whole_minibatch(prob_mask):
    trees, args = make_trees(), tiny_args("ppo.py", prob_mask=prob_mask)
    before = copy_of(trees)
    whitened = whiten_advantages(trees, args, torch.device("cpu"))
    old, new, logprobs = ([x for tree in some for child in tree.children for x in getattr(child, name)]
                          for some, name in ((trees, "advantages"), (whitened, "advantages"), (trees, "old_logprobs")))  # fmt: skip
    mask = loss_mask(torch.tensor(old), torch.tensor(logprobs), 0.9 if prob_mask else float("inf"))
    old, new = torch.tensor(old), torch.tensor(new)
    assert 5 < mask.sum() < len(mask) and torch.equal(old[~mask], new[~mask])  # what is masked stays masked
    assert torch.allclose(new[mask], (old[mask] - old[mask].mean()) / old[mask].std(correction=0), atol=1e-5)
    assert trees == before  # a second epoch starts from the same advantages
    empty = [Node([1, 2], [dataclasses.replace(child, advantages=[0.0] * len(child.token_ids)) for child in tree.children]) for tree in trees]
    assert whiten_advantages(empty, args, torch.device("cpu"))[0].children == empty[0].children
    assert whiten_advantages([], args, torch.device("cpu")) == []


def copy_of(trees):
    return [Node(tree.token_ids, [dataclasses.replace(child) for child in tree.children]) for tree in trees]


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return Critic(str(ROOT / "tiny" / "model")).eval()


def alone(critic, prompt, answer):
    """V before each token of the answer, from the bare sequence: the state before token t ends at position t - 1."""
    hidden = critic.backbone(torch.tensor([prompt + answer])).last_hidden_state[0]
    return critic.head(hidden)[len(prompt) - 1 : -1, 0]


@pytest.mark.parametrize("budget", [24, 40, 384])
def test_values_of_packed_rows_are_those_of_single_sequences(critic, budget):
    trees = make_trees()
    score_values(critic, trees, tiny_args("ppo.py", pack_tokens=budget))
    with torch.no_grad():
        for tree in trees:
            for child in tree.children:
                assert len(child.critic_values) == len(child.token_ids)
                assert torch.allclose(torch.tensor(child.critic_values), alone(critic, tree.token_ids, child.token_ids), atol=1e-5)


@pytest.mark.parametrize("budget", [24, 384])
def test_critic_step_equals_the_naive_computation(budget):
    torch.manual_seed(1)
    critic, trees = Critic(str(ROOT / "tiny" / "model")).eval(), make_trees(5)
    score_values(critic, trees, tiny_args("ppo.py"))
    rng = random.Random(3)
    for tree in trees:
        for child in tree.children:  # as after some steps on other minibatches: the values have moved
            child.critic_values = [value + rng.gauss(0, 0.3) for value in child.critic_values]
    errors = []
    for tree in trees:
        for child in tree.children:
            values, old = alone(critic, tree.token_ids, child.token_ids), torch.tensor(child.critic_values)
            clipped = old + (values - old).clamp(-0.2, 0.2)
            errors.append(0.5 * torch.stack([(values - child.value) ** 2, (clipped - child.value) ** 2]).amax(0))
    loss = torch.cat(errors).mean()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in critic.parameters()])
    critic.zero_grad()
    start = torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    count, norm, loss_sum = critic_step(critic, optimizer, trees, tiny_args("ppo.py", pack_tokens=budget))
    assert count == len(torch.cat(errors)) == sum(len(row.scored) for row in pack(trees, 384))
    assert loss_sum.item() / count == pytest.approx(loss.item(), rel=1e-5) and norm == pytest.approx(expected.norm().item(), rel=1e-4)
    moved = start - torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])
    assert (moved - expected / max(norm, 1.0)).norm() < 1e-4 * moved.norm()


def test_a_gradient_that_is_not_finite_is_not_applied(critic):
    trees, args = make_trees(), tiny_args("ppo.py")
    score_values(critic, trees, args)
    trees[0].children[0].value = float("nan")
    before = [parameter.detach().clone() for parameter in critic.parameters()]
    count, norm, _ = critic_step(critic, torch.optim.AdamW(critic.parameters()), trees, args)
    assert not torch.isfinite(torch.tensor(norm)) and all(torch.equal(a, b) for a, b in zip(before, critic.parameters()))


def test_only_the_critic_learns_during_its_warm_up(run_script, tmp_path):
    from safetensors.torch import load_file

    flags = [*SMALL["ppo.py"], "--num-iterations", 2, "--critic-warmup-iterations", 2, "--num-questions", 16, "--minibatch-size", 16]
    assert run_script("ppo.py", *flags, "--run-dir", tmp_path / "run")[0] == 0
    start, end = load_file(ROOT / "tiny" / "model" / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)
    rows = metrics(tmp_path / "run")
    assert rows[1]["losses/loss_tokens"] == rows[2]["losses/skipped_steps"] == 0 and rows[1]["critic/grad_norm"] > 0
    assert rows[2]["critic/squared_error"] < rows[1]["critic/squared_error"]
    error, mean, bias = (rows[2][f"critic/{name}"] for name in ("squared_error", "return_mean", "error_mean"))
    assert rows[2]["critic/explained_variance"] == pytest.approx(1 - (error - bias**2) / (mean - mean**2))


def test_wrong_flags(run_script, tmp_path):
    for flags in (["--gae-lambda", 1.5], ["--critic-warmup-iterations", -1], ["--samples-per-question", 100]):
        status, _, error = run_script("ppo.py", *flags, "--run-dir", tmp_path / "run")
        assert status == 2 and len(error.strip().splitlines()) == 1
