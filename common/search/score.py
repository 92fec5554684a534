"""Scorers of partial answers: a reward model with a forking KV cache, and how step scores become one number."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.generation.ledger import Ledger
from common.generation.steps import ForkingCache, State, left_padded
from common.models.flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardModel:
    """score(states): the probability, by a sequence classifier with one label, that a prefix leads to a right answer.

    prompts: token ids of each problem. Scoring the children of what was scored last reads their latest steps only.
    """

    __name__ = "reward model"

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], capacity: int = 256, lean: bool | None = None
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this one has {model.config.num_labels}")
        highest = max(max(prompt) for prompt in prompts)
        if highest >= model.config.vocab_size:
            raise ValueError(
                f"the prompts have id {highest}, the reward model a vocabulary of {model.config.vocab_size}:"
                " they come from different tokenizers"
            )
        self.model, self.prompts, self.capacity, self.lean = model, prompts, capacity, lean
        self.ledger = Ledger()
        self._cache: ForkingCache | None = None
        self._rows: dict[tuple[int, int], int] = {}  # place of a state -> its row of the cache

    def __call__(self, states: Sequence[State]) -> np.ndarray:
        """Scores in (0, 1), float64 [states]."""
        began = time.perf_counter()
        with torch.inference_mode():
            logits = self._read(states)
        self._rows = {state.place: row for row, state in enumerate(states) if state.place is not None}
        self.ledger.add(seconds=time.perf_counter() - began)
        return logits[:, 0].double().sigmoid().cpu().numpy()

    def _read(self, states: Sequence[State]) -> torch.Tensor:
        cache = self._cache
        new = [list(state.tokens[len(state.tokens) - state.step_tokens :]) for state in states]
        longest = max(map(len, new))
        known = cache is not None and all(state.parent in self._rows for state in states)
        if known and cache is not None and cache.used + longest <= cache.capacity:
            cache.fork([self._rows[s.parent] for s in states if s.parent])
        else:
            new = self._begin(states, new)
        return self._extend(new)

    def _begin(self, states: Sequence[State], steps: list[list[int]]) -> list[list[int]]:
        """A new cache, and what each state still has to read. Siblings share one reading of the text before their
        latest step."""
        texts = [[*self.prompts[state.problem], *state.tokens] for state in states]
        index: dict[tuple[int, ...], int] = {}
        rows = [
            index.setdefault(tuple(text[: len(text) - len(step)]), len(index))
            for text, step in zip(texts, steps, strict=True)
        ]
        shared = 2 * len(index) <= len(states)
        first = [list(text) for text in index] if shared else texts
        longest = max(map(len, texts))
        self._cache = ForkingCache(self.model, len(first), longest + self.capacity, self.lean)
        if not shared:
            return texts
        self._extend(first)
        self._cache.fork(rows)
        return steps

    def _extend(self, new: list[list[int]]) -> torch.Tensor:
        """Reads more tokens of each row of the cache. Returns the output after the last, [rows, 1]."""
        cache = self._cache
        assert cache is not None
        ids, real = left_padded(new, self.model.device)
        past = cache.used
        self.ledger.add(prompt_tokens=sum(map(len, new)), forwards=1)
        self.ledger.add(flops=forward_flops(self.model.config, ids.shape[1], past, cache.places, 0))
        return cache.read(ids, real)


def aggregate(kind: str) -> Callable[[State], float]:
    """How the scores of an answer's steps become one: 'last', 'min', 'prod' or 'mean'. ValueError lists these."""
    kinds: dict[str, Callable[[tuple[float, ...]], float]] = {
        "last": lambda scores: scores[-1],
        "min": min,
        "prod": lambda scores: float(np.prod(scores)),
        "mean": lambda scores: float(np.mean(scores)),
    }
    if kind not in kinds:
        raise ValueError(f"unknown aggregation {kind!r}; known: {', '.join(kinds)}")
    return lambda state: kinds[kind](state.scores) if state.scores else 0.0


def noisy(score: Callable[[Sequence[State]], np.ndarray], sigma: float, seed: int) -> Callable:
    """The scorer with a persistent error: logit(score) + sigma * z, z standard normal and a function of the prefix."""
    from scipy.special import expit, logit, ndtri

    from common.generation.random import draws, keys

    if sigma < 0:
        raise ValueError(f"sigma must not be negative, not {sigma}")

    def noisy_score(states: Sequence[State]) -> np.ndarray:
        clean = np.clip(score(states), 1e-6, 1 - 1e-6)
        texts = [hash(state.tokens) & 0x7FFFFFFFFFFFFFFF for state in states]  # of ints: the same in every process
        z = ndtri(draws(keys(seed, [state.problem for state in states], texts), 1)[:, 0])
        return expit(logit(clean) + sigma * z)

    return noisy_score
