"""Numbers at their limits, in whole runs of all four scripts: nothing to learn, answers of no or one token, a NaN in a gradient.

A batch in which every answer is truncated is in test_run.py, the same for single steps in test_packing.py and test_ppo.py.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import math_grader
from conftest import ROOT, SCRIPTS, SMALL, tiny_args
from spo_tree import Node, encode_prompt, pack, score_tokens, segment_advantages, sibling_groups, tree_values
from test_run import metrics, weights

START = load_file(ROOT / "tiny" / "model" / "model.safetensors")
FEW = ["--train-data", "tiny/test.jsonl", "--num-iterations", 2]
NORMALIZED = {"spo_tree.py": ["--normalize-advantages"], "spo_chain.py": [], "grpo.py": ["--normalize-advantages"],
              "ppo.py": ["--whiten-advantages"]}


def run(run_script, run_dir, script, *flags):
    """The lines of metrics.jsonl of a run in which every number must be finite, and its weights as well."""
    shutil.rmtree(run_dir, ignore_errors=True)
    status, _, error = run_script(script, *SMALL[script], *FEW, "--run-dir", run_dir, *flags)
    assert status == 0, error
    rows = metrics(run_dir)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(torch.isfinite(value).all() for value in weights(run_dir).values())
    return rows


def unchanged(run_dir):
    return all(torch.equal(value, START[name]) for name, value in weights(run_dir).items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_tokens_masked(run_script, tmp_path, script):
    """No token is below such a threshold: every step is skipped and counted, and nothing moves (PPO's critic does)."""
    rows = run(run_script, tmp_path / "run", script, "--prob-mask", "--prob-threshold", 1e-12)
    assert rows[1]["losses/loss_tokens"] == rows[2]["losses/loss_tokens"] == 0 < rows[2]["losses/skipped_steps"]
    assert rows[2]["losses/grad_norm"] == rows[2]["losses/policy"] == 0 and unchanged(tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("right", [False, True])
def test_equal_rewards(run_script, tmp_path, monkeypatch, script, right):
    """A standard deviation of 0 divides nothing by 0. Without a critic nothing is learned; with one, the surprise is."""
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: right)
    rows = run(run_script, tmp_path / "run", script, *NORMALIZED[script], "--max-response-tokens", 128 if right else 30)
    assert rows[2]["rollout/reward_mean"] == right or rows[2]["rollout/truncated_fraction"] > 0
    if script == "ppo.py":
        assert rows[2]["losses/loss_tokens"] > 0
    elif not right:
        assert rows[2]["losses/loss_tokens"] == 0 and unchanged(tmp_path / "run")


@pytest.fixture(scope="module")
def silent_model(tmp_path_factory):
    """The embedded model, trained for a moment to end every answer before it begins."""
    source, path = ROOT / "tiny" / "model", tmp_path_factory.mktemp("silent")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
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
        status, output, _ = run_script(script, "--model", silent_model, "--max-questions", 4, "--out", tmp_path)
        assert status == 0 and "0.000 +- 0.000" in output and "nan" not in output
        return
    rows = run(run_script, tmp_path / "run", script, "--model", silent_model, "--no-prob-mask")
    assert rows[2]["rollout/response_length"] == pytest.approx(1, abs=0.3) and rows[2]["rollout/reward_mean"] == 0
    assert rows[2]["rollout/truncated_fraction"] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_of_one_token(run_script, tmp_path, script):
    flags = ["--max-response-tokens", 1, "--no-prob-mask", "--temperature", 3]
    rows = run(run_script, tmp_path / "run", script, *flags, *(["--partition", "newline"] if script == "spo_chain.py" else []))
    assert rows[2]["rollout/response_length"] == pytest.approx(1) and rows[2]["rollout/truncated_fraction"] > 0.5


def test_a_segment_without_tokens(model):
    """An engine might return one: it is worth something, and trains nothing."""
    tree = Node([5, 6], [Node([], value=1.0), Node([7, 8], [Node([], value=0.0), Node([9], value=1.0)])])
    assert tree_values(tree) == 0.75
    segment_advantages(tree)
    (row,) = pack([tree], 100)
    assert row.token_ids == [5, 6, 7, 8, 9] and row.scored == [2, 3, 4]
    score_tokens(model, [tree], "old_logprobs", tiny_args())
    assert [len(node.old_logprobs) for node in (tree.children[0], tree.children[1], *tree.children[1].children)] == [0, 2, 0, 1]
    without = Node([5, 6], [Node([7, 8], [Node([9])])])
    assert row.pred == pack([without], 100)[0].pred == [-1, 0, 1, 2, 3]
    score_tokens(model, [without], "old_logprobs", tiny_args())
    assert tree.children[1].old_logprobs == without.children[0].old_logprobs
    assert [len(group.children) for group in sibling_groups(tree, 1, 1)] == [1, 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_nan_in_a_gradient_skips_one_step(run_script, tmp_path, script):
    """Planted in the second of three steps of an iteration: that step is skipped and counted, and the run goes on."""
    source, line = (ROOT / script).read_text(), "    return *gradient_step(policy, optimizer, Z), sums\n"
    assert source.count(line) == 1
    plant = ("    policy.steps = getattr(policy, 'steps', 0) + 1\n"
             "    if policy.steps == 2:\n"
             "        next(policy.parameters()).grad[3, 5] = math.nan\n")  # fmt: skip
    (tmp_path / script).write_text(source.replace(line, plant + line))
    files = ["--model", ROOT / "tiny" / "model", "--train-data", ROOT / "tiny" / "test.jsonl", "--test-data",
             ROOT / "tiny" / "test.jsonl"]
    one_step = ["--num-epochs", 3, "--num-questions", 8, "--minibatch-size", 1000, "--no-prob-mask", "--num-iterations", 1]
    own = {"spo_tree.py": ["--buffer-iterations", 0], "ppo.py": ["--critic-warmup-iterations", 0]}.get(script, [])
    status, _, error = run_script(tmp_path / script, *SMALL[script], *files, *one_step, *own, "--run-dir", tmp_path / "run")
    assert status == 0, error
    rows = metrics(tmp_path / "run")
    assert rows[1]["losses/skipped_steps"] == 1 and rows[1]["losses/loss_tokens"] > 0 and not unchanged(tmp_path / "run")
    assert all(math.isfinite(value) for value in rows[1].values())
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())
