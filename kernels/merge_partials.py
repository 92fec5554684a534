"""Merging attention over parts of the keys into attention over all of them, by log-sum-exp.

A part's result is (o, m, l) in base 2: with x = logit * log2(e) over the keys of the part,
m = max x, l = sum 2^(x - m), o = sum 2^(x - m) v / l. Two parts make

    m = max(m_a, m_b)
    o = (o_a l_a 2^(m_a - m) + o_b l_b 2^(m_b - m)) / (l_a 2^(m_a - m) + l_b 2^(m_b - m))

(Squeezed Attention merges fixed context and user input so; it is FlashDecoding's second kernel). The rule is
associative and order-free. A part without keys is (0, -inf, 0).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from kernels._checks import check_device, check_dtypes, check_last_dense, sizes_of
from kernels._softmax import finite
from kernels._triton import block_of, tl, triton, use_triton
from kernels.cost import Cost


class State(NamedTuple):
    """Attention's result and what is needed to merge it: o [H, R, D], m and l float32 [H, R]."""

    o: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor


@triton.jit
def _merge_kernel(
    o, m, l, start, own_o, own_m, own_l, out_o, out_m, out_l, rows,
    EACH: tl.constexpr, OWN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: one row of one head, over the head's parts in tiles of BLOCK_P."""
    place = tl.program_id(0).to(tl.int64)
    head, row = place // rows, place % rows
    first, last = head * EACH, head * EACH + EACH
    if EACH == 0:
        first, last = tl.load(start + head).to(tl.int64), tl.load(start + head + 1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_all, l_all = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if OWN:
        m_all, l_all = tl.load(own_m + place), tl.load(own_l + place)
        acc = l_all * tl.load(own_o + place * D + d, mask=d < D, other=0.0).to(tl.float32)
    for p0 in range(first, last, BLOCK_P):
        part = p0 + tl.arange(0, BLOCK_P)
        inside = part < last
        m_part = tl.load(m + part * rows + row, mask=inside, other=float("-inf"))
        l_part = tl.load(l + part * rows + row, mask=inside, other=0.0)
        o_part = tl.load(o + (part * rows + row)[:, None] * D + d, mask=inside[:, None] & (d < D), other=0.0)
        new_m = tl.maximum(m_all, tl.max(m_part, 0))
        weight = l_part * tl.exp2(m_part - finite(new_m))
        rescale = tl.exp2(m_all - finite(new_m))
        acc = acc * rescale + tl.sum(weight[:, None] * o_part, 0)
        l_all = l_all * rescale + tl.sum(weight, 0)
        m_all = new_m
    tl.store(out_o + place * D + d, acc / tl.where(l_all == 0.0, 1.0, l_all), mask=d < D)
    tl.store(out_m + place, m_all)
    tl.store(out_l + place, l_all)


def reference(o: torch.Tensor, m: torch.Tensor, l: torch.Tensor, start: list[int], own: State | None) -> State:
    """Float64, head by head: the softmax over parts with weights l 2^m."""
    heads = []
    for head, (first, last) in enumerate(itertools.pairwise(start)):
        parts = [(o[p], m[p], l[p]) for p in range(first, last)] + ([tuple(t[head] for t in own)] if own else [])
        values = torch.stack([part[0].double() for part in parts]) if parts else o.new_zeros(1, *o.shape[1:]).double()
        top = torch.stack([part[1].double() for part in parts]) if parts else m.new_full((1, m.shape[1]), -torch.inf)
        sums = torch.stack([part[2].double() for part in parts]) if parts else top.new_zeros(top.shape).double()
        best = top.amax(0)
        weight = torch.where(sums > 0, sums * torch.exp2(top - best), 0.0)
        total = weight.sum(0)
        heads.append(((weight[:, :, None] * values).sum(0) / total.clamp(min=1e-300)[:, None], best.double(), total))
    return State(*(torch.stack(column) for column in zip(*heads, strict=True)))


def vectorised(o: torch.Tensor, m: torch.Tensor, l: torch.Tensor, head_of: torch.Tensor, heads: int) -> State:
    """All heads at once: head_of int64 [P] names the head of each part."""
    best = m.new_full((heads, m.shape[1]), -torch.inf)
    best.scatter_reduce_(0, head_of[:, None].expand_as(m), m, "amax")
    weight = l * torch.exp2(m - torch.where(best == -torch.inf, 0.0, best)[head_of])
    total = torch.zeros_like(best).index_add_(0, head_of, weight)
    summed = o.new_zeros(heads, *o.shape[1:]).index_add_(0, head_of, weight[:, :, None] * o)
    return State(summed / torch.where(total == 0, 1.0, total)[:, :, None], best, total)


def merge_partials(
    o: torch.Tensor,
    m: torch.Tensor,
    l: torch.Tensor,
    start: torch.Tensor | int,
    own: State | None = None,
    dtype: torch.dtype = torch.float32,
) -> State:
    """Merges the parts of every head, and `own` with them: State(o [H, R, D] of `dtype`, m and l float32 [H, R]).

    o float32 [P, R, D], m and l float32 [P, R] (all float64 will do): parts, those of one head one after the other; R
    rows (queries). start: int32 [H + 1], the parts of head h are start[h]..start[h + 1] - 1 (none: `own` comes back
    unchanged, or zeros); or the number of parts that every head has. Parts behind start[H] are not read. own: one more
    part a head, such as attention over the user's own tokens; its o may have another dtype. Raises ValueError for
    shapes that do not fit and TypeError for dtypes.
    """
    sizes = sizes_of(o=(o, "P R D"), m=(m, "P R"), l=(l, "P R"))
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    check_dtypes(wide, o=o, m=m, l=l)
    check_device(o=o, m=m, l=l)
    check_last_dense(o=o)
    parts, rows, d = sizes["P"], sizes["R"], sizes["D"]
    if isinstance(start, int):
        if start < 1 or parts % start:
            raise ValueError(f"{parts} parts cannot be {start} for every head: start must divide their number")
        heads = parts // start
    else:
        check_dtypes(torch.int32, start=start)
        check_device(o=o, start=start)
        heads = sizes_of(start=(start, "H+1"))["H+1"] - 1
    if own is not None:
        if (own.o.shape, own.m.shape, own.l.shape) != ((heads, rows, d), (heads, rows), (heads, rows)):
            given = ", ".join(str(list(t.shape)) for t in own)
            raise ValueError(
                f"own has shapes {given}: one more part a head is o {[heads, rows, d]}, m and l {[heads, rows]}"
            )
        check_dtypes(wide, own_m=own.m, own_l=own.l)
        check_device(o=o, own_o=own.o, own_m=own.m, own_l=own.l)
    if not use_triton(o, o if own is None else own.o):
        return _with_torch(o, m, l, start, heads, own, dtype)
    result = State(o.new_empty(heads, rows, d, dtype=dtype), m.new_empty(heads, rows), m.new_empty(heads, rows))
    mine: Any = [t.contiguous() for t in own] if own is not None else [o, m, l]
    each = start if isinstance(start, int) else 0
    if heads * rows:
        _merge_kernel[(heads * rows,)](
            o.contiguous(), m.contiguous(), l.contiguous(), m if each else start, *mine, *result, rows,
            EACH=each, OWN=own is not None, D=d, BLOCK_D=block_of(d, 16, 1 << 16), BLOCK_P=16, num_warps=1,
        )  # fmt: skip
    return result


def _with_torch(
    o: torch.Tensor,
    m: torch.Tensor,
    l: torch.Tensor,
    start: torch.Tensor | int,
    heads: int,
    own: State | None,
    dtype: torch.dtype,
) -> State:
    every = torch.arange(heads, device=o.device)
    if isinstance(start, int):
        head_of = every.repeat_interleave(start)
    else:
        head_of = every.repeat_interleave(start.diff().long())
        o, m, l = o[: len(head_of)], m[: len(head_of)], l[: len(head_of)]
    if own is not None:
        o, m, l = torch.cat([o, own.o.to(o.dtype)]), torch.cat([m, own.m]), torch.cat([l, own.l])
        head_of = torch.cat([head_of, every])
    merged = vectorised(o, m, l, head_of, heads)
    return State(merged.o.to(dtype), merged.m, merged.l)


def cost(parts: int, heads: int, rows: int, head_dim: int, itemsize: int = 2, own: bool = False) -> Cost:
    """parts: of all heads together. itemsize: bytes of an element of the output. Parts are float32."""
    read = (parts * 4 + (heads * itemsize if own else 0)) * rows * head_dim + (parts + heads * own) * rows * 8
    return Cost(read + heads * rows * (head_dim * itemsize + 8), 2 * (parts + heads * own) * rows * head_dim)
