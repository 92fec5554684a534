"""A function in the place of every layer's attention, through the interface of `transformers`.

with attending(model, function):
    model(...)                       # or model.generate(...)

calls `function(Call(...))` once a layer. `capture` is such a function: it keeps the keys, values and queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_numbers = itertools.count()


class Call(NamedTuple):
    """What a layer's attention is given, keys and queries after the rotary embedding.

    query [B, Hq, M, D]; key, value [B, H, S, D]: what the cache returned, or the new tokens' without a cache. mask:
    bool [B, 1, M, S], or None for plain causal attention (the last query sees all S keys). scale: of the logits.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float


Attention = Callable[[Call], torch.Tensor]


class States(NamedTuple):
    """Of one layer: keys and values [B, H, N, D], queries of the last tokens [B, Hq, w, D]; scale: of the logits."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    scale: float


@contextmanager
def attending(model: PreTrainedModel, function: Attention) -> Iterator[None]:
    """Within, every layer's attention is function(call) -> [B, Hq, M, D]. The model's own comes back at the end.

    Raises ValueError for a model whose attention cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def adapter(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = function(Call(module.layer_idx, query, key, value, attention_mask, scale))  # type: ignore[arg-type]
        return output.transpose(1, 2).contiguous(), None

    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} does not call its attention through transformers' interface")
    name, before = f"frugal_{next(_numbers)}", model.config._attn_implementation
    AttentionInterface.register(name, adapter)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name)  # each name is used once


def dense(call: Call) -> torch.Tensor:
    """The attention of the call, whole: [B, Hq, M, D]."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    mask = call.mask
    if mask is None and queries > 1 and keys > queries:  # torch's is_causal would align the first query with key 0
        mask = torch.ones(queries, keys, dtype=torch.bool, device=call.key.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        call.query, call.key, call.value, mask, is_causal=mask is None and queries > 1, scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )  # fmt: skip


@torch.inference_mode()
def capture(model: PreTrainedModel, input_ids: torch.Tensor, last: int = 0) -> list[States]:
    """Reads sequences [B, N] densely: the states of every layer, with the queries of the `last` tokens.

    The head is not computed. Raises ValueError for more queries than tokens.
    """
    length = input_ids.shape[1]
    if not 0 <= last <= length:
        raise ValueError(f"a sequence of {length} tokens has no {last} last queries")
    states = []

    def keep(call: Call) -> torch.Tensor:
        states.append(States(call.key, call.value, call.query[:, :, length - last :].clone(), call.scale))
        return dense(call)

    with attending(model, keep):
        model.base_model(input_ids=input_ids, use_cache=False)
    return states
