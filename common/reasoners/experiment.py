"""The stages of the reasoners: three sizes to search with, three styles to train further, two reward models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def reasoner_small(cfg: DictConfig) -> None:
    """0.1M parameters, chains and countdown."""
    _policy(cfg)


def reasoner_base(cfg: DictConfig) -> None:
    """0.3M parameters, chains and countdown; the reward models learn from its answers."""
    _policy(cfg)


def reasoner_large(cfg: DictConfig) -> None:
    """0.8M parameters, chains and countdown."""
    _policy(cfg)


def reasoner_concise(cfg: DictConfig) -> None:
    """Base size, chains one operation at a time; a start for reinforcement learning."""
    _policy(cfg)


def reasoner_mixed(cfg: DictConfig) -> None:
    """Base size, chains in strides of 1 to 3 with checks, corrections and padding; a start likewise."""
    _policy(cfg)


def reasoner_backtrack(cfg: DictConfig) -> None:
    """Base size, chains with corrections and countdown with steps taken back; a start likewise."""
    _policy(cfg)


def prm(cfg: DictConfig) -> None:
    """The process reward model, with the labelled prefixes that it learns from."""
    from common.reasoners import rewards

    if not _hub(cfg):
        rewards.train_prm(cfg)


def orm(cfg: DictConfig) -> None:
    """The outcome reward model, on the finished answers among the same labels."""
    from common.reasoners import rewards

    if not _hub(cfg):
        rewards.train_orm(cfg)


def _policy(cfg: DictConfig) -> None:
    from common.reasoners import policies

    if not _hub(cfg):
        policies.train(cfg)


def _hub(cfg: DictConfig) -> bool:
    """Records a checkpoint of the hub instead of a trained model."""
    if hub_id := cfg.hub_ids[cfg.stage]:
        Path(cfg.out, "model.json").write_text(json.dumps({"hub_id": hub_id}) + "\n")
    return bool(hub_id)
