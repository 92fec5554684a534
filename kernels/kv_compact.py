"""After a draft was verified: move the keys and values of the accepted nodes together, in the caches of all layers.

A draft's T tokens lie in rows C..C+T-1 of each cache; accepted is a path of nodes path[0] = 0 < path[1] < ... (the root
first, parents before children). Row C + path[i] becomes row C + i (Lookahead, step 8 of its decoding loop).

In place, and source and target overlap. Since path ascends, path[j] >= j > i for every later node j, so a row that is
read later is never one written before: tile by tile, a program reads all its rows, waits, and then writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from kernels._checks import check_device, check_dtypes, check_last_dense, sizes_of
from kernels._triton import block_of, tl, triton, use_triton
from kernels.cost import Cost


@triton.jit
def _move_kernel(
    table, like, path, count, ctx_len, heads, S, stride_b, stride_h, stride_s, path_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: one head of one sequence in one cache. table int64: the caches' addresses; like: any of them."""
    place = tl.program_id(1).to(tl.int64)
    b, head = place // heads, place % heads
    cache = tl.load(table + tl.program_id(0)).to(like.dtype) + b * stride_b + head * stride_h
    context, accepted = tl.load(ctx_len + b), tl.load(count + b)
    d = tl.arange(0, BLOCK_D)[None, :]
    for i0 in range(0, accepted, BLOCK_P):
        i = i0 + tl.arange(0, BLOCK_P)
        source = tl.load(path + b * path_b + i, mask=i < accepted, other=0)
        moves = ((i < accepted) & (source != i) & (context + source < S))[:, None] & (d < D)
        rows = tl.load(cache + ((context + source).to(tl.int64) * stride_s)[:, None] + d, mask=moves, other=0.0)
        tl.debug_barrier()  # all threads have read before one writes
        tl.store(cache + ((context + i).to(tl.int64) * stride_s)[:, None] + d, rows, mask=moves)
        tl.debug_barrier()


def reference(cache: torch.Tensor, path: torch.Tensor, count: torch.Tensor, ctx_len: torch.Tensor) -> torch.Tensor:
    """A compacted copy of one cache, sequence by sequence and row by row."""
    result = cache.clone()
    for b, context in enumerate(ctx_len.tolist()):
        for i in range(int(count[b])):
            result[b, :, context + i] = cache[b, :, context + int(path[b, i])]
    return result


def vectorised(caches: Sequence[torch.Tensor], path: torch.Tensor, count: torch.Tensor, ctx_len: torch.Tensor) -> None:
    """All sequences and heads of a cache at once; a copy of the rows is made before they are written."""
    i = torch.arange(path.shape[1], device=path.device)
    b, i = ((i < count[:, None]) & (path != i)).nonzero(as_tuple=True)
    source, target = ctx_len[b] + path[b, i], ctx_len[b] + i
    if len(b):
        for cache in caches:
            cache[b, :, target] = cache[b, :, source]


def kv_compact(caches: Sequence[torch.Tensor], path: torch.Tensor, count: torch.Tensor, ctx_len: torch.Tensor) -> None:
    """Moves row ctx_len[b] + path[b, i] to ctx_len[b] + i for i < count[b], in every cache, in place.

    caches: keys and values of all layers, each [B, Hkv, S, D], all of one shape, dtype and strides; rows of D dense.
    One launch serves all of them. path int32 [B, P], ascending over its first count[b] nodes; what stands behind is not
    read. count and ctx_len int32 [B]. Rows behind ctx_len + count keep what they held. Raises ValueError for shapes,
    strides, a path that does not ascend or leaves the cache (on the CPU only), TypeError for dtypes.
    """
    if not len(caches):
        raise ValueError("caches is empty: pass the keys and values of all layers")
    first = caches[0]
    sizes = sizes_of(cache=(first, "B Hkv S D"), path=(path, "B P"), count=(count, "B"), ctx_len=(ctx_len, "B"))
    for number, cache in enumerate(caches):
        same = (cache.shape, cache.stride(), cache.dtype, cache.device)
        if same != (first.shape, first.stride(), first.dtype, first.device):
            raise ValueError(
                f"cache {number} is {cache.dtype} {list(cache.shape)} with strides {cache.stride()} on {cache.device},"
                f" the first {first.dtype} {list(first.shape)} with {first.stride()} on {first.device}: compact caches"
                " of one layout together"
            )
    check_dtypes(torch.int32, path=path, count=count, ctx_len=ctx_len)
    check_device(cache=first, path=path, count=count, ctx_len=ctx_len)
    check_last_dense(cache=first, path=path)
    if path.device.type == "cpu":
        _check_path(path, count, ctx_len, sizes["S"])
    if not first.numel() or not path.numel():
        return
    if not use_triton(first):
        return vectorised(caches, path, count, ctx_len)
    table = _addresses(tuple(cache.data_ptr() for cache in caches), first.device)
    batch, heads, capacity, d = first.shape
    _move_kernel[(len(caches), batch * heads)](
        table, first, path, count, ctx_len, heads, capacity, *first.stride()[:3], path.stride(0),
        D=d, BLOCK_D=block_of(d, 16, 1 << 16), BLOCK_P=block_of(path.shape[1], 1, 64), num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 on the device; kept, so that the steps of a generation copy nothing and can be captured in a CUDA graph."""
    return torch.tensor(pointers, device=device)


def _check_path(path: torch.Tensor, count: torch.Tensor, ctx_len: torch.Tensor, capacity: int) -> None:
    if len(count) and not (int(count.min()) >= 0 and int(count.max()) <= path.shape[1]):
        raise ValueError(f"count goes from {int(count.min())} to {int(count.max())}: path has 0..{path.shape[1]} nodes")
    i = torch.arange(path.shape[1])
    ascends = (path >= i) & (path > path.roll(1, 1)) | (i == 0) & (path >= 0)
    if bad := (~ascends & (i < count[:, None])).nonzero().tolist():
        b, place = bad[0]
        raise ValueError(f"path must ascend from 0 or more: sequence {b} is {path[b, : place + 1].tolist()}")
    last = torch.where(i < count[:, None], ctx_len[:, None] + path, 0)
    if last.numel() and (int(last.max()) >= capacity or int(ctx_len.min()) < 0):
        raise ValueError(
            f"ctx_len {ctx_len.tolist()} and path lead to row {int(last.max())}: the caches have rows 0..{capacity - 1}"
        )


def cost(caches: int, heads: int, moved: int, head_dim: int, itemsize: int = 2) -> Cost:
    """moved: rows that change their place, of all sequences; each is read and written in every head of every cache."""
    return Cost(2 * caches * heads * moved * head_dim * itemsize, 0)
