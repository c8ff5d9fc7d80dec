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

import json
import os
import random
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, multimode, pstdev
from typing import Literal

import torch
import transformers
import tyro
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import math_grader

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded model and data


@dataclass
class Args:
    protocol: Literal["tiny", "gsm8k", "long"] = "tiny"  # settings to start from; other flags override them
    model: str = f"{TINY}/model"  # a run, a model directory or a name on the Hugging Face hub
    data: tuple[str, ...] = ("tiny",)  # tiny, gsm8k, math500, aime24, or JSON lines like GSM8K's or MATH's
    prompt_template: str = "plain"  # plain, rho, r1, chat (the tokenizer's own) or a text with {question}
    samples: int = 4  # answers per question
    temperature: float = 1.0  # sampling temperature; 0: greedy
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
    "gsm8k": Args(
        model="realtreetune/rho-1b-sft-GSM8K", data=("gsm8k",), prompt_template="rho", samples=16,
        temperature=0.35, max_response_tokens=1024,
    ),
    "long": Args(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", data=("math500", "aime24"), samples=1,
        prompt_template="chat", temperature=0.6, top_p=0.95, budgets=(2048, 4096, 32768),
    ),
}
DATA = {"tiny": f"{TINY}/test.jsonl", "gsm8k": "openai/gsm8k"}
DATA |= {"math500": "HuggingFaceH4/MATH-500", "aime24": "HuggingFaceH4/aime_2024"}
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
class Problem:
    prompt_ids: list[int]
    gold: str  # the right answer
    is_math: bool  # graded as MATH's answers, by the last box; else as GSM8K's, by the line #### N


def read_rows(source, split):
    """The lines of a file of JSON lines, as bytes, or the rows of a data set on the hub or in a directory."""
    try:
        if Path(source).suffix in (".json", ".jsonl", ".csv", ".parquet") or Path(source).is_file():
            return filter(bytes.strip, open(source, "rb"))
        from datasets import load_dataset
        rows = load_dataset(source, "main" if source == "openai/gsm8k" else None, split=split)
        used = {"question", "problem", "answer"} & set(rows.column_names)
        return rows.select_columns(sorted(used))
    except (OSError, ValueError) as error:
        sys.exit(f"error: data {source}: {' '.join(str(error).split()):.300}")


def encode_prompt(tokenizer, template, question):
    """Token ids of the prompt: the chat template's, or the text's after one BOS, if the tokenizer has any."""
    text = PROMPT_TEMPLATES.get(template, template).replace("{question}", question)
    if template == "chat":
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return token_ids if token_ids[:1] == bos else bos + token_ids


def check_prompt(prompt_ids, question, tokenizer):
    """Ends the program if the tokenizer loses the white space of a question; any other change is reported."""
    text = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
    if "".join(question.split()) not in "".join(text.split()):
        print(f"the tokenizer changes the first prompt to {text!r:.300}")
    elif question not in text:
        sys.exit(f"error: the tokenizer loses white space: the first prompt becomes {text!r:.300}")


def load_problems(source, split, tokenizer, template, max_prompt_tokens):
    """A problem for each row in GSM8K's form (question, answer with `#### N`) or MATH's (problem, answer).

    None for a row with a longer prompt, or with the answer "", "None" (4 of MATH's) or NaN.
    """
    problems = []
    for number, row in enumerate(read_rows(source, split), 1):
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            question = row["problem"] if "problem" in row else row["question"]
            answer = str(row["answer"]).strip()
            is_math = "problem" in row and "####" not in answer
            gold = math_grader.math_gold(answer) if is_math else math_grader.gsm8k_gold(answer)
            has_answer = gold is not None or answer in ("", "None", "nan")
            if not has_answer or not question.strip() or isinstance(row["answer"], bool | list | dict):
                raise ValueError
            prompt_ids = encode_prompt(tokenizer, template, question.strip())
            if number == 1:
                check_prompt(prompt_ids, question.strip(), tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wanted = "JSON lines with question or problem, and answer with a gold answer (#### 7)"
            sys.exit(f"error: {source}, row {number}: wanted are {wanted}, not {row!r:.200}")
        is_dropped = gold is None or len(prompt_ids) > max_prompt_tokens
        problems.append(None if is_dropped else Problem(prompt_ids, gold, is_math))
    if None in problems:
        print(f"{source}: {problems.count(None)} rows without answer or with over {max_prompt_tokens} tokens")
    return problems


def answer_text(tokenizer, token_ids):
    """The text that is graded: behind the last </think>, which as a special token would not be in it."""
    think_end = tokenizer.get_added_vocab().get("</think>")
    while think_end in token_ids:
        token_ids = token_ids[token_ids.index(think_end) + 1 :]
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def grade_answer(problem, tokenizer, token_ids):
    """(right, readable): the verdict on sampled tokens, and whether there is a final answer to grade."""
    text = answer_text(tokenizer, token_ids)
    if problem.is_math:
        right, final = math_grader.grade_math(text, problem.gold), math_grader.last_box(text)
    else:
        right, final = math_grader.grade_gsm8k(text, problem.gold), math_grader.gsm8k_value(text)
    return right, final is not None


def end_tokens(name, config, tokenizer):
    """Token ids that end an answer: generation_config.json's (else config.json's) and the tokenizer's."""
    with suppress(OSError):  # which is raised if the model has no such file
        config = GenerationConfig.from_pretrained(name)
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({tokenizer.eos_token_id, *ids} - {None, -1})
    return ids or sys.exit(f"error: --model {name} has no end-of-sequence token")


def start_engine(args, eos_token_ids, context_length):
    """A function from prompts and the most tokens of their answers to answers, their ends included."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    options = dict(temperature=args.temperature, top_p=args.top_p)

    def generate_vllm(prompts, limits):
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [SamplingParams(max_tokens=limit, **options) for limit in limits]
        requests = engine.generate(inputs, params, use_tqdm=False)
        return [[output.token_ids for output in request.outputs] for request in requests]

    def generate(prompts, limits):
        """One batch for each limit: in a shared one, a longer prompt would run out of learned positions."""
        sampled = {}
        for limit in sorted(set(limits)):
            batch = [i for i, own in enumerate(limits) if own == limit]
            padded = pad_sequence([torch.tensor(prompts[i]) for i in batch], True, -1, "left").to(device)
            lengths = dict(attention_mask=padded >= 0, max_new_tokens=limit)
            output = engine.generate(padded.clamp(min=0), **lengths, **options)[:, padded.shape[1] :]
            sampled |= zip(batch, output.view(len(batch), args.samples, -1).tolist())
        for answer in sum(sampled.values(), []):
            while len(answer) > 1 and answer[-2] in eos_token_ids:  # the last one is padding
                answer.pop()
        return [sampled[i] for i in range(len(prompts))]

    if args.sampler == "vllm" or args.sampler == "auto" and device == "cuda" and find_spec("vllm"):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it needs nvcc
        from vllm import LLM, SamplingParams
        options |= dict(n=args.samples, stop_token_ids=eos_token_ids, detokenize=False)
        engine_options = dict(enforce_eager=True)
        if device == "cuda":  # graphs of single steps without a compilation, as in the training scripts
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "max_cudagraph_capture_size": 256}
            engine_options = dict(compilation_config=graphs)
        engine = LLM(args.model, dtype=dtype, max_model_len=context_length, **engine_options)
        return generate_vllm
    options |= dict(do_sample=True, top_k=0, num_return_sequences=args.samples)
    options |= dict(eos_token_id=eos_token_ids, pad_token_id=eos_token_ids[0])
    load = dict(dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        engine, loading = AutoModelForCausalLM.from_pretrained(args.model, **load)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        sys.exit(f"error: --model {args.model}: {type(error).__name__}: {' '.join(str(error).split()):.300}")
    if invented := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        sys.exit(f"error: --model {args.model} lacks weights, or they have another shape: {invented[:3]}")
    engine.generation_config = GenerationConfig()  # else a model's repetition penalty would apply
    engine.to(device).eval()
    return generate


def paper_gsm8k(response, gold):
    """The authors' rule (src/treetune/tasks/gsm8k.py:42-51, 144-159): a gold with a comma matches nothing."""
    _, marker, answer = response.rpartition("####")
    return marker != "" and answer.strip().replace(",", "") == gold


def final_answer(problem, response):
    """What two answers must share to count as one vote: the number or box that is graded, or ""."""
    answer = (math_grader.last_box if problem.is_math else math_grader.gsm8k_value)(response)
    return "" if answer is None else math_grader.normalize(str(answer))


def majority_correct(answers, verdicts):
    """Verdict on the most frequent answer; "" does not vote; 1/k for one right answer among k tied ones."""
    tied = multimode(filter(None, answers))
    return fmean(verdicts[answers.index(answer)] for answer in tied) if tied else 0.0


def main():
    first, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)
    args = tyro.cli(Args, default=PROTOCOLS[first.protocol], description=__doc__)
    args.temperature = args.temperature or 1e-6  # 0 is greedy
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0 and name != "seed" or name == "top_p" and value > 1:
            sys.exit(f"error: --{name.replace('_', '-')} {value} is out of range")
    template = PROMPT_TEMPLATES.get(args.prompt_template, args.prompt_template)
    if "{question}" not in template or "\\n" in template:  # which the shell leaves as two characters
        sys.exit("error: --prompt-template is plain, chat, rho, r1 or a text with {question}, without \\n")
    torch.set_num_threads(args.cpu_threads)
    transformers.utils.logging.disable_progress_bar()
    models = [*sorted(Path(args.model).glob("checkpoints/[0-9]?????")), *Path(args.model).glob("model")]
    if models and Path(args.model, "args.json").exists():
        args.model = str(models[-1])
        print(f"the run's model: {args.model}", file=sys.stderr)
    try:  # trust_remote_code=False: by default, transformers offers to run a model's own code
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        encode_prompt(tokenizer, args.prompt_template, "1 + 1?")
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {args.model} (directory or hub): {' '.join(str(error).split()):.300}")
    context_length = getattr(config.get_text_config(), "max_position_embeddings", 2048)
    budgets = args.budgets or (context_length,)
    longest = max(budgets)
    if min(budgets) < 1 or longest > context_length:
        sys.exit(f"error: --budgets {longest}: the context has {context_length} tokens")
    data = {}
    for name in args.data:
        source, split = DATA.get(name, name), "train" if name == "aime24" else "test"  # the only one it has
        problems = load_problems(source, split, tokenizer, args.prompt_template, longest - 1)
        data[name] = [problem for problem in problems if problem][: args.max_questions]
        if not data[name]:
            sys.exit(f"error: --data {name}: there is no problem to answer")
        if args.paper_grading and any(problem.is_math for problem in data[name]):
            sys.exit(f"error: --paper-grading is a rule for GSM8K; {name} has problems in MATH's form")
    # New weights under an old name: other files in a directory, another .../snapshots/COMMIT/... of the hub.
    weights = [(file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(args.model).glob("*"))]
    weights.append(transformers.utils.cached_file(args.model, "config.json"))
    eos_token_ids = end_tokens(args.model, config, tokenizer)
    sample = start_engine(args, eos_token_ids, longest)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    names = f"pass@1 pass@{args.samples} majority distinct cut no_answer tokens".split()
    print(f"{'data':<14}  budget  questions  pass@1        " + "".join(f"{name:>10}" for name in names[1:]))
    for name, problems in data.items():
        settings = json.dumps([vars(args) | {"data": name, "out": ""}, weights, list(map(vars, problems))])
        model, stem = args.model.replace("/", "-")[-60:], Path(name).stem
        path = Path(args.out) / f"eval__{model}__{stem}__{zlib.crc32(settings.encode()):08x}.jsonl"
        records = [json.loads(line) for line in path.open()] if path.exists() else []
        for start in tqdm(range(len(records), len(problems), args.batch_size), desc=name, disable=None):
            batch = problems[start : start + args.batch_size]
            prompts = [problem.prompt_ids for problem in batch]
            most = longest if args.budgets else args.max_response_tokens
            limits = [min(most, longest - len(prompt)) for prompt in prompts]
            seed = random.Random(f"{args.seed} {name} {start}").getrandbits(63)
            transformers.set_seed(seed % 2**32)  # of torch, and of numpy, which vLLM draws from on a GPU
            for problem, answers in zip(batch, sample(prompts, limits)):
                record = {"prompt": tokenizer.decode(problem.prompt_ids), "gold": problem.gold}
                for budget in budgets:
                    room = max(budget - len(problem.prompt_ids), 0)
                    within = [answer[:room] for answer in answers]
                    responses = [answer_text(tokenizer, answer) for answer in within]  # behind the thoughts
                    correct = [grade_answer(problem, tokenizer, answer)[0] for answer in within]
                    if args.paper_grading:
                        correct = [paper_gsm8k(response, problem.gold) for response in responses]
                    finals = [final_answer(problem, response) for response in responses]
                    cut = [not answer or answer[-1] not in eos_token_ids for answer in within]
                    numbers = [fmean(correct), any(correct), majority_correct(finals, correct)]
                    numbers += [len(set(finals) - {""}), fmean(cut), finals.count("") / args.samples]
                    numbers += [fmean(map(len, within))]
                    texts = {"responses": responses, "answers": finals, "correct": correct}
                    record[str(budget)] = texts | dict(zip(names, numbers))
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
            cells = f"{name[-14:]:<14}{limit:>8}{len(rows):>11}  {means[0]:.3f} +- {interval:.3f}"
            print(cells + "".join(f"{mean:>10.3f}" for mean in means[1:]), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues it", file=sys.stderr)
        sys.exit(130)
