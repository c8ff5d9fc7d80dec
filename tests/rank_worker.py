"""Run by test_ranks.py under torchrun: updates on this rank's share; weights and averages go to a file."""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from spo_tree import gather
from test_ranks import UPDATES

path, kind, shares = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
if shares == "even":
    weights, numbers = UPDATES[kind](lambda groups: groups[rank::2])
else:
    weights, numbers = UPDATES[kind](lambda groups: [] if rank else groups)
ranks = gather([value for step in numbers for value in step.values()])
if rank == 0:
    averages = torch.tensor(ranks, dtype=torch.float64).mean(0)
    weights = {name: value.detach().clone() for name, value in weights.items()}
    save_file(weights | {"numbers": averages}, path)
dist.destroy_process_group()
