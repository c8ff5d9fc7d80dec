"""The page that shows the credit of a run: it says what samples.jsonl says, and is safe and small."""

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from conftest import ROOT, SMALL
from test_run import samples

sys.path.insert(0, str(ROOT / "benchmark"))
from view import nested, number, segments

HOSTILE = "<script>alert(1)</script>\n</div><img onerror=alert(1)> \" ' & &lt; \ud800\u202e"


class Page(HTMLParser):
    """The elements of a page with attributes and texts; the sign of a line break becomes one again."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html.replace("<em>↵ </em><br>", "\n"))
        assert not self.open and not re.search(r"src=|href=|url\(|@import|https?:|<script", html)

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "class": "", "text": []} | dict(attributes)
        self.elements.append(element)
        self.open += [element] if tag not in ("meta", "br") else []

    def handle_endtag(self, tag):
        element = self.open.pop()
        element["text"] = "".join(element["text"])
        assert element["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"].append(data)

    def texts(self, name):
        """The texts of all elements of a tag or a class."""
        return [e["text"] for e in self.elements if name in (e["tag"], *e["class"].split())]


def html_of(run_script, run_dir):
    assert run_script("benchmark/view.py", run_dir)[0] == 0
    return (run_dir / "credit.html").read_text()


@pytest.mark.parametrize("script", ["spo_tree.py", "spo_chain.py"])
def test_page_of_a_run(script, run_script, tmp_path):
    run_dir = tmp_path / "a <b> run"
    flags = [*SMALL[script], "--num-questions", 2, "--num-iterations", 1, "--run-dir", run_dir]
    assert run_script(script, *flags)[0] == 0
    page, sample = Page(html_of(run_script, run_dir)), samples(run_dir)
    nodes = list(segments(nested(sample)))
    assert page.texts("q") == [sample["prompt"]] and len(page.texts("node")) == len(nodes)
    tags = [f"V {number(value)}" for node in nodes for value in node.get("values", [])]
    assert Counter(page.texts("tag")) == Counter(tags) and bool(tags) == (script == "spo_chain.py")
    credit, expected = Counter(), Counter()  # characters by the advantage that is shown for them
    for element in [element for element in page.elements if "data-a" in element]:
        credit[element["data-a"]] += len(element["text"])
        assert element["class"][0] == {"+": "u", "−": "d", "0": "z"}[element["data-a"][0]]
    for node in nodes:
        for token, advantage in zip(node["tokens"], node["advantages"]):
            expected[number(advantage, sign=True)] += len(token)
    assert credit == +expected

    # Hostile texts; of three samples, the first and the last.
    sample = samples(run_dir)
    count = sum(len(node["tokens"]) for node in sample["completions"])
    for node in sample["completions"]:
        node["tokens"] = [HOSTILE] * len(node["tokens"])
    sample |= {"prompt": HOSTILE, "gold": HOSTILE}
    lines = [json.dumps(sample | {"iteration": k}) + "\n" for k in (1, 5, 9)]
    (run_dir / "samples.jsonl").write_text("".join(lines))
    hostile = html_of(run_script, run_dir)
    assert hostile.count("alert(1)&lt;/script&gt;") == 2 * (2 + count) and "a &lt;b&gt; run" in hostile
    assert not {"script", "img"} & {element["tag"] for element in Page(hostile).elements}
    assert [text.split()[1] for text in Page(hostile).texts("h2")] == ["1", "9"]
