"""eval.py: its scores against its own answers, the vote, and the authors' rule for GSM8K."""

import json
import statistics

import pytest

from conftest import ROOT
from eval import majority_correct, paper_gsm8k


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


def test_scores_follow_from_the_answers(run_script, tmp_path):
    (tmp_path / "some.jsonl").write_text("".join(open(ROOT / "tiny" / "test.jsonl").readlines()[:30]))
    status, output, _ = run_script("eval.py", "--data", tmp_path / "some.jsonl", "--samples", 3, "--out", tmp_path)
    (path,) = tmp_path.glob("eval__*.jsonl")
    rows = [json.loads(line) for line in path.open()]
    assert status == 0 and len(rows) == 30 and all(len(row["responses"]) == 3 for row in rows)
    for row in rows:
        right = [response.split("#### ")[-1] == row["gold"] for response in row["responses"]]
        assert row["correct"] == right and row["pass@1"] == pytest.approx(statistics.fmean(right))
    assert f"{statistics.fmean(row['pass@1'] for row in rows):.3f} +-" in output and "majority" in output


def test_paper_grading_is_for_gsm8k_only(run_script, tmp_path):
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    status, _, error = run_script("eval.py", "--data", tmp_path / "math.jsonl", "--paper-grading")
    assert status == 2 and "math.jsonl" in error


@pytest.mark.parametrize("name, column", [("gsm8k_test.jsonl", "question"), ("math500.jsonl", "problem"), ("aime24.jsonl", "problem")])
def test_real_files(run_script, tmp_path, name, column):
    data = ROOT.parent / "shared" / "data" / name
    if not data.exists():
        pytest.skip(f"{name} is development data that is not part of the repository")
    rows = [line for line in data.read_text(encoding="utf-8").splitlines() if len(json.loads(line)[column]) < 250][:6]
    (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    status, output, error = run_script("eval.py", "--data", tmp_path / name, "--samples", 2, "--out", tmp_path)
    assert status == 0 and "6  " in output, error
