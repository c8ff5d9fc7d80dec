"""Segment Policy Optimization: the README's table of results, from the evaluations that compare.py wrote.

    python benchmark/summary.py docs/temperature-1.csv docs/temperature-0.6.csv

A line is an algorithm, "NAME QUESTIONS x SHAPE" in the files, of whose best shape each file has its own. Accuracies
at equal seconds are those after the largest number of seconds that every run of a file has reached.
"""

import argparse
import csv
import re
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
    curves = [[(float(row[axis]), float(row["eval/accuracy"])) for row in rows] for rows in runs]
    mean, interval = mean_interval([at(curve, x) for curve in curves])
    return f"{mean:.3f} ± {interval:.3f}".replace("0.", ".")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.csv of a setting, as SETTING.csv")
    lines = {"algorithm": ["algorithm"]}
    for path in parser.parse_args().results:
        curves = read_curves(path)
        budget = SETTINGS[path.stem].budget
        seconds = min(float(rows[-1][SECONDS]) for runs in curves.values() for rows in runs)
        temperature = path.stem.removeprefix("temperature-").removeprefix("0")
        lines["algorithm"] += [f"T = {temperature}: shape", f"{budget:,} generated tokens", f"{seconds:.0f} seconds"]
        for algorithm, runs in curves.items():
            name, shape = re.fullmatch(r"(.*?) (\d+ x .*)", algorithm).groups()
            cells = [shape, accuracy(runs, GENERATED, budget), accuracy(runs, SECONDS, seconds)]
            lines.setdefault(name, [name]).extend(cells)
    heading, *rows = lines.values()
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")
