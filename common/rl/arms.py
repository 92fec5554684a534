"""An arm of an experiment from its configuration: which functions the trainer gets, and on which problems.

A paper's configuration has a node `rl`, the settings of all arms, and a node `arms` with what each changes in it:

    rl:
      start: reasoner_mixed/start          # weights below cfg.reasoners
      chain: {steps: [2, 6]}               # the problems: labelled chains, new ones at each step
      prompts: 16                          # a step
      group_size: 8
      terms: {verifiable: {term: verifiable, weight: 1.0}}
      estimator: dr_grpo                   # a name in common/rl, or {_target_: papers.<slug>.method.<function>, ...}
      selector: keep_all
      surrogate: dapo
      aggregate: token_mean
      anchor: null                         # {every: 0, rate: 0.0}
      critic: null                         # its learning rate
      train: {steps: 20, max_new_tokens: 72, ...}     # common.rl.trainer.RLConfig
    arms:
      gppo: {surrogate: {_target_: papers.klear_reasoner.method.gppo, low: 0.2, high: 0.28}}

A `_target_` names a function that returns the part; with `_partial_: true` it is the part itself. Arms of one seed see
the same problems in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from common.reasoners import policies
from common.tasks import chain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from common.rl.rollout import Rollout
    from common.rl.trainer import Minibatch, Record
    from common.tasks.problem import Problem


@dataclass
class Arm:
    """What an arm trained: its policy, the trainer's record, and its settings."""

    policy: PreTrainedModel
    record: Record
    settings: DictConfig


def settings(cfg: DictConfig, name: str) -> DictConfig:
    """The settings of an arm. Raises ValueError for an unknown name, and for a key that `rl` does not have."""
    if name not in cfg.arms:
        raise ValueError(f"unknown arm {name!r}; known: {', '.join(cfg.arms)}")
    own = cfg.arms[name] or {}
    if unknown := [key for key in own if key not in cfg.rl]:
        raise ValueError(f"arm {name!r} changes {', '.join(unknown)}; the settings are: {', '.join(cfg.rl)}")
    # Without the structure, so that an arm can add a term to the reward.
    return cast("DictConfig", OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg.rl)), own))


def problems(of: DictConfig, seed: int, split: str, count: int) -> list[Problem]:
    return chain.generate(seed, count, tuple(of.chain.steps), split, style="concise")


def train_arm(
    cfg: DictConfig,
    name: str,
    seed: int,
    *,
    start: Path | None = None,
    inspect: Callable[[Minibatch], None] | None = None,
    seen: Callable[[Rollout, torch.Tensor, torch.Tensor], None] | None = None,
) -> Arm:
    """Trains an arm with one training seed; evaluated on `cfg.evaluation` at times. start: a folder of weights in the
    place of rl.start. inspect, seen: see `trainer.train` and `experience.Grouped`."""
    from common.models.hub import load_model
    from common.training.checkpoint import checkpoint_folder

    of = settings(cfg, name)
    origin = start or Path(cfg.reasoners) / of.start
    policy = load_model(origin, attention="eager").to(cfg.device)
    most = of.train.max_new_tokens
    test = problems(of, cfg.seed, "test", cfg.evaluation.problems)
    inputs = [origin, Path(__file__).parent]
    folder = checkpoint_folder(cfg.checkpoints, f"{name}-{seed}", [_plain(of), cfg.seed, seed], inputs)
    record = _train(
        cfg, of, policy, seed, seen, checkpoints=folder, inspect=inspect, told=_line(name, seed),
        evaluate=lambda model: evaluate(model, test, most, cfg.evaluation.samples, cfg.seed),
    )  # fmt: skip
    return Arm(policy, record, of)


def one_step(cfg: DictConfig, name: str, policy: PreTrainedModel) -> Record:
    """The first step of an arm, without evaluation and checkpoints: for timing. The policy is changed."""
    of = cast("DictConfig", OmegaConf.merge(settings(cfg, name), {"train": {"steps": 1}}))
    return _train(cfg, of, policy, 0, None)


def _train(
    cfg: DictConfig,
    of: DictConfig,
    policy: PreTrainedModel,
    seed: int,
    seen: Callable[[Rollout, torch.Tensor, torch.Tensor], None] | None,
    **settings: Any,
) -> Record:
    """The trainer with the parts that the settings name."""
    from common.rl import objectives, selectors
    from common.rl.advantages import ESTIMATORS
    from common.rl.anchor import Anchor
    from common.rl.experience import Critic, Grouped
    from common.rl.trainer import RLConfig, train

    words = policies.tokenizer()
    config = RLConfig(seed=seed, **_plain(of.train))
    drawn = problems(of, cfg.seed + 1000 * (seed + 1), "train", of.prompts * config.steps)
    anchor = Anchor(policy, **_plain(of.anchor)) if of.anchor else None
    critic = Critic(policy, of.critic, seed) if of.critic else None
    collect = Grouped(
        words, lambda step: drawn[of.prompts * step : of.prompts * (step + 1)], chain.verify, of.group_size,
        config.max_new_tokens, [words.convert_tokens_to_ids(policies.ANSWER_END)], terms(of.terms),
        part(of.estimator, ESTIMATORS), part(of.selector, selectors.SELECTORS), config.temperature, seed, critic,
        anchor, config.kl if config.kl_in_reward else 0.0, seen,
    )  # fmt: skip
    surrogate, aggregate = part(of.surrogate, objectives.OBJECTIVES), part(of.aggregate, objectives.AGGREGATIONS)
    return train(policy, collect, surrogate, aggregate, config, anchor=anchor, critic=critic, **settings)


def evaluate(
    policy: PreTrainedModel, test: Sequence[Problem], max_new_tokens: int, samples: int, seed: int
) -> dict[str, float]:
    """Accuracy and length of answers sampled at temperature 1; length_all counts unfinished answers at the limit."""
    from common.rl.rollout import correct, sample

    words = policies.tokenizer()
    end = words.convert_tokens_to_ids(policies.ANSWER_END)
    rollout, _ = sample(policy, words, test, samples, max_new_tokens, stop_tokens=[end], seed=seed, step=10**6)
    return {
        "accuracy": float(correct(rollout, chain.verify).mean()),
        "length": float(rollout.length.mean()),
        "finished": float(rollout.finished.float().mean()),
    }


def part(given: Any, known: Mapping[str, Any]) -> Any:
    """A function by its name, or by a node with a `_target_`. Raises ValueError that lists the known names."""
    if isinstance(given, str):
        if given not in known:
            raise ValueError(f"unknown name {given!r}; known: {', '.join(known)}, or a node with a _target_")
        return known[given]
    import hydra

    return hydra.utils.instantiate(given)


def terms(of: DictConfig) -> dict[str, Any]:
    """The weighted terms of a reward from {name: {term, weight, only_if_correct}}, without those of weight 0."""
    from common.rl import rewards

    return {
        str(name): rewards.Weighted(
            part(node.term, rewards.TERMS),
            rewards.constant(node.get("weight", 1.0)),
            node.get("only_if_correct", False),
        )
        for name, node in of.items()
        if node.get("weight", 1.0)
    }


def _line(name: str, seed: int) -> Callable[[dict[str, float]], None]:
    """A line of progress at every fifth step."""

    def tell(row: dict[str, float]) -> None:
        if row["step"] % 5 == 0:
            print(
                f"{name}, seed {seed}, step {row['step']}: reward {row['reward']:.3f}, accuracy {row['accuracy']:.3f}, "
                f"{row['length_mean']:.1f} tokens", flush=True,
            )  # fmt: skip

    return tell


def _plain(node: Any) -> dict[str, Any]:
    return dict(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True)))
