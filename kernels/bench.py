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
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.metrics.timing import Timings, compare
from kernels import roofline
from kernels.bench_cases import CASES, Case, Squeezed, linear_cases, normal, sdpa, tree_cases

if TYPE_CHECKING:
    import pandas as pd

RESULTS = roofline.GPU_RESULTS
COLD_BYTES = 200e6  # what the copies of an input make up at least: over three times the L2 cache of an H200

# What `gpu_table` measures: shapes of each kind of CASES; side: of the matrices whose product gives a ceiling.
GPU_SHAPES: dict[str, Any] = {
    "head_dim": 128,
    "tree": [(1, 32, h, t, c) for h in (32, 8) for t in (1, 64) for c in (4096, 32768, 131072)],
    "squeezed": [(query, h, n) for query, h, *_ in roofline.MODELS.values() for n in roofline.KEYS],
    "linear": [
        (rows, channels, batch)
        for rows, channels in ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672), (28672, 8192))
        for batch in (1, 8, 16, 32)
    ],
    "kmeans": [(32, 32768, 1638)],
    "move": [(64, 32, 12)],
    "side": 8192,
}


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
