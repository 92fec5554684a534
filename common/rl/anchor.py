"""The reference policy that a KL term pulls towards: fixed, copied at times, or a moving average."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Anchor:
    """every: steps between copies of the policy (0: never). rate: of the moving average, theta_ref <- (1 - rate) *
    theta_ref + rate * theta after each step. With neither it is the initial policy for good.

    Raises ValueError for a rate outside [0, 1], a negative number of steps, and both at once.
    """

    def __init__(self, policy: PreTrainedModel, *, every: int = 0, rate: float = 0.0) -> None:
        if not 0 <= rate <= 1 or every < 0 or (rate and every):
            raise ValueError(f"an anchor has a rate in [0, 1] or a number of steps, not rate={rate}, every={every}")
        self.model = copy.deepcopy(policy).eval().requires_grad_(False)
        self.every, self.rate = every, rate

    @torch.no_grad()
    def update(self, policy: PreTrainedModel, step: int) -> None:
        """After the step-th step, counted from 1."""
        rate = 1.0 if self.every and step % self.every == 0 else self.rate
        if rate:
            for own, new in zip(self.model.parameters(), policy.parameters(), strict=True):
                own.lerp_(new, rate) if rate < 1 else own.copy_(new)
