"""eval.py: its scores against its own answers, the vote, and the authors' rule for GSM8K."""

import json
import random
import shutil
import statistics
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

import math_grader
from conftest import REAL_FILES, ROOT, real_file
from eval import Problem, final_answer, majority_correct, paper_gsm8k
from test_cli import assert_usage_error


@pytest.mark.parametrize("response, gold, verdict", [
    ("so 18\n#### 18", "18", True),
    ("#### 1,234", "1234", True),
    ("#### 1,234", "1,234", False),  # commas leave the answer only
    ("#### 18.0", "18", False),
    ("#### $18", "18", False),
    ("18", "18", False),
    ("#### 3\n#### 18\n", "18", True),
])
def test_paper_grading(response, gold, verdict):
    assert paper_gsm8k(response, gold) is verdict


def test_majority_vote():
    assert majority_correct(["7", "8", "7", ""], [True, False, True, False]) == 1
    assert majority_correct(["7", "8", "8", ""], [True, False, False, False]) == 0
    assert majority_correct(["7", "8", "", ""], [True, False, False, False]) == 0.5
    assert majority_correct(["", ""], [False, False]) == 0


def answers_in(directory):
    """The lines of the one file of answers there."""
    (path,) = directory.glob("eval__*.jsonl")
    return [json.loads(line) for line in path.open()]


def change(path, **values):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def some_problems(tmp_path, count):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(open(ROOT / "tiny" / "test.jsonl").readlines()[:count]))
    return path


def test_scores_follow_from_the_answers(run_script, tmp_path):
    flags = ["--data", some_problems(tmp_path, 30), "--samples", 3, "--out", tmp_path]
    status, output, _ = run_script("eval.py", *flags)
    rows = answers_in(tmp_path)
    assert status == 0 and len(rows) == 30 and all(len(row["responses"]) == 3 for row in rows)
    shares = []
    for row in rows:
        right = [response.split("#### ")[-1] == row["gold"] for response in row["responses"]]
        (result,) = row["budgets"].values()
        assert result["correct"] == right and len(result["answers"]) == 3
        # the end of sequence is a token, too
        assert all(n <= len(text) + 1 for n, text in zip(result["tokens"], row["responses"]))
        shares.append(statistics.fmean(right))
    cells = output.splitlines()[1].split()
    half_width = 1.96 * statistics.pstdev(shares) / 30**0.5
    numbers = statistics.fmean(shares), half_width, sum(share > 0 for share in shares) / 30
    mean, half_width, some = (f"{number:.3f}" for number in numbers)
    assert cells[2:7] == ["30", mean, "+-", half_width, some]


def test_budgets_equal_separate_runs_with_the_same_seed(run_script, tmp_path):
    """What one long generation says of a short budget is what a run with that budget alone gives."""
    flags = ["--data", some_problems(tmp_path, 12), "--batch-size", 1]
    run_script("eval.py", *flags, "--budgets", 90, 120, 200, "--out", tmp_path / "all")
    whole, truncated = answers_in(tmp_path / "all"), []
    for budget in ("90", "120", "200"):
        run_script("eval.py", *flags, "--budgets", budget, "--out", tmp_path / budget)
        results = [row["budgets"][budget] for row in whole]
        assert results == [row["budgets"][budget] for row in answers_in(tmp_path / budget)]
        truncated.append(sum(sum(result["truncated"]) for result in results))
    assert truncated[0] > truncated[1] > truncated[2]


def test_an_answer_without_an_end_has_exactly_the_tokens_that_its_limit_allows(run_script, tmp_path):
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    # padding, which is hardly ever sampled
    change(tmp_path / "model" / "generation_config.json", eos_token_id=0)
    change(tmp_path / "model" / "tokenizer_config.json", eos_token="<pad>")
    tokenizer, data = AutoTokenizer.from_pretrained(tmp_path / "model"), some_problems(tmp_path, 8)
    for flags in (["--budgets", 150, 250], ["--max-response-tokens", 140]):
        flags = ["--model", tmp_path / "model", "--data", data, *flags]
        run_script("eval.py", *flags, "--out", tmp_path / str(flags[-1]))
        for row in answers_in(tmp_path / str(flags[-1])):
            length = len(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
            for budget, result in row["budgets"].items():
                expected = int(budget) - length if "--budgets" in flags else 140
                assert result["tokens"] == [expected] * 4 and all(result["truncated"])


def test_an_evaluation_killed_at_random_moments_loses_and_repeats_nothing(run_script, tmp_path):
    flags = ["eval.py", "--data", some_problems(tmp_path, 40), "--batch-size", 2, "--out"]
    _, whole_table, _ = run_script(*flags, tmp_path / "whole")
    (whole,) = (tmp_path / "whole").glob("*.jsonl")
    path, lines, rng = tmp_path / "parts" / whole.name, [0], random.Random(1)

    def written():
        return len(path.read_text().splitlines()) if path.exists() else 0

    while len(lines) < 3:
        command = [sys.executable, *map(str, flags), tmp_path / "parts"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written() == lines[-1]:
            time.sleep(0.01)
        time.sleep(0.5 * rng.random())
        process.kill()
        process.wait()
        lines.append(written())
    assert 0 < lines[1] < lines[2] <= 40 and lines[1] < 40, lines
    _, table, _ = run_script(*flags, tmp_path / "parts")
    assert path.read_text() == whole.read_text() and table == whole_table
    assert run_script(*flags, tmp_path / "parts", "--seed", 2)[0] == 0
    assert len(list((tmp_path / "parts").glob("*.jsonl"))) == 2  # other settings, another file


def test_a_prompt_that_leaves_no_room_in_a_budget_is_wrong_not_an_error(run_script, tmp_path):
    flags = ["--data", some_problems(tmp_path, 3), "--budgets", 5, 200, "--out", tmp_path / "out"]
    status, output, _ = run_script("eval.py", *flags)
    assert status == 0 and "0.000 +- 0.000" in output


def test_paper_grading_is_for_gsm8k_only(run_script, tmp_path):
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    result = run_script("eval.py", "--data", tmp_path / "math.jsonl", "--paper-grading")
    assert_usage_error(result, "math.jsonl", "--paper-grading")


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files(run_script, wide_model, tmp_path, name):
    """The embedded model reads them and solves none."""
    flags = ["--data", real_file(name), "--samples", 1, "--max-response-tokens", 16, "--max-questions", 60]
    status, output, error = run_script("eval.py", "--model", wide_model, *flags, "--out", tmp_path)
    cells = output.splitlines()[-1].split()
    assert status == 0 and cells[2] == ("30" if name == "aime24.jsonl" else "60"), error
    assert float(cells[3]) < 0.05


def test_the_protocol_is_read_in_both_spellings(run_script):
    for flags in (["--protocol=long"], ["--protocol", "long"]):
        result = run_script("eval.py", *flags, "--model", "tiny/model", "--data", "tiny")
        assert_usage_error(result, "--budgets 32768")


@pytest.mark.parametrize("response, vote", [
    ("#### 5\n</think> so \\boxed{7}", "7"),  # what is graded is what votes
    ("<think>\\boxed{5}</think> I do not know", ""),
    ("#### The answer:\n\\boxed{7}", "7"),
    ("#### 1,234.0", "1234"),
    ("#### 3 or 4", ""),
])  # fmt: skip
def test_the_vote_follows_the_grader(response, vote):
    assert final_answer(Problem([], "7", math_grader.grade_gsm8k), response) == vote
    assert math_grader.grade_gsm8k(response, "7") == (vote == "7")


def test_a_models_own_generation_settings_do_not_apply(run_script, tmp_path):
    """Some models come with a repetition penalty or a top-k, which would be another policy."""
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", some_problems(tmp_path, 10), "--out"]
    own, responses = {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "min_new_tokens": 60}, []
    for settings in ({}, own):
        change(tmp_path / "model" / "generation_config.json", **settings)
        assert run_script("eval.py", *flags, tmp_path / str(len(settings)))[0] == 0
        responses.append([row["responses"] for row in answers_in(tmp_path / str(len(settings)))])
    assert responses[0] == responses[1] and all(len(set(own)) > 1 for own in responses[0])
