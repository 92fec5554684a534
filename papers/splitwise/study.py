"""Part A, the simulated clusters: one function a question, each a job for a pool of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.serving import metrics, search, traces
from papers.splitwise.designs import BASELINES, Design
from papers.splitwise.method.simulation import latency_model, simulate_log

if TYPE_CHECKING:
    import pandas as pd

    from common.serving.engine import Log

Row = dict[str, Any]
SLO = {  # slowdown against the request alone on a DGX-A100 (table t5); a cluster is feasible strictly below all nine
    "ttft_p50": 2.0, "ttft_p90": 3.0, "ttft_p99": 6.0,
    "tbt_p50": 1.25, "tbt_p90": 1.5, "tbt_p99": 5.0,
    "e2e_p50": 1.25, "e2e_p90": 1.5, "e2e_p99": 5.0,
}  # fmt: skip
MODEL = "bloom-176b"


def alone() -> Any:
    """The latency model that slowdowns refer to, for every design alike."""
    return latency_model(MODEL, "a100-80gb")


@cache
def sizes(folder: str, trace: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens [requests] of a trace, as the data stage wrote them."""
    import pandas as pd

    frame = pd.read_csv(Path(folder) / f"{trace}.csv")
    return frame["prompt_tokens"].to_numpy(), frame["output_tokens"].to_numpy()


@cache
def trace_of(folder: str, trace: str, rate: float, seconds: float, seed: int) -> pd.DataFrame:
    """Poisson arrivals with sizes of a trace; the same for every design (common random numbers)."""
    return traces.poisson_trace(*sizes(folder, trace), rate, seconds, seed)


def measured(log: Log) -> dict[str, float]:
    """The nine quantiles of slowdown."""
    return metrics.quantiles(metrics.slowdowns(metrics.request_table(log), alone()))


def quantiles_at(
    folder: str, design: Design, trace: str, rate: float, seconds: float, seed: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """The nine quantiles of slowdown of a design at a rate."""
    return measured(simulate_log(trace_of(folder, trace, rate, seconds, seed), MODEL, **{**design.pools, **settings}))


def feasible_at(
    folder: str, design: Design, trace: str, rate: float, seconds: float, seed: int, settings: Mapping[str, Any]
) -> bool:
    """Whether a design meets the nine objectives at a rate; a run that cannot any more is given up."""
    requests = trace_of(folder, trace, rate, seconds, seed)
    stop = metrics.hopeless(SLO, alone(), len(requests))
    log = simulate_log(requests, MODEL, stop=stop, **{**design.pools, **settings})
    return not log.unfinished and metrics.meets(measured(log), SLO)


def largest_rate(
    folder: str, design: Design, trace: str, seconds: float, seed: int, settings: Mapping[str, Any],
    low: float, high: float, tolerance: float,
) -> float:  # fmt: skip
    """The largest rate (requests/s) at which a design meets the objectives, by bisection; 0 if it does not at `low`."""

    def feasible(rate: float) -> bool:
        return feasible_at(folder, design, trace, rate, seconds, seed, settings)

    return search.largest_feasible(feasible, low, high, tolerance)


def largest_rate_row(scale: int, arguments: tuple[Any, ...]) -> Row:
    """`largest_rate` of a cluster of 1/scale of the full size, as the rate of the full size."""
    return {"largest_rate": scale * largest_rate(*arguments)}


def provisioned(
    folder: str, name: str, trace: str, rate: float, seconds: float, seed: int, most: int
) -> list[tuple[int, int]]:
    """The feasible clusters of a design at a rate from which no machine can be taken: (prompt, token) machines.

    From the fewest prompt machines upwards: the least number of token machines for each, until more prompt machines
    save none. Searches as if more machines never hurt. most: machines of a pool at most. A baseline has one entry
    (machines, 0).
    """

    def holds(prompt: int, token: int) -> bool:
        return feasible_at(folder, Design(name, prompt, token), trace, rate, seconds, seed, {})

    if name in BASELINES:
        machines = search.least_feasible(lambda n: holds(n, 0), 1, most)
        return [] if machines is None else [(machines, 0)]
    fewest = search.least_feasible(lambda n: holds(n, most), 1, most)
    floor = search.least_feasible(lambda n: holds(most, n), 1, most)
    if fewest is None or floor is None:
        return []
    found, token = [], most
    for prompt in range(fewest, most + 1):
        less = search.least_feasible(lambda n, prompt=prompt: holds(prompt, n), floor, token)
        if less is not None and (less < token or not found):
            found.append((prompt, less))
            token = less
        if token == floor:
            break
    return found


def provisioned_rows(*arguments: Any) -> list[Row]:
    """`provisioned` as a table, with cost and power; one row without machines if nothing is feasible."""
    name, found = arguments[1], provisioned(*arguments)
    rows = [Design(name, *pair) for pair in found]
    return [{"design": name, "prompt": d.prompt, "token": d.token, "cost": d.cost, "power": d.power} for d in rows] or [
        {"design": name, "prompt": None, "token": None, "cost": None, "power": None}
    ]


def transfer_overhead(
    folder: str,
    design: Design,
    trace: str,
    rate: float,
    seconds: float,
    seed: int,
    links: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """For each kind of link: end-to-end seconds over those of an infinitely fast link, and the second token's delay.

    links: {name: settings of `simulate`}.
    """
    requests = trace_of(folder, trace, rate, seconds, seed)

    def run(settings: Mapping[str, Any]) -> pd.DataFrame:
        return metrics.request_table(simulate_log(requests, MODEL, **design.pools, **settings))

    free = run({"bandwidth_gib": float("inf")})
    rows = []
    for name, settings in links.items():
        table = run(settings)
        moved = table["transfer_time"] > 0
        rows.append(
            {
                "link": name,
                "e2e_overhead_percent": 100 * (table["response_time"].mean() / free["response_time"].mean() - 1),
                "transfer_ms": 1e3 * table.loc[moved, "transfer_time"].mean(),
                "second_token_delay_ms": 1e3 * table.loc[moved, "nth_token_overhead"].mean(),
                "moved_share": moved.mean(),
            }
        )
    return rows


def activity(folder: str, design: Design, trace: str, rate: float, seconds: float, seed: int) -> list[Row]:
    """Busy time by tokens in the batch, for each pool (a machine counts to the pool it came from)."""
    log = simulate_log(trace_of(folder, trace, rate, seconds, seed), MODEL, **design.pools)
    rows = []
    for pool in dict.fromkeys(machine.home for machine in log.machines):
        frame = metrics.active_tokens(log, {m.index for m in log.machines if m.home == pool})
        rows += [{"pool": pool, **row} for row in frame.to_dict("records")]
    return rows


def strip(
    folder: str, design: Design, trace: str, rate: float, seconds: float, seed: int, start: float, end: float
) -> list[Row]:
    """What the first prompt and the first token machine did between two times: one row a block of iterations."""
    log = simulate_log(trace_of(folder, trace, rate, seconds, seed), MODEL, **design.pools)
    first = {pool: next(m.index for m in log.machines if m.home == pool) for pool in {m.home for m in log.machines}}
    return [
        {"pool": pool, **block._asdict()}
        for pool, machine in first.items()
        for block in log.blocks
        if block.machine == machine and block.end > start and block.start < end
    ]


def call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    """The result of one job, (function, arguments)."""
    function, arguments = job
    return function(*arguments)
