"""eval.py: its scores against its own answers, which model it takes, what it keeps; and a run's own."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import math_grader
from conftest import ROOT, hear_ctrl_c, run_process, tiny_args
from eval import final_answer, majority_correct, paper_gsm8k
from spo_tree import Completion, Problem, evaluate, sample_transformers
from test_cli import assert_usage_error

TINY = ROOT / "tiny"
BUDGETS = ["5", "90", "120", "384"]  # the first leaves no room for an answer


def answers_in(path):
    return [json.loads(line) for line in path.open()]


def some_problems(path, count):
    path.write_text("".join((TINY / "test.jsonl").open().readlines()[:count]))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation on two files: its flags, its table and the files of answers."""
    path = tmp_path_factory.mktemp("whole")
    data = some_problems(path / "a-file-with-a-long-name.jsonl", 4)
    flags = ["--data", data, "tiny", "--max-questions", 4, "--samples", 3, "--batch-size", 1]
    flags += ["--budgets", *BUDGETS]
    status, output, error = run_process("eval.py", *flags, "--out", path / "out")
    assert status == 0, error
    paths = [Path(name) for name in re.findall("answers in (.*)", error)]
    return SimpleNamespace(flags=flags, table=output, paths=paths, data=data)


def test_the_table_is_readable_and_follows_from_the_answers(whole):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    head, *lines = whole.table.splitlines()
    assert {len(line) for line in lines} == {len(head)} and len(head) <= 110
    cells = [line.replace(" +- ", "+-").split() for line in lines]
    rows = [dict(zip(head.split(), row, strict=True)) for row in cells]
    assert [row["data"] for row in rows] == ["ong-name.jsonl"] * 4 + ["tiny"] * 4
    assert [row["budget"] for row in rows] == BUDGETS * 2 and {row["questions"] for row in rows} == {"4"}
    for path, row in zip([whole.paths[0]] * 4 + [whole.paths[1]] * 4, rows):
        numbers = []
        for answer in answers_in(path):
            result = answer[row["budget"]]
            finals = [response.split("#### ")[-1] for response in result["responses"]]
            right = [final == answer["gold"] for final in finals]
            finals = [final if final.isdigit() else "" for final in finals]
            assert (result["correct"], result["answers"]) == (right, finals) and len(right) == 3
            numbers.append([fmean(right), any(right), majority_correct(finals, right), len({*finals} - {""})])
            numbers[-1] += [result["cut"], finals.count("") / 3, result["tokens"]]
            prompt = tokenizer(answer["prompt"], add_special_tokens=False).input_ids
            room = max(int(row["budget"]) - len(prompt), 0)
            assert result["tokens"] <= room and (result["cut"] < 1 or result["tokens"] == room)
        shares, *others = zip(*numbers)
        assert row["pass@1"] == f"{fmean(shares):.3f}+-{1.96 * pstdev(shares) / 4**0.5:.3f}"
        names = "pass@3 majority distinct cut no_answer tokens".split()
        assert [row[name] for name in names] == [f"{fmean(column):.3f}" for column in others]


def test_budgets_equal_separate_runs_with_the_same_seed(whole, run_script, tmp_path):
    """What one long generation says of a short budget is what a run with that budget alone gives."""
    expected = answers_in(whole.paths[0])
    for budget in ("90", "120"):
        flags = ["--data", whole.data, "--samples", 3, "--batch-size", 1, "--budgets", budget]
        run_script("eval.py", *flags, "--out", tmp_path / budget)
        (path,) = (tmp_path / budget).iterdir()
        assert [row[budget] for row in answers_in(path)] == [row[budget] for row in expected]


def test_an_interrupted_evaluation_loses_and_repeats_nothing(whole, run_script, tmp_path):
    """Ctrl-C, in another directory than that of the script, which finds its model and data all the same."""
    command, path = [sys.executable, ROOT / "eval.py", *whole.flags], tmp_path / "runs" / whole.paths[0].name
    options = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    process = subprocess.Popen(list(map(str, command)), **options)
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and error == "\ninterrupted; the same command continues it\n"
    first, *lines = path.read_text().splitlines(keepends=True)
    expected = whole.paths[0].read_text().splitlines(keepends=True)
    assert lines == expected[1 : len(lines) + 1] and len(lines) < 3
    first = json.dumps(json.loads(first) | {"kept": True}) + "\n"
    path.write_text("".join([first, *lines]))
    path.with_suffix(".new").write_text('{"prompt": "Em')  # what a kill leaves behind
    _, output, _ = run_script("eval.py", *whole.flags, "--out", tmp_path / "runs")
    assert output == whole.table and path.read_text() == "".join([first, *expected[1:]])


def test_paper_grading_and_majority_vote():
    assert paper_gsm8k("#### 3\nso\n#### 1,234", "1234")
    assert not paper_gsm8k("#### 1,234", "1,234")  # commas leave the answer only
    assert not paper_gsm8k("#### 18.0", "18") and not paper_gsm8k("18", "18")
    assert majority_correct(["7", "8", "7", ""], [True, False, True, False]) == 1
    assert majority_correct(["7", "8", "8", ""], [True, False, False, False]) == 0
    assert majority_correct(["7", "8", "", ""], [True, False, False, False]) == 0.5
    assert majority_correct(["", ""], [False, False]) == 0


def test_the_vote_follows_the_grader():
    """What is graded is what votes."""
    votes = {"#### 5\n</think> so \\boxed{7}": "7", "<think>\\boxed{5}</think> I do not know": ""}
    for response, vote in (votes | {"#### 1,234.0": "1234", "#### 3 or 4": ""}).items():
        assert final_answer(SimpleNamespace(is_math=False), response) == vote
        assert math_grader.grade_gsm8k(response, "7") == (vote == "7")
    assert final_answer(SimpleNamespace(is_math=True), "\\boxed{7}\n#### 5") == "7"


@pytest.mark.parametrize("flags, words", [
    (["--protocol", "long", "--model", "tiny/model", "--data", "tiny"], ["tiny/model", "chat_template"]),
    (["--data", "math.jsonl", "--paper-grading"], ["math.jsonl", "--paper-grading"]),
    (["--model", "../nowhere"], ["../nowhere (directory or hub)"]),
    (["--budgets", 90, 4000], ["--budgets 4000"]),
])  # fmt: skip
def test_wrong_flags(run_script, tmp_path, flags, words):
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2"}))
    flags = [tmp_path / flag if flag == "math.jsonl" else flag for flag in flags]
    assert_usage_error(run_script("eval.py", *flags, "--max-questions", 1), *words)


def test_a_run_stands_for_its_model_or_else_its_newest_checkpoint(run_script, tmp_path):
    run, flags = tmp_path / "run", ["--max-questions", 1, "--out", tmp_path / "out"]
    (run / "checkpoints").mkdir(parents=True)
    for name in ("000020", "000003", "new"):
        (run / "checkpoints" / name).symlink_to(TINY / "model")
    assert_usage_error(run_script("eval.py", "--model", run, *flags), str(run))  # it is no run
    (run / "args.json").touch()
    assert "run-checkpoints-000020__tiny" in run_script("eval.py", "--model", run, *flags)[2]
    (run / "model").symlink_to(TINY / "model")
    assert "run-model__tiny" in run_script("eval.py", "--model", run, *flags)[2]


def test_a_changed_model_or_file_is_evaluated_anew(run_script, tmp_path):
    """A model's own settings of sampling, which would be another policy, do not apply."""
    data = some_problems(tmp_path / "some.jsonl", 4)
    model = shutil.copytree(TINY / "model", tmp_path / "model")

    def evaluated(name):
        """The text of the file that was written or used, and how many such files there are."""
        status, _, error = run_script("eval.py", "--model", name, "--data", data, "--out", tmp_path / "out")
        assert status == 0, error
        text = Path(error.split("answers in ")[1].strip()).read_text()
        return text, len(list((tmp_path / "out").iterdir()))

    first, _ = evaluated(model)
    assert evaluated(model) == (first, 1)
    own = {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "min_new_tokens": 60, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(own))
    assert evaluated(model) == (first, 2)
    policy = AutoModelForCausalLM.from_pretrained(TINY / "model")
    policy.model.norm.weight.data *= 0.8
    policy.save_pretrained(model)
    assert evaluated(model)[0] != first
    data.write_text(data.read_text().replace("#### ", "#### 1234"))
    assert '"gold": "1234' in evaluated(model)[0]


def test_learned_positions_and_two_files_of_one_name(run_script, tmp_path):
    """No position beyond the last one is asked for, whichever prompt of a batch is the longest."""
    sizes = dict(vocab_size=512, n_positions=256, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / name, tmp_path / "model")
    data = [tmp_path / name / "test.jsonl" for name in ("a", "b")]
    for path in data:
        path.parent.mkdir()
        some_problems(path, 5)
    flags = ["--model", tmp_path / "model", "--data", *data, "--budgets", 256, "--samples", 2]
    status, output, error = run_script("eval.py", *flags, "--out", tmp_path / "out")
    assert status == 0 and [line.split()[0] for line in output.splitlines()[1:]] == [str(path)[-14:] for path in data], error


def test_an_evaluation_is_over_problems():
    """3, 1 and 0 of 4 answers are right: the interval is that of the problems' shares, not of 12 answers."""
    tokenizer, asked = AutoTokenizer.from_pretrained(TINY / "model"), []
    problems, shares = [Problem([k], "7", is_math=False) for k in range(3)], [0.75, 0.25, 0.0]
    right = Completion(tokenizer("#### 7", add_special_tokens=False).input_ids, [], finished=True)
    wrong = Completion([9] * len(right.token_ids), [])
    drawn = [[right] * 3 + [wrong], [wrong] * 3 + [right], [wrong] * 4]

    def sample(contexts, *flags):
        asked.append(flags)
        return drawn

    args = tiny_args(eval_samples=4, temperature=0.7, max_response_tokens=9)
    row = evaluate(problems, sample, tokenizer, args)
    assert row["eval/accuracy"] == pytest.approx(fmean(shares))
    assert row["eval/accuracy_ci95"] == pytest.approx(1.96 * pstdev(shares) / 3**0.5)
    assert row["eval/truncated_fraction"] == row["eval/unreadable_fraction"] == pytest.approx(8 / 12)
    assert row["eval/response_length"] == len(right.token_ids)
    evaluate(problems, sample, tokenizer, args)
    assert asked[0] == asked[1] and asked[0][:4] == (4, [9, 9, 9], 0.7, 1.0)  # and the same seed
    evaluate(problems, sample, tokenizer, tiny_args(eval_temperature=0.0))
    assert asked[2][2] == 0.0


def test_temperature_zero_takes_the_most_probable_token(model):
    context, ids = [5, 6, 7], []
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([context + ids])).logits[0, -1].argmax()))
    ((greedy,),) = sample_transformers(model, [], [context], 1, [6], 0.0, 1.0, seed=1)
    assert greedy.token_ids == ids
