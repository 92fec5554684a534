"""Keys without a model: noisy copies of a few directions, so that it is known which of them matter to a query.

For the quality of a selection and the number of comparisons (c4, c5) at lengths that the small models do not reach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.attention.budget import kv_budget
from common.attention.interface import States
from papers.squeezed_attention.method import cluster_keys, coarsen, lookup
from papers.squeezed_attention.method.lookup import calibration, threshold
from papers.squeezed_attention.method.tree import CentroidTree
from papers.squeezed_attention.selections import METHODS, Contexts

if TYPE_CHECKING:
    from omegaconf import DictConfig

Rows = list[dict[str, Any]]

DIRECTIONS = 50
NOISE = 0.5  # length of a key's deviation from its direction, which has length 1
SHARPNESS = 8.0  # logit of a key that is exactly the query's direction


def plant(
    seed: int, keys: int, head_dim: int, queries: int, heads: int = 1, trial: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys [heads, n, D], queries [heads, m, D]); with a scale of D^-0.5 a key of the query's direction has a logit of
    about SHARPNESS and others of about 0. Directions stand in random order."""
    random = np.random.default_rng([seed, 0x914, keys, trial])
    directions = random.standard_normal((heads, DIRECTIONS, head_dim))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)

    def drawn(count: int, noise: float) -> np.ndarray:
        which = random.integers(DIRECTIONS, size=(heads, count))
        chosen = np.take_along_axis(directions, which[:, :, None], 1)
        return chosen + noise * random.standard_normal(chosen.shape) / head_dim**0.5

    length = (SHARPNESS * head_dim**0.5) ** 0.5
    found = (length * drawn(keys, NOISE), length * drawn(queries, NOISE / 2))
    return torch.from_numpy(found[0]).float(), torch.from_numpy(found[1]).float()


def selections(cfg: DictConfig) -> Rows:
    """Softmax weight that K-means and contiguous clusters capture, a row a trial, method and sparsity."""
    own = cfg.planted
    parts = [
        plant(cfg.seed, own.length + own.window, own.head_dim, own.window + own.queries, trial=trial)
        for trial in range(own.trials)
    ]
    keys, queries = (torch.stack(of).to(cfg.device) for of in zip(*parts, strict=True))
    scale = own.head_dim**-0.5
    asked = queries[:, :, own.window :]
    contexts = Contexts([States(keys, keys, queries[:, :, : own.window], scale)], 0, 1, cfg.seed)
    weights = (asked @ keys.mT * scale).softmax(-1)
    rows = []
    for method in ("squeezed", "contiguous"):
        for sparsity in cfg.sparsities:
            found = METHODS[method](contexts, sparsity, share=cfg.clusters)(0, asked)
            inside = torch.cat([found.keep, found.keep.new_ones(*found.keep.shape[:3], own.window)], 3)
            mass = (weights * inside).sum(-1).mean((1, 2))
            kept, vectors = inside.sum(-1).double().mean((1, 2)), found.vectors.double().mean((1, 2))
            rows += [
                {"sweep": "methods", "method": method, "sparsity": sparsity, "task": "planted", "context": trial}
                | {"mass": float(mass[trial]), "kept": float(kept[trial]) / keys.shape[2]}
                | {"budget": kv_budget(float(kept[trial]), float(vectors[trial]), keys.shape[2])}
                for trial in range(own.trials)
            ]
    return rows


def comparisons(cfg: DictConfig) -> Rows:
    """Centroids that a query is compared with, and the weight it captures, for one level, two and a tree: a row a trial
    and length. The two levels keep as many keys as the one level (the clusters with the largest scores)."""
    own = cfg.planted
    rows: Rows = []
    scale = own.head_dim**-0.5
    for length in own.lengths:
        for trial in range(own.count_trials):
            keys, queries = plant(cfg.seed, length, own.head_dim, own.window + own.queries, trial=trial)
            asked = queries[:, own.window :]
            weights = (asked[0] @ keys[0].T * scale).softmax(-1)
            fine = cluster_keys(keys, cfg.clusters, seed=cfg.seed, iterations=own.iterations)
            upper = coarsen(fine, cfg.coarse, seed=cfg.seed, iterations=own.iterations)
            window = queries[:, : own.window]
            limit = threshold(*zip(calibration(window, upper, scale, 1), strict=True), cfg.coarse_sparsity)
            spread = asked.transpose(0, 1).contiguous()  # a list of keys for each query
            one = lookup(spread, fine, scale, own.queries)
            two = lookup(spread, fine, scale, own.queries, upper, limit)
            tree = CentroidTree(keys[0], own.branching, seed=cfg.seed, iterations=own.iterations)
            walked = [tree.descend(query) for query in asked[0]]
            kept = round((1 - cfg.ablation.sparsity) * length)
            reached = [float(w[at].sum()) for w, (at, _) in zip(weights, walked, strict=True)]
            rows.append(
                {
                    "keys": length, "trial": trial, "one_level": float(one.compared.double().mean()),
                    "two_levels": float(two.compared.double().mean()),
                    "tree": float(np.mean([compared for _, compared in walked])),
                    "mass_one_level": _captured(weights, one.scores, fine.labels[0], kept),
                    "mass_two_levels": _captured(weights, two.scores, fine.labels[0], kept),
                    "mass_tree": float(np.mean(reached)),
                    "kept_tree": float(np.mean([len(at) for at, _ in walked])),
                }
            )  # fmt: skip
    return rows


def _captured(weights: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, kept: int) -> float:
    """Weight of the `kept` keys of the best clusters, mean over queries."""
    best = scores[:, labels.long()].topk(kept, dim=1).indices
    return float(weights.gather(1, best).sum(1).mean())
