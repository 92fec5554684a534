"""Countdown: combine all the numbers with + - * / to reach a target: "8 9 6>5=" -> "9-6=3:8 3,8-3=5:5$".

A solution is a row of steps. A step takes two of the numbers at hand, writes the operation and its value, and lists
what is at hand afterwards; the last one leaves the target alone. With backtracking a trace also holds steps that lead
nowhere: "x" takes back the latest step that still stands. `$` ends the answer. Numbers are small, so that a model of
0.3M parameters can learn the arithmetic and what is left to guess is the way to the target.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from random import Random

from common.tasks.problem import Problem, distinct_problems

LARGEST_NUMBER, LARGEST_VALUE = 10, 30
NUMBERS = (2, 5)  # fewest and most numbers at the start: the difficulty
END, BACK = "$", "x"


def generate(
    seed: int,
    n: int,
    difficulty: int | tuple[int, int] = (3, 4),
    split: str = "train",
    *,
    backtrack: float = 0.0,
    astray: float = 0.0,
) -> list[Problem]:
    """n different solvable problems of one split. difficulty: how many numbers, 2 to 5, or a range (both ends in).

    backtrack: share of the solution's steps before which a wrong step is shown and taken back. astray: share of the
    problems whose answer is valid steps to another value than the target, as a searcher's are that has not found it: a
    model that only sees solutions learns to write the target after a last operation that does not give it.
    Raises ValueError for a difficulty or share out of range.
    """
    low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    if not NUMBERS[0] <= low <= high <= NUMBERS[1]:
        raise ValueError(f"difficulty must lie in {NUMBERS[0]}..{NUMBERS[1]}, not {difficulty}")
    for name, share in (("backtrack", backtrack), ("astray", astray)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share in [0, 1], not {share}")
    return distinct_problems(lambda random: _draw(random, random.randint(low, high), backtrack, astray), seed, n, split)


def _draw(random: Random, count: int, backtrack: float, astray: float = 0.0) -> Problem:
    while True:
        numbers = [random.randint(1, LARGEST_NUMBER) for _ in range(count)]
        steps, value = _walk(random, numbers, backtrack)
        target = value
        if astray and random.random() < astray:
            target = _walk(random, numbers, 0.0)[1]
            if target == value:
                continue
        if min(value, target) > 0:
            break
    prompt = f"{' '.join(map(str, numbers))}>{target}="
    return Problem("countdown", "", prompt, ",".join(steps) + END, str(target), count)


def _walk(random: Random, numbers: list[int], backtrack: float) -> tuple[list[str], int]:
    """Random valid steps until one number is left, and that number; 0 where no step is possible before."""
    hand = list(numbers)
    steps: list[str] = []
    while len(hand) > 1:
        options = _moves(tuple(hand))
        if not options:
            return steps, 0
        if steps and random.random() < backtrack and len(options) > 1:
            wrong = random.choice(options)
            steps += [write(*wrong), BACK]
        a, operator, b, value, rest = random.choice(options)
        steps.append(write(a, operator, b, value, rest))
        hand = rest
    return steps, hand[0]


def moves(hand: list[int]) -> Iterator[tuple[int, str, int, int, list[int]]]:
    """Every step from the numbers at hand: (a, operator, b, value, numbers afterwards), larger operand first."""
    seen = set()
    for i in range(len(hand)):
        for j in range(i + 1, len(hand)):
            a, b = max(hand[i], hand[j]), min(hand[i], hand[j])
            if (a, b) in seen:
                continue
            seen.add((a, b))
            others = [x for k, x in enumerate(hand) if k not in (i, j)]
            for operator in "+-*/":
                value = apply(a, operator, b)
                if value is not None:
                    yield a, operator, b, value, [*others, value]


@functools.lru_cache(maxsize=200_000)
def _moves(hand: tuple[int, ...]) -> list[tuple[int, str, int, int, list[int]]]:
    return list(moves(list(hand)))


def apply(a: int, operator: str, b: int) -> int | None:
    """One operation on whole numbers; None where the value is negative, not whole or above 99."""
    if operator == "/":
        value = a // b if b and a % b == 0 else None
    else:
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return value if value is not None and 0 <= value <= LARGEST_VALUE else None


def write(a: int, operator: str, b: int, value: int, rest: list[int]) -> str:
    """A step as text."""
    return f"{a}{operator}{b}={value}:{' '.join(map(str, rest))}"


def read_step(text: str) -> tuple[int, str, int, int, list[int]] | None:
    """The step that `write` wrote, or None for text that is none."""
    found = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+):(\d+(?: \d+)*)", text)
    if not found:
        return None
    a, operator, b, value, rest = found.groups()
    return int(a), operator, int(b), int(value), [int(x) for x in rest.split()]


def hand_after(problem: Problem, text: str) -> list[int] | None:
    """The numbers at hand after a trace so far (ending in ',' or '$'); None if a step of it is not valid.

    Valid: the two numbers are at hand, the value is right, the listed numbers are those at hand afterwards, and a
    step is taken back only where one stands.
    """
    hands = [[int(x) for x in problem.prompt.partition(">")[0].split()]]
    body = text.removesuffix(END).removesuffix(",")
    for part in body.split(",") if body else ():
        if part == BACK:
            if len(hands) == 1:
                return None
            hands.pop()
            continue
        step = read_step(part)
        if step is None:
            return None
        a, operator, b, value, rest = step
        hand = list(hands[-1])
        for x in (a, b):
            if x not in hand:
                return None
            hand.remove(x)
        if apply(a, operator, b) != value or sorted([*hand, value]) != sorted(rest):
            return None
        hands.append(rest)
    return hands[-1]


def verify(problem: Problem, text: str) -> bool:
    """Whether a finished answer uses every number once and reaches the target by valid steps."""
    answer, end, _ = text.partition(END)
    return bool(end) and hand_after(problem, answer) == [int(problem.result)]


def verify_step(problem: Problem, text: str) -> bool:
    """Whether every step so far is valid and the target can still be reached from what is at hand."""
    hand = hand_after(problem, text)
    return hand is not None and reachable(tuple(sorted(hand)), int(problem.result))


@functools.lru_cache(maxsize=200_000)
def reachable(hand: tuple[int, ...], target: int) -> bool:
    """Whether steps exist that leave the target alone; by trying all of them."""
    if len(hand) == 1:
        return hand[0] == target
    return any(reachable(tuple(sorted(rest)), target) for *_, rest in moves(list(hand)))


@functools.lru_cache(maxsize=200_000)
def random_walk(hand: tuple[int, ...], target: int) -> float:
    """The chance that random valid steps from the numbers at hand, sorted, leave the target alone."""
    if len(hand) == 1:
        return float(hand[0] == target)
    after = [random_walk(tuple(sorted(rest)), target) for *_, rest in moves(list(hand))]
    return sum(after) / len(after) if after else 0.0


def result_of(text: str) -> str | None:
    """The steps that still stand in a finished answer, as one canonical string (for votes); None if not finished."""
    answer, end, _ = text.partition(END)
    standing: list[str] = []
    for part in answer.split(","):
        if part == BACK and standing:
            standing.pop()
        else:
            standing.append(part.partition(":")[0])
    return ",".join(standing) if end else None
