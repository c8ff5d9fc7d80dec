"""Segment Policy Optimization: the README's table of results, from the evaluations that compare.py wrote.

    python benchmark/summary.py docs/temperature-1.csv docs/temperature-0.6.csv

A line is an algorithm, "NAME QUESTIONS x SHAPE" in the files. Accuracies at equal seconds are those after the
largest number of seconds that every run has reached.
"""

import csv
import re
import sys
from pathlib import Path

from compare import GENERATED, SECONDS, SETTINGS, at, mean_interval


def read_curves(path: Path) -> dict[str, list[list[dict]]]:
    """Of each algorithm its runs, and of each run its evaluations."""
    curves: dict[str, dict[str, list[dict]]] = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["algorithm"], {}).setdefault(row["run"], []).append(row)
    return {algorithm: list(runs.values()) for algorithm, runs in curves.items()}


def accuracy(runs: list[list[dict]], axis: str, x: float) -> str:
    """Mean and 95 % interval over the runs, where each has `x` generated tokens or seconds."""
    points = [[(float(row[axis]), float(row["eval/accuracy"])) for row in rows] for rows in runs]
    mean, interval = mean_interval([at(curve, x) for curve in points])
    return f"{mean:.3f} ± {interval:.3f}".replace("0.", ".")


if __name__ == "__main__":
    heading, lines = ["algorithm"], {}
    for path in map(Path, sys.argv[1:]):
        curves = read_curves(path)
        budget = SETTINGS[path.stem].budget
        seconds = min(float(rows[-1][SECONDS]) for runs in curves.values() for rows in runs)
        heading += [path.stem.replace("-0", " ").replace("-", " "), f"{budget:,} generated tokens", f"{seconds:.0f} seconds"]
        for algorithm, runs in curves.items():
            name, shape = re.fullmatch(r"(.*?) (\d+ x .*)", algorithm).groups()
            cells = [shape, accuracy(runs, GENERATED, budget), accuracy(runs, SECONDS, seconds)]
            lines.setdefault(name, [name]).extend(cells)
    for cells in [heading, ["---"] * len(heading), *lines.values()]:
        print(f"| {' | '.join(cells)} |")
