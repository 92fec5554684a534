"""A language model small enough to enumerate, with random scores of every prefix: where theorem 1 can be checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from common.generation.random import draws, keys, name_key
from common.generation.steps import State

Event = Callable[[tuple[int, ...]], bool]


class ToyLanguageModel:
    """`steps` steps of one of `symbols` symbols; the chances of the next symbol and the score of a prefix are random.

    It proposes steps as `StepSampler` does (a draw is a function of seed, problem, sample and step) and scores states.
    """

    __name__ = "toy model"

    def __init__(self, symbols: int = 3, steps: int = 3, seed: int = 0) -> None:
        random = np.random.default_rng([seed, 0x707])
        self.symbols, self.steps, self.seed = symbols, steps, seed
        prefixes = [p for n in range(steps + 1) for p in itertools.product(range(symbols), repeat=n)]
        self.chances = {p: random.dirichlet(np.ones(symbols)) for p in prefixes if len(p) < steps}
        self.scores = {p: float(random.uniform(0.05, 0.95)) for p in prefixes if p}
        self.sequences = [p for p in prefixes if len(p) == steps]

    def propose(self, states: Sequence[State], samples: Sequence[int]) -> list[State]:
        """One more symbol of each state."""
        key = keys(self.seed, name_key("toy"), [s.problem for s in states], samples, [len(s.ends) for s in states])
        children = []
        for state, u in zip(states, draws(key, 1)[:, 0], strict=True):
            symbol = min(int(np.searchsorted(np.cumsum(self.chances[state.tokens]), u)), self.symbols - 1)
            tokens = (*state.tokens, symbol)
            children.append(
                State(state.problem, tokens, (*state.ends, len(tokens)), len(tokens) == self.steps, scores=state.scores)
            )
        return children

    def score(self, states: Sequence[State]) -> np.ndarray:
        """Score of each state's prefix."""
        return np.array([self.scores[state.tokens] for state in states])

    def target(self, weight: Callable[[float], float]) -> np.ndarray:
        """prod_t p(x_t | x_{<t}) weight(r_t) of every sequence, not normalised [sequences]."""
        return np.array(
            [
                np.prod([self.chances[x[:t]][x[t]] * weight(self.scores[x[: t + 1]]) for t in range(self.steps)])
                for x in self.sequences
            ]
        )

    def evidence(self, event: Event | None = None, weight: Callable[[float], float] = float) -> float:
        """The sum of `target` over all sequences, or over those of an event."""
        inside = np.array([event is None or event(x) for x in self.sequences])
        return float(self.target(weight)[inside].sum())


def estimates(
    model: ToyLanguageModel, runs: int, n: int, event: Event, kind: str = "log", resampler: str = "multinomial"
) -> tuple[np.ndarray, np.ndarray]:
    """(Zhat, self-normalised estimate of the event's chance) of `runs` independent particle filters, each [runs].

    Zhat = prod_t mean_i w_t^i; the estimate weighs the last particles by w_T. Their product is the unnormalised
    estimate of theorem 1, of which E[Zhat * estimate] = sum over the event of prod_t p w_t.
    """
    from common.search.particles import Weighting, particle_filter

    weighting = Weighting(kind=kind, resampler=resampler)
    result = particle_filter(range(runs), model.propose, model.score, n=n, seed=model.seed, weighting=weighting)
    evidence = np.exp([sum(step["log_mean_weight"] for step in trace) for trace in result.trace])
    shares = []
    for states, trace in zip(result.pool, result.trace, strict=True):
        weights = np.exp(np.array(trace[-1]["log_weights"]))
        shares.append(np.average([event(state.tokens) for state in states], weights=weights))
    return evidence, np.array(shares)


def starts_with_zero(sequence: tuple[int, ...]) -> bool:
    """The event of claim c13."""
    return sequence[0] == 0
