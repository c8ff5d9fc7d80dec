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
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conftest import ROOT, SCRIPTS
from spo_tree import grade_answer, load_problems, read_rows, sample_transformers

sys.path.insert(0, str(ROOT / "benchmark"))
import credit
from compare import SETTINGS, at, code_hash, make_data, mean_interval, reached
from gpu import PROCESSES, SHAPES, random_model, run_process


def benchmark(script, *flags):
    command = [sys.executable, ROOT / "benchmark" / script, *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_curves():
    points = [(0, 0.2), (10, 0.4), (20, 0.3), (30, 0.7)]
    assert at(points, 5) == pytest.approx(0.3) and at(points, 30) == 0.7 and math.isnan(at(points, 31))
    assert reached(points, 0.4) == 10 and reached(points, 0.8) == math.inf
    assert reached(points, 0.5) == pytest.approx(25)
    mean, interval = mean_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and interval == pytest.approx(4.30 * 0.1 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([0.5])[1]) and all(map(math.isnan, mean_interval([0.5, math.nan])))
    assert reached([(0, 0.3), (10, 0.5)], 0.25) == 0 and at([(0, 0.3), (0, 0.3)], 0) == 0.3


def test_the_hash_of_code_is_that_of_its_statements(tmp_path):
    texts = ["def f(x):\n    'doc'\n    return x + 1  # why\n", "def f(x):\n    'other'\n    return (x + 1)\n"]
    texts += ["def f(x):\n    'doc'\n    return x + 2\n", "def f(x):\n    'doc'\n    return x - 1\n"]
    texts += [f"{texts[0]}def load_vllm():\n    return 1\n"]
    texts += [f"{texts[0]}PRESETS = {{'tiny': {tiny}, 'math': {real}}}\n" for tiny, real in ((1, 1), (1, 2), (2, 2))]
    hashes = []
    for text in texts:
        (tmp_path / "script.py").write_text(text)
        hashes.append(code_hash(tmp_path / "script.py"))
    assert hashes[0] == hashes[1] == hashes[4] and hashes[5] == hashes[6] and len(set(hashes)) == 5


def test_scarce_questions_are_others_for_each_seed(tmp_path):
    for setting in [setting for setting in SETTINGS.values() if setting.questions]:
        make_data(setting, [1, 2], tmp_path)
        first, second = ((tmp_path / f"train-{seed}.jsonl").read_text().splitlines() for seed in (1, 2))
        assert len(first) == len(second) == setting.questions and not {*first} & {*second}


def test_all_settings_go_to_directories_of_their_own(tmp_path):
    flags = ["--setting", "all", "--algorithms", "nonsense", "--out", tmp_path, "--", "--learning-rate", 1e-4]
    result = benchmark("compare.py", *flags)
    assert result.returncode == 1 and result.stderr.count("error: --algorithms nonsense") == 1
    assert "'embedded'" in result.stderr and f"PosixPath('{tmp_path}/embedded')" in result.stderr


def test_the_price_of_sampling(tmp_path):
    """A sampling that takes 2 of 5 seconds takes 6 of 9 at 3 times the price, 20 of 23 at 10."""
    (tmp_path / "run").mkdir()
    lines = [{"time/elapsed_s": 0, "eval/accuracy": 0.2}, {"time/elapsed_s": 2, "time/sample_s": 1}]
    lines.append({"time/elapsed_s": 5, "time/sample_s": 0.5, "time/value_s": 0.5, "eval/accuracy": 0.6})
    for k, line in enumerate(lines):
        line |= {"iteration": k, "rollout/generated_tokens_total": 50 * k}
        line |= {"rollout/trained_tokens_total": 10 * k, "losses/optimizer_steps": k}
        line |= {"eval/accuracy_ci95": 0.1, "eval/response_length": 9}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    flags = ["--budget", 100, "--runs", f"A={tmp_path / 'run'}", "--out", tmp_path / "out"]
    result = benchmark("compare.py", "--algorithms", *flags)
    assert result.returncode == 0, result.stderr
    heading = "| algorithm | accuracy after 5 s | accuracy after 9 s, sampling 3 times as slow "
    assert f"{heading}| accuracy after 23 s, sampling 10 times as slow |" in result.stdout
    assert "| A | 0.600 ± nan | 0.600 ± nan | 0.600 ± nan |" in result.stdout
    row = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))[-1]
    assert float(row["seconds of sampling"]) == 2 and row["updates"] == "3"


def test_compare_runs_continues_and_adds_runs(tmp_path):
    out = tmp_path / "out"
    chain = "int3=spo_chain.py --cutpoint-interval 3 --mc-rollouts 1"
    flags = ["--algorithms", "GRPO", chain, "--seeds", 1, 2, "--budget", 4000, "--reach", 0.99, "--out", out]
    small = "-- --num-questions 4 --eval-questions 5 --eval-samples 1 --eval-every 1".split()
    small += ["--checkpoint-every", 1]
    result = benchmark("compare.py", *flags, *small)
    assert result.returncode == 0, result.stderr
    table = (out / "table.md").read_text()
    assert table in result.stdout and table.count("\n") == 4 and "of 2 runs" in table
    assert "| GRPO | 2 |" in table and "| int3 | 2 |" in table
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["algorithm"] for row in rows} == {"GRPO", "int3"}
    assert {(row["script"], row["code"]) for row in rows} == {
        (script, code_hash(ROOT / script)) for script in ("grpo.py", "spo_chain.py")
    }
    last = {(row["algorithm"], row["run"]): int(row["rollout/generated_tokens_total"]) for row in rows}
    assert rows[0]["rollout/generated_tokens_total"] == "0" and len(last) == 4 and min(last.values()) >= 4000
    assert (out / "curves.png").stat().st_size > 10_000
    short = tmp_path / "short"  # a run from elsewhere that ended early
    short.mkdir()
    lines = (out / "GRPO__1" / "metrics.jsonl").read_text().splitlines(True)
    (short / "metrics.jsonl").write_text("".join(lines[:2]))
    start = time.perf_counter()
    result = benchmark("compare.py", *flags, "--runs", f"again={out / 'GRPO__1'}", f"short={short}", *small)
    assert result.returncode == 0 and "done" not in result.stdout and time.perf_counter() - start < 15
    assert "| again | 1 |" in result.stdout and "| short | 1 | nan" in result.stdout
    result = benchmark("compare.py", "--algorithms", "nonsense")
    assert result.returncode == 1 and "nonsense" in result.stderr


def test_every_part_of_the_gpu_benchmark_prints_its_lines_and_they_agree():
    result = benchmark("gpu.py", "--shape", "tiny", "--limit", 60)
    assert result.returncode == 0, result.stderr
    lines = [(line[:26].strip(), line[27:]) for line in result.stdout.splitlines()]
    names = [name for name, _ in lines]
    assert list(dict.fromkeys(names)) == [name for name, *_ in PROCESSES]
    failed = {name: text for name, text in lines if "FAILED" in text}
    assert [names.count(name) for name in failed] == [1] * len(failed)
    assert all("not support backward on CPU" in failed.pop(f"train flex{how}") for how in ("", " compiled"))
    assert failed.keys() <= {"vllm"}  # where it is not installed
    assert names.count("train dense") == names.count("sample transformers") == 2
    assert all(re.search(r"[1-9]\d* in the loss", text) for name, text in lines if "scripts" in name)
    for quantity, count in (("loss", 4), ("gradient", 4), ("log-prob", 3)):
        values = re.findall(rf"{quantity} ([-+]?\d+\.\d+)", result.stdout)
        values = [float(value) for value in values]
        assert values == pytest.approx([values[0]] * count, rel=1e-4) and abs(values[0]) > 0.05


def test_limits_of_the_gpu_benchmark_and_its_table_of_memory():
    assert sum(seconds for _, seconds, *_ in PROCESSES) < 240
    table = benchmark("gpu.py", "--memory").stdout
    row = "| rho | SPO | 8,192 | yes | 17.6 | 2.2 | 2.3 | 0.4 | 22.5 | --vllm-memory 0.36 at most "
    assert row in table and table.count("\n") == 10


def test_what_does_not_fit_the_limit_does_not_end_the_rest():
    """Compiling takes longer than a second."""
    result = benchmark("gpu.py", "--shape", "tiny", "--parts", "score", "scripts", "--limit", 1)
    assert result.returncode == 0 and "score flex compiled        FAILED: not done in " in result.stdout
    assert result.stdout.count("\nscripts ") == 4


def raises():
    yield "before"
    raise ValueError("two\nlines")


def hangs(path):
    subprocess.Popen(f"sleep 2; touch {path}", shell=True)
    yield "before"
    time.sleep(60)


def dies():
    os.write(1, b"this is not shown\n")
    yield "before"
    os.kill(os.getpid(), 9)


def test_failures_have_one_line(capfd, tmp_path):
    assert not run_process("fork", "raises", 10, os.devnull, raises)
    assert not run_process("fork", "dies", 10, os.devnull, dies)
    start = time.perf_counter()
    assert not run_process("fork", "hangs", 1, os.devnull, hangs, tmp_path / "alive")
    assert time.perf_counter() - start < 5
    lines = [line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()]
    assert lines == [
        ["raises", "before"], ["raises", "FAILED: ValueError: two lines"],
        ["dies", "before"], ["dies", "FAILED: died with exit code -9"],
        ["hangs", "before"], ["hangs", "FAILED: not done in 1 s"],
    ]  # fmt: skip
    time.sleep(2)
    assert not (tmp_path / "alive").exists()  # what it had started has ended with it


def test_random_weights_earn_rewards_and_stop(tmp_path, monkeypatch):
    """Half of the tokens that end an answer read as the right answer."""
    config = LlamaConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setitem(SHAPES, "small", {"config": config, "prompt": 60, "answer": 12})
    list(random_model(Namespace(shape="small", directory=tmp_path)))
    threshold = float((tmp_path / "threshold").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    source = str(tmp_path / "data.jsonl")
    (problem, *_) = load_problems(source, read_rows(source, "train"), tokenizer, "plain", 256)
    ends = model.generation_config.eos_token_id
    (answers,) = sample_transformers(model, ends, [problem.prompt_ids], 400, [200], 1.0, 1.0, 0)
    rewards = [grade_answer(problem, tokenizer, answer.token_ids)[0] for answer in answers]
    below = [logprob < math.log(threshold) for answer in answers for logprob in answer.sampler_logprobs]
    assert 150 < sum(rewards) < 250 and 9 < len(below) / 400 < 15 and 0.05 < fmean(below) < 0.3
    assert len(problem.prompt_ids) == 60


def test_noise_is_split_into_within_and_between(monkeypatch, tmp_path, capsys):
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
    lines = [line for line in credit.BATCHES.strip().split("\n") if line.startswith(("SPO-tree 6-6-6", "Vine", "GRPO +"))]
    flags = "--questions 1 --reference-rollouts 20 --batches 3 --gradients".split()
    result = benchmark("credit.py", *flags, *lines, "--", "--num-questions", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| SPO-tree 6-6-6 |") == 2
    assert result.stdout.count("| GRPO + mask |") == result.stdout.count("| VinePPO, 9 rollouts |") == 1
