"""Segment Policy Optimization: the deviation of the advantages that a run trained on, over its loss tokens.

    python spo_chain.py --mc-rollouts 9 --num-iterations 20 --eval-every 1 --eval-questions 8 --learning-rate 1e-12 --run-dir runs/sigma
    python benchmark/sigma.py runs/sigma

The authors' code divides advantages by it (whitening), this one does not: a --kl-coef of theirs is to be multiplied
by it. One question of each recorded iteration counts; --threshold inf is for runs without the probability mask.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, pstdev

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--threshold", type=float, default=0.9, help="rho, the --prob-threshold of the run")
    args = parser.parse_args()
    advantages = []
    for line in open(args.run_dir / "samples.jsonl"):
        for completion in json.loads(line)["completions"]:
            pairs = zip(completion["advantages"], completion["probs"])
            advantages += [advantage for advantage, prob in pairs if advantage != 0 and prob < args.threshold]
    print(f"{len(advantages)} loss tokens: mean {fmean(advantages):.3f}, standard deviation {pstdev(advantages):.3f}")
