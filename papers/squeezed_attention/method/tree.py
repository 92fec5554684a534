"""Look-up on many levels: a tree of centroids with about `branching` children a node, descended greedily.

The paper's hierarchy has two levels, whose sizes are shares of the number of keys, so its cost stays linear with a
smaller constant. A tree of fixed branching compares about branching * log(n) / log(branching) centroids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.attention.clustering import kmeans
from kernels.kmeans import cluster_means


class CentroidTree:
    """keys [n, D]; levels from fine to coarse, each with n / branching, n / branching^2, ... centroids.

    parents[0] is the cluster of each key, parents[i] the coarser cluster of each one of level i. Raises ValueError for
    branching below 2 and for keys that one node holds already.
    """

    def __init__(self, keys: torch.Tensor, branching: int, *, seed: int = 0, iterations: int = 10) -> None:
        if not 2 <= branching < len(keys):
            raise ValueError(f"{len(keys)} keys, {branching} children a node: pass 2 or more, and fewer than the keys")
        self.centroids: list[torch.Tensor] = []
        self.parents: list[torch.Tensor] = []
        members = keys
        while len(members) > branching:
            count = -(-len(members) // branching)
            labels = kmeans(F.normalize(members, dim=-1)[None], count, seed=seed, iterations=iterations)
            means, counts = cluster_means(members[None], labels, count)
            alive = counts[0] > 0
            place = alive.cumsum(0) - 1  # empty clusters are left out
            members = means[0, alive]
            self.centroids.append(members)
            self.parents.append(place[labels[0].long()])

    def descend(self, query: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The keys (indices) of the finest cluster that a query [D] leads to, and the centroids compared on the way."""
        at, compared = torch.arange(len(self.centroids[-1]), device=query.device), 0
        for level in range(len(self.centroids) - 1, -1, -1):
            compared += len(at)
            best = at[(self.centroids[level][at] @ query).argmax()]
            at = (self.parents[level] == best).nonzero()[:, 0]
        return at, compared
