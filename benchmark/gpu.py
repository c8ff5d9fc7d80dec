"""Segment Policy Optimization: speed and memory of sampling, scoring and training, without a download.

    python benchmark/gpu.py                  # the embedded model and task; a minute on one core
    python benchmark/gpu.py --shape rho      # random weights in the shape of Rho-1.1B, lengths as on GSM8K
    python benchmark/gpu.py --shape qwen     # random weights in the shape of R1-Distill-Qwen-1.5B, lengths as on MATH at 2K
    python benchmark/gpu.py --iterations     # seconds of each phase of a full iteration of each script; with --shape as above
    python benchmark/gpu.py --memory         # the memory that the presets need, computed and not measured

Samples 6-6-6 trees (random weights: every segment to a given length), gives the leaves random rewards, and times with the
functions of spo_tree.py: the sampler, the old log-probs, and one optimizer step on packed rows against one padded sequence per
segment, for whole trees and for a minibatch drawn from the replay buffer. The loss and the gradient's norm stand beside the times:
they must agree between packed and padded. The share of the peak is 6 (forward only: 2) x parameters of the layers x tokens per
second, without attention, the output layer and the recomputation of gradient checkpointing, over the speed of a large matrix
product on the same device (bf16, on a CPU fp32).

--iterations runs the scripts themselves, with the preset's sizes. With random weights there are no answers to grade and no model
that has learned to stop: rewards are coin flips, many token ids end an answer, so that lengths are about those of a real model,
and --prob-threshold is set where --loss-share of the sampled tokens lie below it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import spo_tree
from spo_tree import Node

SHAPES = {  # preset, model, tokens of the prompt, of the last segment (from, to)
    "rho": ("gsm8k", partial(LlamaForCausalLM, LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        max_position_embeddings=2048)), 120, (10, 150)),
    "qwen": ("math", partial(Qwen2ForCausalLM, Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=131_072, tie_word_embeddings=False)), 150, (50, 648)),
}  # fmt: skip


def padded_step(policy, optimizer, groups: list[Node], args, batch_size: int) -> tuple[float, float, int]:
    """The optimizer step of `policy_step` from one right-padded sequence per segment: loss, gradient norm, tokens forwarded."""
    device, sequences = policy.device, []
    for group in groups:
        for node in group.children:
            advantages, old = torch.tensor(node.advantages), torch.tensor(node.old_logprobs)
            mask = spo_tree.loss_mask(advantages, old, args.prob_threshold)
            if mask.any():
                positions = len(group.token_ids) + mask.nonzero()[:, 0]  # in the sequence, of the loss tokens
                sequences.append((group.token_ids + node.token_ids, positions, advantages[mask], old[mask]))
    sequences.sort(key=lambda sequence: len(sequence[0]))
    Z, total, tokens = sum(len(positions) for _, positions, *_ in sequences), 0.0, 0
    policy.set_attn_implementation("sdpa")
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        width = max(len(token_ids) for token_ids, *_ in batch)
        input_ids = torch.tensor([token_ids + [0] * (width - len(token_ids)) for token_ids, *_ in batch], device=device)
        rows = torch.tensor([k for k, (_, positions, *_) in enumerate(batch) for _ in positions], device=device)
        positions, advantages, old = (torch.cat([sequence[i] for sequence in batch]).to(device) for i in (1, 2, 3))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = policy.lm_head(policy.model(input_ids, use_cache=False).last_hidden_state[rows, positions - 1])
        logprobs = -F.cross_entropy(logits.float() / args.temperature, input_ids[rows, positions], reduction="none")
        loss = spo_tree.policy_loss(logprobs, old, advantages, args.clip_range).sum() / Z
        loss.backward()
        total, tokens = total + loss.detach(), tokens + input_ids.numel()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(total), float(norm), tokens


def packed_step(policy, optimizer, trees: list[Node], args) -> tuple[float, float, int]:
    """`policy_step`: loss, gradient norm, tokens forwarded."""
    Z, norm, sums = spo_tree.policy_step(policy, optimizer, trees, args)
    rows = spo_tree.pack(trees, args.pack_tokens, pad=args.attention == "flex")
    return sums[1].item() / Z, norm, sum(len(row.token_ids) for row in rows)


def timed(name: str, function, device: torch.device):
    """Runs `function` once; prints seconds and, on a GPU, the peak of the memory allocated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory = f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"{name:44s} {seconds:8.2f} s{memory}", end="", flush=True)
    return seconds, result


def matmul_peak(device: torch.device) -> float:
    """Floating point operations per second of a large matrix product."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    for repeats in (3, 20):  # the first ones warm up
        start = time.perf_counter()
        for _ in range(repeats):
            b = a @ a
        b.sum().item()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def memory_table() -> None:
    """GB (10^9 bytes) by arithmetic: 16 bytes a parameter for weights, gradients and Adam, and what one packed row needs beside them.

    With gradient checkpointing a row keeps each layer's input in fp32, and one layer at a time is recomputed (attention and MLP, twice
    in bf16). A loss token has a row of logits in bf16, its log-softmax and its gradient in fp32. 3 GB are left to the driver.
    """
    print("| model | script | row | weights, gradients, Adam | reference | row's activations | logits | sum | with vLLM, 40 GB | 80 GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (_, make, _, _) in SHAPES.items():
        with torch.device("meta"):
            model = make()
        config, count = model.config, sum(parameter.numel() for parameter in model.parameters())
        for script, row, loss_share, critic in [("SPO", 4096, 0.15, 0), ("SPO", 8192, 0.15, 0), ("GRPO", 4096, 1.0, 0), ("PPO", 4096, 1.0, 1)]:
            trained = 16 * (count + critic * (count - model.lm_head.weight.numel()))
            activations = row * config.hidden_size * config.num_hidden_layers * 4
            activations += row * (4 * config.hidden_size + 3 * config.intermediate_size) * 2 * 2
            parts = [trained, 2 * count, activations, row * loss_share * config.vocab_size * 10]
            total = sum(parts) / 1e9
            engine = 2 * count / 1e9 + 2  # its weights, and 2 GB for cache and graphs at the very least
            fits = [f"--vllm-memory {int(100 * left / gpu) / 100:.2f} at most" if (left := gpu - 3 - total) >= engine else "no" for gpu in (40, 80)]
            print(f"| {name} | {script} | {row:,} | {' | '.join(f'{part / 1e9:.1f}' for part in parts)} | {total:.1f} | {' | '.join(fits)} |")


RUN_SCRIPT = """
import random, resource, runpy, sys
import torch, math_grader
verdict = random.Random(0)
if sys.argv.pop(1) == "random":
    math_grader.grade_gsm8k = lambda response, gold: verdict.random() < 0.5
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"peak {peak / 2**30:.1f} GiB")
"""


def iterations(shape: str, layers: int | None, questions: int | None, loss_share: float, directory: Path) -> None:
    """Prints the phases of the second iteration of each script, in seconds, and its tokens."""
    flags = ["--num-iterations", "2", "--eval-questions", "1", "--eval-samples", "1", "--seed", "1"]
    if questions:
        flags += ["--num-questions", str(questions)]
    if shape != "tiny":
        preset, make, prompt_tokens, last = SHAPES[shape]
        make.args[0].num_hidden_layers = layers or make.args[0].num_hidden_layers
        model, vocabulary = make(), make.args[0].vocab_size
        mean_length = {"rho": 120, "qwen": 1000}[shape]
        model.generation_config.eos_token_id = random.Random(0).sample(range(1000, vocabulary), vocabulary // mean_length)
        logprobs = model(torch.randint(vocabulary, (1, 64))).logits[0].log_softmax(-1)
        sampled = logprobs.gather(-1, torch.multinomial(logprobs.exp(), 20, replacement=True))
        threshold = sampled.flatten().quantile(loss_share).exp().item()
        model.to(torch.bfloat16).save_pretrained(directory / "model")
        AutoTokenizer.from_pretrained("tiny/model").save_pretrained(directory / "model")
        rows = [{"question": "1" * (prompt_tokens - 2), "answer": "#### 1"}] * 200  # a digit is a token; BOS and the line's end are two
        (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += ["--preset", preset, "--model", f"{directory}/model", "--train-data", f"{directory}/data.jsonl", "--prompt-template", "plain",
                  "--prob-threshold", str(threshold)]  # fmt: skip
    print(f"{shape}, seconds of one iteration after another to warm up\n| script | sample | value | log-probs | train | sync | generated tokens | "
          "loss tokens | peak |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for script in ("spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"):
        command = [sys.executable, "-c", RUN_SCRIPT, "real" if shape == "tiny" else "random", script, *flags, "--run-dir", f"{directory}/{script}.run"]
        result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"error: {script} failed:\n{result.stderr}")
        row = [json.loads(line) for line in open(directory / f"{script}.run" / "metrics.jsonl")]
        tokens = row[2]["rollout/generated_tokens_total"] - row[1]["rollout/generated_tokens_total"]
        cells = [f"{row[2][f'time/{phase}_s']:.2f}" for phase in ("sample", "value", "logprobs", "train", "sync")]
        cells += [f"{tokens:,}", f"{row[2]['losses/loss_tokens']:,.0f}", result.stdout.rpartition("peak ")[2].strip()]
        print(f"| {script} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the benchmark itself")
    parser.add_argument("--questions", type=int, help="questions of an iteration (default: 8; with --iterations the preset's)")
    parser.add_argument("--padded-batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pack-tokens", type=int, nargs="+", help="budgets of a packed row (default: the preset's)")
    parser.add_argument("--attention", choices=["flex", "dense"], default="flex" if torch.cuda.is_available() else "dense")
    parser.add_argument("--loss-share", type=float, default=0.15, help="share of tokens below --prob-threshold (random weights)")
    parser.add_argument("--iterations", action="store_true", help="run each script for two iterations")
    parser.add_argument("--memory", action="store_true")
    flags = parser.parse_args()
    if flags.memory:
        memory_table()
        sys.exit()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if flags.iterations:
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            iterations(flags.shape, flags.layers, flags.questions, flags.loss_share, Path(directory))
        sys.exit()
    flags.questions = flags.questions or 8
    rng, device = random.Random(0), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if flags.shape == "tiny":
        args, eos_token_ids = spo_tree.PRESETS["tiny"], [2]
        policy = AutoModelForCausalLM.from_pretrained("tiny/model", dtype=torch.float32)
        problems = spo_tree.load_problems("tiny/train.jsonl", "train", AutoTokenizer.from_pretrained("tiny/model"), "plain", 384, 128)
        prompts, last = [problem.prompt_ids for problem in problems[: flags.questions]], (128, 128)
    else:
        preset, make, prompt_tokens, last = SHAPES[flags.shape]
        args, eos_token_ids = spo_tree.PRESETS[preset], []
        config = make.args[0]
        config.num_hidden_layers = flags.layers or config.num_hidden_layers
        policy = make()
        prompts = [[rng.randrange(config.vocab_size) for _ in range(prompt_tokens)] for _ in range(flags.questions)]
    args.attention, args.kl_coef = flags.attention, 0.0
    policy = policy.to(device).eval()
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)  # every step starts from the same weights
    parameters, peak = sum(parameter.numel() for parameter in policy.model.layers.parameters()), matmul_peak(device)
    print(f"{flags.shape}: {sum(p.numel() for p in policy.parameters()) / 1e6:,.1f} M parameters, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, matrix "
          f"product {peak / 1e12:,.2f} TFLOP/s, attention {flags.attention}")

    roots = [Node(prompt) for prompt in prompts]

    def grow() -> int:
        """6-6-6 trees with the transformers sampler; returns the number of tokens."""
        frontier, tokens = [(root, root.token_ids) for root in roots], 0
        for level, hop in enumerate((*args.segment_tokens * 2, None)):
            limits = [hop or rng.randint(*last) for _ in frontier]
            prefixes = [prefix for _, prefix in frontier]
            sampled = spo_tree.sample_transformers(policy, eos_token_ids, prefixes, 6, limits, args.temperature, args.top_p, level)
            grown = []
            for (node, prefix), completions in zip(frontier, sampled):
                node.children = [Node(completion.token_ids) for completion in completions]
                grown += [(child, prefix + child.token_ids) for child, c in zip(node.children, completions) if not c.finished]
                tokens += sum(len(child.token_ids) for child in node.children)
            frontier = grown
        return tokens

    def report(tokens: int, seconds: float, trained: bool) -> None:
        flops = (6 if trained else 2) * parameters * tokens / seconds
        print(f"  {tokens:9,d} tokens {tokens / seconds:9,.0f} tokens/s  {flops / peak:6.1%} of the peak", end="\n" if not trained else "")

    seconds, tokens = timed("sample with transformers", grow, device)
    report(tokens, seconds, False)
    seconds, _ = timed("old log-probs, packed", lambda: spo_tree.score_tokens(policy, roots, "old_logprobs", args), device)
    report(sum(len(row.token_ids) for row in spo_tree.pack(roots, args.pack_tokens)), seconds, False)
    segments = [path[-1] for root in roots for path in spo_tree.paths(root)]
    for node in segments:
        node.value = rng.random() if node.children else float(rng.random() < 0.5)
        if flags.shape != "tiny":  # under random weights every token is improbable
            node.old_logprobs = [x if rng.random() < flags.loss_share else 0.0 for x in node.old_logprobs]
    for root in roots:
        spo_tree.tree_values(root)
        spo_tree.segment_advantages(root)
    groups = [group for k, root in enumerate(roots) for group in spo_tree.sibling_groups(root, k, 0)]
    drawn, _ = spo_tree.draw_groups(groups, 128 // min(flags.questions, 4), 128, rng)
    print(f"{flags.questions} trees with {len(segments):,d} segments; a buffered minibatch with {spo_tree.num_children(drawn)}")
    policy.train(args.gradient_checkpointing)
    for label, some, trees in [("whole trees", groups, roots), ("buffered", drawn, drawn)]:
        ways = [(f"padded, {size} a batch", partial(padded_step, policy, optimizer, some, args, size)) for size in flags.padded_batch_sizes]
        for budget in flags.pack_tokens or [args.pack_tokens]:
            budgeted = spo_tree.dataclasses.replace(args, pack_tokens=budget)
            ways.append((f"packed, rows of {budget}", partial(packed_step, policy, optimizer, trees, budgeted)))
        if device.type == "cuda":  # compile and warm up
            packed_step(policy, optimizer, trees[:1], args)
        for name, step in ways:
            seconds, (loss, norm, tokens) = timed(f"train {label}, {name}", step, device)
            report(tokens, seconds, True)
            print(f"  loss {loss:+.5f}  gradient {norm:.5f}")
