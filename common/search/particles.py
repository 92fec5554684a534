"""Particle filtering, particle Gibbs and parallel chains over reasoning steps (Puri et al. 2025, algorithms 1 to 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.generation.random import draws, keys, name_key
from common.generation.steps import State
from common.search.core import Budget, Cost, Propose, Score, SearchResult, best_of, check_n, check_problems, scored
from common.search.resample import RESAMPLERS, effective_sample_size, log_weights, softmax


@dataclass(frozen=True)
class Weighting:
    """How particles are weighted and resampled.

    tau: temperature of the softmax over log-weights, or a function of the step. kind: see `log_weights`. key: the
    number in [0, 1] that a state is weighted by (None: its latest score). resampler: one of RESAMPLERS. inactive:
    finished particles are resampled too, with their final score. ess: below this share of n particles the weights are
    resampled, until then they multiply up; None resamples at every step (the paper).
    """

    tau: float | Callable[[int], float] = 1.0
    kind: str = "logit"
    key: Callable[[State], float] | None = None
    resampler: str = "multinomial"
    inactive: bool = True
    ess: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.tau) and not self.tau > 0:
            raise ValueError(f"tau must be positive, not {self.tau}")
        if self.resampler not in RESAMPLERS:
            raise ValueError(f"unknown resampler {self.resampler!r}; known: {', '.join(RESAMPLERS)}")
        log_weights(np.array([0.5]), self.kind)
        if self.ess is not None and not 0 < self.ess <= 1:
            raise ValueError(f"ess is a share of the particles in (0, 1], not {self.ess}")

    def temperature(self, step: int) -> float:
        return self.tau(step) if callable(self.tau) else self.tau

    def logits(self, states: Sequence[State], step: int) -> np.ndarray:
        """Log-weights over tau [states]."""
        values = np.array([self.key(s) if self.key else (s.scores[-1] if s.scores else 0.5) for s in states])
        return log_weights(values, self.kind) / self.temperature(step)


def linear_annealing(start: float, end: float, steps: int) -> Callable[[int], float]:
    """tau as a function of the step: from start to end over `steps` steps, then constant."""
    return lambda step: start - (start - end) * min(step, steps - 1) / max(1, steps - 1)


def particle_filter(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    seed: int = 0,
    weighting: Weighting | None = None,
    references: dict[int, State] | None = None,
    first_sample: int = 0,
) -> SearchResult:
    """n particles a problem: propose a step, weigh by its score, resample, until all are done (algorithm 1).

    The answer is the particle of the highest final score. references: a finished state for some problems, which takes
    the last place, never moves and can be copied (conditional filter, App. B.1): at step t it is weighted by the score
    of its t-th step, and a copy is cut after t steps and goes on from there. first_sample: of the random streams.
    trace: one dict a step and problem with log_weights [n], ancestors [free places] and log_mean_weight.
    """
    check_n(n)
    weighting = weighting or Weighting()
    problems, budget, references = check_problems(problems), budget or Budget(), references or {}
    cost = {problem: Cost() for problem in problems}
    free = {problem: n - (problem in references) for problem in problems}
    particles = {problem: [State(problem)] * free[problem] for problem in problems}
    carried = {problem: np.zeros(n) for problem in problems}  # log-weights that were not used for resampling yet
    trace: dict[int, list[dict]] = {problem: [] for problem in problems}
    running, step = list(problems), 0
    while running := [p for p in running if not all(s.done for s in particles[p]) and budget.allows(cost[p])]:
        places = [(p, i) for p in running for i in range(free[p]) if not particles[p][i].done]
        children = propose([particles[p][i] for p, i in places], [first_sample + i for _, i in places])
        for child in children:
            cost[child.problem].add(child)
        for (p, i), child in zip(places, scored(children, score, cost), strict=True):
            particles[p][i] = child
        step += 1
        u = draws(keys(seed, name_key("resample"), running, first_sample, step), n)
        for row, p in enumerate(running):
            fixed = [references[p].truncated(step)] if p in references else []
            particles[p], carried[p], record = _resample(particles[p], fixed, carried[p], weighting, step, u[row])
            trace[p].append(record)
    pool = [[*particles[p], *([references[p]] if p in references else [])] for p in problems]
    return SearchResult(
        [best_of(states) for states in pool], pool, [cost[p] for p in problems], [trace[p] for p in problems]
    )


def _resample(
    free: list[State], fixed: list[State], carried: np.ndarray, weighting: Weighting, step: int, u: np.ndarray
) -> tuple[list[State], np.ndarray, dict]:
    """New states of the free places, the log-weights carried on, and the record of the step; u uniform [n]."""
    states = [*free, *fixed]
    logits = carried + weighting.logits(states, step)
    ancestors = np.arange(len(free))
    takes_part = np.ones(len(states), dtype=bool) if weighting.inactive else np.array([not s.done for s in states])
    all_done = all(state.done for state in free)
    weights = softmax(logits)
    due = weighting.ess is None or effective_sample_size(weights) < weighting.ess * len(states)
    if due and not all_done:
        candidates = takes_part.nonzero()[0]
        moving = candidates[candidates < len(free)]
        chosen = RESAMPLERS[weighting.resampler](softmax(logits[candidates]), u[: len(moving)])
        ancestors[moving] = candidates[chosen]
    highest = logits.max()
    record = {
        "log_weights": logits.tolist(),
        "ancestors": ancestors.tolist(),
        "log_mean_weight": float(highest + np.log(np.exp(logits - highest).mean())),
    }
    return [states[i] for i in ancestors], np.zeros_like(logits) if due else logits, record


def particle_gibbs(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    iterations: int,
    seed: int = 0,
    weighting: Weighting | None = None,
    references: dict[int, State] | None = None,
    first_sample: int = 0,
) -> SearchResult:
    """Filters in a row, each but the first conditional on a trajectory drawn from the last by its weights (algorithm
    2).

    The pool holds the particles of all iterations, the reference once an iteration. A problem whose budget is spent
    stops with the iterations that it has. trace: the reference of each iteration under "reference".
    """
    check_n(n)
    check_n(iterations, "iterations")
    problems, weighting, budget = check_problems(problems), weighting or Weighting(), budget or Budget()
    current = dict(references or {})
    pool: dict[int, list[State]] = {problem: [] for problem in problems}
    cost = {problem: Cost() for problem in problems}
    trace: dict[int, list[dict]] = {problem: [] for problem in problems}
    for iteration in range(iterations):
        running = [p for p in problems if budget.allows(cost[p])]
        if not running:
            break
        first = first_sample + iteration * n
        part = particle_filter(
            running, propose, score, budget, n=n, seed=seed, weighting=weighting,
            references={p: current[p] for p in running if p in current}, first_sample=first,
        )  # fmt: skip
        for p, states, spent in zip(running, part.pool, part.cost, strict=True):
            pool[p] += states
            cost[p] += spent
            weights = softmax(weighting.logits(states, max(len(state.ends) for state in states)))
            u = draws(keys(seed, name_key("reference"), p, first), 1)[0]
            current[p] = states[int(RESAMPLERS["multinomial"](weights, u)[0])]
            trace[p].append({"reference": current[p]})
    return SearchResult(
        [best_of(pool[p]) for p in problems], [pool[p] for p in problems], [cost[p] for p in problems],
        [trace[p] for p in problems],
    )  # fmt: skip


def parallel_chains(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    n: int,
    taus: Sequence[float],
    iterations: int = 1,
    seed: int = 0,
    weighting: Weighting | None = None,
) -> SearchResult:
    """One particle Gibbs chain of n particles for each temperature, neighbours' references swapped (algorithm 3).

    After each iteration references x, x' of chains k, k+1 are swapped with the chance
    min(1, exp((L(x') - L(x)) (1/tau_k - 1/tau_{k+1}))), L the sum of a trajectory's log-weights. The budget is that of
    all chains together, checked before each iteration of each chain.
    """
    check_n(n)
    check_n(iterations, "iterations")
    check_n(len(taus), "the number of temperatures")
    problems, base, budget = check_problems(problems), weighting or Weighting(), budget or Budget()
    current: list[dict[int, State]] = [{} for _ in taus]
    pool: dict[int, list[State]] = {problem: [] for problem in problems}
    cost = {problem: Cost() for problem in problems}
    for iteration in range(iterations):
        for chain, tau in enumerate(taus):
            running = [p for p in problems if budget.allows(cost[p])]
            if not running:
                break
            part = particle_gibbs(
                running, propose, score, budget, n=n, iterations=1, seed=seed, weighting=replace(base, tau=tau),
                references={p: current[chain][p] for p in running if p in current[chain]},
                first_sample=(iteration * len(taus) + chain) * n,
            )  # fmt: skip
            for p, states, spent, record in zip(running, part.pool, part.cost, part.trace, strict=True):
                pool[p] += states
                cost[p] += spent
                current[chain][p] = record[-1]["reference"]
        for chain in range(len(taus) - 1):
            for p in problems:
                if p in current[chain] and p in current[chain + 1]:
                    _swap(current[chain], current[chain + 1], p, taus[chain], taus[chain + 1], base, seed, iteration)
    return SearchResult([best_of(pool[p]) for p in problems], [pool[p] for p in problems], [cost[p] for p in problems])


def _swap(
    cold: dict[int, State], hot: dict[int, State], problem: int, tau: float, other: float, base: Weighting, seed: int,
    iteration: int,
) -> None:  # fmt: skip
    energy = [float(log_weights(np.array(s.scores), base.kind).sum()) for s in (cold[problem], hot[problem])]
    chance = np.exp(min(0.0, (energy[1] - energy[0]) * (1 / tau - 1 / other)))
    if draws(keys(seed, name_key("swap"), problem, iteration), 1)[0, 0] < chance:
        cold[problem], hot[problem] = hot[problem], cold[problem]
