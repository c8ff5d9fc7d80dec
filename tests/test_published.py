"""The published figures are those of the present scripts."""

import csv
import re

import pytest

from conftest import ROOT
from test_benchmark import code_hash

TABLES = sorted((ROOT / "docs").glob("comparison-*.csv"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_published_comparison_was_made_by_the_present_scripts(path):
    rows = csv.DictReader(path.open())
    for script, code, setting in {(row["script"], row["code"], row["setting"]) for row in rows}:
        remake = f"remake docs/{path.name}: python benchmark/compare.py --setting {setting}"
        assert code == code_hash(ROOT / script), f"{script} is another now, {remake}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_published_figures_with_a_hash_are_those_of_the_present_scripts(page):
    """`Code: spo_tree.py 0123456789ab, ...`, as benchmark/credit.py prints it."""
    for line in re.findall(r"^Code: (.*)$", page.read_text(encoding="utf-8"), re.M):
        pairs = re.findall(r"(\w+\.py) ([0-9a-f]{12})", line)
        assert pairs
        for script, code in pairs:
            assert code == code_hash(ROOT / script), f"{script} is another now: remake what {page.name} has above"
