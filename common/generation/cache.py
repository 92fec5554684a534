"""A `transformers` forward over a preallocated KV cache: the path of every architecture without a lean forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from common.generation.lean import head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values [rows, heads, capacity, head_dim], filled from the left; attention sees only what is filled."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, head_dim)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.capacity:
            raise ValueError(f"{self.length} tokens do not fit a cache of {self.capacity}")
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows only (ascending indices [kept] int64)."""
        kept = []
        for old in (self.keys, self.values):
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[rows, :, : self.length]
            kept.append(new)
        self.keys, self.values = kept

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Rows target[i] become copies of rows source[i], int64 [copies]; no row is in both."""
        for cache in (self.keys, self.values):
            cache[target, :, : self.length] = cache[source, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class ModuleForward:
    """Calls the model's own forward; same interface as `common.generation.lean.LeanForward`."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        layers = [PreallocatedLayer(capacity) for _ in range(model.config.num_hidden_layers)]
        self.backbone, self.head = model.base_model, head_of(model)
        self.layers, self.cache = layers, Cache(layers=layers)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = self.backbone(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        )
        return self.head(out.last_hidden_state[:, -1])

    def keep_rows(self, rows: torch.Tensor) -> None:
        for layer in self.layers:
            layer.keep_rows(rows)

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for layer in self.layers:
            layer.copy_rows(source, target)
