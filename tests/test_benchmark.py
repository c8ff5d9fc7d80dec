"""The benchmarks, in a short form."""

import csv
import math
import subprocess
import sys
import time

import pytest

from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
from compare import at, mean_interval, reached


def benchmark(script, *flags):
    command = [sys.executable, ROOT / "benchmark" / script, *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_curves():
    points = [(0, 0.2), (10, 0.4), (20, 0.3), (30, 0.7)]
    assert at(points, 5) == pytest.approx(0.3) and at(points, 30) == 0.7 and math.isnan(at(points, 31))
    assert reached(points, 0.4) == 10 and reached(points, 0.5) == pytest.approx(25) and reached(points, 0.8) == math.inf
    mean, interval = mean_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and interval == pytest.approx(4.30 * 0.1 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([0.5])[1]) and all(map(math.isnan, mean_interval([0.5, math.nan])))
    assert reached([(0, 0.3), (10, 0.5)], 0.25) == 0 and at([(0, 0.3), (0, 0.3)], 0) == 0.3


def test_compare_runs_continues_and_adds_runs(tmp_path):
    small = ["--", "--num-questions", 4, "--eval-questions", 5, "--eval-samples", 1, "--eval-every", 1, "--checkpoint-every", 1]
    flags = ["--algorithms", "GRPO", "int3=spo_chain.py --cutpoint-interval 3 --mc-rollouts 1", "--seeds", 1, 2, "--budget", 4000, "--reach", 0.99]
    result = benchmark("compare.py", *flags, "--out", tmp_path / "out", *small)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in result.stdout and table.count("\n") == 4 and "| GRPO | 2 |" in table and "| int3 | 2 |" in table and "of 2 runs" in table
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {row["algorithm"] for row in rows} == {"GRPO", "int3"} and rows[0]["rollout/generated_tokens_total"] == "0"
    last = {(row["algorithm"], row["run"]): int(row["rollout/generated_tokens_total"]) for row in rows}
    assert len(last) == 4 and min(last.values()) >= 4000
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    (tmp_path / "short").mkdir()  # a run from elsewhere that ended early
    (tmp_path / "short" / "metrics.jsonl").write_text("".join((tmp_path / "out" / "GRPO__1" / "metrics.jsonl").read_text().splitlines(True)[:2]))
    start = time.perf_counter()
    result = benchmark("compare.py", *flags, "--out", tmp_path / "out", "--runs", f"again={tmp_path / 'out' / 'GRPO__1'}", f"short={tmp_path / 'short'}", *small)
    assert result.returncode == 0 and "done" not in result.stdout and time.perf_counter() - start < 15
    assert "| again | 1 |" in result.stdout and "| short | 1 | nan" in result.stdout
    result = benchmark("compare.py", "--algorithms", "nonsense")
    assert result.returncode == 1 and "nonsense" in result.stderr


def test_gpu_benchmark_in_its_small_form():
    result = benchmark("gpu.py", "--questions", 1, "--padded-batch-sizes", 8)
    assert result.returncode == 0, result.stderr
    trained = [line for line in result.stdout.splitlines() if line.startswith("train")]
    assert len(trained) == 4
    for padded, packed in (trained[:2], trained[2:]):  # the same loss and gradient
        assert padded.split("loss")[1] == packed.split("loss")[1]
    result = benchmark("gpu.py", "--iterations", "--questions", 4)
    assert result.returncode == 0 and all(result.stdout.count(f"| {script} |") == 1 for script in SCRIPTS), result.stderr
    assert "qwen | PPO" in benchmark("gpu.py", "--memory").stdout


def test_credit_in_a_short_form():
    result = benchmark("credit.py", "--questions", 1, "--reference-rollouts", 20, "--batches", 3, "--", "--num-questions", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| SPO-tree 6-6-6 |") == 2 and result.stdout.count("| GRPO + mask |") == 1
