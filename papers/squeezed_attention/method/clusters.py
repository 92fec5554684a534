"""Offline: K-means of the keys of a fixed context, for every head, on one level or two."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.attention.clustering import kmeans
from kernels.kmeans import cluster_means


class Clusters(NamedTuple):
    """centroids [H, K, D]; counts int32 [H, K]: keys of each cluster, 0 for one that ended empty and takes no part;
    labels int32 [H, n]: the cluster of each member (a key, or a cluster of the finer level)."""

    centroids: torch.Tensor
    counts: torch.Tensor
    labels: torch.Tensor


def cluster_count(keys: int, share: float) -> int:
    """int(share * keys), and 1 with a warning where that is none. Raises ValueError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise ValueError(f"clusters are a share of the keys, above 0 and at most 1, not {share}")
    count = int(share * keys + 1e-9)
    if count == 0:
        warnings.warn(f"{share:.3g} of {keys} keys is no cluster: taking one, which is all keys or none", stacklevel=3)
    return max(count, 1)


def cluster_keys(keys: torch.Tensor, share: float, *, seed: int = 0, iterations: int = 300) -> Clusters:
    """Clusters of keys [H, n, D] after the rotary embedding: int(share * n) for each head.

    Labels come from the normalised keys, so that clusters are of one direction; centroids are means of the keys as they
    are, so that they keep their magnitude.
    """
    count = cluster_count(keys.shape[1], share)
    labels = kmeans(F.normalize(keys, dim=-1), count, seed=seed, iterations=iterations)
    means, counts = cluster_means(keys, labels, count)
    return Clusters(means.to(keys.dtype), counts, labels)


def coarsen(fine: Clusters, share: float, *, seed: int = 0, iterations: int = 300) -> Clusters:
    """The coarse level: int(share * n) clusters of fine centroids; counts are of keys, labels [H, K] of fine clusters.

    The mean of a coarse cluster is over its centroids, each once ("same procedure"). Empty fine clusters count nowhere.
    """
    heads, n = fine.labels.shape
    count = min(cluster_count(n, share), fine.counts.shape[1])
    alive = fine.counts > 0
    first = alive.int().argmax(1)
    stand_in = fine.centroids[torch.arange(heads, device=first.device), first]
    centroids = torch.where(alive[..., None], fine.centroids, stand_in[:, None])
    labels = kmeans(F.normalize(centroids, dim=-1), count, seed=seed, iterations=iterations)
    apart = torch.where(alive, labels, count)  # empty ones go to a cluster of their own, which is cut off
    means, _ = cluster_means(centroids, apart, count + 1)
    counts = torch.zeros(heads, count + 1, dtype=torch.int32, device=first.device)
    counts.scatter_add_(1, apart.long(), fine.counts)
    return Clusters(means[:, :count].to(fine.centroids.dtype), counts[:, :count].contiguous(), labels)
