"""How much attention each cluster of keys would get, from its centroid alone (Squeezed Attention, equation of S_i).

    S_i(q) = exp(q.C_i scale) / sum_j N_j exp(q.C_j scale)        N_j: keys in cluster j

averaged over the queries. It estimates the softmax weight of one key of cluster i. The denominator never exceeds the
true one (Jensen), and equals it when all keys of a cluster are alike. An empty cluster has x = -inf in the maximum and
in the sum, hence score 0: a zero vector in its place would count, and could turn scores, and with them a calibrated
threshold, into 0/0.

Two kernels. The first takes parts of the centroids and gives each query's maximum and sum over its part; the second
combines the parts and averages. With few queries (decoding) the first also stores the logits, so that the centroids are
read once; with many (prefill) the second computes them again, since they would take more memory than the centroids.
"""

from __future__ import annotations

import torch

from kernels._checks import check_device, check_dtypes, check_floats, check_last_dense, group_of, sizes_of
from kernels._softmax import LOG2E, finite
from kernels._triton import block_of, split_count, tl, triton, use_triton
from kernels.cost import Cost

STORED_BYTES = 1 << 26  # logits up to so many bytes are stored between the two kernels


@triton.jit
def _part_kernel(
    q, c, counts, x_out, m, l, scale, M, K, rows,
    q_h, q_m, c_h, c_k, counts_h,
    STORE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M of a key head's G*M query rows against one of num_programs(1) parts of its centroids."""
    tile, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_head = head * (rows // M) + row // M
    query = tl.load(q + (q_head * q_h + (row % M) * q_m)[:, None] + d, mask=(row < rows)[:, None] & (d < D), other=0.0)
    share = tl.cdiv(tl.cdiv(K, tl.num_programs(1)), BLOCK_K) * BLOCK_K
    m_row, l_row = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for k0 in range(part * share, tl.minimum(part * share + share, K), BLOCK_K):
        cluster = k0 + tl.arange(0, BLOCK_K)
        keys = tl.load(
            c + head * c_h + (cluster * c_k)[None, :] + d[:, None],
            mask=(cluster < K)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        size = tl.load(counts + head * counts_h + cluster, mask=cluster < K, other=0)
        x = tl.dot(query, keys, input_precision="ieee") * scale
        x = tl.where((size > 0)[None, :], x, float("-inf"))
        if STORE:
            place = (q_head * M + row % M) * K
            tl.store(x_out + place[:, None] + cluster, x, mask=(row < rows)[:, None] & (cluster < K))
        new_m = tl.maximum(m_row, tl.max(x, 1))
        p = size.to(tl.float32)[None, :] * tl.exp2(x - finite(new_m)[:, None])
        l_row = l_row * tl.exp2(m_row - finite(new_m)) + tl.sum(p, 1)
        m_row = new_m
    place = (q_head * tl.num_programs(1) + part) * M + row % M
    tl.store(m + place, m_row, mask=row < rows)
    tl.store(l + place, l_row, mask=row < rows)


@triton.jit
def _mean_kernel(
    q, c, counts, x_in, m, l, out, scale, M, K, group, parts,
    q_h, q_m, c_h, c_k, counts_h,
    STORED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K clusters for one query head, averaged over all its queries."""
    q_head = tl.program_id(1).to(tl.int64)
    head = q_head // group
    cluster = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    alive = tl.load(counts + head * counts_h + cluster, mask=cluster < K, other=0) > 0
    if not STORED:
        keys = tl.load(
            c + head * c_h + (cluster * c_k)[None, :] + d[:, None],
            mask=(cluster < K)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
    mean = tl.zeros([BLOCK_K], tl.float32)
    for i0 in range(0, M, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        place = ((q_head * parts + part) * M)[None, :] + i[:, None]
        real = (i < M)[:, None] & (part < parts)[None, :]
        m_part = tl.load(m + place, mask=real, other=float("-inf"))
        l_part = tl.load(l + place, mask=real, other=0.0)
        m_row = finite(tl.max(m_part, 1))
        l_row = tl.sum(l_part * tl.exp2(m_part - m_row[:, None]), 1)
        if STORED:
            x = tl.load(
                x_in + ((q_head * M + i) * K)[:, None] + cluster,
                mask=(i < M)[:, None] & (cluster < K), other=float("-inf"),
            )  # fmt: skip
        else:
            query = tl.load(q + q_head * q_h + (i * q_m)[:, None] + d, mask=(i < M)[:, None] & (d < D), other=0.0)
            x = tl.dot(query, keys, input_precision="ieee") * scale
        x = tl.where((i < M)[:, None] & alive[None, :], x, float("-inf"))
        mean += tl.sum(tl.exp2(x - m_row[:, None]) / tl.where(l_row == 0.0, 1.0, l_row)[:, None], 0)
    tl.store(out + q_head * K + cluster, mean / M, mask=cluster < K)


def reference(q: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor, scale: float) -> torch.Tensor:
    """Float64, head by head, from the clusters that have keys; 0 for the others."""
    group = len(q) // len(centroids)
    scores = torch.zeros(len(q), centroids.shape[1], dtype=torch.float64, device=q.device)
    for head in range(len(q)):
        alive = counts[head // group] > 0
        sizes = counts[head // group, alive].double()
        x = q[head].double() @ centroids[head // group, alive].double().T * scale
        if len(sizes):
            scores[head, alive] = (x - torch.logsumexp(x + sizes.log(), 1, keepdim=True)).exp().mean(0)
    return scores


def vectorised(q: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor, scale: float) -> torch.Tensor:
    """All heads at once: softmax(x + log N) / N. Sums in float32 at least."""
    (heads, clusters, d), queries = centroids.shape, q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    sizes = counts.to(wide)[:, None]
    x = torch.baddbmm(sizes.log(), q.reshape(heads, -1, d).to(wide), centroids.to(wide).mT, alpha=scale)
    share = x.softmax(-1).nan_to_num() / sizes.clamp(min=1)  # nan: no cluster of the head has keys
    return share.view(len(q), queries, clusters).mean(1)


def centroid_scores(q: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean over the queries of S_i(q) for every cluster: float32 [Hq, K] (float64 for float64).

    q [Hq, M, D], M >= 1; centroids [H, K, D], K >= 1, of one dtype, Hq a multiple of H; rows of D dense, other strides
    free. counts int32 [H, K]: keys of each cluster, 0 for one that takes no part (empty, or masked by a coarser level).
    Scores of a head whose clusters are all empty are 0. Raises ValueError for shapes and strides, TypeError for dtypes.
    """
    sizes = sizes_of(q=(q, "Hq M D"), centroids=(centroids, "H K D"), counts=(counts, "H K"))
    query_heads, queries, d = q.shape
    heads, clusters = sizes["H"], sizes["K"]
    group = group_of(query_heads, heads)
    if not queries or not clusters:
        raise ValueError(f"there are {queries} queries (M) and {clusters} clusters (K): a mean needs one of each")
    check_floats(q=q, centroids=centroids)
    check_dtypes(torch.int32, counts=counts)
    check_device(q=q, counts=counts)
    check_last_dense(q=q, centroids=centroids, counts=counts)
    if not use_triton(q, centroids):
        return vectorised(q, centroids, counts, scale)
    rows = group * queries
    full = q.dtype == torch.float32  # products outside the tensor cores take many registers
    block_m, block_k = block_of(rows, 16, 16 if full else 64), 32 if full else 128
    tiles = triton.cdiv(rows, block_m)
    parts = split_count(tiles * heads, clusters, block_k, q.device)
    stored = 4 * query_heads * queries * clusters <= STORED_BYTES
    m = torch.empty(query_heads, parts, queries, device=q.device)
    l, out = torch.empty_like(m), torch.empty(query_heads, clusters, device=q.device)
    x = torch.empty(query_heads, queries, clusters, device=q.device) if stored else m
    strides = (*q.stride()[:2], *centroids.stride()[:2], counts.stride(0))
    shape = {"D": d, "BLOCK_D": block_of(d, 16, 1 << 16), "num_warps": 4}
    _part_kernel[(tiles, parts, heads)](
        q, centroids, counts, x, m, l, scale * LOG2E, queries, clusters, rows, *strides,
        STORE=stored, BLOCK_M=block_m, BLOCK_K=block_k, num_stages=3, **shape,
    )  # fmt: skip
    _mean_kernel[(triton.cdiv(clusters, block_k), query_heads)](
        q, centroids, counts, x, m, l, out, scale * LOG2E, queries, clusters, group, parts, *strides,
        STORED=stored, BLOCK_M=block_of(queries, 1 if stored else 16, 16 if full else 64), BLOCK_K=block_k,
        BLOCK_P=block_of(parts, 1, 1 << 16), **shape,
    )  # fmt: skip
    return out


def cost(query_heads: int, heads: int, queries: int, clusters: int, head_dim: int, itemsize: int = 2) -> Cost:
    """Centroids count once, logits where they are stored between the kernels, products where they are repeated."""
    logits = query_heads * queries * clusters
    stored = 4 * logits <= STORED_BYTES
    moved = heads * clusters * (head_dim * itemsize + 4) + query_heads * (queries * head_dim * itemsize + 4 * clusters)
    return Cost(moved + (8 * logits if stored else 0), (2 if stored else 4) * logits * head_dim)
