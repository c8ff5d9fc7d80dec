"""Whole runs on a GPU: `pytest -m cuda`. The gradients there are compared in test_packing.py.

The same runs on a CPU show on any machine that what is expected of them can hold.
"""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoTokenizer

from conftest import ROOT, SCRIPTS, SMALL, run_process
from spo_tree import load_problems, load_vllm, sample_vllm
from test_run import metrics, samples

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_VLLM = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
CUDA = [pytest.mark.cuda, NO_GPU]
TINY = str(ROOT / "tiny" / "model")
RUNS = [
    ("cpu", "transformers"),
    pytest.param("cuda", "transformers", marks=CUDA),
    pytest.param("cuda", "vllm", marks=[*CUDA, NO_VLLM]),
]


@pytest.mark.parametrize("device, sampler", RUNS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_three_iterations(tmp_path, script, device, sampler):
    flags = [*SMALL[script], "--device", device, "--sampler", sampler, "--vllm-memory", 0.12]
    flags += ["--eval-questions", 50, "--num-iterations", 3, "--run-dir", tmp_path / "run"]
    status, output, error = run_process(script, *flags)
    assert status == 0, error[-3000:]
    assert "recompile_limit" not in error and "without torch.compile" not in error  # FlexAttention is fused
    rows = metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert abs(row["rollout/logprob_gap_mean"]) < 0.02
    assert all(row["losses/loss_tokens"] > 0 for row in rows[2:])  # the first of PPO trains the critic alone
    assert 0.1 < rows[0]["eval/accuracy"] < 0.45  # .235 on all questions


@pytest.mark.parametrize("device, sampler", RUNS)
def test_a_run_goes_on_and_its_model_is_evaluated(tmp_path, device, sampler):
    flags = [*SMALL["grpo.py"], "--device", device, "--sampler", sampler, "--vllm-memory", 0.12]
    status, _, error = run_process("grpo.py", *flags, "--num-iterations", 1, "--run-dir", tmp_path / "run")
    assert status == 0, error[-3000:]
    status, _, error = run_process("grpo.py", "--resume", tmp_path / "run", "--num-iterations", 2)
    assert status == 0, error[-3000:]
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
    flags = ["--model", tmp_path / "run" / "model", "--sampler", sampler, "--max-questions", 20]
    status, output, error = run_process("eval.py", *flags, "--out", tmp_path / "eval")
    assert status == 0 and "  20  " in output, error[-3000:]


@pytest.mark.cuda
@NO_GPU
def test_the_first_command_does_not_see_the_gpu(tmp_path, monkeypatch):
    flags = ["--branch-factors", 6, 6, 6, "--num-questions", 2, "--num-iterations", 1, "--eval-questions", 20]
    assert run_process("spo_tree.py", *flags, "--run-dir", tmp_path / "with")[0] == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_process("spo_tree.py", *flags, "--run-dir", tmp_path / "without")[0] == 0
    assert samples(tmp_path / "with") == samples(tmp_path / "without")
    rows = [metrics(tmp_path / name)[1] for name in ("with", "without")]
    rows = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    assert rows[0] == rows[1] and rows[0]["losses/loss_tokens"] > 0


@pytest.mark.cuda
@NO_GPU
@NO_VLLM
def test_vllm_draws_the_same_answers_for_the_same_seed():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = load_problems(str(ROOT / "tiny" / "test.jsonl"), "test", tokenizer, "plain", 256)
    prompts = [problem.prompt_ids for problem in problems[:20]]
    engine = load_vllm(TINY, 384, 0.1, seed=1)
    form = ([2], prompts, 4, [90] * len(prompts), 1.0, 1.0)
    answers = []
    for seed in (3, 3, 4):
        engine.reset_prefix_cache()  # else a later call computes less of the prompts, and rounds otherwise
        sampled = sample_vllm(engine, *form, seed)
        answers.append([[completion.token_ids for completion in row] for row in sampled])
    assert answers[0] == answers[1] != answers[2]
