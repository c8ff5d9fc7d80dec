"""Segment Policy Optimization: runs that are killed at random moments and resumed, against one left alone.

    python benchmark/soak.py                                          # four scripts, 50 kills in all
    python benchmark/soak.py --scripts grpo.py --kills 5 --seed 2 -- --num-questions 8

Runs each script as a user would, once without interruption in <out>/<script>/whole, and then in
<out>/<script>/killed-<n>, where SIGKILL ends it again and again and --resume goes on, until all kills are
spent; flags after -- go to all runs. The moments are random and spread over the phases: `start` (imports,
data, reading the checkpoint), `evaluate`, `sample` (and rewards), `train` (from the old log-probs on), `save`
(while checkpoints/new is written) and `model` (while new is, which becomes model). A run that was killed
before it wrote args.json has nothing to resume, and is started again in an empty directory.

Every run must then equal the uninterrupted one: model/ and the last checkpoints, samples.jsonl, and
metrics.jsonl apart from time/*, with every iteration exactly once. Exit status 1 where one does not.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import is_dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from spo_tree import Completion, Group

SCRIPTS = ["spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"]
FLAGS = "--num-iterations 10 --checkpoint-every 2 --eval-every 3 --eval-questions 50".split()
PHASES = {"sample": "time/sample_s", "train": "time/train_s", "evaluate": "time/eval_s"}  # in their order


def launch(script: str, run_dir: Path, flags: list[str]) -> subprocess.Popen:
    """Starts a run, or continues it if it had begun; its output is appended to a log beside its directory."""
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


def without_times(rows: list[dict]) -> list[dict]:
    """Objects of metrics.jsonl without the seconds, which differ from run to run."""
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def typical_seconds(rows: list[dict]) -> dict[str, float]:
    """Mean seconds of each phase of an iteration."""
    seconds = {}
    for phase, clock in PHASES.items():
        found = [row[clock] for row in rows if clock in row]
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


def kill_in(
    phase: str, process: subprocess.Popen, run_dir: Path, starting: float, typical: dict[str, float],
    rng: random.Random,
) -> bool:
    """Kills the process in that phase of one of its next iterations; False if it ended before."""
    begun, now, path = time.monotonic(), time.time(), run_dir / "metrics.jsonl"
    if phase == "start":
        wait(process, starting * rng.random())
    elif phase in ("save", "model"):
        new = run_dir / ("checkpoints/new" if phase == "save" else "new")
        if wait(process, 3600, lambda: changed_since(new, now)):
            wait(process, 0.06 * rng.random())
    elif wait(process, 3600, lambda: changed_since(run_dir / "args.json", now)):  # it is about to train
        wait(process, 0.1)
        first = phase == "evaluate" and not lines(path)
        count = len(lines(path)) + (0 if first else rng.randint(not lines(path), 3))
        wait(process, 3600, lambda: len(lines(path)) >= count)
        earlier = [typical[name] for name in list(typical)[: list(typical).index(phase)]]
        wait(process, (0 if first else sum(earlier)) + typical[phase] * rng.random())
    ended = process.poll() is not None
    process.kill()
    process.wait()
    seconds = f"{time.monotonic() - begun:5.1f} s"
    print(f"    {phase:9s}{'ended before' if ended else f'killed after {seconds}'}", flush=True)
    return not ended


def plain(value):
    """What is in a state.pt as dictionaries, lists, numbers and bytes, without what depends on time."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if is_dataclass(value):
        return plain(vars(value))
    if isinstance(value, dict):
        kept = {key: plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if key not in ("time/elapsed_s", "metrics.jsonl")}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_state(directory: Path) -> dict:
    """state.pt of a checkpoint; the classes in it are those of the script that wrote it."""
    classes = [(Group, "__main__.Group"), (Completion, "__main__.Completion")]
    with torch.serialization.safe_globals(classes):
        return torch.load(directory / "state.pt", map_location="cpu", weights_only=True)


def differences(whole: Path, killed: Path) -> list[str]:
    """What a run that was killed has that the uninterrupted one has not, or the other way round."""
    found = []
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (whole, killed)]
    for name in names[0] ^ names[1]:
        # A kill between the last checkpoint and the removal of an old one leaves the latter.
        if name in names[0] or not name.startswith("checkpoints/0"):
            found.append(f"only one of them has {name}")
    expected, rows = lines(whole / "metrics.jsonl"), lines(killed / "metrics.jsonl")
    iterations = [row["iteration"] for row in rows]
    if iterations != list(range(len(expected))):
        found.append(f"metrics.jsonl has the iterations {iterations}")
    elif without_times(expected) != without_times(rows):
        found.append("metrics.jsonl")
    if (whole / "samples.jsonl").read_text() != (killed / "samples.jsonl").read_text():
        found.append("samples.jsonl")
    for directory in ("model", *(f"checkpoints/{path.name}" for path in (whole / "checkpoints").iterdir())):
        for path in (whole / directory).iterdir():
            other = killed / directory / path.name
            if not other.exists():
                continue  # it is found above
            if path.name == "state.pt":
                same = plain(load_state(path.parent)) == plain(load_state(other.parent))
            else:
                same = path.read_bytes() == other.read_bytes()
            if not same:
                found.append(f"{directory}/{path.name}")
    return found


def soak(
    script: str, kills: int, out: Path, flags: list[str], rng: random.Random
) -> tuple[Counter, list[str]]:
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
            # A model is saved after the last iteration; other phases may end a run before it.
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--kills", type=int, default=50, help="kills in all, shared out among the scripts")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new directory")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if args.out.exists():
        sys.exit(f"error: --out {args.out} exists already")
    rng, total, results = random.Random(args.seed), Counter(), {}
    for k, script in enumerate(args.scripts):
        share = (k + 1) * args.kills // len(args.scripts) - k * args.kills // len(args.scripts)
        spent, results[script] = soak(script, share, args.out.resolve() / Path(script).stem, flags, rng)
        total += spent
        verdict = "DIFFERENT" if results[script] else "equal to the uninterrupted run"
        print(f"{script}: {spent.total()} kills, {verdict}", flush=True)
    print(f"{total.total()} kills: " + ", ".join(f"{count} {phase}" for phase, count in total.items()))
    for script, found in results.items():
        print("".join(f"{script}: {difference}\n" for difference in found), end="")
    sys.exit(1 if any(results.values()) else 0)
