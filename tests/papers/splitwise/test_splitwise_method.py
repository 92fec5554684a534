"""`simulate`: golden runs, the released simulator's answers, laws of the phase split, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from common.data.sources import MissingSource, locate
from common.metrics.intervals import exact
from common.reporting.claims import load
from common.run import ROOT
from common.serving import engine, metrics, simpy_engine, traces
from common.serving.batching import mixed_batching
from common.serving.latency import from_profile
from papers.splitwise import latency_model, simulate, simulate_log
from papers.splitwise.designs import STUDIES, counts_at_equal, published, scaled
from papers.splitwise.method.scheduler import mixed_pool, return_to_pool
from papers.splitwise.method.simulation import COLUMNS, performance

REPORTED = {table.id: table for table in load(ROOT / "papers" / "splitwise" / "reported.yaml").tables}
GOLDEN = pd.DataFrame({"arrival": [1, 3, 4], "prompt_tokens": [4096, 2048, 2048], "output_tokens": [32, 8, 16]})
KV = 2 * 14336 * 70 * 2


def arithmetic_trace(seed: int, count: int, rate: int, longest: int, most: int, ties: bool = False) -> pd.DataFrame:
    """A trace from a linear congruential generator in whole numbers: the same on every machine and library version."""
    state, at, rows = seed, 0, []

    def draw(n: int) -> int:
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return state // 65536 % n

    for _ in range(count):
        at += draw(2 * int(1000 / rate) + 1)
        arrival = (at + 1) / 1000
        rows.append((float(-(-arrival // 1)) if ties else arrival, 1 + draw(longest), 2 + draw(most)))
    return pd.DataFrame(rows, columns=["arrival", "prompt_tokens", "output_tokens"])


@pytest.mark.parametrize("kind", [engine.Cluster, simpy_engine.Cluster])
@pytest.mark.parametrize(
    ("table", "pools"),
    [
        ("t1", {"scheduler": "token_jsq", "machines": {"dgx-h100": 1}}),
        ("t2", {"prompt_machines": {"dgx-h100": 1}, "token_machines": {"dgx-a100": 1}}),
    ],
)
def test_golden_runs_to_six_decimals(table: str, pools: dict[str, Any], kind: Any) -> None:
    rows = metrics.request_table(simulate_log(GOLDEN, engine=kind, **pools))
    columns = ["request_id", "prompt_tokens", "output_tokens", "response_time", "ttft", "tbt", "nth_token_overhead"]
    np.testing.assert_allclose(rows[columns].to_numpy(), np.array(REPORTED[table].rows, float), rtol=0, atol=5.1e-7)


# What the released simulator (Mutinifni/splitwise-sim at 8f99e7d, run through its own Hydra configuration with
# performance_model=db, trace from `arithmetic_trace`, end_time=86400) gave on 25 Nov 2026: requests finished, sum of
# response times, sum of TTFT, and some response times, in seconds.
OFFICIAL: dict[str, tuple[dict[str, Any], dict[str, Any], int, float, float, dict[int, float]]] = {
    # cluster.servers: 1 dgx-a100, 2 dgx-h100; scheduler=token_jsq start_state=baseline
    "one pool": (
        {"seed": 1, "count": 120, "rate": 12, "longest": 3000, "most": 60},
        {"scheduler": "token_jsq", "machines": {"dgx-a100": 1, "dgx-h100": 2}},
        120, 586.8683176402917, 58.815616466655705,
        {0: 10.596556358, 40: 7.494081991, 60: 5.859005619, 119: 1.16266215},
    ),
    # 1 dgx-a100, 2 dgx-h100; scheduler=mixed_pool start_state=splitwise start_state.split_type=heterogeneous
    "mixed pool": (
        {"seed": 2, "count": 200, "rate": 14, "longest": 6000, "most": 200},
        {"prompt_machines": {"dgx-h100": 2}, "token_machines": {"dgx-a100": 1}},
        200, 5853.599346403287, 2650.8645657724655,
        {0: 31.593017924, 66: 9.559780806, 100: 50.218279746, 199: 24.84860524},
    ),
    # 4 dgx-h100; scheduler=mixed_pool start_state=splitwise, 2 prompt and 2 token instances; arrivals at whole seconds
    "simultaneous arrivals": (
        {"seed": 3, "count": 150, "rate": 20, "longest": 2500, "most": 90, "ties": True},
        {"prompt_machines": {"dgx-h100": 2}, "token_machines": {"dgx-h100": 2}},
        150, 472.682407808438, 82.19512983699889, {0: 2.466550082, 50: 4.517062172, 75: 1.780605522, 149: 1.445274109},
    ),
    # 1 dgx-h100-pcap, 1 dgx-h100; start_state=splitwise_hhcap, heterogeneous; 54 requests hang in full memory for ever
    "memory pressure": (
        {"seed": 4, "count": 120, "rate": 40, "longest": 20000, "most": 900},
        {"prompt_machines": {"dgx-h100": 1}, "token_machines": {"dgx-h100-pcap": 1}},
        66, 6157.267503280577, 4170.725196654745,
        {0: 58.835145619, 24: 32.337657855, 44: 74.139151547, 101: 92.081636342},
    ),
    # llama2-70b; 2 dgx-a100, 1 dgx-h100; scheduler=mixed_pool start_state=splitwise, heterogeneous
    "llama2-70b": (
        {"seed": 5, "count": 150, "rate": 30, "longest": 4000, "most": 300},
        {"model": "llama2-70b", "prompt_machines": {"dgx-h100": 1}, "token_machines": {"dgx-a100": 2}},
        150, 2374.7158236817977, 576.4690432222587,
        {0: 18.371576075, 50: 24.29102088, 75: 12.043153601, 149: 15.431767461},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* requests never finish")
@pytest.mark.parametrize("case", OFFICIAL)
def test_agrees_with_the_released_simulator(case: str) -> None:
    made, pools, finished, response, ttft, some = OFFICIAL[case]
    table = simulate(arithmetic_trace(**made), **pools)
    done = table[table["response_time"].notna()]
    assert len(done) == finished
    assert done["response_time"].sum() == pytest.approx(response, abs=1e-6)
    assert done["ttft"].sum() == pytest.approx(ttft, abs=1e-6)
    for request, seconds in some.items():
        assert table["response_time"][request] == pytest.approx(seconds, abs=2e-9)


def test_columns_ids_and_paths(tmp_path: Path) -> None:
    GOLDEN.assign(request_id=[7, 5, 9]).to_csv(tmp_path / "trace.csv", index=False)
    pools = {"prompt_machines": {"dgx-h100": 2}, "token_machines": {"dgx-a100": 2}}
    table = simulate(tmp_path / "trace.csv", model="bloom-176b", scheduler="mixed_pool", **pools)
    assert list(table.columns) == COLUMNS
    assert list(table["request_id"]) == [7, 5, 9]
    pd.testing.assert_frame_equal(
        table.drop(columns="request_id"), simulate(GOLDEN, **pools).drop(columns="request_id")
    )
    assert list(simulate(GOLDEN, **pools)["request_id"]) == [0, 1, 2]


def test_transfers_take_bytes_over_bandwidth() -> None:
    """4096 tokens at 200 GiB/s: 0.0765625 s exactly; a tenth with overlap; no transfer for a single token."""
    pools = {"prompt_machines": {"dgx-h100": 1}, "token_machines": {"dgx-a100": 1}}
    assert list(simulate(GOLDEN, **pools)["transfer_time"]) == [0.0765625, 0.03828125, 0.03828125]
    assert simulate(GOLDEN, overlap=True, **pools)["transfer_time"][0] == pytest.approx(0.00765625, rel=1e-15)
    assert simulate(GOLDEN, bandwidth_gib=12.5, **pools)["transfer_time"][0] == 16 * 0.0765625
    one = simulate(GOLDEN.assign(output_tokens=1), **pools)
    assert (one["transfer_time"] == 0).all()
    assert (one["response_time"] == one["ttft"]).all()
    assert (one["tbt"] == 0).all()


def test_profile_medians_and_curves_are_the_published_ones() -> None:
    table = REPORTED["t3"]
    names = {"bloom": "bloom-176b", "llama": "llama2-70b", "a100": "a100-80gb", "h100": "h100-80gb"}
    for row in table.rows:
        for column, value in zip(table.columns[1:], row[1:], strict=True):
            model, gpu, phase = column.split("_")
            assert performance()[names[model]][names[gpu]][f"{phase}_ms"][row[0]] == pytest.approx(value, abs=5.1e-7)
    for model in ("bloom-176b", "llama2-70b"):  # the power cap: 1.3 times the prompt's time, the same decode's
        full, capped = performance()[model]["h100-80gb"], performance()[model]["h100-80gb-pcap"]
        assert capped["token_ms"] == full["token_ms"]
        for tokens, ms in full["prompt_ms"].items():
            assert capped["prompt_ms"][tokens] == pytest.approx(1.3 * ms, rel=1e-9)
    assert latency_model("bloom-176b", "a100-80gb").token(1) == pytest.approx(0.047518, abs=5e-7)
    assert latency_model("bloom-176b", "h100-80gb").token(1) == pytest.approx(0.035327, abs=5e-7)


def test_embedded_curves_are_those_of_the_raw_profile() -> None:
    """Needs the source file; without it there is nothing to compare and the golden tables stand for it."""
    try:
        path = locate("splitwise/perf_model.csv").path
    except MissingSource as missing:
        pytest.skip(str(missing))
    profile = pd.read_csv(path)
    for model, gpus in performance().items():
        for gpu in gpus:
            ours, raw = latency_model(model, gpu), from_profile(profile, model, gpu)
            for tokens in (1, 64, 200, 1500, 9000, 40_000):
                assert ours.prompt(tokens) == pytest.approx(raw.prompt(tokens), rel=1e-12)
                assert ours.token(tokens) == pytest.approx(raw.token(tokens), rel=1e-12)


@pytest.mark.parametrize(
    ("trace", "gpu", "first", "second"),
    [
        ("conv", "a100-80gb", 0.354088, 0.254618), ("conv", "h100-80gb", 0.167698, 0.057465),
        ("code", "a100-80gb", 0.695474, 1.135200), ("code", "h100-80gb", 0.311929, 0.207216),
    ],
)  # fmt: skip
def test_service_moments_of_the_released_traces(trace: str, gpu: str, first: float, second: float) -> None:
    try:
        path = locate(f"azure_llm/AzureLLMInferenceTrace_{trace}.csv").path
    except MissingSource as missing:
        pytest.skip(str(missing))
    curve = latency_model("bloom-176b", gpu).prompt
    seconds = np.array([curve(n) for n in pd.read_csv(path)["ContextTokens"].tolist()])
    assert seconds.mean() == pytest.approx(first, abs=5.1e-7)
    assert (seconds**2).mean() == pytest.approx(second, abs=5.1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-80gb"])
def test_prompts_alone_wait_as_pollaczek_and_khinchine_say(gpu: str, load: float) -> None:
    """The published curve and sizes like the trace's, one prompt at a time: within 4 standard errors by batch means."""
    from papers.splitwise.experiment import LEVELS, QUANTILES

    quantiles = dict(zip(LEVELS, QUANTILES["conv"]["prompt"], strict=True))
    sizes = traces.sizes_from_quantiles(quantiles, 2000)
    curve = latency_model("bloom-176b", gpu).prompt
    seconds = np.array([curve(n) for n in sizes.tolist()])
    rate = load / seconds.mean()
    trace = traces.poisson_trace(sizes, np.ones(1, int), rate, 40_000 / rate, seed=11)
    machine = {"machines": {"dgx-a100" if gpu == "a100-80gb" else "dgx-h100": 1}}
    limits = engine.Limits(batch_size=1, batch_tokens=1, passes=10**9)
    log = simulate_log(trace, scheduler="token_jsq", limits=limits, **machine)
    wait = metrics.request_table(log)["queue_time"].to_numpy()[1000:]
    means = np.array([batch.mean() for batch in np.array_split(wait, 40)])
    expected = rate * (seconds**2).mean() / (2 * (1 - load))
    assert abs(means.mean() - expected) < 4 * means.std(ddof=1) / np.sqrt(40)


def test_alone_a_request_has_slowdown_one() -> None:
    trace = pd.DataFrame({"arrival": [0.0, 1000.0], "prompt_tokens": [700, 5000], "output_tokens": [30, 3]})
    table = simulate(trace, scheduler="token_jsq", machines={"dgx-a100": 1})
    slow = metrics.slowdowns(table, latency_model("bloom-176b", "a100-80gb"))
    np.testing.assert_allclose(slow["ttft"], 1, rtol=1e-12)
    assert (slow["e2e"] <= 1).all()  # the reference reads the decode curve at the prompt's length, a decode at 1


def test_the_median_response_never_falls_as_the_rate_rises() -> None:
    rng = np.random.default_rng(2)
    prompts, outputs = rng.integers(100, 3000, 400), rng.integers(2, 300, 400)
    for pools in (
        {"scheduler": "token_jsq", "machines": {"dgx-h100": 2}},
        {"prompt_machines": {"dgx-h100": 1}, "token_machines": {"dgx-a100": 2}},
    ):
        medians = []
        for rate in (1.0, 2.0, 4.0, 8.0):  # the same requests, packed closer
            trace = traces.poisson_trace(prompts, outputs, rate, 200 / rate, seed=4)
            medians.append(simulate(trace, **pools)["response_time"].median())
        assert medians == sorted(medians)


def test_one_mixed_machine_is_the_baseline() -> None:
    """With every machine mixed there is no split; of one machine this is exact (of several, the choices differ)."""
    trace = arithmetic_trace(8, 80, 6, 4000, 100)
    latency = latency_model("bloom-176b", "h100-80gb")

    def schedule(request: Any, cluster: Any) -> Any:
        cluster.pools.setdefault("prompt", []), cluster.pools.setdefault("token", [])
        return mixed_pool(request, cluster)

    spec = engine.MachineSpec("dgx-h100", "mixed", latency, 8 * 80 * 2**30 - 329 * 10**9)
    cluster = engine.Cluster([spec], schedule, mixed_batching)
    log = cluster.run(engine.requests_of(traces.load_trace(trace), KV))
    baseline = simulate(trace, scheduler="token_jsq", machines={"dgx-h100": 1})
    np.testing.assert_array_equal(metrics.request_table(log)["response_time"], baseline["response_time"])


def test_infinite_bandwidth_leaves_no_gap_on_an_idle_cluster() -> None:
    pools = {"prompt_machines": {"dgx-h100": 1}, "token_machines": {"dgx-h100": 1}}
    trace = pd.DataFrame({"arrival": [0.0, 100.0], "prompt_tokens": [900, 5000], "output_tokens": [30, 3]})
    split = simulate(trace, bandwidth_gib=float("inf"), **pools)
    whole = simulate(trace, scheduler="token_jsq", machines={"dgx-h100": 1})
    np.testing.assert_allclose(split["response_time"], whole["response_time"], rtol=0, atol=1e-12)


def test_mixed_machines_go_home_when_idle_and_pools_stay_fixed_without_a_mixed_pool() -> None:
    trace = arithmetic_trace(2, 200, 14, 6000, 200)
    moved, pools = [], {"prompt_machines": {"dgx-h100": 2}, "token_machines": {"dgx-a100": 1}}

    class Watched(engine.Cluster):
        def run(self, requests: list[engine.Request], stop: Any = None) -> engine.Log:
            log = super().run(requests, stop)
            moved.append({name: sorted(m.index for m in pool) for name, pool in self.pools.items()})
            return log

    mixed = metrics.request_table(simulate_log(trace, engine=Watched, **pools))
    assert moved[-1] == {"prompt": [0, 1], "token": [2], "mixed": []}
    assert set(mixed["decode_machine"]) == {0, 1, 2}  # under this load prompt machines decode, too
    fixed = metrics.request_table(simulate_log(trace, scheduler="fixed_pools", **pools))
    assert set(fixed["prompt_machine"]) == {0, 1}
    assert set(fixed["decode_machine"]) == {2}


def test_returning_a_machine_that_is_not_mixed_changes_nothing() -> None:
    class Cluster:
        pools: dict[str, list[Any]] = {"prompt": [1], "token": [2]}  # noqa: RUF012

    return_to_pool(1, Cluster)
    assert Cluster.pools == {"prompt": [1], "token": [2]}


def test_contiguous_blocks_are_part_of_the_published_rules() -> None:
    """A task counts once per boundary that passes it over, and a block of decodes has one boundary, however long.

    So the shortcut is no mere speed-up: with priority after a single boundary the log changes, without any it does not.
    """
    trace = arithmetic_trace(6, 150, 12, 5000, 120)
    one = {"scheduler": "token_jsq", "machines": {"dgx-h100": 1}}
    eager = simulate(trace, limits=engine.Limits(passes=1), **one)["response_time"]
    never = simulate(trace, limits=engine.Limits(passes=10**9), **one)["response_time"]
    assert not np.allclose(eager, never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt-5"}, "unknown model 'gpt-5'"),
        ({"machines": {"dgx-b200": 1}}, "unknown machine 'dgx-b200'"),
        ({"machines": {"dgx-h200": 1}}, "no latency profile of model 'bloom-176b' on GPU 'h200-141gb'"),
        ({"scheduler": "magic"}, "unknown scheduler 'magic'; known: mixed_pool"),
        ({"machines": None}, "takes machines"),
        ({"machines": {"dgx-h100": 0}}, "0 machines 'dgx-h100'"),
        ({"machines": {"dgx-h100": 1.5}}, "1.5 machines"),
        ({"prompt_machines": {"dgx-h100": 1}}, "no other pool"),
        ({"scheduler": "mixed_pool"}, "takes prompt_machines and token_machines"),
        ({"batching": "lucky"}, "unknown batching 'lucky'; known: mixed"),
        ({"bandwidth_gib": 0}, "bandwidth_gib 0 must be positive"),
    ],
)
def test_a_bad_cluster_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"scheduler": "token_jsq", "machines": {"dgx-h100": 1}}
    with pytest.raises(ValueError, match=message):
        simulate(GOLDEN, **{**good, **change})


@pytest.mark.parametrize(
    ("column", "value"),
    [("arrival", -1.0), ("prompt_tokens", 0), ("output_tokens", 0), ("prompt_tokens", "x"), ("output_tokens", None)],
)
def test_a_bad_trace_is_refused_by_row_and_column(column: str, value: Any) -> None:
    bad = GOLDEN.astype(object)
    bad.loc[2, column] = value
    with pytest.raises(ValueError, match=f"row 2, column {column}"):
        simulate(bad, scheduler="token_jsq", machines={"dgx-h100": 1})


def test_a_request_larger_than_memory_is_refused() -> None:
    trace = GOLDEN.assign(prompt_tokens=[4096, 89_235, 2048])
    with pytest.raises(
        ValueError, match=r"row 1: prompt_tokens \+ output_tokens = 89243 .* 89234 tokens of bloom-176b"
    ):
        simulate(trace, scheduler="token_jsq", machines={"dgx-h100": 1})
    fits = simulate(GOLDEN.assign(prompt_tokens=[4096, 89_226, 2048]), scheduler="token_jsq", machines={"dgx-h100": 1})
    assert fits["response_time"].notna().all()


def test_designs_are_table_six_and_budgets_table_seven() -> None:
    assert tuple(published()) == STUDIES
    assert counts_at_equal("power") == [70, 62, 53, 44, 35, 26, 17, 8, 0]
    assert counts_at_equal("cost") == [86, 75, 64, 53, 43, 32, 21, 10, 0]
    assert counts_at_equal("hhcap") == [57, 49, 42, 35, 28, 21, 14, 7, 0]
    small = {name: design.label for name, design in scaled("iso-power conv", 5).items()}
    assert small == {
        "Baseline-A100": "14", "Baseline-H100": "8", "Splitwise-AA": "9P/5T", "Splitwise-HH": "5P/3T",
        "Splitwise-HA": "5P/5T", "Splitwise-HHcap": "5P/4T",
    }  # fmt: skip
    full = published()["iso-power conv"]["Splitwise-HHcap"]
    assert (full.cost, full.power) == (pytest.approx(46 * 4.76), pytest.approx(25 * 44 + 21 * 30.8))
    assert exact(published()["iso-cost conv"]["Splitwise-AA"].cost).value == pytest.approx(86 * 2.21)
