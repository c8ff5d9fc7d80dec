"""Flags, data and prompts: a mistake ends a run before it begins, what is right reaches it unchanged."""

import json
import math
import shutil

import pytest
from transformers import AutoTokenizer

import spo_tree
from conftest import ROOT, tiny_args
from spo_tree import encode_prompt, grade_answer, load_problems

TINY = ROOT / "tiny" / "model"
GOOD = json.dumps({"question": "Ana has 2 pens. How many pens does Ana have now?", "answer": "#### 2"})


def assert_usage_error(result, *words):
    """On standard error: one line and status 1, or tyro's box and 2 for what is no flag or value of one."""
    status, _, error = result
    assert status in (1, 2), error
    text = " ".join(error.replace("│", " ").split())
    if status == 1:
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in text, error


@pytest.mark.parametrize("script, flags, words", [
    ("spo_tree.py", ["--branch-factors", 1, 1], ["--branch-factors"]),
    ("spo_tree.py", ["--branch-factors", 6, 6, 6, "--segment-tokens", 10, 20, 30], ["--segment-tokens"]),
    ("spo_tree.py", ["--branch-factors", 8, 8, "--minibatch-size", 7], ["--minibatch-size"]),
    ("grpo.py", ["--samples-per-question", 1], ["--samples-per-question"]),
    ("ppo.py", ["--gae-lambda", 1.5], ["--gae-lambda"]),
    ("spo_tree.py", ["--top-p", 1.5], ["--top-p"]),
    ("spo_tree.py", ["--prompt-template", r"Q: {question}\nA:"], [r"without \n"]),
    ("spo_tree.py", ["--prompt-template", "chat"], ["--model"]),  # the tokenizer has none
    ("spo_tree.py", ["--model", "no/such/directory"], ["--model", "no/such/directory"]),
    ("spo_tree.py", ["--train-data", "missing.jsonl"], ["missing.jsonl"]),
    ("spo_tree.py", ["--device", "cuda"], ["--device cuda", "no GPU"]),
    ("spo_tree.py", ["--max-response-tokens", 383], ["0 to train on"]),
    ("spo_tree.py", ["--resume", "no-such-run"], ["--resume", "no-such-run"]),
])  # fmt: skip
def test_wrong_flags(run_script, tmp_path, script, flags, words):
    run_dir = [] if "--resume" in flags else ["--run-dir", tmp_path / "run"]
    assert_usage_error(run_script(script, *flags, *run_dir), *words)
    assert not (tmp_path / "run").exists()


def test_processes_need_a_launcher(run_script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_usage_error(run_script("grpo.py"), "WORLD_SIZE", "torchrun")


def load(path, model=TINY):
    """The problems of a file of JSON lines."""
    return load_problems(str(path), "train", AutoTokenizer.from_pretrained(model), "plain", 256)


@pytest.mark.parametrize("row", [
    b'{"question": "1 + 1?", "answer"',  # no JSON
    b'{"question": "1 + 1?", "answer": "two"}',
    b'{"question": "  ", "answer": "#### 2"}',
    b'{"problem": "1 + 1?", "answer": ["2"]}',
])  # fmt: skip
def test_broken_rows_are_named(run_script, tmp_path, row):
    (tmp_path / "data.jsonl").write_bytes(GOOD.encode() + b"\n" + row + b"\n" + GOOD.encode() + b"\n")
    result = run_script("spo_tree.py", "--train-data", tmp_path / "data.jsonl")
    assert_usage_error(result, "data.jsonl", "row 2", "answer")


def test_what_a_file_may_have(tmp_path):
    """A byte order mark, empty lines, numbers; rows without an answer are dropped."""
    rows = [{"problem": "1 + 1?", "answer": 2}, {"problem": "2 + 2?", "answer": "None"}]
    rows += [{"problem": "5 + 5?", "answer": "5+5=10\n#### 10"}]  # in GSM8K's form
    rows += [{"problem": "7 + 7?", "answer": math.nan}]  # as pandas writes a missing number
    text = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8-sig")
    found = [problem and (problem.gold, problem.is_math) for problem in load(tmp_path / "data.jsonl")]
    assert found == [("2", True), None, ("10", False), None]


def test_what_is_held_out(tmp_path):
    """Without test data: the last rows, before any is dropped for its length; they are not trained."""
    rows = [json.loads(line) for line in (ROOT / "tiny" / "train.jsonl").open()]
    numbered = [json.dumps(row | {"answer": f"#### {k}"}) for k, row in enumerate(rows[:400])]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(numbered))
    for limit, most in ((128, 340), (320, 300)):  # the second leaves room for short prompts only
        args = tiny_args(train_data=str(path), eval_questions=60, max_response_tokens=limit)
        train, held_out = spo_tree.load_data(args, AutoTokenizer.from_pretrained(TINY), 384)
        assert {int(problem.gold) for problem in train} <= {*range(340)} and 20 < len(train) <= most
        assert {int(problem.gold) for problem in held_out} <= {*range(340, 400)} and len(held_out) > 4


def test_prompts():
    """One BOS, if there is any, and the question as it is; braces in a template are text."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    plain = encode_prompt(tokenizer, "plain", "1+1?")
    assert tokenizer.decode(plain) == "<s>1+1?\n"
    assert encode_prompt(tokenizer, "<s>{question}\n", "1+1?") == plain  # a template's own BOS is not doubled
    assert "{ANSWER}" in tokenizer.decode(encode_prompt(tokenizer, "r1", "How {many}?")).replace(" ", "")
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, "plain", "1+1?") == plain[1:]


def test_a_tokenizer_that_loses_spaces(tmp_path):
    """A byte-level tokenizer under the name of another class, of which transformers takes the rules."""
    (tmp_path / "data.jsonl").write_text(GOOD)
    shutil.copytree(TINY, tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    load(tmp_path / "data.jsonl")
    with pytest.raises(SystemExit, match="error: the tokenizer loses white space"):
        load(tmp_path / "data.jsonl", tmp_path / "model")


def test_a_tokenizer_that_changes_more_is_reported(capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for question in ("Two  pens\n\n?", "Other"):
        spo_tree.check_prompt(encode_prompt(tokenizer, "plain", "Two  pens\n\n?"), question, tokenizer)
    assert capsys.readouterr().out.count("the tokenizer changes the first prompt to ") == 1


def test_columns_that_are_not_used_are_not_read(tmp_path):
    """Of a data set in a directory, by its absolute path."""
    row = {"question": "1 + 1?", "answer": "#### 2", "other": "x" * 1000}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    assert [set(row) for row in spo_tree.read_rows(str(tmp_path), "train")] == [{"question", "answer"}]


@pytest.mark.parametrize("special", [False, True])
def test_what_is_graded_is_behind_the_thought(special):
    """Also where </think> is a special token, which decoding leaves out. (right, readable)"""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if special:
        tokenizer.add_tokens(["</think>"], special_tokens=True)
    verdicts = {
        "#### 3": (True, True), "#### 4</think>#### 3": (True, True), "#### 3</think>#### 4": (False, True),
        "#### 3</think>": (False, False), "4</think>5</think>#### 3": (True, True), "3": (False, False),
    }  # fmt: skip
    for text, verdict in verdicts.items():
        token_ids = tokenizer(text + "</s>", add_special_tokens=False).input_ids
        assert grade_answer(spo_tree.Problem([], "3", False), tokenizer, token_ids) == verdict, text
