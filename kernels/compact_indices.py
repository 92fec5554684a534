"""From scores of clusters to the list of keys to attend to: threshold, gather by label, compact, in one go.

Key i of a head is kept iff the score of its cluster exceeds the threshold (Squeezed Attention, online phase). The score
of every key, [H, n], is never written. Each block of keys counts its own; a block's place in the list is the sum of the
counts before it, so the list is ascending and the same on every run; with the released code's atomic counter it is not.
"""

from __future__ import annotations

import math

import torch

from kernels._checks import check_device, check_dtypes, check_last_dense, sizes_of
from kernels._triton import block_of, tl, triton, use_triton
from kernels.cost import Cost

BLOCK = 1024  # keys of a program


@triton.jit
def _keep(scores, labels, threshold, h, n, labels_h, scores_h, BLOCK_N: tl.constexpr):
    """(key, kept) of this program's block of keys of head h."""
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(labels + h * labels_h + key, mask=key < n, other=0).to(tl.int32)
    score = tl.load(scores + h * scores_h + label, mask=key < n, other=float("-inf"))
    return key, (score > threshold) & (key < n)


@triton.jit
def _count_kernel(scores, labels, counts, threshold, n, labels_h, scores_h, BLOCK_N: tl.constexpr):
    h = tl.program_id(1).to(tl.int64)
    _, kept = _keep(scores, labels, threshold, h, n, labels_h, scores_h, BLOCK_N)
    tl.store(counts + h * tl.num_programs(0) + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit
def _scatter_kernel(
    scores, labels, counts, idx, cnt, threshold, n, always, labels_h, scores_h,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The last block's program also appends the `always` keys behind the n labelled ones."""
    block, blocks, h = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    before = tl.arange(0, BLOCK_B)
    base = tl.sum(tl.load(counts + h * blocks + before, mask=before < block, other=0), 0)
    key, kept = _keep(scores, labels, threshold, h, n, labels_h, scores_h, BLOCK_N)
    place = base + tl.cumsum(kept.to(tl.int32), 0) - 1
    idx += h * (n + always)
    tl.store(idx + place, key, mask=kept)
    if block == blocks - 1:
        base += tl.sum(kept.to(tl.int32), 0)
        for a0 in range(0, always, BLOCK_N):
            a = a0 + tl.arange(0, BLOCK_N)
            tl.store(idx + base + a, n + a, mask=a < always)
        tl.store(cnt + h, base + always)


def reference(scores: torch.Tensor, labels: torch.Tensor, threshold: float, always: int = 0) -> list[list[int]]:
    """Key by key: the kept keys of each head, ascending."""
    n = labels.shape[1]
    return [
        [i for i in range(n) if scores[h, labels[h, i]] > threshold] + list(range(n, n + always))
        for h in range(len(labels))
    ]


def vectorised(
    scores: torch.Tensor, labels: torch.Tensor, threshold: float, always: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All heads at once: each kept key goes to its rank among the kept, all others to a column that is cut off."""
    heads, n = labels.shape
    kept = scores.gather(1, labels.long()) > threshold
    kept = torch.cat([kept, kept.new_ones(heads, always)], 1)
    rank = torch.where(kept, kept.cumsum(1) - 1, n + always)
    keys = torch.arange(n + always, dtype=torch.int32, device=labels.device).expand(heads, -1)
    idx = torch.zeros(heads, n + always + 1, dtype=torch.int32, device=labels.device).scatter_(1, rank, keys)
    return idx[:, :-1], kept.sum(1, dtype=torch.int32)


def compact_indices(
    scores: torch.Tensor, labels: torch.Tensor, threshold: float, always: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(idx int32 [H, n + always], cnt int32 [H]): keys i with scores[h, labels[h, i]] > threshold, ascending.

    scores float32 [H, K]: of clusters (`kernels.centroid_scores`; for a group of query heads, the largest of the group;
    -inf for what a coarser level rules out). labels int16 or int32 [H, n]: the cluster of each key, 0..K-1 (checked on
    the CPU only). always: keys n..n+always-1 stand behind the labelled ones and are kept whatever the scores (the
    observation window, the user's own tokens). Only idx[h, :cnt[h]] is defined. Raises ValueError for shapes, labels
    out of range, a NaN threshold and a negative always; TypeError for dtypes.
    """
    sizes = sizes_of(scores=(scores, "H K"), labels=(labels, "H n"))
    heads, n = labels.shape
    check_dtypes(torch.float32, scores=scores)
    check_dtypes(torch.int16, torch.int32, labels=labels)
    check_device(scores=scores, labels=labels)
    check_last_dense(scores=scores, labels=labels)
    if math.isnan(threshold):
        raise ValueError("threshold is nan, which would keep nothing: calibrate it again")
    if always < 0:
        raise ValueError(f"always is a number of keys, so it is at least 0, not {always}")
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= sizes["K"]:
            raise ValueError(f"labels go from {low} to {high}: scores has clusters 0..{sizes['K'] - 1}")
    if not use_triton(scores):
        return vectorised(scores, labels, threshold, always)
    blocks = max(triton.cdiv(n, BLOCK), 1)
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=labels.device)
    idx = torch.empty(heads, n + always, dtype=torch.int32, device=labels.device)
    cnt = torch.empty(heads, dtype=torch.int32, device=labels.device)
    if heads:
        strides = (labels.stride(0), scores.stride(0))
        _count_kernel[(blocks, heads)](scores, labels, counts, threshold, n, *strides, BLOCK_N=BLOCK, num_warps=4)
        _scatter_kernel[(blocks, heads)](
            scores, labels, counts, idx, cnt, threshold, n, always, *strides,
            BLOCK_N=BLOCK, BLOCK_B=block_of(blocks, 1, 1 << 16), num_warps=4,
        )  # fmt: skip
    return idx, cnt


def cost(heads: int, keys: int, clusters: int, kept: int, label_bytes: int = 2) -> Cost:
    """kept: keys kept in all heads together. Labels are counted once: the second reading finds them in the L2 cache."""
    return Cost(heads * (keys * label_bytes + 4 * clusters) + 4 * (kept + heads), 0)
