"""The training scripts as a whole: they learn, survive nothing to learn, and say what to do next."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import spo_tree
from conftest import ROOT, SCRIPTS, SMALL, hear_ctrl_c, tiny_args

sys.path.insert(0, str(ROOT / "benchmark"))
from soak import differences, lines, load_state, without_times  # also for other tests

START = ROOT / "tiny" / "model"


def metrics(run_dir):
    return lines(run_dir / "metrics.jsonl")


def samples(run_dir):
    """The last object of samples.jsonl."""
    return lines(run_dir / "samples.jsonl")[-1]


def weights(directory):
    return load_file(directory / "model.safetensors")


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


LEARNING = {
    "spo_tree.py": "--num-iterations 5 --branch-factors 4 4 --num-questions 12 --minibatch-size 16",
    "spo_chain.py": "--num-iterations 6 --samples-per-question 4 --num-questions 8 --minibatch-size 4",
    "grpo.py": "--num-iterations 4 --num-questions 12 --minibatch-size 16",
    "ppo.py": "--num-iterations 5 --num-questions 64 --minibatch-size 16 --num-epochs 2",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_learns(run_script, tmp_path, script):
    """From about .24. That a wrong sign does not is seen in the tests of the formulas."""
    flags = [*LEARNING[script].split(), "--eval-questions", 100, "--eval-samples", 2, "--eval-every", 100]
    status, _, error = run_script(script, *flags, "--run-dir", tmp_path / "run")
    assert status == 0, error
    first, *_, last = metrics(tmp_path / "run")
    assert last["eval/accuracy"] > first["eval/accuracy"] + 0.10


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_to_learn(run_script, tmp_path, script):
    """Answers of one token earn nothing: means of nothing are 0, no step is made, all numbers are finite."""
    flags = [*SMALL[script], "--num-iterations", 2, "--max-response-tokens", 1]
    flags += ["--prob-mask", "--prob-threshold", 1e-12]  # PPO's critic always has something to say
    status, output, error = run_script(script, *flags, "--run-dir", tmp_path / "run")
    assert status == 0, error
    assert "  truncated_fraction 1.000  unreadable_fraction 1.000\n" in output  # which says why
    rows = metrics(tmp_path / "run")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[2]["losses/optimizer_steps"] == 0 and same_weights(tmp_path / "run" / "model", START)


def test_two_runs_have_two_directories_and_two_names(tmp_path, monkeypatch):
    """Also runs that begin in the same second, and in W&B those of one name in different directories."""
    begun = []
    fake = SimpleNamespace(init=lambda **options: begun.append(options["id"]))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(spo_tree, "time", lambda: 1.0)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(START)
    policy = spo_tree.load_model(AutoModelForCausalLM, START, torch.device("cpu"))
    problems = [spo_tree.Problem([1, 9], "2", False)]
    directories = []
    for name in ("", "", "a/run", "b/run"):
        args = tiny_args(run_dir=name, track=True)
        directories.append(spo_tree.start_run(args, None, policy, tokenizer, problems, problems))
    assert len(set(directories)) == len(set(begun)) == 4 and max(map(len, begun)) <= 128
    with pytest.raises(SystemExit, match="error: --run-dir .*run exists already"):
        spo_tree.start_run(args, None, policy, tokenizer, problems, problems)


def test_the_printed_command_evaluates_what_the_run_did(run_script, tmp_path):
    data, template = tmp_path / "own data.jsonl", "Q: {question} \"A\":\n"
    rows = [{"question": f"{k} + 1?", "answer": f"#### {k + 1}"} for k in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SMALL["grpo.py"], "--num-iterations", 1, "--train-data", data, "--prompt-template", template]
    flags += ["--eval-temperature", 0, "--max-response-tokens", 20, "--run-dir", tmp_path / "run"]
    _, output, _ = run_script("grpo.py", *flags)
    assert f" on 9 questions of {data}, evaluated on 3 of its last rows, held out; " in output
    assert "    '<s>Q: 0 + 1? \"A\":\\n'\n" in output  # the first prompt, as the model sees it
    line = output.partition("evaluate it: python ")[2]
    words = shlex.split(line.partition(" (not this run's evaluation: its questions were held out)\n")[0])
    assert words[words.index("--prompt-template") + 1] == template
    assert words[words.index("--temperature") + 1] == "0.0"
    status, table, error = run_script(*words, "--out", tmp_path / "eval")
    assert status == 0 and table.splitlines()[1].split()[:4] == ["own", "data.jsonl", "-", "12"], error


@pytest.mark.parametrize("preset, protocol", [("gsm8k", "gsm8k"), ("math", "long")])
def test_the_printed_command_of_a_preset(tmp_path, monkeypatch, capsys, preset, protocol):
    monkeypatch.setattr(spo_tree, "save", lambda *_: None)
    row = {"eval/accuracy": 0.5, "eval/accuracy_ci95": 0.1}
    row |= {"rollout/generated_tokens_total": 9, "time/elapsed_s": 1}
    (tmp_path / "metrics.jsonl").write_text(f'{json.dumps(row)}\n{{"iteration": 1}}\n')  # it ended early
    spo_tree.finish(tmp_path, None, None, spo_tree.PRESETS[preset])
    assert f"eval.py --model {tmp_path}/model --protocol {protocol} (" in capsys.readouterr().out


def test_from_another_directory_until_ctrl_c(tmp_path):
    """The embedded model is beside the script; a prompt may not be printable; files are as the umask says."""
    flags = [*map(str, SMALL["spo_tree.py"]), "--num-iterations", "1000", "--checkpoint-every", "1"]
    flags += ["--run-dir", "run", "--prompt-template", "｜{question}"]
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, umask=0o027, text=True)
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)
    with subprocess.Popen([sys.executable, ROOT / "spo_tree.py", *flags], **options) as process:
        output = ""
        while "iteration 2/1000" not in output:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            output += line
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=600)[1]
    assert process.returncode == 130 and error.startswith("\ninterrupted;") and error.count("\n") == 2, error
    assert "\\uff5c" in output
    checkpoint = tmp_path / "run" / "checkpoints" / "000001"
    assert {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {0o640}
