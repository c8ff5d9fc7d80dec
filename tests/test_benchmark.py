"""The benchmarks, in a short form."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conftest import ROOT
from spo_tree import grade_answer, load_problems, sample_transformers

sys.path.insert(0, str(ROOT / "benchmark"))
import credit
from compare import at, mean_interval, present_commit, reached
from gpu import PROCESSES, SHAPES, random_model, run_process


def benchmark(script, *flags):
    command = [sys.executable, ROOT / "benchmark" / script, *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_curves():
    points = [(0, 0.2), (10, 0.4), (20, 0.3), (30, 0.7)]
    assert at(points, 5) == pytest.approx(0.3) and at(points, 30) == 0.7 and math.isnan(at(points, 31))
    assert reached(points, 0.4) == 10 and reached(points, 0.8) == math.inf
    assert reached(points, 0.5) == pytest.approx(25) and reached([(0, 0.3), (10, 0.5)], 0.25) == 0
    mean, interval = mean_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and interval == pytest.approx(4.30 * 0.1 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([0.5])[1]) and all(map(math.isnan, mean_interval([0.5, math.nan])))


def test_the_price_of_sampling(tmp_path):
    """A sampling that takes 2 of 5 seconds takes 6 of 9 at 3 times the price, 20 of 23 at 10."""
    (tmp_path / "run").mkdir()
    lines = [{"time/elapsed_s": 0, "eval/accuracy": 0.2}, {"time/elapsed_s": 2, "time/sample_s": 1}]
    lines.append({"time/elapsed_s": 5, "time/sample_s": 1, "eval/accuracy": 0.6})
    for k, line in enumerate(lines):
        line |= {"iteration": k, "rollout/generated_tokens_total": 50 * k, "losses/optimizer_steps": k}
        line |= {"rollout/trained_tokens_total": 10 * k, "eval/accuracy_ci95": 0.1, "eval/response_length": 9}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--budget", 100, "--runs", f"A={tmp_path / 'run'}", "--out", tmp_path / "out"]
    result = benchmark("compare.py", "--algorithms", *flags)
    heading = "| algorithm | accuracy after 5 s | accuracy after 9 s, sampling 3 times as slow "
    assert f"{heading}| accuracy after 23 s, sampling 10 times as slow |" in result.stdout, result.stderr
    assert "| A | 0.600 ± nan | 0.600 ± nan | 0.600 ± nan |" in result.stdout
    row = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))[-1]
    assert float(row["seconds of sampling"]) == 2 and row["updates"] == "3" and row["commit"] == "unknown"


def test_compare_runs_continues_and_names_the_commit(tmp_path):
    out = tmp_path / "out"
    start = ["--algorithms", "GRPO", "--seeds", 1, "--reach", 0.99, "--out", out, "--budget"]
    flags = "-- --num-questions 4 --eval-questions 5 --eval-samples 1 --eval-every 1 --checkpoint-every 1".split()
    result = benchmark("compare.py", *start, 4000, *flags)
    table, *rows = (out / "table.md").read_text(), *csv.DictReader((out / "results.csv").open())
    assert table in result.stdout and "| GRPO | 1 |" in table and "0 of 1 runs" in table, result.stderr
    assert {row["commit"] for row in rows} == {present_commit()} and f"commit {present_commit()};" in table
    assert int(rows[0]["rollout/generated_tokens_total"]) == 0 and (out / "curves.png").exists()
    assert int(rows[-1]["rollout/generated_tokens_total"]) >= 4000
    assert "GRPO__1: done" in benchmark("compare.py", *start, 8000, *flags).stdout  # it goes on
    assert "done" not in benchmark("compare.py", *start, 8000, *flags).stdout
    assert (out / "GRPO__1.commit").read_text().split() == [present_commit()] * 2
    assert "not one of" in benchmark("compare.py", "--algorithms", "nonsense").stderr


def test_parts_of_the_gpu_benchmark_agree():
    parts = "train sample vllm scripts".split()
    result = benchmark("gpu.py", "--shape", "tiny", "--limit", 60, "--questions", 2, "--parts", *parts)
    lines = [(line[:26].strip(), line[27:]) for line in result.stdout.splitlines()]
    failed, never = {name for name, text in lines if "FAILED" in text}, {"train flex compiled", "train flex"}
    # FlexAttention trains on a GPU only; compiling may take too long on a busy machine; vLLM may be missing.
    assert never <= failed <= never | {"train dense compiled", "vllm"}, result
    names = {name for name, *_ in PROCESSES if name.split()[0] in ["card", "model", *parts]}
    assert {name for name, _ in lines} == names and "0 in the loss" not in re.sub(r"\d0 in", "", result.stdout)
    for quantity in ("loss", "gradient"):  # with checkpointing and without, compiled and not
        values = [float(value) for value in re.findall(rf"{quantity} ([-+]?\d+\.\d+)", result.stdout)]
        assert len(values) >= 2 and values == pytest.approx([values[0]] * len(values), rel=1e-4)


def test_limits_of_the_gpu_benchmark_and_its_table_of_memory():
    assert sum(seconds for _, seconds, *_ in PROCESSES) < 240
    table = benchmark("gpu.py", "--memory").stdout
    row = "| rho | SPO | 8,192 | yes | 17.6 | 2.2 | 2.3 | 0.4 | 22.5 | --vllm-memory 0.36 at most "
    assert row in table and table.count("\n") == 10


def raises():
    yield "before"
    raise ValueError("two\nlines")


def hangs(path):
    subprocess.Popen(f"sleep 3; touch {path}", shell=True)
    yield "before"
    time.sleep(600)


def dies():
    os.write(1, b"this is not shown\n")
    yield "before"
    os.kill(os.getpid(), 9)


def test_failures_have_one_line(capfd, tmp_path):
    for function, limit, *arguments in ((raises, 60), (dies, 60), (hangs, 2, tmp_path / "alive")):
        assert not run_process("fork", function.__name__, limit, os.devnull, function, *arguments)
    lines = [line.split(maxsplit=1)[1] for line in capfd.readouterr().out.splitlines()]
    ends = ["ValueError: two lines", "died with exit code -9", "not done in 2 s"]
    assert lines == [text for end in ends for text in ("before", f"FAILED: {end}")]
    time.sleep(3)
    assert not (tmp_path / "alive").exists()  # what it had started has ended with it


def test_random_weights_earn_rewards_and_stop(tmp_path, monkeypatch):
    """Half of the tokens that end an answer read as the right answer; an answer has about 12 tokens."""
    config = LlamaConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setitem(SHAPES, "small", {"config": config, "prompt": 60, "answer": 12})
    list(random_model(Namespace(shape="small", directory=tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (problem, *_) = load_problems(str(tmp_path / "data.jsonl"), "train", tokenizer, "plain", 256)
    ends = model.generation_config.eos_token_id
    (answers,) = sample_transformers(model, ends, [problem.prompt_ids], 400, [200], 1.0, 1.0, 0)
    rewards = [grade_answer(problem, tokenizer, answer.token_ids)[0] for answer in answers]
    logprobs = [logprob for answer in answers for logprob in answer.sampler_logprobs]
    below = sum(logprob < math.log(float((tmp_path / "threshold").read_text())) for logprob in logprobs)
    assert 150 < sum(rewards) < 250 and 9 < len(logprobs) / 400 < 15 and 0.05 < below / len(logprobs) < 0.3


def test_noise_is_split_into_within_and_between(monkeypatch, capsys):
    """Gradients of 4 questions each with |signal|^2 = 2, and 12 and 20 for W and B of a question."""
    random = torch.Generator().manual_seed(0)
    size, n, batches = 4000, 4, 200

    def vector(squared_norm):
        return torch.randn(size, generator=random) * (squared_norm / size) ** 0.5

    signal, same = vector(2), [vector(20) for _ in range(n)]

    def gradients_of(flags, num_batches):
        fixed = "same.jsonl" in flags[-1]
        questions = [same if fixed else [vector(20) for _ in range(n)] for _ in range(num_batches)]
        return [signal + sum(q + vector(12) for q in own) / n for own in questions], 1000

    monkeypatch.setattr(credit, "gradients_of", gradients_of)
    credit.noise_of("synthetic", ["grpo.py", "--num-questions", str(n)], batches, 1000)
    name, tokens, ratio, within, between, _ = capsys.readouterr().out.strip("| \n").split(" | ")
    assert tokens == "250" and float(ratio.split()[0]) == pytest.approx(2 / 8, rel=0.1)
    assert float(within) == pytest.approx(12 / 2, rel=0.1) and float(between) == pytest.approx(20 / 2, rel=0.1)


def test_credit_in_a_short_form():
    line = credit.BATCHES.strip().split("\n")[-1]
    flags = ["--questions", 1, "--reference-rollouts", 20, "--batches", 3, "--gradients", line]
    result = benchmark("credit.py", *flags, "--", "--num-questions", 2)
    assert "| SPO-tree 6-6-6 |" in result.stdout and "| GRPO + mask |" in result.stdout, result.stderr
