"""eval.py: its scores against its own answers, which model it takes, what it keeps, and an interrupt."""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import math_grader
from conftest import REAL_FILES, ROOT, real_file
from eval import final_answer, majority_correct, paper_gsm8k
from test_cli import assert_usage_error


@pytest.fixture(autouse=True)
def own_signal_handler():
    """A script that runs in this process sets another for Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


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


def table(output):
    """The rows of a table, each a dictionary from column to text; "pass@1" with its interval."""
    head, *rows = (re.sub(r" \+- ", "+-", line).split() for line in output.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def small_model(path, seed=1):
    """A copy of the embedded model with the weights of a seed, so that every model gives other answers."""
    shutil.copytree(ROOT / "tiny" / "model", path)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def test_scores_follow_from_the_answers(run_script, tmp_path):
    flags = ["--data", some_problems(tmp_path, 30), "--samples", 3, "--out", tmp_path]
    status, output, _ = run_script("eval.py", *flags)
    rows = answers_in(tmp_path)
    assert status == 0 and len(rows) == 30
    shares = []
    for row in rows:
        (result,) = (row[key] for key in row if key.isdigit())
        finals = [response.split("#### ")[-1] for response in result["responses"]]
        right = [final == row["gold"] for final in finals]
        assert result["correct"] == right and len(right) == 3
        assert result["answers"] == [final if final.isdigit() else "" for final in finals]
        # the end of sequence is a token, too
        assert result["tokens"] <= statistics.fmean(len(text) + 1 for text in result["responses"])
        shares.append(statistics.fmean(right))
    (cells,) = table(output)
    half_width = 1.96 * statistics.pstdev(shares) / 30**0.5
    numbers = statistics.fmean(shares), half_width, sum(share > 0 for share in shares) / 30
    mean, half_width, some = (f"{number:.3f}" for number in numbers)
    assert (cells["questions"], cells["pass@1"], cells["pass@3"]) == ("30", f"{mean}+-{half_width}", some)


def test_the_table_is_aligned_and_fits_a_terminal(run_script, tmp_path):
    name = "a-file-with-a-long-name.jsonl"
    shutil.copy(some_problems(tmp_path, 3), tmp_path / name)
    flags = ["--data", tmp_path / name, "tiny", "--budgets", 100, 512, "--max-questions", 3]
    _, output, _ = run_script("eval.py", *flags, "--out", tmp_path / "out")
    head, *rows = output.splitlines()
    assert len(rows) == 4 and {len(line) for line in output.splitlines()} == {len(head)} and len(head) <= 110
    for column in re.finditer(r"\S+", head):
        for row in rows:
            if column[0] in ("data", "pass@1"):  # text, aligned on the left
                beside, edge = row[: column.start()][-1:], row[column.start()]
            else:
                edge, beside = row[column.end() - 1], row[column.end() :][:1]
            assert edge != " " and beside in ("", " "), (column[0], row)
    assert [row["data"] for row in table(output)] == ["ong-name.jsonl"] * 2 + ["tiny"] * 2


def test_the_table_says_why_nothing_is_right(run_script, tmp_path):
    """Cut before the answer, not cut but never in the form that is read, or simply wrong."""
    flags, data = ["--samples", 2, "--out", tmp_path], some_problems(tmp_path, 10)
    _, output, _ = run_script("eval.py", *flags, "--data", data, "--max-response-tokens", 5)
    (cells,) = table(output)
    assert cells["pass@1"] == "0.000+-0.000" and cells["cut"] == cells["no_answer"] == "1.000"
    boxed = [json.loads(line) | {"problem": "1 + 1?", "answer": "2"} for line in data.open()]  # wants a box
    (tmp_path / "boxed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boxed))
    _, output, _ = run_script("eval.py", *flags, "--data", tmp_path / "boxed.jsonl")
    (cells,) = table(output)
    assert float(cells["cut"]) < 1 and cells["no_answer"] == "1.000"
    wrong = [json.loads(line) | {"answer": "#### 123456"} for line in data.open()]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    _, output, _ = run_script("eval.py", *flags, "--data", tmp_path / "wrong.jsonl")
    (cells,) = table(output)
    assert (cells["pass@1"], cells["cut"], cells["no_answer"]) == ("0.000+-0.000", "0.000", "0.000")


def test_budgets_equal_separate_runs_with_the_same_seed(run_script, tmp_path):
    """What one long generation says of a short budget is what a run with that budget alone gives."""
    flags = ["--data", some_problems(tmp_path, 12), "--batch-size", 1]
    run_script("eval.py", *flags, "--budgets", 90, 120, 200, "--out", tmp_path / "all")
    whole, cut = answers_in(tmp_path / "all"), []
    for budget in ("90", "120", "200"):
        run_script("eval.py", *flags, "--budgets", budget, "--out", tmp_path / budget)
        results = [row[budget] for row in whole]
        assert results == [row[budget] for row in answers_in(tmp_path / budget)]
        cut.append(sum(result["cut"] for result in results))
    assert cut[0] > cut[1] > cut[2]


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
            for budget in filter(str.isdigit, row):
                expected = int(budget) - length if "--budgets" in flags else 140
                assert row[budget]["tokens"] == expected and row[budget]["cut"] == 1


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
    assert status == 0, error
    (cells,) = table(output)
    assert cells["questions"] == ("30" if name == "aime24.jsonl" else "60")
    assert float(cells["pass@1"][:5]) < 0.05


def test_the_protocol_is_read_in_both_spellings(run_script):
    for flags in (["--protocol=long"], ["--protocol", "long"]):
        result = run_script("eval.py", *flags, "--model", "tiny/model", "--data", "tiny")
        assert_usage_error(result, "--model tiny/model", "chat_template")


@pytest.mark.parametrize("response, vote", [
    ("#### 5\n</think> so \\boxed{7}", "7"),  # what is graded is what votes
    ("<think>\\boxed{5}</think> I do not know", ""),
    ("#### The answer:\n\\boxed{7}", "7"),
    ("#### 1,234.0", "1234"),
    ("#### 3 or 4", ""),
])  # fmt: skip
def test_the_vote_follows_the_grader(response, vote):
    assert final_answer(SimpleNamespace(is_math=False), response) == vote
    assert math_grader.grade_gsm8k(response, "7") == (vote == "7")


def test_a_models_own_generation_settings_do_not_apply(run_script, tmp_path):
    """Some models come with a repetition penalty or a top-k, which would be another policy."""
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", some_problems(tmp_path, 10), "--out"]
    own, responses = {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "min_new_tokens": 60}, []
    for settings in ({}, own):
        change(tmp_path / "model" / "generation_config.json", **settings)
        assert run_script("eval.py", *flags, tmp_path / str(len(settings)))[0] == 0
        responses.append([row["512"]["responses"] for row in answers_in(tmp_path / str(len(settings)))])
    assert responses[0] == responses[1] and all(len(set(own)) > 1 for own in responses[0])


# ----------------------------------------------------------------------------------------- which model it is
def test_a_run_stands_for_its_model_or_else_its_newest_checkpoint(run_script, tmp_path):
    run, flags = tmp_path / "run", ["--data", some_problems(tmp_path, 3), "--out", tmp_path / "out"]
    run.mkdir()
    (run / "args.json").write_text("{}")
    assert_usage_error(run_script("eval.py", "--model", run, *flags), str(run))
    for seed, name in enumerate(("checkpoints/000020", "checkpoints/000003", "checkpoints/new", "model")):
        small_model(run / name, seed)
        status, output, error = run_script("eval.py", "--model", run, *flags)
        expected = run / ("model" if name == "model" else "checkpoints/000020")
        assert status == 0 and error.splitlines()[0].endswith(f": {expected}"), error
    direct = run_script("eval.py", "--model", run / "model", *flags)
    assert direct[1] == output and str(run) not in direct[2].splitlines()[0]
    assert len(list((tmp_path / "out").glob("eval__*"))) == 2
    (run / "args.json").unlink()  # any other directory is what it says
    assert_usage_error(run_script("eval.py", "--model", run, *flags), str(run))


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/model", "runs/nowhere/model"])
def test_a_mistyped_path_is_no_name_on_the_hub(run_script, monkeypatch, name):
    """transformers refuses such a name before it asks the hub."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub is asked for it"))
    assert_usage_error(run_script("eval.py", "--model", name), f"{name} (directory or hub)")


def test_the_embedded_model_and_task_are_found_from_any_directory(tmp_path):
    command = [sys.executable, ROOT / "eval.py", "--max-questions", "3"]
    here = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    (tmp_path / "elsewhere").mkdir()
    there = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert here.returncode == there.returncode == 0, there.stderr
    assert here.stdout == there.stdout and table(there.stdout)[0]["data"] == "tiny"
    (path,) = (tmp_path / "elsewhere" / "runs").glob("eval__*__tiny__*.jsonl")
    assert there.stderr == f"tiny: answers in {path.relative_to(tmp_path / 'elsewhere')}\n"


# ------------------------------------------------------------------------------------- answers that are kept
def kept(run_script, tmp_path, model, data):
    """Evaluates; the answers of the file that was written or used."""
    flags = ["--model", model, "--data", data, "--out", tmp_path / "out"]
    status, _, error = run_script("eval.py", *flags)
    assert status == 0, error
    return Path(error.split("answers in ")[1].strip()).read_text()


def test_new_weights_in_the_same_directory_are_evaluated_anew(run_script, tmp_path):
    model, data = small_model(tmp_path / "model"), some_problems(tmp_path, 4)
    first = kept(run_script, tmp_path, model, data)
    assert kept(run_script, tmp_path, model, data) == first
    assert len(list((tmp_path / "out").iterdir())) == 1
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    assert kept(run_script, tmp_path, model, data) == first  # asked again, with the same answers
    assert len(list((tmp_path / "out").iterdir())) == 2
    other = small_model(tmp_path / "other", seed=2)
    torch.save(load_file(other / "model.safetensors"), model / "pytorch_model.bin")
    assert kept(run_script, tmp_path, model, data) != first


def test_another_gold_answer_is_graded_anew(run_script, tmp_path):
    data = some_problems(tmp_path, 2)
    first = kept(run_script, tmp_path, "tiny/model", data)
    rows = [json.loads(line) | {"answer": "#### 123456"} for line in data.open()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "123456" not in first and "123456" in kept(run_script, tmp_path, "tiny/model", data)


def test_a_hub_model_that_moved_to_another_commit_is_evaluated_anew(tmp_path):
    """A cache as the hub's client writes it; the second commit has other weights."""
    repository, data = tmp_path / "hf" / "hub" / "models--org--name", some_problems(tmp_path, 4)
    (repository / "refs").mkdir(parents=True)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    flags = ["--model", "org/name", "--data", data, "--out", tmp_path / "out"]
    outputs = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        if not (repository / "snapshots" / commit).exists():
            small_model(repository / "snapshots" / commit, seed=len(outputs))
        (repository / "refs" / "main").write_text(commit)
        command = [sys.executable, "eval.py", *map(str, flags)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        outputs.append(Path(result.stderr.split("answers in ")[1].strip()).read_text())
    assert outputs[0] != outputs[1] and outputs[0] == outputs[2]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 2 and all(name.startswith("eval__org-name__some__") for name in names)


# ----------------------------------------------------------------------------------------------- an interrupt
RUN_SLOWLY = """
import runpy, sys, time, transformers
def slow(self, *arguments, **options):
    print("now", flush=True)
    time.sleep(60)
if sys.argv.pop(1) == "loading":
    transformers.AutoModelForCausalLM.from_pretrained = slow
else:
    transformers.LlamaForCausalLM.generate = slow
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["loading", "sampling"])
def test_ctrl_c_is_one_line(tmp_path, moment):
    command = [sys.executable, "-c", RUN_SLOWLY, moment, ROOT / "eval.py", "--out", tmp_path]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while "now" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip() == "interrupted; the same command continues it"


def test_what_was_kept_before_ctrl_c_is_continued(run_script, tmp_path):
    flags = ["eval.py", "--data", some_problems(tmp_path, 40), "--batch-size", 1, "--out"]
    _, whole_table, _ = run_script(*flags, tmp_path / "whole")
    command = [sys.executable, *map(str, flags), tmp_path / "parts"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while process.poll() is None and not list((tmp_path / "parts").glob("*.jsonl")):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error
    assert 0 < len(answers_in(tmp_path / "parts")) < 40
    _, parts_table, _ = run_script(*flags, tmp_path / "parts")
    assert parts_table == whole_table and answers_in(tmp_path / "parts") == answers_in(tmp_path / "whole")
