"""Exact attention to chosen keys: each list of heads has its own indices, of its own number.

The selected keys of Squeezed Attention (its online phase) differ in number from head to head, which is the point of a
global threshold. Equal pieces of all lists make up the work, so that no processor waits for the longest list: the list
of piece i is found in a prefix sum over ceil(cnt / chunk), and a fixed number of programs takes pieces in turn, without
anyone asking the GPU how many there are. `merge_partials` puts the pieces of a list together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels._checks import check_device, check_dtypes, check_floats, check_last_dense, group_of, sizes_of
from kernels._softmax import LOG2E, attend, normalised
from kernels._triton import block_of, processors, tl, triton, use_triton
from kernels.cost import Cost

CHUNK = 512  # keys of a piece in decoding: half a MB of keys and values at D = 128


class Partials(NamedTuple):
    """o float32 [P, R, D], m and l float32 [P, R], start int32 [L + 1]: as `kernels.merge_partials` takes them."""

    o: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor
    start: torch.Tensor


@triton.jit
def _gather_kernel(
    q, k, v, idx, cnt, start, o, m, l, scale, M, rows, lists, chunk,
    q_h, q_m, k_h, k_n, v_h, v_n, idx_h,
    SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one piece after the other; SHARE lists read the same head of keys.

    scale: of logits in base 2. x_y is the stride of tensor x along its dimension y.
    """
    each = tl.arange(0, BLOCK_L)
    ends = tl.load(start + 1 + each, mask=each < lists, other=2147483647)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # row g*M + i: query head g of the list, query i
    d = tl.arange(0, BLOCK_D)
    real = (row < rows)[:, None] & (d < D)
    for piece in range(tl.program_id(0), tl.load(start + lists), tl.num_programs(0)):
        which = tl.sum((ends <= piece).to(tl.int32), 0)
        first = (piece - tl.load(start + which)) * chunk
        last = tl.minimum(first + chunk, tl.load(cnt + which))
        q_head = which * (rows // M) + row // M
        query = tl.load(q + (q_head.to(tl.int64) * q_h + (row % M) * q_m)[:, None] + d, mask=real, other=0.0)
        head = (which // SHARE).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m_row, l_row = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(first, last, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            inside = n < last
            chosen = tl.load(idx + which.to(tl.int64) * idx_h + n, mask=inside, other=0).to(tl.int64)
            keys = tl.load(
                k + head * k_h + (chosen * k_n)[None, :] + d[:, None],
                mask=inside[None, :] & (d < D)[:, None], other=0.0,
            )  # fmt: skip
            values = tl.load(v + head * v_h + (chosen * v_n)[:, None] + d, mask=inside[:, None] & (d < D), other=0.0)
            x = tl.dot(query, keys, input_precision="ieee") * scale
            acc, m_row, l_row = attend(acc, m_row, l_row, tl.where(inside[None, :], x, float("-inf")), values)
        out = (piece * rows + row).to(tl.int64)
        tl.store(o + out[:, None] * D + d, normalised(acc, l_row), mask=real)
        tl.store(m + out, m_row, mask=row < rows)
        tl.store(l + out, l_row, mask=row < rows)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, idx: torch.Tensor, cnt: torch.Tensor, scale: float
) -> torch.Tensor:
    """Float64, query head by query head: softmax over the head's keys; zeros where no key is chosen. [Hq, M, D]."""
    outputs = []
    for head in range(len(q)):
        which = head // (len(q) // len(idx))
        chosen = idx[which, : int(cnt[which])].long()
        keys, values = (t[head // (len(q) // len(k)), chosen].double() for t in (k, v))
        outputs.append((q[head].double() @ keys.T * scale).softmax(-1) @ values)
    return torch.stack(outputs)


def vectorised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, idx: torch.Tensor, cnt: torch.Tensor, scale: float
) -> Partials:
    """All lists at once, padded to the longest; one piece a list. Sums in float32 at least."""
    lists, wide = len(idx), torch.promote_types(q.dtype, torch.float32)
    longest = int(cnt.max()) if lists else 0
    inside = torch.arange(longest, device=q.device) < cnt[:, None]  # [L, longest]
    chosen = torch.where(inside, idx[:, :longest], 0)
    head = torch.arange(lists, device=q.device)[:, None] // (lists // len(k))
    rows = q.reshape(lists, -1, q.shape[-1]).to(wide)
    x = (rows @ _rows(k, head, chosen).to(wide).mT * scale).masked_fill(~inside[:, None], -torch.inf)
    if not longest:  # no list has a key
        return Partials(rows * 0, x.new_full(x.shape[:2], -torch.inf), x.new_zeros(x.shape[:2]), _one_piece(cnt))
    p = x.softmax(-1).nan_to_num()
    l = torch.where(p.amax(-1) > 0, 1 / p.amax(-1), 0.0)  # the largest probability is 2^0 / l
    return Partials(p @ _rows(v, head, chosen).to(wide), x.amax(-1) * LOG2E, l, _one_piece(cnt))


def _one_piece(cnt: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(cnt) + 1, dtype=torch.int32, device=cnt.device)


def _rows(x: torch.Tensor, head: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """x[head, chosen], [L, n, D], by whole rows: x [H, N, D] seen as one list of rows, which caches allow."""
    heads, keys, d = x.shape
    step = x.stride(0) // d if x.stride(1) == d and x.stride(0) % d == 0 else 0
    if not step or heads * keys == 0:
        return x[head, chosen.long()]
    flat = x.as_strided(((heads - 1) * step + keys, d), (d, 1))
    return flat.index_select(0, (head * step + chosen).flatten()).view(*chosen.shape, d)


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, idx: torch.Tensor, cnt: torch.Tensor, scale: float
) -> Partials:
    """softmax(q k^T scale) v over the keys idx[h, :cnt[h]], in pieces for `merge_partials(*partials)`.

    q [Hq, M, D]; k, v [H, N, D], Hq a multiple of H, one dtype, rows of D dense and other strides free. idx int32
    [L, n], cnt int32 [L], 0 <= cnt <= n: L = H lists, each for the M queries of its Hq / H query heads (rows g*M + i of
    the result), or L = Hq, a list for each query head. Indices lie in 0..N-1 and are not repeated (checked on the CPU
    only); what stands behind cnt is not read. A list without keys has no piece, or an empty one. Sums in float32.
    Merged: [L, R, D] with R = Hq / L * M, which is [Hq, M, D] in memory. Raises ValueError for shapes, strides and
    indices, TypeError for dtypes.
    """
    sizes = sizes_of(q=(q, "Hq M D"), k=(k, "H N D"), v=(v, "H N D"), idx=(idx, "L n"), cnt=(cnt, "L"))
    query_heads, queries, d = q.shape
    group_of(query_heads, len(k))
    if sizes["L"] not in (len(k), query_heads):
        raise ValueError(
            f"idx has {sizes['L']} lists: pass one for each of the {len(k)} heads of keys or of the {query_heads} query"
            " heads"
        )
    check_floats(q=q, k=k, v=v)
    check_dtypes(torch.int32, idx=idx, cnt=cnt)
    check_device(q=q, idx=idx, cnt=cnt)
    check_last_dense(q=q, k=k, v=v, idx=idx)
    if idx.device.type == "cpu":
        _check_indices(idx, cnt, sizes["N"])
    if not use_triton(q, k, v):
        return vectorised(q, k, v, idx, cnt, scale)
    lists, longest = idx.shape
    rows = query_heads // lists * queries
    full = q.dtype == torch.float32  # products outside the tensor cores take many registers
    block_m, block_n = block_of(rows, 16, 16 if full else 64), 32 if full else 64
    tiles = triton.cdiv(rows, block_m)
    busy = 4 * processors(q.device)
    # many queries keep the GPU busy without cutting the lists
    chunk = block_of(longest // 4, block_n, CHUNK) if tiles * lists < busy else max(longest, 1)
    pieces = lists * triton.cdiv(longest, chunk)  # at most
    start = torch.zeros(lists + 1, dtype=torch.int32, device=q.device)
    torch.cumsum((cnt + (chunk - 1)) // chunk, 0, dtype=torch.int32, out=start[1:])
    o = q.new_empty(pieces, rows, d, dtype=torch.float32)
    m, l = o.new_empty(pieces, rows), o.new_empty(pieces, rows)
    if pieces and rows:
        _gather_kernel[(min(pieces, max(busy // tiles, 1)), tiles)](
            q, k, v, idx, cnt, start, o, m, l, scale * LOG2E, queries, rows, lists, chunk,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], idx.stride(0),
            SHARE=lists // len(k), D=d, BLOCK_D=block_of(d, 16, 1 << 16), BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_L=block_of(lists, 1, 1 << 16), num_warps=4, num_stages=3,
        )  # fmt: skip
    return Partials(o, m, l, start)


def _check_indices(idx: torch.Tensor, cnt: torch.Tensor, keys: int) -> None:
    if len(cnt) and not (int(cnt.min()) >= 0 and int(cnt.max()) <= idx.shape[1]):
        raise ValueError(f"cnt goes from {int(cnt.min())} to {int(cnt.max())}: idx has room for 0..{idx.shape[1]}")
    read = idx[torch.arange(idx.shape[1]) < cnt[:, None]]
    if len(read) and not (int(read.min()) >= 0 and int(read.max()) < keys):
        raise ValueError(f"idx goes from {int(read.min())} to {int(read.max())}: k has rows 0..{keys - 1}")


def cost(
    query_heads: int, heads: int, queries: int, kept: int, head_dim: int, itemsize: int = 2, lists: int | None = None
) -> Cost:
    """kept: keys of all lists together. lists: heads if not given. `merge_partials.cost` counts the pieces."""
    group = query_heads // (lists or heads)
    moved = kept * (2 * head_dim * itemsize + 4) + query_heads * queries * head_dim * itemsize
    return Cost(moved, 4 * kept * group * queries * head_dim)
