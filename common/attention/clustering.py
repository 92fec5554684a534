"""K-means of many heads at once: k-means++ and Lloyd's steps on the kernel of kernels/kmeans.py."""

from __future__ import annotations

import torch

from common.generation import random
from kernels.kmeans import kmeans_step


def kmeans(x: torch.Tensor, clusters: int, *, seed: int = 0, iterations: int = 300) -> torch.Tensor:
    """Labels int32 [H, n] of K-means on x [H, n, D]: k-means++, then Lloyd until no label changes.

    A head's labels depend on its points and the seed, not on what else is in the batch: all heads take the same draws.
    Clusters may end empty, with many equal points for instance. Raises ValueError unless 1 <= clusters <= n.
    """
    _, points, _ = x.shape
    if not 1 <= clusters <= points:
        raise ValueError(f"{points} points cannot make {clusters} clusters")
    centroids = plus_plus(x, clusters, seed)
    labels, centroids, _ = kmeans_step(x, centroids)
    for _ in range(iterations - 1):
        before = labels
        labels, centroids, _ = kmeans_step(x, centroids)
        if torch.equal(labels, before):
            break
    return labels


def plus_plus(x: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """First centroids [H, K, D] (Arthur and Vassilvitskii 2007): each a point, drawn with a weight of its squared
    distance to the nearest one so far; without distance, the first point again."""
    heads, points, d = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    keys, norms = x.to(wide), x.to(wide).square().sum(-1)
    draws = torch.from_numpy(random.draws(random.keys(seed, random.name_key("k-means++")), clusters)[0]).to(x.device)
    each = torch.arange(heads, device=x.device)
    chosen = torch.full((heads,), int(draws[0] * points), device=x.device)
    centroids = x.new_empty(heads, clusters, d, dtype=wide)
    nearest = torch.full((heads, points), torch.inf, dtype=wide, device=x.device)
    for k in range(clusters):
        centroids[:, k] = keys[each, chosen]
        distance = norms + norms[each, chosen, None] - 2 * (keys @ centroids[:, k, :, None])[..., 0]
        nearest = torch.minimum(nearest, distance.clamp(min=0))
        if k + 1 < clusters:
            weights = nearest.double().cumsum(1)
            chosen = torch.searchsorted(weights, draws[k + 1] * weights[:, -1:]).clamp(max=points - 1)[:, 0]
    return centroids
