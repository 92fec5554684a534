"""Five tasks, each with two ways to answer, in one vocabulary (common/reasoners/policies.py):

    task        prompt                    direct answer    reasoning
    add2        "7+8 4+3="                "#5 8$"          "7+8=15,4+3+1=8,#5 8$"         47+38 in columns, ones first
    table1      "3A*4="                   "#2$"            "A*4=2,#2$"                    one operation modulo 10
    kb1         "K42="                    "#73$"           "K42=73?=73,#73$"              a fact
    chain8      three chains of 6 to 10 operations, a call each; right if all three are, as AIME's answers are 0..999
    countdown   "8 9 6>5="                "9-6,8-3$"       "9-6=3:8 3,8-3=5:5$"

Training has shown every operation of table1 and every fact of kb1: nothing but memory gives them. Problems of the
others are new.

With one chain, a guess would be right one time in ten: whoever may repeat it for free then needs no reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from common.tasks import chain, countdown
from common.tasks.problem import Problem, distinct_problems

DIRECT, STEPS = "direct", "steps"
END, THINK_END, CHECK = chain.END, chain.THINK_END, chain.CHECK
VALUES = 100  # of facts: the numbers that are a token
LONG_PARTS, LONG = 3, (6, 10)
LIMITS = {  # most new tokens of a call
    DIRECT: {"add2": 8, "table1": 4, "kb1": 4, "chain8": 4, "countdown": 16},
    STEPS: {"add2": 32, "table1": 12, "kb1": 16, "chain8": 80, "countdown": 64},
}


@dataclass(frozen=True)
class Item:
    """A problem of a study: one or more parts, each asked in a call of its own; it is solved if all of them are."""

    parts: tuple[Problem, ...]

    @property
    def difficulty(self) -> int:
        return sum(part.difficulty for part in self.parts)


def items(name: str, seed: int, count: int, split: str, facts: int) -> list[Item]:
    """`count` different problems of a task. facts: of the knowledge base. The splits of table1 and kb1 are
    one. Raises ValueError for an unknown task, and where there are too few problems."""
    if name not in GENERATORS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(GENERATORS)}")
    return GENERATORS[name](seed, count, split, facts)


def _one_part(problems: list[Problem]) -> list[Item]:
    return [Item((problem,)) for problem in problems]


def _long(seed: int, count: int, split: str, facts: int) -> list[Item]:
    parts = chain.generate(seed, LONG_PARTS * count, LONG, split, style="concise")
    return [Item(tuple(parts[LONG_PARTS * i : LONG_PARTS * (i + 1)])) for i in range(count)]


def _shown(known: list[Problem], what: str) -> Callable[[int, int], list[Item]]:
    """A sample of what training has shown."""

    def ask(seed: int, count: int) -> list[Item]:
        if count > len(known):
            raise ValueError(f"{count} questions about {len(known)} {what}")
        return _one_part(Random(f"{seed}/{what}").sample(known, count))

    return ask


GENERATORS: dict[str, Callable[[int, int, str, int], list[Item]]] = {
    "add2": lambda seed, count, split, facts: _one_part(additions(seed, count, split)),
    "table1": lambda seed, count, split, facts: _shown(tables(), "operations")(seed, count),
    "kb1": lambda seed, count, split, facts: _shown(knowledge(seed, facts), "facts")(seed, count),
    "chain8": _long,
    "countdown": lambda seed, count, split, facts: _one_part(countdown.generate(seed, count, 4, split)),
}  # fmt: skip


def additions(seed: int, count: int, split: str) -> list[Problem]:
    """Sums of two numbers of two digits, in columns: ones, then tens; so is the sum, its lowest digit first."""

    def draw(random: Random) -> Problem:
        a, b = random.randint(10, 99), random.randint(10, 99)
        ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
        tens = f"{a // 10}+{b // 10}" + ("+1" if carry else "")
        written = " ".join(reversed(str(a + b)))
        trace = f"{a % 10}+{b % 10}={ones},{tens}={a // 10 + b // 10 + carry},{THINK_END}{written}{END}"
        prompt = f"{a % 10}+{b % 10} {a // 10}+{b // 10}="
        return Problem("add2", "", prompt, trace, str(a + b), 2)

    return distinct_problems(draw, seed, count, split)


def tables() -> list[Problem]:
    """All 270 single operations modulo 10."""
    found = []
    for start in range(10):
        for operator in "+-*":
            for operand in range(1, 10):
                value, step = chain.apply(start, operator, operand), f"{chain.LABELS[0]}{operator}{operand}"
                trace = f"{step}={value},{THINK_END}{value}{END}"
                found.append(Problem("chain", "train", f"{start}{step}=", trace, str(value), 1))
    return found


def knowledge(seed: int, facts: int) -> list[Problem]:
    """A knowledge base: different subjects (a letter and a number), each with a value that nothing but memory gives.

    Raises ValueError for more facts than there are subjects.
    """
    subjects = [f"{letter}{number}" for letter in chain.LABELS for number in range(VALUES)]
    if not 1 <= facts <= len(subjects):
        raise ValueError(f"a knowledge base has 1 to {len(subjects)} facts, not {facts}")
    random = Random(f"{seed}/knowledge")
    found = []
    for subject in random.sample(subjects, facts):
        value = random.randrange(VALUES)
        trace = f"{subject}={value}{CHECK}={value},{THINK_END}{value}{END}"
        found.append(Problem("kb1", "train", f"{subject}=", trace, str(value), 1))
    return found


def gold(problem: Problem, style: str) -> str:
    """The right answer to write in a style (DIRECT or STEPS)."""
    if style == STEPS:
        return problem.answer
    if problem.task == "countdown":
        return ",".join(step.partition("=")[0] for step in problem.answer.removesuffix(END).split(",")) + END
    written = " ".join(reversed(problem.result)) if problem.task == "add2" else problem.result
    return f"{THINK_END}{written}{END}"


def result_of(problem: Problem, text: str, style: str) -> str | None:
    """The canonical answer of a text, for votes; None if it is not finished or gives none."""
    body, end, _ = text.partition(END)
    if not end:
        return None
    if problem.task == "countdown":
        return body if style == DIRECT else countdown.result_of(text)
    if problem.task == "chain":
        return chain.result_of(text)
    found = re.search(rf"{THINK_END}([\d ]+)$", body)
    if not found:
        return None
    digits = found.group(1).replace(" ", "")
    return digits[::-1] if problem.task == "add2" else digits


def verify(problem: Problem, text: str, style: str) -> bool:
    """Whether a finished answer is right. Operations without their values (countdown, direct) are carried out here."""
    if problem.task != "countdown":
        return result_of(problem, text, style) == problem.result
    if style == STEPS:
        return countdown.verify(problem, text)
    body, end, _ = text.partition(END)
    hand = [int(number) for number in problem.prompt.partition(">")[0].split()]
    for step in body.split(","):
        found = re.fullmatch(r"(\d+)([-+*/])(\d+)", step)
        if not found:
            return False
        a, operator, b = int(found.group(1)), found.group(2), int(found.group(3))
        value = countdown.apply(a, operator, b)
        for number in (a, b):
            if number not in hand:
                return False
            hand.remove(number)
        if value is None:
            return False
        hand.append(value)
    return bool(end) and hand == [int(problem.result)]


def chance_of_a_guess(item: Item) -> float:
    """How often a guess solves it that knows the form of the answers alone: any sum, digit or value alike; for
    countdown any operation alike that is allowed, exactly, over all ways."""
    chance = 1.0
    for part in item.parts:
        if part.task == "countdown":
            hand = tuple(sorted(int(number) for number in part.prompt.partition(">")[0].split()))
            chance *= countdown.random_walk(hand, int(part.result))
        else:
            chance /= {"add2": 179, "chain": 10, "kb1": VALUES}[part.task]  # sums are 20..198
    return chance
