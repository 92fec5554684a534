"""All tasks behind one small interface: `task("chain")`, `task("gsm8k")`, ...

Each task is a module of its own with functions of its own; an entry here says which of them answer to the interface.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.tasks.problem import SPLITS, Problem


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

    return Task(
        "chain", chain.generate, (1, chain.MAX_STEPS), tuple(SPLITS), chain.verify, chain.verify_step,
        lambda problem, text: chain.result_of(text), partial(re.findall, r"[^,]*,|[^,]+"),
    )  # fmt: skip


def _countdown(access: _Access) -> Task:
    from common.tasks import countdown

    return Task(
        "countdown", countdown.generate, countdown.NUMBERS, tuple(SPLITS), countdown.verify, countdown.verify_step,
        lambda problem, text: countdown.result_of(text), partial(re.findall, r"[^,]*,|[^,]+"),
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

    generate = partial(gsm8k.generate, root=access.data_root, network=access.network)
    return Task(
        "gsm8k", generate, (2, 11), gsm8k.SPLITS, gsm8k.verify, None,
        lambda problem, text: gsm8k.canonical(text), gsm8k.steps,
    )  # fmt: skip


def _math500(access: _Access) -> Task:
    from common.tasks import math500

    generate = partial(math500.generate, root=access.data_root, network=access.network)
    return Task(
        "math500", generate, (1, 5), math500.SPLITS, math500.verify, None,
        lambda problem, text: math500.canonical(text), math500.steps,
    )  # fmt: skip


def _humaneval(access: _Access) -> Task:
    from common.tasks import humaneval

    generate = partial(humaneval.generate, root=access.data_root, network=access.network)
    verify = partial(humaneval.verify, allow_code_execution=access.allow_code_execution)
    return Task(
        "humaneval", generate, (0, 0), humaneval.SPLITS, verify, None,
        lambda problem, text: humaneval.result_of(text), humaneval.steps,
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
