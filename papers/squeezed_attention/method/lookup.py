"""Online: which clusters matter to a query, and offline: the one threshold that decides it for the whole model.

    S_i(q) = exp(q.C_i scale) / sum_j N_j exp(q.C_j scale)

estimates the softmax weight of one key of cluster i (kernels/centroid_scores.py). A key is kept iff the score of its
cluster exceeds T, the s-quantile of the scores of all keys of all layers and heads for the queries of the observation
window. How many keys a head keeps is thus up to the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.centroid_scores import centroid_scores
from papers.squeezed_attention.method.clusters import Clusters


class Lookup(NamedTuple):
    """scores float32 [L, K]: of the clusters for each list of keys, -inf where the coarse level rules one out.
    compared int64 [L]: centroids that the list's queries were compared with."""

    scores: torch.Tensor
    compared: torch.Tensor


def lookup(
    query: torch.Tensor,
    fine: Clusters,
    scale: float,
    lists: int,
    coarse: Clusters | None = None,
    coarse_threshold: float | torch.Tensor = -math.inf,
) -> Lookup:
    """The scores that decide about lists of keys, each averaged over its queries.

    query [Hq, M, D]. lists L: H (query heads that share a head of keys share a list, and the largest of their scores
    decides), Hq, or a multiple of H between that divides Hq. With a coarse level, clusters whose coarse cluster does
    not exceed coarse_threshold (a number, or [L]) are out: neither candidates nor part of the denominator.
    """
    if coarse is None:
        compared = (fine.counts > 0).sum(1).repeat_interleave(lists // len(fine.counts))
        return Lookup(_largest(query, fine.centroids, fine.counts, scale, lists), compared)
    times = lists // len(fine.counts)
    first = _largest(query, coarse.centroids, coarse.counts, scale, lists)
    limit = torch.as_tensor(coarse_threshold, dtype=first.dtype, device=first.device)
    is_open = (first > limit.expand(lists)[:, None]).gather(1, coarse.labels.repeat_interleave(times, 0).long())
    counts = torch.where(is_open, fine.counts.repeat_interleave(times, 0), 0)
    scores = _largest(query, fine.centroids.repeat_interleave(times, 0), counts, scale, lists)
    compared = (coarse.counts > 0).sum(1).repeat_interleave(times) + (counts > 0).sum(1)
    return Lookup(scores.masked_fill(~is_open, -torch.inf), compared)


def _largest(
    query: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor, scale: float, lists: int
) -> torch.Tensor:
    """Scores [L, K], the largest of the query heads of each list."""
    scores = centroid_scores(query, centroids, counts, scale).float()
    return scores.view(lists, -1, counts.shape[1]).amax(1)


def calibration(query: torch.Tensor, clusters: Clusters, scale: float, lists: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For `threshold`: scores for the window's queries [Hq, w, D], and the keys of each cluster, both [L, K]."""
    scores = lookup(query, clusters, scale, lists).scores
    return scores, clusters.counts.repeat_interleave(lists // len(clusters.counts), 0)


def threshold(scores: Sequence[torch.Tensor], counts: Sequence[torch.Tensor], sparsity: float) -> float:
    """T: the smallest score that a share `sparsity` of all keys does not exceed; -inf for sparsity 0, which keeps all.

    scores: of clusters, a tensor for each layer, of any shape; counts: keys of each cluster, alike. The same as a
    quantile (inverted distribution function) over scores copied to the keys. Raises ValueError for a sparsity outside
    0..1, and RuntimeError for scores that are not finite, with which nothing would be kept.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is a share of the keys, 0 to 1, not {sparsity}")
    values = torch.cat([part.flatten() for part in scores])
    keys = torch.cat([part.flatten() for part in counts]).double()
    if not bool(torch.isfinite(values).all()):
        raise RuntimeError("scores of the calibration are not finite: the logits of this model overflow its precision")
    if sparsity == 0:
        return -math.inf
    values, order = values.sort()
    reached = keys[order].cumsum(0)
    place = torch.searchsorted(reached, reached[-1:] * sparsity - 1e-9).clamp(max=len(values) - 1)
    return float(values[place])
