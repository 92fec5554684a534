"""The method: clusters.py groups keys, lookup.py compares queries with centroids, cache.py serves requests with it."""

from papers.squeezed_attention.method.cache import SqueezedCache, SqueezedContext, from_states, squeeze
from papers.squeezed_attention.method.clusters import Clusters, cluster_keys, coarsen
from papers.squeezed_attention.method.lookup import Lookup, calibration, lookup, threshold

__all__ = [
    "Clusters",
    "Lookup",
    "SqueezedCache",
    "SqueezedContext",
    "calibration",
    "cluster_keys",
    "coarsen",
    "from_states",
    "lookup",
    "squeeze",
    "threshold",
]
