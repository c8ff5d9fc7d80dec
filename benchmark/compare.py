"""Segment Policy Optimization: the algorithms side by side, at the same number of generated tokens, over several seeds.

    python benchmark/compare.py                            # temperature 1: 6 algorithms x 5 seeds to 200,000 tokens
    python benchmark/compare.py --setting temperature-0.6  # another setting, see SETTINGS
    python benchmark/compare.py --setting search-1         # the search of the shapes, six runs for each algorithm
    python benchmark/compare.py --algorithms "GRPO=grpo.py" "PPO=ppo.py" --seeds 1 2 --budget 100000
    python benchmark/compare.py --algorithms "int2=spo_chain.py --cutpoint-interval 2" "int5=spo_chain.py" -- --learning-rate 2e-4
    python benchmark/compare.py --algorithms --runs "elsewhere=runs/A,runs/B"      # only draw runs that exist

Runs each script as a user would, --jobs at a time, in <out>/<algorithm>__<seed>, until an evaluation at or after the budget; flags
after -- go to all of them. The same command after an interrupt continues where it stopped. Reads nothing but metrics.jsonl, and writes
to <out>: results.csv (every evaluation, with the commit of the code that made it), table.md and curves.png; and prices.md and
prices.png, the same runs at equal seconds if the sampling of a token took 3 and 10 times as long as it did. An interval is the 95 %
interval of the mean over seeds (Student's t). Seconds are training time without evaluations; with --jobs above 1 the runs slow each
other down alike. Trained tokens are loss tokens, updates are optimizer steps of the policy; the accuracies at an equal number of
either are taken at the largest number that every run has reached.
"""

import argparse
import csv
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
CHAINS = {
    "SPO-chain": "spo_chain.py",
    "interval 2": "spo_chain.py --cutpoint-interval 2",
    "interval 100": "spo_chain.py --cutpoint-interval 100",
    "no mask": "spo_chain.py --no-prob-mask",
    "1 rollout": "spo_chain.py --mc-rollouts 1",
    "9 rollouts": "spo_chain.py --mc-rollouts 9",
    "fixed": "spo_chain.py --partition fixed --segment-tokens 20",
}


def searched_shapes() -> dict[str, str]:
    """Six shapes of each algorithm, alike: an iteration generates about equally many tokens in all of them."""
    shapes = {}
    for name, script, group_sizes in (
        ("GRPO", "grpo.py", (2, 4, 8)), ("GRPO + mask", "grpo.py --prob-mask", (2, 4, 8)), ("PPO", "ppo.py", (1, 2, 4)),
    ):  # fmt: skip
        for answers, epochs in itertools.product(group_sizes, (1, 2)):
            shape = f"--num-questions {256 // answers} --samples-per-question {answers} --num-epochs {epochs}"
            shapes[f"{name} {256 // answers} x {answers}, epochs {epochs}"] = f"{script} {shape}"
    for questions, factors in ((64, "2 2"), (32, "4 2"), (16, "8 2"), (16, "4 4"), (8, "6 6"), (8, "4 4 4")):
        shape = f"--num-questions {questions} --branch-factors {factors}"
        shapes[f"SPO-tree {questions} x {factors.replace(' ', '-')}"] = f"spo_tree.py {shape}"
    for questions, answers, rollouts, interval in (
        (8, 8, 4, 5), (16, 4, 4, 5), (16, 4, 4, 10), (12, 8, 2, 5), (24, 4, 2, 5), (24, 4, 2, 3),
    ):  # fmt: skip
        shape = f"--num-questions {questions} --samples-per-question {answers}"
        shape += f" --mc-rollouts {rollouts} --cutpoint-interval {interval}"
        shapes[f"SPO-chain {questions} x {answers}, rollouts {rollouts}, interval {interval}"] = f"spo_chain.py {shape}"
    return shapes


BEST_1 = (  # of docs/search-1.csv
    "GRPO 32 x 8, epochs 2", "GRPO + mask 32 x 8, epochs 2", "PPO 256 x 1, epochs 1",
    "SPO-tree 64 x 2-2", "SPO-chain 16 x 4, rollouts 4, interval 10",
)  # fmt: skip
BEST_06 = (  # of docs/search-0.6.csv
    "GRPO 32 x 8, epochs 2", "GRPO + mask 64 x 4, epochs 2", "PPO 64 x 4, epochs 1",
    "SPO-tree 32 x 4-2", "SPO-chain 24 x 4, rollouts 2, interval 5",
)  # fmt: skip


def compared(best: tuple[str, ...]) -> dict[str, str]:
    """The best shape of each algorithm in the search at a temperature, and the paper's trees."""
    paper = {"SPO-tree, the paper's 4 x 6-6-6": "spo_tree.py --num-questions 4 --branch-factors 6 6 6"}
    return {name: searched_shapes()[name] for name in best} | paper


@dataclass
class Setting:
    """What the runs of a comparison have in common."""

    algorithms: dict[str, str]
    seeds: tuple[int, ...]
    budget: int  # generated tokens of a run
    flags: str  # of all scripts


SEEDS = (1, 2, 3, 4, 5)  # of the tables; a search has another one
SETTINGS = {
    "temperature-1": Setting(compared(BEST_1), SEEDS, 200_000, "--temperature 1 --eval-samples 2 --eval-every 2"),
    "temperature-0.6": Setting(compared(BEST_06), SEEDS, 200_000, "--temperature 0.6 --eval-samples 2 --eval-every 2"),
    "search-1": Setting(searched_shapes(), (11,), 200_000, "--temperature 1 --eval-samples 2"),
    "search-0.6": Setting(searched_shapes(), (11,), 200_000, "--temperature 0.6 --eval-samples 2"),
    "chain": Setting(CHAINS, (1, 2, 3), 240_000, "--temperature 1 --eval-samples 4"),
}
GENERATED, TRAINED, SECONDS, UPDATES = "rollout/generated_tokens_total", "rollout/trained_tokens_total", "time/elapsed_s", "updates"
AXES = {
    GENERATED: "tokens generated for training",
    SECONDS: "seconds of training, evaluations not counted",
    TRAINED: "tokens trained (in the loss), logarithmic",
    UPDATES: "updates (optimizer steps of the policy)",
}
SAMPLING = "seconds of sampling"  # up to an evaluation, with a chain's rollouts and the grading
PRICES = (1, 3, 10)  # of sampling, in what it took
STUDENT_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantile by degrees of freedom


def evaluations(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl that hold an evaluation, each with the optimizer steps and the seconds of sampling up to it."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    updates = itertools.accumulate(row.get("losses/optimizer_steps", 0) for row in rows)
    sampling = itertools.accumulate(row.get("time/sample_s", 0) for row in rows)
    zeros = {"rollout/generated_tokens_total": 0, "rollout/trained_tokens_total": 0}
    rows = [zeros | row | {UPDATES: steps, SAMPLING: seconds} for row, steps, seconds in zip(rows, updates, sampling)]
    return [row for row in rows if "eval/accuracy" in row]


def present_commit() -> str:
    """Of this repository, with "-dirty" where tracked files differ from it; "unknown" where git does not say."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # there is no git
        return "unknown"


def commits_of(run_dir: Path) -> str:
    """The commits at which a run was started and continued, as `run` wrote them beside its directory."""
    path = run_dir.parent / f"{run_dir.name}.commit"
    return " ".join(dict.fromkeys(path.read_text().split())) if path.exists() else "unknown"


def run(command: str, seed: int, run_dir: Path, flags: list[str], budget: int) -> None:
    """Runs or continues one script until an evaluation at or after the budget."""

    def done() -> bool:
        return any(row["rollout/generated_tokens_total"] >= budget for row in evaluations(run_dir))

    if done():
        return
    script, *own = shlex.split(command)
    start = ["--resume", run_dir] if run_dir.exists() else ["--run-dir", run_dir, "--seed", seed, *own, *flags]
    with open(run_dir.parent / f"{run_dir.name}.commit", "a") as file:
        file.write(f"{present_commit()}\n")
    log = run_dir.parent / f"{run_dir.name}.log"
    with open(log, "a") as output:
        process = subprocess.Popen([sys.executable, script, *map(str, start)], cwd=ROOT, stdout=output, stderr=output)
        while process.poll() is None and not done():
            time.sleep(0.5)
        process.terminate()  # no harm to a process that has ended
        process.wait()
    print(f"{run_dir.name}: {'done' if done() else f'ended before the budget, see {log}'}", flush=True)


def at(points: list[tuple[float, float]], x: float) -> float:
    """The value at x, linear between the points of a curve; NaN outside."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / ((x1 - x0) or 1)
    return math.nan


def reached(points: list[tuple[float, float]], y: float) -> float:
    """The first x at which a curve reaches y; infinite if it never does."""
    if points and points[0][1] >= y:
        return points[0][0]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 < y <= y1:
            return x0 + (x1 - x0) * (y - y0) / (y1 - y0)
    return math.inf


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and the half-width of its 95 % interval (NaN for one seed)."""
    n = len(values)
    if any(map(math.isnan, values)):  # a run that ended before
        return math.nan, math.nan
    t = STUDENT_T[min(n - 1, 9)]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def draw(axis, curves: list[list[tuple[float, float]]], color, label: str) -> None:
    """The mean of curves up to the end of the shortest, with its interval, or where it says nothing with the curves."""
    start, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = [min(start + (end - start) * k / 60, end) for k in range(61)]
    bands = [mean_interval([at(curve, x) for curve in curves]) for x in grid]
    axis.plot(grid, [m for m, _ in bands], color=color, label=label)
    if len(curves) > 2:
        axis.fill_between(grid, [m - i for m, i in bands], [m + i for m, i in bands], color=color, alpha=0.15, linewidth=0)
    else:
        for curve in curves:
            axis.plot(*zip(*curve), color=color, linewidth=0.6, marker=".")


def shown(value: tuple[float, float]) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="temperature-1")
    parser.add_argument("--algorithms", nargs="*", help="of the setting, or label=script and its flags")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--budget", type=int, help="generated tokens of a run, Monte Carlo rollouts included")
    parser.add_argument("--reach", type=float, nargs="*", default=[0.5, 0.6, 0.7], help="accuracies whose tokens and seconds are reported")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", nargs="*", default=[], help="further runs as label=directory,directory")
    parser.add_argument("--out", type=Path, help="directory of the runs and results (default: runs/compare/SETTING)")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    setting = SETTINGS[args.setting]
    commands = setting.algorithms
    if args.algorithms is not None:
        commands = dict(name.split("=", 1) if "=" in name else (name, commands.get(name, "")) for name in args.algorithms)
    unknown = [name for name, command in commands.items() if not command]
    if unknown:
        sys.exit(f"error: --algorithms {unknown[0]}: not one of {', '.join(setting.algorithms)}, and not label=script")
    args.seeds = args.seeds or setting.seeds
    args.budget = args.budget or setting.budget
    args.out = args.out or ROOT / "runs" / "compare" / args.setting
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = ["--num-iterations", "1000", "--eval-every", "5", "--checkpoint-every", "5", *setting.flags.split(), *flags]
    directories = {name: [args.out / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}__{seed}" for seed in args.seeds] for name in commands}
    with ThreadPoolExecutor(args.jobs) as executor:  # seeds first: an interrupt leaves a comparison of fewer seeds
        jobs = [executor.submit(run, command, seed, directories[name][k], flags, args.budget)
                for k, seed in enumerate(args.seeds) for name, command in commands.items()]  # fmt: skip
    for job in jobs:
        job.result()  # raises what it raised
    directories |= {label: list(map(Path, paths.split(","))) for label, paths in (spec.split("=", 1) for spec in args.runs)}

    directories = {name: [path for path in paths if len(evaluations(path)) > 1] for name, paths in directories.items()}
    curves = {name: list(map(evaluations, paths)) for name, paths in directories.items() if paths}
    with open(args.out / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = ["iteration", *AXES, SAMPLING, "eval/accuracy", "eval/accuracy_ci95", "eval/response_length"]
        writer.writerow(["setting", "algorithm", "run", "commit", *columns])
        for name, seeds in curves.items():
            for k, (rows, path) in enumerate(zip(seeds, directories[name]), 1):
                about = [args.setting, name, k, commits_of(path)]
                writer.writerows([*about, *(row[column] for column in columns)] for row in rows)

    # points[name][x]: for each run the curve of accuracy against x; at the budget: the value of x there, for each run
    points = {
        name: {x: [[(row[x], row["eval/accuracy"]) for row in rows] for rows in seeds] for x in AXES} for name, seeds in curves.items()
    }
    common = {x: min(curve[-1][0] for own in points.values() for curve in own[x]) for x in (TRAINED, UPDATES)}
    lines = [["algorithm", "seeds", f"accuracy at {args.budget:,} generated tokens", "trained tokens", "updates", "seconds"]]
    lines[0] += [f"accuracy at {common[TRAINED]:,.0f} trained tokens", f"at {common[UPDATES]:,.0f} updates"]
    lines[0] += [f"{what} to {accuracy:g}" for accuracy in args.reach for what in ("generated tokens", "seconds")]
    lines.append(["---"] * len(lines[0]))
    at_budget = {name: mean_interval([at(curve, args.budget) for curve in own[GENERATED]]) for name, own in points.items()}
    order = sorted(points, key=lambda name: -at_budget[name][0] if math.isfinite(at_budget[name][0]) else math.inf)
    for name in order:
        own, seeds = points[name], curves[name]
        cells = [name, str(len(seeds)), shown(at_budget[name])]
        for x in (TRAINED, UPDATES, SECONDS):
            cells.append(f"{statistics.fmean(at([(row[GENERATED], row[x]) for row in rows], args.budget) for rows in seeds):,.0f}")
        cells += [shown(mean_interval([at(curve, common[x]) for curve in own[x]])) for x in (TRAINED, UPDATES)]
        for accuracy, x in itertools.product(args.reach, (GENERATED, SECONDS)):
            values = [reached(curve, accuracy) for curve in own[x]]
            found = sum(map(math.isfinite, values))
            cells.append(f"{statistics.fmean(values):,.0f}" if found == len(values) else f"{found} of {len(values)} runs")
        lines.append(cells)
    commits = sorted({commits_of(path) for name in curves for path in directories[name]})
    made = f"\nRuns of commit {', '.join(commits)}; evaluated by benchmark/compare.py of {present_commit()}.\n"
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + made
    (args.out / "table.md").write_text(table, encoding="utf-8")

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained", sharey=True)
    for (x, label), axis in zip(AXES.items(), axes.flat):
        for name, color in zip(points, itertools.cycle(plt.get_cmap("tab10").colors)):
            skip = int(x == TRAINED)  # a logarithmic axis has no 0
            draw(axis, [curve[skip:] for curve in points[name][x]], color, name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xlim(0, 1.02 * args.budget)
    axes[0, 0].xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes[1, 0].set_xscale("log")
    axes[0, 0].set_ylabel("accuracy on the evaluation questions")
    axes[1, 0].set_ylabel("accuracy on the evaluation questions")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(args.out / "curves.png", dpi=130)

    figure, axes = plt.subplots(1, len(PRICES), figsize=(11, 3.8), layout="constrained", sharey=True)
    heading, cells = ["algorithm"], {name: [name] for name in order}
    for price, axis in zip(PRICES, axes):
        priced = {  # curves of each run against seconds
            name: [[(row[SECONDS] + (price - 1) * row[SAMPLING], row["eval/accuracy"]) for row in rows] for rows in seeds]
            for name, seeds in curves.items()
        }
        for (name, seeds), color in zip(priced.items(), itertools.cycle(plt.get_cmap("tab10").colors)):
            draw(axis, seeds, color, name)
        end = min(curve[-1][0] for seeds in priced.values() for curve in seeds)
        heading.append(f"accuracy after {end:.0f} s" + (f", sampling {price} times as slow" if price > 1 else ""))
        for name in order:
            cells[name].append(shown(mean_interval([at(curve, end) for curve in priced[name]])))
        axis.set_xlabel("seconds of training" + (f", sampling {price} times as slow" if price > 1 else ""))
        axis.set_xlim(0, 1.02 * max(min(curve[-1][0] for curve in seeds) for seeds in priced.values()))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on the evaluation questions")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(args.out / "prices.png", dpi=130)
    lines = [heading, ["---"] * len(heading), *cells.values()]
    prices = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + made
    (args.out / "prices.md").write_text(prices, encoding="utf-8")
    print(f"{table}\n{prices}in {args.out}: results.csv, table.md, curves.png, prices.md, prices.png")
