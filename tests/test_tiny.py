"""The embedded task: its files are what tiny/make.py makes, and its steps are right."""

import importlib.util
import json
import random
import re

from conftest import ROOT

spec = importlib.util.spec_from_file_location("make", ROOT / "tiny" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
TRAIN = [json.loads(line) for line in (ROOT / "tiny" / "train.jsonl").open()]
TEST = [json.loads(line) for line in (ROOT / "tiny" / "test.jsonl").open()]


def test_files_come_from_the_seed_and_share_no_question():
    train, test = make.draw_problems(random.Random(make.SEED), make.NUM_STEPS, make.LARGEST)
    for drawn, rows in ((train, TRAIN), (test, TEST)):
        assert drawn == [(row["question"], row["answer"]) for row in rows]
    assert len(TEST) == 500 and len({row["question"] for row in TRAIN + TEST}) == len(TRAIN) + len(TEST)


def test_every_step_of_every_solution_is_right():
    for row in TRAIN + TEST:
        *steps, last = row["answer"].split("\n")
        for a, sign, b, result in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", "\n".join(steps)):
            a, b, result = int(a), int(b), int(result)
            right = {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": a == b * result}
            assert right[sign]
        assert last == f"#### {steps[-1].rstrip('.').rpartition('=')[2]}"
