"""Runs that are killed and go on with --resume: each equals an uninterrupted run, bit for bit."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from conftest import SCRIPTS, SMALL
from test_cli import assert_usage_error
from test_ranks import torchrun
from test_run import differences, load_state, metrics, same_weights

SHORT = ["--train-data", "tiny/test.jsonl", "--eval-questions", 2, "--checkpoint-every", 1, "--eval-every", 2]
OWN_FLAGS = {  # something stays in the buffer; the policy is trained from the first iteration on
    "spo_tree.py": ["--segments-per-iteration", 12],
    "ppo.py": ["--critic-warmup-iterations", 0],
}


def test_a_kill_in_a_save(run_script, tmp_path, monkeypatch):
    """Of the second checkpoint: when its state is to be written, and when its directory gets its name."""
    whole, flags = tmp_path / "whole", [*SMALL["spo_tree.py"], *SHORT, "--num-iterations", 2]
    assert run_script("spo_tree.py", *flags, "--run-dir", whole)[0] == 0
    for owner, name in ((torch, "save"), (Path, "rename")):
        calls, original, killed = [], getattr(owner, name), tmp_path / name

        def die_the_second_time(*arguments):
            calls.append(arguments)
            return original(*arguments) if len(calls) < 2 else sys.exit(9)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die_the_second_time)
            assert run_script("spo_tree.py", *flags, "--run-dir", killed)[0] == 9
        status, _, error = run_script("spo_tree.py", "--resume", killed)
        assert status == 0 and differences(whole, killed) == [], error


def wind_back(whole, killed):
    """A copy of a run as a kill in its second iteration leaves it: later lines, a torn one, half a model."""
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "model")
    (killed / "checkpoints" / "000002").rename(killed / "checkpoints" / "new")
    (killed / "checkpoints" / "new" / "left-over").touch()
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "ti')
    with open(killed / "samples.jsonl", "a") as file:
        file.write('{"iteration": 3, "completions": []}\n')


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_in_training(run_script, tmp_path, script):
    """Weights, optimizers, the critic, SPO-tree's buffer and the random numbers go on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*SMALL[script], *SHORT, *OWN_FLAGS.get(script, []), "--num-iterations", 2]
    assert run_script(script, *flags, "--run-dir", whole)[0] == 0
    assert not same_weights(whole / "checkpoints" / "000001", whole / "model")
    if script == "spo_tree.py":
        (buffer,) = load_state(whole / "checkpoints" / "000001")["buffers"]
        assert buffer
    wind_back(whole, killed)
    status, _, error = run_script(script, "--resume", killed)
    assert status == 0 and differences(whole, killed) == [], error


def test_a_kill_of_two_ranks(run_script, tmp_path):
    """Each has its own buffer; another number of ranks is refused."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*SMALL["spo_tree.py"], *SHORT, *OWN_FLAGS["spo_tree.py"], "--num-iterations", 2]
    result = torchrun("spo_tree.py", *flags, "--run-dir", whole)
    assert result.returncode == 0, result.stderr
    buffers = load_state(whole / "checkpoints" / "000001")["buffers"]
    questions = [{group.question for group in buffer} for buffer in buffers]
    assert len(questions) == 2 and all(questions) and not questions[0] & questions[1]
    wind_back(whole, killed)
    result = torchrun("spo_tree.py", "--resume", killed)
    assert result.returncode == 0 and differences(whole, killed) == [], result.stderr
    assert_usage_error(run_script("spo_tree.py", "--resume", killed), "2 processes")


def test_what_a_resume_leaves_alone(run_script, tmp_path):
    """Copies of checkpoints and files of the user's; a file that was shortened is not lengthened."""
    run_dir, flags = tmp_path / "run", [*SMALL["grpo.py"], *SHORT, "--num-iterations", 2]
    assert run_script("grpo.py", *flags, "--run-dir", run_dir)[0] == 0
    (run_dir / "checkpoints" / "000001").rename(run_dir / "checkpoints" / "000001_best")
    (run_dir / "checkpoints" / "000002_empty").mkdir()
    (run_dir / "notes.jsonl").write_text("{}\n")
    first, *_ = (run_dir / "metrics.jsonl").read_text().splitlines(True)
    (run_dir / "metrics.jsonl").write_text(first)
    status, _, error = run_script("grpo.py", "--resume", run_dir, "--num-iterations", 4)
    assert status == 0 and [row["iteration"] for row in metrics(run_dir)] == [0, 3, 4], error
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left == ["000001_best", "000002_empty", "000003", "000004"]
    assert (run_dir / "notes.jsonl").read_text() == "{}\n"

    shutil.rmtree(run_dir / "checkpoints")  # it is not begun anew, which would lose the model
    assert_usage_error(run_script("grpo.py", "--resume", run_dir), "has no checkpoint")
    assert_usage_error(run_script("grpo.py", "--resume", run_dir, "--run-dir", tmp_path / "b"), "without --run-dir")
    assert (run_dir / "model" / "config.json").exists() and len(metrics(run_dir)) == 3
