"""Several processes under torchrun (gloo, on the CPU) against one."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ppo
import test_ppo
from conftest import ROOT, SCRIPTS, SMALL, random_groups, tiny_args
from spo_tree import policy_step, score_tokens
from test_cli import assert_usage_error
from test_run import METRICS, OWN_METRICS, differences, load_state, metrics


def torchrun(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def make_groups(policy, seed):
    """Five groups whose old log-probs are near the policy's; a third of the advantages is zero."""
    rng = random.Random(seed)
    groups = random_groups(rng, 5)
    score_tokens(policy, groups, "old_logprobs", tiny_args())
    for group in groups:
        for c in group.completions:
            c.ref_logprobs = [x + rng.gauss(0, 0.2) for x in c.old_logprobs]
            c.old_logprobs = [x + rng.gauss(0, 0.2) for x in c.old_logprobs]
            c.advantages = [rng.choice([-0.5, 0.0, 0.25])] * len(c.token_ids)
    return groups


def policy_updates(share):
    """Two steps on the groups that `share` picks: weights and metrics. Plain gradient descent, as Adam
    divides by |gradient| and would magnify the rounding of gradients that are zero."""
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model", dtype=torch.float32).eval()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    batches = [share(make_groups(policy, seed)) for seed in (1, 2)]
    numbers = [policy_step(policy, optimizer, groups, tiny_args(kl_coef=0.1)) for groups in batches]
    return dict(policy.named_parameters()), numbers


def critic_updates(share):
    """Two steps of a critic, and the advantages after whitening: weights and metrics."""
    critic, args = test_ppo.make_critic(), tiny_args("ppo.py", prob_mask=True)
    optimizer, numbers = torch.optim.SGD(critic.parameters(), lr=0.1), []
    for seed in (1, 2):
        groups = share(test_ppo.make_groups(seed, count=5))
        old = ppo.score_values(critic, groups, args)
        numbers.append(ppo.critic_step(critic, optimizer, groups, old, args))
        advantages = test_ppo.flat(ppo.whiten(groups, args), "advantages")
        # of all ranks, as the others are averaged over them; squares would only count the tokens
        numbers[-1]["sizes"] = ppo.WORLD_SIZE * advantages.abs().sum().item()
    return dict(critic.named_parameters()), numbers


UPDATES = {"policy": policy_updates, "critic": critic_updates}
SHARES = {  # what a rank gets
    "even": lambda groups, rank: groups[rank::2],
    "one has all": lambda groups, rank: [] if rank else groups,
}


@pytest.fixture(scope="module")
def updates_of_two(tmp_path_factory):
    """A directory with the results of all updates by two processes."""
    directory = tmp_path_factory.mktemp("ranks")
    result = torchrun(ROOT / "tests" / "rank_worker.py", directory)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("shares", SHARES)
def test_two_processes_make_the_same_update_as_one(updates_of_two, kind, shares):
    weights, numbers = UPDATES[kind](lambda groups: groups)
    two = load_file(updates_of_two / f"{kind} {shares}.safetensors")
    one = [value for step in numbers for value in step.values()]
    assert two.pop("numbers").tolist() == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert two.keys() == weights.keys() and all(step.get("losses/loss_tokens", 9) > 5 for step in numbers)
    assert max((weights[name] - two[name]).abs().max().item() for name in two) < 1e-6
    norms = [value for step in numbers for name, value in step.items() if "grad_norm" in name]
    assert len(norms) == 2 and min(norms) > 1e-2  # they moved


def test_each_group_is_dealt_to_one_step(updates_of_two):
    """Two ranks make the same number of steps, of groups whose numbers differ by one at most."""
    dealt = json.loads((updates_of_two / "dealt.json").read_text())
    assert [minibatches for *_, minibatches in dealt[0]] == [[[0, 3], [1], [2]], [[], [0], [1]]]
    for ranks in dealt:
        (_, size, first), (_, _, second) = ranks
        total = sum(sum(sizes) for sizes, *_ in ranks)
        assert len(first) == len(second) == max(round(total / size), 1)
        for sizes, _, minibatches in ranks:
            assert sorted(sum(minibatches, [])) == [*range(len(sizes))]
            assert all(numbers == sorted(numbers) for numbers in minibatches)
        of_both = [len(a) + len(b) for a, b in zip(first, second)]
        assert max(of_both) - min(of_both) <= 1
    assert max(len(first) for (_, _, first), _ in dealt) > 50


def test_all_ranks_end_when_the_sampler_of_one_is_wrong(updates_of_two):
    ends = json.loads((updates_of_two / "ends.json").read_text())
    assert ends[0] == ends[1] == [pytest.approx(0.5e-4), ends[0][1]]
    assert ends[0][1].startswith("error: log-probs of sampler and trainer differ by 0.1,")


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_with_two_processes(run_script, tmp_path, script):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SMALL[script], "--checkpoint-every", 1, "--eval-every", 1]
    if script == "spo_tree.py":
        flags += ["--segments-per-iteration", 12]  # so that something stays in the buffers
    if script == "ppo.py":
        flags += ["--num-questions", 8, "--samples-per-question", 1, "--minibatch-size", 1]
    result = torchrun(script, *flags, "--num-iterations", 3, "--run-dir", whole)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the first prompt") == 1 and result.stdout.count("evaluate it") == 1
    rows = metrics(whole)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3] and set(METRICS) <= set(rows[2])
    # of both processes: 4 questions, 4 answers each (PPO: 8, one each), or trees of 3 and up to 9 segments
    count = rows[1][OWN_METRICS[script][0]]
    exact = {"grpo.py": 4 * 4, "ppo.py": 8}
    assert count == exact[script] if script in exact else count % 1 == 0 and count > 4 * 12 / 2
    assert rows[3]["losses/loss_tokens"] > 0
    if script == "ppo.py":  # each of the eight minibatches has one of the answers, four of each process
        assert rows[3]["losses/optimizer_steps"] == 8
    if script != "spo_tree.py":
        return  # the resume is the same text
    buffers = load_state(whole / "checkpoints" / "000003")["buffers"]
    questions = [{group.question for group in buffer} for buffer in buffers]
    assert len(questions) == 2 and all(questions) and not questions[0] & questions[1]
    assert torchrun(script, *flags, "--num-iterations", 2, "--run-dir", parts).returncode == 0
    assert torchrun(script, "--resume", parts, "--num-iterations", 3).returncode == 0
    assert differences(whole, parts) == []
    assert_usage_error(run_script(script, "--resume", parts, "--num-iterations", 4), "2 processes")


@pytest.mark.parametrize("script", SCRIPTS)
def test_questions_must_divide_by_the_processes(run_script, monkeypatch, script):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert_usage_error(run_script(script), "--num-questions", "3 processes")
