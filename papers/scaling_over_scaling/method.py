"""Stopping where more answers, or more rounds of rethinking, no longer pay (Wang et al. 2025, "Scaling over Scaling").

N independent answers, each right with chance p, hold a right one with chance 1 - (1 - p)^N; so does a chain that
rethinks, whose wrong answers are mended with chance p a round and whose right ones stay. With a ceiling F_max for what
no budget solves, F(N) = F_max (1 - (1 - p)^N). The saturation budget N* is the first N >= 0 at which the next answer
gains dF(N) = F_max p (1 - p)^N <= epsilon. These laws, and two that let problems differ or answers be lost, are in
common/costs/saturation.py. Here are the rule that spends by them, the loop that rethinks, and the fits to samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from common.costs.saturation import (
    BetaBinomial,
    Geometric,
    LeakyChain,
    beta_binomial,
    fit_beta_binomial,
    fit_geometric,
    fit_leaky_chain,
    geometric,
    hit_curves,
    leaky_chain,
    observed_saturation,
    saturation_budget,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Allocation", "BetaBinomial", "Geometric", "LeakyChain", "agreement", "allocate", "beta_binomial", "block_counts",
    "fit_laws", "fit_leaky_chain", "geometric", "hit_curves", "leaky_chain", "observed_saturation", "posterior_mean",
    "rethink", "saturation_budget", "solve", "until_votes", "vote",
]  # fmt: skip

Answer = str | None
Draw = Callable[[int], tuple[Answer, int]]  # number of the draw, from 0 -> an answer (None: it gave none), its tokens
T = TypeVar("T")


@dataclass(frozen=True)
class Allocation:
    """What an adaptive rule drew. answers: in order. tokens: of all of them. success: the posterior mean of p at the
    end. planned: the budget that the pilot asked for; later draws move it."""

    answers: list[Answer]
    tokens: int
    success: float
    planned: int


def agreement(answers: Sequence[Answer]) -> int:
    """How many answers say what most of them say; None agrees with nothing, not even with None."""
    return max(Counter(answer for answer in answers if answer is not None).values(), default=0)


def vote(answers: Sequence[Answer]) -> Answer:
    """The most frequent answer, the first seen of equals; None if there is none."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)


def posterior_mean(hits: int, draws: int) -> float:
    """Mean of the chance of success after `hits` of `draws`, from a uniform prior Beta(1, 1): (1 + hits) / (2 + draws).

    Raises ValueError for hits outside 0..draws.
    """
    if not 0 <= hits <= draws:
        raise ValueError(f"hits must lie in 0..{draws}, the number of draws, not {hits}")
    return (1 + hits) / (2 + draws)


def allocate(
    draw: Draw,
    hits: Callable[[Sequence[Answer]], int] = agreement,
    *,
    pilot: int = 4,
    most: int = 64,
    epsilon: float = 0.01,
    ceiling: float = 1.0,
) -> Allocation:
    """Draws a pilot, estimates p, and goes on until as many answers are there as N* asks for; after each draw p and N*
    are estimated anew, so that it may stop before the first plan or after it, but never beyond `most`.

    draw: makes one more answer. hits: how many of the answers so far count as successes, such as their agreement or
    what a verifier accepts. ceiling: F_max. epsilon in [0, 1]: elsewhere an epsilon of 0 is an error, since no finite N
    reaches it; here `most` is the end of it, so that 0 always draws `most`. 1 draws the pilot alone, since no answer
    gains more than 1. Raises ValueError for settings out of range, before any draw, and for negative tokens.
    """
    if not 1 <= pilot <= most:
        raise ValueError(f"the pilot must lie in 1..{most}, the most answers, not {pilot}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must lie in [0, 1], not {epsilon}")
    if not 0 <= ceiling <= 1:
        raise ValueError(f"ceiling must lie in [0, 1], not {ceiling}")
    answers: list[Answer] = []
    tokens, success, planned, target = 0, 0.5, 0, pilot
    while len(answers) < target:
        answer, spent = draw(len(answers))
        if spent < 0:
            raise ValueError(f"draw {len(answers)} cost {spent} tokens: a cost cannot be negative")
        answers.append(answer)
        tokens += spent
        if len(answers) >= pilot:
            success = posterior_mean(hits(answers), len(answers))
            wanted = saturation_budget(success, epsilon, ceiling) if epsilon > 0 else most
            target = min(max(wanted, pilot), most)
            planned = planned or target
    return Allocation(answers, tokens, success, planned)


def until_votes(draw: Draw, votes: int = 3, most: int = 64) -> Allocation:
    """The baseline: draws until one answer has so many votes, or `most` are drawn. Raises ValueError unless both are
    at least 1."""
    if min(votes, most) < 1:
        raise ValueError(f"votes and most must be at least 1, not {votes} and {most}")
    answers: list[Answer] = []
    tokens = 0
    while len(answers) < most and agreement(answers) < votes:
        answer, spent = draw(len(answers))
        answers.append(answer)
        tokens += spent
    return Allocation(answers, tokens, posterior_mean(agreement(answers), len(answers)), most)


def rethink(attempt: Callable[[list[T] | None], list[T]], rounds: int) -> list[list[T]]:
    """Sequential scaling of many chains at once: the first answers and those of each round, [rounds + 1][chains].

    attempt: the last answers of all chains -> new ones; None -> first answers. Raises ValueError for rounds < 0 and
    where a round loses a chain.
    """
    if rounds < 0:
        raise ValueError(f"rounds must not be negative, not {rounds}")
    answers = [attempt(None)]
    for _ in range(rounds):
        answers.append(attempt(answers[-1]))
        if len(answers[-1]) != len(answers[0]):
            raise ValueError(f"{len(answers[0])} chains went into a round, {len(answers[-1])} came out")
    return answers


def block_counts(right: ArrayLike, size: int) -> np.ndarray:
    """How many are right in each block of `size` samples of a problem, int64 [problems * blocks].

    right: bool [problems, n]; what does not fill a block is left out. Blocks make a law that is fitted to counts see
    what a curve up to N = size sees, at the low noise of all n samples. Raises ValueError for size outside 1..n.
    """
    marks = np.asarray(right, dtype=bool)
    if marks.ndim != 2 or not 1 <= size <= marks.shape[1]:
        raise ValueError(f"size must lie in 1..n of marks [problems, n], not {size} for shape {marks.shape}")
    blocks = marks.shape[1] // size
    return marks[:, : blocks * size].reshape(len(marks) * blocks, size).sum(1)


def fit_laws(right: ArrayLike, up_to: int = 8) -> dict[str, Geometric | BetaBinomial]:
    """Three laws of hit@N from what N <= up_to shows of samples right bool [problems, n].

    geometric: least squares of the unbiased curve, each point by its standard error over problems. beta-binomial and
    zero-inflated (a share of the problems is hopeless): maximum likelihood of counts in blocks of up_to samples.
    Raises ValueError for up_to < 2 or above n.
    """
    marks = np.asarray(right, dtype=bool)
    counts = block_counts(marks, up_to)
    return {
        "geometric": fit_curve(hit_curves(marks.sum(1), marks.shape[1], range(1, up_to + 1))),
        "beta-binomial": fit_beta_binomial(counts, up_to),
        "zero-inflated": fit_beta_binomial(counts, up_to, zero_inflated=True),
    }


def fit_curve(curves: ArrayLike) -> Geometric:
    """The geometric law through the mean of curves [problems, N], N = 1, 2, ...; any selection, any mode.

    A point counts by its standard error over problems, of at least a thousandth: that of a point without spread is 0.
    """
    table = np.asarray(curves, dtype=float)
    errors = table.std(0, ddof=1) / np.sqrt(len(table)) if len(table) > 1 else np.ones(table.shape[1])
    return fit_geometric(np.arange(1, table.shape[1] + 1), table.mean(0), np.maximum(errors, 1e-3))


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: Callable[[str], Answer],
    *,
    pilot: int = 4,
    most: int = 64,
    epsilon: float = 0.01,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[Answer, Allocation]:
    """The majority answer of a language model to one prompt, drawn until the next answer would gain at most epsilon.

    answer: text -> its canonical answer, or None. p is estimated from agreement, so that no verifier is needed; it says
    how sure the model is, which need not be how often it is right. Raises ValueError as `allocate` and the sampler do.
    """
    from common.generation.sampler import generate

    ids = tokenizer(prompt)["input_ids"]

    def draw(number: int) -> tuple[Answer, int]:
        out = generate(
            model, [ids], max_new_tokens, do_sample=True, temperature=temperature, seed=seed, streams=[number]
        )
        text = tokenizer.decode(out.tokens[0], skip_special_tokens=True)
        return answer(text), len(out.tokens[0])

    drawn = allocate(draw, pilot=pilot, most=most, epsilon=epsilon)
    return vote(drawn.answers), drawn
