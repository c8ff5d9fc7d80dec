"""The training scripts as a whole: files, resume bit for bit, independence of packing, and learning."""

import json
import random
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import math_grader
from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import encode_prompt, grade_answer, load_problems

sys.path.insert(0, str(ROOT / "benchmark"))
from soak import differences, lines, load_state, without_times

TOTALS = """iteration time/elapsed_s rollout/generated_tokens_total rollout/trained_tokens_total""".split()
POLICY = """losses/policy losses/kl losses/clip_fraction losses/approx_kl losses/grad_norm
    losses/loss_tokens""".split()  # not in PPO's warm-up
METRICS = [*TOTALS, *POLICY] + """time/sample_s time/train_s rollout/reward_mean rollout/response_length
    rollout/truncated_fraction rollout/unreadable_fraction rollout/logprob_gap_mean losses/entropy
    losses/learning_rate losses/optimizer_steps""".split()
SEGMENTS, ANSWERS = ([f"{what}/count", f"{what}/zero_advantage_fraction"] for what in ("segments", "answers"))
OWN_METRICS = {
    "spo_tree.py": [*SEGMENTS, "buffer/size", "buffer/age_mean"],
    "spo_chain.py": [*SEGMENTS, "chain/cutpoints", "chain/segments", "chain/rollout_fraction"],
    "grpo.py": ANSWERS,
    "ppo.py": [*ANSWERS, "losses/value", "critic/explained_variance", "critic/grad_norm"],
}
EVAL_METRICS = """eval/accuracy eval/accuracy_ci95 eval/truncated_fraction eval/unreadable_fraction
    eval/response_length time/eval_s""".split()


def metrics(run_dir):
    return lines(run_dir / "metrics.jsonl")


def samples(run_dir):
    """The last object of samples.jsonl."""
    return lines(run_dir / "samples.jsonl")[-1]


def weights(directory):
    return load_file(directory / "model.safetensors")


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_directory_and_metrics(run_script, tmp_path, script):
    run_dir = tmp_path / "run"
    flags = [*SMALL[script], "--num-iterations", 2, "--kl-coef", 0.01, "--run-dir", run_dir]
    status, output, error = run_script(script, *flags)
    assert status == 0, error
    assert output.startswith(f"{run_dir}: ") and f"eval.py --model {run_dir}/model" in output
    expected = {"args.json", script, "metrics.jsonl", "samples.jsonl", "checkpoints", "model"}
    assert {path.name for path in run_dir.iterdir()} == expected
    assert (run_dir / script).read_text() == (ROOT / script).read_text()
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["args"]["kl_coef"] == 0.01 and saved["versions"]["torch"] == torch.__version__

    rows = metrics(run_dir)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert set(rows[0]) == {*TOTALS, *EVAL_METRICS}
    assert set(rows[2]) == {*METRICS, *OWN_METRICS[script], *EVAL_METRICS}
    warm_up = POLICY if script == "ppo.py" else []  # in which PPO trains its critic only
    assert set(rows[2]) - set(rows[1]) == {*EVAL_METRICS, *warm_up}
    for row in rows[1:]:
        assert abs(row["rollout/logprob_gap_mean"]) < 1e-5
        count, zeros = OWN_METRICS[script][:2]
        assert row[count] >= 4 * 3 and 0 <= row[zeros] <= 1
        assert 0 < row["time/sample_s"] + row["time/train_s"] <= row["time/elapsed_s"]
    for name in ("kl", "grad_norm", "loss_tokens", "optimizer_steps"):
        assert rows[2][f"losses/{name}"] > 0

    # The end of sequence has its probability and its advantage like any other token.
    completions, ends = samples(run_dir)["completions"], 0
    for c in completions:
        assert len(c["tokens"]) == len(c["probs"]) == len(c["advantages"])
        ends += c["tokens"][-1] == "</s>"
        if script != "spo_chain.py":  # whose last segment may have none
            assert (c["advantages"][-1] != 0) == any(c["advantages"])
    assert ends > 0


RESUMED = [(script, []) for script in SCRIPTS[1:]]
RESUMED += [("spo_tree.py", ["--segments-per-iteration", 12]), ("spo_tree.py", ["--buffer-iterations", 0])]


@pytest.mark.parametrize("script, own", RESUMED)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(run_script, tmp_path, script, own):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SMALL[script], *own, "--checkpoint-every", 1, "--eval-every", 2]
    assert run_script(script, *flags, "--num-iterations", 4, "--run-dir", whole)[0] == 0
    assert run_script(script, *flags, "--num-iterations", 2, "--run-dir", parts)[0] == 0
    (buffer,) = load_state(parts / "checkpoints" / "000002").get("buffers", [[]])  # SPO-tree's
    assert bool(buffer) == ("--segments-per-iteration" in own)
    # What a kill leaves behind: lines after the last checkpoint, a torn line, directories half written.
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3}\n{"iteration": 4, "ti')
    with open(parts / "samples.jsonl", "a") as file:
        file.write('{"iteration": 4, "completions": []}\n')
    shutil.copytree(parts / "model", parts / "new")
    shutil.copytree(parts / "model", parts / "checkpoints" / "new")
    (parts / "checkpoints" / "new" / "left-over").touch()
    status, _, error = run_script(script, "--resume", parts, "--num-iterations", 4)
    assert status == 0 and differences(whole, parts) == [], error
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == ["000003", "000004"]
    assert not same_weights(whole / "model", parts / "checkpoints" / "000003")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_has_ended_goes_on_or_is_written_again(run_script, tmp_path, script):
    run_dir, flags = tmp_path / "run", ["--num-iterations", 2, "--checkpoint-every", 1, "--eval-every", 100]
    assert run_script(script, *SMALL[script], *flags, "--run-dir", run_dir)[0] == 0
    before, model = (run_dir / "metrics.jsonl").read_text(), weights(run_dir / "model")
    shutil.rmtree(run_dir / "model")
    status, output, error = run_script(script, "--resume", run_dir)
    assert status == 0 and "accuracy" in output and (run_dir / "metrics.jsonl").read_text() == before, error
    assert all(torch.equal(value, model[name]) for name, value in weights(run_dir / "model").items())
    shutil.rmtree(run_dir / "checkpoints" / "000002")  # as after a kill in iteration 2
    flags = ["--num-iterations", 2, "--learning-rate", 3e-5]
    assert run_script(script, "--resume", run_dir, *flags)[0] == 0
    assert metrics(run_dir)[2]["losses/learning_rate"] == 3e-5
    assert not same_weights(run_dir / "model", run_dir / "checkpoints" / "000001")


def test_longer_answers_in_a_second_phase(run_script, tmp_path):
    """2K and then 4K tokens of context: resume with larger lengths."""
    run_dir, first = tmp_path / "run", [*SMALL["spo_tree.py"], "--num-iterations", 1]
    first += ["--max-response-tokens", 45, "--segment-tokens", 15]
    assert run_script("spo_tree.py", *first, "--run-dir", run_dir)[0] == 0
    longer = ["--max-response-tokens", 120, "--segment-tokens", 30, "--pack-tokens", 400]
    assert run_script("spo_tree.py", "--resume", run_dir, "--num-iterations", 2, *longer)[0] == 0
    rows = metrics(run_dir)
    assert rows[1]["rollout/response_length"] < 45.01 < rows[2]["rollout/response_length"]
    assert rows[1]["rollout/truncated_fraction"] > 0.3 > rows[2]["rollout/truncated_fraction"]
    saved = json.loads((run_dir / "args.json").read_text())["args"]
    assert (saved["max_response_tokens"], saved["segment_tokens"], saved["pack_tokens"]) == (120, [30], 400)


def test_update_does_not_depend_on_the_packing_budget(run_script, tmp_path):
    for budget in (220, 512):
        flags = [*SMALL["spo_tree.py"], "--pack-tokens", budget, "--num-iterations", 1, "--kl-coef", 0.1]
        assert run_script("spo_tree.py", *flags, "--run-dir", tmp_path / str(budget))[0] == 0
    (_, small), (_, large) = (metrics(tmp_path / str(budget)) for budget in (220, 512))
    for name in ("losses/policy", "losses/grad_norm", "losses/loss_tokens", "losses/entropy"):
        assert small[name] == pytest.approx(large[name], rel=1e-5, abs=1e-6)
    start = weights(ROOT / "tiny" / "model")
    first, second = weights(tmp_path / "220" / "model"), weights(tmp_path / "512" / "model")
    apart = sum(((first[name] - second[name]) ** 2).sum().item() for name in first) ** 0.5
    far = sum(((first[name] - start[name]) ** 2).sum().item() for name in first) ** 0.5
    # Adam's first step divides by |gradient|: rounding shows where that is near 0.
    assert far > 1e-3 and apart < 2e-2 * far


def test_prompt_and_answer_tokens_round_trip():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    rows = lines(ROOT / "tiny" / "train.jsonl")
    for row in random.Random(0).sample(rows, 200):
        prompt_ids = encode_prompt(tokenizer, "plain", row["question"])
        assert prompt_ids.count(tokenizer.bos_token_id) == 1 and prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt_ids[1:]) == row["question"] + "\n"
        answer_ids = tokenizer(row["answer"], add_special_tokens=False).input_ids
        assert tokenizer.decode(answer_ids) == row["answer"]
        # no token straddles the border between prompt and answer
        together = tokenizer(f"{row['question']}\n{row['answer']}", add_special_tokens=False).input_ids
        assert together == prompt_ids[1:] + answer_ids
    problems = load_problems(str(ROOT / "tiny" / "train.jsonl"), "train", tokenizer, "plain", 256)
    problem = problems[0]
    assert len(problems) == 4000 and None not in problems
    assert problem.prompt_ids == encode_prompt(tokenizer, "plain", rows[0]["question"])
    for answer, verdict in {rows[0]["answer"]: (True, True), "#### 1000": (False, True), "5": (False, False)}.items():
        token_ids = tokenizer(answer + "</s>", add_special_tokens=False).input_ids
        assert grade_answer(problem, tokenizer, token_ids) == verdict
    # a template's own BOS is not doubled, and braces in it are text
    plain = encode_prompt(tokenizer, "{question}\n", "1+1?")
    assert encode_prompt(tokenizer, "<s>{question}\n", "1+1?") == plain
    assert "{ANSWER}" in tokenizer.decode(encode_prompt(tokenizer, "r1", "How {many}?")).replace(" ", "")


def test_what_is_held_out_does_not_depend_on_lengths(run_script, tmp_path):
    """Without test data: the last rows of the training data, before any is dropped for its length."""
    rows = lines(ROOT / "tiny" / "train.jsonl")[:400]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SMALL["grpo.py"], "--num-iterations", 1, "--train-data", tmp_path / "data.jsonl"]
    counts = []
    for limit in (128, 320):  # the second leaves room for short prompts only
        run_dir = tmp_path / str(limit)
        own = ["--eval-questions", 60, "--max-response-tokens", limit, "--run-dir", run_dir]
        status, out, error = run_script("grpo.py", *flags, *own)
        assert status == 0, error
        found = re.search(r" on (\d+) questions of .*, evaluated on (\d+) of .*, held out;", out)
        counts.append((int(found[1]), int(found[2])))
    assert counts[0] == (340, 60) and 20 < counts[1][0] < 340 and 4 < counts[1][1] < 60


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_held_out_is_not_trained(run_script, tmp_path, monkeypatch, script):
    golds = []
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: golds.append(int(gold)) or True)
    rows = [row | {"answer": f"#### {k}"} for k, row in enumerate(lines(ROOT / "tiny" / "test.jsonl")[:16])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SMALL[script], "--train-data", tmp_path / "data.jsonl", "--test-data", ""]
    flags += ["--num-iterations", 2, "--num-questions", 8, "--eval-questions", 4, "--eval-every", 2]
    status, _, error = run_script(script, *flags, "--run-dir", tmp_path / "run")
    assert status == 0 and golds[:4] == golds[-4:] == [12, 13, 14, 15], error
    assert set(golds[4:-4]) <= set(range(12)) and len(golds) > 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_finished_answers_earn_and_only_answers_are_graded(run_script, tmp_path, monkeypatch, script):
    graded = []
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: graded.append(response) or True)
    flags = [*SMALL[script], "--num-iterations", 1]
    run_script(script, *flags, "--max-response-tokens", 28, "--run-dir", tmp_path / "short")
    first, row = metrics(tmp_path / "short")
    # in the tree: a segment of 20 tokens, then what is left of the limit
    assert row["rollout/response_length"] == pytest.approx(28)
    assert row["rollout/truncated_fraction"] == pytest.approx(1)
    assert row["rollout/reward_mean"] == 0 == row.get("losses/loss_tokens", 0)  # whatever a cut answer says
    assert first["eval/accuracy"] == 1  # an evaluation grades a cut answer as it stands
    run_script(script, *flags, "--run-dir", tmp_path / "long")
    assert metrics(tmp_path / "long")[1]["rollout/reward_mean"] == 1
    # every question asks how many
    assert len(graded) > 30 and not any("How many" in response or "<s>" in response for response in graded)


LEARNING = {  # script: (flags, the expression of the advantage, the same with its sign flipped, zeros)
    "spo_tree.py": (
        "--num-iterations 5 --branch-factors 4 4 --num-questions 12 --minibatch-size 16",
        "advantage = child.value - group.value", "advantage = group.value - child.value", "advantage = 0.0",
    ),
    "spo_chain.py": (
        "--num-iterations 6 --samples-per-question 4 --num-questions 8 --minibatch-size 4",
        "advantage = values[k + 1] - values[k]", "advantage = values[k] - values[k + 1]", "advantage = 0.0",
    ),
    "grpo.py": (
        "--num-iterations 4 --num-questions 12 --minibatch-size 16",
        "[(reward - mean) / scale if", "[(mean - reward) / scale if", "[0.0 if",
    ),
    "ppo.py": (
        "--num-iterations 5 --num-questions 64 --minibatch-size 16 --num-epochs 2",
        "advantages.append(advantage if", "advantages.append(-advantage if", "advantages.append(0.0 if",
    ),
}


def learn(run_script, tmp_path, script, replacement, *flags):
    """Accuracy before and after a short training with that expression replaced, and the metrics."""
    own, expression, *_ = LEARNING[script]
    source = (ROOT / script).read_text()
    assert source.count(expression) == 1
    (tmp_path / script).write_text(source.replace(expression, replacement))
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")  # which a script looks for beside itself
    evaluation = ["--eval-questions", 100, "--eval-samples", 2, "--eval-every", 100]
    flags = [*own.split(), *evaluation, "--run-dir", tmp_path / "run", *flags]
    status, _, error = run_script(tmp_path / script, *flags)
    assert status == 0, error
    rows = metrics(tmp_path / "run")
    return rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"], rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_learns(run_script, tmp_path, script):
    before, after, _ = learn(run_script, tmp_path, script, LEARNING[script][1])
    assert after > before + 0.10, (before, after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_does_not_learn_from_flipped_advantages(run_script, tmp_path, script):
    before, after, _ = learn(run_script, tmp_path, script, LEARNING[script][2], "--num-iterations", 3)
    assert after < before, (before, after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_does_not_learn_from_zero_advantages(run_script, tmp_path, script):
    flags = ["--num-iterations", 2, "--num-questions", 8, "--eval-questions", 20]
    before, after, rows = learn(run_script, tmp_path, script, LEARNING[script][3], *flags)
    assert after == before and rows[-1]["rollout/trained_tokens_total"] == 0
