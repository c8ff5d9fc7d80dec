"""Answers that attack the grader, by the hundred thousand: no wrong one is right, none raises, none takes long or much memory.

Wrong answers are unequal to the gold by construction: a number is chosen first, then spelled in a random way, inside random text
that may hold the gold elsewhere. `python -m pytest -s tests/test_attack.py` prints the numbers of answers, the worst times and the
memory.
"""

import importlib.util
import os
import random
import resource
import sys
import time
from pathlib import Path

import pytest

import math_grader
from math_grader import grade_gsm8k, grade_math

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
TEMPLATE_TOKENS = ["</s>", "<s>", "<pad>", "<|im_end|>", "<|endoftext|>", "[/INST]", "<｜User｜>", "<｜end▁of▁sentence｜>", "<think>",
                   "\n\nProblem:"]
WORDS = ["so", "eggs", "the answer is", "dollars", "Step", "→", "a=b", "**", "therefore", "per day", "\U0001f600", "é", "答案",
         "\ufffd", "~", ":"]
INVISIBLE = ["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u202e", "\u00a0", "\u2009"]
OTHER_DIGITS = ["0٠०０𝟎", "1١१１𝟏①¹", "2٢२２𝟐②²", "3٣३３𝟑③³", "4٤४４𝟒④⁴", "5٥५５𝟓⑤⁵", "6٦६６𝟔⑥⁶", "7٧७７𝟕⑦⁷", "8٨८８𝟖⑧⁸", "9٩९９𝟗⑨⁹"]
PIECES = [  # what costs a parser time or memory, what ends or begins an answer, what looks like a digit; none holds a 7
    "9^{9^{9}}", "9^9^9", "2^{1000000000}", "10^{-10^{10}}", "1000000!", "((9!)!)!", "\\binom{1000000000}{500000000}",
    "\\sum_{k=1}^{100000}k",
    "(x+y+z)^{200}", "\\int_0^1", "\\frac{", "\\frac{1}{", "\\sqrt[1000000]{2}", "\\sqrt{", "\\left(", "\\right)",
    "\\begin{pmatrix}", "\\\\", "&",
    "((((((((((((((", "))))))))))))))", "{{{{{{{{{{{{", "}}}}}}}}}}}}", "[[[[[[", "\\{", "\\}", "{", "}", "(", ")", "1e999999999",
    "0/0", "1/0", "0x1F",
    "####", "#### ", "\n#### ", "# # # #", "\\boxed{", "\\boxed ", "\\fbox{", "\\boxed{1}", "answer is ", "final answer is ",
    "I hope", "</think>",
    "1", "2", "3,", "1,000", "1.5", "-", "+", "*", "/", "=", "%", "\\%", "$", "\\$", ".", ",", "{,}", "\\!", "^", "_", "!", "|",
    "x", "\\pi", "i",
    "\\text{", "\\text{ cm}", "^\\circ", "\x00", "\x1f", "\n", "\r\n", "\t", "\u2028", "\ud800", *INVISIBLE, *TEMPLATE_TOKENS,
    *WORDS,
    *(digit for digits in OTHER_DIGITS for digit in digits[1:]),
]  # fmt: skip


class Meter:
    """Grades, and keeps the number of answers and the costliest one: CPU time here, or the clock where a worker takes part."""

    reported = {}  # by test: the number of answers

    def __init__(self, clock=time.thread_time):
        self.clock, self.count, self.worst, self.answer, self.worker_kib = clock, 0, 0.0, "", 0
        self.kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, grade, response, gold):
        start = self.clock()
        verdict = grade(response, gold)
        seconds = self.clock() - start
        assert verdict is True or verdict is False
        self.count += 1
        if seconds > self.worst:
            self.worst, self.answer = seconds, response
        return verdict

    def look_at_worker(self):
        """Its peak so far: a worker that was killed takes it along."""
        status = Path(f"/proc/{math_grader.worker.pid}/status") if math_grader.worker else None
        if status and status.exists():
            self.worker_kib = max(self.worker_kib,
                                  *(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")))

    def report(self, name):
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.kib) / 1024
        worker = f", the worker's peak {self.worker_kib / 1024:.0f} MiB" if self.worker_kib else ""
        worst = f"worst {self.worst * 1000:.1f} ms for {self.answer[:60]!r}"
        print(f"\n{name}: {self.count:,} answers, {worst}, peak memory {grown:+.0f} MiB{worker}")
        Meter.reported[name.split(" {")[0]] = self.count
        assert grown < 200 or sys.platform != "linux"


def spell(rng, value):
    """A spelling of an integer that is read as this number."""
    digits = rng.choice([f"{abs(value)}", f"{abs(value):,}", f"0{abs(value)}", f"{abs(value)}.0", f"{abs(value):,}.00",
                         f"{abs(value)}."])
    sign = rng.choice(["-", "\u2212", "- ", "-$"]) if value < 0 else rng.choice(["", "", "", "+", "$", "\\$", "€"])
    return sign + digits + rng.choice(["", "", "%", "\\%", " dollars", " \U0001f600", "</s>", "<|im_end|>", " **", "\u00b0"])


def two_numbers(rng):
    """A gold and another integer that is near in some way: by one, by sign, by a factor, by a digit, or not at all."""
    gold = rng.choice([1, 1, -1]) * rng.randrange(1, 10 ** rng.randrange(1, 8))
    other = rng.choice([gold + 1, gold - 1, -gold, 10 * gold, 100 * gold, gold + 1000, int(str(gold) + "1"), gold // 10,
                        rng.randrange(10**6)])
    return gold, other if other != gold else gold + 1


def prose(rng, *numbers):
    """Text that an answer may stand in, with some numbers in it, each in a sentence, an equation or after a marker of its own."""
    parts = rng.choices(WORDS + INVISIBLE + TEMPLATE_TOKENS, k=rng.randrange(5))
    parts += [rng.choice(["{}", "#### {}\n", "\\boxed{{{}}}", "<<{}>>", "the answer is {}.", "= {}",
                          "<think>#### {}</think>"]).format(n) for n in numbers]
    rng.shuffle(parts)
    return " ".join(parts)


def test_another_number_is_never_right():
    """The gold may stand before, in markers and boxes as well, and after the answer's line; it is not the answer."""
    rng, meter = random.Random(1), Meter()
    for _ in range(7_000):
        gold, other = two_numbers(rng)
        answer, noise = spell(rng, other), prose(rng, *[gold] * rng.randrange(3))
        after = rng.choice(["", "\n", f"\n{prose(rng)} the answer is {gold}", f"\nso {gold}", f"\n\n{gold}"])
        assert not meter(grade_gsm8k, f"{noise}\n#### {answer}{after}", f"{gold:,}"), (noise, answer, after, gold)
        assert not meter(grade_math, f"{noise} \\boxed{{{answer.split('<')[0].rstrip('*°')}}}{after}",
                         f"{gold}") or "</think>" in after
    meter.report("another number")


def test_the_same_number_is_right_in_every_spelling():
    """What keeps the tests above and below honest: the same generator, with an equal number."""
    rng, meter = random.Random(2), Meter()
    for _ in range(4_000):
        gold, other = two_numbers(rng)
        assert meter(grade_gsm8k, f"{prose(rng, other)}\n#### {spell(rng, gold)}\n{prose(rng)}", f"{gold}")
    meter.report("the same number")


def test_a_list_of_numbers_earns_nothing():
    """Whoever writes many numbers after #### would be right by chance: whatever separates them, no gold among them counts."""
    rng, meter = random.Random(3), Meter()
    separators = [" ", ", ", "; ", " or ", " and ", " = ", " - ", " / ", "|", "\t", " | ", " \\quad ", "–", "→", "\u200b",
                  "\u00a0", "\u3000", "、", " ≠ ",
                  " #### "]  # fmt: skip
    for _ in range(9_000):
        gold = rng.randrange(1, 10**4)
        numbers = [gold, *(gold + rng.choice([-1, 1]) * rng.randrange(1, 50) for _ in range(rng.choice([1, 1, 2, 5, 30])))]
        rng.shuffle(numbers)
        # After the last of several markers, one number is one answer.
        separator = rng.choice(separators[:-1] if numbers[-1] == gold else separators)
        text = separator.join(map(str, numbers))
        for line in (f"#### {text}", f"#### {rng.choice(WORDS)} {text} {rng.choice(TEMPLATE_TOKENS[:7])}"):
            assert not meter(grade_gsm8k, f"{prose(rng, gold)}\n{line}", str(gold)), (line, gold)
    meter.report("lists")


OPERATED = ["{}!", "{} !", "({})!", "√{}", "\\sqrt{{{}}}", "sqrt({})", "-({})", "-{{{}}}", "- **{}**", "-\u200b{}", "–{}", "—{}",
            "－{}", "⁻{}", "±{}",
            "\\pm {}", "--{}", "−−{}", "x^{}", "e^{{{}}}", "{}^x", "{}²", "{}⁴", "{}₂", "½{}", "{}½", "1⑧ {}", "{}①", "{}π",
            "\\frac{{{}}}{{x}}", "minus {}",
            "negative {}", "{}^{{9^9}}", "{}!!", "9^{{{}}}", ".{}", "{}e5", "0x{}", "{}:30", "{}/3", "3*{}", "{}-1"]  # fmt: skip


def test_a_number_under_an_operator_is_not_that_number():
    rng, meter = random.Random(4), Meter()
    for _ in range(250):
        gold = rng.randrange(2, 10 ** rng.randrange(1, 6))
        for form in OPERATED:
            for answer in ("#### " + form.format(gold), "\\boxed{" + form.format(gold) + "}"):
                assert not meter(grade_gsm8k, answer, str(gold)), answer
    meter.report("operators")


def garbage(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(1, 25)))


def test_garbage_is_wrong(monkeypatch):
    """Whatever parts an answer is made of. As no part holds a 7, none can be the gold. MATH without Math-Verify, see below."""
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importlib then finds no such module
    rng, meter = random.Random(5), Meter()
    for _ in range(9_000):
        text = garbage(rng)
        for response in (text, f"#### {text}", f"\\boxed{{{text}}}"):
            assert not meter(grade_gsm8k, response, "77,777"), response
            assert not meter(grade_math, response, "\\frac{7}{77}"), response
    meter.report("garbage")


def test_a_megabyte_of_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rng, meter = random.Random(6), Meter()
    for piece in ["8", "٨", "𝟖", "8\u200b", "8,", "8 ", "-8", "- ", "((", "{", "8!", "9^", *rng.sample(PIECES, 20)]:
        text = piece * (1_000_000 // len(piece))
        for response in (f"#### {text}", f"\\boxed{{{text}}}", f"#### 8\n{text}", f"{text}\n#### 9"):
            for grade in (grade_gsm8k, grade_math):
                assert not meter(grade, response, "77"), piece
    meter.report("a megabyte each")
    assert meter.worst < 1.5


def expressions(rng):
    """Two LaTeX answers of one form that are unequal, because exactly one of their parameters differs."""
    a, b, c = (rng.randrange(2, 40) for _ in range(3))
    d = c + rng.choice([1, 2, 5])
    square_free, other = rng.sample([2, 3, 5, 6, 7, 10, 11, 13], 2)
    forms = [
        (f"{a}x+{b}y-{c}", f"{b}y-{d}+{a}x"), (f"x^2+{a}x+{c}", f"{d}+x^2+{a}x"),
        (f"{a}\\sqrt{{{square_free}}}", f"{a}\\sqrt{{{other}}}"),
        (f"{a}+{b}\\sqrt{{{square_free}}}", f"{a}-{b}\\sqrt{{{square_free}}}"), (f"({a},{c})", f"({a},{d})"),
        (f"({c},{d})", f"({d},{c})"),
        (f"[{a},{a + c})", f"[{a},{a + c}]"), (f"({a},{a + c})", f"({a},{a + d})"),
        (f"\\{{{a},{a + b},{c * 50}\\}}", f"\\{{{a},{a + b},{d * 50}\\}}"),
        (f"{c}\\pi", f"{d}\\pi"), (f"\\frac{{{c}\\pi}}{{{a}}}", f"\\frac{{{d}\\pi}}{{{a}}}"), (f"{a}^{{x}}+{c}", f"{a}^{{x}}+{d}"),
        (f"{a}+{c}i", f"{a}-{c}i"), (f"\\frac{{{a}}}{{x+{c}}}", f"\\frac{{{a}}}{{x+{d}}}"), (f"{c + 1}!", f"{c + 1}"),
        (f"- {c}.0 \U0001f600", f"{c}"),
        (f"\\sqrt{{{c * c}}}", f"\\sqrt{{{d * d}}}"), (f"{a}, {c}", f"{a}, {d}"), (f"x={c}", f"x={d}"),
        (f"\\text{{({chr(65 + a % 26)})}}", f"\\text{{({chr(65 + (a + 1) % 26)})}}"),
        (f"\\begin{{pmatrix}}{a}\\\\{c}\\end{{pmatrix}}", f"\\begin{{pmatrix}}{a}\\\\{d}\\end{{pmatrix}}"),
        (f"{a}x+{b}={c}y", f"{a}x+{b}={d}y"),
        (f"–{c}", f"{c}"), (f"±{c}", f"{c}"), (f"{c}²", f"{c}"), (f"{c}\u200b{d}", f"{c}{d}"), (f"−{c}", f"{c}"), (f"{c}⑧", f"{c}"),
    ]  # fmt: skip
    return rng.choice(forms)


@needs_math_verify
def test_unequal_expressions_are_wrong_for_math_verify_as_well(counts):
    """Through the worker, which starts first: its import is not grading."""
    rng, meter = random.Random(7), Meter(time.perf_counter)
    assert grade_math("\\boxed{x+1}", "1+x") and grade_math("\\boxed{2x+3y-4}", "3y+2x-4")
    counts.clear()
    for _ in range(500):
        first, second = expressions(rng)
        for answer, gold in ((first, second), (second, first)):
            assert not meter(grade_math, f"{prose(rng, gold)} \\boxed{{{answer}}}", gold), (answer, gold)
    for _ in range(200):
        text = garbage(rng)
        assert not meter(grade_math, f"\\boxed{{{text}}}", "\\frac{77}{7x}"), text
        meter.look_at_worker()
    meter.report(f"Math-Verify {dict(counts)}")
    assert meter.worst < math_grader.START_LIMIT_S + math_grader.GRADE_LIMIT_S + 2  # a killed worker is started again
    assert counts["math_verify"] > 700 and counts["killed"] + counts["died"] < 20
    assert meter.worker_kib < 2 << 20


SCALES = ["hundred", "thousand", "million", "billion", "trillion", "dozen", "million dollars", "thousandths", "and a half", "Million",
          "hundred thousand", "K", "M", "lakh"]  # fmt: skip
BETWEEN = [" ", "\\ ", "\\,", "~", "\\;", "\\quad ", "\\text{ }", "\\hspace{1cm}", "\\phantom{0}", " \\: ", "\\mbox{ }"]


def unlike(rng):
    """A gold and an answer that means something else, of the kinds that once passed for it. By kind: two LaTeX answers."""
    a, b, c = rng.randrange(2, 100), rng.randrange(2, 100), rng.randrange(100, 1000)
    near, sign = b + rng.choice([-1, 1]), rng.choice(["", "-"])
    big = rng.randrange(10**3, 10 ** rng.randrange(4, 9))
    hour, minute = rng.randrange(1, 13), rng.randrange(10, 60)
    digits, (base, other) = f"1{rng.randrange(2)}{rng.randrange(10)}", rng.sample(range(2, 17), 2)
    scale, between = rng.choice(SCALES), rng.choice(BETWEEN)
    product = rng.choice(["({})({})", "{}({})", "({}){}", "{}\\left({}\\right)", "{{{}}}({})"]).format(a, b)
    return {
        "fractions": (f"{sign}\\frac{{{a}}}{{{big}}}", f"{sign}\\frac{{{a}}}{{{big + rng.choice([-1, 1])}}}"),
        "fractions of letters": (f"\\frac{{{a}x}}{{{big}}}", f"\\frac{{{a}x}}{{{big + rng.choice([-1, 1])}}}"),
        "decimals": (f"{sign}0.000{big}", f"{sign}0.000{big + rng.choice([-1, 1])}"),
        "picked out": (f"{sign}\\frac{{{a}}}{{{b}}}", rng.choice(["\\left({},3\\right)", "\\sqrt{{{}}}", "x \\mapsto {}x", "{} @", "\\& {}"])
                       .format(f"{sign}\\frac{{{a}}}{{{b}}}") + rng.choice(["", ".", ";"])),
        "sums": (str(a + b), product) if a + b != a * b else ("7", "(2)(5)"),
        "products": (str(a * b + rng.choice([-1, 1])), product),
        "joined": (f"{sign}{a}{b}", f"{sign}{a}{between}{b}"),
        "mixed": (f"\\frac{{{a}{b}}}{{{b + 1}}}", f"{a} {b}/{b + 1}") if int(f"{a}{b}") != a * (b + 1) + b else ("1", "2"),
        "number and list": (f"{sign}{a}{c}", f"{sign}{a}, {c}"),
        "list and number": (f"{a}, {c}", f"{a}{c}"),
        "lists": (f"{a},{b + 100},{c}", f"{c}, {near + 100}, {a}"),
        "longer lists": (f"{a},{c}", f"{a},{c},{c}"),
        "bases": (f"{digits}_{base}", rng.choice(["{}_{{{}}}", "{}_{}", "({})_{}"]).format(digits, other)),
        "base and value": (f"{digits}_{{{base}}}", rng.choice([digits, str(int(digits[:2] + "1")), f"{digits}{base}"])),
        "times": (f"{hour}:{minute}", rng.choice([f"{hour}:{minute - 1}", f"{hour + 1}:{minute}", f"\\frac{{{hour}}}{{{minute}}}",
                                                  f"{2 * hour}:{2 * minute}", f"{hour}/{minute}"])),
        "halves of a day": (f"{hour}\\text{{ a.m.}}", rng.choice([f"{hour}\\text{{ p.m.}}", f"{hour} \\text{{ PM}}", f"{hour}", f"{hour}pm"])),
        "scales": (f"{sign}{a}", sign + rng.choice(["{}\\text{{ {}}}", "{} {}", "\\text{{{} {}}}", "{}\\mathrm{{{}}}"]).format(a, scale)),
        "letters": (f"{a}", f"{a}{rng.choice('xyztnkabcd')}"),
        "equations": (f"{a}", f"{a + b} = {a}"),
    }


@needs_math_verify
def test_another_kind_of_answer_is_never_right():
    """Unequal by construction, whichever of the two is the gold. GSM8K reads those of one number as well."""
    rng, meter = random.Random(8), Meter(time.perf_counter)
    grade_math("\\boxed{x+1}", "1+x")
    for _ in range(10):
        for kind, (gold, answer) in unlike(rng).items():
            assert not meter(grade_math, f"so \\boxed{{{answer}}}", gold), (kind, gold, answer)
            assert not meter(grade_math, f"so \\boxed{{{gold}}}", answer), (kind, answer, gold)
            if kind in ("joined", "number and list", "scales", "letters", "products"):
                for response in (f"#### {answer}", f"\\boxed{{{answer}}}"):
                    assert not meter(grade_gsm8k, response, gold), (kind, gold, answer)
    meter.report("another kind")


def test_enough_answers():
    """Of the loops above, together."""
    if len(Meter.reported) < 7:
        pytest.skip("counts the answers of all tests of this file, and not all of them were run")
    assert sum(Meter.reported.values()) >= 100_000
