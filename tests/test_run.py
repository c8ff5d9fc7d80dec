"""The training scripts as a whole: files, resume bit for bit, independence of the packing budget, and learning."""

import json
import random
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import math_grader
from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import encode_prompt, load_problems
from transformers import AutoTokenizer

METRICS = """iteration time/elapsed_s time/sample_s time/value_s time/logprobs_s time/train_s time/sync_s rollout/generated_tokens_total
rollout/trained_tokens_total rollout/reward_mean rollout/response_length rollout/truncated_fraction rollout/unique_fraction
rollout/logprob_gap_mean segments/count segments/tokens_mean segments/zero_advantage_fraction losses/policy losses/kl losses/entropy
losses/clip_fraction losses/approx_kl losses/ratio_max losses/grad_norm losses/learning_rate losses/loss_tokens
losses/optimizer_steps losses/skipped_steps""".split()
OWN_METRICS = {
    "spo_tree.py": "buffer/size buffer/age_mean buffer/expired_fraction",
    "spo_chain.py": "chain/cutpoints chain/segments chain/unique_fraction chain/reward_std chain/rollout_tokens chain/rollout_fraction",
    "grpo.py": "rollout/equal_reward_fraction",
    "ppo.py": "losses/value critic/return_mean critic/error_mean critic/squared_error critic/explained_variance critic/grad_norm",
}
EVAL_METRICS = "eval/accuracy eval/accuracy_ci95 eval/truncated_fraction eval/response_length time/eval_s".split()


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_directory_and_metrics(run_script, tmp_path, script):
    run_dir, name = tmp_path / "run", {"grpo.py": "GRPO", "ppo.py": "PPO", "spo_tree.py": "SPO-tree", "spo_chain.py": "SPO-chain"}[script]
    status, output, error = run_script(script, *SMALL[script], "--num-iterations", 2, "--kl-coef", 0.01, "--run-dir", run_dir)
    assert status == 0 and output.startswith(f"{name}, preset tiny") and f"eval.py --model {run_dir}/model" in output, error
    assert {path.name for path in run_dir.iterdir()} == {"args.json", script, "metrics.jsonl", "samples.jsonl", "checkpoints", "model"}
    assert (run_dir / script).read_text() == (ROOT / script).read_text()
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["args"]["kl_coef"] == 0.01 and saved["versions"]["torch"] == torch.__version__
    rows = metrics(run_dir)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert set(rows[0]) == {"iteration", "time/elapsed_s", *EVAL_METRICS}
    assert set(rows[1]) == {*METRICS, *OWN_METRICS[script].split()} and set(rows[2]) == {*rows[1], *EVAL_METRICS}
    for row in rows[1:]:
        assert abs(row["rollout/logprob_gap_mean"]) < 1e-5
        assert row["segments/count"] >= 4 * 3 and 0 <= row["segments/zero_advantage_fraction"] <= 1
        assert row["losses/kl"] > -1e-9 and (row["losses/loss_tokens"] > 0 or script == "ppo.py" and row["iteration"] == 1)
    assert rows[2]["losses/kl"] > 0
    assert rows[2]["rollout/generated_tokens_total"] > rows[1]["rollout/generated_tokens_total"] > 0
    answers = rows[1]["segments/count"] * rows[1]["segments/tokens_mean"]
    assert rows[1]["rollout/generated_tokens_total"] == round(answers + rows[1].get("chain/rollout_tokens", 0))


RESUMED = [(script, []) for script in SCRIPTS] + [("spo_tree.py", ["--buffer-iterations", 0]), ("spo_chain.py", ["--partition", "newline"])]


@pytest.mark.parametrize("script, own", RESUMED)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(run_script, tmp_path, script, own):
    flags = [*SMALL[script], *own, "--checkpoint-every", 1, "--eval-every", 2]
    assert run_script(script, *flags, "--num-iterations", 4, "--run-dir", tmp_path / "whole")[0] == 0
    assert run_script(script, *flags, "--num-iterations", 2, "--run-dir", tmp_path / "parts")[0] == 0
    # what a kill leaves behind: lines after the last checkpoint, a torn line, a checkpoint half written
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3}\n{"iteration": 4, "ti')
    (tmp_path / "parts" / "checkpoints" / "new").mkdir()
    status, output, error = run_script(script, "--resume", tmp_path / "parts", "--num-iterations", 4)
    assert status == 0 and "continued after iteration 2" in output, error
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for path in (tmp_path / "whole" / "checkpoints" / "000004").glob("*.safetensors"):  # optimizers and critic as well
        first, second = load_file(path), load_file(tmp_path / "parts" / "checkpoints" / "000004" / path.name)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert without_times(metrics(tmp_path / "whole")) == without_times(metrics(tmp_path / "parts"))
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["000003", "000004"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_refuses_another_algorithm(run_script, tmp_path, script):
    assert run_script(script, *SMALL[script], "--num-iterations", 1, "--run-dir", tmp_path / "run")[0] == 0
    before = weights(tmp_path / "run")
    status, _, error = run_script(script, "--resume", tmp_path / "run", "--learning-rate", 1e-5)
    assert status == 2 and "--learning-rate cannot change" in error
    assert run_script(script, "--resume", tmp_path / "run", "--test-data", "")[0] == 2  # would hold out other rows
    status, _, error = run_script(script, "--resume", tmp_path / "run")
    assert status == 2 and "is done" in error
    shutil.rmtree(tmp_path / "run" / "model")  # as if killed before it was written: the resume only writes it
    assert run_script(script, "--resume", tmp_path / "run")[0] == 0
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    assert run_script(other, "--resume", tmp_path / "run", "--num-iterations", 2)[0] == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_can_end_at_its_last_checkpoint(run_script, tmp_path, script):
    """Killed in iteration 2 and resumed with --num-iterations 1: the final model is written, though only iteration 0 was evaluated."""
    flags = ["--num-iterations", 2, "--checkpoint-every", 1, "--eval-every", 100, "--run-dir", tmp_path / "run"]
    assert run_script(script, *SMALL[script], *flags)[0] == 0
    for directory in ("model", "checkpoints/000002"):
        shutil.rmtree(tmp_path / "run" / directory)
    status, output, error = run_script(script, "--resume", tmp_path / "run", "--num-iterations", 1)
    assert status == 0 and [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1], error
    assert all(torch.equal(value, load_file(tmp_path / "run" / "checkpoints" / "000001" / "model.safetensors")[name])
               for name, value in weights(tmp_path / "run").items())


def test_an_extended_run_that_is_killed_shows_no_final_model(run_script, tmp_path):
    """What lies in model/ is the end of the run: the model of an earlier end is gone as soon as the run goes on."""
    assert run_script("grpo.py", *SMALL["grpo.py"], "--num-iterations", 1, "--run-dir", tmp_path / "run")[0] == 0
    with pytest.raises(RuntimeError, match="killed"):
        broken = (ROOT / "grpo.py").read_text().replace("        clock = {", '        raise RuntimeError("killed")\n        clock = {')
        (tmp_path / "grpo.py").write_text(broken)
        run_script(tmp_path / "grpo.py", "--resume", tmp_path / "run", "--num-iterations", 2)
    assert not (tmp_path / "run" / "model").exists()
    assert run_script("grpo.py", "--resume", tmp_path / "run")[0] == 0 and len(metrics(tmp_path / "run")) == 3
    shutil.rmtree(tmp_path / "run" / "model")  # the number of iterations may come down to the checkpoint's, which has no evaluation
    assert run_script("grpo.py", "--resume", tmp_path / "run", "--num-iterations", 2)[0] == 0


def test_update_does_not_depend_on_the_packing_budget(run_script, tmp_path):
    for budget in (220, 512):
        run_script("spo_tree.py", *SMALL["spo_tree.py"], "--pack-tokens", budget, "--num-iterations", 1, "--kl-coef", 0.1, "--run-dir", tmp_path / str(budget))
    (_, small), (_, large) = (metrics(tmp_path / str(budget)) for budget in (220, 512))
    for name in ("losses/policy", "losses/grad_norm", "losses/loss_tokens", "losses/entropy"):
        assert small[name] == pytest.approx(large[name], rel=1e-5, abs=1e-6)
    start = load_file(ROOT / "tiny" / "model" / "model.safetensors")
    first, second = weights(tmp_path / "220"), weights(tmp_path / "512")
    moved = max((first[name] - start[name]).abs().max().item() for name in first)
    apart = sum(((first[name] - second[name]) ** 2).sum().item() for name in first) ** 0.5
    far = sum(((first[name] - start[name]) ** 2).sum().item() for name in first) ** 0.5
    assert moved > 1e-5 and apart < 2e-2 * far  # Adam's first step divides by |gradient|: rounding shows where that is near 0


def test_prompt_and_answer_tokens_round_trip():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    rows = [json.loads(line) for line in (ROOT / "tiny" / "train.jsonl").open()]
    for row in random.Random(0).sample(rows, 200):
        prompt_ids = encode_prompt(tokenizer, "plain", row["question"])
        assert prompt_ids.count(tokenizer.bos_token_id) == 1 and prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt_ids[1:]) == row["question"] + "\n"
        answer_ids = tokenizer(row["answer"], add_special_tokens=False).input_ids
        assert tokenizer.decode(answer_ids) == row["answer"]
        # no token straddles the border between prompt and answer
        assert tokenizer(f"{row['question']}\n{row['answer']}", add_special_tokens=False).input_ids == prompt_ids[1:] + answer_ids
    problem = load_problems(str(ROOT / "tiny" / "train.jsonl"), "train", tokenizer, "plain", 384, 128)[0]
    assert problem.grade(rows[0]["answer"], problem.gold) and not problem.grade("#### -1", problem.gold)


def test_what_is_held_out_does_not_depend_on_lengths():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    rows = []
    for limit in (128, 300):  # the second drops many rows, whose prompts are too long beside such an answer
        load = partial(load_problems, str(ROOT / "tiny" / "train.jsonl"), "train", tokenizer, "plain", 384, limit)
        train, held_out = ([problem.row for problem in load(part=part)] for part in (slice(None, -500), slice(-500, None)))
        assert max(train) <= 3500 < min(held_out)
        rows.append(len(train) + len(held_out))
    assert rows[0] == 4000 > rows[1]


def test_bos_is_not_doubled_by_a_template_that_has_it():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    assert encode_prompt(tokenizer, "<s>{question}\n", "1+1?") == encode_prompt(tokenizer, "{question}\n", "1+1?")
    assert "{ANSWER}" in tokenizer.decode(encode_prompt(tokenizer, "r1", "How {many}?")).replace(" ", "")


def test_segments_expire_by_age(run_script, tmp_path):
    run_script("spo_tree.py", *SMALL["spo_tree.py"], "--num-iterations", 4, "--buffer-iterations", 2, "--num-questions", 16, "--run-dir", tmp_path / "run")
    rows = metrics(tmp_path / "run")[1:]
    assert [row["buffer/expired_fraction"] > 0 for row in rows] == [False, False, True, True]  # born in i, last used in i + 1
    assert all(row["buffer/age_mean"] <= 1 for row in rows) and any(row["buffer/age_mean"] > 0 for row in rows)


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_finished_answers_earn_and_only_answers_are_graded(run_script, tmp_path, monkeypatch, script):
    graded = []
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: graded.append(response) or True)
    run_script(script, *SMALL[script], "--num-iterations", 1, "--max-response-tokens", 28, "--run-dir", tmp_path / "short")
    rows = metrics(tmp_path / "short")
    assert rows[1]["rollout/response_length"] == pytest.approx(28)  # in the tree: a segment of 20 tokens, then what is left of the limit
    assert rows[1]["rollout/truncated_fraction"] == pytest.approx(1) and rows[1]["rollout/reward_mean"] == 0  # cut: 0, whatever it says
    assert rows[1]["losses/loss_tokens"] == 0  # equal rewards: nothing to learn
    assert rows[0]["eval/accuracy"] == 1  # an evaluation grades a cut answer as it stands
    run_script(script, *SMALL[script], "--num-iterations", 1, "--run-dir", tmp_path / "long")
    assert metrics(tmp_path / "long")[1]["rollout/reward_mean"] == 1
    assert len(graded) > 30 and not any("How many" in response or "<s>" in response for response in graded)


def test_a_prompt_that_holds_the_answer_earns_nothing(run_script, tmp_path):
    """A prompt that contains the answer must not earn a reward."""
    rows = [json.loads(line) for line in (ROOT / "tiny" / "test.jsonl").open()][:20]
    data = [json.dumps({"question": f"{row['question']} #### 4321", "answer": "#### 4321"}) for row in rows]
    (tmp_path / "leak.jsonl").write_text("\n".join(data) + "\n")
    run_script("spo_tree.py", *SMALL["spo_tree.py"], "--num-iterations", 1, "--train-data", tmp_path / "leak.jsonl", "--run-dir", tmp_path / "run",
               "--test-data", tmp_path / "leak.jsonl", "--max-response-tokens", 20)  # fmt: skip
    rows = metrics(tmp_path / "run")
    assert rows[1]["rollout/reward_mean"] == rows[0]["eval/accuracy"] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_end_of_sequence_is_trained(run_script, tmp_path, script):
    """The last token of a finished answer is in the tree with its probability, hence in the loss like any other token."""
    run_script(script, *SMALL[script], "--num-iterations", 1, "--run-dir", tmp_path / "run")
    ends = []

    def walk(node):
        for child in node["children"]:
            walk(child)
            if not child["children"]:
                ends.append((child["tokens"][-1], len(child["tokens"]) == len(child["probs"]) == len(child["advantages"])))

    walk(json.loads((tmp_path / "run" / "samples.jsonl").read_text())["tree"])
    assert ("</s>", True) in ends


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_that_are_not_finite_stop_the_run(run_script, tmp_path, script):
    """NaN from the third iteration on: the steps are skipped and counted, and the fifth in a row names the last good checkpoint."""
    source, line = (ROOT / script).read_text(), "        losses = policy_loss(logprobs, old, advantages, args.clip_range)\n"
    assert source.count(line) == 1
    broken = line + '        losses = losses * (math.nan if optimizer.state and next(iter(optimizer.state.values()))["step"] > 2 else 1)\n'
    (tmp_path / script).write_text(source.replace(line, broken))
    files = ["--model", ROOT / "tiny" / "model", "--train-data", ROOT / "tiny" / "train.jsonl", "--test-data", ROOT / "tiny" / "test.jsonl"]
    with pytest.raises(RuntimeError, match="no finite gradient in 5 steps; last good checkpoint: .*checkpoints/0000"):
        run_script(tmp_path / script, *files, *SMALL[script], "--num-iterations", 20, "--checkpoint-every", 1, "--run-dir", tmp_path / "run")
    rows, last = metrics(tmp_path / "run"), sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert all(torch.isfinite(value).all() for value in load_file(last / "model.safetensors").values())
    assert all(abs(row["losses/grad_norm"]) < 1e9 for row in rows[1:]) and len(rows) > 2


def test_longer_answers_in_a_second_phase(run_script, tmp_path):
    """The recipe for 2K and then 4K tokens of context: resume with larger lengths, or start from the first phase's model."""
    first = [*SMALL["spo_tree.py"], "--num-iterations", 1, "--max-response-tokens", 45, "--segment-tokens", 15, "--run-dir", tmp_path / "run"]
    assert run_script("spo_tree.py", *first)[0] == 0
    longer = ["--max-response-tokens", 120, "--segment-tokens", 30, "--pack-tokens", 400]
    status, output, error = run_script("spo_tree.py", "--resume", tmp_path / "run", "--num-iterations", 2, *longer)
    assert status == 0 and "continued after iteration 1" in output, error
    rows = metrics(tmp_path / "run")
    assert rows[1]["rollout/response_length"] < 45.01 < rows[2]["rollout/response_length"]
    assert rows[1]["rollout/truncated_fraction"] > 0.3 > rows[2]["rollout/truncated_fraction"]
    saved = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert (saved["max_response_tokens"], saved["segment_tokens"], saved["pack_tokens"]) == (120, [30], 400)
    flags = [*SMALL["spo_tree.py"], "--model", tmp_path / "run" / "model", *longer, "--num-iterations", 1, "--run-dir", tmp_path / "second"]
    assert run_script("spo_tree.py", *flags)[0] == 0


LEARNING = {  # script: (flags, the expression of the advantage, the same with its sign flipped, replaced by zeros)
    "spo_tree.py": (["--num-iterations", 8], "difference = child.value - node.value", "difference = node.value - child.value", "difference = 0.0"),
    "spo_chain.py": (["--num-iterations", 10], "after - before if", "before - after if", "0.0 if"),
    "grpo.py": (["--num-iterations", 5], "(reward - mean) / scale if", "(mean - reward) / scale if", "0.0 if"),
    "ppo.py": (["--num-iterations", 8, "--num-questions", 128], "else a for a in gae(", "else -a for a in gae(", "else 0.0 for a in gae("),
}


def learn(run_script, tmp_path, script, name, replace=None, *flags):
    """Accuracy before and after a short training, optionally with one expression of the script replaced."""
    source = (ROOT / script).read_text()
    if replace:
        assert source.count(replace[0]) == 1
        source = source.replace(*replace)
    (tmp_path / f"{name}.py").write_text(source)
    files = ["--model", ROOT / "tiny" / "model", "--train-data", ROOT / "tiny" / "train.jsonl", "--test-data", ROOT / "tiny" / "test.jsonl"]
    status, _, error = run_script(tmp_path / f"{name}.py", *files, *LEARNING[script][0], "--eval-questions", 200, "--eval-samples", 2,
                                  "--eval-every", 100, "--run-dir", tmp_path / name, *flags)  # fmt: skip
    assert status == 0, error
    rows = metrics(tmp_path / name)
    return rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"], rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_learns(run_script, tmp_path, script):
    before, after, rows = learn(run_script, tmp_path, script, "right")
    assert after > before + 0.10, (before, after)
    assert rows[-1]["rollout/response_length"] > rows[1]["rollout/response_length"]  # careful steps are longer


@pytest.mark.parametrize("script", SCRIPTS)
def test_does_not_learn_from_flipped_advantages(run_script, tmp_path, script):
    _, right, flipped, _ = LEARNING[script]
    before, after, _ = learn(run_script, tmp_path, script, "flipped", (right, flipped), "--num-iterations", 5)
    assert after < before, (before, after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_does_not_learn_from_zero_advantages(run_script, tmp_path, script):
    _, right, _, zeros = LEARNING[script]
    before, after, rows = learn(run_script, tmp_path, script, "zeros", (right, zeros), "--num-iterations", 2)
    assert after == before and rows[-1]["rollout/trained_tokens_total"] == 0
