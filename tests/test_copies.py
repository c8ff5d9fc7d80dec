"""Duplication between the scripts is deliberate and exact: what has the same name has the same text."""

import ast
from itertools import combinations

import pytest

from conftest import ROOT, SCRIPTS


def definitions(name):
    """Source of every module-level function, class and constant of a script but Args and PRESETS."""
    source = (ROOT / name).read_text()
    found = {}
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        for defined in names:
            if defined not in ("Args", "PRESETS"):
                found[defined] = "\n".join([*decorators, ast.get_source_segment(source, node)])
    return found


@pytest.mark.parametrize("first, second", list(combinations([*SCRIPTS, "eval.py"], 2)))
def test_same_name_same_text(first, second):
    a, b = definitions(first), definitions(second)
    shared = a.keys() & b.keys()
    assert len(shared) >= (5 if second == "eval.py" else 35)
    assert [name for name in sorted(shared) if a[name] != b[name]] == []


def test_the_common_flags_and_their_checks_are_the_same():
    blocks = set()
    for name in SCRIPTS:
        _, *parts = (ROOT / name).read_text().split("# ==== common to all scripts ====\n")
        blocks.add(tuple(part.split("    # ====")[0] for part in parts))
    (common,) = blocks
    assert len(common) == 2 and common[0].count("\n") >= 30
