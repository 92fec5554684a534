"""A toy language model: three steps of one of three symbols, with known chances and known scores of every prefix."""

import itertools

import numpy as np

from common.generation.random import draws, keys, name_key
from common.generation.steps import State

SYMBOLS, STEPS = 3, 3
END = 9
_random = np.random.default_rng(5)
CHANCES = {
    p: _random.dirichlet(np.ones(SYMBOLS)) for n in range(STEPS) for p in itertools.product(range(SYMBOLS), repeat=n)
}
SCORES = {
    p: _random.uniform(0.05, 0.95) for n in range(1, STEPS + 1) for p in itertools.product(range(SYMBOLS), repeat=n)
}
SEQUENCES = list(itertools.product(range(SYMBOLS), repeat=STEPS))


def prior(sequence):
    return float(np.prod([CHANCES[sequence[:t]][sequence[t]] for t in range(STEPS)]))


def propose(seed, algorithm="toy"):
    """A proposer with the randomness of the real one: (seed, algorithm, problem, sample, step)."""

    def step(states, samples):
        key = keys(seed, name_key(algorithm), [s.problem for s in states], samples, [len(s.ends) for s in states])
        children = []
        for state, u in zip(states, draws(key, 1)[:, 0], strict=True):
            symbol = int(np.searchsorted(np.cumsum(CHANCES[state.tokens]), u))
            tokens = (*state.tokens, min(symbol, SYMBOLS - 1))
            logprob = float(np.log(CHANCES[state.tokens][tokens[-1]]))
            ends = (*state.ends, len(tokens))
            children.append(
                State(state.problem, tokens, ends, len(tokens) == STEPS, (*state.logprobs, logprob), state.scores)
            )
        return children

    return step


def score(states):
    return np.array([SCORES[state.tokens] for state in states])


def constant(states):
    return np.full(len(states), 0.5)
