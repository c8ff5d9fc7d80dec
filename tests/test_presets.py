"""The presets for real models, run on local models of the same architecture and files in the real columns.

Only sizes are overridden. The tokenizers have the real special tokens and rules for BOS, and merges of the
test's own text. The models' weights are random but for a few entries that make certain tokens follow each
other, so that some answers are right.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import SCRIPTS, run_process
from spo_tree import PROMPT_TEMPLATES, Completion, Group, Problem, encode_prompt, sample_record
from test_run import metrics, samples, weights

QUESTION = "What is 1 + 2? Answer: #### 3, that is \\boxed{3}."
TEXT = [PROMPT_TEMPLATES[name].replace("{question}", QUESTION) for name in ("plain", "rho", "r1")]
GSM8K, MATH = [], []
for a in [1, 2] * 5:
    answer = f"It is <<{a}+1={a + 1}>>{a + 1}.\n#### {a + 1}"
    GSM8K.append({"question": f" What is {a} + 1? ", "answer": answer})
    row = {"problem": f"What is ${a} + 1$?", "solution": f"$\\boxed{{{a + 1}}}$", "answer": str(a + 1)}
    MATH.append(row | {"subject": "Algebra", "level": 1, "unique_id": f"train/{a}.json"})


def plant(model, start, follows):
    """Makes the tokens `start` likely after anything, and follows[a] far likelier after the token a."""
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding[:, : len(follows) + 1] = head[:, : len(follows) + 1] = 0.0
    embedding[:, 0] = 10.0
    head[start, 0] = 1.0
    for feature, (token_id, next_ids) in enumerate(follows.items(), 1):
        embedding[token_id, feature] = 10.0
        head[next_ids, feature] = 2.0


def rho(path):
    """Llama's tokenizer (BPE with byte fallback, BOS, no tokens for chats) and a Llama with 32,000 rows."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], initial_alphabet=[])
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = [*special, *(token for token in learned["vocab"] if token not in special)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    mark, two, three = fast.convert_tokens_to_ids(["####", "2", "3"])
    plant(model, [mark], {mark: [two, three], two: [2, three], three: [2, two]})
    model.save_pretrained(path)
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, GSM8K)) + "\n")
    return path


def qwen(path):
    """Qwen's byte-level tokenizer with DeepSeek's special tokens, and a Qwen2 with 151,936 rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<|EOT|>"]
    names += ["<think>", "</think>"]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    filler = {f"<unused{i}>": i for i in range(len(learned["vocab"]), 151_643)}
    tokenizer.model = models.BPE(learned["vocab"] | filler, [tuple(merge) for merge in learned["merges"]])
    tokenizer.add_tokens([AddedToken(name, special="think" not in name, normalized=False) for name in names])
    template = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}"
    template += "{{ '<｜Assistant｜><think>\\n' }}"
    names = dict(bos_token=names[3], eos_token=names[0], pad_token=names[0])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=131_072, tie_word_embeddings=False,
        bos_token_id=151_646, eos_token_id=151_643,
    )
    model = Qwen2ForCausalLM(config)
    slash, boxed, left, two, three, right = fast.convert_tokens_to_ids(["\\", "boxed", "{", "2", "3", "}"])
    follows = {slash: [boxed], boxed: [left], left: [two, three], two: [right], three: [right]}
    plant(model, [slash], follows | {right: [151_643, left]})
    model.save_pretrained(path)
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, MATH)) + "\n")
    return path


@pytest.fixture(scope="session", params=["gsm8k", "math"])
def preset(request, tmp_path_factory):
    return request.param, {"gsm8k": rho, "math": qwen}[request.param](tmp_path_factory.mktemp(request.param))


def test_golden_prompts(preset):
    name, path = preset
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt_ids = encode_prompt(tokenizer, {"gsm8k": "rho", "math": "r1"}[name], "What is 1 + 2?")
    assert prompt_ids.count(tokenizer.bos_token_id) == 1 and prompt_ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(prompt_ids[1:], clean_up_tokenization_spaces=False)
    group = Group(0, 1, [], [Completion(prompt_ids[1:], [])])
    (shown,) = sample_record([group], Problem(prompt_ids, "3", False), 1, tokenizer)["completions"]
    # in samples.jsonl, no space is lost between tokens
    assert "".join(shown["tokens"]) == (" " + text if name == "gsm8k" else text)
    if name == "gsm8k":
        assert text == "[MATH_TASK] Problem:\nWhat is 1 + 2?\n\nSolution:"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert prompt_ids == [1, 589, 559, 377, 271, 259, 376, 375, 259, 421, 581]
    else:
        template = PROMPT_TEMPLATES["r1"].removeprefix("<｜begin▁of▁sentence｜>")
        assert text == template.replace("{question}", "What is 1 + 2?")
        assert prompt_ids == [
            151646, 151644, 431, 270, 344, 409, 331, 464, 426, 463, 13, 220, 442, 438, 439, 329, 461, 456,
            466, 328, 329, 270, 344, 427, 25, 398, 462, 11, 270, 343, 336, 262, 25, 403, 279, 90, 350, 397,
            400, 457,
            407, 262, 435, 6, 399, 455, 460, 8, 412, 419, 262, 458, 270, 343, 459, 402, 465, 278, 441, 270,
            331, 13, 443, 342, 405, 342, 444, 446, 13, 198, 198, 303, 262, 220, 16, 292, 220, 17, 30, 151645,
            151648, 198,
        ]  # fmt: skip
        chat_ids = encode_prompt(tokenizer, "chat", "What is 1 + 2?")
        assert chat_ids[:2] == prompt_ids[:2] and chat_ids[-3:] == prompt_ids[-3:]
        assert chat_ids.count(151_646) == 1


VLLM = [pytest.mark.vllm, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")]
OWN_SIZES = {
    "spo_tree.py": ["--segment-tokens", 4, "--segments-per-iteration", 64, "--branch-factors", 6, 6],
    "spo_chain.py": ["--mc-rollouts", 3],
    "grpo.py": [],
    "ppo.py": ["--critic-learning-rate", 1e-4],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("sampler", ["transformers", pytest.param("vllm", marks=VLLM)])
def test_two_iterations(run_script, tmp_path, preset, sampler, script):
    run_script = run_process if sampler == "vllm" else run_script
    name, path = preset
    if sampler == "vllm" and name == "math" and script != "spo_tree.py":
        pytest.skip("the engine and its calls are those of the others; a start takes half a minute")
    sizes = ["--num-iterations", 2, "--num-questions", 4, "--max-response-tokens", 16, "--eval-questions", 2]
    sizes += ["--minibatch-size", 32, *OWN_SIZES[script]]
    files = ["--model", path, "--train-data", path / "data.jsonl", "--run-dir", tmp_path / "run"]
    status, output, error = run_script(script, "--preset", name, *files, *sizes, "--sampler", sampler)
    assert status == 0, error
    rows = metrics(tmp_path / "run")
    assert rows[1]["losses/loss_tokens"] > 0 and 0 < rows[1]["rollout/reward_mean"] < 1
    assert rows[2]["losses/kl"] > -1e-9
    start, end = weights(path), weights(tmp_path / "run" / "model")
    assert any((start[key] - end[key]).abs().max() > 1e-7 for key in start)
    saved = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert saved["gradient_checkpointing"] == (name == "math" or script == "ppo.py")
    assert saved["prompt_template"] == {"gsm8k": "rho", "math": "r1"}[name]
    sample = samples(tmp_path / "run")
    assert sample["prompt"].count("+ 1") == 1 and sample["gold"] in "23"
    if script == "spo_tree.py":  # once for each preset and engine
        flags = ["--model", tmp_path / "run" / "model", "--data", path / "data.jsonl", "--out", tmp_path]
        flags += ["--prompt-template", saved["prompt_template"], "--max-response-tokens", 16]
        status, output, error = run_script("eval.py", *flags, "--sampler", sampler)
        assert status == 0 and "  10  " in output, error
