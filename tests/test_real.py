"""A real chat model, through all scripts: `SPO_REAL_MODEL=DIRECTORY pytest -m real`.

benchmark/smollm2.py makes the directory. A real model has what a small random one has not: a large
vocabulary, a chat template, two end-of-sequence tokens, tied embeddings, and answers that make sense.
"""

import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import spo_tree
from conftest import SCRIPTS, run_process, tiny_args
from math_grader import grade_gsm8k
from spo_tree import Group, encode_prompt, load_sampler, pack, sample_transformers, token_logprobs
from test_packing import T, plain_logprobs
from test_run import metrics, samples, weights

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
NUMBERS = [("Ana", 5, 2), ("Ben", 2, 2), ("Eva", 4, 5), ("Sam", 2, 3), ("Ida", 4, 3)]
SUMS = []
for name, a, b in NUMBERS:
    question = f"{name} has {a} apples and buys {b} more. How many has {name}?"
    SUMS.append({"question": question, "answer": f"{a}+{b}={a + b}\n#### {a + b}"})


def end_of_sequence(model, tokenizer):
    """The ids that end an answer: the second argument that the sampler is given."""
    sample, _ = load_sampler(model, tokenizer, 384, tiny_args())
    return sample.__wrapped__.args[1]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def end_ids(model, tokenizer):
    return end_of_sequence(model, tokenizer)


def test_both_tokens_end_an_answer(tokenizer, end_ids):
    assert end_ids == sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


@torch.no_grad()
def test_packed_plain_and_sampled_logprobs_agree(model, tokenizer, end_ids):
    contexts = [encode_prompt(tokenizer, "chat", CAPITAL), encode_prompt(tokenizer, EXAMPLE, "And 5?")]
    sampled = sample_transformers(model, end_ids, contexts, 3, [16, 16], T, 1.0, seed=1)
    groups = [Group(k, 1, *pair) for k, pair in enumerate(zip(contexts, sampled))]
    (row,) = pack(groups, 384)
    packed = token_logprobs(model, row, row.indices, tiny_args(temperature=T)).tolist()
    plain, by_sampler, texts = [], [], set()
    for group in groups:
        for completion in group.completions:
            plain += plain_logprobs(model, group.context, completion.token_ids).tolist()
            by_sampler += completion.sampler_logprobs
            texts.add(tokenizer.decode(completion.token_ids))
    assert len(packed) > 30 and len(texts) > 3 and min(plain) < -1
    assert packed == pytest.approx(plain, abs=2e-4)
    assert by_sampler == pytest.approx(plain, abs=2e-4)


@pytest.mark.parametrize("script", [spo_tree, evaluation])
def test_chat_prompts_are_the_tokenizers_own(tokenizer, script):
    prompt_ids = script.encode_prompt(tokenizer, "chat", CAPITAL)
    messages = [{"role": "user", "content": CAPITAL}]
    chat = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert prompt_ids == chat["input_ids"]
    first, system, user, assistant = tokenizer.decode(prompt_ids).split("<|im_start|>")
    assert first == "" and system.startswith("system\n") and system.endswith("<|im_end|>\n")
    assert (user, assistant) == (f"user\n{CAPITAL}<|im_end|>\n", "assistant\n")


def test_greedy_answers_end_at_their_end(model, tokenizer, end_ids, run_script, tmp_path):
    questions = [CAPITAL, "What is 2 + 2?"]
    prompts = [encode_prompt(tokenizer, "chat", question) for question in questions]
    sampled = sample_transformers(model, end_ids, prompts, 1, [40, 40], 0.0, 1.0, seed=1)
    answers = [answer for (answer,) in sampled]
    assert all(answer.finished for answer in answers)
    assert tokenizer.decode(answers[0].token_ids) == "The capital of France is Paris.<|im_end|>"
    rows = [json.dumps({"question": question, "answer": "#### 4"}) for question in questions]
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    flags = ["--data", tmp_path / "two.jsonl", "--prompt-template", "chat", "--max-response-tokens", 40]
    flags += ["--model", MODEL, "--samples", 1, "--temperature", 1e-6, "--out", tmp_path / "out"]
    status, output, error = run_script("eval.py", *flags)
    assert status == 0, error
    (path,) = (tmp_path / "out").iterdir()
    assert '"The capital of France is Paris."' in path.read_text()
    tokens = float(output.splitlines()[-1].split()[-1])  # the last column; the end token is one of them
    lengths = [len(answer.token_ids) for answer in answers]
    assert lengths[0] != lengths[1] and tokens == pytest.approx(sum(lengths) / 2, abs=0.06)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return path


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """script -> the directory of a run of one iteration with one optimizer step, made once."""
    made = {}
    common = ["--model", MODEL, "--train-data", data, "--test-data", data, "--prompt-template", EXAMPLE]
    common += ["--num-iterations", 1, "--num-questions", 3, "--max-response-tokens", 16]
    common += ["--temperature", 0.7, "--num-epochs", 1, "--minibatch-size", 999]
    common += ["--eval-questions", 1, "--eval-samples", 1]
    own = {
        "spo_tree.py": ["--branch-factors", 3, 3, "--segment-tokens", 6],
        "spo_chain.py": ["--samples-per-question", 6, "--cutpoint-interval", 4, "--mc-rollouts", 2],
        "grpo.py": ["--samples-per-question", 6],
        "ppo.py": ["--samples-per-question", 6, "--critic-warmup-iterations", 0],
    }

    def get(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("runs") / "run"
            status, _, error = run_process(script, *common, *own[script], "--run-dir", made[script])
            assert status == 0, error
        return made[script]

    yield get
    for path in made.values():
        shutil.rmtree(path)  # some gigabytes


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_iteration(run, script):
    before, after = metrics(run(script))
    assert {"eval/accuracy"} <= before.keys() & after.keys()
    assert after["rollout/reward_mean"] > 0 and after["rollout/truncated_fraction"] < 1
    assert abs(after["rollout/logprob_gap_mean"]) < 1e-4
    # before the only step the policy is the one that sampled: all ratios are 1
    assert after["losses/optimizer_steps"] == 1 and after["losses/loss_tokens"] > 10
    assert after["losses/clip_fraction"] == 0 and 0 <= after["losses/approx_kl"] < 1e-7
    assert after["losses/grad_norm"] > 0
    shown = samples(run(script))
    assert shown["prompt"].startswith("<|im_start|>user\nTom has 3 apples") and shown["completions"]


def test_the_model_of_a_run_is_evaluated(run, data, tokenizer, end_ids, tmp_path):
    path = run("spo_tree.py") / "model"
    start, trained = weights(Path(MODEL)), weights(path)
    assert start.keys() == trained.keys()  # tied embeddings are stored once
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    saved_tokenizer = AutoTokenizer.from_pretrained(path)
    assert end_of_sequence(model, saved_tokenizer) == end_ids
    assert saved_tokenizer.chat_template == tokenizer.chat_template
    # eval.py reads the directory as the library does: the same greedy answers
    prompts = [encode_prompt(tokenizer, EXAMPLE, row["question"]) for row in SUMS]
    sampled = sample_transformers(model, end_ids, prompts, 1, [16] * len(SUMS), 0.0, 1.0, seed=1)
    texts = [tokenizer.decode(answer.token_ids, skip_special_tokens=True) for (answer,) in sampled]
    flags = ["--model", path, "--data", data, "--prompt-template", EXAMPLE, "--max-response-tokens", 16]
    flags += ["--temperature", 1e-6, "--samples", 1, "--out", tmp_path]
    status, output, error = run_process("eval.py", *flags)
    assert status == 0, error
    (answers,) = tmp_path.iterdir()
    kept = [re.findall(r'"responses": \["(.*?)"\]', line) for line in answers.open()]
    assert kept == [[json.dumps(text)[1:-1]] for text in texts] and len(set(texts)) > 1
    (accuracy,) = re.findall(r"sums\.jsonl +- +5 +(\d\.\d+) \+- ", output)
    right = [grade_gsm8k(text, str(a + b)) for text, (_, a, b) in zip(texts, NUMBERS)]
    assert float(accuracy) == fmean(right)
