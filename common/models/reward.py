"""Reward models: a sequence classifier with one label on the backbone of a language model, and its training loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common.training.data import IGNORED, Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel


def reward_model(language_model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier with one label: a copy of the language model's backbone and a head that starts at zero.

    A head of zeros gives every prefix the score 1/2 at first, whatever the seed; seed is for torch's generator only.
    """
    from transformers import AutoModelForSequenceClassification

    settings = {k: v for k, v in language_model.config.to_dict().items() if k not in ("id2label", "label2id")}
    config = type(language_model.config)(**settings, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=language_model.dtype, attn_implementation=language_model.config._attn_implementation
        )
    model.base_model.load_state_dict(language_model.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model.to(language_model.device).eval()


def load_reward_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A reward model from a folder in hub format; evaluation mode, CPU. Raises FileNotFoundError if it is none."""
    from transformers import AutoModelForSequenceClassification

    from common.models.hub import check_source, no_bars

    check_source(source, False, ["config.json"], "*.safetensors")
    with no_bars():
        model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    return model.eval()


def step_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Sum of binary cross entropies against success rates in [0, 1] at the labelled positions (labels float)."""
    hidden = model.base_model(batch.input_ids, use_cache=False).last_hidden_state
    labelled = batch.labels != IGNORED
    logits = model.score(hidden[labelled])[:, 0]
    return F.binary_cross_entropy_with_logits(logits.float(), batch.labels[labelled], reduction="sum")


def labelled_batches(
    rows: Sequence[tuple[list[int], dict[int, float]]], size: int, *, seed: int = 0
) -> Callable[[int], list[Batch]]:
    """step -> one batch of `size` rows (ids, {position: success rate}), padded on the right, in a new order each epoch.

    Raises ValueError for fewer rows than a batch holds.
    """
    from common.training.data import Example, bucketed

    def labels(batch: Batch, which: torch.Tensor) -> torch.Tensor:
        table = torch.full(batch.input_ids.shape, float(IGNORED))
        for row, index in enumerate(which.tolist()):
            for position, rate in rows[index][1].items():
                table[row, position] = rate
        return table

    # The index of a row rides in front of its ids, so that the order of `bucketed` serves for the labels too.
    order = bucketed([Example([index, *ids]) for index, (ids, _) in enumerate(rows)], size, seed=seed)

    def batch(step: int) -> list[Batch]:
        carried = order(step)
        ids = Batch(carried.input_ids[:, 1:].contiguous(), carried.labels[:, 1:])
        return [Batch(ids.input_ids, labels(ids, carried.input_ids[:, 0]))]

    return batch
