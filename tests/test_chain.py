"""SPO-chain: where segments start, what their values estimate, and how their advantages add up."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import math_grader
from conftest import SMALL
from spo_chain import chain_advantages, loss_mask, partition
from test_presets import plant
from test_run import metrics

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
    assert loss_mask(torch.tensor(got), torch.tensor(probs).log(), 0.9).nonzero()[:, 0].tolist() == loss_tokens


def test_cutpoint_segments_tile_the_answer_and_hold_the_interval():
    rng = random.Random(0)
    for _ in range(300):
        probs = [rng.choice([0.2, 0.8999, 0.9, 0.95, 1.0]) for _ in range(rng.randint(1, 60))]
        interval = rng.randint(1, 8)
        starts = partition(probs, [], "cutpoint", 0.9, interval, 0)
        cutpoints = [t for t, p in enumerate(probs) if p < 0.9]
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < len(probs)
        assert set(starts[1:]) <= set(cutpoints) and len(starts) == max(1, math.ceil(len(cutpoints) / interval))
        segments = list(zip(starts, [*starts[1:], len(probs)]))
        held = [sum(start <= t < end for t in cutpoints) for start, end in segments]
        assert held[:-1] == [interval] * (len(held) - 1) and sum(held) == len(cutpoints)


def test_fixed_segments():
    assert partition([1.0] * 7, [], "fixed", 0.9, 0, 3) == [0, 3, 6] and partition([1.0] * 6, [], "fixed", 0.9, 0, 3) == [0, 3]
    assert partition([1.0], [], "fixed", 0.9, 0, 3) == [0]


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


def test_newline_property():
    rng = random.Random(1)
    for _ in range(300):
        texts = [rng.choice(["a", " b", "\n", ".\n", "\n\n", "####", " 7", ""]) for _ in range(rng.randint(1, 25))]
        starts = partition([1.0] * len(texts), texts, "newline", 0.9, 0, 0)
        assert starts[0] == 0 and starts == sorted(set(starts))
        parts = ["".join(texts[a:b]) for a, b in zip(starts, [*starts[1:], len(texts)])]
        assert "".join(parts) == "".join(texts) and (len(parts) == 1 or all(part.strip() for part in parts))
        assert all("\n" in texts[start - 1] for start in starts[1:])


@pytest.fixture
def enumerable(tmp_path):
    """A model of six tokens, whose answers of at most five tokens can all be enumerated, and its data."""
    words = ["<s>", "</s>", "####", "2", "3", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1)).eval()  # fmt: skip
    plant(model, [2], {2: [3], 3: [1, 3]})  # so that a fair share of the answers is right
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "2 ?", "answer": "#### 2"}) + "\n")
    return model, words, tmp_path


def exact_value(model, words, prompt, prefix, length):
    """Sum over all continuations of their probability x reward; a truncated answer earns 0."""
    tokens = [words.index(word) for word in prompt + prefix]
    with torch.no_grad():
        probs = model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1).tolist()
    value = probs[1] * math_grader.grade_gsm8k(" ".join(word for word in prefix if word != "<s>"), "2")  # the end is sampled
    if len(prefix) + 1 < length:
        value += sum(p * exact_value(model, words, prompt, [*prefix, word], length) for p, word in zip(probs, words) if word != "</s>")
    return value


def test_values_are_exact_expectations_and_advantages_telescope(run_script, enumerable):
    model, words, path = enumerable
    rollouts, length = 4000, 5
    status, _, error = run_script(
        "spo_chain.py", "--model", path / "model", "--train-data", path / "data.jsonl", "--test-data", path / "data.jsonl", "--num-questions", 1,
        "--samples-per-question", 8, "--mc-rollouts", rollouts, "--cutpoint-interval", 1, "--max-response-tokens", length, "--num-iterations", 1,
        "--minibatch-size", 8, "--eval-questions", 1, "--run-dir", path / "run")  # fmt: skip
    assert status == 0, error
    tree = json.loads((path / "run" / "samples.jsonl").read_text())["tree"]
    prompt, checked = ["<s>", "2", "?"], []
    assert tree["prompt"].split() == prompt

    for answer in tree["children"]:
        answer["tokens"] = [token.strip() for token in answer["tokens"]]  # a decoder of words puts a space before each
        for start, value, end in zip(answer["starts"], answer["values"], [*answer["starts"][1:], len(answer["tokens"])]):
            exact = exact_value(model, words, prompt, answer["tokens"][:start], length)
            assert abs(value - exact) < 4.5 * math.sqrt(exact * (1 - exact) / rollouts) + 1e-9, answer["tokens"][:start]
            checked.append(exact)
            assert len(set(answer["advantages"][start:end])) == 1
        finished = answer["tokens"][-1] == "</s>"
        text = " ".join(token for token in answer["tokens"] if token not in ("<s>", "</s>"))
        assert answer["value"] == (finished and math_grader.grade_gsm8k(text, "2"))
        assert sum(answer["advantages"][start] for start in answer["starts"]) == pytest.approx(answer["value"] - answer["values"][0])
    assert len(checked) > 10 and max(checked) > 0.1
    row, prefixes = metrics(path / "run")[1], {tuple(a["tokens"][:start]) for a in tree["children"] for start in a["starts"]}
    assert row["segments/count"] == len(checked) and row["chain/segments"] == len(checked) / 8
    assert row["chain/unique_fraction"] == pytest.approx(len(prefixes) / len(checked)) and row["chain/rollout_tokens"] > rollouts
    assert row["rollout/reward_mean"] == pytest.approx(sum(answer["value"] for answer in tree["children"]) / 8)


def test_equal_prefixes_are_sampled_once(run_script, tmp_path):
    """The prompt's value serves all answers: without further boundaries there is one value for each question."""
    flags = [*SMALL["spo_chain.py"], "--cutpoint-interval", 500, "--num-iterations", 1]
    assert run_script("spo_chain.py", *flags, "--run-dir", tmp_path / "run")[0] == 0
    row = metrics(tmp_path / "run")[1]
    assert row["chain/segments"] == 1 and row["chain/unique_fraction"] == 1 / 4


@pytest.mark.parametrize("flags", [["--partition", "fixed", "--segment-tokens", 10], ["--partition", "newline", "--no-prob-mask"]])
def test_other_partitions_run(run_script, tmp_path, flags):
    assert run_script("spo_chain.py", *SMALL["spo_chain.py"], *flags, "--num-iterations", 1, "--run-dir", tmp_path / "run")[0] == 0
    row = metrics(tmp_path / "run")[1]
    assert row["chain/segments"] > 2
    if "newline" in flags:
        for answer in json.loads((tmp_path / "run" / "samples.jsonl").read_text())["tree"]["children"]:
            parts = zip(answer["starts"], [*answer["starts"][1:], len(answer["tokens"])])
            assert all("".join(answer["tokens"][start:end]).replace("</s>", "").strip() for start, end in parts)


def test_an_answer_of_very_many_segments(run_script, tmp_path):
    """One token a segment is no matter of recursion."""
    flags = ["--partition", "fixed", "--segment-tokens", 1, "--samples-per-question", 2, "--mc-rollouts", 1, "--num-questions", 1]
    status, _, error = run_script("spo_chain.py", *SMALL["spo_chain.py"], *flags, "--num-iterations", 1, "--run-dir", tmp_path / "run")
    assert status == 0 and metrics(tmp_path / "run")[1]["segments/tokens_mean"] == 1, error
    assert len(chain_advantages([0.5] * 5001, list(range(5000)), 5000)) == 5000


def test_wrong_flags(run_script, tmp_path):
    for flags in (["--minibatch-size", 4], ["--partition", "sentence"], ["--mc-rollouts", 0], ["--prob-threshold", 0]):
        assert run_script("spo_chain.py", *flags, "--run-dir", tmp_path / "run")[0] == 2
