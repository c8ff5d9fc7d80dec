"""README and docs/: names exist, every metric is explained, links resolve, commands are accepted or run."""

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

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
OF_SCRIPT = {f"docs/{script.removesuffix('.py')}.md": script for script in [*SCRIPTS, "eval.py"]}
SOURCES = [*SCRIPTS, "eval.py", "math_grader.py", "tiny/make.py"]
SOURCES += [f"benchmark/{path.name}" for path in sorted((ROOT / "benchmark").glob("*.py"))]
ALL_METRICS = {*METRICS, *EVAL_METRICS, *" ".join(OWN_METRICS.values()).split()}
FOREIGN_FLAGS = {"--help", "--nproc-per-node"}
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
AUTHORS = "https://github.com/AIFrameResearch/SPO/blob/b9fc6a2/"
LINES = r"\w+\.(?:py|jsonnet):\d+(?:-\d+)?"  # of the authors' code


# --------------------------------------------------------------------------------------------------- markdown


def split_blocks(text):
    """(prose, code): fenced lines, and lines indented by four or more after an empty line, are code."""
    prose, code, fenced, indented, before = [], [], False, False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            code.append(line)
        elif line.startswith("    ") and (indented or not before.strip()):
            indented = True
            code.append(line[4:])
        else:
            indented = indented and not line.strip()
            prose.append(line)
        before = line
    return "\n".join(prose), "\n".join(code)


def code_spans(text):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split_blocks(text)[0])]


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
    """Every `python X.py ...` and `torchrun ... X.py ...` in code, as one string from X.py on."""
    code = re.sub(r"\s*\\\n\s*", " ", split_blocks(text)[1])
    for name, words in re.findall(r"(?ms)^(\w+)=\((.*?)\)$", code):  # arrays of the shell
        code = code.replace(f'"${{{name}[@]}}"', " ".join(words.split()))
    lines = re.sub(r"\"\$\(cat \S+\)\"(\$'\\n')?", "'{question}'", code).splitlines()
    lines += [span for span in code_spans(text) if re.match(r"(python|torchrun) ", span)]
    found = []
    for line in lines:
        for part in re.split(r"&&|;|\bdo\b", re.sub(r"\s#.*|(?<=\S)\s{2,}\S.*", "", line)):
            match = re.match(r"\s*(?:python3? |torchrun (?:--?[\w-]+ \d+ )*)([\w/]+\.py(?:\s.*)?)$", part)
            if match and (ROOT / match[1].split()[0]).exists():
                found.append(shlex.join(shlex.split(match[1].replace("$seed", "1"))))
    return found


# ---------------------------------------------------------------------------------------------------- sources


@cache
def functions(name):
    """Functions and classes of a source, methods included."""
    nodes = ast.walk(ast.parse((ROOT / name).read_text()))
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@cache
def words(name):
    """Every identifier of a source, and every word of its short strings (files, choices, columns)."""
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
                is_bool = ast.unparse(item.annotation) == "bool"
                found |= {f"--{flag}", f"--no-{flag}"} if is_bool else {f"--{flag}"}
    return found | set(re.findall(r'add_argument\("(--[a-z-]+)"', source))


# ----------------------------------------------------------------------------------------------------- checks


def wrong_names(page, text):
    """Code spans of a page that name a flag, metric, function, value or file which does not exist."""
    own, wrong = OF_SCRIPT.get(page), []
    everywhere = set().union(*map(words, SOURCES))
    for span in code_spans(text):
        named = [name for name in SOURCES if name in span] or ([own] if own else SOURCES)
        named += SCRIPTS if re.search("compare.py|credit.py", span) else []  # which hand flags on to them
        unknown = set(re.findall(FLAG, span)) - set().union(*map(flags, named)) - FOREIGN_FLAGS
        call = re.fullmatch(r"([A-Za-z_][\w.]*)\(.*\)", span)
        dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", span)
        path = re.fullmatch(r"[\w./<>-]+\.(py|md|jsonl?|txt|png)|[\w<>-]+/([\w<>-]+/?)*", span)
        if unknown:
            wrong.append(f"{span}: no flag {', '.join(sorted(unknown))}")
        elif re.fullmatch(r"(rollout|segments|losses|buffer|chain|critic|eval|time)/[a-z]\w+", span):
            wrong += [] if span in ALL_METRICS else [f"{span}: no such metric"]
        elif call:
            known = any(call[1].split(".")[-1] in functions(name) for name in SOURCES)
            wrong += [] if known else [f"{span}: no such function"]
        elif (dotted or path) and not any((ROOT / folder / span).exists() for folder in (".", "docs")):
            parts = re.split(r"[./]", span) if dotted else span.strip("/").split("/")
            parts = {part for part in parts if part != "NAME" and "<" not in part}
            missing = ", ".join(sorted(parts - everywhere if span not in everywhere else ()))
            wrong += [f"{span}: nothing in the sources is called {missing}"] if missing else []
    return wrong


def wrong_details(page, text):
    """Numbered details out of order, without a name of the page's script or a line of the authors' code."""
    own, wrong = OF_SCRIPT[page], []
    parts = re.split(r"^(\d+)\. ", section(text, "Implementation details"), flags=re.MULTILINE)
    numbers, items = parts[1::2], parts[2::2]
    if not 8 <= len(items) <= 20 or numbers != [str(k) for k in range(1, len(items) + 1)]:
        wrong.append(f"details {', '.join(numbers)}")
    for item in (" ".join(item.split()) for item in items):
        spans = {name for span in code_spans(item) for name in [span, *re.findall(FLAG, span)]}
        title = item[:60]
        if not spans & {*functions(own), *flags(own), *functions("math_grader.py")}:
            wrong.append(f"{title}: no function, class or flag of {own}")
        if not re.search(rf"\[{LINES}\]|[Nn]ot in the original|No counterpart", item):
            wrong.append(f"{title}: no line of the authors' code")
        for name in spans:
            is_name = re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|[A-Z][a-z]+[A-Z]\w+", name)
            if is_name and name not in words(own) | functions("math_grader.py"):
                wrong.append(f"{title}: {own} has no {name}")
    return wrong


def wrong_links(page, text):
    """Links to files, headings and lines of the authors' code that lead nowhere."""
    prose, wrong = split_blocks(text)[0], []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name
        if target.startswith(("http://", "https://")):
            continue
        if not path.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path.read_text() if name else text):
            wrong.append(f"{target}: no such heading")
    definition = re.compile(r"^\[([^]]+)\]: (\S+)$", re.MULTILINE)
    definitions = dict(definition.findall(prose))
    used = set(re.findall(rf"\[({LINES})\]", definition.sub("", prose)))
    wrong += [f"{label}: no link" for label in sorted(used - definitions.keys())]
    wrong += [f"{label}: link not used" for label in sorted(definitions.keys() - used)]
    for label, url in definitions.items():
        file, numbers = label.split(":")
        lines = "-".join(f"L{number}" for number in numbers.split("-"))
        folder = re.escape(AUTHORS) + r"(?:src/treetune|configs)/(?:\w+/)*"
        if not re.fullmatch(rf"{folder}{re.escape(file)}#{lines}", url):
            wrong.append(f"{label}: {url} is another file or other lines")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_names_and_links(page):
    assert wrong_names(page, PAGES[page]) + wrong_links(page, PAGES[page]) == []


@pytest.mark.parametrize("page", OF_SCRIPT)
def test_numbered_details(page):
    assert wrong_details(page, PAGES[page]) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_explained_once(script):
    own = section(PAGES[f"docs/{script.removesuffix('.py')}.md"], "Logged metrics")
    shared = section(PAGES["docs/metrics.md"], "Shared metrics")
    assert sorted(first_cells(shared)) == sorted([*METRICS, *EVAL_METRICS])
    assert sorted(first_cells(own)) == sorted(OWN_METRICS[script].split()) and "(metrics.md" in own


def test_the_checks_can_fail():
    """What each check is there for, in a page with one mistake of every kind."""
    text = """# A page

`no_function(x)` `losses/nonsense` `--no-such-flag` `no_such_name` `docs/nowhere.md`
`spo_tree.py --mc-rollouts 3` `gae` `rollout/reward_mean`
[a](nowhere.md) [b](#no-heading) [c](#a-page) [chain.py:1-2] [tree.py:3]

## Implementation details

1. **Nothing named.** [tree.py:3]
3. **No lines.** `tree_values` and `group_advantages`

[tree.py:3]: https://github.com/AIFrameResearch/SPO/blob/b9fc6a2/src/treetune/tasks/tree.py#L4
[tree.py:5]: https://github.com/AIFrameResearch/SPO/blob/b9fc6a2/src/treetune/tasks/tree.py#L5
"""
    mistakes = "no_function(x) losses/nonsense --no-such-flag no_such_name docs/nowhere.md".split()
    mistakes += ["spo_tree.py --mc-rollouts 3"]
    assert [line.split(":")[0] for line in wrong_names("README.md", text)] == mistakes
    assert len(wrong_names("docs/spo_tree.md", "`--mc-rollouts`")) == 1
    details = "\n".join(wrong_details("docs/spo_tree.md", text))
    for part in ("details 1, 3", "named.** [tree.py:3]: no function", "No lines.** ", "no group_advantages"):
        assert part in details
    links = ["nowhere.md", "#no-heading", "chain.py:1-2", "tree.py:5", "tree.py:3"]
    assert [line.split(": ")[0] for line in wrong_links("README.md", text)] == links
    code = r"""
    pip install x && python grpo.py --prob-mask  # why
    for seed in 1; do python ppo.py --seed $seed; done
    python eval.py --samples 2      what it does
    torchrun --nproc-per-node 8 spo_tree.py \
        --preset math
    flags=(--model X
        --prompt-template "$(cat docs/two-examples.txt)"$'\n')
    python grpo.py --seed 2 "${flags[@]}"
"""
    found = ["grpo.py --prob-mask", "ppo.py --seed 1", "eval.py --samples 2", "spo_tree.py --preset math"]
    found.append("grpo.py --seed 2 --model X --prompt-template '{question}'")
    assert commands(code) == found


# --------------------------------------------------------------------------------------------------- commands

DOCSTRINGS = {name: commands(ast.get_docstring(ast.parse((ROOT / name).read_text()))) for name in SOURCES}
VARIANTS = {  # the table of flags of each page
    script: [f"{script} {cell}" for cell in first_cells(section(PAGES[page], "Overview")) if cell[:2] == "--"]
    for page, script in OF_SCRIPT.items()
}
DOCUMENTED = [command for page in PAGES.values() for command in commands(page)]
DOCUMENTED = {*DOCUMENTED, *sum(DOCSTRINGS.values(), []), *sum(VARIANTS.values(), [])}
NEEDS_MORE = re.compile(r"--preset|--protocol|gyr66|problems\.jsonl|3896|smollm2|SmolLM2")  # a GPU, the hub, a file
ON_A_CPU = sorted(
    command for command in DOCUMENTED
    if command.split()[0] in OF_SCRIPT.values() and not NEEDS_MORE.search(command)
)
SHORTER = {"--num-iterations": 1, "--num-questions": 2, "--eval-questions": 4, "--eval-samples": 1}


class Accepted(BaseException):
    """Raised in place of what follows the checks of the flags."""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """script -> a short run of it, made on demand."""
    made = {}

    def get(run_script, script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("runs") / "run"
            small = [word for pair in SHORTER.items() for word in pair]
            assert run_script(script, *small, "--run-dir", made[script])[0] == 0
        return made[script]

    return get


@pytest.fixture
def with_a_run(finished_run, run_script, tmp_path):
    """The words of a command, with a copy of a finished run of its script for runs/NAME."""

    def words_of(command):
        script, *rest = shlex.split(command.replace("runs/smollm2", "tiny/model"))
        if "runs/NAME" in command:
            run = finished_run(run_script, script if script in SCRIPTS else "spo_tree.py")
            shutil.copytree(run, tmp_path / "NAME")
        return [script, *(word.replace("runs/NAME", str(tmp_path / "NAME")) for word in rest)]

    return words_of


def test_commands_are_found():
    assert len(ON_A_CPU) >= 20 and all(DOCSTRINGS[script] for script in SCRIPTS)
    for script in SCRIPTS:  # the default, the real models and a resumed run
        for end in ("", " --preset gsm8k", " --preset math", " --resume runs/NAME"):
            assert script + end in DOCSTRINGS[script]
        assert VARIANTS[script]


def accepts(monkeypatch, script, words):
    """Runs a script until its flags are checked: where it reads a model, or a benchmark has parsed them."""
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


@pytest.mark.parametrize("command", sorted(DOCUMENTED - {*ON_A_CPU}))
def test_flags_of_commands_that_are_not_run(monkeypatch, with_a_run, capsys, command):
    script, *rest = with_a_run(command)
    assert accepts(monkeypatch, script, rest), capsys.readouterr().err


WRONG = ["grpo.py --no-such-flag", "spo_tree.py --branch-factors 1 1", "benchmark/gpu.py --shape round"]


@pytest.mark.parametrize("command", [*WRONG, "eval.py --top-p 2"])
def test_wrong_flags_are_not_accepted(monkeypatch, command):
    script, *rest = shlex.split(command)
    assert not accepts(monkeypatch, script, rest)


@pytest.mark.parametrize("command", ON_A_CPU)
def test_commands_for_a_cpu_run_as_written(run_script, with_a_run, tmp_path, command):
    """As they are documented, but for flags at the end that make them shorter and say where to write."""
    script, *rest = with_a_run(command)
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
        assert first_cells(section(PAGES["docs/eval.md"], "Columns")) == columns
    else:
        assert re.search(r"^accuracy 0\.\d+ -> 0\.\d+ ", output, re.MULTILINE)
