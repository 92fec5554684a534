"""The self-aligned reward: how much less surprising an answer is when the question is given.

    R_SA = max((ppl(a) - ppl(a|q)) / ppl(a), -1) = max(1 - exp(-mean_j v_j), -1)
    v_j  = log P(a_j | q, a_<j) - log P(a_j | a_<j)

ppl(a) has the question blanked and the rest of the prompt kept. Both perplexities are the current policy's own, over
all tokens of the answer, the end token included. Tokens that carry information from the question raise the mean; filler
and repetition, as likely without the question, dilute it (code: verl/utils/reward_score/efficiency_reward.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from common.rl.rewards import Term
from common.rl.rollout import Rollout, log_probs, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 20.0  # mean log-ratios are cut at this size: exp overflows in float32 at 89


def from_information(information: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """R_SA [N] from v [N, T] at the answer's tokens (mask bool [N, T], at least one a row)."""
    return _from_mean((information * mask).sum(1) / mask.sum(1))


def _from_mean(information: torch.Tensor) -> torch.Tensor:
    return (1 - torch.exp((-information).clamp(max=LARGEST))).clamp(min=-1.0)


def information(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], blank: Sequence[int]
) -> list[torch.Tensor]:
    """v of each answer's tokens, float32 [tokens of the answer]; two forward passes.

    prompts, answers: token ids. blank: ids of the prompt without a question, at least one. Raises ValueError for an
    empty blank prompt (nothing would predict the first token) and for an empty answer.
    """
    _check(blank, answers)
    found = []
    with torch.no_grad():
        for before in (prompts, [list(blank)] * len(answers)):
            ids, response = padded(before, answers)
            logp, _ = log_probs(model, ids.to(model.device), response.to(model.device))
            found.append([row[at] for row, at in zip(logp, response.to(model.device), strict=True)])
    return [given - alone for given, alone in zip(*found, strict=True)]


def score(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], blank: Sequence[int]
) -> torch.Tensor:
    """R_SA of answers to prompts, float32 [answers]; see `information`."""
    rows = information(model, prompts, answers, blank)
    return torch.stack([from_information(v[None], torch.ones_like(v[None]))[0] for v in rows])


def self_aligned(blank: Sequence[int]) -> Term:
    """The reward of a rollout: one forward pass more, for the answers without their questions.

    blank: as in `information`. The rollout's own log-probabilities serve for ppl(a|q), so rollouts are drawn at
    temperature 1.
    """
    _check(blank, [[0]])

    def term(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
        answers = [ids[at].tolist() for ids, at in zip(rollout.ids, rollout.response, strict=True)]
        ids, response = padded([list(blank)] * len(answers), answers)
        with torch.no_grad():
            alone, _ = log_probs(policy, ids.to(policy.device), response.to(policy.device))
        sums = rollout.logp.sum(1) - alone.sum(1)  # the two have the answer's tokens in different columns
        return _from_mean(sums / rollout.length)

    return term


def neg_log_perplexity(rollout: Rollout, right: torch.Tensor, policy: PreTrainedModel) -> torch.Tensor:
    """R_EM = -log ppl(a|q), the mean log-probability of the answer: self-confidence, the paper's ablation."""
    return rollout.logp.sum(1) / rollout.length


def _check(blank: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
    if not len(blank):
        raise ValueError("the blank prompt needs at least one token: nothing would predict the answer's first")
    if empty := [i for i, answer in enumerate(answers) if not len(answer)]:
        raise ValueError(f"answer {empty[0]} is empty; an answer has at least its end token")
