"""Segment Policy Optimization: speed and memory of sampling, scoring and training, without a download.

    python benchmark/gpu.py                 # the embedded model and task; a minute on one core
    python benchmark/gpu.py --shape rho     # random weights in the shape of Rho-1.1B, lengths as on GSM8K
    python benchmark/gpu.py --shape qwen    # in the shape of R1-Distill-Qwen-1.5B, lengths as on MATH at 2K
    python benchmark/gpu.py --iterations    # seconds of each phase of each script; with --shape as above
    python benchmark/gpu.py --memory        # the memory that the presets need, computed and not measured

Samples 6-6-6 trees (random weights: segments of given lengths), gives the leaves random rewards, and times
with the functions of spo_tree.py: the sampler, the old log-probs, and one optimizer step on packed rows
against one padded sequence per segment, for whole trees and for a minibatch drawn from the buffer. The loss
and the gradient's norm stand beside the times: packed and padded must agree. The share of the peak is 6
(forward only: 2) x parameters of the layers x tokens per second, without attention, output layer and
recomputation, over the speed of a large matrix product on the same device (bf16, on a CPU fp32).

--iterations runs the scripts themselves, with the preset's sizes. Random weights have not learned to stop
or to answer: many token ids end an answer, so that lengths are about those of a real model, half of them
read "#### 1", which is right, and --prob-threshold is set where --loss-share of the tokens lie below it.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import runpy
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import spo_tree
from spo_tree import Group

SHAPES = {  # tokens of the prompt, of the last segment (from, to), of an answer in the mean
    "rho": dict(preset="gsm8k", prompt=120, last=(10, 150), answer=120, config=LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)),
    "qwen": dict(preset="math", prompt=150, last=(50, 648), answer=1000, config=Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131_072,
        tie_word_embeddings=False)),
}  # fmt: skip


def padded_step(policy, optimizer, groups: list[Group], args, batch_size: int) -> tuple[float, float, int]:
    """`policy_step` from a right-padded sequence per segment: loss, gradient norm, tokens forwarded."""
    device, sequences = policy.device, []
    for group in groups:
        for segment in group.completions:
            advantages, old = torch.tensor(segment.advantages), torch.tensor(segment.old_logprobs)
            mask = spo_tree.loss_mask(advantages, old, args.prob_threshold)
            if mask.any():
                token_ids = torch.tensor(group.context + segment.token_ids)
                positions = len(group.context) + mask.nonzero()[:, 0]  # of the loss tokens
                sequences.append((token_ids, positions, advantages[mask], old[mask]))
    sequences.sort(key=lambda sequence: len(sequence[0]))
    Z, total, tokens = sum(len(positions) for _, positions, *_ in sequences), 0.0, 0
    policy.set_attn_implementation("sdpa")
    for start in range(0, len(sequences), batch_size):
        token_ids, *tensors = zip(*sequences[start : start + batch_size])
        counts = torch.tensor([len(positions) for positions in tensors[0]])
        rows = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        positions, advantages, old = (torch.cat(tensor).to(device) for tensor in tensors)
        input_ids = pad_sequence(token_ids, batch_first=True).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = policy.model(input_ids, use_cache=False).last_hidden_state
            logits = policy.lm_head(hidden[rows, positions - 1]).float() / args.temperature
        logprobs = -F.cross_entropy(logits, input_ids[rows, positions], reduction="none")
        loss = spo_tree.policy_loss(logprobs, old, advantages, args.clip_range).sum() / Z
        loss.backward()
        total, tokens = total + loss.item(), tokens + input_ids.numel()
    return total, spo_tree.optimizer_step(policy, optimizer), tokens


def packed_tokens(groups: list[Group], args) -> int:
    """Tokens that are forwarded, with the padding of rows for FlexAttention."""
    unit = args.pack_tokens if args.attention == "flex" else 1
    return sum(math.ceil(len(row.token_ids) / unit) * unit for row in spo_tree.pack(groups, args.pack_tokens))


def packed_step(policy, optimizer, groups: list[Group], args) -> tuple[float, float, int]:
    metrics = spo_tree.policy_step(policy, optimizer, groups, args)
    return metrics["losses/policy"], metrics["losses/grad_norm"], packed_tokens(groups, args)


def matmul_peak(device: torch.device) -> float:
    """Floating point operations per second of a large matrix product."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / Timer("a @ a", globals={"a": a}).timeit(20).mean


def sample_trees(policy, ends, prompts, last_segment, args, rng) -> tuple[list[Group], int]:
    """6-6-6 trees, sampled with transformers, and the number of their tokens."""
    level, groups, tokens = [Group(k, 0, prompt) for k, prompt in enumerate(prompts)], [], 0
    for depth, hop in enumerate((*args.segment_tokens * 2, None)):
        limits = [hop or rng.randint(*last_segment) for _ in level]
        contexts, how = [group.context for group in level], (args.temperature, args.top_p, depth)
        sampled = spo_tree.sample_transformers(policy, ends, contexts, 6, limits, *how)
        groups += level
        parents, level = level, []
        for group, group.completions in zip(parents, sampled):
            for child in group.completions:
                tokens += len(child.token_ids)
                if hop and not child.finished:
                    level.append(Group(group.question, 0, group.context + child.token_ids, parent=child))
    return groups, tokens


def one_step(flags, preset: str, model: str, data: str) -> None:
    """Prints the seconds of sampling trees, scoring them and one optimizer step."""
    rng, device = random.Random(0), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = replace(spo_tree.PRESETS[preset], attention=flags.attention, kl_coef=0.0)
    ends, last_segment = ([2], (128, 128)) if preset == "tiny" else ([], SHAPES[flags.shape]["last"])
    tokenizer, rows = AutoTokenizer.from_pretrained(model), spo_tree.read_rows(data, "train")
    problems = spo_tree.load_problems(data, rows, tokenizer, "plain", 256)
    prompts = [problem.prompt_ids for problem in problems[: flags.questions]]
    policy = spo_tree.load_model(AutoModelForCausalLM, model, torch.float32, device)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)  # every step starts from the same weights
    parameters = sum(parameter.numel() for parameter in policy.model.layers.parameters())
    millions, peak = sum(parameter.numel() for parameter in policy.parameters()) / 1e6, matmul_peak(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{flags.shape}: {millions:,.1f} M parameters, {name}, matrix product {peak / 1e12:,.2f} TFLOP/s, "
          f"attention {flags.attention}")

    def timed(name: str, flops: int, function, *arguments):
        """Calls a function, whose result ends with a number of tokens; prints how long it takes."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start, memory = time.perf_counter(), ""
        *result, tokens = function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory = f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        seconds = time.perf_counter() - start
        print(f"{name:44s} {seconds:8.2f} s{memory}  {tokens:9,d} tokens {tokens / seconds:9,.0f} tokens/s  "
              f"{flops * parameters * tokens / seconds / peak:6.1%} of the peak", end="")
        print("  loss {:+.5f}  gradient {:.5f}".format(*result) if flops == 6 else "", flush=True)
        return result

    sample = (sample_trees, policy, ends, prompts, last_segment, args, rng)
    (groups,) = timed("sample with transformers", 2, *sample)
    segments = [segment for group in groups for segment in group.completions]
    for segment in segments:
        segment.value = float(rng.random() < 0.5)  # those of inner nodes become means
    spo_tree.tree_values(groups)
    for group in groups:
        spo_tree.segment_advantages(group)
    fresh = spo_tree.learnable_groups(groups)

    def score():
        spo_tree.score_tokens(policy, fresh, "old_logprobs", args)
        return [packed_tokens(fresh, args)]

    timed("old log-probs, packed", 2, score)
    if flags.shape != "tiny":  # under random weights every token is improbable
        for segment in segments:
            logprobs = segment.old_logprobs
            segment.old_logprobs = [x if rng.random() < flags.loss_share else 0.0 for x in logprobs]
    drawn = spo_tree.draw_groups(fresh, 128 // min(flags.questions, 4), 128, rng)
    print(f"{flags.questions} trees with {len(segments):,d} segments; "
          f"a buffered minibatch with {spo_tree.num_completions(drawn)}")
    policy.train(args.gradient_checkpointing)
    if device.type == "cuda":  # compile and warm up
        packed_step(policy, optimizer, fresh[:1], args)
    for label, some in (("whole trees", fresh), ("buffered", drawn)):
        for size in flags.padded_batch_sizes:
            name = f"train {label}, padded, {size} a batch"
            timed(name, 6, padded_step, policy, optimizer, some, args, size)
        for budget in flags.pack_tokens or [args.pack_tokens]:
            name, budgeted = f"train {label}, packed, rows of {budget}", replace(args, pack_tokens=budget)
            timed(name, 6, packed_step, policy, optimizer, some, budgeted)


def memory_table() -> None:
    """GB (10^9 bytes): 16 bytes a parameter for weights, gradients and Adam, and what one packed row needs.

    With gradient checkpointing a row keeps each layer's input in fp32, and one layer at a time is recomputed
    (attention and MLP, twice in bf16). A loss token has a row of logits in bf16, its log-softmax and its
    gradient in fp32. 3 GB are left to the driver.
    """
    print("| model | script | row | weights, gradients, Adam | reference | row's activations | logits | "
          f"sum | with vLLM, 40 GB | 80 GB |\n{'|---' * 10}|")
    for name, shape in SHAPES.items():
        config = shape["config"]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        head = config.vocab_size * config.hidden_size  # which the critic does not have
        rows = [("SPO", 4096, 0.15), ("SPO", 8192, 0.15), ("GRPO", 4096, 1.0), ("PPO", 4096, 1.0)]
        for script, row, loss_share in rows:
            trained = 16 * (2 * count - head if script == "PPO" else count)
            activations = row * config.hidden_size * config.num_hidden_layers * 4
            activations += row * (4 * config.hidden_size + 3 * config.intermediate_size) * 2 * 2
            parts = [trained, 2 * count, activations, row * loss_share * config.vocab_size * 10]
            cells = [f"{part / 1e9:.1f}" for part in (*parts, sum(parts))]
            for gpu in (40, 80):
                left = gpu - 3 - sum(parts) / 1e9
                engine = 2 * count / 1e9 + 2  # its weights, and 2 GB for cache and graphs at the very least
                share = int(100 * left / gpu) / 100
                cells.append(f"--vllm-memory {share:.2f} at most" if left >= engine else "no")
            print(f"| {name} | {script} | {row:,} | {' | '.join(cells)} |")


@torch.no_grad()
def random_model(shape: dict, loss_share: float, directory: Path) -> float:
    """Writes a model with random weights and problems; returns the probability that a share is below."""
    model = AutoModelForCausalLM.from_config(shape["config"])
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model"), model.config.vocab_size
    ends = range(len(tokenizer), len(tokenizer) + vocabulary // shape["answer"])
    tokenizer.add_tokens([f"({k})\n#### 1" if k % 2 else f"({k})" for k in ends])
    tokenizer.save_pretrained(directory / "model")
    model.generation_config.eos_token_id = list(ends)
    logprobs = model(torch.randint(vocabulary, (1, 64))).logits[0].log_softmax(-1)
    sampled = logprobs.gather(-1, torch.multinomial(logprobs.exp(), 20, replacement=True))
    model.to(torch.bfloat16).save_pretrained(directory / "model")
    question = "1" * (shape["prompt"] - 2)  # a digit is a token; BOS and the line's end are two
    row = json.dumps({"question": question, "answer": "#### 1"})
    (directory / "data.jsonl").write_text(f"{row}\n" * 1000)
    return sampled.flatten().quantile(loss_share).exp().item()


def run_script(script: str, flags: list[str]) -> int:
    """Runs a script in this process; returns the peak of memory, on a GPU of what was allocated there."""
    sys.argv = [script, *flags]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        runpy.run_path(script, run_name="__main__")
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def iterations(flags, further: list[str], directory: Path) -> None:
    """Prints the phases of the second iteration of each script, in seconds, and its tokens."""
    common = "--num-iterations 2 --eval-questions 1 --eval-samples 1 --seed 1".split() + further
    if flags.questions:
        common += ["--num-questions", str(flags.questions)]
    print(f"{flags.shape}, seconds of one iteration after another to warm up\n| script | sample | value | "
          f"log-probs | train | sync | generated tokens | loss tokens | peak |\n{'|---' * 9}|")
    for script in ("spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"):
        run_dir = directory / f"{script}.run"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peak = process.submit(run_script, script, [*common, "--run-dir", str(run_dir)]).result()
        _, before, row = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
        tokens = row["rollout/generated_tokens_total"] - before["rollout/generated_tokens_total"]
        phases = ("sample", "value", "logprobs", "train", "sync")
        cells = [f"{row[f'time/{phase}_s']:.2f}" for phase in phases]
        cells += [f"{tokens:,}", f"{row['losses/loss_tokens']:,.0f}", f"{peak / 2**30:.1f} GiB"]
        print(f"| {script} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the benchmark itself")
    parser.add_argument("--questions", type=int, help="default: 8; with --iterations the preset's")
    parser.add_argument("--padded-batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pack-tokens", type=int, nargs="+", help="default: the preset's")
    gpu = torch.cuda.is_available()
    parser.add_argument("--attention", choices=["flex", "dense"], default="flex" if gpu else "dense")
    parser.add_argument("--loss-share", type=float, default=0.15, help="of tokens below --prob-threshold")
    parser.add_argument("--iterations", action="store_true", help="run each script for two iterations")
    parser.add_argument("--memory", action="store_true")
    flags = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if flags.memory:
        memory_table()
        sys.exit()
    with tempfile.TemporaryDirectory() as directory:
        preset, model, data, further = "tiny", "tiny/model", "tiny/train.jsonl", []
        if flags.shape != "tiny":
            shape = SHAPES[flags.shape]
            shape["config"].num_hidden_layers = flags.layers or shape["config"].num_hidden_layers
            preset, model, data = shape["preset"], f"{directory}/model", f"{directory}/data.jsonl"
            threshold = random_model(shape, flags.loss_share, Path(directory))
            further = f"--preset {preset} --prob-threshold {threshold} --prompt-template plain".split()
            further += ["--model", model, "--train-data", data]
        if flags.iterations:
            iterations(flags, further, Path(directory))
        else:
            flags.questions = flags.questions or 8
            one_step(flags, preset, model, data)
