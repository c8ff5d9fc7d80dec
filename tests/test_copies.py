"""Duplication between the scripts is deliberate and exact.

    python tests/test_copies.py spo_tree.py     copies the lower half of that script to the other three
"""

import ast
import sys
from pathlib import Path

import pytest

SCRIPTS = ["spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"]
MARKER = "# ==== From here on the text is the same"


def halves(path):
    """The own half of a script, and the common one from the marker on."""
    own, marker, common = path.read_text().partition(MARKER)
    assert marker and MARKER not in common
    return own, marker + common


if __name__ == "__main__":
    given = Path(sys.argv[1]).resolve()
    _, common = halves(given)
    for other in map(given.with_name, SCRIPTS):
        other.write_text(halves(other)[0] + common)
    sys.exit()

from conftest import ROOT


def between(text, start, end):
    """The text from `start`, which is there once, up to `end`."""
    _, rest = text.split(start)
    return rest.split(end)[0]


def definitions(source):
    """{name: text} of every module-level function, class and constant, with decorators."""
    found = {}
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        for name in names:
            found[name] = "\n".join([*decorators, ast.get_source_segment(source, node)])
    return found


OWN_HALF = {  # what is the same in it: from, to
    "imports": ("import json\n", "@dataclass\nclass Args:"),
    "flags": ("    # ==== common to all scripts ====\n", "\n\n\nPRESETS"),
}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_what_the_scripts_share_is_the_same(script):
    (own, common), (first_own, first_common) = halves(ROOT / script), halves(ROOT / SCRIPTS[0])
    assert common == first_common and len(common) > 10_000
    for start, end in OWN_HALF.values():
        assert between(own, start, end) == between(first_own, start, end)
    mine, first = definitions(own), definitions(first_own)
    named = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TINY", "Completion", "Group"}
    named |= mine.keys() & first.keys() - {"Args", "PRESETS", "MAY_BE_ZERO", "check_flags", "main"}
    assert [name for name in sorted(named) if mine[name] != first[name]] == []
    assert not mine.keys() & definitions(common).keys()


def test_copies_in_eval_have_the_same_text_or_another_name():
    mine, theirs = (definitions((ROOT / name).read_text()) for name in ("eval.py", "spo_tree.py"))
    shared = mine.keys() & theirs.keys() - {"Args", "PRESETS", "main"}
    assert len(shared) >= 3 and [name for name in sorted(shared) if mine[name] != theirs[name]] == []
