"""Segment Policy Optimization: accuracy of any checkpoint on the embedded task and on files in GSM8K's or MATH's form.

    python eval.py --model runs/NAME/model                                    # the embedded test set
    python eval.py --model realtreetune/rho-1b-sft-GSM8K --data test.jsonl --prompt-template rho --samples 16 \\
        --temperature 0.35 --max-response-tokens 1024 --paper-grading          # the paper's protocol for GSM8K

Of `--samples` answers to every question it reports pass@1 (the mean share of right answers) with a 95 % interval over the
questions, the accuracy of the majority vote, and the share of answers cut by the length limit (graded as they stand). All
answers with their verdicts go to a JSON-lines file, one line per question.
"""

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

import math_grader


@dataclass
class Args:
    model: str = "tiny/model"
    """a model directory or a name on the Hugging Face hub"""
    data: tuple[str, ...] = ("tiny/test.jsonl",)
    """one or several JSON-lines files with the columns question, answer or problem, answer; or hub names"""
    prompt_template: str = "plain"
    """plain, rho, r1, chat (the tokenizer's own), or a text that contains {question}"""
    samples: int = 4
    """answers per question"""
    temperature: float = 1.0
    """sampling temperature"""
    top_p: float = 1.0
    """nucleus of the sampler"""
    max_response_tokens: int = 128
    """length limit of an answer"""
    max_questions: int | None = None
    """evaluate only the first so many questions of each file"""
    paper_grading: bool = False
    """grade GSM8K as the authors do: the text after the last `####`, without commas, equals the gold as a string"""
    seed: int = 1
    """seed of the sampler"""
    out: str = "runs"
    """directory for the answers: <out>/eval__<model>__<data>__<time>.jsonl"""
    cpu_threads: int = 1
    """threads of torch on the CPU"""


PROMPT_TEMPLATES = {
    "plain": "{question}\n",
    "rho": "[MATH_TASK] Problem:\n{question}\n\nSolution:",
    "r1": "<｜begin▁of▁sentence｜><｜User｜>Solve the following math problem efficiently and clearly.  The last line of your response "
    "should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before answering.\n\n"
    "{question}<｜Assistant｜><think>\n",
}


@dataclass
class Problem:
    """One row of a data set: the prompt's token ids, and the gold answer with the grader that it is meant for."""

    question: str
    prompt_ids: list[int]
    gold: str
    grade: Callable[[str, str], bool]


def usage_error(message: str) -> NoReturn:
    """Ends the program with one line for the user and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def locate(name: str) -> str:
    """A path as given, or the same path beside this script (the embedded files), or else a name on the hub."""
    beside = Path(__file__).parent / name
    return str(beside) if beside.exists() and not Path(name).exists() else name


def encode_prompt(tokenizer, template: str, question: str) -> list[int]:
    """Token ids of the prompt, with exactly one BOS in front where the tokenizer has one."""
    if template == "chat":
        if tokenizer.chat_template is None:
            usage_error("--prompt-template chat: the tokenizer has no chat template")
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = PROMPT_TEMPLATES.get(template, template).replace("{question}", question)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None or token_ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id]
    return bos + token_ids


def load_config_and_tokenizer(model: str):
    """Configuration and tokenizer of a model directory or hub name; none there is a usage error."""
    try:
        return AutoConfig.from_pretrained(locate(model)), AutoTokenizer.from_pretrained(locate(model))
    except Exception as error:  # whatever a broken file or a hub without a network raises
        usage_error(f"--model {model}: no model can be read from this directory or hub name ({error!r:.300})")


def load_problems(source: str, split: str, tokenizer, template: str, max_prompt_tokens: int) -> list[Problem]:
    """Rows in the form of GSM8K (question, answer that ends in `#### N`) or MATH (problem, answer), from a file or the hub.

    Rows whose answer is empty or "None" (4 of MATH's) are dropped and counted. A row without these columns, with a gold that
    cannot be parsed, or with too long a prompt is a usage error that names file and row.
    """
    path = Path(locate(source))
    if path.exists() or path.suffix == ".jsonl":
        try:
            rows = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            usage_error(f"cannot read {path}: {error}")
    else:
        from datasets import load_dataset

        try:
            rows = load_dataset(source, "main" if source == "openai/gsm8k" else None, split=split)
        except Exception as error:  # of the hub's own kinds
            usage_error(f"{source}: neither a file nor a data set that the hub hands out ({error!r:.300})")
    problems = []
    for number, row in enumerate(rows, 1):
        try:
            row = json.loads(row) if isinstance(row, str) else row
            is_math = "problem" in row
            question, answer = row["problem" if is_math else "question"].strip(), row["answer"].strip()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            usage_error(f"{source}, row {number}: not an object with texts question and answer, or problem and answer ({error!r})")
        if answer in ("", "None"):
            continue
        gold = math_grader.math_gold(answer) if is_math else math_grader.gsm8k_gold(answer)
        if gold is None:
            usage_error(f"{source}, row {number}: no gold answer can be parsed from {answer[-60:]!r}")
        prompt_ids = encode_prompt(tokenizer, template, question)
        if len(prompt_ids) > max_prompt_tokens:
            usage_error(f"{source}, row {number}: the prompt has {len(prompt_ids)} tokens, but beside an answer of "
                        f"--max-response-tokens only {max_prompt_tokens} fit into the model's context and --pack-tokens")
        problems.append(Problem(question, prompt_ids, gold, math_grader.grade_math if is_math else math_grader.grade_gsm8k))
    if len(problems) < len(rows):
        print(f"{source}: dropped {len(rows) - len(problems)} rows without an answer", file=sys.stderr)
    return problems or usage_error(f"{source}: no rows")


@dataclass
class Completion:
    """Sampled tokens (the end-of-sequence token included), their log-probs, and whether the end was sampled."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer with room for the next tokens: DynamicLayer copies all of them for every new one."""

    room = None  # two tensors, of which keys and values are views

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if self.room is None or self.keys.data_ptr() != self.room[0].data_ptr() or end > self.room[0].shape[2]:
            self.room = [new.new_empty(*new.shape[:2], end + 32, new.shape[3]) for new in (key_states, value_states)]
            if start:  # rows were repeated or dropped since, or the room is used up
                self.room[0][:, :, :start], self.room[1][:, :, :start] = self.keys, self.values
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = key_states, value_states
        self.keys, self.values = (x[:, :, :end] for x in self.room)
        return self.keys, self.values


@torch.inference_mode()
def sample_transformers(model, eos_token_ids: list[int], prefixes: list[list[int]], n: int, max_new_tokens: list[int],
                        temperature: float, top_p: float, seed: int, max_rows: int = 256) -> list[list[Completion]]:
    """Samples `n` continuations of every prefix, at most `max_new_tokens[i]` tokens each; stops at end-of-sequence only.

    Each prefix is computed once, in left-padded batches of similar length, and its cache repeated n times; finished rows are
    dropped. Log-probs are those of the distribution sampled from: at `temperature`, renormalised over the nucleus.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    completions = [[Completion([], [], False) for _ in range(n)] for _ in prefixes]
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    prefixes_per_batch = max(max_rows // n, 1)
    for start in range(0, len(order), prefixes_per_batch):
        batch = order[start : start + prefixes_per_batch]
        lengths = torch.tensor([len(prefixes[i]) for i in batch], device=model.device)
        width = int(lengths.max())
        input_ids = torch.tensor([[0] * (width - len(prefixes[i])) + prefixes[i] for i in batch], device=model.device)
        attention_mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()  # [prefixes, width]
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                       logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits, attention_mask, position = (x.repeat_interleave(n, 0) for x in (logits, attention_mask, lengths))
        rows = [completions[i][j] for i in batch for j in range(n)]
        left = torch.tensor([max_new_tokens[i] for i in batch for _ in range(n)], device=model.device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
        while True:
            logprobs = torch.log_softmax(logits.float() / temperature, -1)  # [rows, vocabulary]
            if top_p < 1:
                sorted_probs, index = logprobs.exp().sort(-1, descending=True)
                outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the most probable token always stays
                logprobs = logprobs.masked_fill(outside.scatter(-1, index, outside), -torch.inf).log_softmax(-1)
            next_ids = torch.multinomial(logprobs.exp(), 1, generator=generator)  # [rows, 1]
            ends = torch.isin(next_ids[:, 0], torch.tensor(eos_token_ids, device=model.device))
            values = next_ids[:, 0].tolist(), logprobs.gather(-1, next_ids)[:, 0].tolist(), ends.tolist(), done.tolist()
            for row, token_id, logprob, end, was_done in zip(rows, *values):
                if not was_done:
                    row.token_ids.append(token_id)
                    row.logprobs.append(logprob)
                    row.finished = end
            left = left - 1
            done = done | ends | (left <= 0)
            if done.all():
                break
            if done.float().mean() > 0.1:  # dropping rows copies the cache: not for a few of them
                alive = (~done).nonzero()[:, 0]
                cache.batch_select_indices(alive)
                rows = [rows[i] for i in alive.tolist()]
                next_ids, attention_mask, position, left, done = (x[alive] for x in (next_ids, attention_mask, position, left, done))
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], 1)
            logits = model(next_ids, attention_mask=attention_mask, position_ids=position[:, None], past_key_values=cache).logits[:, -1]
            position = position + 1
    return completions


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
    if problem.grade is math_grader.grade_math:
        return math_grader.normalize(math_grader.last_box(response) or "")
    text = response.rpartition("####")[2].partition("\n")[0] if "####" in response else math_grader.last_box(response) or ""
    number = math_grader.find_number(text)
    return text.strip() if number is None else str(number)


def majority_correct(answers: list[str], verdicts: list[bool]) -> float:
    """Verdict on the most frequent answer; answers without a result do not vote; 1/k for one right answer among k tied ones."""
    votes = Counter(answer for answer in answers if answer)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return statistics.fmean(verdicts[answers.index(answer)] for answer in tied) if tied else 0.0


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for wrong, message in [
        (min(args.samples, args.max_response_tokens, args.cpu_threads, math.inf if args.max_questions is None else args.max_questions) < 1,
         "--samples, --max-response-tokens, --max-questions and --cpu-threads must be at least 1"),
        (args.temperature <= 0 or not 0 < args.top_p <= 1, "--temperature must be above 0, --top-p above 0 and at most 1"),
        (args.prompt_template not in ("chat", *PROMPT_TEMPLATES) and "{question}" not in args.prompt_template,
         f"--prompt-template: chat, {', '.join(PROMPT_TEMPLATES)}, or a text that contains {{question}}"),
    ]:
        if wrong:
            usage_error(message)
    torch.set_num_threads(args.cpu_threads)
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, tokenizer = load_config_and_tokenizer(args.model)
    room = config.max_position_embeddings - args.max_response_tokens
    data = {source: load_problems(source, "test", tokenizer, args.prompt_template, room)[: args.max_questions] for source in args.data}
    for source, problems in data.items():
        if args.paper_grading and any(problem.grade is not math_grader.grade_gsm8k for problem in problems):
            usage_error(f"--paper-grading is a rule for GSM8K; {source} has problems in MATH's form")
    model = AutoModelForCausalLM.from_pretrained(locate(args.model), dtype=torch.float32).to(device).eval()
    eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
    Path(args.out).mkdir(parents=True, exist_ok=True)

    table = [("data", "questions", "samples", "pass@1", "majority", "truncated", "tokens", "answers in")]
    for source, problems in data.items():
        names = "__".join((args.model.strip("/").replace("/", "-")[-60:], Path(source).stem, str(int(time.time()))))
        path = Path(args.out) / f"eval__{names}.jsonl"
        scores, majorities, truncated, lengths = [], [], [], []
        with open(path, "w", encoding="utf-8") as file:
            for start in tqdm(range(0, len(problems), 128), desc=source, disable=not sys.stderr.isatty()):
                batch = problems[start : start + 128]
                sampled = sample_transformers(model, [eos] if isinstance(eos, int) else eos, [p.prompt_ids for p in batch], args.samples,
                                              [args.max_response_tokens] * len(batch), args.temperature, args.top_p, args.seed + start)
                for problem, completions in zip(batch, sampled):
                    responses = [decode(tokenizer, completion.token_ids) for completion in completions]
                    grade = paper_gsm8k if args.paper_grading else problem.grade
                    verdicts = [grade(response, problem.gold) for response in responses]
                    scores.append(statistics.fmean(verdicts))
                    majorities.append(majority_correct([final_answer(problem, response) for response in responses], verdicts))
                    truncated += [not completion.finished for completion in completions]
                    lengths += [len(completion.token_ids) for completion in completions]
                    record = {"question": problem.question, "gold": problem.gold, "pass@1": scores[-1], "majority": majorities[-1],
                              "responses": responses, "correct": verdicts, "truncated": truncated[-len(completions) :]}
                    file.write(json.dumps(record) + "\n")
        interval = 1.96 * statistics.pstdev(scores) / math.sqrt(len(scores))
        table.append((source, str(len(problems)), str(args.samples), f"{statistics.fmean(scores):.3f} +- {interval:.3f}",
                      f"{statistics.fmean(majorities):.3f}", f"{statistics.fmean(truncated):.3f}", f"{statistics.fmean(lengths):.1f}", str(path)))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
