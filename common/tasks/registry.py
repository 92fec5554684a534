"""All tasks behind one small interface: `task("chain")`, `task("gsm8k")`, ...

Each task is a module of its own with functions of its own; an entry here says which of them answer to the interface.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.tasks.problem import SPLITS, Problem

PROGRAMS = ("humaneval",)  # tasks whose answers are programs that `verify` runs


@dataclass(frozen=True)
class Task:
    """What can be asked of every task. A problem's `prompt` is what a model reads, its `answer` the gold reasoning.

    generate: (seed, n, difficulty, split) -> n different problems; more keywords where a task has more dials (the style
    of a chain's reasoning, ...). difficulty: the lowest and the highest. splits: no two share a problem, whatever the
    seeds. verify: (problem, text) -> whether the text is a right answer. verify_step: (problem, text up to the end of a
    step) -> whether it is right so far; None where a task cannot tell. result: (problem, text) -> the canonical answer,
    by which votes are counted; None if the text gives none. steps: text -> its steps; joined they are the text.
    """

    name: str
    generate: Callable[..., list[Problem]]
    difficulty: tuple[int, int]
    splits: tuple[str, ...]
    verify: Callable[[Problem, str], bool]
    verify_step: Callable[[Problem, str], bool] | None
    result: Callable[[Problem, str], str | None]
    steps: Callable[[str], list[str]]


@dataclass(frozen=True)
class _Access:
    """Where the files of a task are, and whether a model's programs may be run."""

    data_root: str | Path | None
    network: bool
    allow_code_execution: bool


def task(
    name: str, *, data_root: str | Path | None = None, network: bool = False, allow_code_execution: bool = False
) -> Task:
    """The task of a name. data_root, network: for tasks from files, see `common.data.sources.locate`.

    allow_code_execution: whether `verify` of humaneval may run a model's program; it raises CodeExecutionNotAllowed
    otherwise. Raises ValueError for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name](_Access(data_root, network, allow_code_execution))


def _chain(access: _Access) -> Task:
    from common.tasks import chain

    return _by_commas("chain", chain, (1, chain.MAX_STEPS))


def _countdown(access: _Access) -> Task:
    from common.tasks import countdown

    return _by_commas("countdown", countdown, countdown.NUMBERS)


def _by_commas(name: str, module: Any, difficulty: tuple[int, int]) -> Task:
    """A task of a generator whose answers are steps that end with commas."""
    return Task(
        name, module.generate, difficulty, tuple(SPLITS), module.verify, module.verify_step,
        lambda problem, text: module.result_of(text), partial(re.findall, r"[^,]*,|[^,]+"),
    )  # fmt: skip


def _exprs(access: _Access) -> Task:
    from common.tasks import exprs

    return Task(
        "exprs", exprs.generate, (1, 3), tuple(SPLITS), exprs.verify, None,
        lambda problem, text: exprs.behaviour(text), lambda text: [text] if text else [],
    )  # fmt: skip


def _multihop(access: _Access) -> Task:
    from common.tasks import multihop

    return Task(
        "multihop", multihop.generate, (1, 2), tuple(SPLITS), multihop.verify, None,
        multihop.result_of, partial(re.split, r"(?<=\.)(?= )"),
    )  # fmt: skip


def _gsm8k(access: _Access) -> Task:
    from common.tasks import gsm8k

    return _from_file("gsm8k", gsm8k, (2, 11), access)


def _math500(access: _Access) -> Task:
    from common.tasks import math500

    return _from_file("math500", math500, (1, 5), access)


def _humaneval(access: _Access) -> Task:
    from common.tasks import humaneval

    own = _from_file("humaneval", humaneval, (0, 0), access)
    return replace(
        own, verify=partial(humaneval.verify, allow_code_execution=access.allow_code_execution),
        result=lambda problem, text: humaneval.result_of(text),
    )  # fmt: skip


def _from_file(name: str, module: Any, difficulty: tuple[int, int], access: _Access) -> Task:
    """A task whose problems are read from a file."""
    generate = partial(module.generate, root=access.data_root, network=access.network)
    return Task(
        name, generate, difficulty, module.SPLITS, module.verify, None,
        lambda problem, text: module.canonical(text), module.steps,
    )  # fmt: skip


TASKS: dict[str, Callable[[_Access], Task]] = {
    "chain": _chain,
    "countdown": _countdown,
    "exprs": _exprs,
    "multihop": _multihop,
    "gsm8k": _gsm8k,
    "math500": _math500,
    "humaneval": _humaneval,
}
