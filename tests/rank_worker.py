"""Run by test_ranks.py under torchrun: one optimizer step on this rank's share of the trees, weights and sums to a file."""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from conftest import tiny_args
from spo_tree import policy_step, sum_over_ranks
from test_ranks import critic_updates, make_policy, make_trees

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
if sys.argv[2] == "critic":
    device = torch.device("cpu")
    weights, numbers = critic_updates(lambda trees: trees[rank::world_size], lambda values: sum_over_ranks(values, device))
else:
    policy = make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    batches = [make_trees(policy, seed) for seed in (1, 2)]
    numbers = []
    for trees in batches:
        share = trees[rank::world_size] if sys.argv[2] == "even" else trees[:0] if rank else trees  # or rank 0 has all of them
        Z, norm, sums = policy_step(policy, optimizer, share, tiny_args(kl_coef=0.1))
        numbers += [Z, norm, *sum_over_ranks(sums[:5].tolist(), policy.device)]
    weights = {name: value.detach().clone() for name, value in policy.state_dict().items() if name != "lm_head.weight"}
if rank == 0:
    save_file(weights | {"numbers": torch.tensor(numbers, dtype=torch.float64)}, sys.argv[1])
dist.destroy_process_group()
