"""Surrogate objectives, how they are summed over tokens, and estimators of the divergence from a reference.

A surrogate is a function (logp, logp_old, advantage) -> [N, T]: what is to be maximised at each token. Its gradient
weight F is defined by d surrogate = F * advantage * d logp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Surrogate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LOG_RATIO = 20.0  # log-ratios are cut at this size: beyond, exp overflows before any clipping is read


def ratio_of(logp: torch.Tensor, logp_old: torch.Tensor) -> torch.Tensor:
    """exp(logp - logp_old), its logarithm cut at +-LOG_RATIO."""
    return (logp - logp_old).clamp(-LOG_RATIO, LOG_RATIO).exp()


def check_range(low: float, high: float) -> None:
    """Raises ValueError for a clip range [1 - low, 1 + high] that is none."""
    if not 0 <= low < 1 or not high >= 0:
        raise ValueError(f"the clip range needs 0 <= low < 1 and high >= 0, not low={low}, high={high}")


def reinforce(logp: torch.Tensor, logp_old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """ratio * A, never clipped."""
    return ratio_of(logp, logp_old) * advantage


def clipped(low: float, high: float, dual: float | None = None) -> Surrogate:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) (Schulman et al. 2017; two ends: DAPO, Yu et al. 2025).

    dual: for A < 0 no less than dual * A (Ye et al. 2020), so that ratios above it have no gradient. Raises ValueError
    for a range that does not hold 1, and dual <= 1.
    """
    check_range(low, high)
    if dual is not None and not dual > 1:
        raise ValueError(f"dual must be above 1, not {dual}")

    def surrogate(logp: torch.Tensor, logp_old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        ratio = ratio_of(logp, logp_old)
        # Not torch.minimum, which halves the gradient where both sides are equal, that is everywhere in the range.
        worse = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
        value = torch.where(worse, ratio.detach().clamp(1 - low, 1 + high), ratio) * advantage
        if dual is None:
            return value
        return torch.where((advantage < 0) & (ratio > dual), dual * advantage, value)

    return surrogate


def cispo(low: float, high: float) -> Surrogate:
    """sg(clip(ratio, 1 - low, 1 + high)) * A * logp: weights are clipped, every token keeps a gradient (MiniMax)."""
    check_range(low, high)

    def surrogate(logp: torch.Tensor, logp_old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        return ratio_of(logp, logp_old).detach().clamp(1 - low, 1 + high) * advantage * logp

    return surrogate


OBJECTIVES: dict[str, Surrogate] = {
    "reinforce": reinforce,
    "ppo": clipped(0.2, 0.2),
    "dapo": clipped(0.2, 0.28),
    "cispo": cispo(0.2, 0.28),
}

# Each: (values [N, T], mask bool [N, T], most: the limit of tokens) -> scalar. A minibatch without a token gives 0.
Aggregation = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def token_mean(values: torch.Tensor, mask: torch.Tensor, most: int) -> torch.Tensor:
    """All tokens count alike, so that long answers weigh more."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def seq_mean_token_mean(values: torch.Tensor, mask: torch.Tensor, most: int) -> torch.Tensor:
    """All answers count alike, so that a token of a long answer weighs less."""
    rows = (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return rows.sum() / mask.any(1).sum().clamp(min=1)


def seq_mean_token_sum(values: torch.Tensor, mask: torch.Tensor, most: int) -> torch.Tensor:
    return (values * mask).sum() / mask.any(1).sum().clamp(min=1)


def seq_mean_token_sum_norm(values: torch.Tensor, mask: torch.Tensor, most: int) -> torch.Tensor:
    """As before, over a constant: the gradient's direction does not depend on lengths (Dr. GRPO)."""
    return seq_mean_token_sum(values, mask, most) / most


AGGREGATIONS: dict[str, Aggregation] = {
    f.__name__: f for f in (token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm)
}


def kl_k1(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """logp - logp_ref: unbiased, either sign (Schulman, "Approximating KL divergence", 2020; so the next two)."""
    return logp - logp_ref


def kl_k2(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """Half its square: biased, never negative."""
    return (logp - logp_ref) ** 2 / 2


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """exp(-k1) - 1 + k1: unbiased, never negative."""
    return torch.expm1(logp_ref - logp) + logp - logp_ref


KL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
