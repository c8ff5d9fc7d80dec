"""Segment Policy Optimization with tree-structured sampling: SPO-tree (arXiv 2505.23564, section 4.2), in one file.

Reinforcement learning of a language model on questions whose answers can be checked. GRPO gives every token of an answer the
same credit, PPO learns a critic; SPO-tree cuts the answer into segments and estimates the credit of each one by sampling:

1. Sample: grow a tree over each question. A node is a segment of at most --segment-tokens sampled tokens; a node at depth d
   gets --branch-factors[d] children; those of the last level run to the end of the answer.
2. Value: a leaf is worth its reward R in {0, 1}, an inner node the mean of its children: V(n) = mean over c of V(c).
3. Advantage: A(n) = V(n) - V(parent of n), for every token of the segment.
4. Buffer: siblings with A != 0 wait in a replay buffer, so that one update mixes the questions of many iterations.
5. Update: with r_t = pi(y_t) / pi_old(y_t), the probability mask M_t = 1[pi_old(y_t) < rho and A_t != 0] and Z = sum of M_t,
       loss = 1/Z sum over t of M_t ( -min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + beta k3_t ),
   k3_t = exp(d) - d - 1 with d = log pi_ref(y_t) - log pi(y_t).

Sampling shares prefixes, and so does the rest: whole trees are scored, and sibling groups trained, in packed rows in which no
tree computes a token twice (`pack`).

Deviations from the paper and from the authors' code (AIFrameResearch/SPO at b9fc6a2):
- Token ids go from sampler to loss untouched, and the sampled end-of-sequence token is trained. (The original detokenises,
  tokenises again and never trains it.)
- An answer cut by the length limit earns 0 on any level. (The original grades the last segment of such a leaf.)
- One denominator Z for loss and KL, for the whole minibatch. (The original averages the loss per micro-batch and sums the KL
  per segment: its coefficient becomes 1e-4 x the loss tokens of an average segment, see PRESETS.)
- No whitening of advantages. (The original does it per micro-batch; the paper does not mention it.)
- The buffer holds whole sibling groups, is drawn evenly over questions, and a segment is trained at most once per epoch.
  (The original loses what it draws but does not train, and repeats segments to fill up a short batch.)

    python spo_tree.py                              # the embedded model and task: minutes on a CPU
    python spo_tree.py --branch-factors 6 6 6       # the paper's tree
    python spo_tree.py --preset gsm8k               # Rho-1.1B on GSM8K
    python spo_tree.py --preset math                # R1-Distill-Qwen-1.5B on MATH
    python spo_tree.py --resume runs/NAME           # continue an interrupted run
"""

import argparse
import dataclasses
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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import torch
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

import math_grader


@dataclass
class Args:
    # ==== common to all scripts ====
    preset: Literal["tiny", "gsm8k", "math"] = "tiny"
    """settings to start from; any other flag overrides one of them"""
    seed: int = 1
    """seed of the run: questions, sampling, buffer and minibatch order"""
    num_iterations: int = 1000
    """iterations of sampling and updating"""
    eval_every: int = 10
    """iterations between two evaluations (always one before the first and one after the last iteration)"""
    checkpoint_every: int = 10
    """iterations between two checkpoints (always one after the last iteration)"""
    run_dir: str = ""
    """directory of the run, must not exist (default: runs/<script>__<preset>__<seed>__<time>)"""
    resume: str = ""
    """directory of an interrupted run to continue; its flags apply, and only lengths, evaluation and logging may change"""
    model: str = "tiny/model"
    """policy to start from: a directory or a name on the Hugging Face hub"""
    train_data: str = "tiny/train.jsonl"
    """training problems: a JSON-lines file with the columns question, answer or problem, answer; or a hub name"""
    test_data: str = ""
    """problems for the evaluations during training; empty: --eval-questions rows held out of the training data"""
    prompt_template: str = "plain"
    """plain, rho, r1, chat (the tokenizer's own), or a text that contains {question}"""
    sampler: Literal["auto", "transformers"] = "auto"
    """engine that samples; auto: transformers, so far the only one"""
    num_questions: int = 16
    """questions sampled per iteration"""
    max_response_tokens: int = 1024
    """length limit of an answer; an answer that reaches it without an end earns 0"""
    temperature: float = 0.6
    """sampling temperature; log-probs, ratios and mask are taken at the same temperature"""
    top_p: float = 1.0
    """nucleus of the sampler; log-probs are those of the full distribution"""
    minibatch_size: int = 128
    """segments per optimizer step"""
    num_epochs: int = 1
    """passes over the segments of an iteration"""
    learning_rate: float = 1e-6
    """peak learning rate of AdamW"""
    anneal_learning_rate: bool = True
    """warm up over the first 3 % of the iterations, then decay linearly to 0; otherwise constant"""
    clip_range: float = 0.2
    """PPO's epsilon"""
    kl_coef: float = 0.0
    """beta, weight of the k3 estimate of KL(policy || start model); 0 loads no reference model"""
    prob_mask: bool = True
    """train only tokens whose old probability is below --prob-threshold"""
    prob_threshold: float = 0.9
    """rho, the paper's threshold for the probability mask"""
    pack_tokens: int = 4096
    """token budget of a packed row; holds at least one prompt with its answer"""
    attention: Literal["dense"] = "dense"
    """attention over packed rows: dense boolean mask"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""
    cpu_threads: int = 1
    """threads of torch on the CPU; for a tiny model one is often faster than two"""
    eval_samples: int = 4
    """answers per evaluation question"""
    eval_temperature: float | None = None
    """temperature of the evaluations (default: --temperature)"""
    eval_questions: int = 500
    """questions per evaluation"""
    track: bool = False
    """also log to Weights & Biases"""
    # ==== SPO-tree ====
    branch_factors: tuple[int, ...] = (6, 6, 6)
    """children of a node on each level of the tree"""
    segment_tokens: tuple[int, ...] = (30,)
    """tokens of a segment, M: one number, or one for each level but the last, which runs to the end of the answer"""
    buffer_iterations: int = 8
    """iterations that a segment may wait in the replay buffer; 0: no buffer, train every fresh segment with A != 0"""
    segments_per_question: int = 32
    """segments of one question in one iteration's update, at most"""
    segments_per_iteration: int = 512
    """segments in one iteration's update, at most"""
    normalize_advantages: bool = False
    """divide advantages by the standard deviation of the siblings' values"""


PRESETS = {
    "tiny": Args(
        num_iterations=20, test_data="tiny/test.jsonl", num_questions=8, max_response_tokens=128, temperature=1.0, minibatch_size=64,
        learning_rate=1e-4, anneal_learning_rate=False, pack_tokens=384, branch_factors=(6, 6), segment_tokens=(20,),
        segments_per_question=64,
    ),
    # Paper, table of SPO-tree on GSM8K. Released code: 1,024 segments an iteration, here as in the command that made the figure.
    # beta: 1e-4 x about 10 loss tokens in a segment of 30 tokens (an estimate).
    "gsm8k": Args(
        preset="gsm8k", model="realtreetune/rho-1b-sft-GSM8K", train_data="openai/gsm8k", prompt_template="rho", top_p=0.9,
        kl_coef=1e-3, eval_temperature=0.35, eval_questions=373, segments_per_iteration=1024,
    ),
    # Paper, table of SPO-tree on MATH at a context of 2,048; the released configuration has 32 questions and 512 segments where
    # the paper's table has 16 and 1,024. beta: 1e-4 x about 150 loss tokens in a segment of 600 tokens (an estimate).
    "math": Args(
        preset="math", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", train_data="nlile/hendrycks-MATH-benchmark",
        prompt_template="r1", num_questions=32, max_response_tokens=1848, kl_coef=0.015, eval_samples=1, segment_tokens=(600,),
    ),
}

# ---------------------------------------------------------------------------------------------------------- data and prompts

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


# ------------------------------------------------------------------------------------------------------------------- sampler


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


def tree_values(node: Node) -> float:
    """V(n) of every inner node: the mean over its children, bottom up (paper, section 4.2). Leaves keep their reward.

    A child that ended early counts as much as a sibling with a subtree: children are equally likely samples of the policy.

        rewards   1   (1 0 1)   (0 0 0)          three children, the last two of them with three leaves each
        values    1     2/3        0             V(root) = 5/9
    """
    if node.children:
        node.value = statistics.fmean(tree_values(child) for child in node.children)
    return node.value


def segment_advantages(node: Node, normalize: bool = False) -> None:
    """A(n) = V(n) - V(parent), for all tokens of every segment below `node` (paper, section 4.2); exactly 0 where |A| <= 1e-8.

    With `normalize`, divided by the population standard deviation of the siblings' values (an ablation of the paper).

        values       V(root) = 5/9    1     2/3 (1 0 1)          0 (0 0 0)
        advantages                   4/9    1/9 (1/3 -2/3 1/3)  -5/9 (0 0 0)
    """
    spread = statistics.pstdev([child.value for child in node.children]) + 1e-8 if normalize and node.children else 1.0
    for child in node.children:
        difference = child.value - node.value
        child.advantages = [difference / spread if abs(difference) > 1e-8 else 0.0] * len(child.token_ids)
        segment_advantages(child, normalize)


def descendants(node: Node) -> list[Node]:
    """All nodes below `node`, depth first."""
    return [found for child in node.children for found in (child, *descendants(child))]


# ------------------------------------------------------------------------------------------------------------- replay buffer


@dataclass
class SiblingGroup:
    """The children with A != 0 of one node, under their context: the unit of the replay buffer and of packing."""

    question: int  # row of the training problems
    iteration: int  # when it was sampled
    tree: Node  # root: prompt and answer up to the siblings; its children: the siblings

    @classmethod
    def from_dict(cls, group: dict) -> "SiblingGroup":
        """The inverse of dataclasses.asdict."""
        tree = group["tree"]
        return cls(group["question"], group["iteration"], Node(**{**tree, "children": [Node(**child) for child in tree["children"]]}))


def sibling_groups(root: Node, question: int, iteration: int) -> list[SiblingGroup]:
    """Cuts a tree with advantages into the sibling groups that have something to learn from."""
    groups, stack = [], [(root, root.token_ids)]
    while stack:
        node, context = stack.pop()
        siblings = [dataclasses.replace(child, children=[], sampler_logprobs=[]) for child in node.children if any(child.advantages)]
        if siblings:
            groups.append(SiblingGroup(question, iteration, Node(context, siblings)))
        stack.extend((child, context + child.token_ids) for child in node.children)
    return groups


def num_segments(groups: list[SiblingGroup]) -> int:
    """Segments in a list of groups."""
    return sum(len(group.tree.children) for group in groups)


def draw_groups(buffer: list[SiblingGroup], per_question: int, per_iteration: int,
                rng: random.Random) -> tuple[list[SiblingGroup], list[SiblingGroup]]:
    """Takes whole groups evenly over the questions; returns (taken, kept).

    The questions are visited in random order, again and again; each visit takes one random group. A question is left when its
    next group, or another of the last one's size, would exceed `per_question` segments; the draw ends when the next group would
    exceed `per_iteration`.
    """
    queues: dict[int, list[SiblingGroup]] = {}
    for group in rng.sample(buffer, len(buffer)):
        queues.setdefault(group.question, []).append(group)
    taken, drawn = [], Counter()
    questions = rng.sample(sorted(queues), len(queues))
    while questions:
        for question in list(questions):
            group = queues[question].pop()
            size = len(group.tree.children)
            if drawn.total() + size > per_iteration:
                questions = []
                break
            if drawn[question] + size <= per_question:
                taken.append(group)
                drawn[question] += size
            if drawn[question] + size > per_question or not queues[question]:
                questions.remove(question)
    chosen = set(map(id, taken))
    return taken, [group for group in buffer if id(group) not in chosen]


def split_minibatches(groups: list[SiblingGroup], size: int) -> list[list[SiblingGroup]]:
    """Cuts the groups, in their order, into minibatches of about `size` segments, as equal as whole groups allow.

    A short remainder would be an optimizer step of its own, with few tokens that weigh as much as all of another step.
    """
    total = num_segments(groups)
    count, done = max(round(total / size), 1), 0
    minibatches: list[list[SiblingGroup]] = [[] for _ in range(count)]
    for group in groups:
        minibatches[done * count // total].append(group)
        done += len(group.tree.children)
    return [minibatch for minibatch in minibatches if minibatch]


# --------------------------------------------------------------------------------------------- packing, log-probs and losses


@dataclass
class Row:
    """One packed row: four integers per token, and the segments whose tokens are scored in this row, each with its start."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)  # restart from the parent's end
    subtree_end: list[int] = field(default_factory=list)  # token q attends to token k iff k <= q < subtree_end[k]
    pred: list[int] = field(default_factory=list)  # row index whose logit predicts this token; -1: none
    segments: list[Node] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def scored(self) -> list[int]:
        """Row indices of the tokens of all segments, in order."""
        return [start + i for node, start in zip(self.segments, self.starts) for i in range(len(node.token_ids))]


def pack(trees: list[Node], budget: int) -> list[Row]:
    """Lays token trees out depth first in rows of at most `budget` tokens; every segment is scored in exactly one row.

    A new row begins with the ancestors of its first segment, as context. A path longer than `budget` gets a longer row.

        tree         a b ─┬─ c d ─┬─ e         token_ids     a b c d e f g
                          │       └─ f         position_ids  0 1 2 3 4 4 2
                          └─ g                 subtree_end   7 7 6 6 5 6 7
                                               pred         -1 0 1 2 3 3 1
    """
    rows: list[Row] = []
    path: list[tuple[Node, int]] = []  # the open nodes of the current row, each with its start

    def close(depth: int) -> None:
        while len(path) > depth:
            node, start = path.pop()
            rows[-1].subtree_end[start : start + len(node.token_ids)] = [len(rows[-1].token_ids)] * len(node.token_ids)

    def append(node: Node) -> None:
        row, start, length = rows[-1], len(rows[-1].token_ids), len(node.token_ids)
        parent, parent_start = path[-1] if path else (None, 0)
        parent_last = parent_start + len(parent.token_ids) - 1 if parent else -1
        position = row.position_ids[parent_last] + 1 if parent else 0
        row.token_ids += node.token_ids
        row.position_ids += range(position, position + length)
        row.subtree_end += [0] * length  # known when the subtree is closed
        row.pred += [parent_last, *range(start, start + length - 1)]
        path.append((node, start))

    def visit(node: Node, ancestors: list[Node]) -> None:
        if ancestors:  # a segment; roots are context, and enter a row with their first segment
            shared = next((i for i, (a, b) in enumerate(zip(path, ancestors)) if a[0] is not b), min(len(path), len(ancestors)))
            close(shared)
            needed = sum(len(other.token_ids) for other in ancestors[shared:]) + len(node.token_ids)
            if not rows or len(rows[-1].token_ids) + needed > budget:
                close(0)
                rows.append(Row())
                shared = 0
            for ancestor in ancestors[shared:]:
                append(ancestor)
            append(node)
            rows[-1].segments.append(node)
            rows[-1].starts.append(path[-1][1])
        for child in node.children:
            visit(child, [*ancestors, node])

    for tree in trees:
        visit(tree, [])
    close(0)
    return rows


def attention_mask(row: Row, device: torch.device) -> torch.Tensor:
    """The boolean mask [1, 1, length, length] of a packed row: q attends to k iff k <= q < subtree_end[k]."""
    index = torch.arange(len(row.token_ids), device=device)
    subtree_end = torch.tensor(row.subtree_end, device=device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :]))[None, None]


def token_logprobs(model, row: Row, positions: list[int], temperature: float) -> torch.Tensor:
    """log pi(y_t) in fp32 of the tokens at row indices `positions`, at the sampling temperature; shape [len(positions)].

    logit[y] / T - logsumexp(logits / T), with logits computed only at `pred` of the wanted tokens.
    """
    device = model.device
    logits = model(
        input_ids=torch.tensor([row.token_ids], device=device),
        position_ids=torch.tensor([row.position_ids], device=device),
        attention_mask=attention_mask(row, device),
        logits_to_keep=torch.tensor([row.pred[t] for t in positions], device=device),
        use_cache=False,
    ).logits[0]  # [positions, vocabulary]
    targets = torch.tensor([row.token_ids[t] for t in positions], device=device)
    logits = logits.float() / temperature
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


def loss_mask(advantages: torch.Tensor, old_logprobs: torch.Tensor, prob_threshold: float) -> torch.Tensor:
    """M_t: the tokens that enter the loss, A_t != 0 and pi_old(y_t) < rho (paper, Eq. 3); a threshold above 1 masks nothing."""
    return (advantages != 0) & (old_logprobs.exp() < prob_threshold)


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) per token, with r = pi / pi_old (paper, Eq. 3 without the sum)."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi: an unbiased, never negative estimate of KL(pi || pi_ref) per token."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


@torch.no_grad()
def score_tokens(model, trees: list[Node], field_name: str, budget: int, temperature: float) -> None:
    """Stores the log-probs under `model` of every segment below the roots of `trees` in the segment's field `field_name`."""
    for row in pack(trees, budget):
        logprobs = token_logprobs(model, row, row.scored(), temperature).tolist()
        for node in row.segments:
            setattr(node, field_name, logprobs[: len(node.token_ids)])
            logprobs = logprobs[len(node.token_ids) :]


# -------------------------------------------------------------------------------------- evaluation, run directory, checkpoint


def seeded(*parts) -> int:
    """A seed made from (run seed, iteration, rank, purpose): no generator has a state that a checkpoint would have to keep."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


def decode(tokenizer, token_ids: list[int]) -> str:
    """The text that is graded: sampled tokens only, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def evaluate(problems: list[Problem], sample, tokenizer, args: Args) -> dict[str, float]:
    """Mean over the problems of the share of right answers, with the half-width of its 95 % interval over problems.

    Every evaluation of a run uses the same random numbers. Answers cut by the length limit are graded as they stand.
    """
    start = time.perf_counter()
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    limits = [args.max_response_tokens] * len(problems)
    sampled = sample([p.prompt_ids for p in problems], args.eval_samples, limits, temperature, 1.0, seeded(args.seed, "evaluation"))
    shares = [statistics.fmean(p.grade(decode(tokenizer, c.token_ids), p.gold) for c in row) for p, row in zip(problems, sampled)]
    answers = [completion for row in sampled for completion in row]
    return {
        "eval/accuracy": statistics.fmean(shares),
        "eval/accuracy_ci95": 1.96 * statistics.pstdev(shares) / math.sqrt(len(shares)),
        "eval/truncated_fraction": statistics.fmean(not answer.finished for answer in answers),
        "eval/response_length": statistics.fmean(len(answer.token_ids) for answer in answers),
        "time/eval_s": time.perf_counter() - start,
    }


def learning_rate_at(iteration: int, args: Args) -> float:
    """Linear warm-up over the first 3 % of the iterations, then linear decay to 0; or constant."""
    if not args.anneal_learning_rate:
        return args.learning_rate
    warmup, end = math.ceil(0.03 * args.num_iterations), args.num_iterations + 1
    return args.learning_rate * min(iteration / warmup, (end - iteration) / (end - warmup))


def append_line(path: Path, record: dict) -> None:
    """Appends one JSON line and waits until it is on disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, last_iteration: int) -> None:
    """Drops the lines of iterations after the checkpoint that a run resumes from, and a line cut short by the interrupt."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= last_iteration]
    path.with_suffix(".new").write_text("".join(kept), encoding="utf-8")
    path.with_suffix(".new").replace(path)


def save_checkpoint(run_dir: Path, policy, tokenizer, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes checkpoints/<iteration>/ under a new name, then renames it; keeps the last two.

    It is a Hugging Face model directory with optimizer.safetensors and state.json (counters and replay buffer) beside it.
    """
    new = run_dir / "checkpoints" / "new"
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    moments = optimizer.state_dict()["state"]  # {parameter index: {exp_avg, exp_avg_sq, step}}
    save_file({f"{i}.{key}": value for i, entry in moments.items() for key, value in entry.items()}, new / "optimizer.safetensors")
    (new / "state.json").write_text(json.dumps(state))
    for path in (*new.iterdir(), new):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    new.rename(new.with_name(f"{state['iteration']:06d}"))
    for old in sorted(new.parent.glob("[0-9]*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(path: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Restores the optimizer and returns the state; the weights are loaded like those of any model directory."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        moments.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((path / "state.json").read_text())


def readable(node: Node, tokenizer) -> dict:
    """A token tree for samples.jsonl: tokens as text with their old probability, value and advantage, children nested."""
    return {
        "tokens": [tokenizer.decode([token_id]) for token_id in node.token_ids],
        "probs": [round(math.exp(logprob), 4) for logprob in node.old_logprobs],
        "value": node.value,
        "advantage": node.advantages[0] if node.advantages else 0.0,
        "children": [readable(child, tokenizer) for child in node.children],
    }


def parse_args() -> Args:
    """Flags over a preset, or over the flags of the run to resume: there only lengths, evaluation and logging may change."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny")
    first.add_argument("--resume", default="")
    known = first.parse_known_args()[0]
    default = PRESETS[known.preset]
    if known.resume:
        try:
            saved = json.loads((Path(known.resume) / "args.json").read_text())["args"]
            default = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            usage_error(f"--resume {known.resume}: no run of this script to continue ({error!r})")
    args = tyro.cli(Args, default=default, description=__doc__)
    free = "resume num_iterations max_response_tokens segment_tokens pack_tokens checkpoint_every track eval_every eval_samples eval_temperature".split()
    free += ["test_data", "eval_questions"] if default.test_data and args.test_data else []  # else they decide what is held out
    for name, value in vars(args).items():
        if known.resume and value != getattr(default, name) and name not in free:
            usage_error(f"--{name.replace('_', '-')} cannot change when a run is resumed")
    return args


if __name__ == "__main__":
    args = parse_args()
    levels, most = len(args.branch_factors), max(args.branch_factors, default=0)
    hops = [*(args.segment_tokens * (levels - 1) if len(args.segment_tokens) == 1 else args.segment_tokens), args.max_response_tokens]
    for wrong, message in [
        *((type(value) is int and value < 1 and name not in ("seed", "buffer_iterations"), f"--{name.replace('_', '-')} must be at least 1")
          for name, value in vars(args).items()),
        (args.temperature <= 0 or (args.eval_temperature or 1) <= 0 or args.eval_temperature == 0 or not 0 < args.top_p <= 1,
         "--temperature, --eval-temperature and --top-p must be above 0, and --top-p at most 1"),
        (int(os.environ.get("WORLD_SIZE", 1)) > 1, "torchrun: this script runs as one process so far"),
        (args.prompt_template not in ("chat", *PROMPT_TEMPLATES) and "{question}" not in args.prompt_template,
         f"--prompt-template must be chat, {', '.join(PROMPT_TEMPLATES)} or a text that contains {{question}}"),
        (min(args.branch_factors, default=0) < 1, "--branch-factors needs one number of at least 1 for each level of the tree"),
        (most == 1, "--branch-factors must not all be 1: without siblings every advantage is 0"),
        (min(args.segment_tokens, default=0) < 1 or len(args.segment_tokens) not in (1, levels - 1),
         f"--segment-tokens needs one number, or one for each level but the last ({levels - 1}), all at least 1"),
        (min(args.minibatch_size, args.segments_per_question, args.segments_per_iteration) < most,
         f"--minibatch-size, --segments-per-question and --segments-per-iteration must hold a group of {most} siblings"),
        (not args.resume and args.run_dir and Path(args.run_dir).exists(), f"--run-dir {args.run_dir} exists already"),
    ]:
        if wrong:
            usage_error(message)
    if 1 in args.branch_factors:
        print("warning: the segments of a level with branch factor 1 get no advantage", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.cpu_threads)
    transformers_logging.disable_progress_bar()
    rank = 0  # one process

    # ==== problems: whatever is wrong with them is found before the model is loaded
    config, tokenizer = load_config_and_tokenizer(args.model)
    room = min(config.max_position_embeddings, args.pack_tokens) - args.max_response_tokens
    train_problems = load_problems(args.train_data, "train", tokenizer, args.prompt_template, room)
    if args.test_data:
        eval_problems = load_problems(args.test_data, "test", tokenizer, args.prompt_template, room)[: args.eval_questions]
    else:
        train_problems, eval_problems = train_problems[: -args.eval_questions], train_problems[-args.eval_questions :]
    if len(train_problems) < args.num_questions:
        usage_error(f"--num-questions {args.num_questions}: {args.train_data} has only {len(train_problems)} problems to train on")

    # ==== run directory, policy, optimizer, state
    run_dir = Path(args.resume or args.run_dir or f"runs/{Path(__file__).stem}__{args.preset}__{args.seed}__{int(time.time())}")
    checkpoint = max((run_dir / "checkpoints").glob("[0-9]*"), default=None)
    try:
        policy = AutoModelForCausalLM.from_pretrained(checkpoint or locate(args.model), dtype=torch.float32).to(device).eval()
    except Exception as error:
        usage_error(f"cannot read the weights in {checkpoint or args.model}: {error!r:.300}")
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    record = {"args": vars(args), "commit": commit, "versions": {name: version(name) for name in ("torch", "transformers")}}
    (run_dir / "args.json").write_text(json.dumps(record, indent=1))
    shutil.copy(__file__, run_dir)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    if args.kl_coef:
        reference = AutoModelForCausalLM.from_pretrained(locate(args.model), dtype=torch.float32).to(device).eval()
    state = {"iteration": 0, "elapsed_s": 0.0, "generated_tokens": 0, "trained_tokens": 0, "buffer": []}
    if checkpoint:
        state = load_checkpoint(checkpoint, optimizer)
    if checkpoint and state["iteration"] >= args.num_iterations:
        usage_error(f"--resume {args.resume}: iteration {state['iteration']} of {args.num_iterations} is done; a larger --num-iterations goes on")
    buffer = [SiblingGroup.from_dict(group) for group in state["buffer"]]
    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_lines(run_dir / name, state["iteration"] if checkpoint else -1)
    eos = policy.generation_config.eos_token_id or tokenizer.eos_token_id
    sample = partial(sample_transformers, policy, [eos] if isinstance(eos, int) else eos)
    if args.track:
        import wandb

        wandb.init(project="segment-policy-optimization", name=run_dir.name, id=run_dir.name, resume="allow", config=vars(args))
    print(f"SPO-tree, preset {args.preset}: {args.model} on {args.train_data}, {device}. A real model: python spo_tree.py --preset gsm8k")
    print(f"run directory: {run_dir}" + (f", continued after iteration {state['iteration']}" if checkpoint else ""), flush=True)

    def log(metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, on disk before the checkpoint of its iteration; wandb; progress."""
        append_line(run_dir / "metrics.jsonl", metrics)
        if args.track:
            wandb.log(metrics, step=metrics["iteration"])
        shown = {"reward": "rollout/reward_mean", "length": "rollout/response_length", "accuracy": "eval/accuracy"}
        text = "  ".join(f"{label} {metrics[name]:.3f}" for label, name in shown.items() if name in metrics)
        tokens_per_s = metrics.get("rollout/generated_tokens_total", 0) / max(metrics["time/elapsed_s"], 1e-9)
        progress.set_postfix_str(f"{text}  {tokens_per_s:,.0f} tokens/s")
        if progress.disable or "eval/accuracy" in metrics:
            progress.write(f"iteration {metrics['iteration']}/{args.num_iterations}  {metrics['time/elapsed_s']:.0f} s  "
                           f"{tokens_per_s:,.0f} tokens/s  {text}")

    # ==== training
    progress = tqdm(range(state["iteration"] + 1, args.num_iterations + 1), disable=not sys.stdout.isatty())
    if not checkpoint:
        log({"iteration": 0, "time/elapsed_s": 0.0, **evaluate(eval_problems, sample, tokenizer, args)})
    for iteration in progress:
        # 1. Sample a tree over each question, with one call of the sampler for each level.
        marks = [time.perf_counter()]
        rng = random.Random(seeded(args.seed, iteration, rank, "questions"))
        questions = rng.sample(range(len(train_problems)), args.num_questions)
        roots = [Node(train_problems[question].prompt_ids) for question in questions]
        frontier = [(root, question, []) for root, question in zip(roots, questions)]  # nodes to expand, with the answer so far
        leaves = []
        for depth, (factor, hop) in enumerate(zip(args.branch_factors, hops)):
            prefixes = [train_problems[question].prompt_ids + answer for _, question, answer in frontier]
            limits = [min(hop, args.max_response_tokens - len(answer)) for _, _, answer in frontier]
            seed = seeded(args.seed, iteration, rank, "sampling", depth)
            sampled = sample(prefixes, factor, limits, args.temperature, args.top_p, seed)
            expanded, frontier = frontier, []
            for (node, question, answer), completions in zip(expanded, sampled):
                for completion in completions:
                    child = Node(completion.token_ids, sampler_logprobs=completion.logprobs)
                    node.children.append(child)
                    longer = answer + child.token_ids
                    if completion.finished or len(longer) == args.max_response_tokens or depth == levels - 1:
                        leaves.append((child, question, longer, completion.finished))
                    else:
                        frontier.append((child, question, longer))
        segments = [node for root in roots for node in descendants(root)]
        marks.append(time.perf_counter())

        # 2. Value: the reward at the leaves (answers only, never the prompt; 0 if cut by the length limit), means above them.
        for leaf, question, answer, finished in leaves:
            problem = train_problems[question]
            leaf.value = float(finished and problem.grade(decode(tokenizer, answer), problem.gold))
        for root in roots:
            tree_values(root)
            # 3. Advantage: V(n) - V(parent).
            segment_advantages(root, args.normalize_advantages)
        marks.append(time.perf_counter())

        # Old log-probs come from the trainer. The sampler's differ from them by rounding and the nucleus, or something is wrong.
        score_tokens(policy, roots, "old_logprobs", args.pack_tokens, args.temperature)
        if args.kl_coef:
            score_tokens(reference, roots, "ref_logprobs", args.pack_tokens, args.temperature)
        gaps = [a - b for node in segments for a, b in zip(node.sampler_logprobs, node.old_logprobs)]
        violation = max(max(-gap, gap + math.log(args.top_p)) for gap in gaps)
        if not (violation <= 1e-3 and math.isfinite(sum(gaps))):
            raise RuntimeError(f"iteration {iteration}: log-probs of sampler and trainer differ by {violation:.2g}, more than rounding "
                               "explains: they disagree on weights, temperature or positions")
        marks.append(time.perf_counter())

        # 4. Buffer: add the fresh sibling groups, drop those that waited too long, draw evenly over the questions.
        fresh = [group for root, question in zip(roots, questions) for group in sibling_groups(root, question, iteration)]
        waiting = [group for group in buffer if iteration - group.iteration < args.buffer_iterations]
        expired = num_segments(buffer) - num_segments(waiting)
        rng = random.Random(seeded(args.seed, iteration, rank, "update"))
        if args.buffer_iterations == 0:
            taken, buffer = fresh, []
        else:
            taken, buffer = draw_groups(waiting + fresh, args.segments_per_question, args.segments_per_iteration, rng)

        # 5. Update.
        optimizer.param_groups[0]["lr"] = learning_rate_at(iteration, args)
        totals = torch.zeros(4, device=device)  # sums over loss tokens: policy loss, KL, clipped, approximate KL to the old policy
        loss_tokens, skipped_steps, ratio_max, grad_norms = 0, 0, 0.0, []
        policy.train(args.gradient_checkpointing)
        for _ in range(args.num_epochs):
            rng.shuffle(taken)
            for minibatch in split_minibatches(taken, args.minibatch_size):
                batch = []
                for row in pack([group.tree for group in minibatch], args.pack_tokens):
                    advantages, old_logprobs, ref_logprobs = (
                        torch.tensor([x for node in row.segments for x in getattr(node, name)], device=device)
                        for name in ("advantages", "old_logprobs", "ref_logprobs")
                    )
                    mask = loss_mask(advantages, old_logprobs, args.prob_threshold if args.prob_mask else math.inf)
                    positions = [t for t, kept in zip(row.scored(), mask.tolist()) if kept]
                    if positions:
                        batch.append((row, positions, advantages[mask], old_logprobs[mask], ref_logprobs[mask] if args.kl_coef else None))
                Z = sum(len(positions) for _, positions, *_ in batch)
                if Z == 0:
                    skipped_steps += 1
                    continue
                for row, positions, advantages, old_logprobs, ref_logprobs in batch:
                    logprobs = token_logprobs(policy, row, positions, args.temperature)
                    losses = policy_loss(logprobs, old_logprobs, advantages, args.clip_range)
                    kl = kl_k3(logprobs, ref_logprobs) if args.kl_coef else torch.zeros_like(losses)
                    ((losses + args.kl_coef * kl).sum() / Z).backward()
                    with torch.no_grad():
                        ratio = (logprobs - old_logprobs).exp()
                        clipped = (ratio - 1).abs() > args.clip_range
                        totals += torch.stack([losses.sum(), kl.sum(), clipped.sum(), kl_k3(old_logprobs, logprobs).sum()])
                        ratio_max = max(ratio_max, ratio.max().item())
                grad_norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True).item())
                optimizer.step()
                optimizer.zero_grad()
                loss_tokens += Z
        policy.eval()
        marks.append(time.perf_counter())

        # Metrics, evaluation, checkpoint. What is measured per token is averaged over tokens.
        state |= {"iteration": iteration, "elapsed_s": state["elapsed_s"] + marks[-1] - marks[0],
                  "generated_tokens": state["generated_tokens"] + len(gaps), "trained_tokens": state["trained_tokens"] + loss_tokens}
        mean_loss, mean_kl, clip_fraction, approx_kl = (totals / max(loss_tokens, 1)).tolist()
        metrics = {
            "iteration": iteration,
            "time/elapsed_s": state["elapsed_s"],
            **{f"time/{phase}_s": b - a for phase, a, b in zip(("sample", "value", "logprobs", "train"), marks, marks[1:])},
            "time/sync_s": 0.0,  # the transformers sampler runs the policy itself
            "rollout/generated_tokens_total": state["generated_tokens"],
            "rollout/trained_tokens_total": state["trained_tokens"],
            "rollout/reward_mean": statistics.fmean(root.value for root in roots),
            "rollout/response_length": statistics.fmean(len(answer) for _, _, answer, _ in leaves),
            "rollout/truncated_fraction": statistics.fmean(not finished for *_, finished in leaves),
            "rollout/unique_fraction": len({(question, *answer) for _, question, answer, _ in leaves}) / len(leaves),
            "rollout/logprob_gap_mean": statistics.fmean(gaps),
            "segments/count": len(segments),
            "segments/tokens_mean": len(gaps) / len(segments),
            "segments/zero_advantage_fraction": statistics.fmean(not any(node.advantages) for node in segments),
            "buffer/size": num_segments(buffer),
            "buffer/age_mean": sum((iteration - group.iteration) * len(group.tree.children) for group in taken) / max(num_segments(taken), 1),
            "buffer/expired_fraction": expired / max(expired + num_segments(taken), 1),  # of what left the buffer
            "losses/policy": mean_loss,
            "losses/kl": mean_kl,
            "losses/entropy": -statistics.fmean(logprob for node in segments for logprob in node.old_logprobs),
            "losses/clip_fraction": clip_fraction,
            "losses/approx_kl": approx_kl,
            "losses/ratio_max": ratio_max,
            "losses/grad_norm": statistics.fmean(grad_norms or [0.0]),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "losses/loss_tokens": loss_tokens,
            "losses/skipped_steps": skipped_steps,
        }
        last = iteration == args.num_iterations
        if last or iteration % args.eval_every == 0:
            metrics |= evaluate(eval_problems, sample, tokenizer, args)
            problem = train_problems[questions[0]]
            append_line(run_dir / "samples.jsonl", {"iteration": iteration, "question": problem.question, "gold": problem.gold,
                                                    "tree": readable(roots[0], tokenizer)})
        log(metrics)
        if last or iteration % args.checkpoint_every == 0:
            state["buffer"] = [dataclasses.asdict(group) for group in buffer]
            save_checkpoint(run_dir, policy, tokenizer, optimizer, state)

    policy.save_pretrained(run_dir / "model")
    tokenizer.save_pretrained(run_dir / "model")
    first, *_, final = map(json.loads, open(run_dir / "metrics.jsonl"))
    print(f"accuracy {first['eval/accuracy']:.3f} -> {final['eval/accuracy']:.3f} +- {final['eval/accuracy_ci95']:.3f} on {len(eval_problems)} "
          f"questions after {state['generated_tokens']:,} sampled tokens and {state['elapsed_s'] / 60:.1f} minutes (evaluations not counted)")
    print(f"run directory: {run_dir}\nevaluate it:   python eval.py --model {run_dir}/model --data {args.test_data or args.train_data} "
          f"--prompt-template {shlex.quote(args.prompt_template)} --max-response-tokens {args.max_response_tokens} --temperature "
          f"{args.temperature if args.eval_temperature is None else args.eval_temperature}")
