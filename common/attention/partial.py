"""Attention to one part of the keys, in a form that merges with other parts (kernels/merge_partials.py)."""

from __future__ import annotations

import torch

from kernels.merge_partials import State

LOG2E = 1.4426950408889634


def causal_state(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> State:
    """softmax(q k^T scale) v over a user's own tokens: State(o [B, H, G*M, D], m and l [B, H, G*M]), base 2.

    query [B, H * G, M, D], key and value [B, H, U, D], U >= M; row g * M + i is query i of the group's head g. mask:
    bool [B, 1, M, U], or None for causal (the last query sees all U). m is the logarithm of the sum of 2^x over the
    keys and l is 1: one of the many pairs with the same l * 2^m.
    """
    batch, _, queries, d = query.shape
    heads, own = key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    x = query.view(batch, heads, -1, queries, d).to(wide) @ key[:, :, None].to(wide).mT * scale
    seen = torch.ones(queries, own, dtype=torch.bool, device=x.device).tril(own - queries)
    x = x.masked_fill(~(seen if mask is None else mask[:, :, None]), -torch.inf)
    total = x.logsumexp(-1)
    o = x.softmax(-1) @ value[:, :, None].to(wide)
    return State(o.flatten(2, 3), (total * LOG2E).flatten(2), torch.ones_like(total).flatten(2))
