"""Simulates a cluster that serves a trace, with the two phases of a request on one machine or split over two pools."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.serving import catalogue
from common.serving.batching import BATCHING
from common.serving.engine import Cluster, Limits, Log, MachineSpec, Request, requests_of
from common.serving.latency import LatencyModel, from_points
from common.serving.metrics import request_table
from common.serving.schedulers import ONE_POOL
from common.serving.traces import load_trace
from papers.splitwise.method.scheduler import TWO_POOLS

if TYPE_CHECKING:
    import pandas as pd

MIXED_FACTOR = 1.1  # an iteration with prompts and decodes against one of as many prompt tokens
BANDWIDTH_GIB = 200.0  # of a link between two machines, GiB/s
OVERLAP_FACTOR = 10.0  # sending layer by layer hides 90 percent of a transfer behind the prompt: modelled as bandwidth
COLUMNS = ["request_id", "arrival", "prompt_tokens", "output_tokens", "ttft", "tbt", "response_time", "transfer_time"]


@cache
def performance() -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """The published medians: {model: {GPU: {'prompt_ms' or 'token_ms': {batched tokens: milliseconds}}}}."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("performance.yaml").read_text())


@cache
def latency_model(model: str, gpu: str, decode_axis: str = "tasks") -> LatencyModel:
    """The published latency curves of a model on a machine with 8 GPUs of a kind, such as ('bloom-176b', 'h100-80gb').

    decode_axis: 'tasks' reads the decode curve at the number of decodes, as the published simulator does; 'context' at
    the tokens in their KV caches, against which the curve was measured. ValueError for a pair that was not profiled.
    """
    known = performance()
    if gpu not in known.get(model, {}):
        pairs = ", ".join(f"{m} on {g}" for m, by_gpu in known.items() for g in by_gpu)
        raise ValueError(f"no latency profile of model {model!r} on GPU {gpu!r}; there are: {pairs}")
    points = known[model][gpu]
    return from_points(points["prompt_ms"], points["token_ms"], MIXED_FACTOR, decode_axis)


def simulate(
    trace: pd.DataFrame | str | Path,
    model: str = "bloom-176b",
    scheduler: str = "mixed_pool",
    *,
    prompt_machines: Mapping[str, int] | None = None,
    token_machines: Mapping[str, int] | None = None,
    machines: Mapping[str, int] | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """One row a request: COLUMNS, times in seconds.

    trace: a table or CSV path with arrival [s], prompt_tokens, output_tokens (and request_id, else the row's number).
    scheduler: 'mixed_pool' or 'fixed_pools' with prompt_machines and token_machines, 'token_jsq', 'jsq' or
    'round_robin' with machines; each is {machine: count}, such as {"dgx-h100": 2}. settings: see `simulate_log`.

    ttft: first token - arrival. tbt: (response_time - ttft) / output_tokens, as published. transfer_time: of the KV
    cache, 0 within a machine. A request that the published rules leave stuck (memory full of prompts, nothing is
    evicted) has NaN, and a warning says how many. Raises ValueError for a bad trace, an unknown name, pools that do not
    go with the scheduler, or a request that no machine can hold.
    """
    log = simulate_log(
        trace, model, scheduler, prompt_machines=prompt_machines, token_machines=token_machines, machines=machines,
        **settings,
    )  # fmt: skip
    if log.unfinished:
        warnings.warn(f"{log.unfinished} of {len(log.requests)} requests never finish: memory is full", stacklevel=2)
    table = request_table(log)
    table["request_id"] = load_trace(trace)["request_id"]
    return table[COLUMNS]


def simulate_log(
    trace: pd.DataFrame | str | Path,
    model: str = "bloom-176b",
    scheduler: str = "mixed_pool",
    *,
    prompt_machines: Mapping[str, int] | None = None,
    token_machines: Mapping[str, int] | None = None,
    machines: Mapping[str, int] | None = None,
    bandwidth_gib: float = BANDWIDTH_GIB,
    overlap: bool = False,
    batching: str = "mixed",
    decode_axis: str = "tasks",
    limits: Limits | None = None,
    latencies: Mapping[str, LatencyModel] | None = None,
    engine: Callable[..., Any] = Cluster,
    stop: Callable[[Request], bool] | None = None,
) -> Log:
    """`simulate` with everything that happened: requests, blocks of iterations, machines.

    bandwidth_gib: GiB/s of a link. overlap: the KV cache is sent layer by layer, which leaves a tenth of the time.
    batching: 'mixed', 'continuous' or 'request'. latencies: {machine: latency model} instead of the published profile.
    engine: `common.serving.engine.Cluster` or `common.serving.simpy_engine.Cluster`. stop: see `Cluster.run`.
    """
    pools = _pools(scheduler, prompt_machines, token_machines, machines)
    served = catalogue.served_model(model)
    specs = []
    for pool, counts in pools.items():
        for name, count in counts.items():
            hardware = catalogue.hardware(name)
            if latencies is not None and name in latencies:
                latency = latencies[name]
            else:
                latency = latency_model(model, hardware.gpu.name, decode_axis)
            specs += [MachineSpec(name, pool, latency, catalogue.kv_capacity(hardware, served))] * count
    if batching not in BATCHING:
        raise ValueError(f"unknown batching {batching!r}; known: {', '.join(BATCHING)}")
    if not bandwidth_gib > 0:
        raise ValueError(f"bandwidth_gib {bandwidth_gib} must be positive")
    checked = load_trace(trace)
    requests = requests_of(checked, served.kv_bytes)
    capacity = min(spec.capacity for spec in specs)
    for request in requests:
        if request.memory > capacity:
            tokens = capacity // served.kv_bytes
            raise ValueError(
                f"trace row {request.index}: prompt_tokens + output_tokens = "
                f"{request.prompt_tokens + request.output_tokens} is more than the {tokens} tokens of {model} "
                "that the memory of a machine holds"
            )
    schedule, on_idle = TWO_POOLS[scheduler] if scheduler in TWO_POOLS else (ONE_POOL[scheduler], None)
    bandwidth = bandwidth_gib * catalogue.GIB * (OVERLAP_FACTOR if overlap else 1.0)
    return engine(specs, schedule, BATCHING[batching], on_idle=on_idle, bandwidth=bandwidth, limits=limits).run(
        requests
    )


def _pools(
    scheduler: str,
    prompt: Mapping[str, int] | None,
    token: Mapping[str, int] | None,
    machines: Mapping[str, int] | None,
) -> dict[str, Mapping[str, int]]:
    """The pools that go with a scheduler, checked."""
    if scheduler in TWO_POOLS:
        pools = {"prompt": prompt, "token": token}
        wanted, other = "prompt_machines and token_machines", machines
    elif scheduler in ONE_POOL:
        pools = {"all": machines}
        wanted, other = "machines", prompt or token
    else:
        raise ValueError(f"unknown scheduler {scheduler!r}; known: {', '.join([*TWO_POOLS, *ONE_POOL])}")
    if other or not all(pools.values()):
        raise ValueError(f"scheduler {scheduler!r} takes {wanted}, each like {{'dgx-h100': 2}}, and no other pool")
    given = {pool: counts for pool, counts in pools.items() if counts is not None}
    for counts in given.values():
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{count!r} machines {name!r}: a pool has one machine of a kind or more")
    return given
