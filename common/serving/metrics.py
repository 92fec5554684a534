"""What a simulation says of its requests and machines: latencies, slowdowns, service-level objectives, utilisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from common.serving.engine import Log, Request
    from common.serving.latency import LatencyModel

METRICS = ("ttft", "tbt", "e2e")
QUANTILES = (0.5, 0.9, 0.99)


def request_table(log: Log) -> pd.DataFrame:
    """One row a request, in the order of the trace; seconds, NaN for what never happened.

    ttft: arrival to first token. tbt: (response_time - ttft) / output_tokens. queue_time: arrival to the start of the
    prompt. nth_token_overhead: first token to the start of the decode task. prompt_machine, decode_machine: numbers,
    -1 before the arrival.
    """
    import pandas as pd

    def numbers(values: list[float | None]) -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values])

    requests = log.requests
    arrival = np.array([r.arrival for r in requests])
    first, completed = numbers([r.first_token for r in requests]), numbers([r.completed for r in requests])
    output = np.array([r.output_tokens for r in requests], dtype=np.int64)
    ttft, response = first - arrival, completed - arrival
    return pd.DataFrame(
        {
            "request_id": np.arange(len(requests)),
            "arrival": arrival,
            "prompt_tokens": np.array([r.prompt_tokens for r in requests], dtype=np.int64),
            "output_tokens": output,
            "ttft": ttft,
            "tbt": (response - ttft) / output,
            "response_time": response,
            "transfer_time": np.array([r.transfer_seconds for r in requests]),
            "queue_time": numbers([r.prompt_start for r in requests]) - arrival,
            "nth_token_overhead": np.where(output > 1, numbers([r.decode_start for r in requests]) - first, 0.0),
            "prompt_machine": np.array([-1 if r.prompt_machine is None else r.prompt_machine.index for r in requests]),
            "decode_machine": np.array([-1 if r.decode_machine is None else r.decode_machine.index for r in requests]),
        }
    )


def slowdowns(table: pd.DataFrame, alone: LatencyModel) -> pd.DataFrame:
    """ttft, tbt and e2e of each request over those of the same request on an idle machine with latency model `alone`.

    Alone: ttft = prompt(prompt_tokens); tbt = token(prompt_tokens); e2e = ttft + tbt * (output_tokens - 1)
    (splitwise-sim, notebooks/perf_model.py and plots.ipynb).
    """
    import pandas as pd

    prompt = table["prompt_tokens"].tolist()
    ttft = np.array([alone.prompt(n) for n in prompt])
    tbt = np.array([alone.token(n) for n in prompt])
    e2e = ttft + tbt * (table["output_tokens"].to_numpy() - 1)
    return pd.DataFrame({"ttft": table["ttft"] / ttft, "tbt": table["tbt"] / tbt, "e2e": table["response_time"] / e2e})


def quantiles(slowdown: pd.DataFrame) -> dict[str, float]:
    """{'ttft_p50': ..., 'e2e_p99': ...}; infinite if a request never finished."""
    return {
        f"{metric}_p{round(100 * q)}": float(np.quantile(slowdown[metric], q))
        if slowdown[metric].notna().all()
        else np.inf
        for metric in METRICS
        for q in QUANTILES
    }


def meets(measured: Mapping[str, float], objectives: Mapping[str, float]) -> bool:
    """Whether every objective holds strictly; KeyError for one that was not measured."""
    return all(measured[name] < limit for name, limit in objectives.items())


def hopeless(objectives: Mapping[str, float], alone: LatencyModel, total: int) -> Callable[[Request], bool]:
    """A `stop` for a simulation of `total` requests: true as soon as some objective is missed whatever follows.

    That is when so many requests are at or above the limit of a quantile q that the value at its lower rank,
    floor(q * (total - 1)), must be among them; `meets` on the whole run would say no as well.
    """
    limits: dict[str, list[tuple[float, int]]] = {}
    for name, limit in objectives.items():
        metric, level = name.split("_p")
        limits.setdefault(metric, []).append((limit, total - math.floor(float(level) / 100 * (total - 1))))
    counts = {metric: [0] * len(pairs) for metric, pairs in limits.items()}

    def missed(metric: str, slowdown: float) -> bool:
        lost = False
        for i, (limit, allowed) in enumerate(limits.get(metric, [])):
            if slowdown >= limit:
                counts[metric][i] += 1
                lost = lost or counts[metric][i] >= allowed
        return lost

    def stop(request: Request) -> bool:
        assert request.first_token is not None
        prompt, ttft = alone.prompt(request.prompt_tokens), request.first_token - request.arrival
        if request.completed is None:
            return missed("ttft", ttft / prompt)
        token, response = alone.token(request.prompt_tokens), request.completed - request.arrival
        lost = missed("tbt", (response - ttft) / request.output_tokens / token)
        return missed("e2e", response / (prompt + token * (request.output_tokens - 1))) or lost

    return stop


def active_tokens(log: Log, machines: set[int] | None = None) -> pd.DataFrame:
    """Busy seconds by the tokens in the batch (a prompt counts its length): columns tokens, seconds, share, cumulative.

    machines: the numbers of those to count; None counts all.
    """
    import pandas as pd

    seconds: dict[int, float] = {}
    for block in log.blocks:
        if machines is None or block.machine in machines:
            tokens = block.prompt_tokens + block.decodes
            seconds[tokens] = seconds.get(tokens, 0.0) + block.end - block.start
    frame = pd.DataFrame({"tokens": sorted(seconds), "seconds": [seconds[n] for n in sorted(seconds)]})
    frame["share"] = frame["seconds"] / frame["seconds"].sum()
    frame["cumulative"] = frame["share"].cumsum()
    return frame


def utilisation(log: Log) -> pd.DataFrame:
    """One row a machine: busy seconds, their share of the simulated time, and the largest share of memory in use."""
    import pandas as pd

    end = max((block.end for block in log.blocks), default=0.0)
    busy = np.zeros(len(log.machines))
    for block in log.blocks:
        busy[block.machine] += block.end - block.start
    return pd.DataFrame(
        {
            "machine": [m.name for m in log.machines],
            "pool": [m.home for m in log.machines],
            "busy_s": busy,
            "busy_share": busy / end if end else busy,
            "peak_memory_share": [m.peak_memory / m.capacity for m in log.machines],
        }
    )
