"""What an evaluation and an iteration report, by formula."""

from statistics import fmean, pstdev

import pytest
import torch

import math_grader
import spo_tree
from conftest import tiny_args
from spo_tree import Completion, Problem, evaluate
from test_run import lines


SPECIAL = ("<pad>", "<s>", "</s>")


class Words:
    """A tokenizer of answers: 8 is no answer, any other number one."""

    def get_added_vocab(self):
        return {}

    def decode(self, token_ids, **options):
        return " ".join("" if token_id == 8 else f"#### {token_id}" for token_id in token_ids)


def test_an_evaluation_is_over_problems(monkeypatch):
    """3, 1 and 0 of 4 answers are right: the interval is that of the problems' shares, not of the 12 answers."""
    problems = [Problem([k], "7", is_math=False) for k in range(3)]
    right = {0: [7, 7, 7, 8], 1: [7, 8, 8, 8], 2: [8, 8, 8, 8]}
    asked = []

    def sample(contexts, n, limits, temperature, top_p, seed):
        asked.append((n, limits, temperature, top_p, seed))
        return [[Completion([token], [0.0], finished=token == 7) for token in right[c[0]]] for c in contexts]

    args = tiny_args(eval_samples=4, temperature=0.7, max_response_tokens=9)
    metrics, shares = evaluate(problems, sample, Words(), args), [0.75, 0.25, 0.0]
    assert metrics["eval/accuracy"] == pytest.approx(fmean(shares))
    assert metrics["eval/accuracy_ci95"] == pytest.approx(1.96 * pstdev(shares) / 3**0.5)
    assert metrics["eval/truncated_fraction"] == pytest.approx(8 / 12) and metrics["eval/response_length"] == 1
    assert metrics["eval/unreadable_fraction"] == pytest.approx(8 / 12)
    evaluate(problems, sample, Words(), args)
    assert asked[0] == asked[1] and asked[0][:4] == (4, [9, 9, 9], 0.7, 1.0)  # the same random numbers each time
    for given in (0.0, 0.3):
        evaluate(problems, sample, Words(), tiny_args(eval_samples=1, eval_temperature=given))
        assert asked[-1][2] == given


def test_temperature_zero_takes_the_most_probable_token(model):
    context, ids = [5, 6, 7], []
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([context + ids])).logits[0, -1].argmax()))
    (greedy,), (again,) = (
        [c.token_ids for c in spo_tree.sample_transformers(model, [], [context], 1, [6], 0.0, 1.0, seed)[0]]
        for seed in (1, 2)
    )
    assert greedy == again == ids


def test_a_tree_reports_what_a_walk_from_its_root_would_see(run_script, tmp_path):
    """Every child equally likely: an early leaf counts as much as a whole subtree of longer answers."""
    flags = ["--branch-factors", 12, 2, "--segment-tokens", 46, "--temperature", 1.6, "--max-response-tokens", 56]
    flags += ["--num-questions", 1, "--num-iterations", 1, "--eval-questions", 2]
    assert run_script("spo_tree.py", *flags, "--run-dir", tmp_path / "run")[0] == 0
    row, sample = lines(tmp_path / "run" / "metrics.jsonl")[1], lines(tmp_path / "run" / "samples.jsonl")[0]
    nodes = sample["completions"]
    parents = {node["parent"] for node in nodes}
    probability, length, text, ends = {None: 1.0}, {None: 0}, {None: ""}, []
    for k, node in enumerate(nodes):
        probability[k] = probability[node["parent"]] / (12 if node["parent"] is None else 2)
        length[k] = length[node["parent"]] + len(node["tokens"])
        text[k] = text[node["parent"]] + "".join(token for token in node["tokens"] if token not in SPECIAL)
        if k not in parents:
            unreadable = math_grader.gsm8k_value(text[k]) is None
            ends.append((probability[k], length[k], node["tokens"][-1] != "</s>", unreadable))
    assert sum(p for p, *_ in ends) == pytest.approx(1) and len({p for p, *_ in ends}) == 2
    assert row["rollout/response_length"] == pytest.approx(sum(p * n for p, n, *_ in ends))
    assert row["rollout/truncated_fraction"] == pytest.approx(sum(p * cut for p, _, cut, _ in ends))
    assert row["rollout/unreadable_fraction"] == pytest.approx(sum(p * unreadable for p, *_, unreadable in ends))
    assert row["rollout/unreadable_fraction"] > 0
