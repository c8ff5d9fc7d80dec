r"""Segment Policy Optimization: is the final answer of a response right? Verdicts for GSM8K and MATH.

    grade_gsm8k("9 * 2 = 18\n#### $18", "18") -> True            grade_math(r"So $\boxed{x+1}$.", "1+x") -> True
    grade_gsm8k("#### half of 18", "18") -> False                grade_math(r"So $\boxed{2x}$.", "2") -> False

True or False: no answer, an unreadable one and a slow one are False, never an exception. The answer is what follows
the last `####` or stands in the last \boxed{}, as a whole: nothing is picked out of it, and what has two readings is
False. docs/eval.md has the table of rules. Text before the last `</think>` is ignored, callers leave the prompt out.
strict=True is the reward in training, strict=False also guesses from prose.
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
from functools import lru_cache, reduce
from multiprocessing.connection import wait

MAX_ANSWER, TAIL = 400, 8000  # characters: of an answer or `####` line; of the end where boxes and phrases are sought
START_LIMIT_S, GRADE_LIMIT_S = 60, 3  # seconds of wall clock; starting the worker (import of sympy) is not grading
counts: Counter[str] = Counter()  # answers by what settled them, as in compare_math; rising "killed": costly answers

# 1,234.50 or 1 234 or - .5; [0-9], because \d and int() take Arabic digits as well. Then -\frac{3}{4} or \frac34
NUMERAL = r"[-+]?\ ?(?:(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
FRACTION = re.compile(r"^([-+]?)\\frac(?:\{(-?[0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))$")
SYMBOLS = str.maketrans({"°": r"^\circ ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "\u2212": "-"})
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (  # what prints alike or means the same, in this order
    (r"(?<!\\)\\(?:left|right|displaystyle|mathbf|boldsymbol|boxed|fbox)(?![A-Za-z])", ""),  # \left(, \mathbf{5}
    (r"\\!|\\?\$|[€£¥₹]|\\(?:text)?color\{\w*\}", ""),  # \$5, \color{red}{5}
    (r"((?<!\\)\\[,;:>()\[\] ]|~|\\text\{\s*\}|\s)+", " "),  # spaces and delimiters, but not the row break of \\(
    (r"\\(?:mbox|mathrm|text(?:rm|bf|it))(?= ?\{)", r"\\text"),  # \mathrm{cm}
    (r"\\[dtc]?frac ?([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"), (r"\\[dtc]frac", r"\\frac"),  # \frac 1 2, \dfrac
    (r"<=|≤|\\leq(?![a-z])", r"\\le "), (r">=|≥|\\geq(?![a-z])", r"\\ge "),  # x <= 5
    (r"√ ?([0-9]+|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}"), (r"√", r"\\sqrt"),  # √12, √{x}
    (r"^[ *_`=]+|(?:[ *_`]|(?<![.,\\])[.,;])+$", ""),  # **5**, =5, and 5. but not 1,2,... which is another list
    (r"^(?:\\text ?(?=\{ ?[-+.0-9(]))?\{([^{}]*)\}$", r"\1"), (r"\{,\}", ","),  # {5}, \text{5}, 1{,}234
    (r"(?<=[0-9]) ?(?:\\text ?\{)? ?[Aa]\.? ?[Mm]\.? ?\}?$", "am"),  # 9\text{ a.m.}
    (r"(?<=[0-9]) ?(?:\\text ?\{)? ?[Pp]\.? ?[Mm]\.? ?\}?$", "pm"),
    (r"^(-?)\(?([0-9][0-9A-Z]*)\)?_ ?\{?([0-9]+)\}?$", r"\1\2_{\3}"),  # 121_3, (121)_3
    (r"^([-+]?[0-9.]+)[eE]([-+]?[0-9]+)$", r"\1\\times 10^{\2}"),  # 1e3
    (r"(?<![\w.^)}])(?<![\w.^)}] )([0-9]+) ?(\\frac\{[0-9]+\}\{[0-9]+\}|(?<= )[0-9]+/[0-9]+(?![0-9]))", r"(\1+\2)"),
    # the mixed 1\frac12 and 1 1/2, but neither x^1\frac12 nor 21/2. In a list, 1 \text{ or } 2; 10,000\pi
    (r",? ?(?:\\text ?\{ ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?", ", "),
    (r"(?<=[0-9]),(?=(?:[0-9]{3},)*[0-9]{3} ?[A-Za-z\\^+-])", ""),
    (r" (?!(?<=\w )[\w.]|(?<=[0-9], )[0-9]{3}(?![0-9]))", ""),  # a space, but not those of 3 4, \pi r, and 32, 349
)]
REPEATING = re.compile(r"(?<![0-9,])([0-9]*)\.([0-9]*)\\(?:overline|bar)\{([0-9]+)\}")  # 0.1\overline{6}
# Words that change the number before them and so are no units: 3 million, 18 and a half, 5 or more
NO_UNIT = (r"(?<![A-Za-z])(?:[KMBkb]|[bm]n|(?i:(?:hundred|thousand|[a-z]*illion|dozen|lakh|crore|third|quarter)(?:s|ths?)?"
           r"|score|gross|half|halves|(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|factorial|plus|minus|negative"
           r"|times|divided|mod|base|point|not?|or|than))(?![A-Za-z])")
UNIT = re.compile(r"""(?x) (?:(?!^)\ ?(?: \\?%% | \^\{?\\circ\ ?\}? | \\degree | \\text\ ?\{(?![^{}]*%s)[^{}0-9]*\}(?:\^\{?[23]\}?)?
    | (?<=[0-9)}\ ]) (?:degrees?|[ckm]m|kg|ft|feet|inch(?:es)?|units?)))+$""" % NO_UNIT)  # 35\%%, 12\text{ cm}^2, 12 cm
NOISE = re.compile(r"<[^<>]*>|\\text(?![a-z])|\*\*|\\?%|\^\{?\\circ ?\}?")  # in a line of GSM8K: </s>, 18%, 18^\circ
LINE = re.compile(r"""(?x) (?: [^\d<>+*/^|\\-]* (?:[=:]|(?i:is|are|was|answer|total)(?![A-Za-z])) )? [\s{}(*_]*  # x =
    (%s) (?![0-9]|[.,][0-9]) (?:[^\w<>+*/=|^\\-]|_)*  # the number and a dot; a unit, as in 18 m^2, 18-ounce bags, 18kg
    (?: (?:-?[A-Za-z]{4,}|(?<=[\s{])(?:[A-Za-z]{3}|[mgshlL])|[ckm]m|[km]g|m[lL]|lb|oz|ft|in|hr)s?(?![A-Za-z])
        (?:[^0-9<>+*=|^\\]|(?<=[A-Za-z}])\^\{?[23]\}?)* )?""" % NUMERAL)
OPERATOR = re.compile(r"[\d)}\]]\s*!|[±∓√∛∜π¹¼-¾⁰-₉⅐-↉①-⓿]|" + NO_UNIT)  # 18!, √18, 18 million
IN_PROSE = re.compile(r"((?:[-+\u2212](?:[^\w.]|_){0,8})?)((?:(?<!\.)\.)?\d[\d,.²³¼½¾⅐-⅞]*)")  # - **$1,234.**
BARE_BOX = re.compile(r"\\boxed\s+([-+]?\$?[0-9][^\s{}$]*)")  # \boxed 2; then \boxed{2}, \\boxed{2}, -\boxed{2}, \{
BRACES = re.compile(r"([-\u2212]?)\\?\\(boxed|fbox)\s*\{|\\.|([{}])", re.DOTALL)
# An answer and below it the gold that Math-Verify must not see. First what costs too much: powers in exponents, huge
# numbers, deep nesting, sums. Then what it reads otherwise than people: 121_3, 10:30, 1,2,\ldots, 5 \approx 6, 5\quad 6,
# 5\text{6}, 9am; at last a set in place of a tuple, \{1,2\} and (1,2)
REFUSED = re.compile(r"""(?xm) \^[({][^)}]*\^ | \^(?:[0-9]+|[A-Za-z]|\\[A-Za-z]+)\^ | \*\* | \^[({]?[-+]?[0-9,]{5,} | [0-9]{300}
    | (?:[0-9]{4}|[)\]}!])! | (?:[({[][^][(){}]*){13} | (?:[])}][^][(){}]*){13} | \\(?:sum|prod|int|lim|[dt]?binom)(?![a-z])
    | [\x00-\x09\x0b-\x1f\x7f] | (?<!_)(?<!_[0-9])[0-9]\ \.?[0-9] | [0-9)]_ | \\frac[0-9]{3} | [:'"?@] | \.\. | [0-9][ap]m$
    | \\(?:approx|sim|simeq|cong|[pb]?mod|to|[a-z]*(?:dots|space|quad|phantom|skip)|[hv](?:rule|box|fill?))(?![a-z])
    | (?<!\\)\\[^A-Za-z{}\\|%] | \\text\ ?\{[^{}]*[0-9] | ^\\\{.*\n[(\[] | ^[(\[].*\n\\\{""")
# A name before an equals sign, in a list too, but not -x: x = 5, f(2) = 5, x_1 = 1, x_2 = 2
NAME = re.compile(r"(^|[,;])\+?(?!-)(?:[^0-9=,;<>()\[\]{}]|[({][^0-9(){}]*[)}]|(?<=[A-Za-z])_\{?[0-9]\}?|f\([0-9]+\))+=")


def normalize(text: str) -> str:
    r"""One spelling for what prints alike: `$\dfrac{x}{2} + 1,2.$` -> `\frac{x}{2}+1,2`, but `3 4` stays."""
    text = text.translate(SYMBOLS)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return REPEATING.sub(as_fraction, text)


def as_fraction(repeating: re.Match) -> str:
    r"""A repeating decimal: 0.1\overline{6} -> \frac{15}{90}, which is (16 - 1) / 90."""
    start, zeros, period = repeating[1] + repeating[2], "0" * len(repeating[2]), repeating[3]
    return r"\frac{%d}{%s}" % (int(start + period) - int(start or 0), "9" * len(period) + zeros)


def number(text: str) -> Fraction | None:
    r"""Exact value of a numeral or simple fraction: "1,234.50", "-.5", "3/4", "\frac34". None for "x", "1 2", "1/0"."""
    top, slash, bottom = FRACTION.sub(r"\1\2\3/\4\5", text.replace("\u2212", "-")).partition("/")
    if len(text) > 300 or not re.fullmatch(NUMERAL, top) or slash and not re.fullmatch("0*[1-9][0-9]*", bottom):
        return None  # the length, because int() refuses 4300 digits
    return Fraction(re.sub("[, ]", "", top)) / int(bottom or 1)


def last_box(text: str) -> str | None:
    r"""Content of the last closed box near the end: `\boxed{1}, no, \boxed{2}` -> `2`. Of `-\boxed{2}` it is empty."""
    text, boxes, open_braces = BARE_BOX.sub(r"\\boxed{\1}", text[-TAIL:]), {-1: None}, []
    for match in BRACES.finditer(text):
        if match[2] or match[3] == "{":
            open_braces.append(match)
        elif match[3] and open_braces:
            opened = open_braces.pop()
            if opened[2]:
                boxes[opened.start()] = "" if opened[1] else text[opened.end() : match.start()]
    return boxes[max(boxes)]


def find_number(text: str, index: int | None = None) -> Fraction | None:
    """The number that a line is: "x = $18 a day" -> 18, "half of 18" -> None. By index, one of those in any text."""
    if index is None:
        line = LINE.fullmatch(NOISE.sub(" ", normalize(text))) if len(text.strip()) <= MAX_ANSWER else None
        return number(line[1]) if line and not OPERATOR.search(text) else None
    found = IN_PROSE.findall(text.strip()[-TAIL:].replace("{,}", ",").replace(r"\!", ""))
    return number(found[index][0][:1] + found[index][1].rstrip(".,")) if found else None  # None for 12,34 or 1.2.3


def gsm8k_gold(answer: str) -> str | None:
    """The number text after `####`, "so 18\n#### 18" -> "18". None, no response can be right: to be checked at loading."""
    _, marker, gold = answer.rpartition("####")
    return gold.strip() if marker and find_number(gold) is not None else None


def gsm8k_value(response: str, strict: bool = True) -> Fraction | None:
    """Of the last line with `####`, else the last box: "#### 18 eggs" -> 18. Not strict: or after "answer is", or the last."""
    text = response.rpartition("</think>")[2]
    line, box = text.rpartition("####")[2].partition("\n")[0], last_box(text)
    if "####" in text and re.search(r"\d", line):  # a line without digits is a heading
        return find_number(line)
    if box is not None or strict:
        return find_number(box or "")
    _, phrase, clause = text[-TAIL:].rpartition("answer is")
    return find_number(clause.rpartition("=")[2], 0) if phrase else find_number(clause, -1)


def grade_gsm8k(response: str, gold: str, strict: bool = True) -> bool:
    """Whether `gsm8k_value` is the gold: "#### 1,234.00", "1234" -> True. (The original never matches golds with commas.)"""
    value = gsm8k_value(response, strict)
    return value is not None and value == find_number(gold)


def math_gold(answer: str) -> str | None:
    r"""The gold of MATH's `answer`, "\boxed{7}" -> "7". None, no response can be right: empty, "None", or no box holds it."""
    gold = last_box(answer) or last_box(r"\boxed{%s}" % answer) or ""
    return gold if normalize(gold) not in ("", "None") and len(gold) <= MAX_ANSWER else None


def grade_math(response: str, gold: str, strict: bool = True) -> bool:
    r"""Whether the last box is the gold: "\boxed{0.5}", "\frac12" -> True. Not strict: or "final answer is X. I hope"."""
    text = response.rpartition("</think>")[2][-TAIL:]
    candidate = last_box(text)
    if candidate is None and not strict:
        _, phrase, clause = text.rpartition("final answer is")
        candidate = phrase and clause.partition("I hope")[0].strip(" \n:.")
    route, verdict = compare_math(candidate or "", last_box(gold) or gold)
    counts[route] += 1
    return verdict


def compare_math(candidate: str, gold: str) -> tuple[str, bool]:
    """The cheapest test that settles it (or how Math-Verify failed) and the verdict: "0.5", "1/2" -> ("number", True)."""
    answer, target = normalize(candidate[: MAX_ANSWER + 1]), normalize(gold[: MAX_ANSWER + 1])
    if not answer or not target or max(len(candidate), len(gold)) > MAX_ANSWER:
        return "no_answer", False
    if answer == target:
        return "string", True
    answer, target = UNIT.sub("", answer), UNIT.sub("", target)
    value, exact = number(answer), number(target)
    if None not in (value, exact) and not ("," in answer and "," in target):  # those may be lists: 70,110 and 110,70
        places = len(answer.partition(".")[2]) if "." not in target and abs(value) > 0.01 else 0
        return "number", value == exact or places > 5 and value == round(exact, places)  # .333333 is 1/3
    # For Math-Verify each comma separates (2,+345 and not 2345), and a percent sign is nothing
    answer, target = (re.sub(r", ?(?=[0-9.])", ",+", text.replace(r"\%", "")) for text in (answer, target))
    lengths = {answer.count(","), target.count(",")} - {0}  # of two lists; a set of 1,1,2 would be one of 1,2
    if REFUSED.search(f"{answer}\n{target}") or len(lengths) > 1 and r"\pm" not in answer + target:
        return "guard", False
    if importlib.util.find_spec("math_verify") is None:
        if not counts["unavailable"]:
            print("math_grader: math-verify is not installed, some right answers count as wrong", file=sys.stderr)
        return "unavailable", False
    sides = [answer] if "=" in target else NAME.sub(r"\1", answer).split("=")  # x = 10/2 = 5, but not 6 = 5
    try:
        return "math_verify", all(math_verify(target, side) for side in sides)
    except OSError as error:
        return "killed" if isinstance(error, TimeoutError) else "died", False


# sympy can hold the interpreter lock for minutes, which no thread and no signal can interrupt. A process can be killed.
worker: subprocess.Popen | None = None
worker_lock = threading.Lock()  # one request at a time, whichever thread asks


@lru_cache(maxsize=100_000)
def math_verify(gold: str, candidate: str) -> bool:
    """The worker's verdict, "x+1", "1+x" -> True; gold first, it is not symmetric. OSErrors are not cached."""
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
    """A line of the worker, b"true\\n". TimeoutError after limit_s seconds; ConnectionError if the worker has died."""
    if not wait([worker.stdout], limit_s):
        raise TimeoutError
    if not (line := worker.stdout.readline()):
        raise ConnectionError
    return line


def run_worker() -> None:
    """A JSON line [gold, candidate] in, a line true or false out, until standard input closes: ["1/2", "0.5"] -> true."""
    import resource
    import time
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy as Reader
    from math_verify import LatexExtractionConfig, parse, verify

    # What stands side by side is multiplied, 2(3) = 6; Math-Verify adds numbers there, for the sake of 1\frac12
    Reader.convert_postfix_list = lambda self, factors: reduce(self.mul_flat, map(self.convert_postfix, factors))
    # LaTeX only, lest it take any number; and no units, of which it drops letters: 2t is not 2
    config = [LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True))]
    replies = sys.stdout
    sys.stdout = sys.stderr = open(os.devnull, "w")  # what a library prints is no verdict
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 10, -1))  # its end, should the parent be gone
        try:  # in boxes, as bare LaTeX is no answer; the whole box or nothing; limits not in integers make all wrong
            gold, candidate = (parse(r"\boxed{%s}" % x, config, "no_fallback", "first_match", 2) for x in json.loads(line))
            verdict = verify(gold, candidate, float_rounding=12, numeric_precision=30, timeout_seconds=2)
        except BaseException:  # Math-Verify's time-out is not an Exception
            verdict = False
        print("true" if verdict else "false", file=replies, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    run_worker()
