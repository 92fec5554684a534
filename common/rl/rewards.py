"""Reward terms that none of the replicated papers introduced, and their weighted sum.

A term is a function (rollout, right, policy) -> float32 [N]; right: float32 [N], 1 for right answers; policy: the model
that gave the answers. A term compares answers within their group only, and no gradient flows through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.rl.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Term = Callable[[Rollout, torch.Tensor, "PreTrainedModel"], torch.Tensor]


@dataclass(frozen=True)
class Weighted:
    """A term of a sum of rewards. weight_at: step -> weight. only_if_correct: 0 for wrong answers."""

    term: Term
    weight_at: Callable[[int], float] = lambda step: 1.0
    only_if_correct: bool = False


def total(
    terms: Mapping[str, Weighted], rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel, step: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum [N] and the unweighted terms. Raises ValueError, naming the term, for a value that is not finite
    or of another shape."""
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, weighted in terms.items():
            value = weighted.term(rollout, right, policy)
            if value.shape != right.shape:
                raise ValueError(f"reward {name!r} has shape {tuple(value.shape)}, not {tuple(right.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"reward {name!r} is not finite for answer {int((~torch.isfinite(value)).nonzero()[0])}"
                )
            values[name] = value * right if weighted.only_if_correct else value
    summed = torch.zeros_like(right)
    for name, value in values.items():
        summed += terms[name].weight_at(step) * value
    return summed, values


def constant(weight: float) -> Callable[[int], float]:
    return lambda step: weight


def rising(weight: float, steps: int) -> Callable[[int], float]:
    """From 0 to `weight` within so many steps."""
    return lambda step: weight * min(1.0, step / steps)


def falling(weight: float, steps: int) -> Callable[[int], float]:
    """From `weight` to 0 within so many steps."""
    return lambda step: weight * max(0.0, 1.0 - step / steps)


def verifiable(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
    """1 for a right answer, else 0."""
    return right


def overlong(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
    """-1 for an answer that met the limit of tokens."""
    return -(~rollout.finished).float()


def o1_pruner(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
    """-clip((length - mean) / length, -1, 1), mean over the group (O1-Pruner; as released, also for wrong answers)."""
    length = rollout.groups(rollout.length)
    return -((length - length.mean(1, keepdim=True)) / length).clamp(-1, 1).flatten()


def _standardised(rollout: Rollout, right: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Length in deviations from the right answers of the group [P, G], and how many these are [P, 1]."""
    length, among = rollout.groups(rollout.length), rollout.groups(right)
    count = among.sum(1, keepdim=True)
    mean = (length * among).sum(1, keepdim=True) / count.clamp(min=1)
    deviation = (((length - mean) ** 2 * among).sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
    return (length - mean) / (deviation + epsilon), count


def efficient_reasoner(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
    """-2 (sigmoid(z) - 1/2) for right answers, z the length in standard deviations of the group's right answers; 0
    where fewer than two are right (Arora & Zanette 2025, as the self-aligned reward's baselines have it)."""
    z, count = _standardised(rollout, right, 1e-5)
    return -((2 * (z.sigmoid() - 0.5)) * rollout.groups(right) * (count >= 2)).flatten()


def length_penalty_l1(most: int) -> Term:
    """1 - 0.2 length / most for right answers: replaces `verifiable`."""
    return lambda rollout, right, policy: right * (1 - 0.2 * rollout.length / most)


def length_penalty_sigmoid(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
    """1 - 0.2 sigmoid(z) for right answers, z as in `efficient_reasoner`: replaces `verifiable`."""
    z, _ = _standardised(rollout, right, 1e-5)
    return right * (1 - 0.2 * z.sigmoid()).flatten()


TERMS: dict[str, Term] = {
    "verifiable": verifiable,
    "overlong": overlong,
    "o1_pruner": o1_pruner,
    "efficient_reasoner": efficient_reasoner,
    "length_penalty_sigmoid": length_penalty_sigmoid,
}
