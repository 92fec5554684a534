"""Selectors: which answers of each group are trained on. A function (rewards [P, K], random) -> bool [P, K].

Advantages are computed on all K that were drawn, for a better baseline, and rows are selected afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Selector = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def keep_all(rewards: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


def drop_zero_variance(rewards: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Groups whose rewards are all equal leave the loss and its denominator; nothing is drawn in their place (DAPO's
    filter without its refill)."""
    varied = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    return varied.expand_as(rewards)


def oversample(keep: int, rule: str = "balanced") -> Selector:
    """Trains on `keep` of the K drawn. balanced: half of them the best, half the worst, ties broken at random; random:
    any. Raises ValueError for an unknown rule, an odd number to balance, and where fewer were drawn."""
    if rule not in ("balanced", "random"):
        raise ValueError(f"unknown rule {rule!r}; known: balanced, random")
    if keep < 1 or (rule == "balanced" and keep % 2):
        raise ValueError(f"keep={keep} must be positive, and even to be balanced")

    def select(rewards: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        drawn = rewards.shape[1]
        if drawn < keep:
            raise ValueError(f"{keep} of {drawn} answers cannot be kept")
        shuffled = torch.rand(rewards.shape, generator=random).to(rewards.device).argsort(1)
        order = shuffled
        if rule == "balanced":
            ranks = rewards.gather(1, shuffled).argsort(dim=1, stable=True)
            order = shuffled.gather(1, ranks)
            order = torch.cat([order[:, : keep // 2], order[:, drawn - keep // 2 :]], dim=1)
        return torch.zeros_like(rewards, dtype=torch.bool).scatter(1, order[:, :keep], True)

    return select


SELECTORS: dict[str, Selector] = {"keep_all": keep_all, "drop_zero_variance": drop_zero_variance}
