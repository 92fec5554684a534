"""The closed tables against the reported ones; attention functions and fits on known numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from common.attention.interface import attending
from common.costs.catalogue import Accelerator, accelerator, from_config, transformer
from common.metrics.timing import Timings
from common.models.build import build
from common.run import ROOT, compose
from papers.long_context_peak import analysis, closed, laws, machine
from papers.long_context_peak.method.server import decode, prefill

SLUG = "long_context_peak"


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {name: pd.DataFrame(rows) for name, rows in closed.tables(compose(SLUG, "infer", ["profile=cpu"])).items()}


def reported(id_: str) -> pd.DataFrame:
    tables = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())["tables"]
    (table,) = (t for t in tables if t["id"] == id_)
    return pd.DataFrame(table["rows"], columns=table["columns"])


def test_table_t2_to_every_printed_digit(tables: dict[str, pd.DataFrame]) -> None:
    pd.testing.assert_frame_equal(tables["t2"], reported("t2"), check_dtype=False, rtol=0, atol=0)


def test_table_t1_in_the_reported_rounding(tables: dict[str, pd.DataFrame]) -> None:
    inferred = tables["t1"][tables["t1"]["reading"].str.startswith("as reported")]
    assert [f"{s:.2f}" for s in inferred["prefill_s"]][:1] == ["0.89"]
    assert [f"{s:.1f}" for s in inferred["prefill_s"]][1:] == ["14.1"]
    assert [f"{s:.1f}" for s in inferred["decode_s"]] == ["8.5", "9.8"]
    assert inferred["users_80_gib"].tolist() == [18, 1]
    assert inferred["users_80_gb"].tolist() == [12, 0]


def test_one_source_holds_for_all_metrics_but_prefill(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["one_source"]
    assert len(table) == 4 * 5
    assert set(table.loc[~table["equal"], "metric"]) == {"prefill"}
    assert not table.loc[table["metric"] == "prefill", "equal"].any()


def test_a_mixture_loses_users_and_not_its_caches(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["attention_types"]
    assert closed.VOCABULARY == 64_000
    large = table[table["devices"] == 8].set_index("type")
    dense, mixture = large.iloc[0], large.iloc[-1]
    assert mixture["weights_gb"] * 1e9 == 2 * (34_388_917_248 + 7 * 60 * 3 * 7168 * 20480)
    assert mixture["kv_gb"] == dense["kv_gb"] == 12.288
    assert mixture["users_50000"] < dense["users_50000"]
    assert large.loc["MHA, 56 heads", "kv_gb"] == pytest.approx(86.016)
    assert table[table["devices"] == 1].iloc[-1][["users_4000", "decode_s"]].isna().all()


def test_accelerators_are_as_many_as_hold_one_context(tables: dict[str, pd.DataFrame]) -> None:
    yi, table = transformer("yi-34b-200k"), tables["hardware"]
    assert (table.loc[table["context"] == 50_000, "users"] >= 1).all()
    for name, count in table.groupby("accelerator")["devices"].first().items():
        one = accelerator(str(name))
        assert closed.least_devices(yi, one, 50_000) == count
        left = (count - 1) * one.memory_bytes - yi.weight_bytes
        assert left < 50_000 * yi.kv_bytes_per_token


def test_sessions_switch_only_where_users_do_not_fit(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["sessions"]
    assert ((table["switches"] == 0) == (table["resident"] >= table["users"])).all()
    assert (table["sessions_per_hour"] <= table["bound_per_hour"]).all()
    assert 100_000 not in set(table.loc[table["devices"] == 1, "context"])


# --- the model under the measuring functions


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_measured_attention_is_the_models(kv_heads: int) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(sizes, num_key_value_heads=kv_heads, dtype=torch.float64)
    ids, slots = machine.tokens_of(model, 12), [machine.new_slot(model, 20) for _ in range(2)]
    plain = [prefill(model, slots[0], ids), *decode(model, slots[0], 3, 5)]
    with attending(model, laws.attend_causal):
        ours = [prefill(model, slots[1], ids), *decode(model, slots[1], 3, 5)]
    assert plain == ours
    torch.testing.assert_close(slots[0].cache.layers[1].keys[:, :, :17], slots[1].cache.layers[1].keys[:, :, :17])
    with attending(model, laws.attend_all):  # the last token sees all keys either way, the first does not
        prefill(model, slots[1], ids)
    first = [slot.cache.layers[1].keys[0, 0, 0] for slot in slots]
    assert not torch.allclose(*first)


def test_a_long_cache_repeats_what_was_read() -> None:
    model = build("llama-0.1m", seed=0)
    slot = laws.filled(model, 23, 5)
    for layer in slot.cache.layers:
        for x in (layer.keys, layer.values):
            assert torch.equal(x[:, :, 5:10], x[:, :, :5])
            assert torch.equal(x[:, :, 20:23], x[:, :, :3])


def test_growing_and_preallocated_steps_leave_the_cache_as_it_was() -> None:
    model = build("llama-0.1m", seed=0)
    slot = laws.filled(model, 9, 8)
    before = slot.buffer.clone()
    for step in (laws.preallocated(model, slot, 8), laws._growing(model, slot, 8)):
        with attending(model, laws.attend_causal):
            step()
            step()
    kept = slot.cache.layers[0].keys[:, :, :8]
    assert torch.equal(kept, before.view(2, 2, -1, 9, 16)[0, 0][None, :, :8])
    assert slot.length == 9


def test_an_unknown_attention_is_named() -> None:
    cfg = compose(SLUG, "infer", ["profile=smoke", "attention=[MLA]"])
    with pytest.raises(ValueError, match=r"unknown attention 'MLA'; model.kv_heads names: MHA, GQA, own"):
        machine.load(cfg, "MLA")


def test_the_last_cache_is_known_or_assumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    size, source = machine.last_cache_bytes()
    assert size >= 2**15
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)
    assert machine.last_cache_bytes() == (32 * 2**20, "assumed: the system does not tell")
    assert source in ("the system", "assumed: the system does not tell")


def test_rates_by_the_cpu_clock() -> None:
    """Half of the wall time went to others: the rates double. The disk's does not."""
    timings = Timings(
        wall={"product": [2.0, 2.0], "sum": [4.0, 4.0], "spill": [1.0, 1.0]},
        cpu={"product": [1.0, 1.0], "sum": [2.0, 2.0], "spill": [0.1, 0.1]},
    )
    found = machine.by_cpu_clock(Accelerator("x", 10.0, 1, 1, 20.0, 5.0, 1.0, "s"), timings)
    assert (found.flops_per_s, found.memory_bytes_per_s, found.host_bytes_per_s) == (20.0, 40.0, 5.0)


# --- fits


def test_fits_find_what_was_put_in() -> None:
    lengths = [512, 1024, 2048]
    a, b = np.array([1e-4, 2e-4]), np.array([3e-8, 4e-8])
    seconds = pd.DataFrame([[x * s + y * s * s for s in lengths] for x, y in zip(a, b, strict=True)], columns=lengths)
    found = analysis.quadratic(seconds)
    np.testing.assert_allclose(found, (a, b), rtol=1e-9)
    sizes = [2**20, 2**21, 2**22]
    straight = pd.DataFrame([[1e-3 + 1e-10 * s for s in sizes], [2e-3 + 3e-10 * s for s in sizes]], columns=sizes)
    alpha, beta, explained = analysis.line(straight)
    np.testing.assert_allclose(alpha, [1e-3, 2e-3])
    np.testing.assert_allclose(beta, [1e-10, 3e-10])
    np.testing.assert_allclose(explained, 1)
    bent = pd.DataFrame([[1.0, 2.0, 1.0]], columns=sizes)
    assert analysis.line(bent)[2][0] < 0.1


def test_the_interval_over_rounds_is_the_range_of_few_and_less_of_many() -> None:
    few = analysis.over_rounds([3.0, 1.0, 2.0])
    assert (few.value, few.low, few.high, few.n) == (2, 1, 3, 3)
    many = analysis.over_rounds(list(range(21)))
    assert (many.value, many.low, many.high) == (10, 5, 15)


def test_expected_square_of_a_prefill() -> None:
    """b/a from the operations that torch counts: c = 4 for whole squares."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build("llama-0.1m", attention="eager", tie_word_embeddings=False)
    shape = from_config(model.config)
    counts = []
    for tokens in (16, 32):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(1, tokens, dtype=torch.long))
        counts.append(counter.get_total_flops() / tokens)
    b = (counts[1] - counts[0]) / 16
    a = counts[0] - 16 * b
    assert b / a == pytest.approx(analysis.expected_square(shape, 4))


def test_decode_is_not_judged_on_caches_that_the_processor_keeps() -> None:
    sizes = [2.0**20 * n for n in (1, 2, 3, 4, 5)]
    rows = [
        {"law": "decode", "arm": "preallocated", "attention": "MHA", "kv_bytes": s, "round": 0, "cpu_s": s, "wall_s": s}
        for s in sizes
    ]
    cfg: Any = SimpleNamespace(decode=SimpleNamespace(fit_above=2))

    def found(cache: float) -> Any:
        return analysis.Found({}, pd.DataFrame(rows), None, None, {"last_cache_bytes": cache}, None, {"MHA": None}, {},
                              "cpu")  # type: ignore[arg-type]  # fmt: skip

    assert analysis.decode_gate(cfg, found(2**20)) is None
    assert analysis.decode_above(cfg, found(2**20), "MHA").columns.tolist() == sizes[1:]
    assert analysis.decode_gate(cfg, found(1.5 * 2**20)).startswith("gate: 3 caches of 3 MiB or more were measured")
