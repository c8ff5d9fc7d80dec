"""Runs that are killed and go on with --resume: each equals an uninterrupted run, bit for bit."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS, SMALL
from test_cli import assert_usage_error
from test_ranks import torchrun
from test_run import differences, load_state, same_weights

SHORT = ["--train-data", "tiny/test.jsonl", "--eval-questions", 2, "--checkpoint-every", 1, "--eval-every", 2]
OWN_FLAGS = {  # something stays in the buffer; the policy is trained from the first iteration on
    "spo_tree.py": ["--segments-per-iteration", 12],
    "ppo.py": ["--critic-warmup-iterations", 0],
}


def run_until(operation, run_dir, script, *flags):
    """Runs a script, but dies, as by kill -9, at the n-th operation that changes its directory."""
    left = operation

    def hook(event, args):
        nonlocal left
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        changes = changes or event == "open" and set(args[1] or "") & set("wa+")
        inside = changes and (str(args[0]).startswith(str(run_dir)) or event in ("os.remove", "os.rmdir"))
        left -= bool(inside)
        if inside and left == 0:
            os._exit(9)

    sys.argv = [script, *map(str, flags)]
    sys.addaudithook(hook)
    runpy.run_path(script, run_name="__main__")


def kill_and_resume(run_dir, script, *flags):
    """Kills a run at its first operation, then at its second, ... until it ends; prints the number."""
    status, kills = None, -1
    while status != 0:
        kills += 1
        if not (run_dir / "args.json").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
        place = ["--resume", run_dir] if run_dir.exists() else ["--run-dir", run_dir, *flags]
        pid = os.fork()
        if pid == 0:
            run_until(kills + 1, run_dir, script, *place)
            sys.stdout.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status not in (0, 9):
            sys.exit(f"status {status} after {kills} kills")
    print(f"{kills} kills")


def test_a_kill_between_any_two_writes(run_script, tmp_path):
    """Each time that it goes on, it gets one operation further."""
    flags = [*SMALL["spo_tree.py"], *SHORT, "--branch-factors", 3, "--segments-per-iteration", 6]
    flags += ["--num-questions", 2, "--num-iterations", 3]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script("spo_tree.py", *flags, "--run-dir", whole)[0] == 0
    command = [sys.executable, __file__, killed, "spo_tree.py", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-2]) > 20 and differences(whole, killed) == []


def wind_back(whole, killed):
    """A copy of a run as a kill in its second iteration leaves it: later lines, a torn one, half a save."""
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "model")
    (killed / "checkpoints" / "000002").rename(killed / "checkpoints" / "new")
    (killed / "checkpoints" / "new" / "left-over").touch()
    (killed / "new").mkdir(exist_ok=True)
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


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]), *sys.argv[2:])
