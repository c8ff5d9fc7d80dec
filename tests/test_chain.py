"""SPO-chain: where segments start, what their values estimate, and how their advantages add up."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import math_grader
from conftest import ROOT, SMALL, tiny_args
from spo_chain import Completion, Problem, chain_advantages, loss_mask, partition, prefix_values
from test_presets import plant
from test_run import metrics, samples

TABLE = [  # probabilities, interval, starts, values at the starts, reward, advantages, loss tokens
    ([0.99, 0.5, 0.95, 0.8, 0.97, 0.3], 2, [0, 5], [0.4, 0.7], 1, [0.3] * 6, [1, 3, 5]),
    ([0.5, 0.95, 0.6], 1, [0, 2], [0.2, 0.6], 0, [0.4, 0.4, -0.6], [0, 2]),
    ([0.5, 0.95, 0.6], 5, [0], [0.2], 1, [0.8] * 3, [0, 2]),
    ([0.99, 0.95, 0.2], 1, [0], [0.5], 0, [-0.5] * 3, [2]),
    ([0.95, 0.99, 0.97], 5, [0], [0.5], 1, [0.5] * 3, []),
]


@pytest.mark.parametrize("probs, interval, starts, values, reward, advantages, loss_tokens", TABLE)
def test_table(probs, interval, starts, values, reward, advantages, loss_tokens):
    assert partition(probs, [], "cutpoint", 0.9, interval, 0) == starts
    got = chain_advantages([*values, float(reward)], starts, len(probs))
    assert got == pytest.approx(advantages)
    mask = loss_mask(torch.tensor(got), torch.tensor(probs).log(), 0.9)
    assert mask.nonzero()[:, 0].tolist() == loss_tokens


def test_rounding_is_no_advantage():
    """.1 + .2 is not .3, but is worth as much."""
    assert chain_advantages([0.1 + 0.2, 0.3, 1.0], [0, 2], 3) == [0.0, 0.0, 0.7]


def test_cutpoint_segments_tile_the_answer_and_hold_the_interval():
    rng = random.Random(0)
    for _ in range(300):
        probs = [rng.choice([0.2, 0.8999, 0.9, 0.95, 1.0]) for _ in range(rng.randint(1, 60))]
        interval = rng.randint(1, 8)
        starts = partition(probs, [], "cutpoint", 0.9, interval, 0)
        cutpoints = [t for t, p in enumerate(probs) if p < 0.9]
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < len(probs)
        assert set(starts[1:]) <= set(cutpoints)
        assert len(starts) == max(1, math.ceil(len(cutpoints) / interval))
        segments = list(zip(starts, [*starts[1:], len(probs)]))
        held = [sum(start <= t < end for t in cutpoints) for start, end in segments]
        assert held[:-1] == [interval] * (len(held) - 1) and sum(held) == len(cutpoints)


@pytest.mark.parametrize("texts, starts", [
    (["a", "\n", "b", ".\n", "c", ""], [0, 2, 4]),
    (["\n", "\n", "a", "\n", "b", ""], [0, 4]),  # leading empty lines belong to the first step
    (["a", "\n", "b", "\n", "####", " 5", ""], [0, 2]),  # the final #### N belongs to the last step
    (["a", "\n", "b", "\n", "\n####", " 5", "\n", ""], [0, 2]),
    (["a", "\n\n", "b", "\n", "\n", ""], [0, 2]),  # no segment of line breaks or of the end of sequence alone
    (["a", "b", ""], [0]),
    (["", ], [0]),
    (["####", " 5", "\n", ""], [0]),
])  # fmt: skip
def test_newline_segments(texts, starts):
    assert partition([1.0] * len(texts), texts, "newline", 0.9, 0, 0) == starts


def test_fixed_segments():
    for length, starts in ((3, [0, 3, 6]), (1, [0, 1, 2, 3, 4, 5, 6]), (7, [0]), (9, [0])):
        assert partition([0.5] * 7, [], "fixed", 0.9, 0, length) == starts


def test_prefix_values():
    """Rollouts are graded with what they continue, and what is cut earns nothing, whatever it says."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    problems = [Problem([1, 5], "12", False), Problem([1, 6, 7], "2", False)]

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    begun = tuple(encode("#### 1"))
    rollouts = {  # of each prefix
        (0, begun): ["2</s>", "2", "3</s>", "2</s>"],
        (0, ()): ["#### 12</s>", "2</s>", "#### 12", "</s>"],
        (1, ()): ["#### 2</s>", "#### 2</s>", "#### 2</s>", "2</s>"],
        (1, begun): ["2</s>", "</s>", "#### 2</s>", "3"],
    }
    calls = []

    def sample(contexts, n, *rest):
        calls.append((contexts, n, *rest))
        sampled = []
        for texts in rollouts.values():
            sampled.append([Completion(encode(text), [], finished=text.endswith("</s>")) for text in texts])
        return sampled

    args = tiny_args("spo_chain.py", mc_rollouts=4, temperature=0.7, top_p=0.8, max_response_tokens=20)
    values, num_tokens = prefix_values([*rollouts], problems, sample, 17, tokenizer, args)
    assert values == dict(zip(rollouts, [2 / 4, 1 / 4, 3 / 4, 1 / 4]))
    assert num_tokens == sum(len(encode(text)) for texts in rollouts.values() for text in texts)
    contexts = [[1, 5, *begun], [1, 5], [1, 6, 7], [1, 6, 7, *begun]]
    left = 20 - len(begun)
    assert calls == [(contexts, 4, [left, 20, 20, left], 0.7, 0.8, 17)]


@pytest.fixture
def enumerable(tmp_path):
    """A model of six tokens, whose answers of at most five tokens can all be enumerated, and its data."""
    words = ["<s>", "</s>", "####", "2", "3", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, initializer_range=0.1, bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    plant(model, [2], {2: [3], 3: [1, 3]})  # so that a fair share of the answers is right
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "2 ?", "answer": "#### 2"}) + "\n")
    return model, words, tmp_path


def exact_value(model, words, prompt, prefix, length):
    """Sum over all continuations of their probability x reward; a truncated answer earns 0."""
    tokens = [words.index(word) for word in prompt + prefix]
    with torch.no_grad():
        probs = model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1).tolist()
    text = " ".join(word for word in prefix if word != "<s>")
    value = probs[1] * math_grader.grade_gsm8k(text, "2")  # the end is sampled
    for p, word in zip(probs, words):
        if len(prefix) + 1 < length and word != "</s>":
            value += p * exact_value(model, words, prompt, [*prefix, word], length)
    return value


def test_values_are_exact_expectations_and_advantages_telescope(run_script, enumerable):
    model, words, path = enumerable
    rollouts, length = 4000, 5
    files = ["--model", path / "model", "--train-data", path / "data.jsonl"]
    files += ["--test-data", path / "data.jsonl"]
    sizes = ["--num-questions", 1, "--samples-per-question", 8, "--minibatch-size", 8, "--eval-questions", 1]
    sizes += ["--mc-rollouts", rollouts, "--cutpoint-interval", 1, "--max-response-tokens", length]
    flags = [*files, *sizes, "--num-iterations", 1, "--run-dir", path / "run"]
    status, _, error = run_script("spo_chain.py", *flags)
    assert status == 0, error
    sample = samples(path / "run")
    prompt, checked = ["<s>", "2", "?"], []
    assert sample["prompt"].split() == prompt

    for answer in sample["completions"]:
        # a decoder of words puts a space before each
        answer["tokens"] = [token.strip() for token in answer["tokens"]]
        ends = [*answer["starts"][1:], len(answer["tokens"])]
        for start, value, end in zip(answer["starts"], answer["values"], ends):
            exact = exact_value(model, words, prompt, answer["tokens"][:start], length)
            error = math.sqrt(exact * (1 - exact) / rollouts)
            assert abs(value - exact) < 4.5 * error + 1e-9, answer["tokens"][:start]
            checked.append(exact)
            assert len(set(answer["advantages"][start:end])) == 1
        finished = answer["tokens"][-1] == "</s>"
        text = " ".join(token for token in answer["tokens"] if token not in ("<s>", "</s>"))
        assert answer["value"] == (finished and math_grader.grade_gsm8k(text, "2"))
        total = sum(answer["advantages"][start] for start in answer["starts"])
        assert total == pytest.approx(answer["value"] - answer["values"][0])
    assert len(checked) > 10 and max(checked) > 0.1
    row, answers = metrics(path / "run")[1], sample["completions"]
    assert row["segments/count"] == len(checked) and row["chain/segments"] == len(checked) / 8
    assert row["rollout/reward_mean"] == pytest.approx(sum(answer["value"] for answer in answers) / 8)


def test_a_run_with_segments_of_lines(run_script, tmp_path):
    flags = [*SMALL["spo_chain.py"], "--num-iterations", 1, "--partition", "newline", "--no-prob-mask"]
    status, _, error = run_script("spo_chain.py", *flags, "--run-dir", tmp_path / "run")
    assert status == 0 and metrics(tmp_path / "run")[1]["chain/segments"] > 2, error
    for answer in samples(tmp_path / "run")["completions"]:
        assert all("\n" in answer["tokens"][start - 1] for start in answer["starts"][1:])
