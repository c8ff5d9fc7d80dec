"""Segment Policy Optimization: tests of math_grader.py. The tables state its policy; the last part grades real data."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import math_grader
from conftest import ROOT, real_file
from math_grader import grade_gsm8k, grade_math, gsm8k_gold, math_gold

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
needs_math_verify = pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
SLOW = "(x+y+z)^{200}"  # passes the guard and keeps Math-Verify busy until its own limit of 2 s


def boxed(answer):
    return "So the answer is $\\boxed{" + answer + "}$."


def cases(form, text):
    """Gold, right answers, wrong answers: "gold | right | right || wrong | wrong"; four spaces before the next case."""
    found = []
    for line in text.splitlines():
        for case in line.split("    ") if line and line[0] != "#" else []:
            left, _, wrong = case.partition(" || ")
            gold, *right = left.split(" | ")
            found.append(pytest.param(form, gold, right, wrong.split(" | ") if wrong else [], id=case[:30]))
    return found


# ---------------------------------------------------------------------------------------------------------------- GSM8K
GSM8K_RESPONSES = r"""
# whole responses; ⏎ is the end of a line
18 | #### 18 | ####18 | ####   18   | #### 18⏎ | #### 18⏎⏎⏎Problem: 5 and 6 | text⏎#### 18 | ##### 18 | #### \boxed{18} | #### 17⏎#### 18
18 | #### 17 #### 18 | \boxed{17} #### 18 | #### 18 \boxed{} | <think>#### 17</think>#### 18 | \fbox{18} | \boxed{18} | \boxed{17} no, \boxed{18}
18 | \boxed{18\text{ dollars}} | \boxed{\$18.00} | \boxed 18 | \boxed{{18}}
18 | \boxed{18} and \boxed{unclosed | #### Conclusion⏎\boxed{18} || 18 | The answer is 18 | A: 18 | ####  | #### | ####⏎18 | ### 18 | # 18
18 || #### 17⏎18 | She has 9 * 2 = 18 dollars | #### 18⏎#### 19 | #### 18⏎#### 17 18 | \boxed{18} #### 17 | \boxed{18} \boxed{19} | \boxed{18
18 || \boxed{} | \boxed{-{18}} | #### 18</think> | #### 18</think>#### 19 | -\boxed{18}
"""
GSM8K_KINDS = r"""
# answers, behind #### and in a box
18 | 18 | $18 | \$18 | $ 18 | 18 dollars | 18% | 18\% | 18. | 18.00 | 18.0 dollars. | +18 | 018 | **18** | _18_ | (18) | =18 | x = 18
18 | The answer is 18 eggs. | 18 dollars! | 18^\circ | 18-ounce bags | €18 | £18 | 18€ | 18 😀 | 18° | 18 (eggs) | 18 m^2 | 18 m² | 18 cm^{3}
18 | 18 \text{ m}^2 | 18 square meters | 18 km/h | 18kg | 18 men | Total: 18 | x = $18 a day | 18 miles per hour | **18** dollars | \textbf{18}
18 | 18</s> | 18 <|im_end|> | 18 of them | 18 seconds | 18 sq ft
18 || 1 2 3 4 5 | 17 18 | 18 17 | 17, 18 | 18 or 19 | 18, 19 | 17-18 | 18/1 | 18 18 | 3 * 6 = 18 | 20-2 | 2e1 | eighteen | 18.5 | 18.000001 | -18
18 || - 18 | −18 | -$18 | 1,8 | 18,00 | 1.8.0 | 1 8 | 0.18 | 1800 | 18 (１８) | １８ | ١٨ | 18½ | 18² | 18٣ | 18! | \sqrt{18} | √18 | x^{18} | -(18)
18 || - **18** | -​18 | –18 | ±18 | --18 | minus 18 | 18⁴ | 18π | 1⑨ | 18 ² | 18^2 | half of 18 | a third of 18 | not 18 | twice 18 | over 18
18 || less than 18 | x > 18 | x ≠ 18 | the square root of 18 | 18 minus x | 18 - x | 18/x | 18+x | 18(x) | |18| | f(18) | x+18 | -x = 18 | x^2 = 18
18 || 18 or more | 18 times x | 18x | 18_x | half of it is 18 | Millions: 18 | {18}^2 | 18 squared | 18 x | 18y | 18ab | 18abc
# words behind the number that change it
3 || 3 million | $3 million | 3 thousand dollars | 3k | 3K | 3M | 3bn | 3 Billions. | 3 dozen | 3 hundred | 3 and a half | 3 to four | 3 over five
3 || 3 halved | 3 upon seven | 3 out of five | 3 doubled | 3 by two | 3 (four) | 3 below zero | 3 tenths | 3-million | 3 a.m. | 3 pm
3 || 3 and two thirds
# numbers are exact
1234 | 1,234 | 1,234. | $1,234.00 | 1{,}234 | 1,\!234 | 1 234 | 1\,234 | 1 234 | 1 234 dollars    1,234 | 1234 | 1,234.00
1234 || 12,34 | 1, 234 | 12 34 | 1 2345 | 1234,567 | 123 4 | 1 234 1    .5 | 0.5 | .50    0 | -0 | 0.0    five || 5 | five
-5 | -5 | −5 | -$5 | $-5 | - 5 | -5.0 || 5 | - (5)    -1000000 | -1 000 000 | −1,000,000 || 1 000 000 | -1 000 | -1 000,000
3 || 3.0000001 | 300 | 0.03    0.3333333 || 0.333333 | 0.3333
"""


GSM8K = [*cases("{}", GSM8K_RESPONSES), *cases("#### {}", GSM8K_KINDS), *cases("so \\boxed{{{}}}", GSM8K_KINDS)]


@pytest.mark.parametrize("form, gold, right, wrong", GSM8K)
def test_gsm8k(form, gold, right, wrong):
    for answer in right + wrong:
        assert grade_gsm8k(form.format(answer.replace("⏎", "\n")), gold) is (answer in right), answer


def test_gsm8k_golds_and_lengths():
    golds = {"She sells 9 * 2 = <<9*2=18>>18.\n#### 18": "18", "text\n#### 1,234 ": "1,234", "#### 1\n#### -5": "-5"}
    assert {answer: gsm8k_gold(answer) for answer in golds} == golds
    for unusable in ("", "18", "####", "#### ", "#### none", "#### 1 2", "#### 12,34", "#### " + "9" * 500):
        assert gsm8k_gold(unusable) is None
    for response in ("", "#### 18" + "x" * 500, "#### " + "0" * 350 + "18", "\\boxed{18}" + " and so on" * 1000):
        assert not grade_gsm8k(response, "18")


# ----------------------------------------------------------------------------------------------------------------- MATH
MATH_RESPONSES = r"""
# whole responses
42 | \boxed{42} | \boxed{41} then \boxed{42} | \boxed{wrong}, final \boxed{42} | \fbox{42} | \boxed 42. | \boxed{\boxed{42}} | \\boxed{42} | \boxed{x=42}
42 | \boxed{42} as I put it in a \boxed as required | \boxed{42} and \boxed{41 | <think>\boxed{41}</think> \boxed{42} | <think> so \boxed{42}
42 || <think>\boxed{42}</think> done | the answer is 42 | \boxed{42 | \boxed{} | \boxed{ } | \boxed{42} then \boxed{41} | \boxed{42}</think>\boxed{41}
\boxed{42} | \boxed{42}    256 | - \boxed{256} || -\boxed{256} | $x=−\fbox{256}$ | -\boxed 256    -256 || -\boxed{256}    12 | \boxed{12~\text{cm}}
\{1,2\} | \boxed{\{1, 2\}} | \boxed{\left\{ 1, 2 \right\}}    \{1,2 | \boxed{\left\{ 1, 2 \right.}    \frac{1}{\sqrt{2}} | \boxed{\frac{1}{\sqrt{2}}} } }
\begin{pmatrix}1\\2\end{pmatrix} | \boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}    \begin{pmatrix}12\end{pmatrix} || \boxed{\begin{pmatrix}1\\2\end{pmatrix}}
(3,\tfrac{\pi}{2}) | \boxed{\left( 3, \frac{\pi}{2} \right)}    \binom{9}{2} || \boxed{x}    arrow || \boxed{\leftarrow}
"""
MATH_KINDS = r"""
# a bare fraction is not picked out of a box that cannot be read
\frac{1}{5} || \sqrt{\frac{1}{5}}. | \left(\frac{1}{5},3\right). | x \mapsto \frac{1}{5}x | \frac{1}{5} @ x | x \equiv \frac{1}{5} \pmod 7
\frac{1}{5} || \{ \frac{1}{5} | f: x \to \frac{1}{5}    \frac{7}{5} + \frac{1}{5} i. | \frac{7+i}{5} | \frac{i+7}{5}. | \frac{7}{5}+\frac{i}{5}
\frac{7}{5} + \frac{1}{5} i. || \frac{1}{5} | \frac{7}{5} | \frac{1+7i}{5}
-\frac{3}{4} + \frac{1}{2} i. | \frac{-3+2i}{4} | \frac{2 i-3}{4} || \frac{-3+2x}{4} | \frac{-3-2i}{4} | \frac{1}{2}
(\frac12, \frac13). || \frac13 | \frac12    x^2+1 | 1+x^2. | 1+x^2, | 1 + x^2 ; | $x^2+1.$ | \(x^2+1\)
\sqrt{2} | \sqrt2. | \sqrt2\,. | **\sqrt{2}.**    \sqrt{2}, | \sqrt2    (1,2) | (1, 2). | (1,2);    1,2 || 1,2,... | 1,2,\ldots
# numbers side by side are multiplied
7 || (2)(5) | 3(4)    10 | (2)(5) | 2(5) | 2\left(5\right) | (2)5 || (2)(3)(5) | 2{8} | \frac{16}{2}(2)    6 | 2(3) | \frac{4}{2}(3) | |2||3| | -2(-3)
5 || 2(3) | 2{3} | \frac{4}{2}(3) | (2)\left(3\right) | -2(-3)    \frac{5}{2} || 2\left(\frac12\right) | \frac42\cdot\frac12
1 | 2\left(\frac12\right)    \frac{7}{2} | 3\frac{1}{2} | 3 \frac12 | 3 1/2 | 3.5    \frac{3}{2} || 3\frac{1}{2} | x 3\frac12    3 || 2\cdot 3\frac12
# numbers are exact
42 | 42.0 | +42 | 42.    1 || 0.999999999 | 1/0    \frac{1}{1296} | \frac{2}{2592} || \frac{1}{1297} | .000772 | 0.0007720
.0000672 || 0.0000670 | .000067 | 0    0.3333333 || 0.333333 | \frac13
\frac13 | .333333 | 0.3333333 | x=.333333 || .333334 | .33333 | \frac{333333}{1000000}    -\frac13 | -.333333
\frac{1000000}{1000001} || \frac{999999}{1000000} | 1    \frac{1}{2} | \frac{2}{4} | \frac24 | 2/4 | 0.5
-\frac12 | \frac{-1}{2} | -\dfrac{1}{2} | −0.5    6.67\times10^{-11} || 6.68\times10^{-11} | 0    1.6\times10^{-19} || 1.7\times10^{-19}
(0.0000672,1) || (0.0000670,1)    \frac{x}{1296} || \frac{x}{1297}
# what is near 0 is not 0
\frac{2^{100}}{3^{100}} | \left(\frac{2}{3}\right)^{100} || \frac{2^{101}}{3^{100}} | \frac{2^{100}}{3^{101}} | 0
\frac{1}{2^{2005}} || -\frac{1}{2^{2005}} | \frac{1}{2^{2004}} | \frac{2}{2^{2005}}
10^{-40} | \frac{1}{10^{40}} | 10\cdot10^{-41} | 1\times10^{-40} || 2\cdot10^{-40} | 10^{-41} | 0 | 10^{-40}+10^{-41} | 10^{-40}x
\frac{1}{100!} | \frac{1}{100\cdot99!} || \frac{1}{99!} | \frac{1}{101!} | \frac{100}{100!}    \frac{x}{2^{2005}} || -\frac{x}{2^{2005}} | 0x    x^3+3x || x^3+(3+10^{-40})x
1.6\times10^{-40} | 16\times10^{-41} || 1.7\times10^{-40}    (10^{-40},1) || (2\cdot10^{-40},1) | (0.00000000000001,1)
(0.00000000000001,1) || (0.00000000000002,1)    \frac{1}{9999^{9999}} || \frac{2}{9999^{9999}}
\begin{pmatrix}10^{-40}\\1\end{pmatrix} || \begin{pmatrix}10^{-41}\\1\end{pmatrix}
\frac{\sqrt2}{9^{99}} || \frac{\sqrt3}{9^{99}} | \frac{\sqrt2}{9^{98}}    \frac{\sqrt{3+2\sqrt2}}{9^{99}} | \frac{1+\sqrt2}{9^{99}}
\frac{x}{10}+\frac12 | 0.1x+0.5    (0.0,\sqrt2) | (0,1.41421356237310)
# a list is no number, a number no list
70,110 | 110, 70 | 110,70 | 70110 | 70 \text{ and } 110    100,200 | 200,100 | 200, 100 | 100200
1,-2 | -2,1 | -2 \text{ or } 1 | x=1, x=-2 | 1 or -2    32349 || 32, 349 | 349, 32 | 32 \text{ or } 349 | 32 and 349
1234567 || 1, 234, 567 | 1,234, 567    32, 349 || 32349 | (32, 348)    (32,349) | (32, 349) || 32349 | (349,32)    1,2 || 1,1,2 | 1 | 2 | 3
3 || 3,3 | 3,4    43, 408 | x=43, x=408 | 408 \text{ and } 43    43408 || 43 , 408 | 43 ,408
# the items of a list are counted
1,1,2 | 2,1,1 | 1, 2, 1 | 1 \text{ and } 1 \text{ and } 2 | x=1,x=2,x=1 || 1,2,2 | 1,2 | 1,1,1,2 | 1,1,3    1,2,2,3 || 1,1,2,3 | 1,2,3,3 | 1,2,3
\frac12,0.5,2 || 0.5,2,2 | \frac12,\frac42,2    2,2 || 2 | 2,2,2    \sqrt2,\sqrt2,1 | 1,\sqrt{2},\frac{2}{\sqrt2}
# thousands
1234 | 1,234 | 1{,}234 | \$1,234.00 | 1 234 | 1,\!234    1,234 | 1234    10,000\pi | 10,000 \pi | 10,\!000\pi
11,\! 111,\! 111,\! 100 | 11111111100 | 11,111,111,100 | 11{,}111{,}111{,}100
32349 | 32,\! 349 | 32,\!349 | \$32,\! 349 | 32{,}\!349 | 32,\!\! 349.0 || 32,\! 34 | 32,\! 3490
# plus-minus is two answers
3 \pm 2\sqrt2 | 3+2\sqrt2, 3-2\sqrt2 | 3-2\sqrt2,3+2\sqrt2 | x=3\pm2\sqrt{2} | 3+2\sqrt2 \text{ or } 3-2\sqrt2 | 3±2√2
3 \pm 2\sqrt2 || 3+2\sqrt2 | 3 \pm 2\sqrt3 | 3+2\sqrt2,3+2\sqrt2    3+2\sqrt2, 3-2\sqrt2 | 3 \pm 2\sqrt2 | x = 3 \pm \sqrt8
\pm 5 | 5,-5 | -5 \text{ and } 5 | x=5, x=-5 | ±5 || 5 | -5 | 5,5 | 5,-4 | \pm 4    5,-5 | \pm5 | x=\pm 5
\frac{1\pm\sqrt5}{2} | \frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}    0,3,-3 | 0,\pm3    \{5,-5\} | \{\pm 5\}    5 || \pm5 | 5,-5
# spaces between digits do not vanish
\frac{11}{2} || 1 1/2 | 1 \frac{1}{2}    \frac{3}{2} | 1 1/2 | 1\,\frac12    -\frac{23}{2} | -11 1/2 | -11\frac{1}{2}
34 || 3 4 | 3\ 4 | 3\,4 | 3~4 | 3\quad 4 | 3\text{ }4 | 3\hspace{1cm}4 | 3\phantom{0}4    12 || 3 4 | 3\quad 4 | 3\hspace{1cm}4
-3.4 || -3 .4 | -3. 4    345x || 34 5x    \frac{34}{5} || \frac{3 4}{5}    12345 | 12 345 | 12\,345
# scale words are no units, nor are times of day
3 || 3 million | 3\text{ million} | 3\text{million dollars} | 3\text{K} | 3M | 3\text{ dozen} | 3\text{ hundredths} | 3\text{ and a half}
2.5 || 2.5\text{ billion} | 2.5\text{ thousand}    5\text{ dollars} || 5\text{ million dollars}
3\text{ million} | 3 \text{ million} | 3\text{ million}.
# words behind an answer that bring a second one
7 || 7\text{ or eight} | 7\text{ or more} | 7\text{ and eight} | 7\text{, eight} | 7\text{ to nine} | 7\mathrm{ or eight} | 7\text{ (or eight)}
\text{(B)} || (B)\text{ or (C)} | (B)\text{ (C)} | \text{(B) or (C)} | (B)\text{ and C}
\text{Evelyn} || \text{Evelyn}\text{ or Angela} | \text{Evelyn or Angela} | \text{Evelyn}\text{ Angela} | \text{Evelyn}, \text{Angela}
\frac12 || \frac12\text{ or a third} | \frac12\text{ or one}    10:30 | 10 : 30. | 10:30 || 20:60 | \frac{1}{3} | 10:31 | 10
9\text{ a.m.} | 9 \text{ a.m.} | 9\mbox{ a.m.} || 9\text{ p.m.} | 9\text{ AM} | 9 | 10\text{ a.m.}    10:30\text{ a.m.} || 10:30\text{ p.m.} | 22:30
6 || 6\text{ p.m.}
# the base of a number
121_3 | 121_{3} | 121_3. || 121_4 | 122_3 | 121 | 16 | 1213 | 121_{30}    20 || (5)_2 | 20_3    2A_{16} || 2B_{16} | 2A_{15}
# symbols
90^\circ | 90° | 90^{\circ} | 90 \degree | 90\text{ degrees}    4\sqrt2 | 4√2 | 4√{2} | 4√(2) | 2√8 || 4√3 | √2    5 | €5 | 5€ | £5 | \$5 | ¥5.00
9 || 90° | €90    9\pi | 9π | 9 π | π·9 || 9² | 8π | π    x^2 | x² | x·x | x^{2} || x³ | x2    x\le3 | x≤3 | 3≥x || x≥3 | x<3 | x≠3
(-\infty,1)\cup(2,\infty) | (-∞,1)∪(2,∞)    \frac32 | 1½ | 3÷2 | 3×½
# spelling
5 | =5 | **5** | \color{red}{5} | {\color{blue}5} | \textcolor{red}{5} | \mathbf{5} | \textbf{5} | \text{5} | {5}
1000 | 1e3 | 1E3 | 10e+2 || 1e4 | 1.1e3 | 1e-3    0.\overline{3} | \frac13 | \frac{2}{6} || 0.3 | 0.\overline{4} | \frac{3}{10}
\frac{1}{6} | 0.1\overline{6}    -\frac{4}{33} | -0.\overline{12}    \frac13 || 0.3\overline{4}    x^2-4 | (x-2)(x+2)
2\sqrt{2}-1 | -1+2\sqrt{2} || 2\sqrt{3}-1    x || y | 2x    \frac{\pi}{2} || 90^\circ    \text{Evelyn} | Evelyn    \text{odd} || even
# decided
1 || 1,2,3 | 1 \text{ or } 2 | $1$ or $2$ | \{1,2,3\} | 1;2;3 | 1=2=3 | 1 \\ 2 \\ 3 | 1 \quad 2 | \pm 1 | 1/2/3 | 1 2 3 | x=1 \text{ or } x=2
3 || 1,2,3 | \{1,2,3\} | 1;2;3 | 1=2=3 | 1 2 3    2 || 1\text{ apples and }2\text{ pears} | 1 \quad 2 | 1 or 2
(0,1) || 0<x<1 | \{0,1\} | (0,1]    [0,1) || 0\le x<1    0 \le x < 1 | [0,1)    \{1,2\} || (1,2) | [1,2]
5 || 5 \approx 6 | 6 \approx 5 | 5.0 \approx 5    \sqrt2 || 1.414214 | \sqrt2 \approx 1.414
# names and equations
5 | x=5 | f(2)=5 | x_1 = 5 | x=5.0\text{ cm}    42 | S_{10}=42 | \angle A = 42 | m\angle ABC = 42^\circ | AB=42 | \theta=42 | P(A) = 42
42 || S_{10}=41 | 2S=42 | (2)=42 | \sqrt{x}=42 | x^2=42
(3,4) | (x,y)=(3,4) | (x, y) = (3, 4) | (x_1,y_1)=(3,4) | P=(3,4) || (x,y)=(4,3) | (3,4)=(3,5)    (x,y,z)=(1,2,3) | (1,2,3)
7 || 6=7 | 14/2=7 | 2x=7 | x+2=7 | -x=7 | 7=6    x=5 | 5 || y=5 | x=6=5    2 || 2x | 2t | 2s | 2 m n | x>2 | x \ne 2 | \sin 2 | 2\text{x}    3t || 3s | 3
12 | 12 cm | 12\text{ cm}^2 | 12 \mathrm{ cm} | 12\text{ square feet} | 12\text{ cm}^{2} | 12\mbox{ inches}^\circ
5 || 5\text{6} | 56 | 5\text{ cm}^4
"""


@needs_math_verify
@pytest.mark.parametrize("form, gold, right, wrong", [*cases("{}", MATH_RESPONSES), *cases("so $\\boxed{{{}}}$.", MATH_KINDS)])
def test_math(form, gold, right, wrong, counts):
    for answer in right + wrong:
        assert grade_math(form.format(answer), gold) is (answer in right), (answer, counts)
    assert counts["killed"] == counts["died"] == 0


def test_math_golds_and_lengths(counts):
    assert [math_gold(answer) for answer in ("42", "\\frac{1}{2}", "\\boxed{7}")] == ["42", "\\frac{1}{2}", "7"]
    for unusable in ("", "  ", "None", "$$", ".", "\\frac{1}{2", "1" * 401, "\\boxed{}"):
        assert math_gold(unusable) is None
    assert not grade_math(boxed(""), "") and not grade_math("", "42") and not grade_math(boxed("1"), "")
    assert not grade_math("\\boxed{42}" + " and so on" * 1000, "42")  # not near the end
    assert grade_math(boxed("1" * 350), "1" * 350) and not grade_math(boxed("1" * 401), "1" * 401)
    assert counts == {"string": 6}


# ---------------------------------------------------------------------------------- hostile, foreign and huge responses
HOSTILE = [  # each of these, given to Math-Verify or sympy without protection, costs seconds to hours, or gigabytes
    "9^{9^{9}}", "9^9^9", "\\pi^{\\pi^{\\pi^{\\pi}}}", "67**89**45", "9^(9^(9^9))", "9^{\\frac{9}{1}^{9^9}}", "2^{1000000000}",
    "2^{1,000,000,000}", "10^{-10^{10}}", "(9999^{9999})^{9999}", "1000000!", "(10^9)!", "((9!)!)!", "9!!!", "{10^9}!",
    "999!^{999}", "\\binom{1000000000}{500000000}", "\\sum_{k=1}^{1000000000} \\frac{1}{k}", "\\prod_{k=1}^{1000000000} k",
    "\\int_0^1 e^{e^x} dx", "\\lim_{n\\to\\infty} (1+1/n)^n", "1+\\frac{1}{" * 20 + "x" + "}" * 20, "(" * 50 + "x" + ")" * 50,
    "\\sqrt{" * 50 + "x" + "}" * 50, "\\left(" * 30 + "x" + "\\right)" * 30, "{" * 1000 + "x" + "}" * 1000, "\\frac{" * 20000,
    "+".join(["x"] * 190), "+".join(["x"] * 50000), "\\{" + ",".join(map(str, range(100))) + "\\}", "0." + "1" * 390,
    "1e999999999", "0/0", "|" * 100, "1\\times 10^{999999999}", "=".join(["x"] * 100), "1" + "\\pm 1" * 20, "\\sqrt[1000000]{2}",
    "\\begin{pmatrix}" + "1&2\\\\" * 20 + "\\end{pmatrix}", "\\cup".join(f"[{i},{i + 1}]" for i in range(40)),
    "\\text{" + "a" * 300 + "}", "1\x002", "x\n\r\u2028+1", SLOW,
]  # fmt: skip


def test_hostile_answers_are_wrong_and_bounded(counts):
    for answer in HOSTILE:
        started = time.process_time()
        assert grade_math(boxed(answer), "x^2+7") is False and grade_gsm8k(boxed(answer), "7") is False, answer
        assert time.process_time() - started < 1, answer  # here; a worker has its own limits
    assert counts["guard"] >= 28, counts


# ----------------------------------------------------------------------------------------------------------- the worker
NEEDS_WORKER = "print(m.grade_math(r'\\boxed{x+1}', '1+x'), m.grade_math(r'\\boxed{x+2}', '1+x'), flush=True)\n"


def run_python(program, limits="true", **environment):
    """A Python of its own, under a shell's limits."""
    command = ["bash", "-c", f'{limits} && exec "$0" -c "$1"', sys.executable, "import sys, math_grader as m\n" + program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@needs_math_verify
@pytest.mark.parametrize("limits", ["ulimit -t 864000", "ulimit -t 9", "ulimit -v 1900000", "ulimit -v 900000 -t 100"])
def test_the_worker_lives_under_harder_limits(limits):
    done = run_python(NEEDS_WORKER, limits)
    assert (done.stdout, done.stderr, done.returncode) == ("True False\n", "", 0)


@pytest.mark.parametrize("module", [
    "raise ModuleNotFoundError('nothing is\\ninstalled')", "import os; os._exit(7)", "import os; os.kill(os.getpid(), 9)",
    "raise SystemExit", "raise MemoryError('nothing is left')", "grader = parse = verify = LatexExtractionConfig = None",
])  # fmt: skip
def test_a_worker_that_cannot_run_is_an_error_in_one_line(module, tmp_path):
    """It ends by itself before any verdict. What needs no worker is graded first."""
    (tmp_path / "math_verify.py").write_text(module)
    done = run_python("print(m.grade_math(r'\\boxed{0.5}', '1/2'))\n" + NEEDS_WORKER, PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.returncode) == ("True\n", 1) and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "pip install" in done.stderr and "ulimit -v" in done.stderr
    assert "nothing is" in done.stderr or "nothing" not in module


@pytest.mark.parametrize("program, start_limit, route", [
    ("import time; time.sleep(60)", 0.5, "killed"),  # a busy machine
    ("input(); print('true', flush=True); input()", 20, "died"),  # it has given a verdict before it ends
    ("input(); print('true', flush=True); input(); print('maybe', flush=True); input()", 20, "died"),
])  # fmt: skip
def test_a_worker_that_ends_later_costs_a_verdict(monkeypatch, tmp_path, counts, program, start_limit, route):
    (tmp_path / "fake.py").write_text(program)
    monkeypatch.setattr(math_grader, "worker", None)
    monkeypatch.setattr(math_grader, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.setattr(math_grader, "START_LIMIT_S", start_limit)
    assert grade_math(boxed("x+1"), "1+x") is False
    assert counts == {route: 1} and math_grader.worker is None


@needs_math_verify
def test_killed_workers_are_reaped_and_replaced(monkeypatch, counts):
    """Between two grades, in the middle of one, and at the time limit."""
    assert grade_math(boxed("x+1"), "1+x")
    first = math_grader.worker
    first.kill()
    first.wait()
    assert grade_math(boxed("x+2"), "2+x") and math_grader.worker is not first
    second = math_grader.worker
    killer = threading.Timer(0.3, second.kill)
    killer.start()
    assert grade_math(boxed(SLOW), "42") is False
    killer.join()
    assert grade_math(boxed("x+3"), "3+x")
    third = math_grader.worker
    with monkeypatch.context() as patch:
        patch.setattr(math_grader, "GRADE_LIMIT_S", 0.3)
        assert grade_math(boxed(SLOW), "43") is False and math_grader.worker is None
    assert second.returncode == third.returncode == -signal.SIGKILL
    assert grade_math(boxed(SLOW.replace("x", "a")), "43") is False  # which ends at Math-Verify's own limit
    assert counts == {"math_verify": 4, "died": 1, "killed": 1}


@needs_math_verify
@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="looks into /proc (Linux)")
def test_worker_has_no_gpu_and_little_memory_and_ends_with_its_trainer():
    """Standard input closes when the trainer is gone, however it went."""
    program = f"import math_grader as m, time\n{NEEDS_WORKER}print(m.worker.pid, flush=True)\ntime.sleep(60)"
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "True False\n"
    process = Path("/proc", trainer.stdout.readline().strip())
    assert b"CUDA_VISIBLE_DEVICES=\0" in (process / "environ").read_bytes()
    assert os.getsid(int(process.name)) != os.getsid(0)  # Ctrl-C in the trainer's terminal does not reach it
    limits = {line[:25].strip(): line[26:].split() for line in (process / "limits").read_text().splitlines()}
    assert limits["Max address space"][0] == str(2 << 30) and 10 <= int(limits["Max cpu time"][0]) < 30
    with trainer:
        trainer.kill()
    deadline = time.monotonic() + 30
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists()


# ---------------------------------------------------------------- real data (development data, not in this repository)
def rows(name):
    with open(real_file(name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def marked(response):
    """An output that was not asked for a marker or box, with the number or text of its last sentence in one."""
    text = response.rpartition("</think>")[2]
    if "final answer is" in text and "boxed" not in text:
        return boxed(text.rpartition("final answer is")[2].partition("I hope")[0].strip(" \n:."))
    if "####" in text or "boxed" in text:
        return response
    _, phrase, clause = text.rpartition("answer is")
    numbers = re.findall(r"-?\.?\d(?:[\d,.]*\d)?", clause.rpartition("=")[2] if phrase else clause)
    return f"#### {numbers[0 if phrase else -1]}" if numbers else ""


def test_gsm8k_solutions():
    """The golds against their own solutions and others; then models' solutions, whose published verdicts are right."""
    answers = [row["answer"] for row in rows("gsm8k_train.jsonl") + rows("gsm8k_test.jsonl")]
    golds = [gsm8k_gold(answer) for answer in answers]
    assert len(golds) == 8792 and sum("," in gold for gold in golds) == 93
    for answer, gold, other in zip(answers, golds, golds[1:] + golds[:1]):
        assert grade_gsm8k(answer, gold) and grade_gsm8k(answer.replace("#### ", "#### $") + ".00", gold)
        assert grade_gsm8k(answer, other) == (gold.replace(",", "") == other.replace(",", ""))
    table = rows("gsm8k_model_solutions.jsonl")
    verdicts = [grade_gsm8k(marked(row["solution"]), gsm8k_gold("#### " + row["ground_truth"])) for row in table]
    assert len(table) == 5276 and sum(verdicts) == 2001 and verdicts == [row["is_correct"] for row in table]
    assert not any(grade_gsm8k(row["solution"], row["ground_truth"]) for row in table)  # no marker, no box: no reward


@needs_math_verify
def test_math_solutions(counts):
    table = rows("math500.jsonl")
    assert len(table) == 500 and all(math_gold(row["answer"]) == row["answer"] for row in table)
    assert all(grade_math(row["solution"], row["answer"]) for row in table) and counts == {"string": 500}
    golds = [math_grader.normalize(row["answer"]) for row in table if math_grader.number(row["answer"]) is None][::6]
    for gold, other in zip(golds, golds[1:]):  # by Math-Verify alone
        assert math_grader.math_verify(gold, gold) and not math_grader.math_verify(gold, other), (gold, other)
    for row in rows("aime24.jsonl"):
        assert math_gold(row["answer"]) == row["answer"] and grade_math(boxed(str(int(row["answer"]))), row["answer"])
        assert not grade_math(boxed(str(int(row["answer"]) + 1)), row["answer"])


@needs_math_verify
@pytest.mark.parametrize("model, dataset, marks, agreeing", [
    ("rho-math-1b-v0.1", "gsm8k", True, 1313),  # of 1,319; the rest: the publisher's glued units and x100
    ("rho-math-1b-interpreter-v0.1", "gsm8k", True, 1317),
    ("rho-math-1b-interpreter-v0.1", "gsm8k", False, 1316),  # one more answer without a box
    ("rho-math-1b-v0.1", "math500", False, 458),  # of 500; many have no box
    ("rho-math-1b-v0.1", "math500", True, 479),
    ("rho-math-1b-interpreter-v0.1", "math500", False, 496),
])  # fmt: skip
def test_agreement_with_published_model_outputs(model, dataset, marks, agreeing):
    """A publisher's verdict is another rule, not the truth; a drop below the floor shows a change of ours."""
    table = [row for row in rows("model_outputs.jsonl") if (row["model"], row["dataset"]) == (model, dataset)]
    grade = grade_gsm8k if dataset == "gsm8k" else grade_math
    texts = [marked(row["completion"]) if marks else row["completion"] for row in table]
    assert sum(grade(text, row["gold"]) == row["verdict"] for text, row in zip(texts, table)) >= agreeing


@needs_math_verify
def test_cases_of_other_graders():
    """Bare answers are put into a box, completions are graded as they stand, GSM8K prose is marked first."""
    different = set()
    for row in rows("grader_cases.jsonl"):
        text = boxed(row["pred"]) if row["profile"] == "answer" or row["id"] == "slime-0458" else row["pred"]
        is_gsm8k = row["profile"] == "gsm8k"
        verdict = grade_gsm8k(marked(text), row["gold"]) if is_gsm8k else grade_math(text, row["gold"])
        different |= {row["id"]} if verdict != row["expected"] else set()
    assert different == {
        "hendrycks-0271", "hendrycks-0278",  # the same list in another order: right here, that suite compares strings
        "slime-0458",  # an unreduced fraction is right here
        "slime-0470", "slime-0471",  # 'Answer: 42' without a box earns nothing
        "slime-0473",  # '100 dollars', a unit without \text in a box: not understood, a miss
        "verifiers-0424",  # an integer of 100,000 digits is longer than any answer that is read
    }  # fmt: skip
