"""README and docs/: links resolve, documented commands parse, and the metrics are those of runs."""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import sys

import pytest
import transformers

from conftest import ROOT, SCRIPTS, SMALL
from test_run import metrics

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
SOURCES = [*SCRIPTS, "eval.py", "math_grader.py", "tiny/make.py"]
SOURCES += [f"benchmark/{path.name}" for path in sorted((ROOT / "benchmark").glob("*.py"))]
LINES = r"\w+\.(?:py|jsonnet):\d+(?:-\d+)?"  # of the authors' code
sys.path.insert(0, str(ROOT / "benchmark"))


def split_code(text):
    """(prose, code): lines that are indented by four after an empty line, or after such a line, are code."""
    code = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n)+")
    return code.sub("\n", text), "".join(code.findall(text)).replace("\n    ", "\n")


def commands(text):
    """Every `python X.py ...` and `torchrun ... X.py ...` of a page, as one string from X.py on."""
    prose, code = split_code(text)
    code = re.sub(r"\s*\\\n\s*", " ", code)
    for name, words in re.findall(r"(?ms)^ *(\w+)=\((.*?)\)$", code):  # arrays of the shell
        code = code.replace(f'"${{{name}[@]}}"', " ".join(words.split()))
    lines = re.sub(r"\"\$\(cat \S+\)\"(\$'\\n')?", "'{question}'", code).splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"`((?:python|torchrun)\s[^`]+)`", prose)]
    found = []
    for line in lines:
        for part in re.split(r"&&|;|\bdo\b", re.sub(r"\s#.*|(?<=\S)\s{2,}\S.*", "", line)):
            match = re.match(r"\s*(?:python3? |torchrun (?:--?[\w-]+ \d+ )*)([\w/]+\.py(?:\s.*)?)$", part)
            if match and match[1].split()[0] in SOURCES:
                found.append(shlex.join(shlex.split(match[1].replace("$seed", "1"))))
    return found


TEXTS = [*PAGES.values(), *(ast.get_docstring(ast.parse((ROOT / name).read_text())) for name in SOURCES)]
DOCUMENTED = sorted({command for text in TEXTS for command in commands(f"{text}\n")})


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    prose, _ = split_code(PAGES[page])
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", split_code(path.read_text())[0], re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, target
    links = dict(re.findall(rf"^\[({LINES})\]: \S+/(\S+)$", prose, re.MULTILINE))
    assert set(re.findall(rf"\[({LINES})\](?!:)", prose)) == links.keys()
    for label, url in links.items():
        assert label == re.sub(r"#L(\d+)(?:-L(\d+))?", r":\1-\2", url).rstrip("-")


class Accepted(BaseException):
    """Raised in place of what follows the checks of the flags."""


@pytest.mark.parametrize("command", [*DOCUMENTED, "grpo.py --no-such-flag", "grpo.py --top-p 2"])
def test_commands_parse(monkeypatch, tmp_path, command):
    script, *flags = shlex.split(command)
    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments, **options):
        if isinstance(arguments[0], argparse.ArgumentParser):
            parse(*arguments, **options)
        raise Accepted

    owner = importlib.import_module(script.removesuffix(".py") if script in SCRIPTS else "spo_tree")
    (tmp_path / "runs/NAME").mkdir(parents=True)
    (tmp_path / "runs/NAME/args.json").write_text(json.dumps({"args": vars(owner.PRESETS["tiny"])}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", stop)
    if script not in [*SCRIPTS, "eval.py"]:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(Accepted if command in DOCUMENTED else SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_results_follow_from_the_evaluations(run_script):
    (command,) = (shlex.split(line) for line in DOCUMENTED if line.startswith("benchmark/summary.py"))
    status, table, _ = run_script(*command)
    assert status == 0 and table in PAGES["README.md"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_tables_have_every_metric_of_a_run(script, run_script, tmp_path):
    flags = [*SMALL[script], "--num-questions", 2, "--num-iterations", 1, "--run-dir", tmp_path / "run"]
    flags += ["--critic-warmup-iterations", 0] if script == "ppo.py" else []
    assert run_script(script, *flags)[0] == 0
    written, explained = metrics(tmp_path / "run")[1], []
    for page, title in (("metrics", "Shared metrics"), (script.removesuffix(".py"), "Logged metrics")):
        section = PAGES[f"docs/{page}.md"].split(f"## {title}\n")[1].split("\n## ")[0]
        explained += re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    other = "segments/" if script in ("grpo.py", "ppo.py") else "answers/"
    assert sorted(written) == sorted(name for name in explained if not name.startswith(other))
