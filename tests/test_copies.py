"""Duplication between the scripts is deliberate and exact: what has the same name has the same text."""

import ast
from itertools import combinations

import pytest

from conftest import ROOT, SCRIPTS


def definitions(name):
    """Source of every module-level function, class and upper-case constant of a script but Args and PRESETS."""
    source = (ROOT / name).read_text()
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        for defined in names:
            if defined not in ("Args", "PRESETS"):
                found[defined] = "\n".join(ast.unparse(d) for d in getattr(node, "decorator_list", [])) + ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("first, second", list(combinations([*SCRIPTS, "eval.py"], 2)))
def test_same_name_same_text(first, second):
    a, b = definitions(first), definitions(second)
    shared = a.keys() & b.keys()
    assert len(shared) >= (8 if second == "eval.py" else 35)
    assert [name for name in sorted(shared) if a[name] != b[name]] == []


def test_the_common_flags_are_the_same():
    blocks = {(ROOT / name).read_text().split("# ==== common to all scripts ====\n")[1].split("    # ====")[0] for name in SCRIPTS}
    assert len(blocks) == 1 and blocks.pop().count("\n") >= 30
