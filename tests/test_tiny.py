"""The embedded task: its files are what tiny/make.py makes, and its steps are right."""

import importlib.util
import json
import random
import re

from conftest import ROOT
from math_grader import grade_gsm8k, gsm8k_gold

spec = importlib.util.spec_from_file_location("make", ROOT / "tiny" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
TRAIN = [json.loads(line) for line in (ROOT / "tiny" / "train.jsonl").open()]
TEST = [json.loads(line) for line in (ROOT / "tiny" / "test.jsonl").open()]


def test_files_come_from_the_seed():
    train, test = make.draw_problems(random.Random(make.SEED), make.NUM_STEPS, make.LARGEST)
    for drawn, rows in ((train, TRAIN), (test, TEST)):
        assert drawn == [(row["question"], row["answer"]) for row in rows]


def test_train_and_test_are_disjoint():
    assert len(TEST) == 500 and len({row["question"] for row in TRAIN + TEST}) == len(TRAIN) + len(TEST)


def test_every_step_of_every_solution_is_right():
    for row in TRAIN + TEST:
        *steps, last = row["answer"].split("\n")
        for a, sign, b, result in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", "\n".join(steps)):
            a, b, result = int(a), int(b), int(result)
            right = {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": a == b * result}
            assert right[sign]
        assert last == f"#### {steps[-1].rstrip('.').rpartition('=')[2]}"
        assert grade_gsm8k(row["answer"], gsm8k_gold(row["answer"]))


def test_small_numbers():
    train, test = make.draw_problems(random.Random(make.SEED), (1, 2), 9)
    events, totals = set(), set()
    for question, answer in train + test:
        start, *changes = map(int, re.findall(r"\d+", question))
        totals |= {start, int(answer.rpartition("#### ")[2])}
        events.add(len(changes))
    assert events == {1, 2} and totals == set(range(1, 10))


def test_kinds_of_answers():
    reference = "First 20+10=30, then 30+5=35.\nFirst 35-10=25, then 25-2=23.\n#### 23"
    for response, kind in {
        "So 20+15=35.\nSo 35-12=23.\n#### 23": "right",
        "So 20+15=36.\nSo 36-12=24.\n#### 24": "wrong step: wrong calculation",
        "So 20+16=36.\nSo 36-12=24.\n#### 24": "wrong step: wrong operation or operand",
        "So 20+15=35.\n#### 35": "stopped early or added a step",
        "So 20+15=35.\nSo 35-12=23.\n#### 24": "wrong final line",
        "So 20+15=35.\nThus 35-12=24.\n#### 24": "wrong format",
        "So 20/0=35.\nSo 35-12=23.\n#### 22": "wrong step: wrong calculation",
    }.items():
        assert make.kind_of_answer(reference, response, True) == kind, response
    assert make.kind_of_answer(reference, "So 20", False) == "cut by the length limit"
