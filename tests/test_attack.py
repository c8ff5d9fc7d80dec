"""Answers that attack the grader, unequal to the gold by construction: none is right, none raises, none takes long."""

import json
import random
import subprocess
import sys

import math_grader
from conftest import ROOT
from math_grader import grade_gsm8k, grade_math

TAGS = ["</s>", "<s>", "<pad>", "<|im_end|>", "<|endoftext|>", "[/INST]", "<｜User｜>", "<｜end▁of▁sentence｜>", "<think>"]
WORDS = ["so", "eggs", "the answer is", "dollars", "Step", "→", "a=b", "**", "therefore", "per day", "😀", "é", "答案", "~", ":",
         "\u200b", "\u2060", "\ufeff", "\u00ad", "\u202e", "\u00a0", "\u2009", "\n\nProblem:"]  # fmt: skip
PIECES = [  # what costs a parser time or memory, what ends or begins an answer, what looks like a digit; none holds a 7
    *TAGS, *WORDS, "9^{9^{9}}", "9^9^9", "2^{1000000000}", "10^{-10^{10}}", "1000000!", "((9!)!)!", "\\sum_{k=1}^{100000}k",
    "\\binom{1000000000}{500000000}", "(x+y+z)^{200}", "\\frac{", "\\frac{1}{", "\\sqrt[1000000]{2}", "\\sqrt{", "\\left(",
    "\\right)", "\\begin{pmatrix}", "\\\\", "&", "((((((((((((((", "))))))))))))))", "{{{{{{{{{{{{", "}}}}}}}}}}}}", "\\{", "\\}",
    "{", "}", "(", ")", "1e999999999", "0/0", "1/0", "0x1F", "####", "#### ", "\n#### ", "\\boxed{", "\\boxed ", "\\fbox{",
    "\\boxed{1}", "final answer is ", "</think>", "1", "2", "3,", "1,000", "1.5", "-", "+", "*", "/", "=", "\\%", "\\$", ".",
    ",", "{,}", "\\!", "^", "_", "!", "|", "x", "\\pi", "i", "\\text{", "\\text{ cm}", "^\\circ", "\x00", "\n", "\u2028", "\ud800",
    *"0٠०𝟎1١①¹2٢２²3٣③³4٤𝟒⑤⁶8८𝟖9９⑨½π≤±", "\\pm ", "\\text{ or }", "million", "over five", "^{2}", "x=", "\\angle A=",
]  # fmt: skip


def spell(rng, value):
    """A spelling of an integer that is read as this number."""
    digits = rng.choice([f"{abs(value)}", f"{abs(value):,}", f"0{abs(value)}", f"{abs(value)}.0", f"{abs(value):,}.00"])
    sign = rng.choice(["-", "\u2212", "- ", "-$"]) if value < 0 else rng.choice(["", "", "+", "$", "\\$", "€", "x = "])
    return sign + digits + rng.choice(["", "", ".", "%", "\\%", " dollars", " 😀", "</s>", "<|im_end|>", " **", "°"])


def prose(rng, *numbers):
    """Text that an answer may stand in, with some numbers in it, each in a sentence, an equation or after a marker of its own."""
    forms = ["{}", "#### {}\n", "\\boxed{{{}}}", "<<{}>>", "the answer is {}.", "= {}", "<think>#### {}</think>"]
    parts = rng.choices(WORDS + TAGS, k=rng.randrange(5)) + [rng.choice(forms).format(number) for number in numbers]
    rng.shuffle(parts)
    return " ".join(parts)


def test_another_number_is_never_right_and_the_same_one_always():
    """The gold may stand before, in markers and boxes as well, and after the answer's line; it is not the answer."""
    rng = random.Random(1)
    for _ in range(5_000):
        gold = rng.choice([1, 1, -1]) * rng.randrange(1, 10 ** rng.randrange(1, 8))
        other = rng.choice([gold + 1, gold - 1, -gold, 10 * gold, 100 * gold, gold + 1000, gold // 10 - 1, rng.randrange(10**6)])
        other += other == gold
        for number in (gold, other):
            answer, before = spell(rng, number), prose(rng, *[gold + other - number] * rng.randrange(3))
            after = rng.choice(["", "\n", f"\n{prose(rng)} the answer is {gold + other - number}", f"\n\n{gold + other - number}"])
            assert grade_gsm8k(f"{before}\n#### {answer}{after}", f"{gold:,}") is (number == gold), (before, answer, after)
            answer = answer.split("<")[0].removesuffix(" dollars").rstrip("*°😀 ")
            assert grade_math(f"{before} \\boxed{{{answer}}}{after}", f"{gold}") is (number == gold), (before, answer, after)


def test_garbage_is_wrong(monkeypatch):
    """Whatever parts an answer is made of. As no part holds a 7, none can be the gold."""
    monkeypatch.setattr(math_grader, "math_verify", lambda gold, candidate: False)
    rng = random.Random(5)
    for _ in range(9_000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 25)))
        for response in (text, f"#### {text}", f"\\boxed{{{text}}}"):
            assert grade_gsm8k(response, "77,777") is False and grade_math(response, "\\frac{7}{77}") is False, response
        if (gold := math_grader.math_gold(text)) and "</think>" not in text:  # what is accepted at loading can be matched
            assert grade_math(f"\\boxed{{{gold}}}", gold), gold
    for piece in rng.sample(PIECES, 30):
        text = piece * (1_000_000 // len(piece))
        for response in (f"#### {text}", f"\\boxed{{{text}}}", f"#### 8\n{text}", f"{text}\n#### 9"):
            assert not grade_gsm8k(response, "77") and not grade_math(response, "77"), piece


# Texts whose parts repeat: words, exponents, brackets; words and then what no rule expects.
REPEATED = ["a", "ab ", "dollars ", "eggs and ", "^{2}", "m^2 ", " ", "{", "}", "{}", "(", "(x,", ",(x", ",", "1,", "1,234,", "1 234 ",
            "12 ", "1", "\\", "\\\\", "\\boxed{", "\\boxed ", "\\boxed 1 ", "\\text{", "\\text{a}", "\\text{ or }", "\\frac{1}", "\\!",
            ",\\! ", "$", "\n", "*", ". ", ". , ", "<", "<a>", "√{", "√(", "x=", "x_{1}", "\\color{", "-abcd", "/a", "é", "²π", "1i",
            "\u0661", "😀", "####", "</think>", "million ", "\\angle ", "\\pm "]
LINEAR = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))  # what backtracks exponentially ends here
import math_grader as m
m.MAX_ANSWER = m.TAIL = 10**9
m.math_verify = lambda gold, candidate: False
grades = [m.find_number, lambda text: m.compare_math(text, "7"), m.last_box, lambda text: m.gsm8k_value("#### 1" + text)]

def seconds(grade, text):
    m.normalize.cache_clear()
    start = time.process_time()
    grade(text)
    return time.process_time() - start

for piece in json.loads(sys.argv[1]):
    for start, end in (("", ""), ("18 ", "+"), ("18\\\\text{ ", "} 2")):
        once, twice = (start + piece * (length // len(piece)) + end for length in (8_000, 16_000))
        for grade in grades:
            if seconds(grade, twice) > 0.02:  # with the square it would be half a second
                ratios = [seconds(grade, twice) / seconds(grade, once) for _ in range(5)]
                assert min(ratios) < 2.5, (piece, start, ratios)
"""


def test_time_grows_with_the_length_of_an_answer_not_with_its_square():
    """In CPU time and in a child, as an interpreter within a pattern hears no signal."""
    done = subprocess.run([sys.executable, "-c", LINEAR, json.dumps(REPEATED)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
