"""Run by test_ranks.py under torchrun: each update on each kind of share, averages and weights to files; and
whether a rank goes on when the sampler and the trainer of the other one disagree.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from conftest import tiny_args
from spo_tree import Completion, Group, check_sampler, gather
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
ends = gather(ends)
if rank == 0:
    (Path(sys.argv[1]) / "ends.json").write_text(json.dumps(ends))
dist.destroy_process_group()
