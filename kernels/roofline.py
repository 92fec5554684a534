"""What published shapes could gain at most: rooflines from the kernels' own costs, as tables for a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernels import centroid_scores, compact_indices, merge_partials, sparse_attention, tree_attention, w24_gemv
from kernels.cost import Cost
from kernels.w24 import STRIPE, f24_bytes

if TYPE_CHECKING:
    import pandas as pd

# Attainable on an H200, measured: a device copy, and a bfloat16 matrix product on random data.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 788e12

# Llama-2 (Touvron et al. 2023; the checkpoints' config.json): query heads, key heads, hidden and feed-forward size.
MODELS = {
    "Llama-2-7B": (32, 32, 4096, 11008),
    "Llama-2-13B": (40, 40, 5120, 13824),
    "Llama-2-70B": (64, 8, 8192, 28672),
}
KEYS = tuple(1 << n for n in range(13, 20))  # 8K to 512K
GPU_RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu" / "kernels.csv"  # `make bench-gpu` writes it
NOT_MEASURED = "not measured"


def measured_us(kernel: str, shape: str, baseline: str, path: Path = GPU_RESULTS) -> tuple[float | str, float | str]:
    """Median microseconds of (baseline, kernel) at the shape that begins so, on the GPU of `path`; NOT_MEASURED for a
    shape that is not in it, and where there is no such file."""
    import pandas as pd

    if not path.exists():
        return NOT_MEASURED, NOT_MEASURED
    table = pd.read_csv(path)
    found = table[
        (table["kernel"] == kernel) & (table["baseline"] == baseline) & table["shape"].str.startswith(f"{shape} ")
    ]
    if found.empty:
        return NOT_MEASURED, NOT_MEASURED
    return float(found["baseline_us"].iloc[0]), float(found["median_us"].iloc[0])


def squeezed_cost(
    query_heads: int, heads: int, keys: int, head_dim: int, kept: float, clusters: float, itemsize: int = 2
) -> Cost:
    """One decode step over `keys` keys: look-up of the centroids, compaction, attention to a share `kept`, merging.

    clusters: centroids as a share of the keys. kept: share of the keys of a key head (for a group of query heads that
    share one list, of its union).
    """
    centroids, chosen = max(int(clusters * keys), 1), heads * round(kept * keys)
    pieces = chosen // sparse_attention.CHUNK + heads
    return (
        centroid_scores.cost(query_heads, heads, 1, centroids, head_dim, itemsize)
        + compact_indices.cost(heads, keys, centroids, chosen)
        + sparse_attention.cost(query_heads, heads, 1, chosen, head_dim, itemsize)
        + merge_partials.cost(pieces, heads, query_heads // heads, head_dim, itemsize)
    )


def attention_table(
    kept: float = 0.1,
    clusters: float = 0.05,
    bytes_per_second: float = BYTES_PER_SECOND,
    flops_per_second: float = FLOPS_PER_SECOND,
) -> pd.DataFrame:
    """A layer's attention in one decode step of batch 1 in fp16: a row for each model and number of keys.

    Microseconds of full attention and of Squeezed Attention that keeps a share `kept` of the keys, the bound of the
    speed-up that follows, and what a GPU took (`measured_us`; of kept = 0.1).
    """
    import pandas as pd

    rows = []
    for model, (query_heads, heads, hidden, _) in MODELS.items():
        head_dim = hidden // query_heads
        for keys in KEYS:
            full = tree_attention.cost(1, query_heads, heads, 1, keys - 1, head_dim)
            squeezed = squeezed_cost(query_heads, heads, keys, head_dim, kept, clusters)
            times = [cost.seconds(bytes_per_second, flops_per_second) for cost in (full, squeezed)]
            on_gpu = measured_us(
                "squeezed attention, one step", f"Hq={query_heads} Hkv={heads} N={keys} D={head_dim}",
                "SDPA on the full cache",
            )  # fmt: skip
            rows.append(
                {
                    "model": model,
                    "keys": keys,
                    "full_mb": full.bytes / 1e6,
                    "squeezed_mb": squeezed.bytes / 1e6,
                    "full_us": 1e6 * times[0],
                    "squeezed_us": 1e6 * times[1],
                    "speedup_bound": times[0] / times[1],
                    "full_measured_us": on_gpu[0],
                    "squeezed_measured_us": on_gpu[1],
                }
            )
    return pd.DataFrame(rows)


def weights_table(
    ratio_4bit: float = 0.153,
    batch: int = 1,
    bytes_per_second: float = BYTES_PER_SECOND,
    flops_per_second: float = FLOPS_PER_SECOND,
) -> pd.DataFrame:
    """The linear layers of each model in fp16 and in F24 with a share of 4-bit stripes: a row for each shape."""
    import pandas as pd

    rows = []
    for model, (query_heads, heads, hidden, inner) in MODELS.items():
        key_value = heads * hidden // query_heads
        for layer, out, into in (
            ("query, output", hidden, hidden),
            ("key, value", key_value, hidden),
            ("gate, up", inner, hidden),
            ("down", hidden, inner),
        ):
            four = round(ratio_4bit * into / STRIPE)
            packed = f24_bytes(out, into // STRIPE - four, four)
            costs = [w24_gemv.cost(batch, size, out, into) for size in (2 * out * into, packed)]
            times = [cost.seconds(bytes_per_second, flops_per_second) for cost in costs]
            on_gpu = measured_us("w24_gemv V3", f"OC={out} IC={into} B={batch}", "F.linear")
            rows.append(
                {
                    "model": model,
                    "layer": layer,
                    "rows": out,
                    "channels": into,
                    "bits_per_weight": 8 * packed / (out * into),
                    "fp16_us": 1e6 * times[0],
                    "f24_us": 1e6 * times[1],
                    "speedup_bound": times[0] / times[1],
                    "fp16_measured_us": on_gpu[0],
                    "f24_measured_us": on_gpu[1],
                }
            )
    return pd.DataFrame(rows)
