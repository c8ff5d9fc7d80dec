"""Segment Policy Optimization: see the credit. One self-contained HTML page from a run's samples.jsonl.

    python benchmark/view.py runs/NAME                    # writes runs/NAME/credit.html
    python benchmark/view.py runs/NAME --out page.html

Works for runs of all four scripts. Shows a question with its sampled tree or answers, for the first
iteration, which samples from the policy before training, and for the last: segments (PPO: tokens) coloured
by advantage, tokens below --prob-threshold underlined, values where they were estimated, and rewards. The
script needs nothing but Python, the page nothing but a browser.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 4_900_000  # of the page; of a larger one, only some children of each node are shown
OPEN_SEGMENTS = 60  # a tree with more is folded, but for the first segment below which most credit is given
SHADES = 12  # of blue and of orange

# A flag that only one script has: the script's name, flags of its own, and how to read its credit.
ALGORITHMS = {
    "branch_factors": ("SPO-tree", "branch_factors segment_tokens", """
        Every box is a <b>segment</b>; it continues the text of the box to its left. At its right
        end stands its value <b>V</b>, the estimated chance that the answer turns out right: the
        mean of the V of its continuations, or for a complete answer the reward (✓ 1 or ✗ 0). At its
        left end stands its <b>advantage A</b> = V minus the V before it, the credit of all its
        tokens. Siblings are sorted by V; a click on a box folds or unfolds what continues it."""),
    "mc_rollouts": ("SPO-chain", "samples_per_question partition cutpoint_interval mc_rollouts", """
        Every box is a sampled answer, graded at its right end (✓ 1 or ✗ 0). A tag <b>V</b> marks
        where a <b>segment</b> starts, with the estimated chance that the answer turns out right
        from there: the share of right answers among {mc_rollouts} continuations. After it stands
        the segment's <b>advantage A</b> = the next V (or at the end the reward) minus this V, the
        credit of all its tokens."""),
    "leave_one_out": ("GRPO", "samples_per_question leave_one_out", """
        Every box is a sampled answer, graded at its right end (✓ 1 or ✗ 0). At its left end stands
        its <b>advantage A</b>, which compares the reward with those of the other answers: one
        credit for all tokens, wherever the mistake was made."""),
    "gae_lambda": ("PPO", "samples_per_question gae_lambda", """
        Every box is a sampled answer, graded at its right end (✓ 1 or ✗ 0). Each token has its own
        <b>advantage A</b>, from the values that a critic has learned (before any whitening); hover
        over a token to see it."""),
}

CSS = """
body{margin:0 auto;padding:20px 26px 40px;max-width:1240px;background:#fff;color:#1a1a1a;
 print-color-adjust:exact;-webkit-print-color-adjust:exact}
body,.A,.V,.tag,.tag+span::before{font:14px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:25px;margin:0}h2{font-size:19px;margin:26px 0 8px;padding-top:12px;border-top:2px solid #1a1a1a}
p{margin:8px 0;max-width:1080px}small,.dim{color:#666;font-weight:400}h1 small{font-size:15px;margin-left:8px}
.facts{color:#444;font-size:13px}.facts span{white-space:nowrap}
.key{display:flex;flex-wrap:wrap;gap:4px 30px;padding:7px 12px;margin:10px 0;border:1px solid #ddd;
 border-radius:6px;font-size:13px}
.bar{display:inline-block;vertical-align:middle;line-height:0;white-space:nowrap}
.bar i{display:inline-block;width:8px;height:17px}
.t{font:13px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
 overflow-wrap:anywhere;unicode-bidi:isolate}
.t em{font-style:normal;color:#0007;user-select:none}
.q{padding:7px 12px;margin:6px 0;background:#f4f4f1;border-radius:6px}
.t i{font-style:normal;margin-right:1px;text-decoration:underline 1px;text-underline-offset:3px;
 text-decoration-skip-ink:none}
.t .p2{text-decoration-thickness:2px}.t .p3{text-decoration-thickness:3px}
.t .p4{text-decoration-thickness:5px}
.row{display:flex;gap:9px;align-items:flex-start;padding:2px 9px;border:1px solid #c4c4c4;border-radius:6px;
 background:#fff}
.row .t{flex:1;min-width:0}.right{color:#0b5fa5}.wrong{color:#b34700}
.A,.V{font-weight:600;font-size:13px;line-height:1.7;font-variant-numeric:tabular-nums;white-space:nowrap;
 text-align:right}
.A{min-width:2.6em}.V small{display:block;font-size:11px;line-height:1.2}
.tag,.tag+span::before{font-weight:600;font-size:11px;line-height:1.4;padding:0 5px}
.tag+span::before{content:attr(data-a)}
.tag{border:1px solid #777;border-radius:8px;background:#fff;white-space:nowrap}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:6px;align-items:start}
.tree br{display:none}
summary{float:left;width:31%;position:sticky;top:4px;cursor:pointer;list-style:none}
summary .row{border-color:#555}
summary::-webkit-details-marker{display:none}details:not([open])>summary .V::before{content:"▸ "}
details::after{content:"";display:block;clear:both}.kids{margin-left:31%;padding-left:26px}
.kids summary{width:36%}.kids .kids{margin-left:36%}
.tree .node{position:relative;margin:3px 0}.kids>.row::before,.kids>.row::after{margin:-1px 0 0 -1px}
.kids>.node::before{content:"";position:absolute;left:-14px;top:14px;width:14px;border-top:1px solid #888}
.kids>.node:first-child::before{left:-26px;width:26px}
.kids>.node:not(:last-child)::after{content:"";position:absolute;left:-14px;top:14px;bottom:-18px;
 border-left:1px solid #888}
@media print{summary{position:static}body{padding:0;max-width:none}.row{break-inside:avoid}}
"""


@dataclass
class Look:
    """What the colours and marks of a page mean, and how much it shows."""

    threshold: float  # tokens less probable are underlined
    largest: float  # the advantage that gets the full colour
    most: int  # children of a node that are shown


def number(x: float, sign: bool = False, digits: int = 2) -> str:
    """A number without the zero before the point, as in .25; with `sign`, 0 without one is exactly 0."""
    text = f"{abs(x):.{digits}f}"
    if sign and not x:
        return "0"
    return ("−" if x < 0 else "+" if sign else "") + (text[1:] if text[0] == "0" else text)


def shade(advantage: float, largest: float) -> str:
    """The class of a colour: z for exactly 0, u1, u2, ... (blue) above it, d1, d2, ... (orange) below."""
    if not advantage:
        return "z"
    return f"{'u' if advantage > 0 else 'd'}{max(1, min(SHADES, round(abs(advantage) / largest * SHADES)))}"


def token_html(text: str, prob: float, look: Look) -> str:
    """A token, escaped; underlined below the threshold, the thicker the less probable it was."""
    text = escape(text).replace("\n", "<em>↵ </em><br>")
    if prob >= look.threshold:
        return text
    width = 1 + (prob < 0.5) + (prob < 0.2) + (prob < 0.05)
    return f'<i class=p{width} title="probability {prob:.3f}">{text}</i>'


def text_html(node: dict, look: Look) -> str:
    """The tokens of a node, coloured by advantage; in a chain, with the value where a segment starts."""
    tokens = list(zip(node["tokens"], node["probs"], node["advantages"]))
    starts = node.get("starts", [0])
    html = ""
    for k, (start, end) in enumerate(zip(starts, [*starts[1:], len(tokens)])):
        if "values" in node:
            html += f"<b class=tag>V {number(node['values'][k])}</b>"
        for advantage, run in groupby(tokens[start:end], lambda token: token[2]):
            label, colour = number(advantage, sign=True), shade(advantage, look.largest)
            text = "".join(token_html(token, prob, look) for token, prob, _ in run)
            html += f'<span class={colour} title="A {label}" data-a="{label}">{text}</span>'
    return f"<div class=t>{html}</div>"


def nested(sample: dict) -> dict:
    """The question as the root of a tree: the completions that continue a node are its `children`."""
    root = sample | {"children": []}
    for node in sample["completions"]:
        node["children"] = []
        parent = root if node["parent"] is None else sample["completions"][node["parent"]]
        parent["children"].append(node)  # parents stand before their children
    return root


def segments(node: dict) -> Iterator[dict]:
    """Every node below `node`, depth first."""
    for child in node["children"]:
        yield child
        yield from segments(child)


def share_right(rewards: list[float]) -> str:
    return f"{sum(map(bool, rewards))} of {len(rewards)}"


def node_html(node: dict, look: Look) -> str:
    """A node, with its advantage at the left and its value or reward at the right, and what continues it."""
    advantages = set() if "values" in node else set(node["advantages"])
    html = f"<div class=A>{number(*advantages, sign=True)}</div>" if len(advantages) == 1 else ""
    html += text_html(node, look)
    if not node["children"]:
        html += "<div class='V right'>✓ 1</div>" if node["value"] else "<div class='V wrong'>✗ 0</div>"
        return f"<div class='node row'>{html}</div>\n"
    rewards = [below["value"] for below in segments(node) if not below["children"]]
    html += f"<div class=V>V {number(node['value'])}<small>{share_right(rewards)} right</small></div>"
    return (f"<details class=node{' open' * node['open']}><summary><div class=row>{html}</div></summary>"
            f"<div class=kids>{children_html(node, look)}</div></details>\n")


def children_html(node: dict, look: Look) -> str:
    """The children of a node, best first."""
    shown = sorted(node["children"][: look.most], key=lambda child: -child["value"])
    html = "".join(node_html(child, look) for child in shown)
    if left_out := len(node["children"]) - len(shown):
        html += f"<div class='node dim'>{left_out} more not shown: the page would be too large</div>\n"
    return html


def credit_below(node: dict) -> float:
    return sum(abs(advantage) for below in segments(node) for advantage in below["advantages"])


def sample_html(tree: dict, args: dict, look: Look) -> str:
    """One question of one iteration with everything that was sampled for it."""
    iteration, unfolded = tree["iteration"], max(tree["children"], key=credit_below)
    is_small = len(list(segments(tree))) <= OPEN_SEGMENTS
    for child in tree["children"]:
        for node in (child, *segments(child)):
            node["open"] = is_small or child is unfolded
    rewards = [node["value"] for node in segments(tree) if not node["children"]]
    is_tree = any(child["children"] for child in tree["children"])
    value = f": <b>V(question) = {number(tree['value'])}</b>" if is_tree else ""
    when = f"after {iteration - 1} iterations of training" if iteration > 1 else "before training"
    return (f"<h2>Iteration {iteration} of {args['num_iterations']} <small>the policy {when}</small></h2>"
            f"<div class='q t'>{escape(tree['prompt'])}</div>"
            f"<p>Gold answer <b>{escape(str(tree['gold']))}</b>; "
            f"{share_right(rewards)} sampled answers are right{value}.</p>\n"
            f"<div class={'tree' if is_tree else 'answers'}>{children_html(tree, look)}</div>\n")


def page_html(name: str, args: dict, metrics: list[dict], trees: list[dict], most: int) -> str:
    """The page: what was run, how to read it, and the samples."""
    algorithm, flags, credit = next(about for flag, about in ALGORITHMS.items() if flag in args)
    largest = max(abs(a) for tree in trees for node in segments(tree) for a in node["advantages"]) or 1.0
    look = Look(args["prob_threshold"], largest, most)
    facts = []
    for flag in f"preset model train_data seed temperature learning_rate {flags}".split():
        value = " ".join(map(str, args[flag])) if isinstance(args[flag], list) else str(args[flag])
        value = value.removeprefix(f"{ROOT}/")
        facts.append(f"<span>{flag.replace('_', '-')} <b>{escape(value)}</b></span>")
    evaluations = [row for row in metrics if "eval/accuracy" in row]
    before, after = (number(row["eval/accuracy"], digits=3) for row in (evaluations[0], evaluations[-1]))
    colours = "".join(f"<i class={shade(k, SHADES)}></i>" for k in range(-SHADES, SHADES + 1) if k)
    css = CSS
    for k in range(1, SHADES + 1):
        opacity = f"{0.1 + 0.62 * k / SHADES:.2f}"
        css += f".u{k}{{background:rgba(40,130,215,{opacity})}}.d{k}{{background:rgba(240,130,20,{opacity})}}"
    marks = " ".join(token_html(f"{p:g}"[1:], p, look) for p in (0.7, 0.3, 0.1, 0.01) if p < look.threshold)
    if args.get("normalize_advantages"):
        credit += " It is divided by the standard deviation of the group."
    trained = "only they are trained" if args["prob_mask"] else "all coloured tokens are trained"
    return f"""<!DOCTYPE html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{algorithm}: {escape(name)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{css}</style></head><body>
<h1>Where {algorithm} puts the credit <small>{escape(name)}</small></h1>
<div class=facts>{" · ".join(facts)}<br>Accuracy on {args['eval_questions']} questions
<b>{before} → {after}</b> after {evaluations[-1]['iteration']} iterations.</div>
<p>{credit.format(**args)}</p>
<div class=key>
<span>Advantage {number(-largest)} <span class=bar>{colours}</span> +{number(largest)}, no colour: 0, not
trained</span>
<span>Underlined: cutpoints, tokens of probability below {number(look.threshold)}
(<span class=t>{marks}</span>); {trained}</span>
</div>
{"".join(sample_html(tree, args, look) for tree in trees)}</body></html>
"""


def read(path: Path) -> list[dict]:
    """The complete lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run_dir", type=Path, help="directory of a run")
    parser.add_argument("--out", type=Path, help="file to write (default: credit.html of the run)")
    options = parser.parse_args()
    if not (options.run_dir / "samples.jsonl").exists():
        sys.exit(f"error: {options.run_dir} has no samples.jsonl: it is not the directory of a run")
    args = json.loads((options.run_dir / "args.json").read_text(encoding="utf-8"))["args"]
    metrics, samples = read(options.run_dir / "metrics.jsonl"), read(options.run_dir / "samples.jsonl")
    if not samples:
        sys.exit(f"error: {options.run_dir}/samples.jsonl is empty: no iteration has ended yet")
    trees = [nested(sample) for sample in samples[:1] + samples[1:][-1:]]  # the first and the last
    out, name = options.out or options.run_dir / "credit.html", options.run_dir.resolve().name
    for most in range(max(len(node["children"]) for node in segments({"children": trees})), 0, -1):
        page = page_html(name, args, metrics, trees, most).encode(errors="xmlcharrefreplace")
        if len(page) <= MAX_BYTES:
            break
    out.write_bytes(page)
    print(f"{out}: {len(page) / 1000:,.0f} kB")
