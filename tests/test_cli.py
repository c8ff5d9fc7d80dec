"""Mistakes in flags and data: one line that says what is wrong and where, exit status 2, before any model is loaded."""

import json

import pytest

from conftest import ROOT, SCRIPTS

TINY = ROOT / "tiny"
GOOD = json.dumps({"question": "Ana has 2 pens. How many pens does Ana have now?", "answer": "#### 2"})


def assert_usage_error(result, *words):
    status, _, error = result
    assert status == 2
    lines = error.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    for word in words:
        assert word in lines[0], error


@pytest.mark.parametrize("flags, words", [
    (["--branch-factors", 0, 6], ["--branch-factors"]),
    (["--branch-factors", 6, -1], ["--branch-factors"]),
    (["--branch-factors"], ["--branch-factors", "each level"]),
    (["--branch-factors", 1, 1], ["--branch-factors", "siblings"]),
    (["--branch-factors", 6, 6, 6, "--segment-tokens", 10, 20, 30], ["--segment-tokens", "2"]),
    (["--segment-tokens", 0], ["--segment-tokens"]),
    (["--branch-factors", 8, 8, "--minibatch-size", 7], ["--minibatch-size", "8"]),
    (["--num-questions", 0], ["--num-questions"]),
    (["--num-questions", 5000], ["--num-questions", "4000"]),
    (["--temperature", 0], ["--temperature"]),
    (["--eval-temperature", 0], ["--eval-temperature"]),
    (["--prompt-template", "chat"], ["chat template"]),
    (["--top-p", 1.5], ["--top-p"]),
    (["--prompt-template", "nonsense"], ["--prompt-template", "{question}"]),
    (["--model", "no/such/directory"], ["--model", "no/such/directory"]),
    (["--train-data", "missing.jsonl"], ["missing.jsonl"]),
    (["--pack-tokens", 40], ["row 1", "prompt", "--pack-tokens"]),
    (["--max-response-tokens", 383], ["tiny/train.jsonl", "no rows"]),
    (["--attention", "flex"], ["--attention", "backward"]),
    (["--sampler", "vllm"], ["--sampler", "requirements-gpu.txt"]),
    (["--resume", "no-such-run"], ["--resume", "no-such-run"]),
])  # fmt: skip
def test_wrong_flags(run_script, tmp_path, flags, words):
    run_dir = [] if "--resume" in flags else ["--run-dir", tmp_path / "run"]
    assert_usage_error(run_script("spo_tree.py", *flags, *run_dir), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, flag", [("spo_tree.py", "--train-data"), ("eval.py", "--data")])
@pytest.mark.parametrize("row, words", [
    ('{"question": "1 + 1?", "answer"', ["row 2"]),
    ("[1, 2]", ["row 2"]),
    ('{"question": "1 + 1?"}', ["row 2", "answer"]),
    ('{"question": 7, "answer": "#### 2"}', ["row 2"]),
    ('{"question": "1 + 1?", "answer": "two"}', ["row 2", "gold", "two"]),
    ('{"question": "1 + 1?", "answer": "#### many"}', ["row 2", "gold"]),
    (json.dumps({"problem": "1 + 1?", "answer": "x" * 500}), ["row 2", "gold"]),
    ("", ["row 2"]),
    (json.dumps({"question": "7 " * 400, "answer": "#### 2"}), ["row 2", "prompt", "tokens"]),
])  # fmt: skip
def test_broken_rows_are_named(run_script, tmp_path, script, flag, row, words):
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\n{row}\n{GOOD}\n")
    assert_usage_error(run_script(script, flag, tmp_path / "data.jsonl"), "data.jsonl", *words)


def test_not_utf8(run_script, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe")
    assert_usage_error(run_script("spo_tree.py", "--train-data", tmp_path / "data.jsonl"), "data.jsonl")


@pytest.mark.parametrize("script, flag", [("spo_tree.py", "--train-data"), ("eval.py", "--data")])
@pytest.mark.parametrize("content, words", [
    (b"", ["row 1"]),
    (b"\n\n\n", ["row 1"]),
    (GOOD.encode() + b'\n{"question": "Caf\xe9?", "answer": "#### 2"}\n', ["row 2", "utf-8", "0xe9"]),  # Latin-1
    (GOOD.encode() + b"\n\xff\xfe\n", ["row 2", "utf-8"]),
    (GOOD.encode("utf-16"), ["row 1", "utf-8"]),
    (b"\xef\xbb\xbf" + GOOD.encode(), ["row 1", "utf-8-sig"]),  # a byte order mark
    (GOOD.encode() + b"\x00\n" + GOOD.encode(), ["row 1"]),
    (b"[" * 100_000, ["row 1"]),
    (b"null", ["row 1"]),
    (b'{"question": "\\ud800 + 1?", "answer": "#### 2"}', ["row 1"]),  # half a surrogate pair
    (b'{"question": "  ", "answer": "#### 2"}', ["row 1", "question is empty"]),
    (b'{"question": "1 + 1?", "answer": 2}', ["row 1"]),
    (b'{"question": "1 + 1?", "answer": "#### ' + b"9" * 5000 + b'"}', ["row 1", "gold"]),
    (b'{"problem": "1 + 1?", "solution": "$2$"}', ["row 1", "answer"]),
])  # fmt: skip
def test_broken_bytes_are_named(run_script, tmp_path, script, flag, content, words):
    (tmp_path / "data.jsonl").write_bytes(content)
    assert_usage_error(run_script(script, flag, tmp_path / "data.jsonl"), "data.jsonl", *words)


@pytest.mark.parametrize("script", ["grpo.py", "eval.py"])
@pytest.mark.parametrize("row", [
    {"question": "What is 4321? #### 4321", "answer": "#### 4321"},
    {"problem": "What is $4321$? \\boxed{4321}", "answer": "4321"},
    {"question": "<think>4321</think> The answer is \\boxed{4321}\n#### 4321", "answer": "#### 4321"},
])  # fmt: skip
def test_markers_in_the_question_are_part_of_the_prompt(run_script, tmp_path, script, row):
    """The rule: a question may hold anything, as only sampled tokens are graded. Answers this short never get to one."""
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    flags = ["--max-response-tokens", 12]
    if script == "eval.py":
        status, output, error = run_script(script, *flags, "--data", tmp_path / "data.jsonl", "--out", tmp_path)
        assert status == 0 and "0.000 +- 0.000" in output, error
    else:
        flags += ["--train-data", tmp_path / "data.jsonl", "--test-data", tmp_path / "data.jsonl", "--num-questions", 4]
        status, output, error = run_script(script, *flags, "--num-iterations", 1, "--run-dir", tmp_path / "run")
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert status == 0 and lines[0]["eval/accuracy"] == lines[1]["rollout/reward_mean"] == 0, error


def test_run_directory_that_exists(run_script, tmp_path):
    assert_usage_error(run_script("spo_tree.py", "--run-dir", tmp_path), str(tmp_path), "exists")


def test_a_factor_of_one_is_allowed_with_a_warning(run_script, tmp_path):
    status, output, error = run_script("spo_tree.py", "--branch-factors", 1, 4, "--num-questions", 1, "--num-iterations", 1, "--eval-questions", 2,
                                       "--run-dir", tmp_path / "run")
    assert status == 0 and "warning" in error and "accuracy" in output


@pytest.mark.parametrize("flags", [["4", "5", "6"], ["8", "8"], ["2", "2", "2", "--segment-tokens", "10", "20"], ["8"]])
def test_any_shape_of_tree(run_script, tmp_path, flags):
    status, _, _ = run_script("spo_tree.py", "--num-questions", 1, "--num-iterations", 1, "--eval-questions", 2, "--run-dir", tmp_path / "run",
                              "--branch-factors", *flags)
    assert status == 0
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1])["tree"]
    factors = [int(x) for x in flags[: flags.index("--segment-tokens")]] if "--segment-tokens" in flags else [int(x) for x in flags]
    hops = [10, 20] if "--segment-tokens" in flags else [20] * (len(factors) - 1)

    def check(node, depth):
        if node["children"]:
            assert len(node["children"]) == factors[depth]
            for child in node["children"]:
                assert len(child["tokens"]) == len(child["probs"])
                if depth < len(hops):
                    assert len(child["tokens"]) <= hops[depth]
                    assert not child["children"] or len(child["tokens"]) == hops[depth]
                check(child, depth + 1)

    check(sample, 0)


def test_rows_without_an_answer_are_dropped_and_counted(run_script, tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "2 + 2?", "answer": "None"}, {"problem": "3 + 3?\u2028", "answer": ""}]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    status, output, error = run_script("eval.py", "--data", tmp_path / "data.jsonl", "--out", tmp_path)
    assert status == 0 and "2 rows without an answer dropped" in error and "  1  " in output


def test_model_directory_without_readable_weights(run_script, tmp_path):
    for path in (TINY / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:1000] if path.suffix == ".safetensors" else path.read_bytes())
    assert_usage_error(run_script("spo_tree.py", "--model", tmp_path, "--run-dir", tmp_path / "run"), "weights", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert_usage_error(run_script("spo_tree.py", "--model", tmp_path, "--run-dir", tmp_path / "run"), "--model", str(tmp_path))


@pytest.mark.parametrize("preset", ["gsm8k", "math"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_suit_eight_processes(run_script, monkeypatch, script, preset):
    """The flags pass all checks; what is missing is the launcher."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        run_script(script, "--preset", preset)
