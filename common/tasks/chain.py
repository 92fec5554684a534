"""Running-value chains modulo 10, evaluated from left to right without precedence. Two grammars:

plain      "3+4*2-5="        -> "+4=7,*2=4,-5=9$"
labelled   "3A+4B*2C-5="     -> "A+4=7,B*2=4,C-5=9,#9$"       (a `Style` says how the labelled trace is written)

A trace copies each operation before its value: without the copy, a model of 0.3M parameters stays near chance. The
labels keep its place in the prompt when segments vary in length. `$` ends the answer; `#` ends the reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

from common.tasks.problem import Problem, distinct_problems

MAX_STEPS = 20
LABELS = "ABCDEFGHIJKLMNOPQRST"
END, THINK_END, CHECK, FILLER = "$", "#", "?", "~~"
FACTORS, INVERTIBLE = range(1, 10), (1, 3, 7, 9)  # the invertible ones share no divisor with 10


@dataclass(frozen=True)
class Style:
    """How a labelled trace is written; every share is the chance of it in each segment.

    strides: chance of a segment that covers 1, 2 or 3 operations and writes only the last value ("A+4B*2=4"). verify:
    chance of checking a value by writing it again ("A+4=7?=7"). wrong: chance that the value is wrong at first; the
    check that then always follows corrects it. recheck: the last value is always checked. padding: chance of a filler
    that says nothing. direct: no trace at all.
    """

    strides: tuple[float, float, float] = (1.0, 0.0, 0.0)
    verify: float = 0.0
    wrong: float = 0.0
    recheck: bool = False
    padding: float = 0.0
    direct: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            shares = value if isinstance(value, tuple) else (float(value),)
            if not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"{field.name} must be shares in [0, 1], not {value}")
        if abs(sum(self.strides) - 1) > 1e-9:
            raise ValueError(f"the chances of the strides must sum to 1, not {sum(self.strides):g}: {self.strides}")


STYLES = {
    "concise": Style(),
    "stride2": Style(strides=(0.0, 1.0, 0.0)),
    "stride3": Style(strides=(0.0, 0.0, 1.0)),
    "verified": Style(verify=1.0),
    "corrected": Style(wrong=0.25),
    "padded": Style(padding=1.0),
    "direct": Style(direct=True),
    "mixed": Style(strides=(0.6, 0.25, 0.15), verify=0.3, wrong=0.08, padding=0.1),
}


def generate(
    seed: int,
    n: int,
    difficulty: int | tuple[int, int] = (2, 10),
    split: str = "train",
    *,
    style: str | Style | None = None,
    operators: str = "+-*",
    invertible: bool = False,
) -> list[Problem]:
    """n different chains of one split. difficulty: the number of operations, or a range (both ends in).

    style: None is the plain grammar, a name of STYLES or a Style the labelled one. operators: drawn from evenly, so
    that "***+-" is heavy on multiplication. invertible: only the factors 1, 3, 7 and 9; products with others make
    different values equal, so that a quarter of long chains with a wrong step still end right, by luck.
    Raises ValueError for a difficulty outside 1..20, an unknown style or operator, and where a split has fewer than n
    problems.
    """
    low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    if not 1 <= low <= high <= MAX_STEPS:
        raise ValueError(f"difficulty must lie in 1..{MAX_STEPS}, not {difficulty}")
    if not operators or set(operators) - set("+-*"):
        raise ValueError(f"operators are drawn from '+-*', not {operators!r}")
    if isinstance(style, str):
        if style not in STYLES:
            raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
        style = STYLES[style]
    factors = INVERTIBLE if invertible else FACTORS
    return distinct_problems(
        lambda random: _draw(random, random.randint(low, high), style, operators, factors), seed, n, split
    )


def _draw(random: Random, steps: int, style: Style | None, operators: str, factors: Sequence[int] = FACTORS) -> Problem:
    start = value = random.randint(0, 9)
    operations, values = [], []
    for _ in range(steps):
        operator, operand = random.choice(operators), random.randint(1, 9)
        while operator == "*" and operand not in factors:
            operand = random.randint(1, 9)
        value = apply(value, operator, operand)
        operations.append(f"{operator}{operand}")
        values.append(value)
    if style is None:
        trace = [f"{operation}={value}" for operation, value in zip(operations, values, strict=True)]
        return Problem("chain", "", f"{start}{''.join(operations)}=", ",".join(trace) + END, str(value), steps)
    labelled = [label + operation for label, operation in zip(LABELS, operations, strict=False)]
    answer = f"{THINK_END}{value}{END}" if style.direct else _trace(random, labelled, values, style)
    return Problem("chain", "", f"{start}{''.join(labelled)}=", answer, str(value), steps)


def _trace(random: Random, labelled: list[str], values: list[int], style: Style) -> str:
    segments, done = [], 0
    while done < len(labelled):
        stride = min(random.choices((1, 2, 3), style.strides)[0], len(labelled) - done)
        done += stride
        value = values[done - 1]
        segment = f"{''.join(labelled[done - stride : done])}="
        if random.random() < style.wrong:
            segment += f"{(value + random.randint(1, 9)) % 10}{CHECK}={value}"
        else:
            last = style.recheck and done == len(labelled)
            segment += f"{value}{CHECK}={value}" if random.random() < style.verify or last else f"{value}"
        segments.append(segment + (FILLER if random.random() < style.padding else ""))
    return ",".join(segments) + f",{THINK_END}{values[-1]}{END}"


def apply(value: int, operator: str, operand: int) -> int:
    """One operation modulo 10."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10


def result_of(text: str) -> str | None:
    """The digit that a finished answer ends with, after its last '=' or '#'; None if there is no '$' or no digit."""
    answer, end, _ = text.partition(END)
    found = re.search(r"[=#](\d)$", answer)
    return found.group(1) if end and found else None


def verify(problem: Problem, text: str) -> bool:
    """Whether the generated text ends in the right value; the steps before it may be wrong."""
    return result_of(text) == problem.result


def verify_step(problem: Problem, text: str) -> bool:
    """Whether every segment of a trace so far (ending in ',' or '$') is right: operations in order, right values.

    A segment with a check counts by the value that it ends with. A direct answer is one right step.
    """
    start = int(problem.prompt[0])
    operations = re.findall(r"[A-T]?[+*-]\d", problem.prompt)
    value, done = start, 0
    for segment in text.removesuffix(END).removesuffix(",").split(","):
        segment = segment.replace(FILLER, "")
        if segment.startswith(THINK_END):
            return done in (0, len(operations)) and segment == f"{THINK_END}{problem.result}"
        copied, equals, values = segment.partition("=")
        stride = len(re.findall(r"[+*-]\d", copied))
        if not equals or not stride or copied != "".join(operations[done : done + stride]):
            return False
        for operation in operations[done : done + stride]:
            value = apply(value, operation[-2], int(operation[-1]))
        done += stride
        if values.split(f"{CHECK}=")[-1] != str(value):
            return False
    return True
