"""Advantage estimators: how much better an answer, or a token, is than what was to be expected.

An estimator of groups is a function of rewards, float32 [P, G], and returns advantages [P, G]; a weight of 0 and an
advantage of 0 are the same, since the policy gradient is linear in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Estimator = Callable[[torch.Tensor], torch.Tensor]


def grpo(rewards: torch.Tensor, ddof: int = 0) -> torch.Tensor:
    """(R - mean) / (std + 1e-6) of the group (Shao et al. 2024). ddof: 1 is the sample's std."""
    _several(rewards, "grpo")
    deviation = rewards.std(1, keepdim=True, correction=ddof)
    return (rewards - rewards.mean(1, keepdim=True)) / (deviation + 1e-6)


def dr_grpo(rewards: torch.Tensor) -> torch.Tensor:
    """R - mean of the group (Liu et al. 2025)."""
    _several(rewards, "dr_grpo")
    return rewards - rewards.mean(1, keepdim=True)


def rloo(rewards: torch.Tensor) -> torch.Tensor:
    """R - mean of the others of the group (Ahmadian et al. 2024)."""
    _several(rewards, "rloo")
    size = rewards.shape[1]
    return size / (size - 1) * (rewards - rewards.mean(1, keepdim=True))


ESTIMATORS: dict[str, Estimator] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def _several(rewards: torch.Tensor, name: str) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"{name} compares the answers of a group: it needs rewards [P, G >= 2], not {rewards.shape}")


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): advantages and returns, both [N, T], 0 off the mask.

    rewards: [N], of the last token of the mask. values: [N, T], what a critic expects before each token. mask: bool
    [N, T], True on one stretch of each row.
    """
    advantages = torch.zeros_like(values)
    after = torch.zeros_like(rewards)  # the advantage of the next token
    worth = torch.zeros_like(rewards)  # the value before it; 0 after the last one
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    for t in reversed(range(values.shape[1])):
        on = mask[:, t]
        delta = rewards * last[:, t] + gamma * worth - values[:, t]
        after = torch.where(on, delta + gamma * lam * after, after)
        worth = torch.where(on, values[:, t], worth)
        advantages[:, t] = after * on
    return advantages, (advantages + values) * mask


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """To mean 0 and deviation 1 over the mask; 0 elsewhere."""
    of = advantages[mask]
    return torch.where(mask, (advantages - of.mean()) / (of.std(correction=0) + 1e-8), torch.zeros_like(advantages))
