"""How arms choose keys: Squeezed Attention in its variants, and the methods it is compared with.

A selection answers (layer, query) with the keys that each look-up keeps, for many contexts at once. It never drops the
window. Query heads that share a head of keys share a list; the mean over the queries of a look-up decides, and among
the heads of the group the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from common.attention.interface import States
from common.generation import random
from kernels.kmeans import cluster_means
from papers.squeezed_attention.method import Clusters, calibration, cluster_keys, coarsen, lookup, threshold

PAGE = 16  # keys of a page of QUEST
SINK = 4  # first tokens that sink + recent keeps


class Selected(NamedTuple):
    """keep bool [C, H, T, n] for T look-ups (1: the same for all); vectors [C, H, T]: as large as a key, compared."""

    keep: torch.Tensor
    vectors: torch.Tensor


Selection = Callable[[int, torch.Tensor], Selected]  # (layer, query [C, Hq, M, D]) -> what is kept


@dataclass
class Contexts:
    """What is known of C contexts: the states of every layer, with the queries of their windows.

    blocks, block: the first look-ups are of so many blocks of so many tokens, the others of one token each. first:
    number of the first context, on which random choices depend. Clusters and scores are kept once they are made.
    """

    states: list[States]
    blocks: int
    block: int
    seed: int = 0
    first: int = 0
    made: dict[tuple, list] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, and n: keys before the window."""
        contexts, heads, length, _ = self.states[0].keys.shape
        return contexts, heads, length - self.states[0].queries.shape[2]

    def keys(self, layer: int) -> torch.Tensor:
        """[C * H, n, D], without the window's."""
        return self.states[layer].keys[:, :, : self.shape[2]].flatten(0, 1)

    def window_queries(self, layer: int) -> torch.Tensor:
        """[C * Hq, w, D], the query heads of a head of keys side by side."""
        return self.states[layer].queries.flatten(0, 1)

    def parts(self, query: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """The queries of blocks [C*H*T*G, block, D] and of single tokens [C*H*T*G, 1, D], each with its T."""
        contexts, heads, _ = self.shape
        *_, tokens, d = query.shape
        grouped = query.view(contexts, heads, -1, tokens, d).transpose(2, 3)  # [C, H, M, G, D]
        head, tail = grouped.split([self.blocks * self.block, tokens - self.blocks * self.block], 2)
        found = []
        for part, length in ((head, self.block), (tail, 1)):
            if part.shape[2]:
                count = part.shape[2] // length
                rows = part.reshape(contexts, heads, count, length, -1, d).transpose(3, 4)
                found.append((rows.reshape(-1, length, d).contiguous(), count))
        return found

    def remember(self, key: tuple, make: Callable[[int], object]) -> list:
        """make(layer) for all layers, once."""
        if key not in self.made:
            self.made[key] = [make(layer) for layer in range(len(self.states))]
        return self.made[key]


def keep_all(contexts: Contexts, sparsity: float) -> Selection:
    """Full attention."""
    keep, vectors = torch.ones(contexts.shape[0], 1, 1, 1, dtype=torch.bool), torch.zeros(contexts.shape[0], 1, 1)
    device = contexts.states[0].keys.device
    return lambda layer, query: Selected(keep.to(device), vectors.to(device))


def squeezed(
    contexts: Contexts,
    sparsity: float,
    *,
    share: float = 0.05,
    coarse: float | None = None,
    coarse_sparsity: float = 0.5,
    seed: int = 0,
    each_head: bool = False,
    contiguous: bool = False,
) -> Selection:
    """The method. each_head: a threshold for each layer and head at the same quantile, in the place of the global one.
    contiguous: clusters are blocks of neighbours of one size, in the place of K-means."""
    make = contiguous_clusters if contiguous else partial(cluster_keys, seed=seed)
    key = (share, seed, contiguous)
    fine = contexts.remember(("fine", *key), lambda layer: make(contexts.keys(layer), share))
    limits = _limits(contexts, ("fine", *key), fine, sparsity, each_head)
    upper: list[Clusters | None] = [None] * len(fine)
    coarse_limits: torch.Tensor | None = None
    if coarse is not None:
        key = (*key, coarse)
        upper = contexts.remember(("coarse", *key), lambda layer: coarsen(fine[layer], coarse, seed=seed))
        coarse_limits = _limits(contexts, ("coarse", *key), upper, coarse_sparsity, False)
    shape = contexts.shape[:2]

    def select(layer: int, query: torch.Tensor) -> Selected:
        found = []
        for part, count in contexts.parts(query):
            lists = shape[0] * shape[1] * count
            limit: float | torch.Tensor = -math.inf
            if coarse_limits is not None:
                limit = coarse_limits[layer].flatten().repeat_interleave(count)
            found.append(lookup(part, fine[layer], contexts.states[layer].scale, lists, upper[layer], limit))
        scores = torch.cat([one.scores.view(*shape, -1, one.scores.shape[1]) for one in found], 2)
        compared = torch.cat([one.compared.view(*shape, -1) for one in found], 2)
        return Selected(_to_keys(scores > limits[layer][..., None, None], fine[layer].labels), compared)

    return select


def contiguous_clusters(keys: torch.Tensor, share: float) -> Clusters:
    """As many clusters as `cluster_keys` makes, of neighbours, with their means."""
    heads, n, _ = keys.shape
    count = max(int(share * n), 1)
    labels = (torch.arange(n, dtype=torch.int32, device=keys.device) * count // n).expand(heads, n).contiguous()
    means, counts = cluster_means(keys, labels, count)
    return Clusters(means.to(keys.dtype), counts, labels)


def _limits(contexts: Contexts, key: tuple, clusters: list[Clusters], sparsity: float, each_head: bool) -> torch.Tensor:
    """Thresholds [layers, C, H]."""
    rows, heads, _ = contexts.shape
    scored = contexts.remember(
        ("scores", *key),
        lambda layer: calibration(
            contexts.window_queries(layer), clusters[layer], contexts.states[layer].scale, rows * heads
        ),
    )
    scores, counts = (torch.stack(part).cpu().unflatten(1, (rows, heads)) for part in zip(*scored, strict=True))
    limits = torch.empty(scores.shape[:3])
    for row in range(rows):
        if each_head:
            for layer, head in torch.cartesian_prod(torch.arange(len(scores)), torch.arange(heads)).tolist():
                at = (layer, row, head)
                limits[at] = threshold([scores[at]], [counts[at]], sparsity)
        else:
            limits[:, row] = threshold([scores[:, row]], [counts[:, row]], sparsity)
    return limits.to(contexts.states[0].keys.device)


def _to_keys(keep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool [C, H, T, n] from bool of units [C, H, T, K] and the unit of each key [C*H, n]."""
    places = labels.long().view(*keep.shape[:2], 1, -1).expand(-1, -1, keep.shape[2], -1)
    return keep.gather(3, places)


def ideal(contexts: Contexts, sparsity: float) -> Selection:
    """The limit of one cluster a key: exact attention weights under a global threshold, at no cost of looking up."""
    rows, heads, n = contexts.shape
    scored = contexts.remember(
        ("ideal",), lambda layer: _exact(contexts, layer, contexts.window_queries(layer), rows * heads)
    )
    scores = torch.stack(scored).cpu().unflatten(1, (rows, heads))
    ones = torch.ones_like(scores[:, 0])
    limits = torch.tensor([threshold([scores[:, row]], [ones], sparsity) for row in range(rows)])
    limits = limits.to(contexts.states[0].keys.device)

    def select(layer: int, query: torch.Tensor) -> Selected:
        found = [
            _exact(contexts, layer, part, rows * heads * count).view(rows, heads, count, n)
            for part, count in contexts.parts(query)
        ]
        keep = torch.cat(found, 2) > limits[:, None, None, None]
        return Selected(keep, torch.zeros(keep.shape[:3], device=keep.device))

    return select


def _exact(contexts: Contexts, layer: int, query: torch.Tensor, lists: int) -> torch.Tensor:
    """Attention weights on the n keys, mean over the queries [L*G, M, D] of a look-up, largest of its heads: [L, n]."""
    keys = contexts.keys(layer).float()
    x = query.float().reshape(len(keys), -1, query.shape[-1]) @ keys.mT * contexts.states[layer].scale
    weights = x.softmax(-1).view(lists, -1, query.shape[1], keys.shape[1])
    return weights.mean(2).amax(1)


def quest(contexts: Contexts, sparsity: float) -> Selection:
    """QUEST: pages of neighbours, ranked by a bound of their largest logit, sum_d max(q_d min_d, q_d max_d)."""
    rows, heads, n = contexts.shape
    pages = -(-n // PAGE)
    labels = (torch.arange(n, device=contexts.states[0].keys.device) // PAGE).expand(rows * heads, n)

    def bounds(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = contexts.keys(layer)
        filled = torch.cat([keys, keys[:, -1:].expand(-1, pages * PAGE - n, -1)], 1).unflatten(1, (pages, PAGE))
        return filled.amin(2), filled.amax(2)

    low_high = contexts.remember(("pages",), bounds)

    def select(layer: int, query: torch.Tensor) -> Selected:
        low, high = low_high[layer]
        found = []
        for part, count in contexts.parts(query):
            q = part.view(len(low), -1, part.shape[-1])
            bound = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT
            bound = bound.view(rows * heads * count, -1, part.shape[1], pages)
            found.append(bound.mean(2).amax(1).view(rows, heads, count, pages))
        keep = _top(torch.cat(found, 2), sparsity)
        return Selected(_to_keys(keep, labels), torch.full(keep.shape[:3], 2.0 * pages, device=keep.device))

    return select


def fixed(contexts: Contexts, sparsity: float, name: str, scores: Callable[[int], torch.Tensor]) -> Selection:
    """Keys chosen once, whatever the query, by scores(layer) [C, H, n]."""
    kept = [_top(one[:, :, None], sparsity) for one in contexts.remember((name,), scores)]
    return lambda layer, query: Selected(kept[layer], torch.zeros(kept[layer].shape[:3], device=kept[layer].device))


def window_attention(contexts: Contexts, sparsity: float) -> Selection:
    """What SnapKV and H2O do: keys that the window attends to stay, the others are evicted for good."""
    rows, heads, n = contexts.shape

    def scores(layer: int) -> torch.Tensor:
        return _exact(contexts, layer, contexts.window_queries(layer), rows * heads).view(rows, heads, n)

    return fixed(contexts, sparsity, "snapkv", scores)


def sink_recent(contexts: Contexts, sparsity: float) -> Selection:
    """The first four tokens and the last ones."""
    rows, heads, n = contexts.shape

    def scores(layer: int) -> torch.Tensor:
        place = torch.arange(n, device=contexts.states[layer].keys.device)
        return torch.where(place < SINK, 2 * n - place, place).expand(rows, heads, n)

    return fixed(contexts, sparsity, "sink", scores)


def random_keys(contexts: Contexts, sparsity: float) -> Selection:
    """A draw of keys for each context, layer and head."""
    rows, heads, n = contexts.shape

    def scores(layer: int) -> torch.Tensor:
        which = contexts.first + torch.arange(rows).repeat_interleave(heads).numpy()
        head = torch.arange(heads).repeat(rows).numpy()
        keys = random.keys(contexts.seed, random.name_key("random keys"), which, layer, head)
        drawn = torch.from_numpy(random.draws(keys, n)).view(rows, heads, n)
        return drawn.to(contexts.states[layer].keys.device)

    return fixed(contexts, sparsity, "random", scores)


def _top(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """bool [..., K]: the share 1 - sparsity with the largest scores."""
    count = round((1 - sparsity) * scores.shape[-1])
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, scores.topk(count, -1).indices, True) if count else keep


METHODS: dict[str, Callable[..., Selection]] = {
    "all": keep_all,
    "window only": sink_recent,  # at sparsity 1
    "squeezed": squeezed,
    "hierarchical": squeezed,
    "contiguous": partial(squeezed, contiguous=True),
    "per head": partial(squeezed, each_head=True),
    "quest": quest,
    "window attention": window_attention,
    "sink and recent": sink_recent,
    "random": random_keys,
    "ideal": ideal,
}
