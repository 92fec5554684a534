"""The two engines agree on random traces; conservation laws; closed forms of queueing theory; other batching rules."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.serving import batching, engine, metrics, schedulers, simpy_engine, traces
from common.serving.latency import LatencyModel, from_points

KV = 1000  # bytes of one token
SLOW = from_points({128: 80, 1024: 290, 4096: 1300}, {128: 48, 1024: 50, 4096: 52}, mixed_factor=1.1)
FAST = from_points({128: 48, 1024: 130, 4096: 650}, {128: 36, 1024: 36.5, 4096: 38}, mixed_factor=1.1)


def split(request: Any, cluster: Any) -> tuple[Any, Any]:
    """Least loaded of two fixed pools."""
    source = min(cluster.pools["prompt"], key=lambda m: m.pending_tokens)
    target = min(cluster.pools["token"], key=lambda m: m.reserved)
    return source, target if request.output_tokens > 1 else source


def random_trace(seed: int, ties: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 200))
    arrival = rng.exponential(1 / rng.choice([2, 10, 50]), count).cumsum()
    longest = int(rng.choice([50, 1500, 6000]))
    return pd.DataFrame(
        {
            "arrival": np.ceil(arrival) if ties else arrival,
            "prompt_tokens": rng.integers(1, longest, count),
            "output_tokens": rng.integers(1, int(rng.choice([3, 40, 400])), count),
        }
    )


def cluster_of(seed: int, tokens: int) -> tuple[list[engine.MachineSpec], Any]:
    """One pool or two, of slow and fast machines with room for so many tokens."""
    if seed % 2:
        specs = [engine.MachineSpec(f"m{i}", "all", (SLOW, FAST)[i % 2], tokens * KV) for i in range(1 + seed % 3)]
        return specs, schedulers.token_jsq
    pools = ["prompt"] * (1 + seed % 3) + ["token"] * 2
    return [engine.MachineSpec(f"m{i}", pool, (SLOW, FAST)[i % 2], tokens * KV) for i, pool in enumerate(pools)], split


def run(kind: Any, specs: list[engine.MachineSpec], schedule: Any, trace: pd.DataFrame, **keywords: Any) -> engine.Log:
    cluster = kind(specs, schedule, batching.mixed_batching, bandwidth=2e8, **keywords)
    return cluster.run(engine.requests_of(trace, KV))


@pytest.mark.parametrize("seed", range(24))
def test_both_engines_write_the_same_log(seed: int) -> None:
    """Requests, blocks of iterations and peak memory; with ties, memory pressure, tight limits and both decode axes."""
    trace = random_trace(seed, ties=seed % 4 == 0)
    tokens = 6500 if seed % 3 else 60_000  # the small memory stalls transfers, and can fill with prompts for good
    specs, schedule = cluster_of(seed, tokens)
    if seed % 5 == 0:
        specs = [
            engine.MachineSpec(
                s.name, s.pool, LatencyModel(s.latency.prompt, s.latency.token, 1.1, "context"), s.capacity
            )
            for s in specs
        ]
    limits = engine.Limits(batch_size=6, batch_tokens=300, passes=2) if seed % 2 else engine.Limits()
    stable = partial(engine.Cluster, stable_ties=True)
    fast, plain = (run(kind, specs, schedule, trace, limits=limits) for kind in (stable, simpy_engine.Cluster))
    pd.testing.assert_frame_equal(metrics.request_table(fast), metrics.request_table(plain), rtol=0, atol=1e-9)
    order = ["machine", "start", "end"]
    blocks = [pd.DataFrame(log.blocks).sort_values(order).reset_index(drop=True) for log in (fast, plain)]
    pd.testing.assert_frame_equal(*blocks, rtol=0, atol=1e-9)
    assert [m.peak_memory for m in fast.machines] == [m.peak_memory for m in plain.machines]
    assert fast.unfinished == plain.unfinished


def test_a_memory_full_of_prompts_ends_with_unfinished_requests() -> None:
    """Nothing is evicted: three prompts fill the memory and none of them has room to decode."""
    trace = pd.DataFrame({"arrival": [1.0, 1.0, 1.0], "prompt_tokens": [99, 99, 99], "output_tokens": [50, 50, 50]})
    for kind in (engine.Cluster, simpy_engine.Cluster):
        log = run(kind, [engine.MachineSpec("m", "all", FAST, 300 * KV)], schedulers.token_jsq, trace)
        assert log.unfinished == 3
        assert metrics.request_table(log)["response_time"].isna().all()
        assert not np.isfinite(
            list(metrics.quantiles(metrics.slowdowns(metrics.request_table(log), FAST)).values())
        ).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_conservation(seed: int) -> None:
    """Tokens generated = asked for; memory within capacity, empty at the end; Little's law; blocks never overlap."""
    trace = random_trace(seed)
    tight = run(engine.Cluster, *cluster_of(seed, 7000), trace)
    assert all(0 < machine.peak_memory <= machine.capacity or not machine.steps for machine in tight.machines)
    log = run(engine.Cluster, *cluster_of(seed, 10**7), trace)
    assert log.unfinished == 0
    blocks = pd.DataFrame(log.blocks)
    assert blocks["prompts"].sum() == len(trace)
    assert blocks["prompt_tokens"].sum() == trace["prompt_tokens"].sum()
    assert (blocks["decodes"] * blocks["iterations"]).sum() == (trace["output_tokens"] - 1).sum()
    for machine in log.machines:
        assert machine.memory == machine.reserved == machine.pending_tokens == machine.residents == 0
    for _, own in blocks.groupby("machine"):
        assert (own["start"].to_numpy()[1:] >= own["end"].to_numpy()[:-1] - 1e-9).all()
    table = metrics.request_table(log)
    times = np.concatenate([table["arrival"], table["arrival"] + table["response_time"]])
    step = np.repeat([1, -1], len(table))[np.argsort(times)]
    in_system = (step.cumsum()[:-1] * np.diff(np.sort(times))).sum()
    assert in_system == pytest.approx(table["response_time"].sum(), rel=1e-9)  # L * T = sum of W


@pytest.mark.parametrize("seed", range(6))
def test_no_machine_idles_while_a_task_that_fits_waits(seed: int) -> None:
    """Work conservation: between two blocks of a machine, none of its requests was there and unserved."""
    trace = random_trace(seed)
    log = run(engine.Cluster, *cluster_of(2 * seed + 1, 60_000), trace)
    table, blocks = metrics.request_table(log), pd.DataFrame(log.blocks)
    for machine, own in blocks.groupby("machine"):
        here = table[table["prompt_machine"] == machine]
        inside = np.stack([here["arrival"], here["arrival"] + here["response_time"]], axis=1)
        for end, start in zip(own["end"].to_numpy()[:-1], own["start"].to_numpy()[1:], strict=True):
            if start - end > 1e-9:
                middle = (start + end) / 2
                assert not ((inside[:, 0] < middle) & (inside[:, 1] > middle)).any()


def waits(
    service: np.ndarray, arrival: np.ndarray, machines: int = 1, schedule: Any = schedulers.token_jsq
) -> np.ndarray:
    """Waiting times when each request is one prompt of its own service time (seconds), one at a time."""
    # a prompt of n tokens takes n ms, exactly; batch_size 1 lets one prompt run at a time
    latency = from_points({1: 1.0, 2: 2.0}, {1: 1.0, 2: 1.0})
    specs = [engine.MachineSpec(f"m{i}", "all", latency, 10**12) for i in range(machines)]
    limits = engine.Limits(batch_size=1, batch_tokens=10**9, passes=10**9)  # the published priority is not first come
    trace = pd.DataFrame({"arrival": arrival, "prompt_tokens": np.rint(1000 * service).astype(int), "output_tokens": 1})
    cluster = engine.Cluster(specs, schedule, batching.mixed_batching, limits=limits)
    return metrics.request_table(cluster.run(engine.requests_of(trace, 1)))["queue_time"].to_numpy()


def within_four_standard_errors(values: np.ndarray, expected: float) -> bool:
    """Batch means: 40 batches are nearly independent, their spread gives the standard error of the mean."""
    values = values[len(values) // 20 :]
    means = np.array([batch.mean() for batch in np.array_split(values, 40)])
    return abs(means.mean() - expected) < 4 * means.std(ddof=1) / np.sqrt(len(means))


def lindley(service: np.ndarray, arrival: np.ndarray) -> np.ndarray:
    """Waiting times of one queue, first come first served: W[n+1] = max(0, W[n] + S[n] - A[n])."""
    wait = np.zeros(len(service))
    for n, gap in enumerate(np.diff(arrival)):
        wait[n + 1] = max(0.0, wait[n] + service[n] - gap)
    return wait


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("kind", ["constant", "general"])
def test_one_queue_waits_as_pollaczek_and_khinchine_say(kind: str, load: float) -> None:
    """E[W] = rate E[S^2] / (2 (1 - load)), M/D/1 for constant S; and Lindley's recursion, request by request."""
    rng = np.random.default_rng(int(10 * load))
    count = 40_000
    service = (
        np.full(count, 0.25)
        if kind == "constant"
        else rng.choice([0.05, 0.2, 0.9, 1.6], count, p=[0.5, 0.3, 0.15, 0.05])
    )
    first, second = service.mean(), (service**2).mean()
    arrival = rng.exponential(first / load, count).cumsum()
    measured = waits(service, arrival)
    np.testing.assert_allclose(measured, lindley(service, arrival), rtol=0, atol=1e-7)  # clock times reach 5e4 s
    assert within_four_standard_errors(measured, load / first * second / (2 * (1 - load)))


@pytest.mark.parametrize("seed", range(3))
def test_lindley_to_a_nanosecond(seed: int) -> None:
    rng = np.random.default_rng(seed)
    service = rng.integers(1, 900, 2000) / 1000
    arrival = rng.exponential(0.6, 2000).cumsum()
    np.testing.assert_allclose(waits(service, arrival), lindley(service, arrival), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_central_queue_waits_as_erlang_says_and_jsq_waits_longer() -> None:
    """M/M/c: machines fed one by one from a central queue, against Erlang C; JSQ decides on arrival instead."""
    rng = np.random.default_rng(5)
    machines, load, mean, count = 3, 0.8, 0.4, 60_000
    service = np.maximum(1, np.rint(1000 * rng.exponential(mean, count))) / 1000
    arrival = rng.exponential(mean / (machines * load), count).cumsum()
    offered = machines * load
    term = [offered**k / np.prod(np.arange(1, k + 1), dtype=float) for k in range(machines + 1)]
    delayed = term[machines] / (1 - load) / (sum(term[:machines]) + term[machines] / (1 - load))
    expected = delayed * mean / (machines * (1 - load))
    free = np.zeros(machines)  # when each machine is free again: the central queue, first come first served
    choice, central = np.zeros(count, dtype=int), np.zeros(count)
    for n in range(count):
        choice[n] = free.argmin()
        begin = max(arrival[n], free[choice[n]])
        central[n], free[choice[n]] = begin - arrival[n], begin + service[n]

    def as_chosen(request: Any, cluster: Any) -> tuple[Any, Any]:
        machine = cluster.machines[choice[request.index]]
        return machine, machine

    measured = waits(service, arrival, machines, as_chosen)
    np.testing.assert_allclose(measured, central, rtol=0, atol=1e-6)
    assert within_four_standard_errors(measured, expected)
    assert waits(service, arrival, machines, schedulers.jsq).mean() >= measured.mean()


@pytest.mark.parametrize("seed", range(8))
def test_giving_up_early_never_changes_the_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    objectives = {"ttft_p50": 2.0, "ttft_p99": 6.0, "tbt_p90": 1.3, "e2e_p90": 1.4, "e2e_p99": 3.0}
    for rate in (1.0, 3.0, 6.0, 9.0, 12.0, 30.0):
        trace = traces.poisson_trace(rng.integers(50, 3000, 500), rng.integers(1, 80, 500), rate, 40, seed)
        specs, schedule = cluster_of(seed, 60_000)
        whole = run(engine.Cluster, specs, schedule, trace)
        table = metrics.slowdowns(metrics.request_table(whole), FAST)
        meets = metrics.meets(metrics.quantiles(table), objectives)
        cluster = engine.Cluster(specs, schedule, batching.mixed_batching, bandwidth=2e8)
        stop = metrics.hopeless(objectives, FAST, len(trace))
        cut = cluster.run(engine.requests_of(trace, KV), stop)
        table = metrics.slowdowns(metrics.request_table(cut), FAST)
        assert (not cut.unfinished and metrics.meets(metrics.quantiles(table), objectives)) == meets
        if cut.unfinished:
            assert not meets


def test_continuous_batching_never_mixes_and_request_level_never_admits_midway() -> None:
    trace = random_trace(3)
    spec = [engine.MachineSpec("m", "all", FAST, 60_000 * KV)]
    logs = {
        name: engine.Cluster(spec, schedulers.token_jsq, rule).run(engine.requests_of(trace, KV))
        for name, rule in batching.BATCHING.items()
    }
    assert all(log.unfinished == 0 for log in logs.values())
    assert any(block.prompts and block.decodes for block in logs["mixed"].blocks)
    assert not any(block.prompts and block.decodes for block in logs["continuous"].blocks)
    for block in logs["request"].blocks:
        if block.prompts:
            assert not block.decodes
            before = [r for r in logs["request"].requests if r.prompt_start < block.start]
            assert all(r.completed <= block.start + 1e-9 for r in before)  # the batch before has run to completion
    assert logs["request"].blocks[-1].end >= logs["mixed"].blocks[-1].end


def test_the_plain_engine_refuses_other_batching() -> None:
    with pytest.raises(ValueError, match="continuous_batching"):
        simpy_engine.Cluster([engine.MachineSpec("m", "all", FAST, KV)], schedulers.jsq, batching.continuous_batching)


def test_one_pool_schedulers_choose_as_they_say() -> None:
    trace = pd.DataFrame({"arrival": [0.0, 0.01, 0.02, 0.03], "prompt_tokens": [3000, 10, 10, 10], "output_tokens": 2})
    chosen = {}
    for name, schedule in schedulers.ONE_POOL.items():
        specs = [engine.MachineSpec(f"m{i}", "all", FAST, 60_000 * KV) for i in range(2)]
        chosen[name] = metrics.request_table(run(engine.Cluster, specs, schedule, trace))["prompt_machine"].tolist()
    assert chosen == {"token_jsq": [0, 1, 1, 1], "jsq": [0, 1, 0, 1], "round_robin": [0, 1, 0, 1]}
