"""Batches as functions of the step: a resumed run sees the very batches that it would have seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

IGNORED = -100  # label of positions without a loss, as in transformers and torch.nn.functional.cross_entropy

Batches = Callable[[int], list["Batch"]]


@dataclass
class Batch:
    """input_ids, labels: int64 [rows, length]; labels are not shifted, IGNORED where there is no loss."""

    input_ids: torch.Tensor
    labels: torch.Tensor


@dataclass
class Example:
    """ids: tokens of one text. prompt_tokens: how many of them, from the start, carry no loss."""

    ids: list[int]
    prompt_tokens: int = 0


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pads on the right; causal attention needs no mask for that. Raises ValueError for an empty list."""
    if not examples:
        raise ValueError("a batch needs at least one example")
    length = max(len(example.ids) for example in examples)
    ids = np.full((len(examples), length), pad_id)
    labels = np.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        start, end = example.prompt_tokens, len(example.ids)
        ids[row, :end] = example.ids
        labels[row, start:end] = ids[row, start:end]
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


def bucketed(
    examples: Sequence[Example], rows: int, *, seed: int = 0, pad_id: int = 0, pool: int = 20
) -> Callable[[int], Batch]:
    """Batches of examples of similar lengths: step -> Batch, a new order each epoch.

    An epoch shuffles the examples, sorts each pool of `pool` batches by length, and shuffles the batches. The last few
    examples that do not fill a batch are left out of that epoch. Raises ValueError for fewer examples than rows.
    """
    if len(examples) < rows:
        raise ValueError(f"{len(examples)} examples do not fill a batch of {rows} rows")
    per_epoch = len(examples) // rows
    lengths = np.array([len(example.ids) for example in examples])
    orders: dict[int, np.ndarray] = {}

    def order_of(epoch: int) -> np.ndarray:
        if epoch not in orders:
            random = np.random.default_rng([seed, epoch])
            shuffled = random.permutation(len(examples))[: per_epoch * rows]
            pools = np.array_split(shuffled, range(pool * rows, len(shuffled), pool * rows))
            by_length = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in pools])
            orders.clear()
            orders[epoch] = random.permutation(by_length.reshape(per_epoch, rows))
        return orders[epoch]

    def batch(step: int) -> Batch:
        epoch, index = divmod(step, per_epoch)
        return collate([examples[i] for i in order_of(epoch)[index]], pad_id)

    return batch


def pack(texts: Sequence[Sequence[int]], end_id: int) -> torch.Tensor:
    """One stream of tokens, int64 [n], the texts one after the other with `end_id` after each."""
    return torch.cat([torch.tensor([*text, end_id]) for text in texts])


def windows(stream: torch.Tensor, rows: int, length: int, *, seed: int = 0) -> Callable[[int], Batch]:
    """Batches of windows that start anywhere in a packed stream: step -> Batch, loss on every token but the first.

    Raises ValueError for a stream that is not longer than a window.
    """
    if len(stream) <= length:
        raise ValueError(f"a stream of {len(stream)} tokens holds no windows of {length}")

    def batch(step: int) -> Batch:
        starts = np.random.default_rng([seed, step]).integers(len(stream) - length, size=rows)
        ids = stream[torch.from_numpy(starts)[:, None] + torch.arange(length)]
        return Batch(ids, ids)

    return batch


def repeats(vocabulary: int, rows: int, length: int, *, first: int = 0, seed: int = 0) -> Callable[[int], Batch]:
    """Batches of random tokens first..vocabulary-1 in which a stretch comes back: step -> Batch, loss on the copy.

    Teaches looking back for what came after (induction) within some hundred steps, which text alone does far later.
    Length and distance vary, so that counting back is no way out. Raises ValueError for fewer than 4 tokens a row.
    """
    if length < 4:
        raise ValueError(f"a stretch cannot come back within {length} tokens")

    def batch(step: int) -> Batch:
        random = np.random.default_rng([seed, step])
        ids = random.integers(first, vocabulary, size=(rows, length))
        labels = np.full_like(ids, IGNORED)
        for row in range(rows):
            size = random.integers(length // 4, length // 2 + 1)
            source = random.integers(length - 2 * size + 1)
            copy = random.integers(source + size, length - size + 1)
            ids[row, copy : copy + size] = ids[row, source : source + size]
            labels[row, copy + 1 : copy + size] = ids[row, copy + 1 : copy + size]
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))

    return batch


def joined(*sources: Callable[[int], Batch], pad_id: int = 0) -> Callable[[int], Batch]:
    """One batch with the rows of all sources, padded to the longest: for sources of similar lengths."""

    def batch(step: int) -> Batch:
        parts = [source(step) for source in sources]
        length = max(part.input_ids.shape[1] for part in parts)
        ids = [F.pad(part.input_ids, (0, length - part.input_ids.shape[1]), value=pad_id) for part in parts]
        labels = [F.pad(part.labels, (0, length - part.labels.shape[1]), value=IGNORED) for part in parts]
        return Batch(torch.cat(ids), torch.cat(labels))

    return batch


def mixture(*sources: Callable[[int], Batch]) -> Batches:
    """Every step sees one batch of each source; none is padded to another's length."""
    return lambda step: [source(step) for source in sources]
