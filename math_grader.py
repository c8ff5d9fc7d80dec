r"""Segment Policy Optimization: is the final answer of a response right? Verdicts for GSM8K and MATH.

    grade_gsm8k("9 * 2 = 18\n#### $18", "18") -> True      grade_math(r"So $\boxed{x+1}$.", "1+x") -> True
    grade_gsm8k("#### half of 18", "18") -> False          grade_math(r"So $\boxed{2x}$.", "2") -> False
The last `####` line or \boxed{} after `</think>` is read as a whole (docs/eval.md). What is not there, takes
long or has two readings is False; nothing raises.
"""
import json
import os
import re
import sys
import threading
from fractions import Fraction
from functools import lru_cache, reduce
from multiprocessing.connection import wait
from subprocess import PIPE, Popen

MAX_ANSWER, TAIL = 400, 8000  # characters: of an answer or `####` line; of the end that is searched for boxes
START_LIMIT_S, GRADE_LIMIT_S = 60, 3  # seconds of wall clock; the start (import of sympy) is no grading
worker: Popen | None = None  # can be killed; sympy may hold the interpreter lock for minutes, deaf to signals
worker_lock = threading.Lock()  # one request at a time, whichever thread asks

SAME = [(re.compile(old, re.ASCII), new) for old, new in (  # in this order; ASCII, as \d takes Arabic digits
    (r"\\!|\{,\}(?=\d{3})|\\(text)?color\{\w*\}|(?<=\\)[dtc](?=frac)", ""),  # \!, 1{,}234, \color{x}, \dfrac
    (r"\\?[$%]|[€£¥₹°]|\^ ?\{? ?\\circ ?\}?|\\degree", " "),  # \$5, 35\%, 90^\circ
    (r"\u2212", "-"),  # the typographic minus
    (r"√ ?(\d+|[A-Za-z]|\{[^{}]*\}|\([^()]*\))", r"\\sqrt{\1}"),  # √12, √(x+1)
    (r"(?<!\\)\\(left|right|displaystyle|boxed|fbox)(?![A-Za-z])", ""),  # \left(; not \\left, a new row
    (r"\\(mathrm|mathbf|boldsymbol|mbox|text(rm|bf|it))(?=\{)", r"\\text"),  # \mathrm{cm}
    (r"((?<!\\)\\[,;:>()\[\] ]|[~\s\xa0\u2009\u202f])+", " "),  # 3\,4, \(x\)
    (r"\\frac ?(\d) ?(\d)(?!\d)", r"\\frac{\1}{\2}"),  # \frac 1 2
    (r"^[ *_`=]+|([ *_`]|(?<![.,])[.,;])+$", ""),  # **5**, =5, 5. but not 1,2,... which is another list
    (r"^\\text\{(?![A-Za-z ]+\})([^{}]*)\}$|^\{([^{}]*)\}$", r"\1\2"),  # \text{(C)}, {5}
    (r"^([-+]?[\d.]+)[eE]([-+]?\d+)$", r"\1\\times10^{\2}"),  # 1e3
    (r",? ?(\\text\{ ?(and|or) ?\}|\b(and|or)\b) ?", ", "),  # 1 \text{ or } 2
    (r"(?<![\w.,]) | (?![\w.]|,\d{3}(?!\d))|(?<=,) (?!\d{3}(?!\d))", ""),  # 2 + x; 1, 2; not 3 4; 32, 349
    (r"(?<=\d)i(?![A-Za-z])", " i"),  # 2i, which Math-Verify would take for a letter
    (r"_(\w)", r"_{\1}"),  # 121_3, \log_2 8
    (r"(?<![^-+=(,])(\d+)( (\d+)/(\d+)| ?\\frac\{(\d+)\}\{(\d+)\})", r"(\1+\\frac{\3\5}{\4\6})"),  # 1 1/2
)]
NUMERAL = r"[-+]? ?(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"  # 1,234.50, 1 234, - .5
FRACTION = re.compile(r"(?a)^([-+]?)\\frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))$")  # -\frac{3}{4}
VALUE = re.compile(rf"(?a)({NUMERAL})(?:/(0*[1-9]\d*))?")  # 3/4
REPEATING = re.compile(r"(?a)([-+]?\d+)\.(\d*)\\(?:overline|bar)\{(\d+)\}")  # 0.1\overline{6}
NAME = re.compile(r"(^|,) ?[A-Za-z+]+(_\{\w\}|\(\w\))?=")  # x=5, f(2)=5, x=1,x=2
SCALE = (r"(?<![A-Za-z])([KkMBb]|[bm]n|(?i:(ten|hundred|thousand|[a-z]*illion)(th)?|third|quarter|half|halves"
    r"|(four|fif|six|seven|eigh|nin)th|dozen|score|gross|lakh|crore|squared|cubed|factorial|plus|minus|times"
    r"|divided|base|point|not|or|less|than|[ap]\.?m)s?)(?![A-Za-z])")  # no units: 3 million, a half, 9 a.m.
UNIT = re.compile(rf"(?<=.)\\text\{{(?!.*{SCALE})([^{{}}\d]{{2,}}|[ghlLms])\}}(\^\{{?[23]\}}?)?$"
    r"|(?<=[\d}]) ?(cm|km|kg|ft|feet|inch(es)?|units?|degrees?)$")  # of MATH: 12\text{ cm}^2; not 2\text{x}
LINE = re.compile(r"([A-Za-z {}]*([=:]|\bis\b))?[ {}(*_]*"  # of GSM8K: The answer is; x =
    rf"(?P<number>(?a:{NUMERAL}))(?!\d|[.,]\d|[A-Za-z]([A-Za-z]{{2}})?\b)"  # 18; not 18x
    r"(<[^<>]*>|[^\w<>+*/=|^\\!-]|_|\*\*|\\text|-(?=[a-z]{4})|[A-Za-z]{3,}"  # </s>, dollars, -ounce bags
    r"|\b(a|of|to|sq|in)\b|([ckm]?m|k?g|m?[lL]|s|h|hr|lb|oz|ft)(?![A-Za-z])"  # kg a day
    r"|(?<=[a-z}])(\^\{?[23]\}?|[²³!]|/(?=[a-z])))*")  # m^2, km/h
COMMANDS = ("text|frac|sqrt|pi|cdot|times|div|pm|mp|le|leq|ge|geq|lt|gt|ne|neq|in|cup|cap|setminus|infty"
    "|mathbb|begin|end|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|theta|alpha")  # read as meant
TRAPS = [re.compile(pattern, re.ASCII | re.MULTILINE) for pattern in (  # misread "gold\nanswer"
    r"\^[({][^)}]*\^|\^\\?\w+\^|\*\*|\^[({]?[-+]?[\d,]{5}",  # costly powers: 9^{9^9}, 9^9^9, 9**9, 2^{10000}
    r"\d{300}|(\d{4}|[)\]}!])!|([({[][^][(){}]*){13}|([])}][^][(){}]*){13}",  # 1000!, (9!)!; deep nesting
    rf"\\(?!({COMMANDS})(?![A-Za-z]))[A-Za-z]{{2}}|(?<!\\)\\(?![{{}}\\|]|[A-Za-z]{{2}})",  # \mapsto 5; \& 5
    r"[^]\w\s\\{}()[|+*/^=<>,.!&-]|.\\text|\\text(?!\{[A-Za-z ]*\}$)",  # 10:30, x', 5 @ x; 5\text{6}
    r"\d\.? \.?\d|\.\.|[\d)]_|\\frac\d{3}|\d ?\\frac\W?\d",  # 3 4; 1,2,...; 121_{3}; \frac123; x3\frac12
    r"=.*=|\A[^=]*\n.*=|^\\\{.*\n[(\[]|^[(\[].*\n\\\{",  # x=6=5; 2x=5 for 5; the set \{1,2\} for (1,2)
)]


@lru_cache(maxsize=10_000)
def normalize(text: str) -> str:
    r"""One spelling for what prints alike: `$\dfrac{x}{2} + 1.$` -> `\frac{x}{2}+1`; `` if it is too long."""
    return reduce(lambda s, rule: rule[0].sub(rule[1], s), SAME, text if len(text) <= MAX_ANSWER else "")


def number(text: str) -> Fraction | None:
    r"""Exact value: "1,234.50", "-.5", "\frac34", "0.1\overline{6}" -> 1/6; "x", "1 2", "1/0" -> None."""
    text = FRACTION.sub(r"\1\2\3/\4\5", text) if len(text) <= 300 else ""  # int() refuses 4300 digits
    if match := REPEATING.fullmatch(text):
        once, again = match[1] + match[2], match[3]
        return Fraction(int(once + again) - int(once), int("9" * len(again) + "0" * len(match[2])))
    match = VALUE.fullmatch(text)
    return Fraction(re.sub("[, ]", "", match[1])) / int(match[2] or 1) if match else None


def last_box(text: str) -> str | None:
    r"""Content of the last box after </think>: `\boxed{1}, no, \boxed 2` -> `2`; `-\boxed{2}` -> ``."""
    text = text.rpartition("</think>")[2][-TAIL:]
    text = re.sub(r"\\boxed\s+([-+]?\$?[0-9][^\s{}$]*)", r"\\boxed{\1}", text)
    boxes, open_braces = {-1: None}, []
    for brace in re.finditer(r"(?s)([-\u2212]?)\\?\\(boxed|fbox)\s*\{|\\.|([{}])", text):
        if brace[2] or brace[3] == "{":
            open_braces.append(brace)
        elif brace[3] and open_braces and (opened := open_braces.pop())[2]:
            boxes[opened.start()] = "" if opened[1] else text[opened.end() : brace.start()]
    return boxes[max(boxes)]


def find_number(line: str) -> Fraction | None:
    """The number that a line is, and a unit: "x = $18 a day" -> 18; "half of 18", "17 or 18" -> None."""
    match = LINE.fullmatch(normalize(line.strip()[: MAX_ANSWER + 1]))
    return number(match["number"]) if match and not re.search(SCALE, line) else None


def gsm8k_gold(answer: str) -> str | None:
    r"""The number text after `####`, "so 18\n#### 18" -> "18". None: no response can be right."""
    _, marker, gold = answer.rpartition("####")
    return gold.strip() if marker and find_number(gold) is not None else None


def gsm8k_value(response: str) -> Fraction | None:
    """Of the last `####` line, else of the last box: "#### 18 eggs" -> 18; "the answer is 18" -> None."""
    text = response.rpartition("</think>")[2]
    line = text.rpartition("####")[2].partition("\n")[0]
    answer = line if "####" in text and re.search(r"\d", line) else last_box(text)  # no digits: a heading
    return find_number(answer or "")


def grade_gsm8k(response: str, gold: str) -> bool:
    """Whether `gsm8k_value` is the gold: "#### 1,234.00", "1234" -> True."""
    value = gsm8k_value(response)
    return value is not None and value == find_number(gold)


def math_gold(answer: str) -> str | None:
    r"""The gold of MATH's `answer`, "\boxed{7}" -> "7". None: no response can be right."""
    gold = last_box(answer) or last_box(r"\boxed{%s}" % answer) or ""
    return gold if normalize(gold) not in ("", "None") else None


def grade_math(response: str, gold: str) -> bool:
    r"""Whether the last box is the gold: "\boxed{.5}", "\frac12" -> True."""
    return compare_math(last_box(response) or "", last_box(gold) or gold)[1]


def compare_math(candidate: str, gold: str) -> tuple[str, bool]:
    """What settles it (or how Math-Verify failed) and the verdict: ".5", "1/2" -> "number", True."""
    answer, target = normalize(candidate), normalize(gold)
    if answer == target or not answer or not target:
        return "string", answer == target != ""
    answer, target = UNIT.sub("", answer), UNIT.sub("", target)
    value, exact = number(answer), number(target)
    are_lists = "," in answer and "," in target and value != exact  # 100,200 and 200,100
    if value is not None and exact is not None and not are_lists:
        places = len(answer.partition(".")[2]) if "." not in target and abs(exact) > 0.01 else 0
        return "number", value == exact or places > 5 and value == round(exact, places)  # .333333 is 1/3
    answer = answer if "=" in target else NAME.sub(r"\1", answer)
    both = f"{target}\n{answer}"
    # 1,1,2 would be the set of 1,2, and 3,3 that of 3; but [0,1) may stand for 0 \le x < 1
    repeated = "," in answer and answer[0] not in "[(" and answer.count(",") != target.count(",")
    if repeated or any(trap.search(both) for trap in TRAPS):
        return "guard", False
    both = re.sub(r", ?(?=[\d.])", ",+", both)  # a sign, lest 2,345 in a list be read as one number
    try:
        return "math_verify", math_verify(*both.split("\n"))
    except (OSError, KeyError) as error:
        return "killed" if isinstance(error, TimeoutError) else "died", False


@lru_cache(maxsize=100_000)
def math_verify(gold: str, candidate: str) -> bool:
    """The worker's verdict, "x+1", "1+x" -> True. The order matters. Errors are not cached."""
    global worker
    with worker_lock:
        if worker is None or worker.poll() is not None:
            worker = Popen([sys.executable, __file__, "--worker"], bufsize=0, stdin=PIPE, stdout=PIPE,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)  # away from Ctrl-C
            wait([worker.stdout], START_LIMIT_S) and worker.stdout.readline()  # it says when it is ready
        try:
            worker.stdin.write(f"{json.dumps([gold, candidate])}\n".encode())
            if not wait([worker.stdout], GRADE_LIMIT_S):
                raise TimeoutError
            return {b"true\n": True, b"false\n": False}[worker.stdout.readline()]
        except BaseException:  # whatever it was: kill and reap, lest a late reply answers the next request
            with worker:
                worker.kill()
            worker = None
            raise


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    # A JSON line [gold, candidate] in, a line true or false out, until input ends: ["1/2", "0.5"] -> true
    import resource
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, _Latex2Sympy
    from math_verify import LatexExtractionConfig, parse, verify
    # What stands side by side is multiplied, 2(3) = 6; Math-Verify adds, for the sake of 1\frac12
    _Latex2Sympy.convert_postfix_list = lambda x, parts: reduce(x.mul_flat, map(x.convert_postfix, parts))
    # LaTeX only, lest it take any number; and no units, of which it drops letters: 2t is not 2
    rules = NormalizationConfig(malformed_operators=True, nits=True)
    options = [LatexExtractionConfig(normalization_config=rules)], "no_fallback", "first_match", 2  # seconds
    sys.stdout = sys.stderr = open(os.devnull, "w")  # what a library prints is no verdict
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    print("ready", file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(sum(os.times()[:2])) + 10, -1))  # if the parent is gone
        try:  # in boxes, as bare LaTeX is no answer; the whole box or nothing; limits must be integers
            both = [parse(r"\boxed{%s}" % latex, *options) for latex in json.loads(line)]
            verdict = verify(*both, float_rounding=12, numeric_precision=30, timeout_seconds=2)
        except BaseException:  # Math-Verify's time-out is not an Exception
            verdict = False
        print("true" if verdict else "false", file=sys.__stdout__, flush=True)
