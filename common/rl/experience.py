"""What a policy is trained on: answers with an advantage at every token, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.generation.ledger import Ledger
from common.rl import rewards
from common.rl.advantages import Estimator, dr_grpo, gae, whiten
from common.rl.objectives import KL
from common.rl.rollout import Layout, Rollout, Verify, correct, log_probs, sample
from common.rl.selectors import Selector, keep_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.rl.anchor import Anchor
    from common.tasks.problem import Problem


@dataclass(frozen=True)
class Experience:
    """ids, response, trained, logp: as in `Rollout`, [N, T]. advantage: float32 [N, T], 0 where nothing is trained.
    kept: bool [N], rows that are in the loss and in its denominator. right: float32 [N]. returns: float32 [N, T], for a
    critic. stats: for the record; `frac_zero_adv_groups` among them. layout: of rows that are not plain sequences.
    """

    ids: torch.Tensor
    response: torch.Tensor
    trained: torch.Tensor
    logp: torch.Tensor
    advantage: torch.Tensor
    kept: torch.Tensor
    right: torch.Tensor
    stats: dict[str, float]
    ledger: Ledger
    returns: torch.Tensor | None = None
    layout: Layout | None = None


class Critic:
    """What the policy is expected to earn, before each token: the policy's backbone with a scalar head, trained by the
    squared error, cut to the absolute error beyond 1 (Huber). learning_rate: of its own AdamW."""

    def __init__(self, policy: PreTrainedModel, learning_rate: float, seed: int = 0) -> None:
        from common.models.reward import reward_model

        self.model = reward_model(policy, seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)

    def values(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [N, T]: at t what is read before token t is known; 0 at the first."""
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        values = self.model.score(hidden)[..., 0]
        return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)

    def update(self, ids: torch.Tensor, mask: torch.Tensor, returns: torch.Tensor) -> None:
        loss = torch.nn.functional.huber_loss(self.values(ids)[mask], returns[mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Grouped:
    """Experience of the usual kind: groups of answers, a sum of rewards, a selector, an estimator; called with (policy,
    step). problems_at: step -> the problems of that step, the same for every arm of a seed.
    """

    words: PreTrainedTokenizerFast
    problems_at: Callable[[int], Sequence[Problem]]
    verify: Verify
    group_size: int
    max_new_tokens: int
    stop_tokens: Sequence[int]
    terms: Mapping[str, rewards.Weighted]
    estimator: Estimator = dr_grpo
    selector: Selector = keep_all
    temperature: float = 1.0
    seed: int = 0
    critic: Critic | None = None
    anchor: Anchor | None = None
    kl_in_reward: float = 0.0
    seen: Callable[[Rollout, torch.Tensor, torch.Tensor], None] | None = None

    def __call__(self, policy: PreTrainedModel, step: int) -> Experience:
        rollout, ledger = sample(
            policy, self.words, self.problems_at(step), self.group_size, self.max_new_tokens,
            stop_tokens=self.stop_tokens, temperature=self.temperature, seed=self.seed, step=step,
        )  # fmt: skip
        right = correct(rollout, self.verify)
        reward, values = rewards.total(self.terms, rollout, right, policy, step)
        if self.anchor is not None and self.kl_in_reward:
            with torch.no_grad():
                reference, _ = log_probs(self.anchor.model, rollout.ids, rollout.response, self.temperature)
            reward = reward - self.kl_in_reward * KL["k1"](rollout.logp, reference).sum(1)
        grouped = rollout.groups(reward)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        kept = self.selector(grouped, random).flatten()
        returns = None
        if self.critic is None:
            per_answer = self.estimator(grouped).flatten()
            advantage = per_answer[:, None] * rollout.trained
        else:
            with torch.no_grad():
                advantage, returns = gae(reward, self.critic.values(rollout.ids), rollout.trained)
            advantage = whiten(advantage, rollout.trained & kept[:, None])
        if self.seen is not None:
            self.seen(rollout, reward, advantage)
        spread = grouped.amax(1) - grouped.amin(1)
        stats = {
            **{f"reward/{name}": float(value.mean()) for name, value in values.items()},
            "reward": float(reward.mean()), "accuracy": float(right.mean()),
            "length_mean": float(rollout.length.mean()), "length_p90": float(rollout.length.quantile(0.9)),
            "finished": float(rollout.finished.float().mean()),
            "frac_zero_adv_groups": float((spread == 0).float().mean()),
        }  # fmt: skip
        return Experience(
            rollout.ids, rollout.response, rollout.trained, rollout.logp, advantage, kept, right, stats, ledger, returns
        )
