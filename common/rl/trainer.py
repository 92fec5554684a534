"""The training loop of every policy: experience, update, anchor, record; and evaluation and checkpoints at times.

What differs between papers comes in as functions: where experience comes from (`experience.grouped` for most), the
surrogate, the aggregation. Nothing depends on the clock, and a step's random numbers are functions of (seed, step), so
that two arms with one seed see the same problems and a resumed run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.rl.anchor import Anchor
from common.rl.experience import Critic, Experience
from common.rl.objectives import KL, Aggregation, Surrogate, ratio_of
from common.rl.rollout import log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_RATIO = 1e4  # of a token's probabilities after and before the update: beyond, the policy has exploded
CONSTANT_STEPS = 10  # steps in a row without any difference in any group before a warning


@dataclass(frozen=True)
class RLConfig:
    """steps: rollouts. epochs, minibatches: of a rollout's answers; one of each is exactly on-policy. temperature: of
    the rollouts, and therefore of the ratios. max_new_tokens: of an answer. entropy, kl, sft: weights of the entropy
    bonus, of the divergence from the anchor, and of the likelihood of right answers. kl_estimator: k1, k2 or k3.
    kl_in_reward: the divergence is subtracted from the reward (by `Grouped`, of the whole answer) and not added to the
    loss.
    """

    steps: int
    max_new_tokens: int
    learning_rate: float = 1e-4
    epochs: int = 1
    minibatches: int = 1
    temperature: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 3
    clip_norm: float = 1.0
    entropy: float = 0.0
    kl: float = 0.0
    kl_estimator: str = "k3"
    kl_in_reward: bool = False
    sft: float = 0.0
    evaluate_every: int = 0
    checkpoint_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "max_new_tokens", "learning_rate", "epochs", "minibatches", "temperature", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("entropy", "kl", "sft", "weight_decay", "warmup_steps", "evaluate_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.kl_estimator not in KL:
            raise ValueError(f"unknown kl_estimator {self.kl_estimator!r}; known: {', '.join(KL)}")


@dataclass
class Record:
    """rows: one dict a step. evaluations: one dict an evaluation, `step` and `tokens_generated` (so far) first."""

    step: int = 0
    tokens: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    diverged: bool = False


@dataclass(frozen=True)
class Minibatch:
    """What an optimiser step saw: ratio, advantage, entropy, float32 [rows, T]; mask, bool [rows, T], trained tokens.
    step and index count rollouts and the optimiser steps of one rollout, from 0."""

    step: int
    index: int
    ratio: torch.Tensor
    advantage: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor


Collect = Callable[["PreTrainedModel", int], Experience]
Evaluate = Callable[["PreTrainedModel"], Mapping[str, float]]


def train(
    policy: PreTrainedModel,
    collect: Collect,
    surrogate: Surrogate,
    aggregate: Aggregation,
    config: RLConfig,
    *,
    anchor: Anchor | None = None,
    critic: Critic | None = None,
    evaluate: Evaluate | None = None,
    checkpoints: Path | None = None,
    told: Callable[[dict[str, float]], None] | None = None,
    inspect: Callable[[Minibatch], None] | None = None,
) -> Record:
    """Trains `policy` in place; it ends in evaluation mode.

    collect: (policy, step) -> experience. evaluate: called before the first step, every `evaluate_every` steps and at
    the end; an `accuracy` in it that falls below half of the first one stops the arm as diverged. checkpoints: folder
    that holds checkpoint.pt, from which training goes on. told: gets the row of each step, for progress.
    inspect: gets each minibatch before its step.
    Raises ValueError for a KL weight without an anchor, and FloatingPointError, naming the step, for a loss, a gradient
    or a ratio out of bounds; the checkpoint of before stays.
    """
    if config.kl and anchor is None:
        raise ValueError(f"kl={config.kl} needs an anchor")
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    parts = {"policy": policy, "optimizer": optimizer}
    parts |= {"anchor": anchor.model} if anchor else {}
    parts |= {"critic": critic.model, "critic_optimizer": critic.optimizer} if critic else {}
    file = None if checkpoints is None else checkpoints / "checkpoint.pt"
    record = Record()
    if file is not None and file.exists():
        record = _load(file, parts, config)
    policy.eval()  # no dropout: the ratio of an unchanged policy is to be 1
    if evaluate is not None and not record.evaluations:
        record.evaluations.append({"step": 0, "tokens_generated": 0} | dict(evaluate(policy)))
    constant = 0
    while record.step < config.steps and not record.diverged:
        began = time.perf_counter()
        experience = collect(policy, record.step)
        collected = time.perf_counter()
        row = _update(policy, optimizer, experience, surrogate, aggregate, config, record.step, anchor, critic, inspect)
        record.step += 1
        record.tokens += experience.ledger.generated_tokens
        if anchor is not None:
            anchor.update(policy, record.step)
        row |= {
            "step": record.step, "tokens_generated": record.tokens,
            "seconds_rollout": collected - began, "seconds_update": time.perf_counter() - collected,
        }  # fmt: skip
        record.rows.append(row)
        constant = constant + 1 if row["frac_zero_adv_groups"] == 1 else 0
        if constant == CONSTANT_STEPS:
            warnings.warn(
                f"the reward was constant in every group for {CONSTANT_STEPS} steps up to step {record.step}, so "
                "nothing is learned: all problems are too easy or too hard, or the reward does not look at answers",
                stacklevel=2,
            )
        due = config.evaluate_every and record.step % config.evaluate_every == 0
        if evaluate is not None and (due or record.step == config.steps):
            found = dict(evaluate(policy))
            record.evaluations.append({"step": record.step, "tokens_generated": record.tokens} | found)
            record.diverged = found.get("accuracy", 0.0) < record.evaluations[0].get("accuracy", 0.0) / 2
        if told is not None:
            told(row)
        if file is not None and (record.step % config.checkpoint_every == 0 or record.step == config.steps):
            _save(file, parts, config, record)
    return record


def _update(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    of: Experience,
    surrogate: Surrogate,
    aggregate: Aggregation,
    config: RLConfig,
    step: int,
    anchor: Anchor | None,
    critic: Critic | None,
    inspect: Callable[[Minibatch], None] | None,
) -> dict[str, float]:
    """The optimiser steps of one rollout; returns its row of the record."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    kept = of.trained & of.kept[:, None]
    if not bool(kept.any()):
        warnings.warn(f"step {step + 1}: no token is left to train on; the policy stays as it is", stacklevel=3)
        return of.stats | dict.fromkeys(UPDATED, 0.0) | {"tokens_trained": 0.0}
    reference = None
    if anchor is not None and config.kl and not config.kl_in_reward:
        with torch.no_grad():
            reference, _ = log_probs(anchor.model, of.ids, of.response, config.temperature, of.layout)
    seen: list[dict[str, float]] = []
    for epoch in range(config.epochs):
        random = torch.Generator().manual_seed(_mixed(config.seed, step, epoch))
        candidates = kept.any(1).nonzero()[:, 0]
        order = candidates[torch.randperm(len(candidates), generator=random).to(candidates.device)]
        for rows in order.tensor_split(min(config.minibatches, len(order))):
            mask = kept[rows]
            layout = None if of.layout is None else of.layout.rows(rows)
            logp, entropy = log_probs(policy, of.ids[rows], of.response[rows], config.temperature, layout)
            ratio = ratio_of(logp.detach(), of.logp[rows])
            terms = {"entropy": entropy}
            if inspect is not None:
                inspect(Minibatch(step, len(seen), ratio, of.advantage[rows], entropy.detach(), mask))
            gain = surrogate(logp, of.logp[rows], of.advantage[rows]) + config.entropy * entropy
            loss = -aggregate(gain, mask, config.max_new_tokens)
            if reference is not None:
                terms["kl_anchor"] = KL[config.kl_estimator](logp, reference[rows])
                loss = loss + config.kl * aggregate(terms["kl_anchor"], mask, config.max_new_tokens)
            if config.sft:
                right = mask & (of.right[rows, None] > 0)
                loss = loss - config.sft * (logp * right).sum() / right.sum().clamp(min=1)
            loss.backward()
            value = float(loss.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip_norm))
            largest = float((ratio * mask).max())
            if not (math.isfinite(value) and math.isfinite(norm)) or largest > LARGEST_RATIO:
                optimizer.zero_grad()
                raise FloatingPointError(
                    f"step {step + 1}: loss {value}, gradient norm {norm}, largest ratio {largest:.3g}; try a "
                    "lower learning rate or fewer minibatches"
                )
            optimizer.step()
            optimizer.zero_grad()
            if critic is not None and of.returns is not None:
                critic.update(of.ids[rows], mask, of.returns[rows])
            seen.append(_measured(ratio, of.advantage[rows], mask, terms) | {"grad_norm": norm, "loss": value})
    row = {name: sum(one[name] for one in seen) / len(seen) for name in seen[0]}
    row["ratio_max"] = max(one["ratio_max"] for one in seen)
    return of.stats | dict.fromkeys(UPDATED, 0.0) | row | {"tokens_trained": float(kept.sum())}


UPDATED = ("loss", "grad_norm", "entropy", "kl_anchor", "ratio_max", "clip_frac_low", "clip_frac_high")


@torch.no_grad()
def _measured(
    ratio: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor, terms: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Means over the trained tokens; clip fractions count what DAPO's 0.2 and 0.28 cut, whatever the surrogate."""
    count = mask.sum().clamp(min=1)
    low, high = (ratio < 0.8) & (advantage < 0), (ratio > 1.28) & (advantage > 0)
    return {
        **{name: float((value * mask).sum() / count) for name, value in terms.items()},
        "ratio_max": float((ratio * mask).max()),
        "clip_frac_low": float((low & mask).sum() / count),
        "clip_frac_high": float((high & mask).sum() / count),
    }


def _mixed(*numbers: int) -> int:
    """A seed for torch from several numbers."""
    from common.generation.random import keys

    return int(keys(*numbers)[0] >> 1)


def _save(file: Path, parts: Mapping[str, Any], config: RLConfig, record: Record) -> None:
    """Writes beside the file and renames, so that the file is always whole."""
    content = {name: part.state_dict() for name, part in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    torch.save(content | {"config": asdict(config), "record": asdict(record)}, partial)
    partial.replace(file)


def _load(file: Path, parts: Mapping[str, Any], config: RLConfig) -> Record:
    content = torch.load(file, weights_only=True)
    wanted = asdict(config)
    if differing := [name for name in wanted if content["config"].get(name) != wanted[name]]:
        changes = ", ".join(f"{name}={content['config'].get(name)} there, {wanted[name]} here" for name in differing)
        raise ValueError(f"{file} is of other settings ({changes}); remove it or use another folder")
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return Record(**content["record"])
