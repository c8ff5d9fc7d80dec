"""Models as files from elsewhere: none of their code runs, what they lack is named, packed rows are right."""

import io
import json
import pickle
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spo_tree
from conftest import ROOT, SMALL, tiny_args
from spo_tree import Group, check_sampler, load_model, load_sampler, load_trained, policy_step
from spo_tree import sample_transformers, score_tokens
from test_run import metrics, same_weights, samples, without_times

CPU = torch.device("cpu")


@pytest.fixture
def model_dir(tmp_path):
    return shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")


def change(path, **values):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def train(run_script, script, model, run_dir, *flags):
    """A run of one iteration on a model; returns what it prints."""
    few = [*SMALL[script], "--train-data", "tiny/test.jsonl", "--num-iterations", 1, "--run-dir", run_dir]
    status, output, error = run_script(script, *few, "--model", model, *flags)
    assert status == 0, error
    return output


@pytest.mark.parametrize("script, place", [("spo_tree.py", "--run-dir"), ("eval.py", "--out")])
def test_code_of_a_model_is_refused_without_a_question(run_script, model_dir, monkeypatch, script, place):
    """transformers asks at a terminal whether to run such code, and runs it after a y."""
    ran = model_dir.parent / "ran"
    code = "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    (model_dir / "code.py").write_text(f"{code}open({str(ran)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(model_dir / "config.json", model_type="own", auto_map=auto_map)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    status, _, error = run_script(script, "--model", model_dir, place, model_dir.parent / "run")
    assert status == 1 and error.startswith(f"error: --model {model_dir}") and "custom code" in error
    assert error.count("\n") == 1 and not ran.exists()


def test_a_pickle_that_holds_more_than_tensors_is_refused(model_dir):
    """It could run code."""
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    load_model(AutoModelForCausalLM, model_dir, CPU)
    torch.save(tensors | {"model.norm.weight": model_dir}, model_dir / "pytorch_model.bin")
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        load_model(AutoModelForCausalLM, model_dir, CPU)


TENSOR = "model.layers.1.mlp.up_proj.weight"
SPOILED = {  # weights, and what is said of them
    "one is missing": (lambda tensors: tensors.pop(TENSOR), TENSOR),
    "one has another shape": (lambda tensors: tensors.update({TENSOR: torch.zeros(3, 4)}), TENSOR),
    "a pointer of git-lfs": (lambda tensors: None, "SafetensorError"),
}


@pytest.mark.parametrize("script, place", [("grpo.py", "--run-dir"), ("eval.py", "--out")])
@pytest.mark.parametrize("name", SPOILED)
def test_weights_that_are_not_there(run_script, model_dir, script, place, name):
    file, (spoil, word) = model_dir / "model.safetensors", SPOILED[name]
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if word == "SafetensorError":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    status, _, error = run_script(script, "--model", model_dir, place, model_dir.parent / "run")
    last = error.splitlines()[-1]
    assert status == 1 and last.startswith(f"error: --model {model_dir}") and word in last
    assert not (model_dir.parent / "run").exists()


@pytest.mark.parametrize("generation, tokenizer, expected", [
    (2, 5, [2, 5]), ([7, 2], 2, [2, 7]), (None, 0, [0]), ("no file", 5, [5, 9]), (None, None, None),
])  # fmt: skip
def test_what_ends_an_answer(model_dir, generation, tokenizer, expected):
    """The generation config's ids, or without such a file the config's; and the tokenizer's."""
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if generation == "no file":
        (model_dir / "generation_config.json").unlink()
    change(model_dir / "config.json", eos_token_id=9)
    policy = load_model(AutoModelForCausalLM, model_dir, CPU)
    tokenizer = SimpleNamespace(eos_token_id=tokenizer)
    if expected:
        sample, _ = load_sampler(policy, tokenizer, 384, tiny_args())
        assert sample.__wrapped__.args == (policy, expected)
    else:
        with pytest.raises(SystemExit, match="no end-of-sequence token"):
            load_sampler(policy, tokenizer, 384, tiny_args())


def test_experts_cannot_be_handed_to_vllm():
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2), state_dict=lambda: {"experts.up": 0})
    with pytest.raises(SystemExit, match="experts"):
        load_sampler(policy, SimpleNamespace(eos_token_id=2), 64, tiny_args(sampler="vllm"))


CHANGES = [  # of the files, which must not change a run at all
    {
        "tokenizer_config.json": {"eos_token": None, "pad_token": None},
        "config.json": {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    },
    {
        "tokenizer_config.json": {"pad_token": "</s>"},  # which is trained all the same
        "config.json": {"pad_token_id": 7, "eos_token_id": -1},
        "generation_config.json": {
            "eos_token_id": None, "do_sample": False, "temperature": 0.6, "early_stopping": True,
        },
    },
]  # fmt: skip


def test_configs_that_change_nothing(run_script, model_dir, tmp_path):
    """What transformers would not save is left out before the training, and the run says so."""
    own = ["--critic-warmup-iterations", 0]
    train(run_script, "ppo.py", model_dir, tmp_path / "unchanged", *own)
    expected = without_times(metrics(tmp_path / "unchanged"))
    for number, changes in enumerate(CHANGES):
        changed, run_dir = tmp_path / f"model{number}", tmp_path / f"run{number}"
        shutil.copytree(model_dir, changed)
        for file, values in changes.items():
            change(changed / file, **values)
        output = train(run_script, "ppo.py", changed, run_dir, *own)
        assert without_times(metrics(run_dir)) == expected
        assert same_weights(run_dir / "model", tmp_path / "unchanged" / "model")
    saved = json.loads((run_dir / "model" / "generation_config.json").read_text())
    assert output.count("cannot be saved") == 1 and ": early_stopping " in output
    assert saved["temperature"] == 0.6 and saved["do_sample"] and not saved.get("early_stopping")


def test_a_vocabulary_smaller_than_the_embedding(run_script, model_dir, tmp_path):
    """Real models pad it: tokens that the tokenizer does not know are sampled, and have no text."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(640)
    model.save_pretrained(model_dir)
    train(run_script, "grpo.py", model_dir, tmp_path / "run", "--temperature", 4)
    assert any("" in completion["tokens"] for completion in samples(tmp_path / "run")["completions"])


SIZES = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WINDOW = SIZES | dict(sliding_window=16)
PACKED = {
    "a window in every layer": lambda: transformers.MistralConfig(**WINDOW),
    "windows in some layers": lambda: transformers.Qwen2Config(
        **WINDOW, use_sliding_window=True, max_window_layers=2
    ),
    "windows, two rotary bases": lambda: transformers.Gemma3TextConfig(**WINDOW, head_dim=16),
    "experts": lambda: transformers.MixtralConfig(
        **WINDOW, num_local_experts=4, router_jitter_noise=0.3, output_router_logits=True
    ),
    "learned positions": lambda: transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
}
REFUSED = {
    "soft-capping": lambda: transformers.Gemma2Config(**SIZES, head_dim=16),
    "positions that begin at 2": lambda: transformers.RobertaConfig(
        **SIZES | dict(num_hidden_layers=2, max_position_embeddings=260, pad_token_id=1), is_decoder=True
    ),
}


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


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_equal_plain_sequences(tmp_path, name):
    """Also behind a window of 16 tokens, in the sampler, and in a step: no dropout, no noise of a router."""
    save_random(PACKED[name](), tmp_path)
    args = tiny_args(pack_tokens=256, gradient_checkpointing=True, prob_mask=False)
    model = load_trained(AutoModelForCausalLM, tmp_path, args, CPU)
    prompts = [list(range(10, 19)), list(range(20, 50))]
    sampled = sample_transformers(model, [2], prompts, 3, [60, 60], 1.0, 1.0, seed=1)
    groups = [Group(0, 1, prompt, completions) for prompt, completions in zip(prompts, sampled)]
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
            completion.advantages = [1.0] * len(completion.token_ids)
    step = policy_step(model, torch.optim.SGD(model.parameters(), lr=0.0), groups, args)
    assert step["losses/clip_fraction"] == 0 and step["losses/approx_kl"] < 1e-9 < step["losses/grad_norm"]


def test_what_the_check_before_a_run_finds(monkeypatch):
    """A sampler with top-p .9 may be .105 above full distributions; packed rows and plain sequences agree."""
    args, right = tiny_args(top_p=0.9), spo_tree.token_logprobs
    policy = load_model(AutoModelForCausalLM, args.model, CPU)
    problems, sample = [spo_tree.Problem([1, 30, 40, 50], "2", False)], partial(sample_transformers, policy, [2])
    spo_tree.check_model(policy, sample, problems, args, CPU)

    def wrong_sample(*arguments):
        sampled = sample(*arguments)
        for completion in sampled[0]:
            completion.sampler_logprobs = [logprob - 0.1 for logprob in completion.sampler_logprobs]
        return sampled

    with pytest.raises(SystemExit, match="sampler and trainer differ"):
        spo_tree.check_model(policy, wrong_sample, problems, args, CPU)
    monkeypatch.setattr(spo_tree, "token_logprobs", lambda *arguments: right(*arguments) - 0.1)
    with pytest.raises(SystemExit, match="differ by 0.1"):  # now it is the plain sequences that differ
        spo_tree.check_model(policy, wrong_sample, problems, args, CPU)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused(tmp_path, run_script, name):
    save_random(REFUSED[name](), tmp_path)
    status, _, error = run_script("grpo.py", "--model", tmp_path, "--run-dir", tmp_path / "run")
    assert status == 1 and not (tmp_path / "run").exists()
    assert error.splitlines()[-1].startswith(("error: --model", "error: log-probs"))
