"""Segment Policy Optimization: how good are the advantages, how much signal is in the gradients.

    python benchmark/credit.py                 # both parts; 20 batches of part 2 take a quarter of an hour
    python benchmark/credit.py --questions 4 --reference-rollouts 100 --batches 4        # a short form
    python benchmark/credit.py --batches 4 -- --num-questions 2            # flags of the scripts in part 2
    python benchmark/credit.py --questions 0 --gradients "GRPO | grpo.py --num-questions 32"       # one line

Part 1, on the embedded start model: spo_tree.py samples a 6-6-6 tree over each question. The common
answers are one path below each of the root's children, with the tree's boundaries. The reference for V at
a boundary is the mean of --reference-rollouts continuations. Compared are A = V(end) - V(start) as
SPO-tree estimates it from the tree, as SPO-chain does from 1, 4 or 9 continuations of each boundary, and
GRPO's one advantage for the whole answer, R - mean(R) of a group of 8.

Part 2: --batches times, every script makes one step from the start model. Its gradient before clipping is
read from the checkpoint. With g_i of batch i, signal = mean over i != j of <g_i, g_j>, noise = mean of
|g_i|^2 - signal, and signal / noise (± its standard error, jackknife) is scaled to the same number of
generated tokens: the noise of a mean falls as 1 / tokens. The same with batches that all ask the same
questions gives the noise within questions, W for each question; the rest of it, B, is between questions.
Both are printed in units of the signal. With Q training questions and n of them in an update,

    noise / signal = W / n + B (1 / n - 1 / Q)        the second term is 0 where an update asks them all

against the mean gradient of the training questions.
"""

import argparse
import contextlib
import json
import math
import os
import random
import runpy
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import spo_tree
from compare import present_commit
from view import nested

TREE, GRPO = "SPO-tree 6-6-6", "GRPO, group of 8"
CHAIN = {f"SPO-chain, {n} rollout{'s'[: n > 1]}": n for n in (1, 4, 9)}
BATCHES = """
SPO-tree 6-6-6 | spo_tree.py --num-questions 4 --buffer-iterations 0 --branch-factors 6 6 6
SPO-tree 6-6 | spo_tree.py --num-questions 8 --buffer-iterations 0
SPO-tree 4-4-4 | spo_tree.py --num-questions 8 --buffer-iterations 0 --branch-factors 4 4 4
SPO-chain, 1 rollout | spo_chain.py --num-questions 8 --mc-rollouts 1
SPO-chain, 4 rollouts | spo_chain.py --num-questions 8 --mc-rollouts 4
SPO-chain, 9 rollouts | spo_chain.py --num-questions 8 --mc-rollouts 9
SPO-chain, 4 rollouts, no mask | spo_chain.py --num-questions 8 --mc-rollouts 4 --no-prob-mask
VinePPO, 9 rollouts | spo_chain.py --num-questions 8 --mc-rollouts 9 --partition newline --no-prob-mask
GRPO | grpo.py --num-questions 32
GRPO + mask | grpo.py --num-questions 32 --prob-mask
"""


def run(script: str, *flags) -> tuple[list[dict], list[dict], dict]:
    """Runs a script on the embedded task; returns its metrics, its samples and the optimizer's state."""
    with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as nowhere:
        run_dir = Path(directory, "run")
        common = f"--run-dir {run_dir} --eval-questions 1 --eval-samples 1 --checkpoint-every 1000000".split()
        sys.argv = [script, *common, *map(str, flags)]
        with contextlib.redirect_stdout(nowhere):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        metrics = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
        samples = [json.loads(line) for line in open(run_dir / "samples.jsonl")]
        (checkpoint,) = run_dir.glob("checkpoints/*/state.pt")
        return metrics, samples, torch.load(checkpoint, weights_only=True)["optimizer"]["state"]


def advantages(num_questions: int, num_references: int) -> None:
    """Part 1."""
    flags = "--branch-factors 6 6 6 --num-questions 1 --eval-every 1 --buffer-iterations 0 --seed 101".split()
    flags += ["--num-iterations", num_questions, "--learning-rate", 1e-12]  # which changes no weight
    metrics, samples, _ = run("spo_tree.py", *flags)
    rng, model_path = random.Random(0), ROOT / "tiny" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    source = str(ROOT / "tiny" / "train.jsonl")
    problems = spo_tree.load_problems(source, "train", tokenizer, "plain", 256)
    problems = {tokenizer.decode(problem.prompt_ids): problem for problem in problems}
    token_ids = {tokenizer.decode([token_id]): token_id for token_id in range(len(tokenizer))}
    estimates = {name: [] for name in (TREE, *CHAIN, GRPO, "reference")}
    answers, answer_tokens, rollout_tokens = 0, 0, 0.0
    for sample in samples:
        root, problem = nested(sample), problems[sample["prompt"]]
        paths, rewards = [], {}  # segments with the prefix before each; rewards behind each prefix
        for segment in root["children"]:
            path, prefix = [], ()
            while segment is not None:
                path.append((segment, prefix))
                rewards[prefix] = []
                prefix += tuple(token_ids[token] for token in segment["tokens"])
                segment = rng.choice(segment["children"]) if segment["children"] else None
            paths.append(path)
            answers, answer_tokens = answers + 1, answer_tokens + len(prefix)
        contexts = [problem.prompt_ids + [*prefix] for prefix in rewards]
        limits, eos_token_ids = [128 - len(prefix) for prefix in rewards], [tokenizer.eos_token_id]
        n, seed = num_references + 14, rng.getrandbits(60)
        sampled = spo_tree.sample_transformers(model, eos_token_ids, contexts, n, limits, 1.0, 1.0, seed)
        for prefix, completions in zip(rewards, sampled):
            rollout_tokens += fmean(len(c.token_ids) for c in completions)  # for one rollout of each prefix
            for c in completions:
                right = c.finished and spo_tree.grade_answer(problem, tokenizer, [*prefix, *c.token_ids])[0]
                rewards[prefix].append(float(right))
        others = rewards[()][1:8]  # of whole answers, beside the common answer
        for path in paths:
            reward = path[-1][0]["value"]
            for name, a, b in zip([*CHAIN, "reference"], (0, 1, 5, 14), (1, 5, 14, n)):
                values = [fmean(rewards[prefix][a:b]) for _, prefix in path] + [reward]
                estimates[name] += [after - before for before, after in pairwise(values)]
            estimates[TREE] += [segment["advantages"][0] for segment, _ in path]
            estimates[GRPO] += [reward - fmean([reward, *others])] * len(path)
    reference = estimates.pop("reference")
    print(f"{num_questions} questions, {answers} answers, {len(reference)} segments; "
          f"reference: {num_references} rollouts a boundary")
    print("| estimate | tokens generated for each segment | correlation | right sign where abs(A) >= .05 | "
          "mean absolute error |\n|---|---|---|---|---|")
    clear = [k for k, a in enumerate(reference) if abs(a) >= 0.05]
    for name, estimate in estimates.items():
        cost = (answer_tokens + CHAIN.get(name, 0) * rollout_tokens) / len(reference)
        if name == TREE:
            segments = sum(row["segments/count"] for row in metrics[1:])
            cost = metrics[-1]["rollout/generated_tokens_total"] / segments
        differ = len(set(estimate)) > 1 and len(set(reference)) > 1
        correlation = statistics.correlation(estimate, reference) if differ else math.nan
        signs = fmean(estimate[k] * reference[k] > 0 for k in clear)
        error = "" if name == GRPO else f"{fmean(abs(a - b) for a, b in zip(estimate, reference)):.3f}"
        print(f"| {name} | {cost:.0f} | {correlation:.3f} | {signs:.3f} | {error} |")


def signal_and_noise(gradients: list[torch.Tensor]) -> tuple[float, float]:
    """mean_{i != j} <g_i, g_j>, and mean_i |g_i|^2 minus it; both are unbiased."""
    products = (torch.stack(gradients) @ torch.stack(gradients).T).double()
    n = len(gradients)
    own = products.diagonal().mean().item()
    signal = (products.sum().item() - n * own) / (n * (n - 1))
    return signal, own - signal


def with_error(gradients: list[torch.Tensor]) -> tuple[float, float]:
    """signal / noise and its standard error (jackknife over the batches)."""
    n, parts = len(gradients), []
    for k in range(n):
        signal, noise = signal_and_noise(gradients[:k] + gradients[k + 1 :])
        parts.append(signal / noise)
    signal, noise = signal_and_noise(gradients)
    return signal / noise, math.sqrt((n - 1) * statistics.pvariance(parts))


def gradients_of(flags: list[str], num_batches: int) -> tuple[list[torch.Tensor], float]:
    """The gradient of one step of a script, --batches times, and the tokens generated for one of them."""
    gradients, tokens = [], 0
    for seed in range(num_batches):
        own = f"--minibatch-size 100000 --num-epochs 1 --num-iterations 1 --seed {102 + seed}".split()
        metrics, _, state = run(*flags, *own)
        tokens += metrics[1]["rollout/generated_tokens_total"] / num_batches
        if state:  # Adam's first moment after a step is .1 times the gradient, whose norm was clipped to 1
            scale = max(metrics[1]["losses/grad_norm"], 1.0) / 0.1
            gradients.append(scale * torch.cat([state[k]["exp_avg"].flatten() for k in sorted(state)]))
    return gradients, tokens


def noise_of(name: str, flags: list[str], num_batches: int, num_tokens: int) -> None:
    """A line of part 2."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-questions", type=int)
    parser.add_argument("--train-data", type=Path, default=ROOT / "tiny" / "train.jsonl")
    known, others = parser.parse_known_args(flags)  # the last of a flag that is given twice
    n = known.num_questions
    others += ["--num-questions", str(n), "--test-data", str(ROOT / "tiny" / "test.jsonl")]
    gradients, tokens = gradients_of([*others, "--train-data", str(known.train_data)], num_batches)
    with tempfile.TemporaryDirectory() as directory:
        same = Path(directory, "same.jsonl")
        same.write_text("".join(open(known.train_data).readlines()[:n]))
        same_questions, _ = gradients_of([*others, "--train-data", str(same)], num_batches)
    ratio, error = (x * num_tokens / tokens for x in with_error(gradients))
    signal, noise = signal_and_noise(gradients)
    within = signal_and_noise(same_questions)[1] * n / signal
    between = noise * n / signal - within
    print(f"| {name} | {tokens / n:,.0f} | {ratio:.3f} ± {error:.3f} | {within:.1f} | {between:.1f} "
          f"| {len(gradients)}, {len(same_questions)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--questions", type=int, default=40, help="of part 1, which 0 leaves out")
    parser.add_argument("--reference-rollouts", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--gradients", nargs="+", default=BATCHES.strip().split("\n"), metavar="'NAME | FLAGS'")
    parser.add_argument("--tokens", type=int, default=15_000, help="generated tokens to scale the ratios to")
    parser.add_argument("further", nargs="*", help="flags that the scripts get in part 2, after --")
    flags = parser.parse_args()
    if flags.questions:
        print("# Part 1: advantages", flush=True)
        advantages(flags.questions, flags.reference_rollouts)
    print("\n# Part 2: gradients", flush=True)
    print(f"| gradient | tokens for a question | signal / noise at {flags.tokens:,} generated tokens "
          "| W / signal | B / signal | batches |\n|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for line in flags.gradients:
        name, command = line.split("|")
        noise_of(name.strip(), [*command.split(), *flags.further], flags.batches, flags.tokens)
    print(f"\nCommit {present_commit()}")
