"""Run by test_ranks.py under torchrun: each update on each kind of share, averages and weights to files; which
groups are dealt to which step; and whether a rank goes on when sampler and trainer of the other one disagree.
"""

import json
import random
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from conftest import tiny_args
from spo_tree import Completion, Group, check_sampler, deal, gather
from test_ranks import SHARES, UPDATES

dist.init_process_group("gloo")
rank = dist.get_rank()
for kind, shares in product(UPDATES, SHARES):
    weights, numbers = UPDATES[kind](lambda groups: SHARES[shares](groups, rank))
    ranks = gather([value for step in numbers for value in step.values()])
    if rank == 0:
        averages = torch.tensor(ranks, dtype=torch.float64).mean(0)
        weights = {name: value.detach().clone() for name, value in weights.items()}
        save_file(weights | {"numbers": averages}, Path(sys.argv[1]) / f"{kind} {shares}.safetensors")
ends = []
for gap in (1e-4, 0.1):
    completion = Completion([2, 3], [-1.0 + gap, -1.0], old_logprobs=[-1.0, -1.0])
    groups = [Group(0, 0, [1], [completion])] if rank else []
    try:
        ends.append(check_sampler(groups, 1.0, tiny_args(), torch.device("cpu")))
    except SystemExit as exit:
        ends.append(str(exit))
dealt = []  # (siblings in each group, size of a minibatch, numbers of the groups in each step), of both ranks
for seed in range(100):
    rng = random.Random(f"{seed} {rank}")
    sizes = rng.choices(range(1, 7), k=rng.choice([0, 1, 4, 30]))
    minibatch_size = random.Random(seed).choice([1, 6, 40])
    if seed == 0:  # the example of the docstring
        sizes, minibatch_size = [[3] * 4, [3] * 2][rank], 6
    groups = [Group(number, 0, [1], [Completion([2], [])] * size) for number, size in enumerate(sizes)]
    minibatches = [[group.question for group in groups] for groups in deal(groups, minibatch_size)]
    dealt.append(gather((sizes, minibatch_size, minibatches)))
ends = gather(ends)
if rank == 0:
    (Path(sys.argv[1]) / "ends.json").write_text(json.dumps(ends))
    (Path(sys.argv[1]) / "dealt.json").write_text(json.dumps(dealt))
dist.destroy_process_group()
