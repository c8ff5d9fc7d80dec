"""Compiled layers, which make a GPU fast, change nothing."""

import copy
import random
from functools import partialmethod

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_groups, tiny_args
from spo_tree import load_trained, policy_step, sample_transformers, score_tokens

ARGS = tiny_args(gradient_checkpointing=True)


def step(model, groups):
    """The metrics of a step, and how far it moved the weights."""
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    numbers = policy_step(model, torch.optim.SGD(model.parameters(), lr=1.0), groups, ARGS)
    return numbers, torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before


class Disguised(str):
    """A CPU by its name, on which layers are compiled as on a GPU."""

    type = "cuda"


def test_compiled_layers_give_the_same_step(model, tmp_path, monkeypatch):
    """Traced as on a GPU, but not translated to C++, which would take a minute."""
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    groups = random_groups(random.Random(0))
    score_tokens(model, groups, "old_logprobs", ARGS)
    for group in groups:
        for k, completion in enumerate(group.completions):
            completion.advantages = [(-1.0, 0.5)[k % 2]] * len(completion.token_ids)
    expected, moves = step(copy.deepcopy(model), groups)
    torch._dynamo.reset()
    model.save_pretrained(tmp_path)
    compiled = load_trained(AutoModelForCausalLM, tmp_path, ARGS, Disguised("cpu"))
    assert compiled.is_gradient_checkpointing
    assert list(compiled.state_dict()) == list(model.state_dict())  # it is saved as before
    numbers, compiled_moves = step(compiled, groups)
    captured = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert captured > 0 and numbers == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert (compiled_moves - moves).norm() < 1e-5 * moves.norm()
    sample_transformers(compiled.eval(), [2], [[5, 6, 7]], 3, [20], 1.0, 1.0, seed=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == captured  # where every step is longer
