"""One step of Lloyd's K-means for many heads at once: assign every key to its nearest centroid, then take means.

    label_i = argmin_j |x_i - C_j|^2 = argmin_j (|C_j|^2 / 2 - x_i . C_j)        C_j = mean of the keys with label j

Squeezed Attention clusters L2-normalised keys and then takes the means of the raw keys of each cluster: labels come
from `kmeans_step` on the normalised keys, centroids from `cluster_means` of the raw ones.

The means are sums over a cluster's members in ascending order (sorted by label first), so a second run gives the same
bits; additions by atomics would not.
"""

from __future__ import annotations

import torch

from kernels._checks import check_device, check_dtypes, check_floats, check_last_dense, sizes_of
from kernels._triton import block_of, tl, triton, use_triton
from kernels.cost import Cost

BLOCK_BYTES = 1 << 26  # the torch path holds distances of so many bytes at a time


@triton.jit
def _assign_kernel(
    x, c, labels, n, K, x_h, x_n, c_h, c_k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the nearest of all K centroids for BLOCK_N keys of one head."""
    h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = tl.load(x + h * x_h + (i.to(tl.int64) * x_n)[:, None] + d, mask=(i < n)[:, None] & (d < D), other=0.0)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    label = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        j = k0 + tl.arange(0, BLOCK_K)
        centroid = tl.load(
            c + h * c_h + (j * c_k)[None, :] + d[:, None], mask=(j < K)[None, :] & (d < D)[:, None], other=0.0
        )
        half_norm = tl.sum(centroid.to(tl.float32) * centroid.to(tl.float32), 0) * 0.5
        distance = half_norm[None, :] - tl.dot(keys, centroid.to(keys.dtype), input_precision="ieee")
        distance = tl.where((j < K)[None, :], distance, float("inf"))
        nearest, where = tl.min(distance, 1, return_indices=True)
        label = tl.where(nearest < best, k0 + where, label)
        best = tl.minimum(nearest, best)
    tl.store(labels + h * n + i, label, mask=i < n)


@triton.jit
def _mean_kernel(
    x, order, ends, means, n, K, x_h, x_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the mean of one cluster's keys, which order[ends[j - 1]:ends[j]] lists; an empty one gets zeros."""
    j, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last = tl.load(ends + h * K + j)
    first = tl.load(ends + h * K + j - 1, mask=j > 0, other=0)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for i0 in range(first, last, BLOCK_N):
        place = i0 + tl.arange(0, BLOCK_N)
        i = tl.load(order + h * n + place, mask=place < last, other=0)
        rows = tl.load(x + h * x_h + (i * x_n)[:, None] + d, mask=(place < last)[:, None] & (d < D), other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    tl.store(means + (h * K + j) * D + d, total / tl.maximum(last - first, 1).to(tl.float32), mask=d < D)


def reference(x: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64, head by head: all distances, their smallest, and the mean of each cluster that has keys."""
    labels, means, counts = [], centroids.double().clone(), []
    for h in range(len(x)):
        distance = (x[h].double()[:, None] - centroids[h].double()[None]).square().sum(-1)
        labels.append(distance.argmin(1))
        counts.append(torch.bincount(labels[h], minlength=centroids.shape[1]))
        for j in range(centroids.shape[1]):
            if counts[h][j]:
                means[h, j] = x[h, labels[h] == j].double().mean(0)
    return torch.stack(labels), means, torch.stack(counts)


def vectorised_labels(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """All heads at once, in blocks of keys so that the distances [H, block, K] fit BLOCK_BYTES."""
    wide = torch.promote_types(x.dtype, torch.float32)
    moved, half_norm = centroids.to(wide).mT, centroids.to(wide).square().sum(-1)[:, None] / 2
    block = max(BLOCK_BYTES // (moved.element_size() * max(len(x) * moved.shape[2], 1)), 1)
    pieces = [torch.baddbmm(half_norm, piece.to(wide), moved, alpha=-1).argmin(-1) for piece in x.split(block, 1)]
    return torch.cat(pieces, 1).to(torch.int32)


def vectorised_means(x: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """All clusters of all heads at once."""
    (heads, _, d), clusters = x.shape, counts.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = (labels.long() + clusters * torch.arange(heads, device=x.device)[:, None]).flatten()
    sums = torch.zeros(heads * clusters, d, dtype=wide, device=x.device).index_add_(0, flat, x.reshape(-1, d).to(wide))
    return sums.view(heads, clusters, d) / counts.clamp(min=1)[:, :, None]


def cluster_means(x: torch.Tensor, labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(means float32 [H, K, D], counts int32 [H, K]) of keys x [H, n, D] with labels int32 [H, n] in 0..K-1.

    The mean of an empty cluster is zero. float64 keys have float64 means. Raises ValueError for shapes, strides and
    labels out of range (on the CPU only), TypeError for dtypes.
    """
    sizes_of(x=(x, "H n D"), labels=(labels, "H n"))
    check_floats(x=x)
    check_dtypes(torch.int32, labels=labels)
    check_device(x=x, labels=labels)
    check_last_dense(x=x)
    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, not {clusters}")
    if labels.device.type == "cpu" and labels.numel() and not (0 <= int(labels.min()) <= int(labels.max()) < clusters):
        raise ValueError(f"labels go from {int(labels.min())} to {int(labels.max())}: clusters are 0..{clusters - 1}")
    heads, n, d = x.shape
    counts = torch.zeros(heads, clusters, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, labels.long(), torch.ones_like(labels))
    if not use_triton(x):
        return vectorised_means(x, labels, counts), counts
    means = torch.empty(heads, clusters, d, device=x.device)
    if heads:
        order, ends = labels.argsort(dim=1, stable=True), counts.cumsum(1, dtype=torch.int32)
        _mean_kernel[(clusters, heads)](
            x, order, ends, means, n, clusters, *x.stride()[:2],
            D=d, BLOCK_D=block_of(d, 16, 1 << 16), BLOCK_N=16, num_warps=1,
        )  # fmt: skip
    return means, counts


def kmeans_step(x: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels int32 [H, n], new centroids float32 [H, K, D], counts int32 [H, K]) of one Lloyd step.

    x [H, n, D]: keys, rows of D dense, other strides free. centroids [H, K, D], K >= 1, float32 or x's dtype; they are
    rounded to x's dtype for the comparison. Of two centroids at one distance the first wins. An empty cluster keeps its
    centroid. Raises ValueError for shapes and strides, TypeError for dtypes.
    """
    sizes = sizes_of(x=(x, "H n D"), centroids=(centroids, "H K D"))
    check_floats(x=x)
    if centroids.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"centroids are {centroids.dtype}: pass float32 or the keys' {x.dtype}")
    check_device(x=x, centroids=centroids)
    check_last_dense(x=x, centroids=centroids)
    heads, n, d = x.shape
    clusters = sizes["K"]
    if not clusters:
        raise ValueError("there are no centroids (K = 0): pass at least one for each head")
    if use_triton(x, centroids):
        labels = torch.empty(heads, n, dtype=torch.int32, device=x.device)
        full = x.dtype == torch.float32  # products outside the tensor cores take many registers
        block_n, block_k = block_of(n, 16, 32 if full else 64), 32 if full else 64
        if labels.numel():
            _assign_kernel[(triton.cdiv(n, block_n), heads)](
                x, centroids, labels, n, clusters, *x.stride()[:2], *centroids.stride()[:2],
                D=d, BLOCK_D=block_of(d, 16, 1 << 16), BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
            )  # fmt: skip
    else:
        labels = vectorised_labels(x, centroids.to(x.dtype))
    means, counts = cluster_means(x, labels, clusters)
    return labels, torch.where((counts == 0)[:, :, None], centroids.to(means.dtype), means), counts


def cost(heads: int, keys: int, clusters: int, head_dim: int, itemsize: int = 2) -> Cost:
    """Keys are read twice (assign, update); the sort by label is not counted."""
    moved = 2 * keys * head_dim * itemsize + 12 * keys + 2 * clusters * head_dim * 4
    return Cost(heads * moved, heads * (2 * keys * clusters * head_dim + keys * head_dim))
