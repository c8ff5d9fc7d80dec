"""Models as files from elsewhere: what they contain never runs; tokenizers without this or that work."""

import io
import json
import pickle
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import math_grader
import spo_tree
from conftest import ROOT, SCRIPTS, SMALL, tiny_args
from spo_tree import Group, check_sampler, encode_prompt, load_model, load_problems, load_sampler
from spo_tree import sample_transformers, score_tokens, token_logprobs
from test_run import metrics, without_times


@pytest.fixture
def model_dir(tmp_path):
    return shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")


def change(path, remove=(), **values):
    """Changes or removes keys of a JSON file."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def run_on(run_script, model_dir, script, *flags):
    """Runs a script on a model for a moment; returns its standard output, and its error if there is one."""
    run_dir = model_dir.parent / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    few = ["--max-questions", 2, "--out", run_dir]
    if script != "eval.py":
        few = [*SMALL[script], "--train-data", "tiny/test.jsonl", "--num-iterations", 1, "--run-dir", run_dir]
    return run_script(script, *few, "--model", model_dir, *flags)


def assert_error(result, *words):
    status, _, error = result
    assert status == 1 and error.startswith("error: --model") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


# ---------------------------------------------------------------------------------- nothing in it is executed
def test_every_call_refuses_remote_code():
    for script in [*SCRIPTS, "eval.py"]:
        source = (ROOT / script).read_text()
        calls = re.findall(r"(\w+)\.from_pretrained\((.*)\)", source)
        assert len(calls) >= 3
        for name, arguments in calls:
            if options := re.search(r"\*\*(\w+)", arguments):
                before = source.split(f".from_pretrained({arguments})")[0]
                arguments = before.rpartition(f" {options[1]} = dict(")[2].splitlines()[0]
            assert "trust_remote_code=False" in arguments or name == "GenerationConfig"  # which has no code


@pytest.mark.parametrize("script", ["spo_tree.py", "eval.py"])
def test_code_of_a_model_is_refused_without_a_question(run_script, model_dir, monkeypatch, script):
    """transformers asks at a terminal whether to run such code, and runs it after a y."""
    ran = model_dir.parent / "ran"
    code = "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    (model_dir / "code.py").write_text(f"{code}open({str(ran)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(model_dir / "config.json", model_type="own", auto_map=auto_map)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert_error(run_on(run_script, model_dir, script), str(model_dir), "custom code")
    assert not ran.exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("script", ["spo_tree.py", "ppo.py", "eval.py"])
def test_a_pickle_is_read_if_it_holds_tensors_only(run_script, model_dir, script):
    status, expected, _ = run_on(run_script, model_dir, script)
    ran, tensors = model_dir.parent / "ran", load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    assert status == run_on(run_script, model_dir, script)[0] == 0
    torch.save(tensors | {"model.norm.weight": Payload(ran)}, model_dir / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        run_on(run_script, model_dir, script)
    assert not ran.exists()


# ------------------------------------------------------------------ end of sequence, padding, BOS, vocabulary
@pytest.mark.parametrize("script", ["spo_tree.py", "eval.py"])
def test_a_model_without_any_end_of_sequence(run_script, model_dir, script):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        change(model_dir / name, ["eos_token_id", "eos_token"])
    assert_error(run_on(run_script, model_dir, script), str(model_dir), "end-of-sequence")


@pytest.mark.parametrize(
    "generation, config, tokenizer, expected",
    [(2, 9, 5, [2, 5]), ([7, 2], 9, 2, [2, 7]), ([], 9, 5, [5]), (0, 9, None, [0]), (None, 9, 0, [0]),
     ("no file", 9, 5, [5, 9]), ("no file", [3, 4], None, [3, 4]), ("no file", None, 0, [0])],
)  # fmt: skip
def test_what_ends_an_answer(model_dir, generation, config, tokenizer, expected):
    """The generation config's ids, or without such a file the config's; and the tokenizer's."""
    (model_dir / "generation_config.json").unlink()
    if generation != "no file":
        (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    change(model_dir / "config.json", eos_token_id=config)
    policy = load_model(AutoModelForCausalLM, model_dir, torch.device("cpu"))
    sample, _ = load_sampler(policy, SimpleNamespace(eos_token_id=tokenizer), 384, tiny_args())
    assert sample.__wrapped__.args == (policy, expected)


SAME = {  # changes of the files that must not change a run at all
    "tokenizer without EOS": ("tokenizer_config.json", ["eos_token"], {}),
    "generation config without EOS": ("generation_config.json", ["eos_token_id"], {}),
    "no padding": ("tokenizer_config.json", ["pad_token"], {}),
    "padding is EOS": ("tokenizer_config.json", [], {"pad_token": "</s>"}),  # which is trained all the same
    "sampling flags": ("generation_config.json", [], {"do_sample": False, "temperature": 0.6, "top_p": 0.9}),
}


def test_padding_and_where_the_end_is_named_change_nothing(run_script, model_dir):
    results = []
    for file, remove, values in [("config.json", [], {}), *SAME.values()]:
        before = (model_dir / file).read_text()
        change(model_dir / file, remove, **values)
        status, _, error = run_on(run_script, model_dir, "spo_tree.py")
        assert status == 0, error
        results.append(without_times(metrics(model_dir.parent / "run")))
        (model_dir / file).write_text(before)
    assert all(result == results[0] for result in results)


def test_a_tokenizer_without_bos(model_dir):
    change(model_dir / "tokenizer_config.json", ["bos_token"])
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.bos_token_id is None and 1 not in encode_prompt(tokenizer, "plain", "1 + 1?")


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_a_vocabulary_smaller_than_the_embedding(run_script, model_dir, script):
    """Real models pad their embedding: tokens that the tokenizer does not know are sampled, and no text."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(640)
    model.save_pretrained(model_dir)
    hot = ["--temperature", 4]  # every fifth token is unknown
    status, _, error = run_on(run_script, model_dir, script, *hot)
    assert status == 0, error
    if script != "eval.py":
        sample = json.loads((model_dir.parent / "run" / "samples.jsonl").read_text())
        assert any("" in completion["tokens"] for completion in sample["completions"])


def save_gpt2(path):
    """A small random GPT-2, which has dropout, with the embedded tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, n_positions=256, n_embd=64, n_layer=2, n_head=2)
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, path)
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1


@pytest.mark.parametrize(
    "script, noise", [("spo_tree.py", "dropout"), ("ppo.py", "dropout"), ("spo_tree.py", "router noise")]
)
def test_gradient_checkpointing_trains_without_noise(run_script, tmp_path, monkeypatch, script, noise):
    """In the first step from a policy every ratio is 1: nothing is clipped, and the k3 estimate is 0."""
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: len(response) % 2 == 0)
    if noise == "dropout":
        save_gpt2(tmp_path / "model")
    else:
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, router_jitter_noise=0.3)
        save_random(config, tmp_path / "model")
    flags = [*SMALL[script], "--model", tmp_path / "model", "--no-prob-mask", "--num-epochs", 1]
    flags += ["--minibatch-size", 500, "--pack-tokens", 256]
    flags += ["--max-response-tokens", 150, "--num-questions", 16, "--num-iterations", 2]
    own = {"ppo.py": ["--critic-warmup-iterations", 1], "spo_tree.py": ["--buffer-iterations", 0]}[script]
    flags += [*own, "--learning-rate", 1e-12, "--gradient-checkpointing", "--run-dir", tmp_path / "run"]
    status, _, error = run_script(script, *flags)
    assert status == 0, error
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2])
    assert row["losses/optimizer_steps"] == 1 and row["losses/clip_fraction"] == 0
    assert row["losses/approx_kl"] < 1e-9


@pytest.mark.parametrize("lacks", [True, False])
def test_a_tensor_that_is_missing_or_has_another_shape_is_named(run_script, tmp_path, lacks):
    save_gpt2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensor = tensors.pop("transformer.h.1.mlp.c_fc.weight")
    if not lacks:
        tensors["transformer.h.1.mlp.c_fc.weight"] = tensor[:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    status, _, error = run_script("grpo.py", "--model", tmp_path, "--run-dir", tmp_path / "run")
    assert status == 1 and "h.1.mlp.c_fc.weight" in error.splitlines()[-1] and not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------- architectures
SIZES = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WINDOW = SIZES | dict(sliding_window=16)
MIXED = dict(use_sliding_window=True, max_window_layers=2)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14,
)  # fmt: skip
PACKED = {
    "a window in every layer": lambda: transformers.MistralConfig(**WINDOW),
    "a window, fused projections": lambda: transformers.Phi3Config(**WINDOW),
    "windows in some layers": lambda: transformers.Qwen2Config(**WINDOW, **MIXED),
    "two rotary bases": lambda: transformers.Gemma3TextConfig(**WINDOW, head_dim=16),
    "experts": lambda: transformers.MixtralConfig(**WINDOW, num_local_experts=4),
    "an image model's decoder": lambda: transformers.Gemma3Config(
        text_config=WINDOW | {"head_dim": 16}, vision_config=VISION
    ),
    "learned positions": lambda: transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
}
REFUSED = {
    "soft-capping": lambda: transformers.Gemma2Config(**SIZES, head_dim=16),
    "ALiBi": lambda: transformers.FalconConfig(**SIZES, alibi=True),
    "no sdpa": lambda: transformers.BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4),
    "recurrence": lambda: transformers.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2),
    "convolutions": lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2),
    "positions that begin at 2": lambda: transformers.RobertaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=260, is_decoder=True, pad_token_id=1, eos_token_id=2,
    ),
    "no mask of its own": lambda: transformers.BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=256, eos_token_id=2,
    ),
    "an encoder": lambda: transformers.BartConfig(vocab_size=512, d_model=64, encoder_layers=1),
}
TRACEBACKS = {"ALiBi": ValueError, "convolutions": IndexError}  # the model's own, at its first packed row


def save_random(config, path):
    """A random model whose next-token distributions are far from uniform, with the embedded tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, path)


FORMS = [*((name, "dense") for name in PACKED), ("windows in some layers", "flex")]


@pytest.mark.parametrize("name, attention", FORMS)
def test_packed_rows_equal_plain_sequences(tmp_path, name, attention):
    """Also behind a window of 16 tokens, and in the sampler. (FlexAttention runs forwards on a CPU.)"""
    torch._dynamo.reset()  # other tests in this process compile FlexAttention as well
    save_random(PACKED[name](), tmp_path)
    model = load_model(AutoModelForCausalLM, tmp_path, torch.device("cpu"))
    prompts = [list(range(10, 19)), list(range(20, 50))]
    sampled = sample_transformers(model, [2], prompts, 3, [60, 60], 1.0, 1.0, seed=1)
    groups = [Group(0, 1, prompt, completions) for prompt, completions in zip(prompts, sampled)]
    args = tiny_args(attention=attention, pack_tokens=256)
    score_tokens(model, groups, "old_logprobs", args)
    check_sampler(groups, 1.0, args, model.device)
    model.set_attn_implementation("eager")  # the library's own plain pass
    for group in groups:
        for completion in group.completions:
            token_ids = torch.tensor([group.context + completion.token_ids])
            with torch.no_grad():
                logprobs = model(token_ids).logits[0, len(group.context) - 1 : -1].log_softmax(-1)
            plain = logprobs.gather(1, token_ids[0, len(group.context) :, None])[:, 0]
            assert completion.old_logprobs == pytest.approx(plain.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused(tmp_path, run_script, name):
    save_random(REFUSED[name](), tmp_path)
    flags = ["--model", tmp_path, "--run-dir", tmp_path / "run"]
    if name in TRACEBACKS:
        with pytest.raises(TRACEBACKS[name]):
            run_script("grpo.py", *flags)
        assert not (tmp_path / "run").exists()
        return
    status, _, error = run_script("grpo.py", *flags)
    assert status == 1 and not (tmp_path / "run").exists()
    last = error.splitlines()[-1]
    assert last.startswith(("error: --model", "error: log-probs")) and "Traceback" not in error


def test_the_check_finds_layers_that_ignore_the_mask(tmp_path, monkeypatch):
    """The net under all of it: a window that the packed mask does not have, and nothing else knows of."""
    save_random(PACKED["a window in every layer"](), tmp_path)
    model = load_model(AutoModelForCausalLM, tmp_path, torch.device("cpu"))
    prompt = list(range(20, 50))
    (completions,) = sample_transformers(model, [2], [prompt], 3, [8], 1.0, 1.0, seed=1)
    groups = [Group(0, 1, prompt, completions)]
    model.config.sliding_window = None
    score_tokens(model, groups, "old_logprobs", tiny_args())
    with pytest.raises(SystemExit, match="log-probs of sampler and trainer differ"):
        check_sampler(groups, 1.0, tiny_args(), model.device)


@pytest.mark.parametrize("sampler, packed", [(0.0, 0.0), (-0.1, 0.0), (-0.1, -0.1)])
def test_what_the_check_before_a_run_finds(monkeypatch, sampler, packed):
    """Log-probs that are this wrong. A sampler with top-p .9 may be .105 above full distributions; of these,
    packed rows and plain sequences, none may be .1 above the other."""
    device, args = torch.device("cpu"), tiny_args(top_p=0.9)
    policy = load_model(AutoModelForCausalLM, args.model, device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problems = load_problems(str(ROOT / "tiny" / "test.jsonl"), "test", tokenizer, "plain", 256)
    sample, _ = load_sampler(policy, tokenizer, 384, args)

    def wrong_sample(*arguments):
        sampled = sample(*arguments)
        for completion in sum(sampled, []):
            completion.sampler_logprobs = [logprob + sampler for logprob in completion.sampler_logprobs]
        return sampled

    monkeypatch.setattr(spo_tree, "token_logprobs", lambda *arguments: token_logprobs(*arguments) + packed)
    if not sampler:
        spo_tree.check_model(policy, wrong_sample, problems, args, device)
        return
    with pytest.raises(SystemExit, match="differ by 0.1, more than rounding"):
        spo_tree.check_model(policy, wrong_sample, problems, args, device)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_image_models_decoder_is_trained(run_script, tmp_path, script):
    save_random(PACKED["an image model's decoder"](), tmp_path / "model")
    status, _, error = run_on(run_script, tmp_path / "model", script)
    assert status == 0, error


def test_a_tokenizer_without_a_chat_template(run_script, model_dir):
    assert_error(run_on(run_script, model_dir, "grpo.py", "--prompt-template", "chat"), str(model_dir))


def test_what_a_config_switches_on_is_not_saved_in_the_way(run_script, model_dir):
    change(model_dir / "config.json", output_attentions=True, output_hidden_states=True)
    status, _, error = run_on(run_script, model_dir, "ppo.py")
    assert status == 0 and (model_dir.parent / "run" / "model").exists(), error
