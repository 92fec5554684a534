"""Direct preference optimisation (Rafailov et al. 2023) on pairs of answers, and the linear merge of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common.rl.rollout import log_probs, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt, of the answer to be preferred and of the other. tag: the kind of pair, for the record."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    tag: str = ""
    weight: float = 1.0


def pair_log_probs(model: PreTrainedModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """Summed log-probabilities of the answers, float32 [pairs, 2], the chosen one first."""
    prompts = [pair.prompt for pair in pairs]
    ids, response = padded(prompts * 2, [*(p.chosen for p in pairs), *(p.rejected for p in pairs)])
    logp, _ = log_probs(model, ids.to(model.device), response.to(model.device))
    return logp.sum(1).view(2, -1).T


def dpo_loss(
    logp: torch.Tensor, reference: torch.Tensor, beta: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of -log sigmoid(beta * margin), the margin being how much more than the reference the policy prefers the
    chosen answer. logp, reference: [pairs, 2]. Raises ValueError for beta <= 0."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    gain = logp - reference
    losses = -F.logsigmoid(beta * (gain[:, 0] - gain[:, 1]))
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def train_dpo(
    policy: PreTrainedModel, pairs: Sequence[Pair], *, beta: float, learning_rate: float, epochs: int = 1,
    rows: int = 32, seed: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains `policy` in place; the policy of before is the reference. Returns a row an optimiser step: loss, margin
    and the share of pairs whose chosen answer is preferred, also by tag. Raises ValueError without pairs."""
    if not pairs:
        raise ValueError("there are no pairs to learn from")
    policy.eval()
    with torch.no_grad():
        parts = [pairs[i : i + rows] for i in range(0, len(pairs), rows)]
        reference = torch.cat([pair_log_probs(policy, part) for part in parts])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    record = []
    for epoch in range(epochs):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for index in order.split(rows):
            batch = [pairs[i] for i in index.tolist()]
            logp = pair_log_probs(policy, batch)
            weight = torch.tensor([pair.weight for pair in batch], device=logp.device)
            loss = dpo_loss(logp, reference[index], beta, weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            gain = (logp - reference[index]).detach()
            margin = beta * (gain[:, 0] - gain[:, 1])
            row = {
                "loss": float(loss.detach()),
                "margin": float(margin.mean()),
                "accuracy": float((margin > 0).float().mean()),
            }
            for tag in sorted({pair.tag for pair in batch} - {""}):
                mine = torch.tensor([pair.tag == tag for pair in batch])
                row[f"accuracy {tag}"] = float((margin[mine] > 0).float().mean())
            record.append(row)
    return record


def merge_linear(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """alpha * one + (1 - alpha) * other, weight by weight; 1 and 0 give back one of them bit for bit.

    Raises ValueError for weights of other names or shapes, and for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    if one.keys() != other.keys():
        raise ValueError(f"the models differ in their weights: {sorted(one.keys() ^ other.keys())[:4]}")
    merged = {}
    for name, weights in one.items():
        if weights.shape != other[name].shape:
            raise ValueError(f"{name} has shapes {tuple(weights.shape)} and {tuple(other[name].shape)}")
        merged[name] = other[name].lerp(weights, alpha) if weights.is_floating_point() else weights.clone()
    return merged
