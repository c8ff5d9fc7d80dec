"""Mistakes in flags and data: the run ends before it begins, and says what is wrong and where."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS, SMALL
from test_run import metrics

GOOD = json.dumps({"question": "Ana has 2 pens. How many pens does Ana have now?", "answer": "#### 2"})
ONE = ["--num-questions", 1, "--num-iterations", 1, "--eval-questions", 2]  # flags that make a run short


def assert_usage_error(result, *words):
    """Exit status 1 and one line; 2 and tyro's box for what is no flag or no value of one. On standard error."""
    status, _, error = result
    assert status in (1, 2), error
    text = " ".join(error.replace("│", " ").split())
    if status == 1:
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in text, error


@pytest.mark.parametrize("script, flags, words", [
    ("spo_tree.py", ["--branch-factors", 0, 6], ["--branch-factors"]),
    ("spo_tree.py", ["--branch-factors", 1, 1], ["--branch-factors"]),
    ("spo_tree.py", ["--branch-factors", 6, 6, 6, "--segment-tokens", 10, 20, 30], ["--segment-tokens"]),
    ("spo_tree.py", ["--segment-tokens", 0], ["--segment-tokens"]),
    ("spo_tree.py", ["--branch-factors", 8, 8, "--minibatch-size", 7], ["--minibatch-size"]),
    ("spo_tree.py", ["--num-questions", 5000], ["--num-questions", "4000"]),
    ("spo_tree.py", ["--temperature", 0], ["--temperature"]),
    ("spo_tree.py", ["--learning-rate", "nan"], ["--learning-rate"]),
    ("spo_tree.py", ["--top-p", 1.5], ["--top-p"]),
    ("spo_tree.py", ["--prompt-template", "nonsense"], ["--prompt-template", "{question}"]),
    ("spo_tree.py", ["--model", "no/such/directory"], ["--model", "no/such/directory"]),
    ("spo_tree.py", ["--model", "./model"], ["--model", "./model"]),
    ("spo_tree.py", ["--train-data", "missing.jsonl"], ["missing.jsonl"]),
    ("spo_tree.py", ["--device", "cuda"], ["--device cuda", "no GPU"]),
    ("spo_tree.py", ["--max-response-tokens", 383], ["0 to train on"]),
    ("spo_tree.py", ["--resume", "no-such-run"], ["--resume", "no-such-run"]),
    ("spo_chain.py", ["--minibatch-size", 4], ["--minibatch-size"]),
    ("spo_chain.py", ["--partition", "sentence"], ["--partition"]),
    ("spo_chain.py", ["--mc-rollouts", 0], ["--mc-rollouts"]),
    ("spo_chain.py", ["--prob-threshold", 0], ["--prob-threshold"]),
    ("grpo.py", ["--samples-per-question", 1], ["--samples-per-question"]),
    ("grpo.py", ["--minibatch-size", 4], ["--minibatch-size"]),
    ("ppo.py", ["--gae-lambda", 1.5], ["--gae-lambda"]),
    ("ppo.py", ["--critic-warmup-iterations", -1], ["--critic-warmup-iterations"]),
    ("ppo.py", ["--samples-per-question", 100], ["--minibatch-size"]),
])  # fmt: skip
def test_wrong_flags(run_script, tmp_path, script, flags, words):
    run_dir = [] if "--resume" in flags else ["--run-dir", tmp_path / "run"]
    assert_usage_error(run_script(script, *flags, *run_dir), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["gsm8k", "math"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_suit_eight_processes(run_script, monkeypatch, script, preset):
    """The flags pass all checks; what is missing is the launcher."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert_usage_error(run_script(script, "--preset", preset, "--num-questions", 12), "WORLD_SIZE", "torchrun")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ValueError, match="MASTER_PORT"):
        run_script(script, "--preset", preset)


ROWS = [  # a line of a file in place of its second, and what is said of it
    (b'{"question": "1 + 1?", "answer"', []),
    (b"[1, 2]", []),
    (b'{"question": "1 + 1?"}', ["answer"]),
    (b'{"problem": "1 + 1?", "solution": "$2$"}', ["answer"]),
    (b'{"question": "1 + 1?", "answer": "two"}', ["gold", "two"]),
    (b'{"question": "1 + 1?", "answer": "#### many"}', ["gold"]),
    (b'{"question": "1 + 1?", "answer": "#### ' + b"9" * 5000 + b'"}', ["gold"]),
    (b'{"problem": "1 + 1?", "answer": "' + b"x" * 500 + b'"}', ["gold"]),
    (b'{"question": "  ", "answer": "#### 2"}', ["question"]),
    (b'{"problem": "1 + 1?", "answer": ["2"]}', ["answer"]),
    (b'{"problem": "1 + 1?", "answer": true}', ["answer"]),
    (b'{"question": "1 + 1? \\ud800", "answer": "#### 2"}', []),
    (b"[" * 100_000, []),
]


@pytest.mark.parametrize("script, flag", [("spo_tree.py", "--train-data"), ("eval.py", "--data")])
@pytest.mark.parametrize("row, words", ROWS)
def test_broken_rows_are_named(run_script, tmp_path, script, flag, row, words):
    (tmp_path / "data.jsonl").write_bytes(GOOD.encode() + b"\n" + row + b"\n" + GOOD.encode() + b"\n")
    assert_usage_error(run_script(script, flag, tmp_path / "data.jsonl"), "data.jsonl", "row 2", *words)


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b'{"problem": "1 + 1?", "answer": "None"}'])
def test_files_without_a_problem(run_script, tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    assert_usage_error(run_script("spo_tree.py", "--train-data", tmp_path / "data.jsonl"), "0 to train on")


def test_what_a_file_may_have(run_script, tmp_path):
    """A byte order mark, empty lines, numbers, line separators; rows without an answer are dropped."""
    rows = [{"problem": "1 + 1?", "answer": 2}, {"problem": "2 + 2?", "answer": "None"}]
    rows += [{"problem": "5 + 5?", "answer": "5+5=10\n#### 10"}]  # in GSM8K's form
    rows += [{"problem": "3 + 3?\u2028", "answer": "6"}, {"problem": "4 + 4?", "answer": ""}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8-sig")
    status, output, error = run_script("eval.py", "--data", tmp_path / "data.jsonl", "--out", tmp_path)
    assert status == 0 and "2 rows" in output + error and "  3  " in output
    (path,) = tmp_path.glob("eval*.jsonl")
    assert [json.loads(line)["gold"] for line in path.read_text().splitlines()] == ["2", "10", "6"]


@pytest.mark.parametrize("script", ["grpo.py", "spo_tree.py", "eval.py"])
@pytest.mark.parametrize("row", [
    {"question": "What is 4321? #### 4321", "answer": "#### 4321"},
    {"problem": "What is $4321$? \\boxed{4321}", "answer": "4321"},
    {"question": "<think>4321</think> The answer is \\boxed{4321}\n#### 4321", "answer": "#### 4321"},
])  # fmt: skip
def test_markers_in_the_question_are_part_of_the_prompt(run_script, tmp_path, script, row):
    """A question may hold anything: only sampled tokens are graded, here too few of them for an answer."""
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps(row) + "\n") * 4)
    flags = ["--max-response-tokens", 12]
    if script == "eval.py":
        status, output, error = run_script(script, *flags, "--data", data, "--out", tmp_path)
        assert status == 0 and "0.000 +- 0.000" in output, error
    else:
        flags += [*SMALL[script], "--train-data", data, "--test-data", data, "--num-iterations", 1]
        status, _, error = run_script(script, *flags, "--run-dir", tmp_path / "run")
        rows = metrics(tmp_path / "run")
        assert status == 0 and rows[0]["eval/accuracy"] == rows[1]["rollout/reward_mean"] == 0, error


def test_own_training_data_are_held_out_and_named(run_script, tmp_path):
    """Not the embedded test set, which has nothing to do with them."""
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\n" * 20)
    flags = ["--train-data", tmp_path / "data.jsonl", *SMALL["grpo.py"], "--num-iterations", 1]
    status, output, error = run_script("grpo.py", *flags, "--run-dir", tmp_path / "run")
    assert status == 0, error
    data = f"{tmp_path}/data.jsonl"
    assert f" on 15 questions of {data}, evaluated on 5 of its last rows, held out; " in output
    assert "    '<s>Ana has 2 pens. How many pens does Ana have now?\\n'\n" in output  # what the model sees


def test_why_nothing_is_rewarded(run_script, tmp_path):
    flags = [*SMALL["spo_tree.py"], "--max-response-tokens", 6, "--num-iterations", 1]
    _, output, _ = run_script("spo_tree.py", *flags, "--run-dir", tmp_path / "run")
    assert "  reward_mean 0.000  response_length 6.000  " in output
    assert "  truncated_fraction 1.000  unreadable_fraction 1.000\n" in output


def test_from_another_directory(tmp_path):
    """The embedded model and task are beside the script; files of the run are as the umask says."""
    command = f"umask 027; {sys.executable} {ROOT}/grpo.py {' '.join(map(str, SMALL['grpo.py']))}"
    flags = "--num-iterations 1 --run-dir run"
    subprocess.run(f"{command} {flags}", shell=True, cwd=tmp_path, check=True, capture_output=True)
    for directory in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / "000001"):
        modes = {path.stat().st_mode & 0o777 for path in directory.iterdir()}
        assert modes == {0o640}
