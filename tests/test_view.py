"""The page that shows the credit of a run: it says what samples.jsonl says, and is safe and small."""

import json
import random
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from conftest import ROOT, SCRIPTS, SMALL

sys.path.insert(0, str(ROOT / "benchmark"))
from view import SHADES, nested, number, segments, shade

VIEW = "benchmark/view.py"


class Page(HTMLParser):
    """The elements of a page with attributes and texts; the sign of a line break becomes one again."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html.replace("<em>↵ </em><br>", "\n"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "class": "", "text": []} | dict(attributes)
        self.elements.append(element)
        self.open += [element] if tag not in ("meta", "br") else []

    def handle_endtag(self, tag):
        element = self.open.pop()
        assert element["tag"] == tag
        element["text"] = "".join(element["text"])

    def handle_data(self, data):
        for element in self.open:
            element["text"].append(data)

    def texts(self, name):
        """The texts of all elements of a tag or a class."""
        return [e["text"] for e in self.elements if name in (e["tag"], *e["class"].split())]


def check(html, samples, threshold=0.9):
    """Compares a page with the samples of which it shows everything."""
    assert len(html.encode()) < 5_000_000
    assert not re.search(r"src=|href=|url\(|@import|https?:|<script", html) and "default-src 'none'" in html
    page = Page(html)
    tags = "html head meta title style body h1 h2 small div span p b i br details summary".split()
    attributes = "tag text lang charset name content http-equiv class title data-a open".split()
    for element in page.elements:
        assert element["tag"] in tags and element.keys() <= set(attributes)

    nodes = [node for sample in samples for node in segments(nested(sample))]
    assert len(nodes) == sum(len(sample["completions"]) for sample in samples)
    inner = [node for node in nodes if node["children"]]
    leaves = [node for node in nodes if not node["children"]]
    assert page.texts("q") == [sample["prompt"] for sample in samples]
    assert len(page.texts("node")) == len(nodes) and len(page.texts("details")) == len(inner)
    ends = Counter(f"V {number(node['value'])}" for node in inner)
    ends += Counter("✓ 1" if leaf["value"] == 1 else "✗ 0" for leaf in leaves)
    assert Counter(re.match(r"✓ 1$|✗ 0$|V 1?\.\d\d", text)[0] for text in page.texts("V")) == ends
    tags = [f"V {number(value)}" for leaf in leaves for value in leaf.get("values", [])]
    assert Counter(page.texts("tag")) == Counter(tags)
    marked = sum(len(page.texts(f"p{k}")) for k in (1, 2, 3, 4))
    marked -= sum(p < threshold for p in (0.7, 0.3, 0.1, 0.01))  # in the key
    assert marked == sum(prob < threshold for node in nodes for prob in node["probs"])

    runs = Counter()  # (advantage, text) of consecutive tokens of one segment with the same advantage
    for node in nodes:
        starts, advantages = node.get("starts", [0]), node["advantages"]
        for a, b in zip(starts, [*starts[1:], len(node["tokens"])]):
            cuts = [a, *(k for k in range(a + 1, b) if advantages[k] != advantages[k - 1]), b]
            for c, d in zip(cuts, cuts[1:]):
                runs[number(advantages[c], sign=True), "".join(node["tokens"][c:d])] += 1
    coloured = [element for element in page.elements if "data-a" in element]
    assert Counter((element["data-a"], element["text"]) for element in coloured) == runs
    classes = {"+": "u", "−": "d", "0": "z"}
    assert all(element["class"][0] == classes[element["data-a"][0]] for element in coloured)
    return page


def write_run(run_dir, samples, **args):
    """The files of a run that the viewer reads."""
    run_dir.mkdir()
    common = {"preset": "tiny", "model": "m", "train_data": "d", "seed": 1, "temperature": 1.0}
    common |= {"learning_rate": 1e-4, "num_iterations": 9, "eval_questions": 5}
    common |= {"prob_mask": True, "prob_threshold": 0.9}
    (run_dir / "args.json").write_text(json.dumps({"args": common | args}))
    rows = [{"iteration": 0, "eval/accuracy": 0.25}, {"iteration": 1}, {"iteration": 9, "eval/accuracy": 0.5}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def random_sample(iteration, factors, num_tokens, rng, text="word "):
    """A line of samples.jsonl with a random tree."""
    completions = []

    def grow(parent, factors):
        """Adds what continues a completion; returns the value of the latter."""
        first = len(completions)
        for _ in range(factors[0]):
            probs = [round(rng.random(), 4) for _ in range(num_tokens)]
            completions.append({"parent": parent, "tokens": [text] * num_tokens, "probs": probs})
        children = range(first, len(completions))
        for k in children:
            completions[k]["value"] = grow(k, factors[1:]) if factors[1:] else float(rng.random() < 0.5)
        value = sum(completions[k]["value"] for k in children) / len(children)
        for k in children:
            completions[k]["advantages"] = [completions[k]["value"] - value] * num_tokens
        return value

    value = grow(None, factors)
    return {"iteration": iteration, "prompt": "q", "gold": "1", "value": value, "completions": completions}


def test_numbers_and_shades():
    assert [number(x) for x in (0.25, 1.0, 0.0, 10.0)] == [".25", "1.00", ".00", "10.00"]
    signed = [number(x, sign=True) for x in (0.25, -1.5, 0.0, 0.001, -0.001)]
    assert signed == ["+.25", "−1.50", "0", "+.00", "−.00"]
    assert [shade(x, 0.5) for x in (0.5, -0.5, 0.25)] == [f"u{SHADES}", f"d{SHADES}", f"u{SHADES // 2}"]
    assert [shade(x, 0.5) for x in (1e-9, -1e-9, 0.0)] == ["u1", "d1", "z"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_page_of_a_run(script, run_script, tmp_path):
    run_dir = tmp_path / "run"
    status, _, err = run_script(script, *SMALL[script], "--num-iterations", 1, "--run-dir", run_dir)
    assert status == 0, err
    status, out, err = run_script(VIEW, run_dir)
    assert status == 0 and out.startswith(f"{run_dir}/credit.html: "), err
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    page = check((run_dir / "credit.html").read_text(), samples)
    assert page.texts("h2") == ["Iteration 1 of 1 the policy before training"]
    algorithm = dict(zip(SCRIPTS, ["SPO-tree", "SPO-chain", "GRPO", "PPO"]))[script]
    assert page.texts("h1") == [f"Where {algorithm} puts the credit run"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert " → ".join(number(row["eval/accuracy"], digits=3) for row in rows) in page.texts("facts")[0]
    assert bool(page.texts("tag")) == (script == "spo_chain.py")
    assert bool(page.texts("details")) == (script == "spo_tree.py")
    if script == "ppo.py":  # an advantage for each token
        advantages = {element["data-a"] for element in page.elements if "data-a" in element}
        assert len(advantages) > len(page.texts("node"))


def test_text_from_a_model_is_only_text(run_script, tmp_path):
    hostile = "<script>alert(1)</script>\n</div><img src=x onerror=alert(1)> \" ' & &lt; \ud800\u202e"
    sample = random_sample(3, [2, 2], 5, random.Random(1), hostile) | {"prompt": hostile, "gold": hostile}
    write_run(tmp_path / "a <b> run", [sample], branch_factors=[2, 2], segment_tokens=[5], model=hostile)
    status, _, err = run_script(VIEW, tmp_path / "a <b> run", "--out", tmp_path / "page.html")
    assert status == 0, err
    html = (tmp_path / "page.html").read_text()
    assert html.count("alert(1)&lt;/script&gt;") == 3 + 30 and "a &lt;b&gt; run" in html
    page = Page(html)
    assert not {"script", "img"} & {element["tag"] for element in page.elements}
    assert len(page.texts("node")) == 6


def test_a_large_tree_is_folded(run_script, tmp_path):
    rng = random.Random(2)
    samples = [random_sample(k, [6, 6, 6], 30, rng) for k in (1, 5, 9)]
    write_run(tmp_path / "run", samples, branch_factors=[6, 6, 6], segment_tokens=[30])
    assert run_script(VIEW, tmp_path / "run")[0] == 0
    page = check((tmp_path / "run" / "credit.html").read_text(), [samples[0], samples[2]])  # first and last
    assert "Accuracy on 5 questions .250 → .500" in page.texts("facts")[0].replace("\n", " ")
    assert [text.split()[1] for text in page.texts("h2")] == ["1", "9"] and len(page.texts("node")) == 2 * 258
    details = [element for element in page.elements if element["tag"] == "details"]
    assert len(details) == 2 * 42 and sum("open" in element for element in details) == 2 * 7


def test_a_page_stays_below_five_megabytes(run_script, tmp_path):
    rng = random.Random(3)
    samples = [random_sample(k, [6, 6, 6], 30, rng, "word " * 80) for k in (1, 9)]
    write_run(tmp_path / "run", samples, branch_factors=[6, 6, 6], segment_tokens=[30])
    assert run_script(VIEW, tmp_path / "run")[0] == 0
    html = (tmp_path / "run" / "credit.html").read_text()
    assert 1_000_000 < len(html.encode()) < 5_000_000
    most = 6 - int(re.search(r"(\d) more not shown", html)[1])
    assert len(Page(html).texts("row")) == 2 * (most + most**2 + most**3)
    assert f"V(question) = {number(samples[0]['value'])}" in html and "of 216 sampled answers" in html


def test_a_directory_that_is_no_run_is_one_line(run_script, tmp_path):
    run_dir = tmp_path / "run"
    write_run(run_dir, [], branch_factors=[2])
    for path in (run_dir, tmp_path / "missing"):
        status, out, err = run_script(VIEW, path)
        assert status == 1 and out == "" and err.startswith(f"error: {path}") and err.count("\n") == 1
