"""Whole runs on a GPU: `pytest -m cuda`. One on a CPU shows on any machine that what is expected can hold."""

from importlib.util import find_spec

import pytest
import torch

from conftest import SCRIPTS, SMALL, run_process
from test_run import metrics

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = [pytest.mark.cuda, NO_GPU]
NO_VLLM = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
RUNS = [("grpo.py", "cpu", "transformers")]
for script in SCRIPTS:
    RUNS.append(pytest.param(script, "cuda", "transformers", marks=CUDA))
    RUNS.append(pytest.param(script, "cuda", "vllm", marks=[*CUDA, NO_VLLM]))


@pytest.mark.parametrize("script, device, sampler", RUNS)
def test_whole_run(run_script, tmp_path, script, device, sampler):
    """Of GRPO's, one goes on after its end, and its model is evaluated."""
    run = run_script if device == "cpu" else run_process
    flags = [*SMALL[script], "--device", device, "--sampler", sampler, "--vllm-memory", 0.12]
    flags += ["--eval-questions", 50, "--num-iterations", 3, "--run-dir", tmp_path / "run"]
    status, _, error = run(script, *flags)
    assert status == 0, error[-3000:]
    assert "recompile_limit" not in error and "without torch.compile" not in error  # FlexAttention is fused
    rows = metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert abs(row["rollout/logprob_gap_mean"]) < 0.02
    assert all(row["losses/loss_tokens"] > 0 for row in rows[2:])  # the first of PPO trains the critic alone
    assert 0.1 < rows[0]["eval/accuracy"] < 0.45  # .235 on all questions
    if script != "grpo.py":
        return
    status, _, error = run(script, "--resume", tmp_path / "run", "--num-iterations", 4)
    assert status == 0 and metrics(tmp_path / "run")[-1]["iteration"] == 4, error[-3000:]
    flags = ["--model", tmp_path / "run" / "model", "--sampler", sampler, "--max-questions", 20]
    status, output, error = run("eval.py", *flags, "--out", tmp_path / "eval")
    assert status == 0 and "  20  " in output, error[-3000:]
