"""Simulated requests per second: by size of the cluster, by rate, and against the plain simpy engine.

python -m common.bench papers.splitwise.bench
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.metrics.timing import compare
from common.serving import engine, simpy_engine
from common.serving.traces import poisson_trace, sizes_from_quantiles
from papers.splitwise.designs import published, scaled
from papers.splitwise.experiment import LEVELS, QUANTILES
from papers.splitwise.method.simulation import simulate_log

if TYPE_CHECKING:
    import pandas as pd

REQUESTS = 2000


def trace_at(rate: float) -> pd.DataFrame:
    """REQUESTS requests or so, with sizes like those of the conversation trace."""
    sizes = [
        sizes_from_quantiles(dict(zip(LEVELS, QUANTILES["conv"][kind], strict=True)), 4000)
        for kind in ("prompt", "output")
    ]
    return poisson_trace(sizes[0], sizes[1], rate, REQUESTS / rate, seed=0)


def bench_simulation(rounds: int = 5) -> pd.DataFrame:
    """One row a case: simulated requests/s (median of the rounds), blocks of iterations a request, speed over simpy.

    `scale`: machines and rate are this fraction of the paper's 40 H100 machines (25 prompt and 26 token machines of
    Splitwise-HA); the rate per machine stays, so that the column shows what more machines cost.
    """
    import pandas as pd

    rows = []
    for name in ("Baseline-H100", "Splitwise-HA"):
        cases = [(scale, 70.0) for scale in (10, 5, 2, 1)] + [(5, rate) for rate in (20.0, 40.0, 100.0)]
        for scale, rate in cases:
            design = scaled("iso-power conv", scale)[name] if scale > 1 else published()["iso-power conv"][name]
            trace = trace_at(rate / scale)
            calls = {
                kind: _call(trace, design.pools, module.Cluster)
                for kind, module in (("heapq", engine), ("simpy", simpy_engine))
                if kind == "heapq" or scale >= 5
            }
            timings = compare(calls, rounds=rounds)
            log = simulate_log(trace, **design.pools)
            row: dict[str, Any] = {"design": name, "machines": design.label, "rate": rate, "requests": len(trace)}
            row["requests_per_s"] = len(trace) / timings.median("heapq")
            row["blocks_per_request"] = len(log.blocks) / len(trace)
            row["x_simpy"] = timings.ratio("simpy", "heapq").value if "simpy" in calls else None
            rows.append(row | {"contended": timings.contended})
    return pd.DataFrame(rows)


def _call(trace: pd.DataFrame, pools: dict[str, Any], kind: Any) -> Callable[[], Any]:
    return lambda: simulate_log(trace, engine=kind, **pools)


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`."""
    return {"simulation": bench_simulation()}
