"""The bench of the kernels: everything but a GPU's clock."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from kernels import bench, bench_cases, roofline

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "head_dim": 16,
    "tree": [(1, 2, 1, 3, 40)],
    "squeezed": [(2, 1, 300)],
    "linear": [(32, 256, 1), (32, 256, 16)],
    "kmeans": [(1, 50, 4)],
    "move": [(2, 1, 3)],
    "side": 32,
}


@pytest.fixture(autouse=True)
def torch_paths(monkeypatch):
    """As `make bench` runs them."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        return bench.gpu_table("cpu", TINY, torch.float32, rounds=2, cold=0.0)


def test_the_table_has_every_kernel_and_baseline(table):
    assert set(table.kernel) == {
        "tree_attention", "squeezed attention, one step", "sparse_attention and merge_partials", "centroid_scores",
        "compact_indices", "w24_gemv V3", "w24_gemm V3", "kmeans_step", "kv_compact",
    }  # fmt: skip
    assert {"SDPA on the full cache", "F.linear", "dequantise, then F.linear (V0)"} <= set(table.baseline)
    assert {"date", "device", "driver", "torch", "triton", "cuda", "dtype", "contended"} <= set(table.columns)
    assert not table.isna().any().any()


def test_rates_follow_from_times_and_ceilings(table):
    """share = bound / time with the ceilings of the same rounds; ratio = baseline / kernel."""
    memory = table[table.bound == "memory"]
    torch.testing.assert_close(
        torch.tensor(memory.share_of_ceiling.tolist()), torch.tensor((memory.gb_per_s / memory.copy_gb_per_s).tolist())
    )
    arithmetic = table[table.bound == "arithmetic"]
    torch.testing.assert_close(
        torch.tensor(arithmetic.share_of_ceiling.tolist()),
        torch.tensor((arithmetic.tflops / arithmetic.matmul_tflops).tolist()),
    )
    assert (table.ratio_low <= table.ratio).all()
    assert (table.ratio <= table.ratio_high).all()


def test_kernels_and_baselines_of_a_case_agree():
    """What is compared computes the same."""
    for kind, shape in (("tree", (2, 4, 2, 3, 40)), ("linear", (32, 256, 4)), ("linear", (32, 256, 16))):
        for case in bench_cases.CASES[kind](shape, 16, "cpu", torch.float32, 0.0):
            for baseline in case.baselines.values():
                torch.testing.assert_close(case.call(0), baseline(0), rtol=1e-4, atol=1e-4)
    squeezed = bench_cases.CASES["squeezed"]((2, 1, 300), 16, "cpu", torch.float32, 0.0)
    (scores,) = (case for case in squeezed if case.kernel == "centroid_scores")
    torch.testing.assert_close(scores.call(0), scores.baselines["torch"](0))


def test_the_threshold_keeps_about_the_wanted_share_and_all_of_the_window():
    step = bench_cases.Squeezed.random(0, 4, 2, 3000, 16, "cpu", torch.float32)
    idx, cnt = step.select()
    kept = (cnt - bench_cases.WINDOW).sum() / (2 * (3000 - bench_cases.WINDOW))
    assert float(kept) == pytest.approx(bench_cases.KEPT, abs=0.05)
    assert all(set(range(2900, 3000)) <= set(row[:n].tolist()) for row, n in zip(idx, cnt, strict=True))
    assert step.step().shape == (2, 2, 16)


def test_copies_fill_the_cache():
    assert len(bench_cases.copies_of(lambda seed: seed, 30e6, 200e6)) == 7
    assert bench_cases.copies_of(lambda seed: seed, 300e6, 200e6) == [0]
    assert len(bench_cases.copies_of(lambda seed: seed, 1.0, 200e6)) == 64


def test_calls_go_round_the_copies():
    calls: list[int] = []
    bench.repeated(calls.append, copies=3, calls=5, graph=False)()
    assert calls == [0, 1, 2, 0, 1]


def test_writing_replaces_the_table_as_a_whole(table, tmp_path):
    path = bench.write(table, tmp_path / "results" / "gpu" / "kernels.csv")
    assert [p.name for p in path.parent.iterdir()] == ["kernels.csv"]
    assert list(pd.read_csv(path).columns) == list(table.columns)
    bench.write(table[:1], path)
    assert len(pd.read_csv(path)) == 1


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make bench-gpu measures the kernels on a CUDA GPU, and torch finds none"):
        bench.main()


def test_make_knows_both_targets():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^bench-gpu: setup .*\n\t@TRITON_INTERPRET=0 python -m kernels\.bench$", text)
    assert re.search(r"(?m)^test-gpu: setup ", text)


def test_tables_of_the_cpu():
    attention = bench.cpu_attention(heads=4, d=16, contexts=(300,), rounds=2)
    assert len(attention) == 3 + 4
    weights = bench.cpu_weights(sides=(256,), rounds=2)
    assert weights.kernel.tolist() == ["w24_gemv V3", "w24_gemm V3"]
    assert (attention.ratio > 0).all()
    assert (weights.ratio > 0).all()


def test_what_a_gpu_took_stands_beside_the_roofline(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline.measured_us, "__defaults__", (tmp_path / "kernels.csv",))
    for table, columns in ((roofline.attention_table(), "full squeezed"), (roofline.weights_table(), "fp16 f24")):
        assert (table[[f"{name}_measured_us" for name in columns.split()]] == roofline.NOT_MEASURED).all(axis=None)
    shape = "Hq=32 Hkv=32 N=8192 D=128 kept=0.100"
    row = {"kernel": "squeezed attention, one step", "shape": shape, "median_us": 9.5, "baseline_us": 40.0}
    pd.DataFrame([row | {"baseline": "SDPA on the full cache"}]).to_csv(tmp_path / "kernels.csv", index=False)
    row, other, *_ = roofline.attention_table().itertuples()
    assert (row.full_measured_us, row.squeezed_measured_us) == (40.0, 9.5)
    assert other.squeezed_measured_us == roofline.NOT_MEASURED


def test_rooflines_of_published_shapes():
    """The sheets' examples: 2.15 GB dense and about 270 MB at 90% sparsity for 131072 keys; F24 5.6 times less."""
    attention = roofline.attention_table()
    assert len(attention) == 3 * 7
    row = attention[(attention.model == "Llama-2-7B") & (attention["keys"] == 131072)].iloc[0]
    assert row.full_mb == pytest.approx(2147, rel=0.01)
    assert row.squeezed_mb == pytest.approx(270, rel=0.1)
    assert (attention.speedup_bound > 6).all()
    faster = roofline.attention_table(bytes_per_second=4.8e12)
    assert faster[(faster.model == "Llama-2-7B") & (faster["keys"] == 131072)].full_us.item() == pytest.approx(
        447, rel=0.01
    )
    weights = roofline.weights_table()
    gate = weights[(weights.model == "Llama-2-70B") & (weights.layer == "gate, up")].iloc[0]
    assert gate.speedup_bound == pytest.approx(5.6, abs=0.05)
    assert gate.bits_per_weight == pytest.approx(2.85, abs=0.01)
