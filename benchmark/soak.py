"""Segment Policy Optimization: runs that are killed at random moments and resumed, against a run that is left alone.

    python benchmark/soak.py                                          # four scripts, 50 kills in all
    python benchmark/soak.py --scripts grpo.py --kills 5 --seed 2 -- --num-questions 8

Runs each script as a user would, once without interruption in <out>/<script>/whole, and then in <out>/<script>/killed-<n>, where
SIGKILL ends it again and again and --resume goes on, until all kills are spent; flags after -- go to all runs. The moments are
random and spread over the phases: `start` (imports, data, reading the checkpoint), `evaluate`, `sample`, `score` (rewards and old
log-probs), `train`, `save` (while checkpoints/new is written) and `model` (while model.new is). A run that was killed before it
wrote args.json has nothing to resume, and is started again in an empty directory.

Every run must then equal the uninterrupted one: the files of model/ and of the last checkpoints byte for byte (but for the seconds
in state.json), samples.jsonl, and metrics.jsonl apart from time/*, with every iteration exactly once. Exit status 1 where one does
not.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ["spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"]
FLAGS = ["--num-iterations", "10", "--checkpoint-every", "2", "--eval-every", "3", "--eval-questions",
         "50"]  # lines are lost with a kill
PHASES = {  # name: entries of metrics.jsonl whose seconds it takes, in the order of an iteration
    "sample": ["sample"], "score": ["value", "logprobs"], "train": ["train"], "evaluate": ["eval"],
}  # fmt: skip


def launch(script: str, run_dir: Path, flags: list[str]) -> subprocess.Popen:
    """Starts a run, or continues it if it had begun. Its output is appended to a log beside its directory."""
    if not (run_dir / "args.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
    start = ["--resume", str(run_dir)] if run_dir.exists() else ["--run-dir", str(run_dir), *FLAGS, *flags]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.log", "a") as output:
        return subprocess.Popen([sys.executable, script, *start], cwd=ROOT, stdout=output, stderr=output)


def lines(path: Path) -> list[dict]:
    """The complete lines of a file of JSON lines, which may be missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def typical_seconds(rows: list[dict]) -> dict[str, float]:
    """Mean seconds of each phase of an iteration."""
    seconds = {}
    for phase, names in PHASES.items():
        found = [sum(row[f"time/{name}_s"] for name in names) for row in rows if f"time/{names[0]}_s" in row]
        seconds[phase] = sum(found) / len(found)
    return seconds


def wait(process: subprocess.Popen, seconds: float, condition=lambda: False) -> bool:
    """Until the condition holds (True), or for so many seconds, or until the process ends (False)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def changed_since(path: Path, moment: float) -> bool:
    """Whether something happens in a directory, which may be missing, or left over from an earlier kill."""
    try:
        return path.stat().st_mtime > moment
    except FileNotFoundError:
        return False


def kill_in(phase: str, process: subprocess.Popen, run_dir: Path, starting: float, typical: dict[str, float],
            rng: random.Random) -> bool:
    """Kills the process in that phase of one of its next iterations; False if it ended before."""
    log, begun, now = Path(f"{run_dir}.log"), time.monotonic(), time.time()
    before = log.read_text().count("run directory:")
    if phase == "start":
        wait(process, starting * rng.random())
    elif phase in ("save", "model"):
        new = run_dir / ("checkpoints/new" if phase == "save" else "model.new")
        if wait(process, 3600, lambda: changed_since(new, now)):
            wait(process, 0.06 * rng.random())
    elif wait(process, 3600, lambda: log.read_text().count("run directory:") > before):  # it is about to train
        first = not (run_dir / "metrics.jsonl").stat().st_size
        count = len(lines(run_dir / "metrics.jsonl")) + (0 if first and phase == "evaluate" else rng.randint(first, 3))
        wait(process, 3600, lambda: len(lines(run_dir / "metrics.jsonl")) >= count)
        earlier = [typical[name] for name in list(typical)[: list(typical).index(phase)]]
        wait(process, (0 if first and phase == "evaluate" else sum(earlier)) + typical[phase] * rng.random())
    ended = process.poll() is not None
    process.kill()
    process.wait()
    print(f"    {phase:9s}{'ended before' if ended else f'killed after {time.monotonic() - begun:5.1f} s'}", flush=True)
    return not ended


def differences(whole: Path, killed: Path) -> list[str]:
    """What a run that was killed has that the uninterrupted one has not, or the other way round."""
    found = []
    if {path.name for path in whole.iterdir()} != {path.name for path in killed.iterdir()}:
        found.append("the names in the run directory")
    expected, rows = lines(whole / "metrics.jsonl"), lines(killed / "metrics.jsonl")
    iterations = [row["iteration"] for row in rows]
    if iterations != list(range(len(expected))):
        found.append(f"metrics.jsonl has the iterations {iterations}")
    elif list(map(without_times, expected)) != list(map(without_times, rows)):
        found.append("metrics.jsonl")
    if (whole / "samples.jsonl").read_text() != (killed / "samples.jsonl").read_text():
        found.append("samples.jsonl")
    for directory in ("model", *(f"checkpoints/{path.name}" for path in (whole / "checkpoints").iterdir())):
        for path in (whole / directory).iterdir():
            other = killed / directory / path.name
            if not other.exists() or path.name != "state.json" and path.read_bytes() != other.read_bytes():
                found.append(f"{directory}/{path.name}")
    return found


def soak(script: str, kills: int, out: Path, flags: list[str], rng: random.Random) -> tuple[Counter, list[str]]:
    """Kills per phase, and what differs from an uninterrupted run in the end."""
    whole, spent, found, runs = out / "whole", Counter(), [], 0
    process, begun = launch(script, whole, flags), time.monotonic()
    wait(process, 3600, (whole / "metrics.jsonl").exists)
    starting = time.monotonic() - begun
    if process.wait():
        sys.exit(f"error: {script} ended with status {process.returncode}, see {whole}.log")
    typical = typical_seconds(lines(whole / "metrics.jsonl"))
    queue: list[str] = []
    while spent.total() < kills or runs == 0:
        runs += 1
        run_dir = out / f"killed-{runs}"
        print(f"{script}, run {runs}", flush=True)
        while not (run_dir / "model").exists():
            process = launch(script, run_dir, flags)
            if spent.total() == kills:
                break
            queue = queue or rng.sample(["start", *typical, "save", "save", "model"], len(typical) + 4)
            # No earlier than the last iterations is there a model to save; other phases may end a run before it.
            late = len(lines(run_dir / "metrics.jsonl")) > 0.6 * len(lines(whole / "metrics.jsonl"))
            phase = next((name for name in queue if late or name != "model"), None) or "sample"
            if phase in queue:
                queue.remove(phase)
            spent[phase] += kill_in(phase, process, run_dir, starting, typical, rng)
            if process.returncode not in (0, -9):
                sys.exit(f"error: {script} ended with status {process.returncode}, see {run_dir}.log")
        if process.wait() not in (0, -9):
            sys.exit(f"error: {script} ended with status {process.returncode}, see {run_dir}.log")
        found += [f"{run_dir.name}: {difference}" for difference in differences(whole, run_dir)]
    return spent, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--kills", type=int, default=50, help="kills in all, shared out among the scripts")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments; those of the runs are their own")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="directory of the runs, must not exist")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if args.out.exists():
        sys.exit(f"error: --out {args.out} exists already")
    rng, total, results = random.Random(args.seed), Counter(), {}
    for k, script in enumerate(args.scripts):
        share = (k + 1) * args.kills // len(args.scripts) - k * args.kills // len(args.scripts)
        spent, results[script] = soak(script, share, args.out.resolve() / Path(script).stem, flags, rng)
        total += spent
        print(f"{script}: {spent.total()} kills, {'equal to the uninterrupted run' if not results[script] else 'DIFFERENT'}",
              flush=True)
    print(f"{total.total()} kills: " + ", ".join(f"{count} {phase}" for phase, count in total.items()))
    for script, found in results.items():
        print("".join(f"{script}: {difference}\n" for difference in found), end="")
    sys.exit(1 if any(results.values()) else 0)
