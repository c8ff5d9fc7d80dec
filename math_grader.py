r"""Segment Policy Optimization: is the final answer of a response right? Verdicts for GSM8K and MATH.

    grade_gsm8k("9 * 2 = 18\n#### $18", "18") -> True            grade_math(r"So $\boxed{x+1}$.", "1+x") -> True
    grade_gsm8k("#### half of 18", "18") -> False                grade_math(r"So $\boxed{2x}$.", "2") -> False

No answer, an unreadable and a slow one are False, never an exception. The last `####` line or the last \boxed{}
is the answer as a whole: no number is picked out of it, and what has two readings is False (rules: docs/eval.md).
Text before `</think>` is ignored, callers leave the prompt out. strict=True is the reward, strict=False also guesses.
"""
import importlib.util, json, os, re, subprocess, sys, threading
from collections import Counter
from fractions import Fraction
from functools import lru_cache, reduce
from multiprocessing.connection import wait

MAX_ANSWER, TAIL = 400, 8000  # characters: of an answer or `####` line; of the end where boxes and phrases are sought
START_LIMIT_S, GRADE_LIMIT_S = 60, 3  # seconds of wall clock; starting the worker (import of sympy) is not grading
counts: Counter[str] = Counter()  # answers by what settled them, as in compare_math; rising "killed": costly answers
# Numbers: 1,234.50 or 1 234 or - .5; -\frac{3}{4} or \frac34. (?a), because \d and int() take Arabic digits as well.
NUMERAL = r"[-+]?\ ?(?:(?:\d{1,3}(?:(?:,\d{3})+|(?:\ \d{3})+)|\d+)(?:\.\d*)?|\.\d+)"
FRACTION = re.compile(r"(?a)^([-+]?)\\frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))$")
SYMBOLS = str.maketrans({"°": r"^\circ ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "\u2212": "-"})
SPELLINGS = [(re.compile(pattern, re.ASCII), new) for pattern, new in (  # what prints alike or means the same, in this order
    (r"\\!|\\?\$|[€£¥₹]|\\(?:text)?color\{\w*\}", ""), (r"\{([,:])\}", r"\1"),  # \$5, \color{red}{5}, 1{,}234
    (r"(?<!\\)\\(?:left|right|displaystyle|mathbf|boldsymbol|boxed|fbox)(?![A-Za-z])", ""),  # \left(, \mathbf{5}
    (r"\\(?:mbox|mathrm|text(?:rm|bf|it))(?= ?\{)", r"\\text"), (r"<=|≤", r"\\le "), (r">=|≥", r"\\ge "),  # \mathrm{cm}, x≤5
    (r"((?<!\\)\\[,;:>()\[\] ]|[~\s\xa0\u2009\u202f]|\\text\{\s*\})+", " "),  # spaces, delimiters; not the row break of \\(
    (r"\\[dtc]?frac ?(\d) ?(\d)(?!\d)", r"\\frac{\1}{\2}"), (r"\\[dtc]frac", r"\\frac"),  # \frac 1 2, \dfrac
    (r"√ ?(\d+|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}"), (r"√", r"\\sqrt"), (r"(?<=\d)i(?![A-Za-z])", " i"),  # √12, √{x}, 2i
    (r"^[ *_`=]+|(?:[ *_`]|(?<![.,\\])[.,;])+$", ""),  # **5**, =5, and 5. but not 1,2,... which is another list
    (r"^(?:\\text ?(?=\{ ?[-+.\d(]))?\{([^{}]*)\}$", r"\1"), (r"^([-+]?[\d.]+)[eE]([-+]?\d+)$", r"\1\\times 10^{\2}"),  # {5}, 1e3
    (r"([AaPp])\.? ?[Mm]\.?(?= ?\}?$)", r"\1m"), (r"Am(?=\}?$)", "am"), (r"Pm(?=\}?$)", "pm"),  # 9\text{ A.M.}
    (r"^(-?)\(?(\d[\dA-Z]*)\)?_ ?\{?(\d+)\}?$", r"\1\2_{\3}"),  # 121_3, (121)_3
    (r",? ?(?:\\text ?\{ ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?", ", "),  # 1 \text{ or } 2
    (r"(?<![\w.^)}])(?<![\w.^)}] )(\d+) ?(\\frac\{\d+\}\{\d+\}|(?<= )\d+/\d+(?!\d))", r"(\1+\2)"),  # 1\frac12, 1 1/2
    (r"(?<![\d,(\[{])(\d{1,3}),(?:(\d{3}),)?(?=\d{3} ?[A-Za-z\\^+-])", r"\1\2"),  # 10,000\pi
    (r" (?!(?<=[\w.] )[\w.]|(?<=\d, )\d{3}(?!\d)|(?<=\d ),\d{3}(?!\d))", ""),  # a space, but not those of 3 4, \pi r and 32, 349
    (r"(?<![\d,])(\d*)\.(\d*)\\(?:overline|bar)\{(\d+)\}(?!\d)", lambda part: r"\frac{%d}{%d}" % (  # 0.1\overline{6}
        int("".join(part.groups())) - int(part[1] + part[2] or 0), 10 ** len(part[2] + part[3]) - 10 ** len(part[2]))))]
# Words that change the number before them and so are no units (3 million, 18 and a half, 9 a.m.); then what may end an answer
NO_UNIT = (r"(?<![A-Za-z])(?:[KMBkb]|[bm]n|(?i:(?:hundred|thousand|[a-z]*illion|dozen|lakh|crore|score|gross|third|quarter|four|fif"
           r"|six|seven|eigh|nin|ten)(?:s|ths?)?|half|halves|squared|cubed|factorial|plus|minus|negative|times|divided|mod|base|point"
           r"|mil|thou|grand|not?|or|less|than|[ap]m))(?![A-Za-z])")
UNIT = re.compile(r"""(?xa) (?: (?!^)\ ?(?: \\?%% | \^\{?\\circ\ ?\}? | \\degree  # 35\%%, 90^\circ; 12 cm, 12\text{ cm}^2
    | (?<=[\d)}\ ])(?:degrees?|[ckm]m|kg|ft|feet|inch(?:es)?|units?)
    | \\text\ ?\{(?![^{}]*%s|\ ?[a-fi-kn-rt-z]\})[^{}\d]*\}(?:\^\{?[23]\}?)? ))+$""" % NO_UNIT)
NOISE = re.compile(r"<[^<>]*>|\\text(?![a-z])|\*\*|\\?%|\^\{?\\circ ?\}?")  # in a line of GSM8K: </s>, 18%, 18^\circ
LINE = re.compile(r"""(?x) (?: [^\d<>+*/^|\\-]* (?:[=:]|(?<![A-Za-z])(?:(?i:is|are|was|answer|total)|USD|Rs\.)(?![A-Za-z])) )?
    [\s{}(*_]* ((?a:%s)) (?!\d|[.,]\d) (?:[^\w<>+*/=|^\\!-]|_)*  # x = 18. and then a unit: 18 m^2, 18-ounce bags, 18kg
    (?: (?:-?[A-Za-z]{4,}|(?<=[\s{])(?:[A-Za-z]{3}|a\ [a-z]{3,}|[mgshlL])|[ckm]m|[km]g|m[lL]|lb|oz|ft|in|hr|sq)s?
        (?![A-Za-z]) (?:[A-Za-z²³/]|[^\w<>+*=|^\\]|_|(?<=[A-Za-z}])\^\{?[23]\}?)* )?""" % NUMERAL)
BARE_BOX = re.compile(r"\\boxed\s+([-+]?\$?[0-9][^\s{}$]*)")  # \boxed 2; then \boxed{2}, \\boxed{2}, -\boxed{2}, \{
BRACES = re.compile(r"([-\u2212]?)\\?\\(boxed|fbox)\s*\{|\\.|([{}])", re.DOTALL)
# An answer and below it the gold, if Math-Verify must not see them: powers in exponents, huge numbers, deep nesting; then
# what it reads otherwise, 3 4, 121_3, 10:30, 1,2,\ldots, 5\quad 6, 5\text{6}; \{1,2\} for (1,2), x=6=5 for x=5
REFUSED = re.compile(r"""(?xma) \^[({][^)}]*\^ | \^(?:\d+|[A-Za-z]|\\[A-Za-z]+)\^ | \*\* | \^[({]?[-+]?[\d,]{5,} | \d{300}
    | (?:\d{4}|[)\]}!])! | (?:[({[][^][(){}]*){13} | (?:[])}][^][(){}]*){13} | \\(?:sum|prod|int|lim|[dt]?binom)(?![a-z])
    | (?<!_)(?<!_\d)\d\.?\ \.?\d | [\d)]_ | \\frac\d{3} | [:'"?@] | \.\. | \d[ap]m$ | [\x00-\x09\x0b-\x1f\x7f]
    | \\(?:approx|sim|simeq|cong|[pb]?mod|to|[a-z]*(?:dots|space|quad|phantom|skip)|[hv](?:rule|box|fill?))(?![a-z])
    | (?<!\\)\\[^A-Za-z{}\\|%] | \\text\ ?\{[^{}]*\d | ^\\\{.*\n[(\[] | ^[(\[].*\n\\\{ | ^[^=\n]*=[^=\n]*=.*\n[^=]*=[^=]*\Z""")
NAME = re.compile(r"(^|[,;])\+?(?!-)(?:[^0-9=,;<>()\[\]{}]|[({][^0-9(){}]*[)}]|(?<=[A-Za-z])_\{?\d\}?|f\(\d+\))+=")  # x=, f(2)=

@lru_cache(maxsize=10_000)
def normalize(text: str) -> str:
    r"""One spelling for what prints alike: `$\dfrac{x}{2} + 1,2.$` -> `\frac{x}{2}+1,2`, but `3 4` stays."""
    return reduce(lambda text, rule: rule[0].sub(rule[1], text), SPELLINGS, text.translate(SYMBOLS))

def number(text: str) -> Fraction | None:
    r"""Exact value of a numeral or fraction, "1,234.50", "-.5", "3/4", "\frac34" -> 3/4; "x", "1 2", "1/0" -> None."""
    top, slash, bottom = FRACTION.sub(r"\1\2\3/\4\5", text.replace("\u2212", "-")).partition("/")
    if len(text) > 300 or not re.fullmatch(NUMERAL, top, re.A) or slash and not re.fullmatch("0*[1-9][0-9]*", bottom):
        return None  # the length, because int() refuses 4300 digits
    return Fraction(re.sub("[, ]", "", top)) / int(bottom or 1)

def last_box(text: str) -> str | None:
    r"""Content of the last closed box near the end: `\boxed{1}, no, \boxed{2}` -> `2`; `-\boxed{2}` -> ``."""
    text, boxes, open_braces = BARE_BOX.sub(r"\\boxed{\1}", text[-TAIL:]), {-1: None}, []
    for brace in BRACES.finditer(text):
        if brace[2] or brace[3] == "{":
            open_braces.append(brace)
        elif brace[3] and open_braces and (opened := open_braces.pop())[2]:
            boxes[opened.start()] = "" if opened[1] else text[opened.end() : brace.start()]
    return boxes[max(boxes)]

def find_number(line: str) -> Fraction | None:
    """The number that a line is, a unit behind it: "x = $18 a day" -> 18; "half of 18" and "17 or 18" -> None."""
    match = LINE.fullmatch(NOISE.sub(" ", normalize(line.strip()[: MAX_ANSWER + 1])))
    return number(match[1]) if match and len(line.strip()) <= MAX_ANSWER and not re.search(NO_UNIT, line) else None

def gsm8k_gold(answer: str) -> str | None:
    """The number text after `####`, "so 18\n#### 18" -> "18". None: no response can be right."""
    _, marker, gold = answer.rpartition("####")
    return gold.strip() if marker and find_number(gold) is not None else None

def gsm8k_value(response: str, strict: bool = True) -> Fraction | None:
    """Of the last `####` line, else the last box: "#### 18 eggs" -> 18. Not strict: or of "the answer is 18"."""
    text = response.rpartition("</think>")[2]
    line = text.rpartition("####")[2].partition("\n")[0]
    answer = line if "####" in text and re.search(r"\d", line) else last_box(text)  # a line without digits is a heading
    if answer is not None or strict:
        return find_number(answer or "")
    _, phrase, clause = text[-TAIL:].rpartition("answer is")
    numbers = re.findall(r"-?\.?\d(?:[\d,.]*\d)?", clause.rpartition("=")[2] if phrase else clause)
    return number(numbers[0 if phrase else -1]) if numbers else None

def grade_gsm8k(response: str, gold: str, strict: bool = True) -> bool:
    """Whether `gsm8k_value` is the gold: "#### 1,234.00", "1234" -> True. (The original fails golds with commas.)"""
    return (value := gsm8k_value(response, strict)) is not None and value == find_number(gold)

def math_gold(answer: str) -> str | None:
    r"""The gold of MATH's `answer`, "\boxed{7}" -> "7". None: no response can be right (empty, "None", too long)."""
    gold = last_box(answer) or last_box(r"\boxed{%s}" % answer) or ""
    return gold if normalize(gold) not in ("", "None") and len(gold) <= MAX_ANSWER else None

def grade_math(response: str, gold: str, strict: bool = True) -> bool:
    r"""Whether the last box is the gold: "\boxed{.5}", "\frac12" -> True. Not strict: or "final answer is X. I hope"."""
    text = response.rpartition("</think>")[2][-TAIL:]
    candidate = last_box(text)
    if candidate is None and not strict and "final answer is" in text:
        candidate = text.rpartition("final answer is")[2].partition("I hope")[0].strip(" \n:.")
    route, verdict = compare_math(candidate or "", last_box(gold) or gold)
    counts[route] += 1
    return verdict

def compare_math(candidate: str, gold: str) -> tuple[str, bool]:
    """What settles it (or how Math-Verify failed) at the least cost, and the verdict: ".5", "1/2" -> "number", True."""
    answer, target = normalize(candidate[: MAX_ANSWER + 1]), normalize(gold[: MAX_ANSWER + 1])
    if not answer or not target or max(len(candidate), len(gold)) > MAX_ANSWER:
        return "no_answer", False
    if answer == target:
        return "string", True
    answer, target = UNIT.sub("", answer), UNIT.sub("", target)
    value, exact = number(answer), number(target)
    if None not in (value, exact) and (value == exact or "," not in answer or "," not in target):  # else lists?
        places = len(answer.partition(".")[2]) if "." not in target and abs(value) > 0.01 else 0
        return "number", value == exact or places > 5 and value == round(exact, places)  # .333333 is 1/3
    answer, target = (re.sub(r", ?(?=[0-9.])", ",+", text.replace(r"\%", "")) for text in (answer, target))  # not 2345
    lengths = {answer.count(","), target.count(",")} - {0}  # of two lists; a set of 1,1,2 would be one of 1,2
    if REFUSED.search(f"{answer}\n{target}") or len(lengths) > 1 and r"\pm" not in answer + target:
        return "guard", False
    if importlib.util.find_spec("math_verify") is None:
        counts["unavailable"] or print("math-verify is not installed: right answers are missed", file=sys.stderr)
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
            requests = [(json.dumps([gold, candidate]).encode() + b"\n", GRADE_LIMIT_S)]  # ASCII: surrogates are escaped
            if worker is None or worker.poll() is not None:
                worker = subprocess.Popen(
                    [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)  # Ctrl-C: trainer only
                requests.insert(0, (b"", START_LIMIT_S))  # it says when it is ready
            for request, limit_s in requests:
                worker.stdin.write(request)
                in_time = wait([worker.stdout], limit_s)
                if not in_time or not (reply := worker.stdout.readline()):
                    raise ConnectionError if in_time else TimeoutError
            return reply == b"true\n"
        except BaseException:  # whatever it was: kill and reap, lest a late reply answers the next request
            if worker:
                with worker:
                    worker.kill()
                worker = None
            raise

if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    # The worker. A JSON line [gold, candidate] in, a line true or false out, until standard input closes: ["1/2", "0.5"] -> true
    import resource
    import time
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, _Latex2Sympy
    from math_verify import LatexExtractionConfig, parse, verify
    # What stands side by side is multiplied, 2(3) = 6; Math-Verify adds numbers there, for the sake of 1\frac12
    _Latex2Sympy.convert_postfix_list = lambda self, factors: reduce(self.mul_flat, map(self.convert_postfix, factors))
    # LaTeX only, lest it take any number; and no units, of which it drops letters: 2t is not 2
    config = [LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True))]
    replies = sys.stdout
    sys.stdout = sys.stderr = open(os.devnull, "w")  # what a library prints is no verdict
    sys.platform == "linux" and resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 10, -1))  # its end, should the parent be gone
        try:  # in boxes, as bare LaTeX is no answer; the whole box or nothing; limits not in integers make all wrong
            gold, candidate = (parse(r"\boxed{%s}" % x, config, "no_fallback", "first_match", 2) for x in json.loads(line))
            verdict = verify(gold, candidate, float_rounding=12, numeric_precision=30, timeout_seconds=2)
        except BaseException:  # Math-Verify's time-out is not an Exception
            verdict = False
        print("true" if verdict else "false", file=replies, flush=True)
