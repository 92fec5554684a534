"""Particle filtering for inference-time scaling (Puri et al. 2025), on any Hugging Face causal language model.

A reasoning chain is a state-space model: the language model p moves the state by one step x_t, and a reward model says
with probability r_t whether the prefix x_{1:t} is accepted (paper, equations 1 and 2):

    p(x, o | c) = prod_t p(x_t | c, x_{<t}) * prod_t Bernoulli(o_t; r_t),   infer p(x | c, all o_t = 1)

Each of n particles takes one step, is weighted by softmax(l_t / tau) and resampled with replacement; finished particles
take part with their final score. The released code has l_t = logit(r_t), so it samples from

    pi(x)  ~  prod_t p(x_t | c, x_{<t}) * (r_t / (1 - r_t))^(1/tau)

and not from the model above, whose weights are l_t = log r_t (`Weighting(kind="log")`); algorithm 1 of the paper prints
l_t = r_t (`kind="raw"`). Algorithms 1 to 3 stand in common/search/particles.py, since other papers compare with them.
Rules: probabilistic-inference-scaling, src/sal/search/particle_gibbs.py; its_hub, its_hub/algorithms/particle_gibbs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from common.generation.steps import State, StepSampler
from common.search.core import Budget, Score
from common.search.particles import Weighting, linear_annealing, parallel_chains, particle_filter, particle_gibbs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Budget", "Recorder", "TextScore", "Weighting", "linear_annealing", "parallel_chains", "particle_filter",
    "particle_gibbs", "solve",
]  # fmt: skip

# (prompt, text so far) pairs -> how likely each leads to a right answer, in [0, 1]
TextScore = Callable[[list[tuple[str, str]]], ArrayLike]


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    score: TextScore,
    *,
    n: int = 16,
    delimiter: str = "\n\n",
    temperature: float = 0.8,
    max_step_tokens: int = 256,
    max_steps: int = 40,
    weighting: Weighting | None = None,
    seed: int = 0,
) -> list[str]:
    """The particle filter's answer to each prompt: the text of the particle with the highest final score.

    score: any judge of partial answers, called once a step with all that were extended. delimiter: a token whose text
    contains it ends a step; the tokenizer's end token ends an answer.
    Raises ValueError if no token has the delimiter, if there is no end token, for scores outside [0, 1] and for what
    `StepSampler`, `Weighting` and `particle_filter` refuse.
    """
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    steps = [i for i, text in enumerate(texts) if delimiter in text]
    if not steps:
        raise ValueError(f"no token of the tokenizer contains the delimiter {delimiter!r}, so steps have no end")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so answers have no end")
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    sampler = StepSampler(
        model, ids, step_tokens=steps, end_tokens=[tokenizer.eos_token_id], max_step_tokens=max_step_tokens,
        max_steps=max_steps, temperature=temperature, seed=seed, algorithm="particle filter",
    )  # fmt: skip

    def text(state: State) -> str:
        return tokenizer.decode(list(state.tokens), skip_special_tokens=True)

    def judge(states: Sequence[State]) -> np.ndarray:
        return np.asarray(score([(prompts[state.problem], text(state)) for state in states]), dtype=float)

    result = particle_filter(range(len(prompts)), sampler.propose, judge, n=n, seed=seed, weighting=weighting)
    return [text(state) if state else "" for state in result.best]


@dataclass(frozen=True)
class Node:
    """A prefix that was scored. step: 1, 2, ...; parent: index of the node that it continues, -1 for the root."""

    state: State
    step: int
    parent: int


class Recorder:
    """A scorer that remembers what it scored: the genealogy of any search, those that were dropped included.

    nodes: of each problem, in order. The states carry the place where they were made and that of their parent.
    """

    __name__ = "recorder"

    def __init__(self, score: Score) -> None:
        self.score, self.nodes = score, dict[int, list[Node]]()
        self._index: dict[tuple[int, tuple[int, int] | None], int] = {}

    def __call__(self, states: Sequence[State]) -> np.ndarray:
        values = self.score(states)
        for state, value in zip(states, values, strict=True):
            nodes = self.nodes.setdefault(state.problem, [])
            parent = self._index.get((state.problem, state.parent), -1)
            self._index[state.problem, state.place] = len(nodes)
            nodes.append(Node(replace(state, scores=(*state.scores, float(value))), len(state.ends), parent))
        return values

    def lineage(self, final: State) -> list[int]:
        """Nodes from the first step to a state that this scorer scored; empty for one that it never saw."""
        nodes = self.nodes.get(final.problem, [])
        at = self._index.get((final.problem, final.place), -1)
        path = []
        while at >= 0:
            path.append(at)
            at = nodes[at].parent
        return path[::-1]
