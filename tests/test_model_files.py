"""Models as files from elsewhere: what they contain never runs, and tokenizers without this or that work or give one clear line."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import encode_prompt, end_of_sequence
from test_cli import assert_usage_error
from test_run import metrics, without_times

FEW = ["--train-data", "tiny/test.jsonl", "--num-iterations", 1]  # flags that make a run shorter still
CODE = "from transformers import LlamaConfig as {0}, LlamaForCausalLM as {1}, LlamaTokenizer as {2}\nopen({3!r}, 'w').close()\n"


@pytest.fixture
def model_dir(tmp_path):
    return shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")


def change(path, remove=(), **values):
    """Changes or removes keys of a JSON file."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def run_on(run_script, model_dir, script="grpo.py", *flags):
    run_dir = model_dir.parent / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    return run_script(script, *SMALL[script], *FEW, "--model", model_dir, "--run-dir", run_dir, *flags)


# ------------------------------------------------------------------------------------------------------ nothing in it is executed
def test_every_call_refuses_remote_code():
    for script in [*SCRIPTS, "eval.py"]:
        source = (ROOT / script).read_text()
        assert source.count("trust_remote_code") == source.count("trust_remote_code=False") == source.count("from_pretrained(") >= 3


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_code_of_a_model_is_refused_without_a_question(run_script, model_dir, monkeypatch, script):
    """transformers asks at a terminal whether to run such code, and runs it after a y."""
    ran = model_dir.parent / "ran"
    (model_dir / "code.py").write_text(CODE.format("Config", "Model", "Tokenizer", str(ran)))
    change(model_dir / "config.json", model_type="own",
           auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert_usage_error(run_script(script, "--model", model_dir), "--model", str(model_dir), "custom code")
    assert not ran.exists()


def test_code_beside_a_known_architecture_is_ignored(run_script, model_dir, monkeypatch):
    ran = model_dir.parent / "ran"
    (model_dir / "code.py").write_text(CODE.format("Config", "Model", "Tokenizer", str(ran)))
    change(model_dir / "config.json",
           auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"})
    change(model_dir / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert run_on(run_script, model_dir, "ppo.py", "--kl-coef", 0.1)[0] == 0  # loads policy, critic and reference
    assert not ran.exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_a_pickle_that_holds_more_than_tensors_is_refused(run_script, model_dir, script):
    ran, tensors = model_dir.parent / "ran", load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    torch.save(tensors | {"model.norm.weight": Payload(ran)}, model_dir / "pytorch_model.bin")
    data = ["--data"] if script == "eval.py" else ["--train-data"]
    assert_usage_error(run_script(script, "--model", model_dir, *data, "tiny/test.jsonl"), "weights", str(model_dir))
    assert not ran.exists()


def test_a_pickle_of_tensors_is_read(run_script, model_dir):
    assert run_on(run_script, model_dir)[0] == 0
    expected = without_times(metrics(model_dir.parent / "run"))
    torch.save(load_file(model_dir / "model.safetensors"), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()
    assert run_on(run_script, model_dir)[0] == 0
    assert without_times(metrics(model_dir.parent / "run")) == expected


# ---------------------------------------------------------------------------------------- end of sequence, padding, BOS, vocabulary
def without_end(model_dir):
    """No token that ends an answer, in any file."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        change(model_dir / name, ["eos_token_id", "eos_token"])


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_a_model_without_any_end_of_sequence(run_script, model_dir, script):
    without_end(model_dir)
    data = ["--data"] if script == "eval.py" else ["--train-data"]
    assert_usage_error(run_script(script, "--model", model_dir, *data, "tiny/test.jsonl"), "--model", str(model_dir),
                       "end-of-sequence")
    assert not (model_dir.parent / "run").exists()


@pytest.mark.parametrize("config, tokenizer, expected",
                         [(2, 5, [2]), ([2, 7], 5, [2, 7]), (None, 5, [5]), ([], 5, [5]), (0, 5, [0]), (None, 0, [0])])
def test_the_generation_config_names_the_end_and_else_the_tokenizer(config, tokenizer, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=config))
    assert end_of_sequence(model, SimpleNamespace(eos_token_id=tokenizer, name_or_path="")) == expected


SAME = {  # changes of the files that must not change a run at all
    "tokenizer without EOS": ("tokenizer_config.json", ["eos_token"], {}),
    "generation config without EOS": ("generation_config.json", ["eos_token_id"], {}),
    "no padding": ("tokenizer_config.json", ["pad_token"], {}),
    "padding is EOS": ("tokenizer_config.json", [], {"pad_token": "</s>"}),
    "sampling flags": ("generation_config.json", [], {"do_sample": False, "temperature": 0.6, "top_p": 0.9}),  # not allowed, and common
}


@pytest.mark.parametrize("script", ["spo_tree.py", "ppo.py"])
def test_padding_and_where_the_end_is_named_change_nothing(run_script, model_dir, script):
    """Also the sampled end-of-sequence token is trained where it serves as padding as well."""
    assert run_on(run_script, model_dir, script)[0] == 0
    expected = without_times(metrics(model_dir.parent / "run"))
    for file, remove, values in SAME.values():
        before = (model_dir / file).read_text()
        change(model_dir / file, remove, **values)
        status, _, error = run_on(run_script, model_dir, script)
        assert status == 0, error
        assert without_times(metrics(model_dir.parent / "run")) == expected
        (model_dir / file).write_text(before)


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_a_model_without_bos(run_script, model_dir, script):
    change(model_dir / "tokenizer_config.json", ["bos_token"])
    for name in ("config.json", "generation_config.json"):
        change(model_dir / name, bos_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.bos_token_id is None and 1 not in encode_prompt(tokenizer, "plain", "1 + 1?")
    if script == "eval.py":
        status, output, _ = run_script(script, "--model", model_dir, "--max-questions", 2, "--out", model_dir.parent)
    else:
        status, output, _ = run_on(run_script, model_dir, script)
    assert status == 0 and "accuracy" in output or "pass@1" in output


@pytest.mark.parametrize("script", [*SCRIPTS, "eval.py"])
def test_a_vocabulary_smaller_than_the_embedding(run_script, model_dir, script):
    """Real models pad their embedding: a token that the tokenizer does not know can be sampled, and is no text."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(640)
    model.save_pretrained(model_dir)
    hot = ["--model", model_dir, "--temperature", 4]  # almost uniform: every fifth token is unknown
    if script == "eval.py":
        status, output, _ = run_script(script, *hot, "--max-questions", 2, "--out", model_dir.parent)
        assert status == 0 and "pass@1" in output
    else:
        assert run_on(run_script, model_dir, script, *hot)[0] == 0
        tokens = json.dumps(json.loads((model_dir.parent / "run" / "samples.jsonl").read_text())["tree"]["children"])
        assert '""' in tokens
