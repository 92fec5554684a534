"""The kernels against what they must beat.

python -m common.bench kernels.bench     on the CPU: the vectorised torch paths against dense attention and F.linear
python -m kernels.bench                  on a CUDA GPU: writes results/gpu/kernels.csv (`make bench-gpu`)

On the GPU a measurement is the replay of a CUDA graph of several calls on different copies of the inputs, together
larger than the L2 cache: launches are not what is compared, and nothing is read from a cache that a model's weights or
keys would not be in. In the same rounds a device copy and a large matrix product give the card's attainable ceilings.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.metrics.timing import Timings, compare
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

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu" / "kernels.csv"
COLD_BYTES = 200e6  # what the copies of an input make up at least: over three times the L2 cache of an H200
RATIO_4BIT = 0.153  # share of 4-bit stripes for 2.85 bits a weight (Fast 2-bit)
KEPT, CLUSTERS, WINDOW = 0.1, 0.05, 100  # Squeezed Attention at 90% sparsity

# What `gpu_table` measures: shapes of each kind of `CASES`; side: of the matrices whose product gives a ceiling.
GPU_SHAPES: dict[str, Any] = {
    "head_dim": 128,
    "tree": [(1, 32, h, t, c) for h in (32, 8) for t in (1, 64) for c in (4096, 32768, 131072)],
    "squeezed": [(32, h, n) for h in (32, 8) for n in (8192, 32768, 131072, 524288)],
    "linear": [
        (rows, channels, batch)
        for rows, channels in ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672), (28672, 8192))
        for batch in (1, 8, 16, 32)
    ],
    "kmeans": [(32, 32768, 1638)],
    "move": [(64, 32, 12)],
    "side": 8192,
}


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


def repeated(call: Callable[[int], Any], copies: int, calls: int, graph: bool) -> Callable[[], None]:
    """A function that makes `calls` calls on one copy after the other, as one CUDA graph if asked for."""

    def run() -> None:
        for i in range(calls):
            call(i % copies)

    if not graph:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates before the capture
        for i in range(copies):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def measured(case: Case, ceilings: dict[str, tuple[Callable[[], Any], float]], device: str, rounds: int) -> list[dict]:
    """A row for each baseline. ceilings: name -> (call, bytes or FLOPs of a call), timed in the same rounds."""
    graph = device == "cuda" and case.captured
    # some milliseconds at the speed of an H200, beside which the clock and the launch of the graph are nothing
    enough = int(4e-3 / case.cost.seconds(4e12, 5e14)) if device == "cuda" else 1
    calls = max(case.copies, min(enough, 1000))
    functions = {"kernel": repeated(case.call, case.copies, calls, graph)}
    for name, call in case.baselines.items():
        functions[name] = repeated(call, case.copies, calls, graph)
    timings = compare(functions | {name: call for name, (call, _) in ceilings.items()}, rounds)
    reached = {name: work / timings.median(name) for name, (_, work) in ceilings.items()}
    seconds = timings.median("kernel") / calls
    bound = case.cost.seconds(reached["copy"], reached["matmul"])
    memory = case.cost.bytes / reached["copy"] >= case.cost.flops / reached["matmul"]
    return [
        {
            "kernel": case.kernel,
            "shape": case.shape,
            "median_us": 1e6 * seconds,
            "gb_per_s": case.cost.bytes / seconds / 1e9,
            "tflops": case.cost.flops / seconds / 1e12,
            "bound": "memory" if memory else "arithmetic",
            "share_of_ceiling": bound / seconds,
            "baseline": name,
            "baseline_us": 1e6 * timings.median(name) / calls,
            **_interval(timings, name),
            "contended": timings.contended,
            "copy_gb_per_s": reached["copy"] / 1e9,
            "matmul_tflops": reached["matmul"] / 1e12,
        }
        for name in case.baselines
    ]


def _interval(timings: Timings, baseline: str) -> dict[str, float]:
    ratio = timings.ratio(baseline, "kernel")
    return {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}


def ceilings_of(device: str, dtype: torch.dtype, side: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """A device copy (bytes read and written) and a square matrix product (FLOPs) of this card."""
    a, b = (normal(seed, side, side, device=device, dtype=dtype) for seed in (0, 1))
    source = torch.empty(4 * side * side, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return {
        "copy": (partial(target.copy_, source), 2.0 * source.nbytes),
        "matmul": (partial(torch.mm, a, b), 2.0 * side**3),
    }


def gpu_table(
    device: str = "cuda",
    shapes: dict[str, Any] = GPU_SHAPES,
    dtype: torch.dtype = torch.float16,
    rounds: int = 7,
    cold: float = COLD_BYTES,
) -> pd.DataFrame:
    """Every kernel at every shape against its baselines; the columns of results/gpu/kernels.csv."""
    import pandas as pd

    ceilings, rows = ceilings_of(device, dtype, shapes["side"]), []
    for kind, make in CASES.items():
        for shape in shapes[kind]:
            for case in make(shape, shapes["head_dim"], device, dtype, cold):
                rows += measured(case, ceilings, device, rounds)
                print(f"{case.kernel}, {case.shape}: {rows[-1]['median_us']:.1f} us", file=sys.stderr, flush=True)
    return pd.DataFrame(rows).assign(dtype=str(dtype).removeprefix("torch."), **origin(device))


def origin(device: str) -> dict[str, str]:
    """When and on what: date, device, driver, versions."""
    found = {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "driver": "none"}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = "unknown (no nvidia-smi)"
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"cuda": torch.version.cuda or "none"}


def write(frame: pd.DataFrame, path: Path = RESULTS) -> Path:
    """To a temporary name first, so that an interrupted run leaves the old table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_ = path.with_suffix(".partial.csv")
    frame.to_csv(partial_, index=False, float_format="%.6g")
    return partial_.rename(path)


def cpu_attention(
    heads: int = 8, d: int = 64, contexts: Sequence[int] = (4096, 16384), rounds: int = 7
) -> pd.DataFrame:
    """Float32 decode steps of the torch paths against dense attention on the full cache, interleaved."""
    import pandas as pd

    rows = []
    for context in contexts:
        sets = Squeezed.random(0, heads, heads, context, d, "cpu", torch.float32)
        idx, cnt = sets.select()
        full = partial(sdpa, sets.q[None], sets.k[None], sets.v[None])
        timings = compare(
            {"dense": full, "step": sets.step, "select": sets.select, "attend": partial(sets.attend, idx, cnt)}, rounds
        )
        for name, label in (
            ("step", "squeezed attention, one step"),
            ("select", "its look-up and compaction"),
            ("attend", "its attention"),
        ):
            rows.append(
                _compared(label, f"H={heads} N={context} D={d}", "SDPA on the full cache", timings, "dense", name)
            )
        for shape in [(1, heads, h, t, context) for h in (heads, max(heads // 4, 1)) for t in (1, 32)]:
            (case,) = tree_cases(shape, d, "cpu", torch.float32, 0.0)
            ((name, baseline),) = case.baselines.items()
            timings = compare({name: partial(baseline, 0), "kernel": partial(case.call, 0)}, rounds)
            rows.append(_compared(case.kernel, case.shape, name, timings, name, "kernel"))
    return pd.DataFrame(rows)


def cpu_weights(sides: Sequence[int] = (1024, 4096), rounds: int = 7) -> pd.DataFrame:
    """Float32 products of the torch path with the packed matrix against F.linear with the unpacked one."""
    import pandas as pd

    rows = []
    for shape in [(side, side, batch) for side in sides for batch in (1, 16)]:
        (case,) = linear_cases(shape, 0, "cpu", torch.float32, 0.0)
        baseline = case.baselines["F.linear"]
        timings = compare({"F.linear": partial(baseline, 0), "kernel": partial(case.call, 0)}, rounds)
        rows.append(_compared(case.kernel, case.shape, "F.linear", timings, "F.linear", "kernel"))
    return pd.DataFrame(rows)


def _compared(kernel: str, shape: str, against: str, timings: Timings, baseline: str, name: str) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "shape": shape,
        "ms": 1e3 * timings.median(name),
        "baseline": against,
        "baseline_ms": 1e3 * timings.median(baseline),
        "ratio": timings.ratio(baseline, name).value,
        "contended": timings.contended,
    }


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`."""
    return {
        "attention on the CPU": cpu_attention(),
        "packed weights on the CPU": cpu_weights(),
        "roofline of attention": roofline.attention_table(),
        "roofline of weights": roofline.weights_table(),
    }


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(
            "make bench-gpu measures the kernels on a CUDA GPU, and torch finds none here: their speed stays 'not"
            " measured'. make bench measures the torch paths on the CPU."
        )
    print(write(gpu_table()))


if __name__ == "__main__":
    main()
