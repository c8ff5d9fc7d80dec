"""Killed and resumed, in a short form: see benchmark/soak.py."""

import subprocess
import sys

from conftest import ROOT

SHORT = """--num-iterations 4 --checkpoint-every 2 --eval-every 2 --eval-questions 10 --eval-samples 1
    --num-questions 4 --train-data tiny/test.jsonl --minibatch-size 12 --samples-per-question 4""".split()


def test_killed_runs_equal_an_uninterrupted_one(tmp_path):
    """PPO has the most to save: two models, two optimizers. The seed draws the phases."""
    command = [sys.executable, "benchmark/soak.py", "--scripts", "ppo.py", "--kills", "2"]
    command += ["--out", tmp_path / "out", "--", *SHORT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\n2 kills: " in result.stdout and "equal to the uninterrupted run" in result.stdout
