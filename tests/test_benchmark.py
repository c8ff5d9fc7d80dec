"""The benchmarks, in a short form."""

import csv
import math
import re
import sys
from argparse import Namespace

import pytest
import torch

import spo_tree
from conftest import ROOT, run_process
from test_run import metrics

sys.path.insert(0, str(ROOT / "benchmark"))
import credit
import gpu
from compare import at, mean_interval, present_commit, reached


def test_curves():
    points = [(0, 0.2), (10, 0.4), (20, 0.3), (30, 0.7)]
    assert at(points, 5) == pytest.approx(0.3) and at(points, 30) == 0.7 and math.isnan(at(points, 31))
    assert reached(points, 0.4) == 10 and reached(points, 0.8) == math.inf
    assert reached(points, 0.5) == pytest.approx(25) and reached([(0, 0.3), (10, 0.5)], 0.25) == 0
    mean, interval = mean_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and interval == pytest.approx(4.30 * 0.1 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([0.5])[1]) and all(map(math.isnan, mean_interval([0.5, math.nan])))


def test_compare_runs_continues_and_names_the_commit(run_script, tmp_path):
    flags = ["--algorithms", "GRPO", "--seeds", 1, "--reach", 0.99, "--out", tmp_path]
    own = ["--", "--num-questions", 4, "--eval-questions", 5, "--eval-every", 1, "--checkpoint-every", 1]
    for budget in (500, 3000):  # the second goes on
        _, output, error = run_script("benchmark/compare.py", *flags, "--budget", budget, *own)
        rows = list(csv.DictReader((tmp_path / "results.csv").open()))
        assert "GRPO__1: done" in output and (tmp_path / "curves.png").exists(), error
        assert int(rows[0]["rollout/generated_tokens_total"]) == 0
        assert int(rows[-1]["rollout/generated_tokens_total"]) >= budget
    assert "| GRPO | 1 |" in output and "0 of 1 runs" in output and f"commit {present_commit()};" in output
    assert {row["commit"] for row in rows} == {present_commit()}
    assert (tmp_path / "GRPO__1.commit").read_text().split() == [present_commit()] * 2
    # Sampling at 10 times its price; it took some of the seconds.
    lines = metrics(tmp_path / "GRPO__1")
    seconds, sampling = lines[-1]["time/elapsed_s"], sum(line.get("time/sample_s", 0) for line in lines)
    assert f" accuracy after {seconds + 9 * sampling:.0f} s, sampling 10 times as slow |" in output
    assert float(rows[-1]["seconds of sampling"]) == pytest.approx(sampling) and seconds > sampling > 0
    assert "not one of" in run_script("benchmark/compare.py", "--algorithms", "nonsense")[2]


def test_parts_of_the_gpu_benchmark(tmp_path, monkeypatch):
    """A model that earns rewards with random weights; with checkpointing and without, the steps are equal."""
    parts = ["--parts", "sample", "vllm", "scripts", "--limit", 100]
    _, output, _ = run_process("benchmark/gpu.py", "--shape", "tiny", "--questions", 2, *parts)
    failed = re.findall("(?m)^(.*?) +FAILED", output)
    assert failed in ([], ["vllm"]) and len(re.findall(r"[1-9]\d* in the loss", output)) == 4, output
    monkeypatch.setattr(gpu, "spo_tree", spo_tree, raising=False)
    flags = Namespace(shape="tiny", directory=tmp_path)
    lines = [*gpu.random_model(flags), *gpu.train(flags, "dense", False)][1:]
    for quantity in ("loss", "gradient"):
        values = [float(re.search(rf"{quantity} ([-+]?\d+\.\d+)", line)[1]) for line in lines]
        assert values == pytest.approx(values[:1] * 2, rel=1e-4) and values[0] != 0
    row = "| rho | SPO | 8,192 | yes | 17.6 | 2.2 | 2.3 | 0.4 | 22.5 | --vllm-memory 0.36 at most "
    assert row in run_process("benchmark/gpu.py", "--memory")[1]


def test_noise_is_split_into_within_and_between(monkeypatch, capsys):
    """Gradients of 4 questions each with |signal|^2 = 2, and 12 and 20 for W and B of a question."""
    random, n = torch.Generator().manual_seed(0), 4

    def vector(squared_norm):
        return torch.randn(4000, generator=random) * (squared_norm / 4000) ** 0.5

    signal, same = vector(2), [vector(20) for _ in range(n)]

    def gradients_of(flags, num_batches):
        fixed = "same.jsonl" in flags[-1]
        questions = [same if fixed else [vector(20) for _ in range(n)] for _ in range(num_batches)]
        return [signal + sum(q + vector(12) for q in own) / n for own in questions], 1000

    monkeypatch.setattr(credit, "gradients_of", gradients_of)
    credit.noise_of("synthetic", ["grpo.py", "--num-questions", str(n)], 200, 1000)
    _, tokens, ratio, within, between, _ = capsys.readouterr().out.strip("| \n").split(" | ")
    assert tokens == "250" and float(ratio.split()[0]) == pytest.approx(2 / 8, rel=0.1)
    assert float(within) == pytest.approx(6, rel=0.1) and float(between) == pytest.approx(10, rel=0.1)


def test_credit_in_a_short_form(run_script):
    flags = ["--questions", 1, "--reference-rollouts", 20, "--batches", 3]
    flags += ["--gradients", "GRPO | grpo.py --num-questions 2"]
    _, output, error = run_script("benchmark/credit.py", *flags)
    assert "| SPO-tree 6-6-6 |" in output and "| GRPO | " in output, error
