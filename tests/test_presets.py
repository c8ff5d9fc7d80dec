"""The presets for real models, executed: local models of the same architecture with random weights, and files in the real columns.

Only sizes are overridden. The tokenizers have the real special tokens and rules for BOS, and merges of the test's own text. The
models' weights are random but for a few entries that make certain tokens follow each other, so that some answers are right.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from conftest import SCRIPTS, run_process
from spo_tree import PROMPT_TEMPLATES, Node, encode_prompt, readable
from test_run import metrics

TEXT = [template.replace("{question}", "What is 1 + 2? Answer: #### 3, that is \\boxed{3}.") for template in PROMPT_TEMPLATES.values()]
GSM8K = [{"question": f" What is {a} + 1? ", "answer": f"It is <<{a}+1={a + 1}>>{a + 1}.\n#### {a + 1}"} for a in range(1, 3)] * 5
MATH = [{"problem": f"What is ${a} + 1$?", "solution": f"$\\boxed{{{a + 1}}}$", "answer": str(a + 1), "subject": "Algebra", "level": 1,
         "unique_id": f"train/{a}.json"} for a in range(1, 3)] * 5  # fmt: skip


def plant(model, start, follows):
    """Makes the tokens `start` likely after anything, and follows[a] far likelier after the token a, each through a feature."""
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding[:, : len(follows) + 1] = head[:, : len(follows) + 1] = 0.0
    embedding[:, 0] = 10.0
    head[start, 0] = 1.0
    for feature, (token_id, next_ids) in enumerate(follows.items(), 1):
        embedding[token_id, feature] = 10.0
        head[next_ids, feature] = 2.0


def rho(path):
    """Llama's tokenizer (BPE with byte fallback, BOS, no special token for chats) and a Llama with 32,000 rows."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], initial_alphabet=[]))
    vocabulary = json.loads(tokenizer.to_str())["model"]
    tokens = [*special, *(token for token in vocabulary["vocab"] if token not in special)]
    tokenizer.model = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge) for merge in vocabulary["merges"]],
                                 byte_fallback=True, unk_token="<unk>")  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    mark, two, three = fast.convert_tokens_to_ids(["####", "2", "3"])
    plant(model, [mark], {mark: [two, three], two: [2, three], three: [2, two]})
    model.save_pretrained(path)
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, GSM8K)) + "\n")
    return path


def qwen(path):
    """Qwen's byte-level tokenizer with DeepSeek's special tokens at their places, and an untied Qwen2 with 151,936 rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<|EOT|>", "<think>", "</think>"]
    tokenizer.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = json.loads(tokenizer.to_str())["model"]
    filler = {f"<unused{i}>": i for i in range(len(vocabulary["vocab"]), 151_643)}
    tokenizer.model = models.BPE(vocabulary["vocab"] | filler, [tuple(merge) for merge in vocabulary["merges"]])
    tokenizer.add_tokens([AddedToken(name, special="think" not in name, normalized=False) for name in names])
    template = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}{{ '<｜Assistant｜><think>\\n' }}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=names[3], eos_token=names[0], pad_token=names[0], chat_template=template)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151_936, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3,
                         num_key_value_heads=1, max_position_embeddings=131_072, tie_word_embeddings=False, bos_token_id=151_646,
                         eos_token_id=151_643)  # fmt: skip
    model = Qwen2ForCausalLM(config)
    slash, boxed, left, two, three, right = fast.convert_tokens_to_ids(["\\", "boxed", "{", "2", "3", "}"])
    plant(model, [slash], {slash: [boxed], boxed: [left], left: [two, three], two: [right], three: [right], right: [151_643, left]})
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
    shown = "".join(readable(Node(prompt_ids[1:]), tokenizer)["tokens"])  # in samples.jsonl, no space is lost between tokens
    assert shown == (" " + text if name == "gsm8k" else text)
    if name == "gsm8k":
        assert text == "[MATH_TASK] Problem:\nWhat is 1 + 2?\n\nSolution:"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert prompt_ids == [1, 589, 559, 377, 271, 259, 376, 375, 259, 421, 581]
    else:
        assert text == PROMPT_TEMPLATES["r1"].removeprefix("<｜begin▁of▁sentence｜>").replace("{question}", "What is 1 + 2?")
        assert prompt_ids == [
            151646, 151644, 431, 270, 344, 409, 331, 464, 426, 463, 13, 220, 442, 438, 439, 329, 461, 456, 466, 328,
            329, 270, 344, 427, 25, 398, 462, 11, 270, 343, 336, 262, 25, 403, 279, 90, 350, 397, 400, 457,
            407, 262, 435, 6, 399, 455, 460, 8, 412, 419, 262, 458, 270, 343, 459, 402, 465, 278, 441, 270,
            331, 13, 443, 342, 405, 342, 444, 446, 13, 198, 198, 303, 262, 220, 16, 292, 220, 17, 30, 151645,
            151648, 198,
        ]  # fmt: skip
        chat_ids = encode_prompt(tokenizer, "chat", "What is 1 + 2?")
        assert chat_ids[:2] == prompt_ids[:2] and chat_ids[-3:] == prompt_ids[-3:] and chat_ids.count(151_646) == 1


OWN_SIZES = {
    "spo_tree.py": ["--segment-tokens", 4, "--segments-per-iteration", 64, "--branch-factors", 6, 6],
    "spo_chain.py": ["--mc-rollouts", 3],
    "grpo.py": [],
    "ppo.py": ["--critic-learning-rate", 1e-4],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("sampler", ["transformers", pytest.param("vllm", marks=[
    pytest.mark.vllm, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")])])  # fmt: skip
def test_two_iterations(run_script, tmp_path, preset, sampler, script):
    run_script = run_process if sampler == "vllm" else run_script
    name, path = preset
    if sampler == "vllm" and name == "math" and script != "spo_tree.py":
        pytest.skip("the engine and its calls are those of the other combinations; a start takes half a minute")
    sizes = ["--num-iterations", 2, "--num-questions", 4, "--max-response-tokens", 16, "--eval-questions", 2, "--minibatch-size", 32]
    files = ["--model", path, "--train-data", path / "data.jsonl", "--run-dir", tmp_path / "run", "--sampler", sampler]
    status, output, error = run_script(script, "--preset", name, *files, *sizes, *OWN_SIZES[script])
    assert status == 0, error
    rows = metrics(tmp_path / "run")
    assert rows[1]["losses/loss_tokens"] > 0 and 0 < rows[1]["rollout/reward_mean"] < 1 and rows[2]["losses/kl"] > -1e-9
    start, end = (load_file(directory / "model.safetensors") for directory in (path, tmp_path / "run" / "model"))
    assert any((start[key] - end[key]).abs().max() > 1e-7 for key in start)
    saved = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert saved["prompt_template"] == {"gsm8k": "rho", "math": "r1"}[name] and saved["gradient_checkpointing"]
    tree = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1])["tree"]
    assert tree["prompt"].count("+ 1") == 1 and tree["gold"] in "23"
    if script == "spo_tree.py" or sampler == "transformers":  # with vLLM, once for each preset
        template = saved["prompt_template"]
        flags = ["--data", path / "data.jsonl", "--prompt-template", template, "--max-response-tokens", 16, "--sampler", sampler]
        status, output, error = run_script("eval.py", "--model", tmp_path / "run" / "model", *flags, "--out", tmp_path)
        assert status == 0 and "  10  " in output, error
