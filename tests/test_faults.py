"""What can go wrong around a run: kills between any two writes, a loss that is NaN, a stuck grader."""

import importlib.util
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import math_grader
from conftest import ROOT, SCRIPTS, SMALL
from test_run import differences, metrics, weights

SHORT = ["--train-data", "tiny/test.jsonl", "--eval-questions", 1]
SHORT += ["--num-questions", 2, "--checkpoint-every", 1]


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


def test_a_run_killed_between_any_two_writes(run_script, tmp_path):
    """Each time that it goes on, it gets one operation further."""
    flags = [*SMALL["spo_tree.py"], *SHORT, "--branch-factors", 3, "--segments-per-iteration", 6]
    flags += ["--num-iterations", 3]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script("spo_tree.py", *flags, "--run-dir", whole)[0] == 0
    command = [sys.executable, __file__, killed, "spo_tree.py", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-2]) > 20 and differences(whole, killed) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gradient_that_is_not_finite_ends_the_run(run_script, tmp_path, script):
    """A run that had ended goes on with a loss that is NaN: its checkpoint stays good, its model goes."""
    source, line = (ROOT / script).read_text(), "        losses = policy_loss("
    assert source.count(line) == 1
    (tmp_path / script).write_text(source.replace(line, "        losses = math.nan * policy_loss("))
    run_dir, flags = tmp_path / "run", [*SMALL[script], *SHORT, "--num-questions", 6, "--num-iterations", 1]
    assert run_script(script, *flags, "--run-dir", run_dir)[0] == 0
    last = run_dir / "checkpoints" / "000001"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    with pytest.raises(RuntimeError, match="non-finite"):
        run_script(tmp_path / script, "--resume", run_dir, "--num-iterations", 2)
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before
    assert [row["iteration"] for row in metrics(run_dir)] == [0, 1] and not (run_dir / "model").exists()
    assert run_script(script, "--resume", run_dir)[0] == 0 and len(metrics(run_dir)) == 3
    assert all(torch.isfinite(value).all() for value in weights(run_dir / "model").values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_tracking(run_script, tmp_path, monkeypatch, script):
    """Weights & Biases, which takes each step once, gets what metrics.jsonl has, under one name."""
    names, logged = [], {}
    fake = SimpleNamespace(init=lambda **options: names.append((options["name"], options["id"])))
    fake.log = lambda values, step: logged.setdefault(step, values)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = [*SMALL[script], *SHORT, "--num-iterations", 2, "--track", "--run-dir", tmp_path / "run"]
    assert run_script(script, *flags)[0] == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000002")  # as if it had crashed before
    assert run_script(script, "--resume", tmp_path / "run", "--num-iterations", 3)[0] == 0
    assert names[0] == names[1] and names[0][0] == "run" and [*logged] == [0, 1, 2, 3]
    assert logged[3] == metrics(tmp_path / "run")[3]


WHEN = {"at work": "iteration 1/1000", "loading": "now"}  # what is printed before Ctrl-C is pressed


@pytest.mark.parametrize("when", WHEN)
def test_an_interrupt_is_one_line(tmp_path, when):
    command = [sys.executable, "spo_tree.py"]
    if when == "loading":
        code = "import runpy, sys, transformers as t; sys.argv = sys.argv[1:]\n"
        code += "def load(*args, **options):\n    print('now', flush=True)\n    import time; time.sleep(60)\n"
        code += "t.AutoModelForCausalLM.from_pretrained = load; "
        code += "runpy.run_path('spo_tree.py', run_name='__main__')"
        command[1:1] = ["-c", code]
    flags = map(str, [*SMALL["spo_tree.py"], *SHORT, "--num-iterations", 1000, "--run-dir", tmp_path / "run"])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*command, *flags], cwd=ROOT, **pipes) as process:
        while WHEN[when] not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.startswith("\ninterrupted;") and error.count("\n") == 2, error


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_a_stuck_grader_worker(monkeypatch, counts):
    """Stopped, it neither answers nor dies; only the clock ends that. The next answer gets a new one."""
    assert math_grader.grade_math("\\boxed{x+1}", "1+x")
    first = math_grader.worker.pid
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(math_grader, "GRADE_LIMIT_S", 0.5)
    counts.clear()
    assert math_grader.grade_math("\\boxed{x+51}", "51+x") is False and counts == {"killed": 1}
    monkeypatch.undo()
    assert math_grader.grade_math("\\boxed{x+51}", "51+x") and math_grader.worker.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]), *sys.argv[2:])
