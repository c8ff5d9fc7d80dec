"""Numbers at their limits, in whole runs of all four scripts: nothing to learn, answers of no or one token.

A gradient that is not finite is in test_packing.py; a batch of answers that were all cut in test_run.py.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import math_grader
from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import encode_prompt
from test_run import metrics, same_weights, weights

START = ROOT / "tiny" / "model"


def run(run_script, run_dir, script, *flags):
    """The last line of metrics.jsonl of a run in which every number and every weight must be finite."""
    few = ["--train-data", "tiny/test.jsonl", "--num-iterations", 2, "--run-dir", run_dir]
    status, _, error = run_script(script, *SMALL[script], *few, *flags)
    assert status == 0, error
    rows = metrics(run_dir)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(torch.isfinite(value).all() for value in weights(run_dir / "model").values())
    return rows[2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_tokens_masked(run_script, tmp_path, script):
    """No token is below such a threshold: no step is made, and nothing moves but PPO's critic."""
    last = run(run_script, tmp_path / "run", script, "--prob-mask", "--prob-threshold", 1e-12)
    for name in ("loss_tokens", "optimizer_steps", "grad_norm", "policy"):
        assert last[f"losses/{name}"] == 0
    assert same_weights(tmp_path / "run" / "model", START)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("right", [False, True])
def test_equal_rewards(run_script, tmp_path, monkeypatch, script, right):
    """A standard deviation of 0 divides nothing by 0. Without a critic nothing is learned; with one it is."""
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: right)
    own = {"spo_chain.py": [], "ppo.py": ["--whiten-advantages"]}.get(script, ["--normalize-advantages"])
    last = run(run_script, tmp_path / "run", script, *own, "--max-response-tokens", 128 if right else 30)
    assert last["rollout/reward_mean"] == right or last["rollout/truncated_fraction"] > 0
    if script == "ppo.py":
        assert last["losses/loss_tokens"] > 0
    elif not right:
        assert last["losses/loss_tokens"] == 0 and same_weights(tmp_path / "run" / "model", START)


@pytest.fixture(scope="module")
def silent_model(tmp_path_factory):
    """The embedded model, trained for a moment to end every answer before it begins."""
    path = tmp_path_factory.mktemp("silent")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(START), AutoTokenizer.from_pretrained(START)
    questions = [json.loads(line)["question"] for line in (ROOT / "tiny" / "test.jsonl").open()]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for question in questions[:60]:
        logits = model(torch.tensor([encode_prompt(tokenizer, "plain", question)])).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor([tokenizer.eos_token_id])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_empty_answers(run_script, tmp_path, silent_model, script):
    """Of such an answer only the end of sequence is sampled: one token, no text, no reward."""
    if script == "eval.py":
        flags = ["--model", silent_model, "--max-questions", 4, "--out", tmp_path]
        status, output, _ = run_script(script, *flags)
        assert status == 0 and "0.000 +- 0.000" in output and "nan" not in output
        return
    last = run(run_script, tmp_path / "run", script, "--model", silent_model, "--no-prob-mask")
    assert last["rollout/response_length"] == pytest.approx(1, abs=0.3)
    assert last["rollout/reward_mean"] == last["rollout/truncated_fraction"] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_of_one_token(run_script, tmp_path, script):
    flags = ["--max-response-tokens", 1, "--no-prob-mask", "--temperature", 3]
    if script == "spo_chain.py":
        flags += ["--partition", "newline"]
    last = run(run_script, tmp_path / "run", script, *flags)
    assert last["rollout/response_length"] == pytest.approx(1) and last["rollout/truncated_fraction"] > 0.5
