"""The page that shows the credit of a run: it says what samples.jsonl says, and is safe and small."""

import json
import random
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from conftest import ROOT, SMALL

sys.path.insert(0, str(ROOT / "benchmark"))
from view import SHADES, nested, number, segments, shade

VIEW = "benchmark/view.py"


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


def write_run(run_dir, samples, **args):
    """The files of a run that the viewer reads."""
    run_dir.mkdir()
    common = {"preset": "tiny", "model": "m", "train_data": "d", "seed": 1, "temperature": 1.0, "prob_mask": True}
    common |= {"learning_rate": 1e-4, "num_iterations": 9, "eval_questions": 5, "prob_threshold": 0.9}
    (run_dir / "args.json").write_text(json.dumps({"args": common | args}))
    rows = [{"iteration": 0, "eval/accuracy": 0.25}, {"iteration": 1}, {"iteration": 9, "eval/accuracy": 0.5}]
    for name, lines in (("metrics", rows), ("samples", samples)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def random_sample(iteration, factors, num_tokens, rng, text="word "):
    """A line of samples.jsonl with a random tree."""
    completions = []

    def grow(parent, factors):
        if not factors:
            return float(rng.random() < 0.5)
        own = []
        for _ in range(factors[0]):
            probs = [rng.random() for _ in range(num_tokens)]
            own.append({"parent": parent, "tokens": [text] * num_tokens, "probs": probs})
            completions.append(own[-1])
            own[-1]["value"] = grow(len(completions) - 1, factors[1:])
        value = sum(node["value"] for node in own) / len(own)
        for node in own:
            node["advantages"] = [node["value"] - value] * num_tokens
        return value

    value = grow(None, factors)
    return {"iteration": iteration, "prompt": "q", "gold": "1", "value": value, "completions": completions}


def test_numbers_and_shades():
    assert [number(x) for x in (0.25, 1.0, 0.0, 10.0)] == [".25", "1.00", ".00", "10.00"]
    signed = [number(x, sign=True) for x in (0.25, -1.5, 0.0, 0.001, -0.001)]
    assert signed == ["+.25", "−1.50", "0", "+.00", "−.00"]
    assert [shade(x, 0.5) for x in (0.5, -0.5, 0.25)] == [f"u{SHADES}", f"d{SHADES}", f"u{SHADES // 2}"]
    assert [shade(x, 0.5) for x in (1e-9, -1e-9, 0.0)] == ["u1", "d1", "z"]


@pytest.mark.parametrize("script", ["spo_tree.py", "spo_chain.py", "ppo.py"])
def test_page_of_a_run(script, run_script, tmp_path):
    flags = [*SMALL[script], "--num-iterations", 1, "--run-dir", tmp_path / "run"]
    assert run_script(script, *flags)[0] == 0 and run_script(VIEW, tmp_path / "run")[0] == 0
    page = Page((tmp_path / "run" / "credit.html").read_text())
    (sample,) = map(json.loads, (tmp_path / "run" / "samples.jsonl").open())
    assert page.texts("h2") == ["Iteration 1 of 1 the policy before training"]
    nodes = list(segments(nested(sample)))
    assert page.texts("q") == [sample["prompt"]] and len(page.texts("node")) == len(nodes)
    ends = ["✓ 1", "✗ 0"]
    shown = [re.match(r"✓ 1$|✗ 0$|V 1?\.\d\d", text)[0] for text in page.texts("V")]
    expected = [f"V {number(n['value'])}" if n["children"] else ends[n["value"] == 0] for n in nodes]
    assert Counter(shown) == Counter(expected)
    tags = [f"V {number(value)}" for node in nodes for value in node.get("values", [])]
    assert Counter(page.texts("tag")) == Counter(tags) and bool(tags) == (script == "spo_chain.py")
    coloured = [element for element in page.elements if "data-a" in element]
    credit, expected = Counter(), Counter()  # characters by the advantage that is shown for them
    for element in coloured:
        credit[element["data-a"]] += len(element["text"])
        assert element["class"][0] == {"+": "u", "−": "d", "0": "z"}[element["data-a"][0]]
    for node in nodes:
        for token, advantage in zip(node["tokens"], node["advantages"]):
            expected[number(advantage, sign=True)] += len(token)
    assert credit == +expected
    marked = sum(len(page.texts(f"p{k}")) for k in (1, 2, 3, 4)) - 4  # four in the key
    assert marked == sum(prob < 0.9 for node in nodes for prob in node["probs"])


def test_text_from_a_model_is_only_text(run_script, tmp_path):
    hostile = "<script>alert(1)</script>\n</div><img onerror=alert(1)> \" ' & &lt; \ud800\u202e"
    sample = random_sample(3, [2, 2], 5, random.Random(1), hostile) | {"prompt": hostile, "gold": hostile}
    write_run(tmp_path / "a <b> run", [sample], samples_per_question=2, leave_one_out=False, model=hostile)
    assert run_script(VIEW, tmp_path / "a <b> run", "--out", tmp_path / "page.html")[0] == 0
    html = (tmp_path / "page.html").read_text()
    assert html.count("alert(1)&lt;/script&gt;") == 3 + 30 and "a &lt;b&gt; run" in html
    assert not {"script", "img"} & {element["tag"] for element in Page(html).elements}


@pytest.mark.parametrize("text, shown", [("word ", 6), ("word " * 80, None)])
def test_a_large_tree_is_folded_and_the_page_below_five_megabytes(text, shown, run_script, tmp_path):
    rng = random.Random(2)
    samples = [random_sample(k, [6, 6, 6], 30, rng, text) for k in (1, 5, 9)]
    write_run(tmp_path / "run", samples, branch_factors=[6, 6, 6], segment_tokens=[30])
    assert run_script(VIEW, tmp_path / "run")[0] == 0
    html = (tmp_path / "run" / "credit.html").read_text()
    page, most = Page(html), shown or 6 - int(re.search(r"(\d) more not shown", html)[1])
    assert len(html.encode()) < 5_000_000 and len(page.texts("row")) == 2 * (most + most**2 + most**3)
    assert [text.split()[1] for text in page.texts("h2")] == ["1", "9"]  # the first and the last
    assert "Accuracy on 5 questions .250 → .500" in page.texts("facts")[0].replace("\n", " ")
    details = [element for element in page.elements if element["tag"] == "details"]
    assert sum("open" in element for element in details) == 2 * (1 + most)


def test_a_directory_that_is_no_run_is_one_line(run_script, tmp_path):
    write_run(tmp_path / "run", [], branch_factors=[2])
    for path in (tmp_path / "run", tmp_path / "missing"):
        status, out, err = run_script(VIEW, path)
        assert status == 1 and out == "" and err.startswith(f"error: {path}") and err.count("\n") == 1
