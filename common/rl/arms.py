"""An arm of an experiment from its configuration: which functions the trainer gets, and on which problems.

A paper's configuration has a node `rl`, the settings of all arms, and a node `arms` with what each changes in it:

    rl:
      start: reasoner_mixed/start          # weights below cfg.reasoners
      task: {name: chain, steps: [2, 6]}   # the problems, new ones at each step; see common/rl/ground.py
      prompts: 16                          # a step
      group_size: 8
      terms: {verifiable: {term: verifiable, weight: 1.0}}
      estimator: dr_grpo                   # a name in common/rl, or {_target_: papers.<slug>.method.<function>, ...}
      selector: keep_all
      surrogate: dapo
      aggregate: token_mean
      anchor: null                         # {every: 0, rate: 0.0}
      critic: null                         # its learning rate
      forcing: null                        # answers at budgets: {budgets, answers, max_answer_tokens, delimiter,
                                           # cut_off, then, estimator: of the answers}; see common/rl/branches.py
      train: {steps: 20, max_new_tokens: 72, ...}     # common.rl.trainer.RLConfig
    arms:
      gppo: {surrogate: {_target_: papers.klear_reasoner.method.gppo, low: 0.2, high: 0.28}}
    headline: [gppo]                       # arms with all of cfg.seeds; the others have the first
    cut: []                                # arms that the profile has no time for

A `_target_` names a function that returns the part; with `_partial_: true` it is the part itself. Arms of one seed see
the same problems in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from common.rl.ground import Ground, ground

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.rl.branches import Forcing
    from common.rl.experience import Experience
    from common.rl.trainer import Minibatch, Record
    from common.tasks.problem import Problem

Rows = dict[str, list[dict[str, Any]]]


@dataclass
class Arm:
    """What an arm trained: its policy with its tokenizer, the trainer's record, and the settings."""

    policy: PreTrainedModel
    words: PreTrainedTokenizerFast
    record: Record
    settings: DictConfig


def settings(cfg: DictConfig, name: str) -> DictConfig:
    """The settings of an arm. Raises ValueError for an unknown name, and for a key that `rl` does not have."""
    if name not in cfg.arms:
        raise ValueError(f"unknown arm {name!r}; known: {', '.join(cfg.arms)}")
    if unknown := [key for key in cfg.arms[name] if key not in cfg.rl]:
        raise ValueError(f"arm {name!r} changes {', '.join(unknown)}; the settings are: {', '.join(cfg.rl)}")
    # Without the structure, so that an arm can add a term to the reward.
    usual, changes = (OmegaConf.create(OmegaConf.to_container(node, resolve=True)) for node in (cfg.rl, cfg.arms[name]))
    return cast("DictConfig", OmegaConf.merge(usual, changes))


def seeds(cfg: DictConfig, name: str) -> list[int]:
    """The training seeds of an arm in this profile."""
    if name in cfg.cut:
        return []
    return list(cfg.seeds if name in cfg.headline else cfg.seeds[:1])


def jobs(cfg: DictConfig) -> list[tuple[DictConfig, str, int]]:
    """(cfg, arm, seed) of all that is trained. Raises what `settings` raises, before any work is done."""
    for name in cfg.arms:
        settings(cfg, name)
    return [(cfg, name, seed) for name in cfg.arms for seed in seeds(cfg, name)]


def train_job(
    job: tuple[DictConfig, str, int],
    *,
    start: Path | None = None,
    inspect: Callable[[Minibatch], None] | None = None,
) -> Rows:
    """Trains an arm, saves its policy as cfg.out/<name>-<seed>, and returns the rows of its record: steps and
    evaluations."""
    from common.models.hub import save_model

    cfg, name, seed = job
    arm = train_arm(cfg, name, seed, start=start, inspect=inspect)
    folder = Path(cfg.out) / f"{name}-{seed}"
    save_model(arm.policy.cpu(), folder)
    arm.words.save_pretrained(folder)
    head = {"arm": name, "seed": seed}
    return {
        "steps": [head | row for row in arm.record.rows],
        "evaluations": [head | row for row in arm.record.evaluations],
    }


def write(cfg: DictConfig, found: Sequence[Rows], columns: Mapping[str, list[str]] | None = None) -> None:
    """A parquet file in cfg.out for each kind of rows. columns: of kinds that may have no rows."""
    import pandas as pd

    for kind in found[0]:
        rows = [row for part in found for row in part[kind]]
        frame = pd.DataFrame(rows, columns=None if rows else (columns or {})[kind])
        frame.to_parquet(Path(cfg.out) / f"{kind}.parquet", index=False)


def train_arm(
    cfg: DictConfig,
    name: str,
    seed: int,
    *,
    start: Path | None = None,
    inspect: Callable[[Minibatch], None] | None = None,
) -> Arm:
    """Trains an arm with one training seed; evaluated on `cfg.evaluation` at times. start: a folder of weights in the
    place of rl.start. inspect: see `trainer.train`."""
    from common.training.checkpoint import checkpoint_folder

    of = settings(cfg, name)
    on = ground(cfg, of, start)
    policy = on.load()
    test = on.problems(cfg.seed, "test", cfg.evaluation.problems)
    inputs = [Path(__file__).parent, *([on.origin] if Path(on.origin).exists() else [])]
    folder = checkpoint_folder(cfg.checkpoints, f"{name}-{seed}", [_plain(of), cfg.seed, seed], inputs)
    record = _train(
        cfg, of, on, policy, seed, checkpoints=folder, inspect=inspect, told=_line(name, seed),
        evaluate=lambda model: evaluate(cfg, of, on, model, test),
    )  # fmt: skip
    return Arm(policy, on.words, record, of)


def one_step(cfg: DictConfig, name: str, policy: PreTrainedModel, *, start: Path | None = None) -> Record:
    """The first step of an arm, without evaluation and checkpoints: for timing. The policy is changed."""
    of = cast("DictConfig", OmegaConf.merge(settings(cfg, name), {"train": {"steps": 1}}))
    return _train(cfg, of, ground(cfg, of, start), policy, 0)


def _train(cfg: DictConfig, of: DictConfig, on: Ground, policy: PreTrainedModel, seed: int, **settings: Any) -> Record:
    """The trainer with the parts that the settings name."""
    from common.rl import objectives
    from common.rl.anchor import Anchor
    from common.rl.experience import Critic
    from common.rl.trainer import RLConfig, train

    config = RLConfig(seed=seed, **_plain(of.train))
    anchor = Anchor(policy, **_plain(of.anchor)) if of.anchor else None
    critic = Critic(policy, of.critic, seed) if of.critic else None
    collect = _collector(cfg, of, on, config, critic, anchor)
    surrogate, aggregate = part(of.surrogate, objectives.OBJECTIVES), part(of.aggregate, objectives.AGGREGATIONS)
    return train(policy, collect, surrogate, aggregate, config, anchor=anchor, critic=critic, **settings)


def _collector(
    cfg: DictConfig, of: DictConfig, on: Ground, config: Any, critic: Any, anchor: Any
) -> Callable[[PreTrainedModel, int], Experience]:
    from common.rl.advantages import ESTIMATORS
    from common.rl.branches import Branched
    from common.rl.experience import Grouped
    from common.rl.selectors import SELECTORS

    drawn = on.problems(cfg.seed + 1000 * (config.seed + 1), "train", of.prompts * config.steps)

    def problems_at(step: int) -> list[Problem]:
        return drawn[of.prompts * step : of.prompts * (step + 1)]

    if of.forcing is None:
        return Grouped(
            on.words, problems_at, on.verify, of.group_size, config.max_new_tokens, on.ends, terms(of.terms),
            part(of.estimator, ESTIMATORS), part(of.selector, SELECTORS), config.temperature, config.seed, critic,
            anchor, config.kl if config.kl_in_reward else 0.0,
        )  # fmt: skip
    if critic is not None or config.kl_in_reward or of.selector != "keep_all":
        raise ValueError("forced answers go with no critic, no kl_in_reward and selector=keep_all")
    return Branched(
        on.words, problems_at, on.verify, of.group_size, forcing(of, on), part(of.estimator, {}),
        part(of.forcing.estimator, {}), terms(of.terms), config.temperature, config.seed,
    )  # fmt: skip


def forcing(of: DictConfig, on: Ground, **changes: Any) -> Forcing:
    """How answers are forced, from settings. changes: such as other budgets, or one answer each, for evaluation.

    Raises ValueError for a delimiter that is not one token, and what `Forcing` raises."""
    from common.rl.branches import Forcing

    own = of.forcing
    delimiter = on.tokens(own.delimiter)
    if len(delimiter) != 1:
        raise ValueError(f"the delimiter {own.delimiter!r} must be one token, not {len(delimiter)}")
    usual: dict[str, Any] = {
        "budgets": tuple(own.budgets), "answers": own.answers, "max_answer_tokens": own.max_answer_tokens,
        "cut_off": tuple(on.tokens(own.cut_off)), "then": tuple(on.tokens(own.then)),
    }  # fmt: skip
    return Forcing(delimiter=delimiter[0], ends=on.ends, **(usual | changes))


def evaluate(
    cfg: DictConfig, of: DictConfig, on: Ground, policy: PreTrainedModel, test: Sequence[Problem]
) -> dict[str, float]:
    """Accuracy and length of answers sampled at temperature 1; unfinished answers count with their limit.

    With forced answers: the accuracy at the last budget, anytime: its mean over cfg.evaluation.budgets (one greedy
    answer at each), and the length of thoughts.
    """
    from common.rl.branches import force
    from common.rl.rollout import correct, sample

    samples, place = cfg.evaluation.samples, {"seed": cfg.seed, "step": 10**6}
    if of.forcing is None:
        rollout, _ = sample(
            policy, on.words, test, samples, of.train.max_new_tokens, stop_tokens=on.ends, score=False, **place
        )
        found = {"accuracy": float(correct(rollout, on.verify).mean())}
    else:
        how = forcing(of, on, budgets=tuple(cfg.evaluation.budgets), answers=1)
        rollout, _ = sample(
            policy, on.words, test, samples, how.budgets[-1], stop_tokens=[how.delimiter], score=False, **place
        )
        branches, _ = force(policy, on.words, rollout, how, on.verify, greedy=True, **place)
        found = {"accuracy": float(branches.right[:, -1].mean()), "anytime": float(branches.right.mean())}
    return found | {"length": float(rollout.length.mean()), "finished": float(rollout.finished.float().mean())}


def part(given: Any, known: Mapping[str, Any]) -> Any:
    """A function by its name, or by a node with a `_target_`. Raises ValueError that lists the known names."""
    if isinstance(given, str):
        if given not in known:
            raise ValueError(f"unknown name {given!r}; known: {', '.join([*known, 'a node with a _target_'])}")
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
