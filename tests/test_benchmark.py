"""The benchmarks, in a short form."""

import csv
import math
import os
import re
import sys
from argparse import Namespace

import pytest
import torch

import spo_tree
from conftest import ROOT, SMALL
from test_run import metrics

sys.path.insert(0, str(ROOT / "benchmark"))
import credit
import gpu
from compare import at, mean_interval, present_commit, reached, run


def test_curves():
    points = [(0, 0.2), (10, 0.4), (20, 0.3), (30, 0.7)]
    assert at(points, 5) == pytest.approx(0.3) and at(points, 30) == 0.7 and math.isnan(at(points, 31))
    assert reached(points, 0.4) == 10 and reached(points, 0.8) == math.inf
    assert reached(points, 0.5) == pytest.approx(25) and reached([(0, 0.3), (10, 0.5)], 0.25) == 0
    mean, interval = mean_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and interval == pytest.approx(4.30 * 0.1 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([0.5])[1]) and all(map(math.isnan, mean_interval([0.5, math.nan])))


def test_compare_continues_a_run_and_names_the_commit(run_script, tmp_path):
    own = [*SMALL["grpo.py"], "--eval-every", 1, "--checkpoint-every", 1]
    run("grpo.py", 1, tmp_path / "GRPO__1", own, budget=500)
    flags = ["--algorithms", "GRPO=grpo.py", "--seeds", 1, "--reach", 0.99, "--budget", 1500, "--out", tmp_path]
    _, output, error = run_script("benchmark/compare.py", *flags, "--", *own)
    assert "GRPO__1: done" in output and (tmp_path / "curves.png").exists(), error
    assert "| GRPO | 1 |" in output and "0 of 1 runs" in output and f"commit {present_commit()};" in output
    assert (tmp_path / "GRPO__1.commit").read_text().split() == [present_commit()] * 2
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {row["commit"] for row in rows} == {present_commit()}
    assert int(rows[0]["rollout/generated_tokens_total"]) == 0
    assert int(rows[-1]["rollout/generated_tokens_total"]) >= 1500
    # Sampling at 10 times its price; it took some of the seconds.
    lines = metrics(tmp_path / "GRPO__1")
    seconds, sampling = lines[-1]["time/elapsed_s"], sum(line.get("time/sample_s", 0) for line in lines)
    assert f" accuracy after {seconds + 9 * sampling:.0f} s, sampling 10 times as slow |" in output
    assert float(rows[-1]["seconds of sampling"]) == pytest.approx(sampling) and seconds > sampling > 0
    assert "not one of" in run_script("benchmark/compare.py", "--algorithms", "nonsense")[2]


def test_parts_of_the_gpu_benchmark(tmp_path, monkeypatch, capfd):
    """A model that earns rewards with random weights; with checkpointing and without, the steps are equal."""
    monkeypatch.setattr(gpu, "spo_tree", spo_tree, raising=False)
    flags = Namespace(shape="tiny", directory=tmp_path, iterations=1, questions=2)
    lines = [*gpu.random_model(flags), *gpu.train(flags, "dense", False)][1:]
    for quantity in ("loss", "gradient"):
        values = [float(re.search(rf"{quantity} ([-+]?\d+\.\d+)", line)[1]) for line in lines]
        assert values == pytest.approx(values[:1] * 2, rel=1e-4) and values[0] != 0
    for script, limit, expected in (
        ("grpo.py", 300, r"sample \S+ train \S+ s .* [1-9]\d* in the loss "),
        ("missing.py", 300, "FAILED: FileNotFoundError: "),
        ("grpo.py", 0.01, "FAILED: not done in 0 s"),
    ):  # in a process of its own
        done = gpu.run_process("fork", script, limit, os.devnull, gpu.run_script, flags, script)
        line = capfd.readouterr().out.splitlines()[-1]
        assert re.match(f"{script} +{expected}", line) and done == ("FAILED" not in line)
    gpu.memory_table()
    row = "| rho | SPO | 8,192 | yes | 17.6 | 2.2 | 2.3 | 0.4 | 22.5 | --vllm-memory 0.36 at most "
    assert row in capfd.readouterr().out


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


def test_credit_in_a_short_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])  # which the parts change
    credit.advantages(1, 2)
    assert "| SPO-tree 6-6-6 |" in capsys.readouterr().out
    (gradient,), tokens = credit.gradients_of(["grpo.py", *map(str, SMALL["grpo.py"])], 1)
    assert 0 < gradient.norm() < math.inf and tokens > 0
