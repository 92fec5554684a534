"""Running-value chains modulo 10: "3+4*2-5=" -> "+4=7,*2=4,-5=9$".

Evaluated from left to right, without precedence. The trace copies each operation before its value: without the copy, a
model of 0.3M parameters stays near chance. `$` ends the answer; what stands after the last `=` is the result.
"""

from __future__ import annotations

from random import Random

from common.tasks.problem import Problem, distinct_problems

MAX_STEPS = 20


def generate(seed: int, n: int, difficulty: int | tuple[int, int] = (2, 10), split: str = "train") -> list[Problem]:
    """n different chains of one split. difficulty: the number of operations, or a range (both ends in).

    Raises ValueError for a difficulty outside 1..20 and where a split has fewer than n problems.
    """
    low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    if not 1 <= low <= high <= MAX_STEPS:
        raise ValueError(f"difficulty must lie in 1..{MAX_STEPS}, not {difficulty}")
    return distinct_problems(lambda random: _draw(random, random.randint(low, high)), seed, n, split)


def _draw(random: Random, steps: int) -> Problem:
    start = value = random.randint(0, 9)
    operations, trace = [], []
    for _ in range(steps):
        operator, operand = random.choice("+-*"), random.randint(1, 9)
        value = apply(value, operator, operand)
        operations.append(f"{operator}{operand}")
        trace.append(f"{operator}{operand}={value}")
    prompt = f"{start}{''.join(operations)}="
    return Problem("chain", "", prompt, ",".join(trace) + "$", str(value), steps)


def apply(value: int, operator: str, operand: int) -> int:
    """One operation modulo 10."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10


def result_of(text: str) -> str | None:
    """The digit after the last '=' of a finished answer; None if the text has no '$' or nothing after the '='."""
    answer, end, _ = text.partition("$")
    _, equals, value = answer.rpartition("=")
    return value if end and equals and value.isascii() and value.isdigit() else None


def verify(problem: Problem, text: str) -> bool:
    """Whether the generated text ends in the right value; the steps before it may be wrong."""
    return result_of(text) == problem.result
