"""Segment Policy Optimization: what packing saves. Forward and backward passes over whole 6-6-6 trees of the embedded task,
packed into rows against one padded sequence per segment, in one run.

    python benchmark/packing.py                  # 8 trees, about a minute on one core
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from spo_tree import Node, descendants, load_problems, locate, pack, sample_transformers, token_logprobs


def grow(model, problems, branch_factors, hops) -> list[Node]:
    """Trees sampled as in spo_tree.py."""
    roots = [Node(problem.prompt_ids) for problem in problems]
    frontier = [(root, root.token_ids) for root in roots]
    for depth, (factor, hop) in enumerate(zip(branch_factors, hops)):
        sampled = sample_transformers(model, [2], [prefix for _, prefix in frontier], factor, [hop] * len(frontier), 1.0, 1.0, seed=depth)
        grown = []
        for (node, prefix), completions in zip(frontier, sampled):
            node.children = [Node(completion.token_ids) for completion in completions]
            grown += [(child, prefix + child.token_ids) for child, c in zip(node.children, completions) if not c.finished]
        frontier = grown
    return roots


def padded(model, roots, batch_size) -> tuple[int, torch.Tensor]:
    """Sum of all log-probs with one sequence per segment, in padded batches of similar length; the gradient stays in the model."""
    sequences = []
    stack = [(root, root.token_ids) for root in roots]
    while stack:
        node, prefix = stack.pop()
        sequences += [(prefix, child.token_ids) for child in node.children]
        stack += [(child, prefix + child.token_ids) for child in node.children]
    sequences.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    tokens, total = 0, 0.0
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        width = max(len(prefix) + len(segment) for prefix, segment in batch)
        input_ids = torch.tensor([prefix + segment + [0] * (width - len(prefix) - len(segment)) for prefix, segment in batch])
        first = torch.tensor([len(prefix) for prefix, _ in batch])[:, None]
        last = first + torch.tensor([len(segment) for _, segment in batch])[:, None]
        scored = ((torch.arange(width) >= first) & (torch.arange(width) < last))[:, 1:]
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1][scored]
        logprobs = logits.log_softmax(-1).gather(1, input_ids[:, 1:][scored][:, None])
        logprobs.sum().backward()
        tokens, total = tokens + input_ids.numel(), total + logprobs.sum().item()
    return tokens, total


def packed(model, roots, budget) -> tuple[int, torch.Tensor]:
    """The same from packed rows."""
    tokens, total = 0, 0.0
    for row in pack(roots, budget):
        logprobs = token_logprobs(model, row, row.scored(), 1.0)
        logprobs.sum().backward()
        tokens, total = tokens + len(row.token_ids), total + logprobs.sum().item()
    return tokens, total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--segment-tokens", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(locate("tiny/model"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(locate("tiny/model"))
    problems = load_problems("tiny/train.jsonl", "train", tokenizer, "plain", 200)[: args.questions]
    roots = grow(model, problems, (6, 6, 6), (args.segment_tokens, args.segment_tokens, 128))
    print(f"{args.questions} trees 6-6-6, {sum(len(descendants(root)) for root in roots)} segments")
    reference = None
    for name, run in [(f"padded, {size} sequences a batch", lambda size=size: padded(model, roots, size)) for size in (1, 8, 32)] + [
        (f"packed, rows of {budget} tokens", lambda budget=budget: packed(model, roots, budget)) for budget in (192, 256, 384, 512)
    ]:
        model.zero_grad()
        start = time.perf_counter()
        tokens, total = run()
        seconds = time.perf_counter() - start
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        reference = gradient if reference is None else reference
        print(f"{name:32s} {tokens:8,d} tokens {seconds:6.2f} s   gradient differs by {(gradient - reference).norm() / reference.norm():.1e}")
