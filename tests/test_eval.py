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
from conftest import REAL_FILES, ROOT, real_file, run_process
from eval import Problem, final_answer, majority_correct, paper_gsm8k


@pytest.mark.parametrize("response, gold, verdict", [
    ("so 18\n#### 18", "18", True), ("#### 1,234", "1234", True), ("#### 1,234", "1,234", False),  # commas leave the answer only
    ("#### 18.0", "18", False), ("#### $18", "18", False), ("18", "18", False), ("#### 3\n#### 18\n", "18", True),
])  # fmt: skip
def test_paper_grading(response, gold, verdict):
    assert paper_gsm8k(response, gold) is verdict


def test_majority_vote():
    assert majority_correct(["7", "8", "7", ""], [True, False, True, False]) == 1
    assert majority_correct(["7", "8", "8", ""], [True, False, False, False]) == 0
    assert majority_correct(["7", "8", "", ""], [True, False, False, False]) == 0.5
    assert majority_correct(["", ""], [False, False]) == 0


def some_problems(tmp_path, count):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(open(ROOT / "tiny" / "test.jsonl").readlines()[:count]))
    return path


def test_scores_follow_from_the_answers(run_script, tmp_path):
    status, output, _ = run_script("eval.py", "--data", some_problems(tmp_path, 30), "--samples", 3, "--out", tmp_path)
    (path,) = tmp_path.glob("eval__*.jsonl")
    rows = [json.loads(line) for line in path.open()]
    assert status == 0 and len(rows) == 30 and all(len(row["responses"]) == 3 for row in rows)
    shares = []
    for row in rows:
        right = [response.split("#### ")[-1] == row["gold"] for response in row["responses"]]
        (result,) = row["budgets"].values()
        assert result["correct"] == right and len(result["answers"]) == 3
        assert all(tokens <= len(response) + 1 for tokens, response in zip(result["tokens"], row["responses"]))  # 1: the end
        shares.append(statistics.fmean(right))
    cells = output.splitlines()[1].split()
    half_width = 1.96 * statistics.pstdev(shares) / 30**0.5
    assert cells[2:7] == ["30", f"{statistics.fmean(shares):.3f}", "+-", f"{half_width:.3f}", f"{sum(s > 0 for s in shares) / 30:.3f}"]


def test_budgets_equal_separate_runs_with_the_same_seed(run_script, tmp_path):
    """What one long generation says of a short budget is what a run with that budget alone gives, answer for answer."""
    data = some_problems(tmp_path, 12)
    run_script("eval.py", "--data", data, "--budgets", 90, 120, 200, "--batch-size", 1, "--out", tmp_path / "all")
    whole = [json.loads(line) for path in (tmp_path / "all").glob("*.jsonl") for line in path.open()]
    for budget in (90, 120, 200):
        run_script("eval.py", "--data", data, "--budgets", budget, "--batch-size", 1, "--out", tmp_path / str(budget))
        alone = [json.loads(line) for path in (tmp_path / str(budget)).glob("*.jsonl") for line in path.open()]
        assert [row["budgets"][str(budget)] for row in whole] == [row["budgets"][str(budget)] for row in alone]
    truncated = [sum(sum(row["budgets"][b]["truncated"]) for row in whole) for b in ("90", "120", "200")]
    assert truncated[0] > truncated[1] > truncated[2]


def test_an_answer_without_an_end_has_exactly_the_tokens_that_its_limit_allows(run_script, tmp_path):
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    config = tmp_path / "model" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 0}))  # padding, which is hardly ever sampled
    tokenizer, data = AutoTokenizer.from_pretrained(tmp_path / "model"), some_problems(tmp_path, 8)
    for flags in (["--budgets", 150, 250], ["--max-response-tokens", 140]):
        run_script("eval.py", "--model", tmp_path / "model", "--data", data, *flags, "--out", tmp_path / flags[0])
        rows = [json.loads(line) for path in (tmp_path / flags[0]).glob("*.jsonl") for line in path.open()]
        for row in rows:
            length = len(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
            expected = {"150": 150 - length, "250": 250 - length} if flags[0] == "--budgets" else {"512": 140}
            assert {budget: result["tokens"] for budget, result in row["budgets"].items()} == {b: [n] * 4 for b, n in expected.items()}
            assert all(all(result["truncated"]) for result in row["budgets"].values())


def test_an_evaluation_killed_at_random_moments_loses_and_repeats_nothing(tmp_path):
    flags = ["eval.py", "--data", some_problems(tmp_path, 40), "--batch-size", 2, "--out"]
    _, whole_table, _ = run_process(*flags, tmp_path / "whole")
    (whole,) = (tmp_path / "whole").glob("*.jsonl")
    path, lines, rng = tmp_path / "parts" / whole.name, [0], random.Random(1)

    def written():
        return len(path.read_text().splitlines()) if path.exists() else 0

    while len(lines) < 3:
        process = subprocess.Popen([sys.executable, *map(str, flags), tmp_path / "parts"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written() == lines[-1]:
            time.sleep(0.01)
        time.sleep(0.5 * rng.random())
        process.kill()
        process.wait()
        lines.append(written())
    assert 0 < lines[1] < lines[2] <= 40 and lines[1] < 40, lines
    _, table, _ = run_process(*flags, tmp_path / "parts")
    assert path.read_text() == whole.read_text() and table == whole_table
    assert run_process(*flags, tmp_path / "parts", "--seed", 2)[0] == 0
    assert len(list((tmp_path / "parts").glob("*.jsonl"))) == 2  # other settings, another file


def test_a_prompt_that_leaves_no_room_in_a_budget_is_wrong_not_an_error(run_script, tmp_path):
    status, output, _ = run_script("eval.py", "--data", some_problems(tmp_path, 3), "--budgets", 5, 200, "--out", tmp_path / "out")
    assert status == 0 and "0.000 +- 0.000" in output


def test_paper_grading_is_for_gsm8k_only(run_script, tmp_path):
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    status, _, error = run_script("eval.py", "--data", tmp_path / "math.jsonl", "--paper-grading")
    assert status == 2 and "math.jsonl" in error


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files(run_script, wide_model, tmp_path, name):
    """The embedded model reads them and solves none; whole files take a minute: the first hundred questions here."""
    flags = ["--data", real_file(name), "--samples", 2, "--max-response-tokens", 32, "--max-questions", 100]
    status, output, error = run_script("eval.py", "--model", wide_model, *flags, "--out", tmp_path)
    cells = output.splitlines()[1].split()
    assert status == 0 and cells[2] == ("30" if name == "aime24.jsonl" else "100") and float(cells[3]) < 0.05, error


def test_the_protocol_is_read_in_both_spellings(run_script):
    for flags in (["--protocol=long"], ["--protocol", "long"]):
        status, _, error = run_script("eval.py", *flags, "--model", "tiny/model", "--data", "tiny")
        assert status == 2 and "--budgets 32768" in error


@pytest.mark.parametrize("response, vote", [
    ("#### 5\n</think> so \\boxed{7}", "7"),  # what is graded is what votes
    ("<think>\\boxed{5}</think> I do not know", ""),
    ("#### The answer:\n\\boxed{7}", "7"),
    ("#### 1,234.0", "1234"),
    ("#### 3 or 4", ""),
])  # fmt: skip
def test_the_vote_follows_the_grader(response, vote):
    assert final_answer(Problem(1, [], "7", math_grader.grade_gsm8k), response) == vote
    assert math_grader.grade_gsm8k(response, "7") == (vote == "7")


def test_a_models_own_generation_settings_do_not_apply(run_script, tmp_path):
    """Some models come with a repetition penalty or a top-k, which would be another policy than the one that was trained."""
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    own = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    data, responses = some_problems(tmp_path, 10), []
    for k, settings in enumerate(({}, {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "min_new_tokens": 60})):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own | settings))
        assert run_script("eval.py", "--model", tmp_path / "model", "--data", data, "--out", tmp_path / str(k))[0] == 0
        (path,) = (tmp_path / str(k)).glob("*.jsonl")
        responses.append([json.loads(line)["responses"] for line in path.open()])
    assert responses[0] == responses[1] and all(len(set(own)) > 1 for own in responses[0])
