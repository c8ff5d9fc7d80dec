"""Segment Policy Optimization: accuracy and answer length of runs against sampled tokens, as one picture.

    python benchmark/plot.py docs/spo_tree.png "6-6-6=runs/a,runs/b" "4-4=runs/c"     # label=run directories (one per seed)
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for color, group in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), sys.argv[2:]):
        label, _, directories = group.partition("=")
        runs = [[json.loads(line) for line in open(Path(d) / "metrics.jsonl")] for d in directories.split(",")]
        for axis, metric in zip(axes, ("eval/accuracy", "eval/response_length")):
            curves = []
            for run in runs:
                points = [(row.get("rollout/generated_tokens_total", 0) / 1e3, row[metric]) for row in run if metric in row]
                curves.append(points)
                axis.plot(*zip(*points), color=color, alpha=0.25, linewidth=1)
            mean = [tuple(map(statistics.fmean, zip(*points))) for points in zip(*curves)]
            axis.plot(*zip(*mean), color=color, marker="o", markersize=4, label=f"{label}, mean of {len(runs)} seeds")
    axes[0].set(ylabel="accuracy on 500 test questions", ylim=(0, 1))
    axes[1].set(ylabel="tokens per answer")
    for axis in axes:
        axis.set_xlabel("tokens sampled for training (thousands)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(sys.argv[1], dpi=130)
