"""A clustered context, made once, and the cache of a request that is served with it, for any Llama-like model.

    context = squeeze(model, context_ids, sparsity=0.9)
    cache = SqueezedCache(context)
    with cache.attached(model):
        model.generate(torch.cat([context_ids, user_ids], 1), past_key_values=cache, max_new_tokens=64)

Tokens that come in one forward pass (the user's input) share their keys, by the mean of their scores; in decoding every
token has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from common.attention.budget import kv_budget
from common.attention.interface import Call, States, attending, capture
from common.attention.partial import causal_state
from kernels.compact_indices import compact_indices
from kernels.merge_partials import State, merge_partials
from kernels.sparse_attention import sparse_attention
from papers.squeezed_attention.method.clusters import Clusters, cluster_keys, coarsen
from papers.squeezed_attention.method.lookup import calibration, lookup, threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SqueezedLayer:
    """keys, values [H, N, D]; fine, coarse: clusters of all keys but the window's (coarse: None on one level)."""

    keys: torch.Tensor
    values: torch.Tensor
    fine: Clusters
    coarse: Clusters | None


@dataclass(frozen=True)
class SqueezedContext:
    """What many requests share. threshold, coarse_threshold: of scores; window: last tokens, which are always kept."""

    layers: list[SqueezedLayer]
    threshold: float
    coarse_threshold: float
    window: int
    per_query_head: bool

    @property
    def length(self) -> int:
        """N, the tokens of the context."""
        return self.layers[0].keys.shape[1]


@torch.inference_mode()
def squeeze(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    sparsity: float = 0.9,
    clusters: float = 0.05,
    coarse: float | None = None,
    coarse_sparsity: float = 0.5,
    window: int = 100,
    per_query_head: bool = False,
    seed: int = 0,
    iterations: int = 300,
) -> SqueezedContext:
    """Reads the context [1, N] densely, clusters its keys and calibrates the threshold.

    sparsity: share of the keys below the threshold. clusters, coarse: centroids as a share of the keys (coarse: 0.01
    for two levels). window: tokens at the end of the context that calibrate and are always attended to. per_query_head:
    own lists of keys for query heads that share a head of keys. Raises ValueError for a context no longer than the
    window and for shares out of range.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"a context is one sequence, [1, N], not {list(input_ids.shape)}")
    length = input_ids.shape[1]
    if not 1 <= window < length:
        raise ValueError(
            f"the observation window has {window} tokens: pass 1 to {length - 1}, the context has {length}"
        )
    return from_states(
        capture(model, input_ids, last=window), sparsity=sparsity, clusters=clusters, coarse=coarse,
        coarse_sparsity=coarse_sparsity, per_query_head=per_query_head, seed=seed, iterations=iterations,
    )  # fmt: skip


def from_states(
    captured: list[States],
    *,
    sparsity: float,
    clusters: float,
    coarse: float | None = None,
    coarse_sparsity: float = 0.5,
    per_query_head: bool = False,
    seed: int = 0,
    iterations: int = 300,
) -> SqueezedContext:
    """What `squeeze` does once the context is read: one sequence's states, with the queries of its window."""
    window = captured[0].queries.shape[2]
    layers, scores, coarse_scores = [], [], []
    for states in captured:
        keys, queries = states.keys[0], states.queries[0]
        lists = len(queries) if per_query_head else len(keys)
        fine = cluster_keys(keys[:, :-window], clusters, seed=seed, iterations=iterations)
        upper = None if coarse is None else coarsen(fine, coarse, seed=seed, iterations=iterations)
        layers.append(SqueezedLayer(keys, states.values[0], fine, upper))
        scores.append(calibration(queries, fine, states.scale, lists))
        if upper is not None:
            coarse_scores.append(calibration(queries, upper, states.scale, lists))
    return SqueezedContext(
        layers,
        threshold(*zip(*scores, strict=True), sparsity),
        threshold(*zip(*coarse_scores, strict=True), coarse_sparsity) if coarse_scores else -math.inf,
        window,
        per_query_head,
    )


class _OwnLayer(DynamicLayer):
    """The user's own keys and values; the context stands before them and is kept elsewhere."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context

    def get_seq_length(self) -> int:
        return self.context + super().get_seq_length()


class SqueezedCache(Cache):
    """The `past_key_values` of a request, or of several of one length that share the context; see the module's text.

    kept, compared: for each layer, a tensor [H * B] a forward pass: context keys attended to and centroids compared for
    each head of keys and request.
    """

    def __init__(self, context: SqueezedContext) -> None:
        super().__init__(layers=[_OwnLayer(context.length) for _ in context.layers])
        self.context = context
        self.kept: list[list[torch.Tensor]] = [[] for _ in context.layers]
        self.compared: list[list[torch.Tensor]] = [[] for _ in context.layers]

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, the model attends through this cache."""
        with attending(model, self.attend):
            yield

    def budget(self) -> float:
        """What the passes so far read of the context, as a share of all its keys and values; a list that query heads
        share is read once, lists of their own are all read. Raises ValueError before the first pass."""
        if not self.kept[0]:
            raise ValueError("nothing was attended to yet: run a forward pass with this cache")
        kept, compared = (
            float(torch.stack([torch.cat(passes).double().mean() for passes in parts]).mean())
            for parts in (self.kept, self.compared)
        )
        return kv_budget(kept, compared, self.context.length)

    def attend(self, call: Call) -> torch.Tensor:
        """Attention [B, Hq, M, D] of new tokens: exact over their own and the context's keys of relevant clusters."""
        layer = self.context.layers[call.layer]
        batch, query_heads, queries, d = call.query.shape
        heads, group = len(layer.keys), query_heads // len(layer.keys)
        own = causal_state(call.query, call.key, call.value, call.scale, self._own_mask(call))

        # Requests stand beside the query heads of a group: all of them read the same head of keys.
        query = call.query.view(batch, heads, group, queries, d).transpose(0, 1).reshape(-1, queries, d)
        lists = len(query) if self.context.per_query_head else heads * batch
        found = lookup(query, layer.fine, call.scale, lists, layer.coarse, self.context.coarse_threshold)
        labels = layer.fine.labels.repeat_interleave(lists // heads, 0)
        idx, cnt = compact_indices(found.scores, labels, self.context.threshold, self.context.window)
        self.kept[call.layer].append(cnt.view(heads * batch, -1).sum(1))
        self.compared[call.layer].append(found.compared.view(heads * batch, -1).amax(1))
        if lists not in (heads, len(query)):  # the kernel takes a list for each head of keys or for each of queries
            idx, cnt = idx.repeat_interleave(group, 0), cnt.repeat_interleave(group)

        partials = sparse_attention(query, layer.keys, layer.values, idx, cnt, call.scale)
        shape = (len(idx), -1)
        mine = State(
            own.o.transpose(0, 1).reshape(*shape, d),
            own.m.transpose(0, 1).reshape(shape),
            own.l.transpose(0, 1).reshape(shape),
        )
        o = merge_partials(*partials, mine, call.query.dtype).o
        return o.view(heads, batch, group, queries, d).transpose(0, 1).reshape(batch, query_heads, queries, d)

    def _own_mask(self, call: Call) -> torch.Tensor | None:
        if call.mask is None:
            return None
        own = call.key.shape[2]
        if not bool(call.mask[..., : call.mask.shape[-1] - own].all()):
            raise ValueError("a padded context: requests that share it start right behind it, without padding")
        return call.mask[..., -own:]
