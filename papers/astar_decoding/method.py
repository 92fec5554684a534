"""A*-decoding (Chatziveroglou 2025): best-first search over reasoning steps with the priority f = g + h, h = 1 - r.

r in [0, 1] is a process reward model's score of a partial answer; g sums the costs of its steps. The search itself is
`a_star`; it lives in common/search/best_first.py, where other best-first searches share it. `priority` is f along a
path, and `solve` runs the search on any causal language model, with texts in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.generation.steps import State, StepSampler
from common.search.best_first import STEP_COSTS, STOPS, Node, a_star
from common.search.core import Budget, Score, SearchResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["STEP_COSTS", "STOPS", "Budget", "Node", "SearchResult", "a_star", "priority", "running", "solve"]

AGGREGATIONS = ("last", "min", "prod", "mean")
ScoreTexts = Callable[[list[tuple[str, str]]], "np.ndarray | Sequence[float]"]


def priority(state: State, step_cost: str = "increase", root_score: float = 1.0) -> list[float]:
    """f after 0, 1, ... steps of a scored path: f_t = sum of the costs of steps 1..t + 1 - r_t.

    Raises ValueError for an unknown step_cost and for a state whose steps are not all scored.
    """
    if step_cost not in STEP_COSTS:
        raise ValueError(f"unknown step_cost {step_cost!r}; known: {', '.join(STEP_COSTS)}")
    if len(state.scores) != len(state.ends):
        raise ValueError(f"a state of {len(state.ends)} steps has {len(state.scores)} scores")
    node = Node(State(state.problem), 0.0, 1.0 - root_score)
    values = [node.f]
    for steps, score in enumerate(state.scores, 1):
        child, h = state.truncated(steps), 1.0 - score
        node = Node(child, node.g + STEP_COSTS[step_cost](node, child, h), h)
        values.append(node.f)
    return values


def running(score: Score, aggregation: str) -> Score:
    """A scorer that gives a state the running minimum, product or mean of the scores on its path; 'last': unchanged.

    It expects states whose earlier scores it gave itself. Raises ValueError for another aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")
    if aggregation == "last":
        return score

    def aggregated(states: Sequence[State]) -> np.ndarray:
        values = np.asarray(score(states), dtype=float)
        before = np.array([state.scores[-1] if state.scores else 1.0 for state in states])
        if aggregation == "min":
            return np.minimum(before, values)
        if aggregation == "prod":
            return before * values
        counts = np.array([len(state.scores) for state in states])
        return (before * counts + values) / (counts + 1)

    return aggregated


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    score: ScoreTexts,
    *,
    k: int = 4,
    step_cost: str = "increase",
    stop: str = "first_goal",
    max_tokens: int = 4096,
    delimiter: str = "\n\n",
    max_step_tokens: int = 256,
    max_steps: int = 40,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[str | None]:
    """The answers of a language model to text prompts by A*-decoding; None where the budget ended without one.

    score: list of (prompt, partial answer) -> a number in [0, 1] for each, such as a process reward model's. A step
    ends with a token whose text contains the delimiter, an answer with the model's end token. max_tokens: generated for
    a problem, dropped branches included. Raises ValueError for settings out of range, a tokenizer without such a token,
    and scores outside [0, 1].
    """
    step_tokens = [i for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
                   if delimiter in text]  # fmt: skip
    if not step_tokens:
        raise ValueError(f"no token of the tokenizer contains the delimiter {delimiter!r}")
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else tokenizer.eos_token_id
    if ends is None:
        raise ValueError("neither the model nor the tokenizer names an end token")
    sampler = StepSampler(
        model, tokenizer(list(prompts))["input_ids"], step_tokens=step_tokens,
        end_tokens=[ends] if isinstance(ends, int) else ends, max_step_tokens=max_step_tokens, max_steps=max_steps,
        temperature=temperature, seed=seed, algorithm="a_star",
    )  # fmt: skip

    def text(state: State) -> str:
        return tokenizer.decode(list(state.tokens), skip_special_tokens=True)

    def score_states(states: Sequence[State]) -> np.ndarray:
        return np.asarray(score([(prompts[state.problem], text(state)) for state in states]), dtype=float)

    found = a_star(
        range(len(prompts)), sampler.propose, score_states, Budget(tokens=max_tokens), k=k, step_cost=step_cost,
        stop=stop, reserve=min(max_step_tokens, max_tokens // 4),
    )  # fmt: skip
    return [text(state) if state else None for state in found.best]
