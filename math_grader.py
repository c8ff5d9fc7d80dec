r"""Segment Policy Optimization: is the final answer of a response right? Verdicts for GSM8K and MATH.

True or False: no answer, an unreadable one and a slow one are False, never an exception. Numbers are exact (18 = 18.00, 2/4 = 1/2,
35 % = 35 and never 0.35); only two non-integers may differ, by 1e-6. Thousands commas (of answer and gold alike), currency, units,
percent, degrees and a final dot are ignored. The last answer counts. Several numbers after `####` are no answer, nor is one with an
operator: 8!, \sqrt{8}, minus 8. In MATH the list 1, 2 is one answer in any order; tuples and intervals are ordered. Text before the
last `</think>` is ignored, callers leave the prompt out. strict=True, the reward in training, reads only what follows `####` or
stands in the last \boxed{}; strict=False also guesses from prose.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import wait

MAX_ANSWER, TAIL = 400, 8000  # characters: of an answer or `####` line; of the end where boxes and phrases are sought
START_LIMIT_S, GRADE_LIMIT_S = 60, 3  # seconds of wall clock; starting the worker (import of sympy) is not grading
counts: Counter[str] = Counter()  # answers by what settled them, as in compare_math; rising "killed": they have become costly

# [0-9], because \d and int() take Arabic and full-width digits as well. \u2212 is the typographic minus.
NUMERAL = re.compile(r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
FRACTION = re.compile(r"^([-+]?)\\frac(?:\{(-?[0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))$")
SIGNS = r"-+\u2212\u2010-\u2015\u207b\ufe63\uff0d"  # also before brackets and emphasis; two of them, and dashes, `number` refuses
NUMBER_IN_TEXT = re.compile(r"((?:[%s](?:[^\w.]|_){0,8})?)((?:(?<!\.)\.)?\d[\d,.²³¼½¾⅐-⅞]*)" % SIGNS)
OPERATOR = re.compile(r"[\d)}\]]\s*!|\^(?!\{?\\circ)|\\(?:[dt]?frac|pm|mp|pi)|sqrt|[Mm]inus|[Nn]egative|[±∓√∛∜π¹²³¼-¾⁰-₉⅐-↉①-⓿]")
UNIT = re.compile(r"(?:\\?%|\^\{?\\circ\}?|\\(?:text|textrm|mbox|mathrm)\{[^{}]*\})+$")
SPACING = re.compile(r"(\\\\)|\\(?:left|right)(?![A-Za-z])|\\[!,;: ()\[\]]|\\?\$|[\s~]")  # group 1, a row break, stays
BARE_BOX = re.compile(r"\\boxed\s+([-+]?\$?[0-9][^\s{}$]*)")
BRACES = re.compile(r"\\?\\(boxed|fbox)\s*\{|\\.|([{}])", re.DOTALL)
COSTLY = re.compile(r"""(?x) \^[({][^)}]*\^ | \^(?:[0-9]+|[A-Za-z]|\\[A-Za-z]+)\^ | \*\*   # a power in an exponent
    | \^[({]?[-+]?[0-9,]{5,} | [0-9]{300} | (?:[0-9]{4}|[)\]}!])!                          # huge numbers
    | (?:[({[][^][(){}]*){13} | (?:[])}][^][(){}]*){13}                                    # deep nesting
    | \\(?:sum|prod|int|lim|[dt]?binom)(?![a-z]) | [\x00-\x1f\x7f]""")


def number(text: str) -> Fraction | None:
    r"""Exact value of a numeral or simple fraction, "1,234.50", "-.5", "3/4", "\frac34"; None for anything else."""
    top, slash, bottom = FRACTION.sub(r"\1\2\3/\4\5", text.replace("\u2212", "-")).partition("/")
    if len(text) > 300 or not NUMERAL.fullmatch(top) or slash and not re.fullmatch("0*[1-9][0-9]*", bottom):
        return None  # the length, because int() refuses 4300 digits
    return Fraction(top.replace(",", "")) / int(bottom or 1)


def same_number(a: Fraction | None, b: Fraction | None) -> bool:
    return None not in (a, b) and (a == b or min(a.denominator, b.denominator) > 1 and abs(a - b) <= Fraction(1, 10**6))


def last_box(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}`, `\fbox{...}` or `\boxed 2` near the end of the text."""
    text, boxes, open_braces = BARE_BOX.sub(r"\\boxed{\1}", text[-TAIL:]), [], []
    for match in BRACES.finditer(text):
        if match[1] or match[2] == "{":
            open_braces.append(match)
        elif match[2] and open_braces:
            opened = open_braces.pop()
            if opened[1]:
                boxes.append((opened.start(), text[opened.end() : match.start()]))
    return max(boxes)[1] if boxes else None


def find_number(text: str, index: int | None = None) -> Fraction | None:
    """The only number in a short text, whatever words stand around it; or, by index, one of several in any text."""
    found = NUMBER_IN_TEXT.findall(text.strip()[-TAIL:].replace("{,}", ",").replace(r"\!", ""))
    if not found or index is None and (len(found) > 1 or len(text.strip()) > MAX_ANSWER or OPERATOR.search(text)):
        return None
    sign, numeral = found[index or 0]
    return number(re.sub(f"[^{SIGNS}]", "", sign) + numeral.rstrip(".,"))  # None for an improper numeral: 12,34 or 1.2.3


def gsm8k_gold(answer: str) -> str | None:
    """The number text after `####` in GSM8K's `answer`. None, no response can be right: to be checked at loading."""
    _, marker, gold = answer.rpartition("####")
    return gold.strip() if marker and find_number(gold) is not None else None


def gsm8k_value(response: str, strict: bool = True) -> Fraction | None:
    """Number after the last `####`, else in the last box. strict=False: else after the last "answer is" (and "="), else the last."""
    text = response.rpartition("</think>")[2]
    line, box = text.rpartition("####")[2].partition("\n")[0], last_box(text)
    if "####" in text and re.search(r"\d", line):  # a line without digits is a heading
        return find_number(line)
    if box is not None or strict:
        return find_number(box or "")
    _, phrase, clause = text[-TAIL:].rpartition("answer is")
    return find_number(clause.rpartition("=")[2], 0) if phrase else find_number(clause, -1)


def grade_gsm8k(response: str, gold: str, strict: bool = True) -> bool:
    """Whether `gsm8k_value` is the gold (a number text). (The original never matches the 93 golds with commas.)"""
    return same_number(gsm8k_value(response, strict), find_number(gold))


def normalize(text: str) -> str:
    r"""One spelling for what prints alike: no spaces, dollar signs, math delimiters or final dot, one kind of \frac."""
    return re.sub(r"\\[dt]frac", r"\\frac", SPACING.sub(r"\1", text)).replace("{,}", ",").rstrip(".")


def math_gold(answer: str) -> str | None:
    """The gold of MATH's `answer`. None, no response can be right: it is empty, "None", or does not fit into a box."""
    gold = last_box(answer) or last_box(r"\boxed{%s}" % answer) or ""
    return gold if normalize(gold) not in ("", "None") and len(gold) <= MAX_ANSWER else None


def grade_math(response: str, gold: str, strict: bool = True) -> bool:
    r"""Compare the last `\boxed{}` with the gold. strict=False: without a box, the X of "final answer is X. I hope"."""
    text = response.rpartition("</think>")[2][-TAIL:]
    candidate = last_box(text)
    if candidate is None and not strict:
        _, phrase, clause = text.rpartition("final answer is")
        candidate = phrase and clause.partition("I hope")[0].strip(" \n:.")
    route, verdict = compare_math(candidate or "", last_box(gold) or gold)
    counts[route] += 1
    return verdict


def compare_math(candidate: str, gold: str) -> tuple[str, bool]:
    """The cheapest test that settles it (or how Math-Verify failed), and the verdict."""
    answer, target = normalize(candidate), normalize(gold)
    if not answer or not target or max(len(candidate), len(gold)) > MAX_ANSWER:
        return "no_answer", False
    if answer == target:
        return "string", True
    value, target_value = number(UNIT.sub("", answer)), number(UNIT.sub("", target))
    if None not in (value, target_value):
        return "number", same_number(value, target_value)
    if COSTLY.search(answer) or COSTLY.search(target):
        return "guard", False
    if importlib.util.find_spec("math_verify") is None:
        if not counts["unavailable"]:
            print("math_grader: math-verify is not installed, some right answers count as wrong", file=sys.stderr)
        return "unavailable", False
    try:
        return "math_verify", math_verify(" ".join(gold.split()), " ".join(candidate.split()))
    except OSError as error:
        return "killed" if isinstance(error, TimeoutError) else "died", False


# sympy can hold the interpreter lock for minutes, which no thread and no signal can interrupt. A process can be killed.
worker: subprocess.Popen | None = None
worker_lock = threading.Lock()  # one request at a time, whichever thread asks


@lru_cache(maxsize=100_000)
def math_verify(gold: str, candidate: str) -> bool:
    """Ask the worker about two LaTeX answers, gold first: it is not symmetric. OSErrors are not cached."""
    global worker
    with worker_lock:
        try:
            if worker is None or worker.poll() is not None:
                worker = subprocess.Popen(
                    [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)  # Ctrl-C: trainer only
                read_line(START_LIMIT_S)
            worker.stdin.write(json.dumps([gold, candidate]).encode() + b"\n")  # ASCII: lone surrogates are escaped
            return read_line(GRADE_LIMIT_S) == b"true\n"
        except BaseException:  # whatever it was: kill and reap, lest a late reply answers the next request
            if worker:
                with worker:
                    worker.kill()
                worker = None
            raise


def read_line(limit_s: float) -> bytes:
    """A line of the worker. TimeoutError after limit_s seconds; ConnectionError if the worker has died."""
    if not wait([worker.stdout], limit_s):
        raise TimeoutError
    if not (line := worker.stdout.readline()):
        raise ConnectionError
    return line


def run_worker() -> None:
    """The worker: a JSON line [gold, candidate] in, a line true or false out, until standard input closes."""
    import resource
    import time
    from math_verify import LatexExtractionConfig, parse, verify
    replies = sys.stdout
    sys.stdout = sys.stderr = open(os.devnull, "w")  # what a library prints is no verdict
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 10, -1))  # its end, should the parent be gone
        try:  # in boxes, as bare LaTeX is no answer; LaTeX only, lest it take any number; limits not in integers make all wrong
            gold, candidate = (parse(r"\boxed{%s}" % x, [LatexExtractionConfig()], parsing_timeout=2) for x in json.loads(line))
            verdict = verify(gold, candidate, timeout_seconds=2)
        except BaseException:  # Math-Verify's time-out is not an Exception
            verdict = False
        print("true" if verdict else "false", file=replies, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    run_worker()
