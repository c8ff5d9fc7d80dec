"""The training loops hand their flags and their data to the formulas, and report what came of it.

The formulas have tests of their own. Here a run is watched: the arguments and results of the script's
functions, in the order of their calls. Its flags are others than the defaults, where they may be.
"""

import json
import shutil
import sys
from statistics import fmean, pvariance
from types import SimpleNamespace

import pytest
import torch

import math_grader
from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import num_completions
from test_run import START, metrics, same_weights, weights

WATCHED = """sample_transformers grade_answer evaluate score_tokens check_sampler loss_mask policy_loss gae
    policy_step learnable_groups sample_trees tree_values segment_advantages draw_groups partition whiten
    prefix_values chain_advantages group_advantages score_values value_loss critic_step append_line""".split()
FLAGS = ["--num-iterations", 3, "--num-epochs", 2, "--learning-rate", 3e-5, "--anneal-learning-rate"]
FLAGS += ["--temperature", 0.8, "--top-p", 0.9, "--clip-range", 0.3, "--kl-coef", 0.05, "--minibatch-size", 6]
FLAGS += ["--max-response-tokens", 50, "--prob-mask"]
THRESHOLDS = dict.fromkeys(SCRIPTS, 0.7) | {"ppo.py": 0.1}  # not every minibatch of PPO has such a token
OWN_FLAGS = {
    "spo_tree.py": """--normalize-advantages --buffer-iterations 2 --segments-per-iteration 16
        --segment-tokens 44""".split(),
    "spo_chain.py": ["--cutpoint-interval", 2],
    "grpo.py": ["--leave-one-out"],
    "ppo.py": ["--gae-lambda", 0.9, "--critic-learning-rate", 1e-4],
}


def watch(run_script, script, *flags):
    """Runs a script; returns the calls of its functions as (name, arguments, result), in order."""
    calls, running = [], {}

    def profile(frame, event, result):
        code = frame.f_code
        if code.co_name in WATCHED and code.co_filename == str(ROOT / script):
            if event == "call":
                running[frame] = len(calls)
                calls.append((code.co_name, dict(frame.f_locals), None))
            elif event == "return":
                k = running.pop(frame)
                calls[k] = (*calls[k][:2], result)

    sys.setprofile(profile)
    status, _, error = run_script(script, *flags)
    sys.setprofile(None)
    assert status == 0, error
    return calls


def iterations(calls):
    """(calls, line of metrics.jsonl) of iteration 0, 1, ..."""
    parts, start = [], 0
    for k, (name, arguments, _) in enumerate(calls):
        if name == "append_line" and arguments["path"].name == "metrics.jsonl":
            parts.append((calls[start:k], arguments["record"]))
            start = k
    return parts


def arguments(calls, name):
    return [arguments for other, arguments, _ in calls if other == name]


def results(calls, name):
    return [result for other, _, result in calls if other == name]


def is_start_model(model):
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in weights(START).items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_data_reach_the_formulas_and_the_metrics(run_script, tmp_path, monkeypatch, script):
    """Every answer is called right: only those that are finished earn."""
    graded = []
    monkeypatch.setattr(math_grader, "grade_gsm8k", lambda response, gold: graded.append(response) or True)
    flags = [*SMALL[script], *FLAGS, *OWN_FLAGS[script], "--prob-threshold", THRESHOLDS[script]]
    calls = watch(run_script, script, *flags, "--run-dir", tmp_path / "run")
    assert not any("How many" in response or "<s>" in response for response in graded)  # answers, no prompts
    (start, before), *parts = iterations(calls)
    (held_out,) = arguments(start, "evaluate")
    assert before["eval/accuracy"] == 1  # of cut answers too, as they stand
    previous = None
    for iteration, (calls, row) in enumerate(parts, 1):
        assert row["iteration"] == iteration
        check_sampling(calls, row, before, held_out["problems"])
        check_log_probs(calls, row)
        check_update(script, calls, row)
        previous = CHECKS[script](calls, row, previous)
        before = row
    assert not same_weights(tmp_path / "run" / "model", START)


def check_sampling(calls, row, before, held_out):
    """They have the flags and are counted; only finished answers, to training problems, earn."""
    training = [(a, result) for name, a, result in calls if name == "sample_transformers" and a["n"] > 1]
    assert all((a["temperature"], a["top_p"]) == (0.8, 0.9) for a, _ in training)
    assert len({a["seed"] for a, _ in training}) == len(training) > 0
    sampled = sum(len(c.token_ids) for _, result in training for completions in result for c in completions)
    assert row["rollout/generated_tokens_total"] - before["rollout/generated_tokens_total"] == sampled
    names = [name for name, *_ in calls]
    end = names.index("evaluate") if "evaluate" in names else len(names)
    assert not {id(a["problem"]) for a in arguments(calls[:end], "grade_answer")} & {*map(id, held_out)}
    assert row["rollout/reward_mean"] == pytest.approx(1 - row["rollout/truncated_fraction"])
    assert 0 < row["rollout/truncated_fraction"] < 1


def check_log_probs(calls, row):
    """Old ones once, by the policy, when it sampled; the reference's by the start model."""
    old, ref = arguments(calls, "score_tokens")
    assert (old["attribute"], ref["attribute"]) == ("old_logprobs", "ref_logprobs")
    assert old["groups"] is ref["groups"] and old["model"] is not ref["model"]
    assert is_start_model(ref["model"])
    assert all(a["policy"] is old["model"] for a in arguments(calls, "policy_step"))
    logprobs = [x for group in old["groups"] for c in group.completions for x in c.old_logprobs]
    assert row["losses/entropy"] == pytest.approx(-fmean(logprobs or [0.0]))
    assert results(calls, "check_sampler") == [row["rollout/logprob_gap_mean"]]


def check_update(script, calls, row):
    """Each epoch deals all that was drawn out to minibatches of the flag's size; the loss has the flags."""
    rate = [3e-5, 2e-5, 1e-5][row["iteration"] - 1]  # one iteration of warm-up, the first
    assert row["losses/learning_rate"] == pytest.approx(rate)
    assert all(a["clip_range"] == 0.3 for a in arguments(calls, "policy_loss"))
    assert all(a["prob_threshold"] == THRESHOLDS[script] for a in arguments(calls, "loss_mask"))
    source = {"spo_tree.py": "draw_groups", "ppo.py": "score_values"}.get(script, "learnable_groups")
    drawn = arguments(calls, source)[0]["groups"] if script == "ppo.py" else results(calls, source)[0]
    num_steps = max(round(num_completions(drawn) / 6), 1)
    name = "critic_step" if script == "ppo.py" else "policy_step"
    minibatches = [a["groups"] for a in arguments(calls, name)]
    assert len(minibatches) == 2 * num_steps
    for epoch in (minibatches[:num_steps], minibatches[num_steps:]):
        dealt = [id(group) for groups in epoch for group in groups]
        assert sorted(dealt) == sorted(map(id, drawn))
    steps = results(calls, "policy_step")
    trained = [step for step in steps if step["losses/loss_tokens"] > 0]
    assert row["losses/optimizer_steps"] == len(trained)
    for key in ("losses/policy", "losses/kl", "losses/grad_norm", "losses/loss_tokens"):
        if steps:  # of those that were made
            assert row[key] == pytest.approx(fmean(step[key] for step in trained or steps))
    for step in arguments(calls, "policy_step"):
        (group,) = step["optimizer"].param_groups
        assert group["weight_decay"] == 0.0
        assert {*map(id, group["params"])} == {*map(id, step["policy"].parameters())}
        assert group["lr"] == pytest.approx(1e-5)  # that of the last iteration: it is the same object


def check_tree(calls, row, previous):
    """`previous`: what the iteration before left in the buffer."""
    (tree,) = arguments(calls, "tree_values")
    assert all(a["normalize"] for a in arguments(calls, "segment_advantages"))
    assert [a["group"] for a in arguments(calls, "segment_advantages")] == tree["groups"]
    segments = [child for group in tree["groups"] for child in group.completions]
    without = fmean(not any(child.advantages) for child in segments)
    assert row["segments/zero_advantage_fraction"] == pytest.approx(without)
    assert row["segments/count"] == len(segments)
    ((groups, leaves),) = results(calls, "sample_trees")
    prompts = {group.question: len(group.context) for group in groups if group.parent is None}
    lengths = [len(group.context + leaf.token_ids) - prompts[group.question] for group, leaf, _ in leaves]
    assert row["rollout/response_length"] == pytest.approx(fmean(lengths, [share for *_, share in leaves]))
    (draw,), (drawn,) = arguments(calls, "draw_groups"), results(calls, "draw_groups")
    assert draw["per_iteration"] == 16 and num_completions(drawn) <= 16
    fresh = results(calls, "learnable_groups")[0]
    waiting = [group for group in previous or [] if row["iteration"] - group.iteration < 2]
    assert [*map(id, draw["buffer"])] == [*map(id, waiting + fresh)]
    left = [group for group in draw["buffer"] if all(group is not other for other in drawn)]
    assert row["buffer/size"] == num_completions(left)
    return left


def check_chain(calls, row, previous):
    cuts, starts = arguments(calls, "partition"), results(calls, "partition")
    assert all((a["rule"], a["threshold"], a["interval"]) == ("cutpoint", 0.7, 2) for a in cuts)
    chains = results(calls, "chain_advantages")
    credit = [chain[start] for chain, own in zip(chains, starts) for start in own]  # of each segment
    assert row["segments/zero_advantage_fraction"] == pytest.approx(fmean(x == 0 for x in credit))
    groups = arguments(calls, "score_tokens")[0]["groups"]
    answers = [(group.question, answer) for group in groups for answer in group.completions]
    values = {}  # of the prefixes
    for (question, answer), own, a in zip(answers, starts, arguments(calls, "chain_advantages")):
        assert a["values"][-1] == answer.value
        for start, value in zip(own, a["values"]):
            assert values.setdefault((question, *answer.token_ids[:start]), value) == value
    (continued,) = arguments(calls, "prefix_values")  # equal ones once
    assert [(question, *begun) for question, begun in continued["prefixes"]] == [*values]
    assert row["segments/count"] == len(credit) > len(values)


def check_group(calls, row, previous):
    groups = arguments(calls, "group_advantages")
    assert len(groups) == 4 and all(a["normalize"] and a["leave_one_out"] for a in groups)
    equal = fmean(len({*a["rewards"]}) == 1 for a in groups)
    assert row["answers/zero_advantage_fraction"] == equal and row["answers/count"] == 16


def check_ppo(calls, row, previous):
    advantages = arguments(calls, "gae")
    assert len(advantages) == row["answers/count"] == 16 and all(a["gae_lambda"] == 0.9 for a in advantages)
    (old,) = results(calls, "score_values")  # once, before the update
    steps, losses = arguments(calls, "critic_step"), results(calls, "critic_step")
    assert all(a["old_values"] is old for a in steps)
    assert all(a["clip_range"] == 0.3 for a in arguments(calls, "value_loss"))
    rate = steps[0]["optimizer"].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-4 / 3)  # that of the last iteration
    whitened, made = len(arguments(calls, "whiten")), row["losses/optimizer_steps"]
    assert whitened == (len(steps) if row["iteration"] > 1 else 0)  # after the warm-up
    assert 0 < made < len(steps) or row["iteration"] == 1  # also where the policy's loss has no token:
    for key in ("losses/value", "critic/grad_norm"):
        assert row[key] == pytest.approx(fmean(step[key] for step in losses))
    errors = [a["reward"] - value for a in advantages for value in a["values"]]
    returns = [a["reward"] for a in advantages for _ in a["values"]]
    assert row["critic/explained_variance"] == pytest.approx(1 - pvariance(errors) / pvariance(returns))


CHECKS = {"spo_tree.py": check_tree, "spo_chain.py": check_chain, "grpo.py": check_group, "ppo.py": check_ppo}


def test_a_run_goes_on_with_other_flags(run_script, tmp_path, monkeypatch):
    """By the copy of the script in its directory. The reference stays the start model."""
    begun, logged, run_dir = [], [], tmp_path / "run"
    fake = SimpleNamespace(init=lambda **options: begun.append(options["id"]))
    fake.log = lambda values, step: logged.append(values)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    first = [*SMALL["grpo.py"], "--num-questions", 12, "--num-iterations", 1, "--kl-coef", 0.05]
    first += ["--max-response-tokens", 40, "--track", "--run-dir", run_dir]
    assert run_script("grpo.py", *first)[0] == 0
    later = ["--num-iterations", 2, "--max-response-tokens", 120, "--learning-rate", 3e-5]
    calls = watch(run_script, run_dir / "grpo.py", "--resume", run_dir, *later)
    ref = arguments(calls, "score_tokens")[-1]
    assert is_start_model(ref["model"]) and not same_weights(run_dir / "checkpoints" / "000001", START)
    rows = metrics(run_dir)
    assert rows[1]["rollout/response_length"] < 40.01 < rows[2]["rollout/response_length"]
    assert rows[2]["losses/learning_rate"] == 3e-5
    assert json.loads((run_dir / "args.json").read_text())["args"]["max_response_tokens"] == 120
    assert begun[0] == begun[1] and logged == rows  # W&B has them once

    # A run that has ended writes its model again. A chat template may tell the date: that is said.
    model = shutil.move(run_dir / "model", tmp_path / "model")
    for template, said in (("plain", 0), ("Today: {question}\n", 1)):
        _, output, _ = run_script("grpo.py", "--resume", run_dir, "--prompt-template", template)
        assert output.count("the data are not those") == said
    assert metrics(run_dir) == rows and same_weights(run_dir / "model", model)
