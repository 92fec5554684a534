"""What tasks from files have in common: which of a file's problems a call of `generate` returns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from common.data.sources import locate
from common.tasks.problem import Problem


def rows(name: str, root: str | Path | None, network: bool) -> list[dict[str, Any]]:
    """The rows of a JSON lines file (plain or gzip) of the source catalogue; raises what `locate` raises."""
    path = locate(name, root, network).path
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def problems_of(
    name: str,
    make: Callable[[dict[str, Any]], Problem],
    split: str,
    splits: Sequence[str],
    root: str | Path | None,
    network: bool,
) -> list[Problem]:
    """The problems that `make` makes of a file's rows. Raises ValueError for a split that the data do not have."""
    if split not in splits:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(splits)}")
    return [make(row) for row in rows(name, root, network)]


def choose(
    problems: list[Problem], seed: int, n: int | None, difficulty: int | tuple[int, int] | None
) -> list[Problem]:
    """n of the problems of some difficulty (None: any; a range holds both ends), in an order by the seed.

    n=None: all of them in the file's order. Raises ValueError if there are fewer than n, or none.
    """
    if difficulty is not None:
        low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
        levels = sorted({problem.difficulty for problem in problems})
        problems = [problem for problem in problems if low <= problem.difficulty <= high]
        if not problems:
            raise ValueError(f"no problem of difficulty {difficulty}; there are {levels[0]} to {levels[-1]}")
    if n is None:
        return problems
    if not 0 <= n <= len(problems):
        raise ValueError(f"n must lie in 0..{len(problems)}, the problems that there are, not {n}")
    order = list(problems)
    Random(seed).shuffle(order)
    return order[:n]
