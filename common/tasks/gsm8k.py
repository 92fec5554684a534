"""GSM8K (Cobbe et al. 2021): school arithmetic in words; 7473 problems to train on and 1319 to test.

The gold text is the published one: a line a step, with calculator annotations (<<16-3=13>>), and "#### 13" at the end.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from common.tasks import answers
from common.tasks.benchmark import choose, problems_of
from common.tasks.problem import Problem, split_of

SPLITS = ("train", "warmup", "test")
MARK = "####"
# What a model may write before its result: the data's own mark, that of the published example solutions, words.
MARKS = (MARK, "\nA:", "nswer is", "nswer:")


def generate(
    seed: int,
    n: int | None,
    difficulty: int | tuple[int, int] | None = None,
    split: str = "test",
    *,
    root: str | Path | None = None,
    network: bool = False,
) -> list[Problem]:
    """Problems of one split, see `choose`. difficulty: the number of lines of the gold reasoning.

    'test' is the published test file; a tenth of the train file, by a hash of the question, is 'warmup'.
    Raises MissingSource where the files are not, ValueError for another split, difficulty or n.
    """
    file = f"gsm8k/{'test' if split == 'test' else 'train'}.jsonl"
    found = problems_of(file, partial(_problem, split=split), split, SPLITS, root, network)
    if split != "test":
        found = [problem for problem in found if (split_of(problem.prompt) == "warmup") == (split == "warmup")]
    return choose(found, seed, n, difficulty)


def _problem(row: dict[str, str], split: str) -> Problem:
    reasoning, _, result = row["answer"].rpartition(MARK)
    lines = [line for line in reasoning.splitlines() if line.strip()]
    prompt = f"Question: {row['question']}\nAnswer:"
    return Problem("gsm8k", split, prompt, " " + row["answer"], result.strip().replace(",", ""), len(lines))


def steps(text: str) -> list[str]:
    """The lines of an answer, each with its end: joined they are the text."""
    return text.splitlines(keepends=True)


def result_of(text: str) -> str | None:
    r"""The number that a text gives as its result: in \boxed{}, after its last mark, or the last number at all."""
    box = answers.boxed(text)
    return answers.number_after(text, *MARKS) if box is None else answers.number_after(box)


def canonical(text: str) -> str | None:
    """The result in one form (18, 18.00 and $18 are the same); None without a number."""
    result = result_of(text)
    return None if result is None else answers.canonical(result)


def verify(problem: Problem, text: str) -> bool:
    """Whether the text's result equals the gold number."""
    result = result_of(text)
    return result is not None and answers.equivalent(problem.result, result)
