"""What every search algorithm takes and returns.

An algorithm is a function `name(problems, propose, score, budget, *, seed, ...) -> SearchResult`:

    problems   indices of the problems to solve, all in lockstep
    propose    (states, samples) -> one more step of each state (`common.generation.steps.StepSampler.propose`)
    score      states -> a number in [0, 1] for each (`common.search.score`); None where an algorithm needs no scores
    budget     what a problem may cost

Nothing is shared between problems: random draws are functions of (seed, algorithm, problem, sample, step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from common.generation.steps import State

Propose = Callable[[Sequence[State], Sequence[int]], list[State]]
Score = Callable[[Sequence[State]], np.ndarray]


@dataclass
class Cost:
    """What one problem has cost: tokens generated (those of dropped branches too), prefixes scored, steps proposed."""

    tokens: int = 0
    passes: int = 0
    steps: int = 0

    def add(self, state: State) -> None:
        """Charges the latest step of a state."""
        self.tokens += state.step_tokens
        self.steps += 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.passes + other.passes, self.steps + other.steps)


@dataclass(frozen=True)
class Budget:
    """Limits a problem: None is no limit. A limit is checked before a batch is proposed, so that the batch that is
    running when it is reached is the most by which it is passed."""

    tokens: int | None = None
    passes: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "passes", "steps"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"a budget of {name}={limit} is too small for one step; at least 1, or None")

    def allows(self, cost: Cost) -> bool:
        """Whether one more batch may start."""
        return all(
            limit is None or spent < limit
            for limit, spent in ((self.tokens, cost.tokens), (self.passes, cost.passes), (self.steps, cost.steps))
        )


@dataclass
class SearchResult:
    """best: the chosen answer of each problem, None where it abstains. pool: every final candidate of each problem, in
    the order of the algorithm's slots. cost: of each problem. trace: what the algorithm records, one list a problem."""

    best: list[State | None]
    pool: list[list[State]]
    cost: list[Cost]
    trace: list[list[dict]] = field(default_factory=list)


def check_n(n: int, name: str = "n") -> None:
    """Raises ValueError unless n is at least 1."""
    if n < 1:
        raise ValueError(f"{name} must be at least 1, not {n}")


def check_problems(problems: Sequence[int]) -> list[int]:
    """The problems as a list. Raises ValueError for none, or for one that stands twice."""
    listed = list(problems)
    if not listed:
        raise ValueError("there are no problems to search on")
    if len(set(listed)) != len(listed):
        raise ValueError(f"{len(listed) - len(set(listed))} problems stand twice")
    return listed


def scored(states: Sequence[State], score: Score, cost: dict[int, Cost]) -> list[State]:
    """The states with the score of their latest step appended; one pass each is charged.

    Raises ValueError, naming the scorer, for a score that is not a number in [0, 1].
    """
    if not states:
        return []
    values = np.asarray(score(states), dtype=float)
    name = getattr(score, "__name__", type(score).__name__)
    if values.shape != (len(states),):
        raise ValueError(f"{name} gave scores of shape {values.shape} for {len(states)} states")
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        raise ValueError(f"{name} gave the score {values[bad][0]}; scores lie in [0, 1]")
    for state in states:
        cost[state.problem].passes += 1
    return [replace(s, scores=(*s.scores, float(v))) for s, v in zip(states, values, strict=True)]


def last_score(state: State) -> float:
    """The latest score; 0 for a state that was never scored."""
    return state.scores[-1] if state.scores else 0.0


def best_of(states: Sequence[State], key: Callable[[State], float] = last_score) -> State | None:
    """The state of the highest key, the first of equals; None of none."""
    return max(states, key=key, default=None)
