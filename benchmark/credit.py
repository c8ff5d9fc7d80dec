"""Segment Policy Optimization: how good are the advantages, and how much signal do the gradients carry, at equal generated tokens.

    python benchmark/credit.py                 # both parts, about half an hour on one core
    python benchmark/credit.py --questions 4 --reference-rollouts 100 --batches 4        # a short form
    python benchmark/credit.py --batches 4 -- --num-questions 2                          # flags of the scripts in part 2

Part 1, on the embedded start model: spo_tree.py grows a 6-6-6 tree over each question (its own code, without an update). The common
answers are one path below each of the root's children, with the tree's boundaries. The reference for V at a boundary is the mean
of --reference-rollouts continuations. Compared are A = V(end) - V(start) as SPO-tree estimates it from the tree, as SPO-chain does
from 1, 4 or 9 continuations of each boundary, and GRPO's one advantage for the whole answer, R - mean(R) of a group of 8.

Part 2: every script runs --batches iterations on the start model without changing it; its gradient before clipping is recorded, one
step an iteration. With g_i from independent batches, signal = mean over i != j of <g_i, g_j>, noise = mean of |g_i|^2 - signal,
and the ratio signal / noise (± its standard error, jackknife) is scaled to the same number of generated tokens: the noise of a mean
falls as 1 / tokens.
"""

import argparse
import contextlib
import io
import json
import math
import random
import runpy
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import spo_tree


def run(script: str, *flags) -> tuple[list[torch.Tensor], list[dict], list[dict]]:
    """Runs a script without updates; returns the gradient of each optimizer step, its metrics and its sampled trees."""
    gradients: list[torch.Tensor] = []

    class Recorder(torch.optim.SGD):
        """Keeps gradients instead of applying them. Only the policy's: the critic has a learning rate of its own."""

        def __init__(self, parameters, **options):
            super().__init__(parameters, lr=0.0)

        def step(self):
            gradients.append(torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]]))

    real = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_, sys.argv
    with tempfile.TemporaryDirectory() as directory:
        try:
            torch.optim.AdamW = Recorder
            torch.nn.utils.clip_grad_norm_ = lambda parameters, most: real[1](parameters, math.inf)
            sys.argv = [script, "--run-dir", f"{directory}/run", "--checkpoint-every", "1000000", *map(str, flags)]
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            torch.optim.AdamW, torch.nn.utils.clip_grad_norm_, sys.argv = real
        metrics, samples = (list(map(json.loads, open(f"{directory}/run/{name}.jsonl"))) for name in ("metrics", "samples"))
    return gradients, metrics, samples


def signal_to_noise(gradients: list[torch.Tensor]) -> float:
    """mean_{i != j} <g_i, g_j> / (mean_i |g_i|^2 - the same): unbiased in numerator and denominator."""
    products = (torch.stack(gradients) @ torch.stack(gradients).T).double()
    n = len(gradients)
    own = products.diagonal().mean().item()
    signal = (products.sum().item() - n * own) / (n * (n - 1))
    return signal / (own - signal)


def with_error(gradients: list[torch.Tensor]) -> tuple[float, float]:
    """`signal_to_noise` and its standard error (jackknife over the batches)."""
    n = len(gradients)
    parts = [signal_to_noise(gradients[:k] + gradients[k + 1 :]) for k in range(n)]
    return signal_to_noise(gradients), math.sqrt((n - 1) * statistics.pvariance(parts))


def correlation(x: list[float], y: list[float]) -> float:
    return statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else math.nan


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--reference-rollouts", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=15_000, help="generated tokens that the ratios are scaled to")
    parser.add_argument("further", nargs="*", help="flags that the scripts get in part 2, after --")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rng, model_path = random.Random(0), "tiny/model"
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    problems = spo_tree.load_problems("tiny/train.jsonl", "train", tokenizer, "plain", 384, 128)
    prompts = {tokenizer.decode(problem.prompt_ids): problem for problem in problems}

    print("# Part 1: advantages", flush=True)
    _, metrics, samples = run("spo_tree.py", "--branch-factors", 6, 6, 6, "--num-questions", 1, "--num-iterations", flags.questions, "--eval-every",
                              1, "--eval-questions", 1, "--eval-samples", 1, "--buffer-iterations", 0, "--seed", 101)  # fmt: skip
    tree_tokens = metrics[-1]["rollout/generated_tokens_total"] / flags.questions
    token_ids = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    names = ["SPO-tree 6-6-6", "SPO-chain, 1 rollout", "SPO-chain, 4 rollouts", "SPO-chain, 9 rollouts", "GRPO, group of 8"]
    estimates = {name: [] for name in names}
    reference, answers, answer_tokens, rollout_tokens = [], 0, 0, 0.0
    for sample in samples:
        tree, problem = sample["tree"], prompts[sample["tree"]["prompt"]]

        def rewards_of(prefixes: list[list[int]], rollouts: int, seed: int) -> list[list[float]]:
            limits = [128 - len(prefix) for prefix in prefixes]
            contexts = [problem.prompt_ids + prefix for prefix in prefixes]
            sampled = spo_tree.sample_transformers(model, [tokenizer.eos_token_id], contexts, rollouts, limits, 1.0, 1.0, seed)
            global rollout_tokens  # for one rollout of each distinct boundary
            rollout_tokens += sum(statistics.fmean(len(c.token_ids) for c in completions) for completions in sampled)
            return [[float(c.finished and problem.grade(spo_tree.decode(tokenizer, prefix + c.token_ids), problem.gold)) for c in completions]
                    for prefix, completions in zip(prefixes, sampled)]  # fmt: skip

        paths, prefixes = [], {(): []}
        for child in tree["children"]:
            path, prefix = [child], [token_ids[token] for token in child["tokens"]]
            while path[-1]["children"]:
                prefixes[tuple(prefix)] = prefix
                path.append(rng.choice(path[-1]["children"]))
                prefix = prefix + [token_ids[token] for token in path[-1]["tokens"]]
            paths.append(path)
        drawn = rewards_of(list(prefixes.values()), flags.reference_rollouts + 14, rng.getrandbits(60))
        V = {name: {key: statistics.fmean(rewards[a:b]) for key, rewards in zip(prefixes, drawn)} for name, a, b in (
            (names[1], 0, 1), (names[2], 1, 5), (names[3], 5, 14), ("reference", 14, None))}  # fmt: skip
        group = drawn[0][:8]  # rewards of whole answers, one of which the common answer replaces
        for path in paths:
            reward, prefix, values = path[-1]["value"], (), {name: [v[()]] for name, v in V.items()}
            for segment in path:
                prefix += tuple(token_ids[token] for token in segment["tokens"])
                for name, v in V.items():
                    values[name].append(v[prefix] if segment["children"] else reward)
            for name in (*names[1:4], "reference"):
                differences = [b - a for a, b in zip(values[name], values[name][1:])]
                (reference if name == "reference" else estimates[name]).extend(differences)
            estimates[names[0]] += [segment["advantages"][0] for segment in path]
            estimates[names[4]] += [reward - statistics.fmean([reward, *group[1:]])] * len(path)
            answers, answer_tokens = answers + 1, answer_tokens + len(prefix)
    nodes = statistics.fmean(row["segments/count"] for row in metrics[1:])
    print(f"{flags.questions} questions, {answers} answers, {len(reference)} segments; reference: {flags.reference_rollouts} rollouts a boundary")
    print("| estimate | tokens generated for each segment | correlation | right sign where abs(A) >= .05 | mean absolute error |")
    print("|---|---|---|---|---|")
    clear = [k for k, a in enumerate(reference) if abs(a) >= 0.05]
    for name in names:
        rollouts = {names[1]: 1, names[2]: 4, names[3]: 9}.get(name, 0)
        cost = tree_tokens / nodes if name == names[0] else (answer_tokens + rollouts * rollout_tokens) / len(reference)
        signs = statistics.fmean(estimates[name][k] * reference[k] > 0 for k in clear)
        error = statistics.fmean(abs(a - b) for a, b in zip(estimates[name], reference))
        print(f"| {name} | {cost:.0f} | {correlation(estimates[name], reference):.3f} | {signs:.3f} | {'' if 'GRPO' in name else f'{error:.3f}'} |")

    print("\n# Part 2: gradients", flush=True)
    rows = []
    for name, script, *own in [
        ("SPO-tree 6-6-6", "spo_tree.py", "--branch-factors", 6, 6, 6, "--buffer-iterations", 0, "--num-questions", 4),
        ("SPO-tree 6-6", "spo_tree.py", "--buffer-iterations", 0, "--num-questions", 8),
        ("SPO-chain, 1 rollout", "spo_chain.py", "--mc-rollouts", 1, "--num-questions", 8),
        ("SPO-chain, 4 rollouts", "spo_chain.py", "--mc-rollouts", 4, "--num-questions", 8),
        ("SPO-chain, 9 rollouts", "spo_chain.py", "--mc-rollouts", 9, "--num-questions", 8),
        ("SPO-chain, 4 rollouts, no mask", "spo_chain.py", "--mc-rollouts", 4, "--num-questions", 8, "--no-prob-mask"),
        ("VinePPO, 9 rollouts", "spo_chain.py", "--mc-rollouts", 9, "--num-questions", 8, "--partition", "newline", "--no-prob-mask"),
        ("GRPO", "grpo.py", "--num-questions", 32),
        ("GRPO + mask", "grpo.py", "--num-questions", 32, "--prob-mask"),
    ]:  # fmt: skip
        gradients, metrics, _ = run(script, *own, "--num-iterations", flags.batches, "--num-epochs", 1, "--minibatch-size", 100_000, "--eval-questions", 1,
                                    "--eval-samples", 1, "--eval-every", 100_000, "--seed", 102, *flags.further)  # fmt: skip
        tokens = metrics[-1]["rollout/generated_tokens_total"] / flags.batches
        ratio, error = (x * flags.tokens / tokens for x in with_error(gradients))
        rows.append(f"| {name} | {tokens:,.0f} | {ratio:.3f} ± {error:.3f} | {len(gradients)} |")
    print(f"| gradient | tokens generated for a batch | signal / noise at {flags.tokens:,} generated tokens | batches |\n|---|---|---|---|")
    print("\n".join(rows))
