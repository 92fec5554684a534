"""What every task's generator returns, and how problems are split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

SPLITS = {"train": 80, "warmup": 10, "test": 10}  # percent of all problems


@dataclass(frozen=True)
class Problem:
    """prompt: what the model reads. answer: a gold text, reasoning included, that `verify` takes. result: what counts.

    A model's text follows the prompt directly; spaces at the start of `answer` belong to it.
    """

    task: str
    split: str
    prompt: str
    answer: str
    result: str
    difficulty: int


def split_of(prompt: str) -> str:
    """The split that a problem belongs to, by its prompt alone: no two splits share one, whatever the seeds."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    for split, share in SPLITS.items():
        bucket -= share
        if bucket < 0:
            return split
    raise AssertionError("the shares of SPLITS do not sum to 100")


def distinct_problems(draw: Callable[[Random], Problem], seed: int, n: int, split: str) -> list[Problem]:
    """n different problems of one split, drawn from a generator seeded by (seed, split).

    draw(random) makes a problem of split ''; those of other splits are passed over. Raises ValueError for an unknown
    split, n < 0 or when the task has too few problems.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if n < 0:
        raise ValueError(f"n must not be negative: {n}")
    random, misses = Random(f"{seed}/{split}"), 0
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = draw(random)
        if split_of(problem.prompt) != split:
            continue
        if problem.prompt in found:
            misses += 1
            if misses > 50 * n + 1000:
                raise ValueError(f"only about {len(found)} different problems in split {split!r}, not {n}")
            continue
        found[problem.prompt] = Problem(**(vars(problem) | {"split": split}))
    return list(found.values())
