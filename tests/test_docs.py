"""README and docs/: names exist, every metric is explained, links resolve, and commands are accepted; those for a CPU are run."""

import argparse
import ast
import re
import runpy
import shlex
import shutil
import sys
from functools import cache

import pytest
import transformers

from conftest import ROOT, SCRIPTS
from test_run import EVAL_METRICS, METRICS, OWN_METRICS

PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
OF_SCRIPT = {f"docs/{script.removesuffix('.py')}.md": script for script in [*SCRIPTS, "eval.py"]}  # page: its script
SOURCES = [*SCRIPTS, "eval.py", "math_grader.py", "tiny/make.py"]
SOURCES += [f"benchmark/{path.name}" for path in sorted((ROOT / "benchmark").glob("*.py"))]
ALL_METRICS = {*METRICS, *EVAL_METRICS, *" ".join(OWN_METRICS.values()).split()}
FOREIGN_FLAGS = {"--help", "--nproc-per-node"}
AUTHORS = "https://github.com/AIFrameResearch/SPO/blob/b9fc6a2/"
LINES = re.compile(r"\w+\.(?:py|jsonnet):\d+(?:-\d+)?")  # of the authors' code


# ------------------------------------------------------------------------------------------------------------------- markdown


def split_blocks(text):
    """(prose, code blocks): fenced ones, and lines indented by four or more after an empty line."""
    prose, blocks, fenced, indented, before = [], [], False, False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
            blocks += [[]] if fenced else []
        elif fenced:
            blocks[-1].append(line)
        elif line.startswith("    ") and (indented or not before.strip()):
            blocks += [] if indented else [[]]
            indented = True
            blocks[-1].append(line[4:])
        else:
            indented = indented and not line.strip()
            prose.append(line)
        before = line
    return "\n".join(prose), ["\n".join(block) for block in blocks]


def code_spans(prose):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def section(text, title):
    """The text below the heading `title`, down to the next heading of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match, f"no section {title!r}"
    return re.split(rf"^#{{1,{len(match[1])}}} ", text[match.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text):
    """The code span that each table row begins with."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def anchors(text):
    """Names of the headings of a page as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", split_blocks(text)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """Every `python X.py ...` and `torchrun ... X.py ...` in code blocks and code spans, as lists of words from X.py on."""
    prose, blocks = split_blocks(text)
    spans = [span for span in code_spans(prose) if re.match(r"(python|torchrun) ", span)]
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines() + spans:
        for part in re.split(r"&&|;|\bdo\b", re.sub(r"\s#.*", "", line)):
            match = re.match(r"\s*(?:python3? |torchrun (?:--?[\w-]+ \d+ )*)?([\w/]+\.py(?:\s.*)?)$", part)
            if match and (ROOT / match[1].split()[0]).exists():
                found.append(shlex.split(match[1].replace("$seed", "1")))
    return found


# -------------------------------------------------------------------------------------------------------------------- sources


@cache
def functions(name):
    """Functions and classes of a source, methods included."""
    nodes = ast.walk(ast.parse((ROOT / name).read_text()))
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@cache
def words(name):
    """Every identifier of a source, and every word of its short string constants (file names, choices, columns)."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        names = (getattr(node, attribute, None) for attribute in ("name", "id", "attr", "arg"))
        found |= {word for word in names if isinstance(word, str)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
            found |= {node.value, *node.value.split(), *re.findall(r"[\w.-]+", node.value)}
    return found


@cache
def flags(name):
    source, found = (ROOT / name).read_text(), set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for item in (item for item in node.body if isinstance(item, ast.AnnAssign)):
                flag = item.target.id.replace("_", "-")
                found |= {f"--{flag}", f"--no-{flag}"} if ast.unparse(item.annotation) == "bool" else {f"--{flag}"}
    return found | set(re.findall(r'add_argument\("(--[a-z-]+)"', source))


def wrong_names(page, text):
    """Code spans of a page that name a flag, metric, function, value or file which does not exist."""
    own, wrong = OF_SCRIPT.get(page), []
    everywhere = set().union(*map(words, SOURCES))
    for span in code_spans(split_blocks(text)[0]):
        named = [name for name in SOURCES if name in span] or ([own] if own else SOURCES)
        named += SCRIPTS if "compare.py" in span else []  # which hands flags on to them
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) - set().union(*map(flags, named)) - FOREIGN_FLAGS
        call, dotted = re.fullmatch(r"([A-Za-z_][\w.]*)\(.*\)", span), re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", span)
        if unknown:
            wrong.append(f"{span}: no flag {', '.join(sorted(unknown))}")
        elif re.fullmatch(r"(rollout|segments|losses|buffer|chain|critic|eval|time)/[a-z]\w+", span):
            wrong += [] if span in ALL_METRICS else [f"{span}: no such metric"]
        elif call:
            wrong += [] if any(call[1].split(".")[-1] in functions(name) for name in SOURCES) else [f"{span}: no such function"]
        elif (ROOT / span).exists() or (ROOT / "docs" / span).exists():
            continue
        elif dotted or re.fullmatch(r"[\w./<>-]+\.(py|md|jsonl?|txt|png)|[\w<>-]+/([\w<>-]+/?)*", span):
            parts = {span} if span in everywhere else set(re.split(r"[./]", span)) if dotted else set(span.strip("/").split("/"))
            unknown = {part for part in parts if part not in everywhere and part != "NAME" and "<" not in part}
            wrong += [f"{span}: nothing in the sources is called {', '.join(sorted(unknown))}"] if unknown else []
    return wrong


def wrong_details(page, text):
    """Numbered details that name nothing in the page's script, or neither lines of the authors' code nor that there are none."""
    own, wrong = OF_SCRIPT[page], []
    items = re.split(r"^\d+\. ", section(text, "Implementation details"), flags=re.MULTILINE)[1:]
    if not 8 <= len(items) <= 20:
        wrong.append(f"{len(items)} details")
    for item in (" ".join(item.split()) for item in items):
        spans = {name for span in code_spans(item) for name in [span, *re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)]}
        title = item[:60]
        if not spans & {*functions(own), *flags(own), *functions("math_grader.py")}:
            wrong.append(f"{title}: no function, class or flag of {own}")
        if not re.search(rf"\[{LINES.pattern}\]|[Nn]ot in the original|No counterpart", item):
            wrong.append(f"{title}: no line of the authors' code")
        for name in spans:
            is_name = re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|[A-Z][a-z]+[A-Z]\w+", name)
            if is_name and name not in words(own) | functions("math_grader.py"):
                wrong.append(f"{title}: {own} has no {name}")
    return wrong


def wrong_links(page, text):
    """Links to files, headings and lines of the authors' code that lead nowhere."""
    prose, wrong = split_blocks(text)[0], []
    definitions = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", prose, re.MULTILINE))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = PAGES[page].parent / name
        if not path.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path.read_text() if name else text):
            wrong.append(f"{target}: no such heading")
    body = re.sub(r"^\[[^]]+\]: .*$", "", prose, flags=re.MULTILINE)
    used = set(re.findall(rf"\[({LINES.pattern})\]", body))
    wrong += [f"{label}: no link" for label in sorted(used - definitions.keys())]
    wrong += [f"{label}: link not used" for label in sorted(definitions.keys() - used)]
    for label, url in definitions.items():
        file, numbers = label.split(":")
        lines = "-".join(f"L{number}" for number in numbers.split("-"))
        if not re.fullmatch(rf"{re.escape(AUTHORS)}(?:src/treetune|configs)/(?:\w+/)*{re.escape(file)}#{lines}", url):
            wrong.append(f"{label}: {url} is another file or other lines")
    return wrong


# ---------------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    assert wrong_names(page, PAGES[page].read_text()) == []


@pytest.mark.parametrize("page", OF_SCRIPT)
def test_numbered_details(page):
    assert wrong_details(page, PAGES[page].read_text()) == []


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    assert wrong_links(page, PAGES[page].read_text()) == []


@pytest.mark.parametrize("page", [page for page, script in OF_SCRIPT.items() if script in SCRIPTS])
def test_every_metric_is_explained_once(page):
    shared, own = PAGES["docs/metrics.md"].read_text(), PAGES[page].read_text()
    assert sorted(first_cells(section(shared, "Shared metrics"))) == sorted([*METRICS, *EVAL_METRICS])
    assert sorted(first_cells(section(own, "Logged metrics"))) == sorted(OWN_METRICS[OF_SCRIPT[page]].split())
    assert "(metrics.md" in section(own, "Logged metrics")


def test_the_checks_can_fail():
    """What each check is there for, in a page with one mistake of every kind."""
    text = """# A page

`no_function(x)` `losses/nonsense` `--no-such-flag` `no_such_name` `docs/nowhere.md` `spo_tree.py --mc-rollouts 3`
`gae` `rollout/reward_mean`
[a](nowhere.md) [b](#no-heading) [c](#a-page) [chain.py:1-2] [tree.py:3]

## Implementation details

1. **Nothing named.** [tree.py:3]
2. **No lines.** `tree_values` and `group_advantages`

[tree.py:3]: https://github.com/AIFrameResearch/SPO/blob/b9fc6a2/src/treetune/tasks/tree.py#L4
[tree.py:5]: https://github.com/AIFrameResearch/SPO/blob/b9fc6a2/src/treetune/tasks/tree.py#L5
"""
    assert [line.split(":")[0] for line in wrong_names("README.md", text)] == [
        "no_function(x)", "losses/nonsense", "--no-such-flag", "no_such_name", "docs/nowhere.md", "spo_tree.py --mc-rollouts 3"]
    assert [line.split(":")[0] for line in wrong_names("docs/spo_tree.md", "`--mc-rollouts`")] == ["--mc-rollouts"]
    details = "\n".join(wrong_details("docs/spo_tree.md", text))
    assert "2 details" in details and "Nothing named.** [tree.py:3]: no function" in details and "No lines.** " in details
    assert "no group_advantages" in details
    links = wrong_links("README.md", text)
    assert [line.split(": ")[0] for line in links] == ["nowhere.md", "#no-heading", "chain.py:1-2", "tree.py:5", "tree.py:3"]
    lines = ["pip install x && python grpo.py --prob-mask  # why", "for seed in 1; do python ppo.py --seed $seed; done",
             "torchrun --nproc-per-node 8 spo_tree.py \\", "    --preset math"]  # fmt: skip
    found = commands("# A\n\n" + "\n".join("    " + line for line in lines))
    assert found == [["grpo.py", "--prob-mask"], ["ppo.py", "--seed", "1"], ["spo_tree.py", "--preset", "math"]]


# ------------------------------------------------------------------------------------------------------------------- commands

DOCUMENTED = {page: commands(path.read_text()) for page, path in PAGES.items()}
IN_DOCSTRINGS = [command for name in SOURCES for command in commands((ROOT / name).read_text().split('"""')[1])]
NEEDS_A_GPU = re.compile(r"--preset (gsm8k|math)|--protocol|3896")  # or the hub
ON_A_CPU = sorted({shlex.join(command) for command in sum(DOCUMENTED.values(), [])
                   if command[0] in OF_SCRIPT.values() and not NEEDS_A_GPU.search(shlex.join(command))})  # fmt: skip
OTHERS = sorted({shlex.join(command) for command in [*sum(DOCUMENTED.values(), []), *IN_DOCSTRINGS]} - {*ON_A_CPU})
SHORTER = {"--num-iterations": 1, "--num-questions": 2, "--eval-questions": 4, "--eval-samples": 1}


class Accepted(BaseException):
    """Raised in place of what follows the checks of the flags."""


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """script -> a short run of it, made on demand."""
    made = {}

    def get(run_script, script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("runs") / "run"
            small = [word for pair in SHORTER.items() for word in pair]
            assert run_script(script, *small, "--run-dir", made[script])[0] == 0
        return made[script]

    return get


def with_a_run(command, finished_runs, run_script, tmp_path):
    """The words of a command, with a copy of a finished run of its script for runs/NAME."""
    script, *rest = shlex.split(command)
    if "runs/NAME" in command:
        shutil.copytree(finished_runs(run_script, script if script in SCRIPTS else "spo_tree.py"), tmp_path / "NAME")
    return [script, *(word.replace("runs/NAME", str(tmp_path / "NAME")) for word in rest)]


def test_commands_are_found():
    assert all(len(DOCUMENTED[page]) >= 3 for page in ["README.md", *OF_SCRIPT]) and len(ON_A_CPU) >= 12
    for script in SCRIPTS:  # the default, the real models and a resumed run
        shown = [shlex.join(command) for command in DOCUMENTED[f"docs/{script.removesuffix('.py')}.md"]]
        for flags in ("", " --preset gsm8k", " --preset math", " --resume runs/NAME"):
            assert script + flags in shown


def accepts(monkeypatch, script, words):
    """Runs a script until its flags have been checked: to where it reads a model, or to where a benchmark has parsed them."""
    parse = argparse.ArgumentParser.parse_args

    def stop(*_, **__):
        raise Accepted

    def parse_and_stop(*arguments, **options):
        parse(*arguments, **options)
        raise Accepted

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", stop)
    if script not in OF_SCRIPT.values():
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Accepted:
        return True
    except SystemExit:
        return False
    raise AssertionError(f"{script} ended without a model")


@pytest.mark.parametrize("command", OTHERS)
def test_flags_of_commands_that_are_not_run(monkeypatch, run_script, finished_runs, tmp_path, capsys, command):
    script, *rest = with_a_run(command, finished_runs, run_script, tmp_path)
    assert accepts(monkeypatch, script, rest), capsys.readouterr().err


@pytest.mark.parametrize("command", ["grpo.py --no-such-flag", "spo_tree.py --branch-factors 1 1", "benchmark/gpu.py --shape round",
                                     "eval.py --top-p 2"])  # fmt: skip
def test_wrong_flags_are_not_accepted(monkeypatch, command):
    script, *rest = shlex.split(command)
    assert not accepts(monkeypatch, script, rest)


@pytest.mark.parametrize("command", ON_A_CPU)
def test_commands_for_a_cpu_run_as_written(run_script, finished_runs, tmp_path, command):
    """As they stand in README and docs, but for flags at the end that make them shorter and say where to write."""
    script, *rest = with_a_run(command, finished_runs, run_script, tmp_path)
    if script == "eval.py":
        extra = ["--max-questions", 2, "--out", tmp_path / "out"]
    elif "--resume" in rest:
        extra = ["--num-iterations", 2]
    else:
        extra = [word for flag, value in SHORTER.items() if flag not in rest for word in (flag, value)]
        extra += ["--run-dir", tmp_path / "run"]
    status, output, error = run_script(script, *rest, *extra)
    assert status == 0, error
    if script == "eval.py":
        columns = re.sub(r"pass@(?!1 )\d+", "pass@k", output.splitlines()[0]).split()
        assert first_cells(section(PAGES["docs/eval.md"].read_text(), "Columns")) == columns
    else:
        assert "accuracy" in output.splitlines()[-5]
