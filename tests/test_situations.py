"""Situations of users: directories, tokenizers, configs, data and environments that are not the usual ones."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import spo_tree
from conftest import ROOT, SCRIPTS, SMALL, tiny_args

TINY, CPU = ROOT / "tiny" / "model", torch.device("cpu")
SHORT = [*SMALL["grpo.py"], "--num-iterations", 1, "--train-data", ROOT / "tiny" / "test.jsonl"]


@pytest.fixture
def model_dir(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def change(path, **values):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rows_of(run_dir):
    return [json.loads(line) for line in open(run_dir / "metrics.jsonl")]


def begin(tmp_path, model=TINY, **flags):
    """The start of a run, as in main(), on a few problems; returns its directory, policy and tokenizer."""
    args = tiny_args(**flags)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = spo_tree.load_model(AutoModelForCausalLM, model, CPU)
    problems = [spo_tree.Problem(spo_tree.encode_prompt(tokenizer, "plain", "1 + 1?"), "2", False)]
    return spo_tree.start_run(args, None, policy, tokenizer, problems, problems), policy, tokenizer


# ------------------------------------------------------------------------------------------------ directories
def test_runs_that_begin_in_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spo_tree, "time", lambda: 1.0)
    runs = {begin(tmp_path)[0] for _ in range(3)}
    assert len(runs) == 3 and all((run / "args.json").exists() for run in runs)


def test_a_named_directory_that_exists_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match="error: --run-dir .*run exists already"):
        begin(tmp_path, run_dir=str(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())


def test_two_runs_of_one_name_are_two_runs_of_wandb(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: begun.append(options)))
    for name in ("a/lr=1:2", "b/lr=1:2", "a/seed 1"):
        begin(tmp_path, run_dir=str(tmp_path / name), track=True)
    assert len({options["id"] for options in begun}) == 3
    assert [options["name"] for options in begun] == ["lr=1:2", "lr=1:2", "seed 1"]
    assert all(set(options["id"]) <= set("0123456789abcdef") and len(options["id"]) <= 128 for options in begun)


def test_a_script_in_its_own_run_directory_and_without_write_permission(tmp_path):
    """As a user who reads the copy and runs it from there; the modules lie beside the original."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    flags = [*map(str, SHORT), "--run-dir", "run"]
    subprocess.run([sys.executable, ROOT / "grpo.py", *flags], cwd=tmp_path, check=True, capture_output=True)
    run_dir = tmp_path / "run"
    (run_dir / "grpo.py").chmod(0o444)
    resume = [sys.executable, "grpo.py", "--resume", ".", "--num-iterations", "2"]
    done = subprocess.run(resume, cwd=run_dir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(rows_of(run_dir)) == 3, done.stderr


def test_other_prompts_than_those_that_the_run_began_with(run_script, tmp_path):
    """A chat template may tell the date. The run goes on, and says so."""
    assert run_script("grpo.py", *SHORT, "--run-dir", tmp_path / "run")[0] == 0
    resume = ["--resume", tmp_path / "run", "--num-iterations", 2]
    status, output, _ = run_script("grpo.py", *resume)
    assert status == 0 and "the prompts are not those" not in output
    status, output, _ = run_script("grpo.py", *resume, "--prompt-template", "Today: {question}\n")
    assert status == 0 and output.count("the prompts are not those") == 1


# ------------------------------------------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("script", ["grpo.py", "eval.py"])
def test_a_tokenizer_that_loses_spaces_ends_the_run(run_script, model_dir, tmp_path, script):
    """A byte-level tokenizer under the name of another class, of which transformers takes the rules."""
    change(model_dir / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    own = [*SHORT, "--run-dir", tmp_path / "run"] if script == "grpo.py" else ["--out", tmp_path / "run"]
    status, _, error = run_script(script, "--model", model_dir, *own)
    assert status == 1 and error.startswith("error: the tokenizer loses white space")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_changes_more_is_reported(capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for question, reported in (("Two pens.", False), ("Two  pens\n\n?", False), ("Zwei Füße 答案?", None)):
        prompt_ids = spo_tree.encode_prompt(tokenizer, "plain", question)
        lost = question not in tokenizer.decode(prompt_ids)
        spo_tree.check_prompt(prompt_ids, question, tokenizer)
        assert ("the tokenizer changes the first prompt" in capsys.readouterr().out) == lost
        assert reported is None or lost == reported
    spo_tree.check_prompt(prompt_ids, "Another question", tokenizer)
    assert "the tokenizer changes the first prompt" in capsys.readouterr().out


def test_what_is_graded_is_behind_the_thought():
    """Also where </think> is a special token, which decoding leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problem = spo_tree.Problem([], "3", False)
    texts = {"#### 4</think>\n#### 3": True, "#### 3</think>\n#### 4": False, "#### 3</think>": False, "#### 3": True}
    texts |= {"#### 3</think></think>": False, "4</think>5</think>#### 3": True}
    for special in (False, True):
        if special:
            tokenizer.add_tokens(["</think>"], special_tokens=True)
        for text, right in texts.items():
            token_ids = tokenizer(text + "</s>", add_special_tokens=False).input_ids
            assert spo_tree.grade_answer(problem, tokenizer, token_ids)[0] is right, (text, special)


# ---------------------------------------------------------------------------------------- configs and weights
GENERATION = [
    ({"early_stopping": True}, {"early_stopping"}),
    ({"length_penalty": 0.5, "temperature": 0.6, "top_p": 0.95}, {"length_penalty"}),
    ({"output_attentions": True}, {"output_attentions"}),
    ({"pad_token_id": -1, "repetition_penalty": 1.1}, {"pad_token_id"}),
    ({"do_sample": False, "temperature": 0.7, "max_new_tokens": 99}, set()),
]


@pytest.mark.parametrize("values, dropped", GENERATION)
def test_what_cannot_be_saved_is_left_out_before_training(model_dir, tmp_path, capsys, values, dropped):
    change(model_dir / "generation_config.json", **values)
    run_dir, policy, tokenizer = begin(tmp_path, model_dir, run_dir=str(tmp_path / "run"))
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be saved" in line]
    assert len(said) == len(dropped) and all(f": {name} " in line for name, line in zip(dropped, said))
    spo_tree.save(run_dir / "model", policy, tokenizer)
    saved = json.loads((run_dir / "model" / "generation_config.json").read_text())
    kept = {name: value for name, value in values.items() if name not in dropped} | {"do_sample": True}
    assert {name: saved[name] for name in kept} == kept and not dropped & {k for k in saved if saved[k] == values.get(k)}


CONFIGS = [{"output_attentions": True}, {"return_dict": False}, {"eos_token_id": -1}, {"pad_token_id": 7}]


@pytest.mark.parametrize("values", CONFIGS)
def test_configs_that_change_nothing(run_script, model_dir, tmp_path, values):
    rows = []
    for name in ("before", "after"):
        status, _, error = run_script("grpo.py", *SHORT, "--model", model_dir, "--run-dir", tmp_path / name)
        assert status == 0, error
        rows.append({k: v for k, v in rows_of(tmp_path / name)[1].items() if not k.startswith("time/")})
        change(model_dir / "config.json", **values)
    assert rows[0] == rows[1]


def test_the_padding_token_is_trained_like_any_other(model_dir):
    change(model_dir / "config.json", pad_token_id=7, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.config.tie_word_embeddings = False
    config = AutoConfig.from_pretrained(model_dir)
    untied = AutoModelForCausalLM.from_config(config)
    untied.save_pretrained(model_dir)
    model = spo_tree.load_model(AutoModelForCausalLM, model_dir, CPU)
    model(torch.tensor([[1, 7, 9]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[7].norm() > 0


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("script", ["grpo.py", "eval.py"])
@pytest.mark.parametrize("spoil", [
    lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    cut_in_half,
])  # fmt: skip
def test_weights_that_are_not_there_yet(run_script, model_dir, tmp_path, script, spoil):
    spoil(model_dir / "model.safetensors")
    own = [*SHORT, "--run-dir", tmp_path / "run"] if script == "grpo.py" else ["--out", tmp_path / "run"]
    status, _, error = run_script(script, "--model", model_dir, *own)
    assert status == 1 and error.splitlines()[-1].startswith(f"error: --model {model_dir}: SafetensorError")


def test_vllm_and_experts():
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2), state_dict=lambda: {"experts.up": 0})
    with pytest.raises(SystemExit, match="experts"):
        spo_tree.load_sampler(policy, SimpleNamespace(eos_token_id=2), 64, tiny_args(sampler="vllm"))


# ------------------------------------------------------------------------------------------- data, evaluation
def test_columns_that_are_not_used_are_not_read(tmp_path):
    rows = [{"question": f"{k} + 1?", "answer": f"#### {k + 1}", "other": "x" * 1000} for k in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data").mkdir()
    shutil.move(tmp_path / "train.jsonl", tmp_path / "data")
    read = list(spo_tree.read_rows(str(tmp_path / "data"), "train"))  # a directory, by its absolute path
    assert [set(row) for row in read] == [{"question", "answer"}] * 3


def test_the_printed_command_evaluates_what_the_run_did(run_script, tmp_path):
    data, template = tmp_path / "own data.jsonl", "Q: {question} \"A\":\n"
    rows = [{"question": f"{k} + 1?", "answer": f"#### {k + 1}"} for k in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--train-data", data, "--prompt-template", template, "--eval-temperature", 0.5]
    own += [*SMALL["grpo.py"], "--num-iterations", 1, "--max-response-tokens", 20]
    for test_data in ([], ["--test-data", data]):
        run_dir = tmp_path / f"run{len(test_data)}"
        _, output, _ = run_script("grpo.py", *own, *test_data, "--run-dir", run_dir)
        line = output.partition("evaluate it: python ")[2]
        assert ("held out" in line) == (not test_data)
        words = shlex.split(line.partition(" (")[0])
        assert words[words.index("--prompt-template") + 1] == template and words[words.index("--data") + 1] == str(data)
        assert words[words.index("--temperature") + 1] == "0.5"
        status, table, error = run_script(*words, "--out", tmp_path / "eval")
        assert status == 0 and table.splitlines()[1].split()[:4] == ["own", "data.jsonl", "-", "12"], error


@pytest.mark.parametrize("preset, protocol", [("gsm8k", "gsm8k"), ("math", "long")])
def test_the_printed_command_of_a_preset(tmp_path, monkeypatch, capsys, preset, protocol):
    monkeypatch.setattr(spo_tree, "save", lambda *_: None)
    row = {"eval/accuracy": 0.5, "eval/accuracy_ci95": 0.1, "rollout/generated_tokens_total": 9, "time/elapsed_s": 1}
    (tmp_path / "metrics.jsonl").write_text(f'{json.dumps(row)}\n{{"iteration": 1}}\n')  # one that ended early
    spo_tree.finish(tmp_path, None, None, spo_tree.PRESETS[preset])
    assert f"eval.py --model {tmp_path}/model --protocol {protocol} (" in capsys.readouterr().out


def test_learned_positions_and_prompts_of_different_length(run_script, tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, n_positions=256, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--budgets", 128, 256, "--max-questions", 5, "--samples", 2]
    status, output, error = run_script("eval.py", *flags, "--out", tmp_path / "out")
    assert status == 0 and len(output.splitlines()) == 3, error


def test_two_files_of_one_name(run_script, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "tiny" / "test.jsonl", tmp_path / name / "test.jsonl")
    data = [str(tmp_path / name / "test.jsonl") for name in ("a", "b")]
    status, output, _ = run_script("eval.py", "--data", *data, "--max-questions", 2, "--out", tmp_path / "out")
    assert status == 0 and [line.split()[0] for line in output.splitlines()[1:]] == [path[-14:] for path in data]


# ----------------------------------------------------------------------------------------------- environments
def test_a_terminal_that_cannot_print_a_prompt(tmp_path):
    command = [sys.executable, ROOT / "grpo.py", *map(str, SHORT), "--run-dir", "run", "--prompt-template", "｜{question}"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"\\uff5c" in done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_world_size_that_is_left_over(run_script, monkeypatch, script):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = run_script(script)
    assert status == 1 and error.startswith("error: WORLD_SIZE is set, but no MASTER_ADDR") and error.count("\n") == 1
