"""HumanEval (Chen et al. 2021): 164 Python functions to complete from their signature and description.

Answers are programs and are run, confined (common/tasks/sandbox.py), and only where the caller allows it.
"""

from __future__ import annotations

import re
from pathlib import Path

from common.tasks.benchmark import choose, problems_of
from common.tasks.problem import Problem
from common.tasks.sandbox import Limits, Outcome, run_program

SPLITS = ("test",)
# Where a completion of a function's body ends at the latest: the stop sequences of the paper (section 2.1).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def generate(
    seed: int,
    n: int | None,
    difficulty: int | tuple[int, int] | None = None,
    split: str = "test",
    *,
    root: str | Path | None = None,
    network: bool = False,
) -> list[Problem]:
    """Problems of the only split, see `choose`. difficulty: 0, since the data give none; the length of a prompt would
    tell how many examples it shows and not how hard it is.

    Raises MissingSource where the file is not, ValueError for another split, difficulty or n.
    """
    found = problems_of("humaneval/HumanEval.jsonl.gz", _problem, split, SPLITS, root, network)
    return choose(found, seed, n, difficulty)


def _problem(row: dict[str, str]) -> Problem:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return Problem("humaneval", "test", row["prompt"], row["canonical_solution"], tests, 0)


def steps(text: str) -> list[str]:
    """A program is one step: no part of it can be judged alone."""
    return [text] if text else []


def result_of(text: str) -> str:
    """The completion: a text's first block of code if it has one (chat models), else its beginning up to a stop."""
    block = re.search(r"```(?:python)?\n(.*?)(?:```|$)", text, re.DOTALL)
    if block:
        return block.group(1)
    ends = [text.find(stop) for stop in STOPS if stop in text]
    return text[: min(ends)] if ends else text


def program(problem: Problem, text: str) -> str:
    """Prompt, completion and tests as one program.

    A completion that writes the function anew may follow too: the prompt alone is a function, its description the body.
    """
    return f"{problem.prompt}{result_of(text)}\n{problem.result}"


def run(problem: Problem, text: str, *, allow_code_execution: bool = False, limits: Limits | None = None) -> Outcome:
    """Runs the program with its tests. Raises CodeExecutionNotAllowed unless allow_code_execution is true."""
    return run_program(program(problem, text), allow_code_execution=allow_code_execution, limits=limits)


def verify(problem: Problem, text: str, *, allow_code_execution: bool = False) -> bool:
    """Whether the completed function passes all tests. Raises CodeExecutionNotAllowed unless it is allowed."""
    return run(problem, text, allow_code_execution=allow_code_execution).passed
