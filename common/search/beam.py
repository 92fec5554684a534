"""Beam search over reasoning steps, its diverse variant DVTS, and stepwise greedy (Beeching et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

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


def beam_search(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    width: int = 4,
    groups: int = 1,
) -> SearchResult:
    """n beams: every round each takes one step, the best n/width live on, each continued `width` times.

    Beams that are done are set aside and leave their places to the others, so that a round has n steps as long as any
    beam lives; the search ends when n answers are set aside or no beam lives, and the best score wins. With `groups`
    the n beams are independent searches of n/groups each, whose answers are pooled.
    Raises ValueError unless width divides n/groups (or is above it: then one beam is kept).
    """
    check_n(n)
    check_n(width, "width")
    if groups < 1 or n % groups or (n // groups > width and (n // groups) % width):
        raise ValueError(f"n={n} beams do not divide into {groups} groups of whole multiples of width={width}")
    problems, budget = check_problems(problems), budget or Budget()
    size = n // groups
    kept = max(1, size // width)
    cost = {problem: Cost() for problem in problems}
    beams: dict[tuple[int, int], list[State]] = {(p, g): [State(p)] * size for p in problems for g in range(groups)}
    finished: dict[tuple[int, int], list[State]] = {key: [] for key in beams}
    while True:
        live = [key for key in beams if beams[key] and budget.allows(cost[key[0]])]
        if not live:
            break
        flat = [(key, i) for key in live for i in range(len(beams[key]))]
        children = propose([beams[key][i] for key, i in flat], [key[1] * size + i for key, i in flat])
        for child in children:
            cost[child.problem].add(child)
        children = scored(children, score, cost)
        by_key: dict[tuple[int, int], list[State]] = {key: [] for key in live}
        for (key, _), child in zip(flat, children, strict=True):
            by_key[key].append(child)
        for key, candidates in by_key.items():
            top = sorted(candidates, key=lambda state: -last_score(state))[:kept]
            finished[key] += [state for state in top if state.done]
            alive = [state for state in top if not state.done]
            copies = -(-size // len(alive)) if alive else 0
            beams[key] = [state for state in alive for _ in range(copies)][:size]
            if len(finished[key]) >= size:
                beams[key] = []
    pool = [
        [state for g in range(groups) for state in finished[p, g] or [s for s in beams[p, g] if s.tokens][:1]]
        for p in problems
    ]
    return SearchResult([best_of(states) for states in pool], pool, [cost[p] for p in problems])


def dvts(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    width: int = 4,
) -> SearchResult:
    """Diverse verifier tree search: n/width independent trees, in each the best of `width` candidate steps is taken.

    Raises ValueError unless width divides n (or is above it: then one tree of n candidates).
    """
    return beam_search(problems, propose, score, budget, n=n, width=width, groups=max(1, n // width))


def stepwise_greedy(
    problems: Sequence[int], propose: Propose, score: Score, budget: Budget | None = None, *, n: int
) -> SearchResult:
    """One answer; each step is the best scored of n candidates."""
    return beam_search(problems, propose, score, budget, n=n, width=n)
