"""The embedded task: its files are what tiny/make.py makes."""

import importlib.util
import json
import random

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
