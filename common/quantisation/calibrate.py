"""Walking through a model block by block: the Hessian of every linear layer's inputs, then its replacement.

Blocks are calibrated in order, each on what the quantised blocks before it give: errors that are made are seen by those
who can still answer for them. Memory: the hidden states of the calibration tokens and one block's Hessians.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[str, nn.Linear, torch.Tensor], nn.Module]


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> decoder block of a Llama-like model. Raises ValueError for another architecture."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"no list of decoder blocks in a {type(model).__name__}: pass a Llama-like causal model")
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return {f"{prefix}.{i}": block for i, block in enumerate(layers)}


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Name -> linear layer of all decoder blocks, in order: embeddings, norms and the head are not among them.

    Raises ValueError for another architecture, and where the blocks have no nn.Linear (left: quantised already).
    """
    found = {
        f"{prefix}.{name}": module
        for prefix, block in blocks_of(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not found:
        raise ValueError(f"the blocks of this {type(model).__name__} have no nn.Linear: is it quantised already?")
    return found


class Hessian:
    """The running H = 2 X^T X / n over inputs X [n, channels] of a layer, float32 (float64 for float64 inputs)."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """x: [..., channels]."""
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        part = 2 * x.T @ x
        self.total = part if self.total is None else self.total + part
        self.rows += len(x)

    def mean(self, name: str) -> torch.Tensor:
        """H; ValueError that names the layer if no token reached it or its inputs were not finite."""
        if self.total is None:
            raise ValueError(f"no calibration token reached {name}: pass more or other calibration text")
        if not bool(torch.isfinite(self.total).all()):
            raise ValueError(f"the calibration gives {name} inputs that are not finite")
        return self.total / self.rows


@contextmanager
def watched(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Hessian]]:
    """Within the block, every forward adds the inputs of these layers to their Hessians."""
    found = {name: Hessian() for name in linears}

    def collect(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, args: found[name].add(args[0])

    handles = [module.register_forward_pre_hook(collect(name)) for name, module in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hessians(model: PreTrainedModel, calibration: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> H [channels, channels] of every linear layer of the model as it is; errors as `replace_linears`."""
    with watched(linears_of(model)) as found:
        for batch in _checked(model, calibration):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return {name: hessian.mean(name) for name, hessian in found.items()}


@torch.no_grad()
def replace_linears(model: PreTrainedModel, calibration: Iterable[torch.Tensor], replace: Replace) -> None:
    """Puts replace(name, layer, H) in the place of every linear layer of the decoder blocks, in place.

    calibration: token ids, int64 [rows, length] each, any lengths. Raises ValueError, before anything is replaced, for
    no calibration, ids outside the vocabulary and another architecture, and for inputs that are not finite.
    """
    batches, linears = _checked(model, calibration), linears_of(model)
    calls = [_call_of_first_block(model, batch) for batch in batches]
    for prefix, block in blocks_of(model).items():
        own = {name: layer for name, layer in linears.items() if name.startswith(f"{prefix}.")}
        with watched(own) as found:
            for hidden, others in calls:
                block(hidden, **others)
        for name, layer in own.items():
            block.set_submodule(name.removeprefix(f"{prefix}."), replace(name, layer, found[name].mean(name)))
        calls = [(_hidden(block(hidden, **others)), others) for hidden, others in calls]


class _Reached(Exception):
    """The first block was called: the model's forward need not go on."""


def _call_of_first_block(model: PreTrainedModel, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states and keyword arguments that the model hands to its first block, and to all others."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], kwargs))
        raise _Reached

    first = next(iter(blocks_of(model).values()))
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=batch, use_cache=False)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError(f"a {type(model).__name__} does not call its first block")


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _checked(model: PreTrainedModel, calibration: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    vocabulary = model.get_input_embeddings().num_embeddings
    batches = []
    for batch in calibration:
        if batch.dim() != 2 or batch.is_floating_point() or not batch.numel():
            raise ValueError(f"calibration batches are token ids [rows, length], not {batch.dtype} {list(batch.shape)}")
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"calibration ids go from {low} to {high}: the vocabulary is 0..{vocabulary - 1}")
        batches.append(batch.to(model.device))
    if not batches:
        raise ValueError("no calibration batch: pass token ids [rows, length]")
    return batches


def by_length(rows: Iterable[list[int]], most: int = 32) -> list[torch.Tensor]:
    """Token ids of texts -> batches of texts of one length, so that none is padded; at most `most` rows each."""
    groups: dict[int, list[list[int]]] = {}
    for row in rows:
        groups.setdefault(len(row), []).append(row)
    return [part for group in groups.values() for part in torch.tensor(group).split(most)]
