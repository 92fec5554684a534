"""What kernels/bench.py measures: each kernel at a shape, on copies of its inputs, beside its baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels import (
    centroid_scores,
    compact_indices,
    kmeans,
    kv_compact,
    merge_partials,
    roofline,
    sparse_attention,
    tree_attention,
    w24_gemm,
    w24_gemv,
)
from kernels.cost import Cost
from kernels.w24 import STRIPE, random_f24
from kernels.w24_dequantise import w24_dequantise

RATIO_4BIT = 0.153  # share of 4-bit stripes for 2.85 bits a weight (Fast 2-bit)
KEPT, CLUSTERS, WINDOW = 0.1, 0.05, 100  # Squeezed Attention at 90% sparsity


@dataclass(frozen=True)
class Case:
    """One kernel at one shape and what it is compared with; calls take the number of a copy of the inputs."""

    kernel: str
    shape: str
    cost: Cost
    call: Callable[[int], Any]
    baselines: dict[str, Callable[[int], Any]]
    copies: int = 1
    captured: bool = True  # False where a baseline looks at values on the GPU: then nothing is captured in a graph


def copies_of(make: Callable[[int], Any], size: float, cold: float) -> list[Any]:
    """make(seed) as often as it takes to fill `cold` bytes with results of `size` bytes."""
    return [make(seed) for seed in range(max(1, min(int(-(-cold // size)), 64)))]


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def tree_cases(
    shape: tuple[int, int, int, int, int], d: int, device: str, dtype: torch.dtype, cold: float
) -> Iterator[Case]:
    """shape: batch, query heads, key heads, drafted tokens, context."""
    batch, query_heads, heads, drafted, context = shape
    rows, itemsize = context + drafted, dtype.itemsize

    def inputs(seed: int) -> list[torch.Tensor]:
        each = ((query_heads, drafted), (heads, rows), (heads, rows))  # of q, k, v
        qkv = [normal(seed + i, batch, *shape, d, device=device, dtype=dtype) for i, shape in enumerate(each)]
        mask = torch.ones(batch, drafted, drafted, dtype=torch.bool, device=device).tril()
        full = torch.ones(batch, 1, drafted, rows, dtype=torch.bool, device=device)
        full[:, 0, :, context:] = mask
        return [*qkv, mask, torch.full((batch,), context, dtype=torch.int32, device=device), full]

    sets = copies_of(inputs, 2 * batch * heads * rows * d * itemsize, cold)

    def call(i: int) -> Any:
        q, k, v, mask, context_length, _ = sets[i]
        return tree_attention.tree_attention(q, k, v, mask, context_length, d**-0.5)

    def dense(i: int) -> torch.Tensor:
        q, k, v, *_, mask = sets[i]
        return sdpa(q, k, v, mask)

    yield Case(
        "tree_attention",
        f"B={batch} Hq={query_heads} Hkv={heads} T={drafted} C={context} D={d}",
        tree_attention.cost(batch, query_heads, heads, drafted, context, d, itemsize),
        call,
        {"SDPA with a dense mask": dense},
        len(sets),
    )


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[-3] != k.shape[-3])


@dataclass(frozen=True)
class Squeezed:
    """A clustered context of one layer: what one decode step of Squeezed Attention reads."""

    q: torch.Tensor  # [Hq, 1, D]
    k: torch.Tensor  # [H, N, D]
    v: torch.Tensor
    centroids: torch.Tensor  # [H, K, D]
    counts: torch.Tensor
    labels: torch.Tensor  # [H, N - window]
    threshold: float

    @classmethod
    def random(
        cls, seed: int, query_heads: int, heads: int, keys: int, d: int, device: str, dtype: torch.dtype
    ) -> Squeezed:
        """Random keys and labels, and the threshold above which the wanted share of the clusters lies."""
        q = normal(seed, query_heads, 1, d, device=device, dtype=dtype)
        k, v = (normal(seed + i, heads, keys, d, device=device, dtype=dtype) for i in (1, 2))
        window = min(WINDOW, keys // 2)
        clusters = max(int(CLUSTERS * (keys - window)), 1)
        draw = torch.Generator(device).manual_seed(seed)
        labels = torch.randint(0, clusters, (heads, keys - window), generator=draw, device=device, dtype=torch.int16)
        means, counts = kmeans.cluster_means(k[:, :-window], labels.int(), clusters)
        part = cls(q, k, v, means.to(dtype), counts, labels, 0.0)
        scores = part.scores().flatten().sort().values
        return replace(part, threshold=float(scores[int((1 - KEPT) * (len(scores) - 1))]))

    def scores(self) -> torch.Tensor:
        """Of clusters, the largest of each group of query heads."""
        scores = centroid_scores.centroid_scores(self.q, self.centroids, self.counts, self.q.shape[-1] ** -0.5)
        return scores.view(len(self.k), -1, scores.shape[1]).amax(1)

    def select(self) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.k.shape[1] - self.labels.shape[1]
        return compact_indices.compact_indices(self.scores(), self.labels, self.threshold, window)

    def attend(self, idx: torch.Tensor, cnt: torch.Tensor) -> torch.Tensor:
        parts = sparse_attention.sparse_attention(self.q, self.k, self.v, idx, cnt, self.q.shape[-1] ** -0.5)
        return merge_partials.merge_partials(*parts, None, self.q.dtype).o

    def step(self) -> torch.Tensor:
        """The whole step: look up, compact, attend, merge."""
        return self.attend(*self.select())


def squeezed_cases(shape: tuple[int, int, int], d: int, device: str, dtype: torch.dtype, cold: float) -> Iterator[Case]:
    """The whole step and its parts. shape: query heads, key heads, keys."""
    query_heads, heads, keys = shape
    itemsize = dtype.itemsize
    sets = copies_of(
        lambda seed: Squeezed.random(seed, query_heads, heads, keys, d, device, dtype),
        2 * heads * keys * d * itemsize * KEPT,
        cold,
    )
    chosen, scores = [s.select() for s in sets], [s.scores() for s in sets]
    kept = round(sum(int(cnt.sum()) for _, cnt in chosen) / len(sets))
    clusters = scores[0].shape[1]
    text = f"Hq={query_heads} Hkv={heads} N={keys} D={d} kept={kept / heads / keys:.3f}"
    full = {"SDPA on the full cache": lambda i: sdpa(sets[i].q[None], sets[i].k[None], sets[i].v[None])}
    yield Case(
        "squeezed attention, one step",
        text,
        roofline.squeezed_cost(query_heads, heads, keys, d, kept / heads / keys, CLUSTERS, itemsize),
        lambda i: sets[i].step(),
        full,
        len(sets),
    )
    yield Case(
        "sparse_attention and merge_partials",
        text,
        sparse_attention.cost(query_heads, heads, 1, kept, d, itemsize),
        lambda i: sets[i].attend(*chosen[i]),
        full,
        len(sets),
    )
    yield Case(
        "centroid_scores",
        text,
        centroid_scores.cost(query_heads, heads, 1, clusters, d, itemsize),
        lambda i: centroid_scores.centroid_scores(sets[i].q, sets[i].centroids, sets[i].counts, d**-0.5),
        {"torch": lambda i: centroid_scores.vectorised(sets[i].q, sets[i].centroids, sets[i].counts, d**-0.5)},
        len(sets),
    )
    yield Case(
        "compact_indices",
        text,
        compact_indices.cost(heads, keys, clusters, kept),
        lambda i: compact_indices.compact_indices(scores[i], sets[i].labels, sets[i].threshold),
        {"torch": lambda i: compact_indices.vectorised(scores[i], sets[i].labels, sets[i].threshold, 0)},
        len(sets),
    )


def linear_cases(shape: tuple[int, int, int], d: int, device: str, dtype: torch.dtype, cold: float) -> Iterator[Case]:
    """Every variant at batch 1 and 16, the last elsewhere. shape: output channels, input channels, batch."""
    rows, channels, batch = shape
    four = round(RATIO_4BIT * channels / STRIPE)
    weight = random_f24(rows, channels // STRIPE - four, four).to(device)
    x, dense = normal(0, batch, channels, device=device, dtype=dtype), w24_dequantise(weight, dtype)
    packed = sum(plane.nbytes for plane in weight.planes().values())
    # copies of one random matrix: drawing many large ones would take longer than measuring
    sets = copies_of(lambda _: (x.clone(), weight.clone(), dense.clone()), packed, cold)
    product = w24_gemv.w24_gemv if batch <= w24_gemv.MOST_ROWS else w24_gemm.w24_gemm

    def call(variant: str) -> Callable[[int], torch.Tensor]:
        return lambda i: product(sets[i][0], sets[i][1], variant)

    for variant in ("V3", "V2", "V1", "VX") if batch in (1, 16) and device == "cuda" else ("V3",):
        yield Case(
            f"{product.__name__} {variant}",
            f"OC={rows} IC={channels} B={batch} bits={weight.bits_per_weight:.2f}",
            w24_gemv.cost(batch, packed, rows, channels, dtype.itemsize),
            call(variant),
            {
                "F.linear": lambda i: torch.nn.functional.linear(sets[i][0], sets[i][2]),
                "dequantise, then F.linear (V0)": call("V0"),
            },
            len(sets),
        )


def kmeans_cases(shape: tuple[int, int, int], d: int, device: str, dtype: torch.dtype, cold: float) -> Iterator[Case]:
    """shape: heads, keys, clusters."""
    heads, keys, clusters = shape
    x = normal(0, heads, keys, d, device=device, dtype=dtype)
    yield Case(
        "kmeans_step",
        f"H={heads} n={keys} K={clusters} D={d}",
        kmeans.cost(heads, keys, clusters, d, dtype.itemsize),
        lambda _: kmeans.kmeans_step(x, x[:, :clusters]),
        {"torch": lambda _: torch_kmeans_step(x, x[:, :clusters])},
        captured=False,
    )


def move_cases(shape: tuple[int, int, int], d: int, device: str, dtype: torch.dtype, cold: float) -> Iterator[Case]:
    """shape: caches, heads, rows; every second drafted row is kept."""
    caches, heads, rows = shape
    layers = [normal(i, 1, heads, 4 * rows, d, device=device, dtype=dtype) for i in range(caches)]
    path = 2 * torch.arange(rows, dtype=torch.int32, device=device)[None]
    count = context = torch.full((1,), rows, dtype=torch.int32, device=device)
    yield Case(
        "kv_compact",
        f"caches={caches} H={heads} rows={rows} D={d}",
        kv_compact.cost(caches, heads, rows - 1, d, dtype.itemsize),
        lambda _: kv_compact.kv_compact(layers, path, count, context),
        {"torch, cache by cache": lambda _: kv_compact.vectorised(layers, path, count, context)},
        captured=False,
    )


# in the order of the table
CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "tree": tree_cases,
    "squeezed": squeezed_cases,
    "linear": linear_cases,
    "kmeans": kmeans_cases,
    "move": move_cases,
}


def torch_kmeans_step(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    labels = kmeans.vectorised_labels(x, centroids)
    counts = torch.zeros(centroids.shape[:2], dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, labels.long(), torch.ones_like(labels))
    return kmeans.vectorised_means(x, labels, counts)
