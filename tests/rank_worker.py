"""Run by test_ranks.py under torchrun: each update on each kind of share, averages and weights to files."""

import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from spo_tree import gather
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
dist.destroy_process_group()
