"""Independent samples, and what can be selected from them: best-of-n, weighted best-of-n, (weighted) majority vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.generation.steps import State
from common.search.core import (
    Budget,
    Cost,
    Propose,
    Score,
    SearchResult,
    best_of,
    check_n,
    check_problems,
    last_score,
    scored,
)

Answer = Callable[[State], str | None]  # the canonical answer of a finished state, None if it has none


def samples(
    problems: Sequence[int], propose: Propose, budget: Budget, *, n: int, score: Score | None = None, every: bool = True
) -> tuple[list[list[State]], dict[int, Cost]]:
    """n independent answers of each problem, and what they cost. score: given, each step is scored (every=True) or
    only the finished answer. Answers that the budget cuts short stay as they are."""
    check_n(n)
    problems = check_problems(problems)
    cost = {problem: Cost() for problem in problems}
    slots = [(problem, slot) for problem in problems for slot in range(n)]
    states = {key: State(key[0]) for key in slots}
    while True:
        live = [key for key in slots if not states[key].done and budget.allows(cost[key[0]])]
        if not live:
            break
        children = propose([states[key] for key in live], [slot for _, slot in live])
        for child in children:
            cost[child.problem].add(child)
        if score is not None and every:
            children = scored(children, score, cost)
        states.update(zip(live, children, strict=True))
    if score is not None and not every:
        finished = scored([states[key] for key in slots], score, cost)
        states.update(zip(slots, finished, strict=True))
    return [[states[problem, slot] for slot in range(n)] for problem in problems], cost


def greedy(problems: Sequence[int], propose: Propose, budget: Budget | None = None) -> SearchResult:
    """The single answer of a sampler with greedy=True (or one sample of another)."""
    pool, cost = samples(problems, propose, budget or Budget(), n=1)
    return SearchResult([states[0] for states in pool], pool, list(cost.values()))


def best_of_n(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    every: bool = False,
    key: Callable[[State], float] = last_score,
) -> SearchResult:
    """The sample of the highest score. every: score each step and not the finished answer alone."""
    pool, cost = samples(problems, propose, budget or Budget(), n=n, score=score, every=every)
    return SearchResult([best_of(states, key) for states in pool], pool, list(cost.values()))


def weighted_best_of_n(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    answer: Answer,
    key: Callable[[State], float] = last_score,
) -> SearchResult:
    """The answer whose samples have the largest sum of scores; the best scored sample that gives it."""
    pool, cost = samples(problems, propose, budget or Budget(), n=n, score=score, every=False)
    return SearchResult([vote(states, answer, key) for states in pool], pool, list(cost.values()))


def majority(
    problems: Sequence[int], propose: Propose, budget: Budget | None = None, *, n: int, answer: Answer
) -> SearchResult:
    """Self-consistency: the most frequent answer of n samples, the first seen of equals (Wang et al. 2022)."""
    pool, cost = samples(problems, propose, budget or Budget(), n=n)
    return SearchResult([vote(states, answer) for states in pool], pool, list(cost.values()))


def vote(states: Sequence[State], answer: Answer, weight: Callable[[State], float] | None = None) -> State | None:
    """A state with the answer of the largest total weight (weight None: one vote each), the first seen of equals.

    States without an answer do not vote; None if no state has one.
    """
    totals: dict[str, float] = {}
    voters: dict[str, list[State]] = {}
    for state in states:
        said = answer(state)
        if said is not None:
            totals[said] = totals.get(said, 0.0) + (weight(state) if weight else 1.0)
            voters.setdefault(said, []).append(state)
    if not totals:
        return None
    return best_of(voters[max(totals, key=totals.__getitem__)])
