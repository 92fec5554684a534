"""Budget relative policy optimisation: rewards at every token budget, and a baseline from the trace itself.

A thought z is cut at budgets b_1 < ... < b_m, and r_j is the mean reward of the answers forced at b_j. With a prior P
over budgets the thought is worth J = sum_j P_j r_j. A token between b_{j-1} and b_j changes what comes from b_j on:

    R_j = sum_{i >= j} P_i r_i                                                                   its return
    V1_j = [sum_{i < j} lam^(j-i) r_i / sum_{i < j} lam^(j-i)] * sum_{i >= j} P_i                (0 for j = 1)
    V2_j = mean of R_j over the traces of the group
    A_j = R_j - [(j - 1) / m * V1_j + (m - j + 1) / m * V2_j]

V1 is what the trace has reached already, V2 what traces of this question reach; late in a trace the first knows more
(paper section 2.3; code: verl/trainer/ppo/brpo.py, where lam = 1/2 is a factor of 2). No deviation divides A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.rl.branches import ThoughtEstimator, check_budgets

PRIORS = ("base", "uniform", "linear")


def prior(name: str | Sequence[float], budgets: Sequence[int]) -> torch.Tensor:
    """P over budgets, float32 [m]: all weight on the last (base), equal (uniform), by the budget (linear), or as given.

    Raises ValueError for another name, budgets that do not rise, and given weights that are not m shares of 1.
    """
    check_budgets(budgets)
    b = torch.tensor(budgets, dtype=torch.float32)
    if not isinstance(name, str):
        given = torch.tensor(list(name), dtype=torch.float32)
        if len(given) != len(b) or bool((given < 0).any()) or abs(float(given.sum()) - 1) > 1e-6:
            raise ValueError(f"the prior {list(name)} must be {len(b)} shares that sum to 1, one a budget")
        return given
    if name not in PRIORS:
        raise ValueError(f"unknown prior {name!r}; known: {', '.join(PRIORS)}, or a list of shares")
    return {"base": (b == b[-1]).float(), "uniform": torch.full_like(b, 1 / len(b)), "linear": b / b.sum()}[name]


@dataclass(frozen=True)
class Parts:
    """returns R, and the baselines v1 and v2, float32 [P, G, m]; mixed: of both, as in BRPO."""

    returns: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor

    @property
    def mixed(self) -> torch.Tensor:
        m = self.returns.shape[2]
        late = torch.arange(m, dtype=self.returns.dtype, device=self.returns.device) / m
        return late * self.v1 + (1 - late) * self.v2


def parts(rewards: torch.Tensor, weights: torch.Tensor, lam: float = 0.5) -> Parts:
    """Returns and baselines from rewards [P, G, m] and a prior [m].

    Raises ValueError for other shapes and for lam outside (0, 1]."""
    if rewards.dim() != 3 or rewards.shape[2] != len(weights):
        raise ValueError(f"rewards must be [P, G, {len(weights)}], one a budget, not {list(rewards.shape)}")
    if not 0 < lam <= 1:
        raise ValueError(f"lam must lie in (0, 1], not {lam}")
    m = len(weights)
    weights = weights.to(rewards)
    left = weights.flip(0).cumsum(0).flip(0)  # sum_{i >= j} P_i
    returns = (weights * rewards).flip(2).cumsum(2).flip(2)
    j = torch.arange(m, device=rewards.device)
    recent = torch.where(j < j[:, None], lam ** (j[:, None] - j).to(rewards.dtype), 0.0)  # [j, i]
    reached = rewards @ (recent / recent.sum(1, keepdim=True).clamp(min=1e-30)).T
    return Parts(returns, reached * left, returns.mean(1, keepdim=True).expand_as(returns))


def brpo(prior: str | Sequence[float] = "uniform", lam: float = 0.5) -> ThoughtEstimator:
    """A_j = R_j minus the mixed baseline. prior: see the function of that name."""
    return _estimator(prior, lambda of: of.mixed, lam)


def v2_only(prior: str | Sequence[float] = "base") -> ThoughtEstimator:
    """A_j = R_j minus the group's mean: GRPO with the dense reward. One budget makes it Dr. GRPO."""
    return _estimator(prior, lambda of: of.v2)


def _estimator(
    given: str | Sequence[float], baseline: Callable[[Parts], torch.Tensor], lam: float = 0.5
) -> ThoughtEstimator:
    def estimate(rewards: torch.Tensor, budgets: Sequence[int]) -> torch.Tensor:
        if rewards.shape[1] < 2:
            raise ValueError(f"a group of {rewards.shape[1]} has no mean to compare with; group_size must be 2 or more")
        of = parts(rewards, prior(given, budgets), lam)
        return of.returns - baseline(of)

    return estimate


def decoupled(rewards: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    """The answering policy's own advantage: an answer against the mean of all answers from the same cut.

    rewards: [P, G, m, A]. cuts: [P, G, m]; a thought that ended early has the same cut at several budgets. All budgets
    weigh alike, whatever the prior of the thought. Raises ValueError for A = 1, which leaves nothing to compare.
    """
    if rewards.shape[3] < 2:
        raise ValueError("decoupled answers are compared with each other: answers must be 2 or more at each budget")
    same = (cuts[..., :, None] == cuts[..., None, :]).to(rewards.dtype)
    mean = (same @ rewards.mean(-1, keepdim=True)) / same.sum(-1, keepdim=True)
    return rewards - mean


def last_answer(rewards: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    """As in GRPO: the answer at the last budget alone, against the group's answers there; others are not trained.

    Raises ValueError for more than one answer a budget."""
    if rewards.shape[3] != 1:
        raise ValueError(f"GRPO has one answer to a thought; answers must be 1, not {rewards.shape[3]}")
    advantages = torch.zeros_like(rewards)
    advantages[:, :, -1] = rewards[:, :, -1] - rewards[:, :, -1].mean(1, keepdim=True)
    return advantages
