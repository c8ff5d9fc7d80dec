"""The presets for real models, on a small random one with R1-Distill-Qwen's parts, and MATH's columns."""

import json
from importlib.util import find_spec

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from conftest import run_process
from spo_tree import PROMPT_TEMPLATES, encode_prompt
from test_ranks import torchrun
from test_run import metrics, samples

TEXT = [PROMPT_TEMPLATES["r1"].replace("{question}", "What is 1 + 2? That is \\boxed{3}.")] * 3


def plant(model, start, follows):
    """Makes the tokens `start` likely after anything, and follows[a] far likelier after the token a."""
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding[:, : len(follows) + 1] = head[:, : len(follows) + 1] = 0.0
    embedding[:, 0] = 10.0
    head[start, 0] = 1.0
    for feature, (token_id, next_ids) in enumerate(follows.items(), 1):
        embedding[token_id, feature] = 10.0
        head[next_ids, feature] = 2.0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Directory of a Qwen2, with a byte-level tokenizer, DeepSeek's special tokens, and data."""
    path = tmp_path_factory.mktemp("qwen")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    end, begin, *others = ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in (end, begin, *others)])
    tokenizer.add_tokens(["<think>", "</think>"])
    template = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}"
    names = dict(bos_token=begin, eos_token=end, chat_template=template + "{{ '<｜Assistant｜><think>\\n' }}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    slash, boxed, left, two, right = tokenizer.convert_tokens_to_ids(["\\", "boxed", "{", "2", "}"])
    follows = {slash: [boxed], boxed: [left], left: [two], two: [right]}
    plant(model, [slash], follows | {right: [tokenizer.eos_token_id, left]})  # so that some answers are right
    model.save_pretrained(path)
    rows = [{"problem": f" What is {a} + 1? ", "answer": str(a + 1), "level": 1} for a in (1, 2)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows * 5)) + "\n")
    return path


def test_prompts_have_the_special_tokens_once(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "Ċ"]
    special = tokenizer.convert_tokens_to_ids(names)
    for template in ("r1", "chat"):
        prompt_ids = encode_prompt(tokenizer, template, "What is 1 + 2?")
        assert prompt_ids[:2] + prompt_ids[-3:] == special and prompt_ids.count(special[0]) == 1


def flags(path, run_dir):
    sizes = ["--num-iterations", 2, "--num-questions", 4, "--max-response-tokens", 16, "--eval-questions", 2]
    files = ["--model", path, "--train-data", path / "data.jsonl", "--run-dir", run_dir]
    return [*files, *sizes, "--minibatch-size", 32]


TREE = ["--segment-tokens", 4, "--segments-per-iteration", 64, "--branch-factors", 6, 6]
RUNS = [("spo_tree.py", "math", TREE), ("spo_chain.py", "gsm8k", ["--mc-rollouts", 3])]
RUNS += [("grpo.py", "math", []), ("ppo.py", "gsm8k", [])]


@pytest.mark.parametrize("script, preset, own", RUNS)
def test_two_iterations(run_script, tmp_path, path, script, preset, own):
    status, _, error = run_script(script, "--preset", preset, *flags(path, tmp_path / "run"), *own)
    assert status == 0, error
    rows = metrics(tmp_path / "run")
    assert rows[1]["losses/loss_tokens"] > 0 and 0 < rows[1]["rollout/reward_mean"] < 1
    saved = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert saved["gradient_checkpointing"] == (preset == "math" or script == "ppo.py")
    prompt = samples(tmp_path / "run")["prompt"]
    assert prompt.count("+ 1?") == 1 and ("[MATH_TASK] Problem:\nWhat" in prompt) == (preset == "gsm8k")
    assert ("final answer is: $\\boxed{ANSWER}$." in prompt) == (preset == "math")


@pytest.mark.vllm
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
def test_two_processes_with_an_engine_each(tmp_path, path):
    """And a third one evaluates their model. An engine's end, too, is without an error."""
    own = ["--preset", "math", *TREE, "--sampler", "vllm"]
    result = torchrun("spo_tree.py", *flags(path, tmp_path / "run"), *own)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert metrics(tmp_path / "run")[2]["losses/loss_tokens"] > 0
    own = ["--data", path / "data.jsonl", "--prompt-template", "r1", "--max-response-tokens", 16]
    own += ["--model", tmp_path / "run" / "model", "--sampler", "vllm", "--out", tmp_path / "eval"]
    status, output, error = run_process("eval.py", *own)
    assert status == 0 and "  10  " in output and "Traceback" not in error, error
