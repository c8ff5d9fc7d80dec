"""A real chat model, through SPO-tree: `SPO_REAL_MODEL=DIRECTORY pytest -m real`.

benchmark/smollm2.py makes the directory. A real model has what a small random one has not: a large
vocabulary, a chat template, two end-of-sequence tokens, tied embeddings, and answers that make sense.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import spo_tree
from conftest import SMALL, tiny_args
from test_run import metrics, weights

MODEL = os.environ.get("SPO_REAL_MODEL", "")
WHY = "SPO_REAL_MODEL is not set: benchmark/smollm2.py makes a model"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not MODEL, reason=WHY)]

CAPITAL = "What is the capital of France?"
EXAMPLE = (  # one worked example; the model ends its answer as the example's ends
    "<|im_start|>user\nTom has 3 apples and buys 4 more. How many has he?<|im_end|>\n"
    "<|im_start|>assistant\n3+4=7\n#### 7<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
# the model gets each right in .4 to .8 of its answers at temperature .7
SUMS = []
for name, a, b in (("Ana", 5, 2), ("Ben", 2, 2), ("Eva", 4, 5), ("Sam", 2, 3), ("Ida", 4, 3)):
    question = f"{name} has {a} apples and buys {b} more. How many has {name}?"
    SUMS.append({"question": question, "answer": f"{a}+{b}={a + b}\n#### {a + b}"})


def test_chat_prompts_are_the_tokenizers_own():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "user", "content": CAPITAL}]
    chat = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    for script in (spo_tree, evaluation):
        assert script.encode_prompt(tokenizer, "chat", CAPITAL) == chat["input_ids"]


def test_one_iteration(run_script, tmp_path):
    """With one optimizer step, before which the policy is the one that sampled: all ratios are 1."""
    data, run_dir = tmp_path / "sums.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    flags = [*SMALL["spo_tree.py"], "--segment-tokens", 6, "--run-dir", run_dir, "--model", MODEL]
    flags += ["--train-data", data, "--test-data", data, "--prompt-template", EXAMPLE]
    flags += ["--num-iterations", 1, "--num-questions", 3, "--max-response-tokens", 16]
    flags += ["--temperature", 0.7, "--num-epochs", 1, "--minibatch-size", 999, "--learning-rate", 1e-6]
    status, _, error = run_script("spo_tree.py", *flags, "--eval-questions", 1)
    assert status == 0, error
    _, row = metrics(run_dir)
    assert row["rollout/reward_mean"] > 0 and row["rollout/truncated_fraction"] < 1
    assert row["losses/optimizer_steps"] == 1 and row["losses/loss_tokens"] > 10
    assert row["losses/clip_fraction"] == 0 and 0 <= row["losses/approx_kl"] < 1e-7
    check_model(run_script, run_dir / "model", tmp_path)
    shutil.rmtree(run_dir)  # some gigabytes


def check_model(run_script, path, tmp_path):
    """The model of a run has the start model's parts, and is evaluated as a chat model."""
    start, trained = weights(Path(MODEL)), weights(path)
    assert start.keys() == trained.keys()  # tied embeddings are stored once
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    sample, _ = spo_tree.load_sampler(model, tokenizer, 384, tiny_args())
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sample.__wrapped__.args[1] == sorted(ends)
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": CAPITAL, "answer": "#### 4"}))
    flags = ["--model", path, "--data", tmp_path / "data.jsonl", "--prompt-template", "chat"]
    flags += ["--max-response-tokens", 40, "--samples", 1, "--temperature", 1e-6, "--out", tmp_path / "out"]
    status, _, error = run_script("eval.py", *flags)
    (answers,) = (tmp_path / "out").iterdir()
    assert status == 0 and '"The capital of France is Paris."' in answers.read_text(), error
