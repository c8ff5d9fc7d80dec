"""What can go wrong around a run: a full disk, a directory that cannot be written, cut files, a stuck grader, no network.

Each costs one clear line or nothing, and never a checkpoint that was complete.
"""

import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import math_grader
from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import append_line, check_checkpoint
from test_cli import assert_usage_error
from test_run import metrics, without_times

FEW = ["--train-data", "tiny/test.jsonl", "--checkpoint-every", 1]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def start(run_script, script, run_dir, iterations):
    assert run_script(script, *SMALL[script], *FEW, "--num-iterations", iterations, "--run-dir", run_dir)[0] == 0


@contextmanager
def files_of_at_most(size):
    """Every write beyond this size fails, for root as well, as on a full disk: the system call returns an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(path, size):
    """A file system of its own; the test is skipped where mounting is not allowed."""
    path.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path],
                                                   capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (needs root on Linux)")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path, options):
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


# ------------------------------------------------------------------------------------------------------------------------ the disk
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_write_that_fails_leaves_the_last_checkpoint(run_script, tmp_path, script):
    """model.safetensors (1.4 MB) of the second checkpoint still fits, the optimizer's moments do not."""
    run_dir = tmp_path / "run"
    start(run_script, script, run_dir, 1)
    before = contents(run_dir / "checkpoints" / "000001")
    with files_of_at_most(2_000_000):
        result = run_script(script, "--resume", run_dir, "--num-iterations", 2)
    assert_usage_error(result, "cannot write", "checkpoints/new", "File too large", "--resume")
    assert contents(run_dir / "checkpoints" / "000001") == before and not (run_dir / "checkpoints" / "000002").exists()
    assert run_script(script, "--resume", run_dir, "--num-iterations", 2)[0] == 0
    assert [row["iteration"] for row in metrics(run_dir)] == [0, 1, 2]


def test_a_full_disk(run_script, tmp_path):
    start(run_script, "spo_tree.py", tmp_path / "whole", 3)
    with small_disk(tmp_path / "disk", "10m") as disk:  # two checkpoints and a half
        result = run_script("spo_tree.py", *SMALL["spo_tree.py"], *FEW, "--num-iterations", 3, "--run-dir", disk / "run")
        assert_usage_error(result, "cannot write", "checkpoints/new", "No space left on device")
        assert {"000001", "000002"} <= {path.name for path in (disk / "run" / "checkpoints").iterdir()} <= {"000001", "000002",
                                                                                                            "new"}
        remount(disk, "size=100m")
        assert run_script("spo_tree.py", "--resume", disk / "run")[0] == 0
        assert without_times(metrics(disk / "run")) == without_times(metrics(tmp_path / "whole"))
        first, second = (path / "model" / "model.safetensors" for path in (disk / "run", tmp_path / "whole"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full (Linux)")
def test_a_line_that_cannot_be_written(capsys):
    with pytest.raises(SystemExit):
        append_line(Path("/dev/full"), {"iteration": 1})
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write /dev/full") and "No space left on device" in error and error.count("\n") == 1


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_a_directory_that_cannot_be_made(run_script, tmp_path, script):
    """Below a file, where root cannot write either."""
    (tmp_path / "file").touch()
    data, flag = ("--data", "--out") if script == "eval.py" else ("--train-data", "--run-dir")
    result = run_script(script, data, "tiny/test.jsonl", flag, tmp_path / "file" / "run")
    assert_usage_error(result, "cannot write", str(tmp_path / "file"))


def test_a_read_only_directory(run_script, tmp_path):
    with small_disk(tmp_path / "disk", "30m") as disk:
        start(run_script, "grpo.py", disk / "run", 1)
        before = contents(disk / "run" / "checkpoints" / "000001") | contents(disk / "run" / "model")
        remount(disk, "ro")
        for flags in (["--resume", disk / "run", "--num-iterations", 2], [*FEW, "--run-dir", disk / "new"]):
            assert_usage_error(run_script("grpo.py", *flags), "cannot write", str(disk), "Read-only file system")
        assert_usage_error(run_script("eval.py", "--out", disk / "answers"), "cannot write", str(disk), "Read-only file system")
        assert contents(disk / "run" / "checkpoints" / "000001") | contents(disk / "run" / "model") == before


# ----------------------------------------------------------------------------------------------------------------------- cut files
@pytest.mark.parametrize("script", ["spo_tree.py", "ppo.py"])
def test_a_cut_checkpoint_is_named_and_the_one_before_it_offered(run_script, tmp_path, script, capsys):
    """Every file of it; and what is offered works: the run ends as if nothing had happened."""
    run_dir = tmp_path / "run"
    start(run_script, script, run_dir, 2)
    last, model = run_dir / "checkpoints" / "000002", (run_dir / "model" / "model.safetensors").read_bytes()
    expected, sizes = without_times(metrics(run_dir)), []
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        for size in (0, len(whole) // 2, len(whole.rstrip()) - 1):  # a newline at the end may go
            path.write_bytes(whole[:size])
            with pytest.raises(SystemExit):
                check_checkpoint(last)
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and str(path) in error and "go on from 000001" in error and f"delete {last}" in error
        path.write_bytes(whole)
        sizes.append(len(whole))
    assert len(sizes) >= 7
    check_checkpoint(last)
    os.truncate(last / "optimizer.safetensors", 10_000)
    shutil.rmtree(run_dir / "model")
    assert_usage_error(run_script(script, "--resume", run_dir), str(last / "optimizer.safetensors"), "000001")
    shutil.rmtree(last)
    status, output, _ = run_script(script, "--resume", run_dir)
    assert status == 0 and "continued after iteration 1" in output
    assert without_times(metrics(run_dir)) == expected and (run_dir / "model" / "model.safetensors").read_bytes() == model


def test_the_only_checkpoint_is_cut(run_script, tmp_path):
    start(run_script, "grpo.py", tmp_path / "run", 1)
    (tmp_path / "run" / "checkpoints" / "000001" / "state.json").write_text('{"iteration": 1, "wor')
    assert_usage_error(run_script("grpo.py", "--resume", tmp_path / "run", "--num-iterations", 2), "state.json",
                       "go on from the start")


def test_a_run_without_a_checkpoint_starts_over(run_script, tmp_path):
    """Killed during its first evaluation, or with lines but no checkpoint: no line is lost and none doubled."""
    start(run_script, "grpo.py", tmp_path / "run", 2)
    expected = without_times(metrics(tmp_path / "run"))
    for name in ("checkpoints", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    assert run_script("grpo.py", "--resume", tmp_path / "run")[0] == 0
    assert without_times(metrics(tmp_path / "run")) == expected
    (tmp_path / "run" / "args.json").unlink()
    assert_usage_error(run_script("grpo.py", "--resume", tmp_path / "run"), "no run of this script to continue", "args.json")


# ------------------------------------------------------------------------------------------------------- the grader and the network
@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_a_stuck_grader_worker(monkeypatch):
    """Stopped, it neither answers nor dies; only the clock ends that. The next answer gets a worker of its own."""
    assert math_grader.grade_math("\\boxed{x+1}", "1+x")
    first = math_grader.worker.pid
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(math_grader, "GRADE_LIMIT_S", 0.5)
    math_grader.counts.clear()
    assert math_grader.grade_math("\\boxed{x+51}", "51+x") is False and math_grader.counts == {"killed": 1}
    monkeypatch.undo()
    assert math_grader.grade_math("\\boxed{x+51}", "51+x") and math_grader.worker.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_tracking_without_a_network_or_a_key(tmp_path, key):
    """The address is a closed port of this machine. The run goes on, with Weights & Biases offline."""
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2", "WANDB_DIR": str(tmp_path),
                                "HOME": str(tmp_path)}
    environment = {name: value for name, value in environment.items() if name not in ("WANDB_API_KEY", "WANDB_MODE")}
    flags = [*SMALL["grpo.py"], *FEW, "--num-iterations", 1, "--run-dir", tmp_path / "run", "--track"]
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "grpo.py", *map(str, flags)], cwd=ROOT,
                            env=environment | ({"WANDB_API_KEY": key} if key else {}),
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0 and result.stderr.count("--track: offline") == 1, result.stderr
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1]
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")), f"after {time.monotonic() - begun:.0f} s"
