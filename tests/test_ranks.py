"""Several processes under torchrun (gloo, on the CPU) against one. Run as a script, it is what they do."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import ppo
import test_ppo
from conftest import ROOT, SCRIPTS, SMALL, tiny_args
from test_cli import assert_usage_error
from test_run import load_state, metrics


def torchrun(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def two_updates(share):
    """Two updates of policy and critic on what `share` picks: weights and numbers.

    Plain gradient descent, as Adam divides by |gradient| and would magnify the rounding of zeros.
    """
    args, numbers = tiny_args("ppo.py", prob_mask=True), []
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    critic = test_ppo.make_critic()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (policy, critic)]
    for step in (0, 1):
        groups = share(test_ppo.make_groups(step, count=5), step)
        ppo.score_tokens(policy, groups, "old_logprobs", args)
        old_values = ppo.score_values(critic, groups, args)
        numbers += ppo.critic_step(critic, optimizers[1], groups, old_values, args).values()
        numbers += ppo.policy_step(policy, optimizers[0], ppo.whiten(groups, args), args).values()
    return [*policy.parameters(), *critic.parameters()], numbers


def work(directory):
    """One of two processes: the updates, what it is dealt, and a run of each script."""
    dist.init_process_group("gloo")
    # torchrun's store serves one group: that of the runs, too
    dist.init_process_group = dist.destroy_process_group = lambda *_, **options: None

    def share(groups, step):
        """Every second group of the first step; all of the second one are the first process's."""
        if step == 0:
            return groups[ppo.RANK :: 2]
        return [] if ppo.RANK else groups

    groups = [ppo.Group(number, 0, [1], [ppo.Completion([2], [])] * 3) for number in range([4, 2][ppo.RANK])]
    dealt = []
    for minibatch_size in (6, 9):
        minibatches = ppo.deal(groups, minibatch_size)
        dealt.append([[group.question for group in minibatch] for minibatch in minibatches])
    torch.save((dealt, *two_updates(share)), f"{directory}/{ppo.RANK}.pt")
    for script in SCRIPTS:
        flags = [*SMALL[script], "--num-iterations", 1, "--run-dir", f"{directory}/{script}"]
        flags += ["--max-response-tokens", 70, "--eval-questions", 4]
        if script == "spo_tree.py":
            flags += ["--segments-per-iteration", 6]  # so that something stays in the buffers
        if script == "ppo.py":
            flags += ["--critic-warmup-iterations", 0]
        sys.argv = [script, *map(str, flags)]
        runpy.run_path(script, run_name="__main__")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The directory that two processes have written to."""
    directory = tmp_path_factory.mktemp("ranks")
    result = torchrun(__file__, directory)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the first prompt") == result.stdout.count("evaluate it") == len(SCRIPTS)
    return directory


def test_two_processes_make_the_same_updates_as_one(two):
    weights, numbers = two_updates(lambda groups, step: groups)
    first, second = [[[0, 3], [1], [2]], [[0, 2], [1, 3]]], [[[], [0], [1]], [[0], [1]]]
    for rank, minibatches in enumerate((first, second)):
        dealt, own_weights, own_numbers = torch.load(two / f"{rank}.pt")
        assert dealt == minibatches and own_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-6)
        for own, one in zip(own_weights, weights):
            assert (own - one).abs().max() < 1e-6


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_process_samples_its_share_of_the_questions(two, script):
    _, row = metrics(two / script)
    (count,) = (value for name, value in row.items() if name in ("segments/count", "answers/count"))
    if script == "spo_tree.py":  # 4 trees of 3 and up to 9 segments
        assert 24 < count <= 48
        buffers = load_state(two / script / "checkpoints" / "000001")["buffers"]
        first, second = ({group.question for group in buffer} for buffer in buffers)
        assert first and second and not first & second
    else:  # 4 answers to each question
        assert count == pytest.approx(16 * row.get("chain/segments", 1))


def test_questions_must_divide_by_the_processes(run_script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert_usage_error(run_script("grpo.py"), "--num-questions", "3 processes")


if __name__ == "__main__":
    work(sys.argv[1])
