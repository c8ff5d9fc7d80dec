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

import test_ppo
from conftest import ROOT, SCRIPTS, SMALL, tiny_args
from ppo import Critic, critic_step, score_values, whiten_advantages
from spo_tree import Node, policy_step, score_tokens
from test_run import METRICS, metrics, without_times

def torchrun(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def make_policy():
    return AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model", dtype=torch.float32).eval()


def make_trees(policy, seed):
    """Five trees with old log-probs near the policy's, reference log-probs, and advantages of which a third is zero."""
    rng = random.Random(seed)

    def grow(depth):
        return Node([rng.randrange(3, 300) for _ in range(rng.randint(1, 9))], [grow(depth - 1) for _ in range(3 * (depth > 0))])

    trees = [grow(2) for _ in range(5)]
    score_tokens(policy, trees, "old_logprobs", tiny_args())
    stack = [child for tree in trees for child in tree.children]
    while stack:
        node = stack.pop()
        stack += node.children
        node.ref_logprobs = [x + rng.gauss(0, 0.2) for x in node.old_logprobs]
        node.old_logprobs = [x + rng.gauss(0, 0.2) for x in node.old_logprobs]
        node.advantages = [rng.choice([-0.5, 0.0, 0.25])] * len(node.token_ids)
    return trees


@pytest.mark.parametrize("shares", ["even", "one rank has none"])
def test_two_processes_make_the_same_update_as_one(tmp_path, shares):
    """With plain gradient descent: Adam divides by |gradient| and would magnify the rounding of gradients that are zero."""
    policy = make_policy()
    start = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    numbers = []
    for trees in [make_trees(policy, seed) for seed in (1, 2)]:
        Z, norm, sums = policy_step(policy, optimizer, trees, tiny_args(kl_coef=0.1))
        numbers += [Z, norm, *sums[:5].tolist()]
    result = torchrun(ROOT / "tests" / "rank_worker.py", tmp_path / "two.safetensors", shares)
    assert result.returncode == 0, result.stderr
    two = load_file(tmp_path / "two.safetensors")
    assert two.pop("numbers").tolist() == pytest.approx(numbers, rel=1e-4)
    one = {name: value for name, value in policy.state_dict().items() if name in two}
    assert max((a - b).abs().max().item() for a, b in zip(start, policy.parameters())) > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in two) < 1e-6


def critic_updates(trees_of_rank, sum_over_ranks):
    """Two steps of a critic, and the advantages after whitening: (weights, numbers) of all ranks together."""
    torch.manual_seed(0)
    critic, args = Critic(str(ROOT / "tiny" / "model")).eval(), tiny_args("ppo.py", prob_mask=True)
    optimizer, numbers = torch.optim.SGD(critic.parameters(), lr=0.1), []
    for seed in (1, 2):
        trees = trees_of_rank(test_ppo.make_trees(seed, count=5))
        score_values(critic, trees, args)
        count, norm, loss_sum = critic_step(critic, optimizer, trees, args)
        whitened = whiten_advantages(trees, args, torch.device("cpu"))
        squares = sum(a**2 for tree in whitened for child in tree.children for a in child.advantages)
        numbers += [count, norm, *sum_over_ranks([loss_sum.item(), squares])]
    return {f"critic.{name}": value.detach().clone() for name, value in critic.named_parameters()}, numbers


def test_two_processes_make_the_same_update_of_the_critic_as_one(tmp_path):
    weights, numbers = critic_updates(lambda trees: trees, lambda values: values)
    result = torchrun(ROOT / "tests" / "rank_worker.py", tmp_path / "two.safetensors", "critic")
    assert result.returncode == 0, result.stderr
    two = load_file(tmp_path / "two.safetensors")
    assert two.pop("numbers").tolist() == pytest.approx(numbers, rel=1e-4)
    assert two.keys() == weights.keys() and max((weights[name] - two[name]).abs().max().item() for name in two) < 1e-6


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_with_two_processes(tmp_path, script):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SMALL[script], "--checkpoint-every", 1, "--eval-every", 1]
    result = torchrun(script, *flags, "--num-iterations", 3, "--run-dir", whole)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(", preset tiny") == 1 and result.stdout.count("evaluate it") == 1
    assert [row["iteration"] for row in metrics(whole)] == [0, 1, 2, 3] and set(METRICS) <= set(metrics(whole)[2])
    count = metrics(whole)[1]["segments/count"]  # of both processes: 4 questions, 4 answers each, or trees of 3 and up to 9 segments
    assert count == 4 * 4 if script in ("grpo.py", "ppo.py") else count % 1 == 0 and count > 4 * 12 / 2
    assert metrics(whole)[3]["losses/loss_tokens"] > 0
    if script != "spo_tree.py":
        return  # the resume is the same text
    assert {path.name for path in (whole / "checkpoints" / "000003").glob("buffer*")} == {"buffer-0.json", "buffer-1.json"}
    buffers = [json.loads((whole / "checkpoints" / "000003" / f"buffer-{rank}.json").read_text()) for rank in (0, 1)]
    questions = [{group["question"] for group in buffer} for buffer in buffers]
    assert questions[0] and questions[1] and not questions[0] & questions[1]
    assert torchrun(script, *flags, "--num-iterations", 2, "--run-dir", parts).returncode == 0
    assert torchrun(script, "--resume", parts, "--num-iterations", 3).returncode == 0
    assert without_times(metrics(parts)) == without_times(metrics(whole))
    alone = subprocess.run([sys.executable, script, "--resume", parts, "--num-iterations", "4"], cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode == 2 and "2 processes" in alone.stderr


def test_questions_must_divide_by_the_processes(run_script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, _, error = run_script("spo_tree.py")
    assert status == 2 and "--num-questions" in error and "3 processes" in error
