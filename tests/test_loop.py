"""The training loops hand their flags and their data to the formulas, and report what came of it.

The formulas have tests of their own. Here a run is watched: the arguments and results of the script's functions
in the order of their calls. Its flags are others than the defaults, where they may be.
"""

import sys
from statistics import fmean, pvariance

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT, SCRIPTS, SMALL
from spo_tree import num_completions

WATCHED = """sample_transformers score_tokens loss_mask policy_loss policy_step learnable_groups tree_values
    segment_advantages draw_groups partition prefix_values chain_advantages group_advantages score_values gae
    whiten value_loss critic_step append_line""".split()
FLAGS = ["--num-iterations", 4, "--num-epochs", 2, "--learning-rate", 3e-5, "--anneal-learning-rate"]
FLAGS += ["--temperature", 0.8, "--top-p", 0.9, "--clip-range", 0.3, "--kl-coef", 0.05]
THRESHOLDS = dict.fromkeys(SCRIPTS, 0.7) | {"ppo.py": 0.1}  # not every minibatch of PPO has such a token
OWN_FLAGS = {
    "spo_tree.py": ["--normalize-advantages", "--buffer-iterations", 2, "--segments-per-iteration", 16],
    "spo_chain.py": ["--cutpoint-interval", 2],
    "grpo.py": ["--leave-one-out"],
    "ppo.py": ["--gae-lambda", 0.9, "--critic-learning-rate", 1e-4],
}
MINIBATCH_SIZE = 6


class Watch:
    """Calls of functions that a script defines, as (name, arguments, result), in order; a context manager."""

    def __init__(self, script):
        self.script, self.calls, self.running = str(ROOT / script), [], {}

    def profile(self, frame, event, result):
        code = frame.f_code
        if code.co_name in WATCHED and code.co_filename == self.script:
            if event == "call":
                self.running[frame] = len(self.calls)
                self.calls.append((code.co_name, dict(frame.f_locals), None))
            elif event == "return":
                k = self.running.pop(frame)
                self.calls[k] = (*self.calls[k][:2], result)

    def __enter__(self):
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def iterations(self):
        """(calls, line of metrics.jsonl) of iteration 0, 1, ..."""
        parts, start = [], 0
        for k, (name, arguments, _) in enumerate(self.calls):
            if name == "append_line" and arguments["path"].name == "metrics.jsonl":
                parts.append((self.calls[start:k], arguments["record"]))
                start = k
        return parts


def arguments(calls, name):
    return [arguments for other, arguments, _ in calls if other == name]


def results(calls, name):
    return [result for other, _, result in calls if other == name]


def flat(groups, name):
    return [x for group in groups for completion in group.completions for x in getattr(completion, name)]


def same_weights(model, directory):
    start = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    return all(torch.equal(start[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_data_reach_the_formulas_and_the_metrics(run_script, tmp_path, script):
    with Watch(script) as watch:
        flags = [*SMALL[script], *FLAGS, *OWN_FLAGS[script], "--minibatch-size", MINIBATCH_SIZE]
        flags += ["--prob-mask", "--prob-threshold", THRESHOLDS[script]]
        status, _, error = run_script(script, *flags, "--run-dir", tmp_path / "run")
    assert status == 0, error
    (_, first), *iterations = watch.iterations()
    assert [first["iteration"], *(row["iteration"] for _, row in iterations)] == [0, 1, 2, 3, 4]
    previous, before = None, first
    for iteration, (calls, row) in enumerate(iterations, 1):
        check_sampling(calls, iteration)
        policy = check_log_probs(calls)
        check_update(script, calls, row, iteration, policy)
        scored = next(a["groups"] for a in arguments(calls, "score_tokens") if a["attribute"] == "old_logprobs")
        assert row["losses/entropy"] == pytest.approx(-fmean(flat(scored, "old_logprobs") or [0.0]))
        previous = CHECKS[script](calls, row, previous)
        check_totals(calls, row, before)
        before = row
    assert not same_weights(policy, ROOT / "tiny" / "model")


def check_sampling(calls, iteration):
    """Answers and rollouts at the flags' temperature and nucleus; evaluations without a nucleus."""
    sampled = arguments(calls, "sample_transformers")
    training = [a for a in sampled if a["n"] > 1]
    assert training and all((a["temperature"], a["top_p"]) == (0.8, 0.9) for a in training)
    assert len({a["seed"] for a in training}) == len(training)
    evaluation = [a for a in sampled if a["n"] == 1]
    assert len(evaluation) == (iteration == 4) and all(a["top_p"] == 1.0 for a in evaluation)


def check_totals(calls, row, before):
    """Tokens sampled, rollouts included, and tokens in the loss."""
    training = [result for name, a, result in calls if name == "sample_transformers" and a["n"] > 1]
    sampled = sum(len(c.token_ids) for result in training for completions in result for c in completions)
    trained = sum(step["losses/loss_tokens"] for step in results(calls, "policy_step"))
    for name, count in {"generated": sampled, "trained": trained}.items():
        key = f"rollout/{name}_tokens_total"
        assert row[key] - before[key] == count


def check_log_probs(calls):
    """Old ones once, by the policy, when it sampled; the reference's by the start model."""
    old, ref = arguments(calls, "score_tokens")
    assert (old["attribute"], ref["attribute"]) == ("old_logprobs", "ref_logprobs") and old["groups"] is ref["groups"]
    assert same_weights(ref["model"], ROOT / "tiny" / "model") and ref["model"] is not old["model"]
    assert all(a["policy"] is old["model"] for a in arguments(calls, "policy_step"))
    return old["model"]


def check_update(script, calls, row, iteration, policy):
    """Each epoch deals all that was drawn out to minibatches of the flag's size; the loss has the flags."""
    rate = [3e-5, 2.25e-5, 1.5e-5, 0.75e-5][iteration - 1]  # one iteration of warm-up, the first
    assert row["losses/learning_rate"] == pytest.approx(rate)
    assert all(a["clip_range"] == 0.3 for a in arguments(calls, "policy_loss"))
    assert all(a["prob_threshold"] == THRESHOLDS[script] for a in arguments(calls, "loss_mask"))
    if script == "ppo.py":
        drawn = arguments(calls, "score_values")[0]["groups"]
    else:
        drawn = results(calls, "draw_groups" if script == "spo_tree.py" else "learnable_groups")[0]
    num_steps = max(round(num_completions(drawn) / MINIBATCH_SIZE), 1)
    name = "critic_step" if script == "ppo.py" else "policy_step"
    minibatches = [a["groups"] for a in arguments(calls, name)]
    assert len(minibatches) == 2 * num_steps
    for epoch in (minibatches[:num_steps], minibatches[num_steps:]):
        dealt = [id(group) for groups in epoch for group in groups]
        assert sorted(dealt) == sorted(map(id, drawn))
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1
    steps = results(calls, "policy_step")
    trained = [step for step in steps if step["losses/loss_tokens"] > 0]
    assert row["losses/optimizer_steps"] == len(trained)
    if script == "ppo.py" and iteration > 1:  # after the warm-up
        assert 0 < len(trained) < len(steps)
    for step in arguments(calls, "policy_step"):
        (group,) = step["optimizer"].param_groups
        assert group["weight_decay"] == 0.0 and {*map(id, group["params"])} == {*map(id, policy.parameters())}
        assert group["lr"] == pytest.approx(0.75e-5)  # that of the last iteration: it is the same object
    for key in ("losses/policy", "losses/kl", "losses/grad_norm", "losses/loss_tokens"):
        if steps:
            assert row[key] == pytest.approx(fmean(step[key] for step in trained or steps))


def check_tree(calls, row, previous):
    """`previous`: what the iteration before left in the buffer."""
    (tree,) = arguments(calls, "tree_values")
    groups = tree["groups"]
    assert row["rollout/reward_mean"] == pytest.approx(fmean(g.value for g in groups if g.parent is None))
    assert all(a["normalize"] for a in arguments(calls, "segment_advantages"))
    assert [a["group"] for a in arguments(calls, "segment_advantages")] == groups
    segments = [child for group in groups for child in group.completions]
    without = fmean(not any(child.advantages) for child in segments)
    assert row["segments/zero_advantage_fraction"] == pytest.approx(without)
    assert row["segments/count"] == len(segments)
    (draw,), (drawn,) = arguments(calls, "draw_groups"), results(calls, "draw_groups")
    assert draw["per_iteration"] == 16 and num_completions(drawn) <= 16
    fresh = results(calls, "learnable_groups")[0]
    waiting = [group for group in previous or [] if row["iteration"] - group.iteration < 2]
    assert [*map(id, draw["buffer"])] == [*map(id, waiting + fresh)]
    left = [group for group in draw["buffer"] if all(group is not other for other in drawn)]
    assert row["buffer/size"] == num_completions(left)
    ages = [row["iteration"] - group.iteration for group in drawn for _ in group.completions]
    assert row["buffer/age_mean"] == pytest.approx(fmean(ages or [0]))
    return left


def check_chain(calls, row, previous):
    cuts, starts = arguments(calls, "partition"), results(calls, "partition")
    assert all((a["rule"], a["threshold"], a["interval"]) == ("cutpoint", 0.7, 2) for a in cuts)
    assert row["chain/cutpoints"] == pytest.approx(fmean(sum(p < 0.7 for p in a["probs"]) for a in cuts))
    assert row["chain/segments"] == pytest.approx(fmean(map(len, starts)))
    assert row["segments/zero_advantage_fraction"] == pytest.approx(fmean(
        chain[start] == 0 for chain, own in zip(results(calls, "chain_advantages"), starts) for start in own
    ))  # fmt: skip
    groups = arguments(calls, "score_tokens")[0]["groups"]
    answers = [(group.question, answer) for group in groups for answer in group.completions]
    values = {}  # of the prefixes
    for (question, answer), own, a in zip(answers, starts, arguments(calls, "chain_advantages")):
        assert a["values"][-1] == answer.value
        for start, value in zip(own, a["values"]):
            assert values.setdefault((question, *answer.token_ids[:start]), value) == value
    (continued,) = arguments(calls, "prefix_values")  # equal ones once
    assert [(question, *begun) for question, begun in continued["prefixes"]] == [*values]
    assert row["segments/count"] == sum(map(len, starts)) > len(values)
    sampled, rollouts = (
        sum(len(c.token_ids) for completions in result for c in completions)
        for result in results(calls, "sample_transformers")[:2]
    )
    assert row["chain/rollout_fraction"] == pytest.approx(rollouts / (sampled + rollouts))
    assert row["rollout/reward_mean"] == pytest.approx(fmean(answer.value for _, answer in answers))


def check_group(calls, row, previous):
    groups = arguments(calls, "group_advantages")
    assert len(groups) == 4 and all(a["normalize"] and a["leave_one_out"] for a in groups)
    assert row["rollout/reward_mean"] == pytest.approx(fmean(fmean(a["rewards"]) for a in groups))
    equal = fmean(len({*a["rewards"]}) == 1 for a in groups)
    assert row["answers/zero_advantage_fraction"] == equal and row["answers/count"] == 16


def check_ppo(calls, row, previous):
    advantages = arguments(calls, "gae")
    assert len(advantages) == 16 and all(a["gae_lambda"] == 0.9 for a in advantages)
    (old,) = results(calls, "score_values")  # once, before the update
    steps = arguments(calls, "critic_step")
    assert all(a["old_values"] is old for a in steps)
    for key in ("losses/value", "critic/grad_norm"):  # also of minibatches without a token in the policy's loss
        assert row[key] == pytest.approx(fmean(step[key] for step in results(calls, "critic_step")))
    assert all(a["clip_range"] == 0.3 for a in arguments(calls, "value_loss"))
    assert steps[0]["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-4 / 4)  # that of the last iteration
    assert len(arguments(calls, "whiten")) == (len(steps) if row["iteration"] > 1 else 0)  # after the warm-up
    errors = [a["reward"] - value for a in advantages for value in a["values"]]
    returns = [a["reward"] for a in advantages for _ in a["values"]]
    explained = 1 - pvariance(errors) / pvariance(returns) if pvariance(returns) else 0.0
    assert row["critic/explained_variance"] == pytest.approx(explained)
    zeros = fmean(not any(chain) for chain in results(calls, "gae"))
    assert row["answers/zero_advantage_fraction"] == zeros and row["answers/count"] == 16
    assert row["rollout/reward_mean"] == pytest.approx(fmean(a["reward"] for a in advantages))


CHECKS = {"spo_tree.py": check_tree, "spo_chain.py": check_chain, "grpo.py": check_group, "ppo.py": check_ppo}


def test_the_reference_of_a_resumed_run_is_the_start_model(run_script, tmp_path):
    flags = [*SMALL["grpo.py"], "--num-questions", 12, "--kl-coef", 0.05, "--run-dir", tmp_path / "run"]
    assert run_script("grpo.py", *flags, "--num-iterations", 1)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert not same_weights(model, ROOT / "tiny" / "model")  # as the checkpoint's are not
    with Watch("grpo.py") as watch:
        assert run_script("grpo.py", "--resume", tmp_path / "run", "--num-iterations", 2)[0] == 0
    old, ref = arguments(watch.calls, "score_tokens")[-2:]
    assert (old["attribute"], ref["attribute"]) == ("old_logprobs", "ref_logprobs")
    assert same_weights(ref["model"], ROOT / "tiny" / "model") and ref["model"] is not old["model"]
