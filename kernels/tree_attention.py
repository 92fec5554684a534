"""Attention of a few drafted tokens to a long context and to each other under a tree's mask.

A decode step that verifies a draft scores T tokens at once. Each sees the whole context, of which no mask needs to be
read, and among the draft only itself and its ancestors (Lookahead's tree attention mask; Medusa, SpecInfer). The same
mask serves rows in which several answers are packed behind one thought: token i sees token j iff j <= i and j does not
lie in another answer.

The context is long and the queries are few, so the time is that of reading the keys and values once. One program takes
all query heads of a key head (G*T rows) and a part of the keys, so that every key is read once and all processors are
busy; `merge_partials` puts the parts together.
"""

from __future__ import annotations

import torch

from kernels._checks import check_device, check_dtypes, check_floats, check_last_dense, group_of, sizes_of
from kernels._softmax import LOG2E, attend, normalised
from kernels._triton import block_of, split_count, tl, triton, use_triton
from kernels.cost import Cost
from kernels.merge_partials import State, merge_partials


@triton.jit
def _partial_kernel(
    q, k, v, mask, ctx_len, o, m, l, scale, T, S, rows, heads,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M of a key head's G*T query rows, one of num_programs(1) parts of the keys.

    scale: of logits in base 2. x_y is the stride of tensor x along its dimension y.
    """
    tile, part, place = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, head = place // heads, place % heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # row g*T + t: query head g of the group, token t
    q_head, t = head * (rows // T) + row // T, row % T
    d = tl.arange(0, BLOCK_D)
    real = (row < rows)[:, None] & (d < D)
    query = tl.load(q + b * q_b + (q_head * q_h + t * q_t)[:, None] + d, mask=real, other=0.0)
    context = tl.load(ctx_len + b)
    length = tl.minimum(context + T, S)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), BLOCK_N) * BLOCK_N  # whole blocks
    first = part * share
    last = tl.minimum(first + share, length)
    unmasked = tl.minimum(context // BLOCK_N * BLOCK_N, last)  # blocks before it lie in the context as a whole
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_row, l_row = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(first, unmasked, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        keys = tl.load(k + (n * k_s)[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)
        values = tl.load(v + (n * v_s)[:, None] + d, mask=d < D, other=0.0)
        x = tl.dot(query, keys, input_precision="ieee") * scale
        acc, m_row, l_row = attend(acc, m_row, l_row, x, values)
    for n0 in range(tl.maximum(first, unmasked), last, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = n < last
        keys = tl.load(k + (n * k_s)[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        values = tl.load(v + (n * v_s)[:, None] + d, mask=inside[:, None] & (d < D), other=0.0)
        drafted = n - context
        ancestor = tl.load(
            mask + b * mask_b + (t * mask_t)[:, None] + drafted[None, :],
            mask=(row < rows)[:, None] & (inside & (drafted >= 0))[None, :], other=0,
        )  # fmt: skip
        visible = ((drafted < 0) & inside)[None, :] | (ancestor != 0)
        x = tl.dot(query, keys, input_precision="ieee") * scale
        acc, m_row, l_row = attend(acc, m_row, l_row, tl.where(visible, x, float("-inf")), values)
    out = (place * tl.num_programs(1) + part) * rows + row
    tl.store(o + out[:, None] * D + d, normalised(acc, l_row), mask=real)
    tl.store(m + out, m_row, mask=row < rows)
    tl.store(l + out, l_row, mask=row < rows)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree_mask: torch.Tensor, ctx_len: torch.Tensor, scale: float
) -> torch.Tensor:
    """Float64, sequence by sequence: softmax over the visible keys; zeros for a query that sees none."""
    outputs = []
    group, drafted = q.shape[1] // k.shape[1], q.shape[2]
    for b, context in enumerate(ctx_len.tolist()):
        keys = k[b, :, : context + drafted].double().repeat_interleave(group, 0)
        values = v[b, :, : context + drafted].double().repeat_interleave(group, 0)
        visible = torch.cat([tree_mask.new_ones(drafted, context), tree_mask[b]], 1)
        logits = (q[b].double() @ keys.mT * scale).masked_fill(~visible, -torch.inf)
        outputs.append(logits.softmax(-1).nan_to_num() @ values)
    return torch.stack(outputs)


def vectorised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree_mask: torch.Tensor, ctx_len: torch.Tensor, scale: float,
    return_state: bool = False,
) -> torch.Tensor | State:  # fmt: skip
    """All sequences at once, with a gradient; rows are [B, Hkv, G*T], so that a group reads its keys once."""
    (batch, query_heads, drafted, d), (heads, capacity) = q.shape, k.shape[1:3]
    rows = q.reshape(batch, heads, query_heads // heads * drafted, d)
    place = torch.arange(capacity, device=q.device) - ctx_len[:, None]  # [B, S], below 0: context
    column = place.clamp(0, drafted - 1)[:, None].expand(batch, drafted, capacity)
    visible = tree_mask.gather(2, column.long()) & (place < drafted)[:, None] | (place < 0)[:, None]
    stale = (place >= drafted)[:, None, :, None]
    if bool(stale.any()):  # whatever lies there, infinities included, must not meet a weight of zero
        k, v = k.masked_fill(stale, 0.0), v.masked_fill(stale, 0.0)
    visible = visible[:, None].repeat(1, 1, query_heads // heads, 1)  # [B, 1, G*T, S]
    if not return_state:
        o = torch.nn.functional.scaled_dot_product_attention(rows, k, v, visible, scale=scale)
        return o.reshape(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    x = (rows.to(wide) @ k.to(wide).mT * scale).masked_fill(~visible, -torch.inf)
    p = x.softmax(-1).nan_to_num()
    l = torch.where(p.amax(-1) > 0, 1 / p.amax(-1), 0.0)  # the largest probability is 2^0 / l
    state = State(p @ v.to(wide), x.amax(-1) * LOG2E, l)
    return State(state.o.reshape(q.shape).to(q.dtype), *(t.reshape(q.shape[:3]) for t in state[1:]))


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree_mask: torch.Tensor,
    ctx_len: torch.Tensor,
    scale: float,
    return_state: bool = False,
) -> torch.Tensor | State:
    """softmax(q k^T scale + mask) v for drafted tokens: [B, Hq, T, D] in q's dtype, sums in float32.

    q [B, Hq, T, D]; k, v [B, Hkv, S, D], Hq a multiple of Hkv, one dtype, any strides but that rows of D are dense (a
    slice of a preallocated cache will do). Row ctx_len[b] + j of k and v belongs to token j of the draft; rows behind
    ctx_len[b] + T are not read. tree_mask bool [B, T, T]: token i sees token j of the draft; every token sees the whole
    context. ctx_len int32 [B], lengths of the contexts; ctx_len + T <= S (checked on the CPU only: a look at them would
    stop a GPU). A query that sees nothing gets zeros.

    return_state: a State instead, o [B, Hq, T, D] with m, l float32 [B, Hq, T], to be merged with attention over other
    keys (`kernels.merge_partials`). Raises ValueError for shapes, strides and lengths, TypeError for dtypes.
    """
    mask, lengths = tree_mask, ctx_len
    sizes = sizes_of(
        q=(q, "B Hq T D"), k=(k, "B Hkv S D"), v=(v, "B Hkv S D"), tree_mask=(mask, "B T T"), ctx_len=(lengths, "B")
    )
    batch, query_heads, drafted = q.shape[:3]
    heads, capacity = sizes["Hkv"], sizes["S"]
    group = group_of(query_heads, heads)
    check_floats(q=q, k=k, v=v)
    check_dtypes(torch.bool, tree_mask=mask)
    check_dtypes(torch.int32, ctx_len=lengths)
    check_device(q=q, tree_mask=mask, ctx_len=lengths)
    check_last_dense(q=q, k=k, v=v, tree_mask=mask)
    if lengths.device.type == "cpu" and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high + drafted > capacity:
            raise ValueError(
                f"ctx_len goes from {low} to {high}, and {drafted} drafted tokens follow: k has room for {capacity}"
                f" rows, so ctx_len must lie in 0..{capacity - drafted}"
            )
    if not q.numel():
        state = State(
            torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf).float(), q.new_zeros(q.shape[:3]).float()
        )
        return state if return_state else state.o
    if not use_triton(q, k, v):
        return vectorised(q, k, v, mask, lengths, scale, return_state)
    merged = _launch(q, k, v, mask, lengths, scale, heads, group)
    state = State(merged.o.view(q.shape), *(t.view(q.shape[:3]) for t in merged[1:]))
    return state if return_state else state.o


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, scale: float,
    heads: int, group: int,
) -> State:  # fmt: skip
    batch, _, drafted, d = q.shape
    rows, capacity = group * drafted, k.shape[2]
    # float32 products run outside the tensor cores and take many registers: smaller tiles
    full = q.dtype == torch.float32
    block_m, block_n = block_of(rows, 16, 16 if full else 64), 32 if full else 64
    tiles = triton.cdiv(rows, block_m)
    parts = split_count(tiles * batch * heads, capacity, 4 * block_n, q.device)
    o = q.new_empty(batch * heads * parts, rows, d, dtype=torch.float32)
    m, l = o.new_empty(o.shape[:2]), o.new_empty(o.shape[:2])
    _partial_kernel[(tiles, parts, batch * heads)](
        q, k, v, mask.view(torch.int8), lengths, o, m, l, scale * LOG2E, drafted, capacity, rows, heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride()[:2],
        D=d, BLOCK_D=block_of(d, 16, 1 << 16), BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=4, num_stages=3 if block_m < 64 else 2,  # two programs fit a processor
    )  # fmt: skip
    return merge_partials(o, m, l, parts, dtype=q.dtype)


def cost(
    batch: int, query_heads: int, heads: int, drafted: int, context: int, head_dim: int, itemsize: int = 2
) -> Cost:
    """context: keys before the draft of one sequence. itemsize: bytes of an element of q, k, v and the output."""
    keys = context + drafted
    moved = 2 * heads * keys * head_dim * itemsize + 2 * query_heads * drafted * head_dim * itemsize + drafted**2
    return Cost(batch * moved, 4 * batch * drafted * query_heads * keys * head_dim)
