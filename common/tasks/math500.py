"""MATH-500 (Hendrycks et al. 2021; the 500 test problems of Lightman et al. 2023): competition mathematics in LaTeX."""

from __future__ import annotations

import re
from pathlib import Path

from common.tasks import answers
from common.tasks.benchmark import choose, problems_of
from common.tasks.problem import Problem

SPLITS = ("test",)


def generate(
    seed: int,
    n: int | None,
    difficulty: int | tuple[int, int] | None = None,
    split: str = "test",
    *,
    root: str | Path | None = None,
    network: bool = False,
) -> list[Problem]:
    """Problems of the only split, see `choose`. difficulty: the published level, 1 to 5.

    Raises MissingSource where the file is not, ValueError for another split, difficulty or n.
    """
    return choose(problems_of("math500/test.jsonl", _problem, split, SPLITS, root, network), seed, n, difficulty)


def _problem(row: dict) -> Problem:
    prompt = f"Problem: {row['problem']}\nSolution:"
    return Problem("math500", "test", prompt, " " + row["solution"], row["answer"], int(row["level"]))


def steps(text: str) -> list[str]:
    """The paragraphs of a solution (blank lines part them), each with its end: joined they are the text."""
    return [part for part in re.split(r"(?<=\n)(?=\S)(?<=\n\n)", text) if part]


def result_of(text: str) -> str | None:
    r"""What the text gives as its result: its last \boxed{}, or what follows its last "answer is"; None without."""
    box = answers.boxed(text)
    if box is not None:
        return box
    found = re.findall(r"[Aa]nswer is:?\s*(.+?)(?:\.\s|\.?$|\n)", text)
    return found[-1].strip() if found else None


def canonical(text: str) -> str | None:
    """The result in one form, see `answers.canonical`; None without a result."""
    result = result_of(text)
    return None if result is None else answers.canonical(result)


def verify(problem: Problem, text: str) -> bool:
    """Whether the text's result is equivalent to the gold answer."""
    result = result_of(text)
    return result is not None and answers.equivalent(problem.result, result)
