"""What makes a GPU fast changes nothing: compiled layers, and weights that are cast to bf16 once."""

import copy
import dataclasses
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import random_groups, tiny_args
from spo_tree import load_sampler, load_trained, pack, policy_step, sample_transformers, score_tokens

ARGS = tiny_args(pack_tokens=40, kl_coef=0.1, prob_mask=False)


@pytest.fixture(scope="module")
def smooth():
    """A random Llama whose log-probs bf16 changes by less than a hundredth."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256, initializer_range=0.05)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def groups(smooth):
    rng = random.Random(0)
    groups = random_groups(rng)
    score_tokens(smooth, groups, "old_logprobs", ARGS)
    for group in groups:
        for completion in group.completions:
            completion.ref_logprobs = [logprob - 0.1 for logprob in completion.old_logprobs]
            completion.advantages = [rng.choice([-1.0, 0.5])] * len(completion.token_ids)
    assert len(pack(groups, ARGS.pack_tokens)) == 3
    return groups


class Gradients:
    """In place of the optimizer: keeps the gradients of a step, before it drops them."""

    def __init__(self, model):
        self.model = model

    def step(self):
        parameters = self.model.parameters()
        self.flat = torch.cat([parameter.grad.flatten().clone() for parameter in parameters])

    def zero_grad(self):
        self.model.zero_grad()


def step(model, groups, args=ARGS):
    optimizer = Gradients(model)
    return policy_step(model, optimizer, groups, args), optimizer.flat


class Disguised(str):
    """A CPU by its name, on which layers are compiled as on a GPU."""

    type = "cuda"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_step(smooth, groups, tmp_path, checkpointing):
    torch._dynamo.reset()
    smooth.save_pretrained(tmp_path)
    args = dataclasses.replace(ARGS, gradient_checkpointing=checkpointing)
    plain, model = step(smooth, groups), load_trained(AutoModelForCausalLM, tmp_path, args, Disguised("cpu"))
    assert model.is_gradient_checkpointing == checkpointing
    names = list(model.state_dict())
    metrics, gradients = step(model, groups, args)
    captured = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert captured > 0 and names == list(smooth.state_dict())  # compiled, and saved as before
    assert metrics == pytest.approx(plain[0], abs=1e-5)
    assert (gradients - plain[1]).norm() < 1e-5 * plain[1].norm()
    sample_transformers(model.eval(), [2], [[5, 6, 7]], 3, [20], 1.0, 1.0, seed=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == captured  # where every step is longer


class Casts(TorchDispatchMode):
    """Counts the casts of a model's parameters."""

    def __init__(self, model):
        super().__init__()
        self.places, self.count = {parameter.data_ptr() for parameter in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_in_a_step(smooth, groups, monkeypatch):
    """`policy_step` is one autocast context: casts live as long as the outermost one, here of a CPU's bf16."""
    exact, model = step(smooth, groups), copy.deepcopy(smooth)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with Casts(model) as casts_once:
        once = step(model, groups)
    monkeypatch.setattr("spo_tree.bf16", nullcontext)
    with Casts(model) as casts_each:
        each = step(model, groups)
    matrices = sum(parameter.dim() == 2 for parameter in smooth.parameters()) - 1  # the embedding is a table
    assert casts_once.count == matrices and casts_each.count == 3 * matrices  # of three rows
    assert torch.equal(each[1], once[1])
    error = (once[1] - exact[1]).norm() / exact[1].norm()
    assert 1e-4 < error < 0.03
    assert once[0]["losses/policy"] == pytest.approx(exact[0]["losses/policy"], abs=0.02)


def test_weights_are_cast_once_in_a_sample(smooth):
    """Autocast keeps no casts in inference mode."""
    model = copy.deepcopy(smooth).eval()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.generation_config.eos_token_id = []
    sample, _ = load_sampler(model, SimpleNamespace(eos_token_id=40), 384, ARGS)  # an end that is never sampled
    with Casts(model) as casts:
        (completions,) = sample([[5, 6, 7]], 3, [20], 1.0, 1.0, seed=1)
    assert [len(completion.token_ids) for completion in completions] == [20] * 3
    assert casts.count == sum(parameter.dim() == 2 for parameter in model.parameters()) - 1
