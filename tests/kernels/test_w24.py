"""The format F24 and its three kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import w24_dequantise as dequantise_module
from kernels import w24_gemm as gemm_module
from kernels.w24 import SCALE_BITS, f24_bytes, pack_f24, product, random_f24, reference, scales_of, unpacked
from kernels.w24_dequantise import w24_dequantise
from kernels.w24_gemm import w24_gemm
from kernels.w24_gemv import VARIANTS, cost, loads_alone, w24_gemv

SETTINGS = settings(max_examples=10, deadline=None, derandomize=True, database=None)

rows_of = st.sampled_from([1, 33, 40])
stripes = st.sampled_from([(7, 3), (1, 0), (0, 1), (36, 0), (0, 17), (12, 4)])  # odd, none of one kind, over a tile
g2_of = st.sampled_from([8, 16, 64])


def fields(rows=4, n2=4, n4=2, g2=2, seed=0):
    """Arguments of pack_f24."""
    draw = torch.Generator().manual_seed(seed)
    widths = torch.tensor([1 << SCALE_BITS[g % 3] for g in range(n2)], dtype=torch.long)
    groups = -(-rows // g2)
    return {
        "codes2": torch.randint(0, 4, (rows, n2, 16), generator=draw),
        "zeros2": torch.randint(0, 4, (rows, n2), generator=draw),
        "scale_codes": torch.randint(0, 16, (rows, n2), generator=draw) % widths,
        "s2": torch.rand(groups, n2, generator=draw),
        "offsets": torch.randint(0, 16, (groups, n2), generator=draw),
        "codes4": torch.randint(0, 16, (rows, n4, 16), generator=draw),
        "zeros4": torch.randint(0, 16, (rows, n4), generator=draw),
        "s4": torch.rand(rows, n4, generator=draw),
        "perm": torch.randperm(16 * (n2 + n4), generator=draw),
        "g2": g2,
    }


def rows_in(where, weight, batch, dtype, seed=1):
    """x [B, IC] and the exact product with the packed matrix."""
    x = where.random(batch, weight.channels, dtype=dtype, seed=seed)
    return x, x.double().cpu() @ reference(weight.to("cpu")).T


@pytest.mark.parametrize(("n2", "n4"), [(4, 2), (3, 0), (0, 5), (1, 1)])
def test_packing_keeps_every_field(n2, n4):
    given_ = fields(n2=n2, n4=n4)
    weight = pack_f24(**given_)
    s, z, s4, z4 = scales_of(weight)
    group = torch.arange(4) // 2
    assert torch.equal(s, (given_["scale_codes"] + given_["offsets"][group]) * given_["s2"].half().float()[group])
    assert torch.equal(z, given_["zeros2"].float())
    assert torch.equal(s4, given_["s4"].half().float())
    assert torch.equal(z4, given_["zeros4"].float())
    two = (given_["codes2"] - given_["zeros2"][:, :, None]) * s[:, :, None]
    four = (given_["codes4"] - given_["zeros4"][:, :, None]) * s4[:, :, None]
    assert torch.equal(unpacked(weight), torch.cat([two.flatten(1), four.flatten(1)], 1))
    assert torch.equal(unpacked(weight).double(), reference(weight))


def test_bits_per_weight_are_measured_and_follow_the_closed_form():
    """2.4167 (1 - r) + 5.25 r at g2 = 16; r = 0.153 gives the paper's 2.85."""
    for n2, n4 in ((96, 0), (0, 96), (72, 24), (12, 4)):
        weight = random_f24(32, n2, n4)
        ratio = n4 / (n2 + n4)
        assert weight.bits_per_weight == pytest.approx((2 + 16 / 48 + (16 + 16 / 3) / 256) * (1 - ratio) + 5.25 * ratio)
        assert f24_bytes(32, n2, n4) == sum(plane.nbytes for plane in weight.planes().values())
    assert f24_bytes(4096, 217, 39) * 8 / 4096**2 == pytest.approx(2.85, abs=0.01)
    assert f24_bytes(33, 7, 3, 8) == sum(p.nbytes for p in random_f24(33, 7, 3, g2=8).planes().values())


def test_sorted_stripes_need_no_permutation_and_others_are_undone_by_it():
    weight = pack_f24(**fields())
    dense = torch.empty(4, weight.channels)
    dense[:, weight.perm.long()] = unpacked(weight)
    x = torch.randn(3, weight.channels, generator=torch.Generator().manual_seed(0))
    expected = x @ dense.T
    largest = float(expected.abs().max())  # the sums cancel, so that float32 errs by a share of it
    torch.testing.assert_close(w24_gemv(x[:, weight.perm], weight), expected, rtol=0, atol=1e-5 * largest)


@SETTINGS
@given(data=st.data(), rows=rows_of, stripes=stripes, g2=g2_of)
def test_dequantising(where, data, rows, stripes, g2):
    dtype = data.draw(st.sampled_from([t for t in where.dtypes if t != torch.float64]))
    weight = random_f24(rows, *stripes, g2=g2)
    dense = w24_dequantise(weight.to(where.device), dtype)
    assert torch.equal(dense.cpu(), reference(weight).to(dtype))


@SETTINGS
@given(data=st.data(), rows=rows_of, stripes=stripes, batch=st.integers(1, 8), g2=g2_of)
def test_gemv(where, data, rows, stripes, batch, g2):
    """Every variant, odd numbers of stripes, none of one kind, rows that are no multiple of a block."""
    dtype = data.draw(st.sampled_from([t for t in where.dtypes if t != torch.float64]))
    weight = random_f24(rows, *stripes, g2=g2).to(where.device)
    x, expected = rows_in(where, weight, batch, dtype)
    variant = data.draw(st.sampled_from(VARIANTS[:4]))
    y = w24_gemv(x, weight, variant)
    assert y.dtype == dtype
    # V0 rounds the matrix as well as the result
    where.close(y, expected, dtype, factor=2)


@SETTINGS
@given(data=st.data(), rows=rows_of, stripes=stripes, batch=st.sampled_from([1, 16, 19, 70]), g2=g2_of)
def test_gemm(where, data, rows, stripes, batch, g2):
    dtype = data.draw(st.sampled_from([t for t in where.dtypes if t != torch.float64]))
    weight = random_f24(rows, *stripes, g2=g2).to(where.device)
    x, expected = rows_in(where, weight, batch, dtype)
    y = w24_gemm(x, weight, data.draw(st.sampled_from(VARIANTS[:4])))
    assert y.dtype == dtype
    where.close(y, expected, dtype, factor=2)


def test_variants_are_one_function(where):
    """V1, V2 and V3 add in the same order: the same bits, but that a compiler may fuse operations differently."""
    weight = random_f24(40, 70, 20).to(where.device)
    x, _ = rows_in(where, weight, 3, torch.float32)
    for product_of in (w24_gemv, w24_gemm):
        first, *others = (product_of(x, weight, variant) for variant in ("V1", "V2", "V3"))
        for other in others:
            where.close(other, first, torch.float32)
            assert where.name == "cuda" or torch.equal(other, first)


def test_the_variant_without_decoding_reads_all_planes(where):
    """VX depends on every plane, so that no load can be left out."""
    weight = random_f24(40, 7, 3).to(where.device)
    x = where.random(2, weight.channels)
    where.close(w24_gemv(x, weight, "VX"), loads_alone(x, weight), torch.float32)
    small = replace(weight, qw2=weight.qw2 % 64, qw4=weight.qw4 % 64)  # so that nothing is lost in rounding
    before = loads_alone(x, small)
    for name, plane in small.planes().items():
        assert not torch.equal(loads_alone(x, replace(small, **{name: plane + 1})), before), name
    if where.name != "torch":
        before = w24_gemm(x, small, "VX")
        for name, plane in small.planes().items():
            assert not torch.equal(w24_gemm(x, replace(small, **{name: plane + 1}), "VX"), before), name


def test_a_program_takes_part_of_the_channels(where):
    """Few rows and many channels: parts are added in a fixed order, so a second run gives the same bits."""
    weight = random_f24(8, 300, 90).to(where.device)
    x, expected = rows_in(where, weight, 2, torch.float32)
    y = w24_gemv(x, weight)
    where.close(y, expected, torch.float32)
    assert torch.equal(y, w24_gemv(x, weight))


def test_strided_rows_work(where):
    weight = random_f24(40, 7, 3).to(where.device)
    wide = where.random(160, 6)
    for function in (w24_gemv, w24_gemm):
        torch.testing.assert_close(function(wide.T, weight), function(wide.T.contiguous(), weight))
        assert function(wide.T[:0], weight).shape == (0, 40)


def test_extreme_values_stay_finite(where):
    weight = random_f24(40, 7, 3).to(where.device)
    x = where.random(2, weight.channels, size=1e4)
    where.close(w24_gemv(x, weight), x.double().cpu() @ reference(weight.to("cpu")).T, torch.float32)
    assert float(w24_gemv(x * 0, weight).abs().max()) == 0


def test_the_torch_product_is_the_dense_one():
    weight = random_f24(24, 11, 5)
    x = torch.randn(5, weight.channels, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product(x, weight), x @ unpacked(weight).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"codes2": torch.full((4, 4, 16), 4)}, ValueError, r"codes goes from 4 to 4: 2 bits hold 0\.\.3"),
        ({"codes2": torch.zeros(4, 4, 15, dtype=torch.int64)}, ValueError, "15"),
        ({"zeros2": torch.full((4, 4), 4)}, ValueError, "zeros2 goes from 4 to 4"),
        ({"scale_codes": torch.full((4, 4), 8)}, ValueError, r"0\.\.15 in stripes 2, 5, 8, \.\.\. only"),
        ({"scale_codes": torch.full((4, 4), 1.0)}, TypeError, "scale_codes is torch.float32: pass integers"),
        ({"offsets": torch.full((2, 4), 16)}, ValueError, "offsets goes from 16 to 16"),
        ({"s2": torch.full((2, 4), 1e6)}, ValueError, "s2 has values that are not finite in float16"),
        ({"s4": torch.full((4, 2), torch.nan)}, ValueError, "s4 has values that are not finite"),
        ({"perm": torch.zeros(96, dtype=torch.int64)}, ValueError, "perm must be a permutation of the 96"),
        ({"g2": 3}, ValueError, None),
        ({"g2": 1}, ValueError, "s2 has 2 second-order groups: 4 rows make 4 of g2 = 1"),
        ({"g2": 0}, ValueError, "g2 is a number of rows, at least 1, not 0"),
        ({"zeros4": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"zeros4 must be .* with n4 = 2"),
    ],
)
def test_bad_fields(change, error, says):
    if says is None:  # four rows make two groups of three as well: a valid matrix
        assert pack_f24(**{**fields(), **change}).g2 == 3
        return
    with pytest.raises(error, match=says):
        pack_f24(**{**fields(), **change})


def test_bad_input():
    weight = random_f24(8, 2, 1)
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    for function in (w24_gemv, w24_gemm):
        with pytest.raises(ValueError, match=r"perm must be \[IC\] with IC = 40 as in x, not \[48\]"):
            function(x[:, :40], weight)
        with pytest.raises(ValueError, match="unknown variant 'V4'; there are: V0, V1, V2, V3, VX"):
            function(x, weight, "V4")
        with pytest.raises(TypeError, match=r"x is torch.float64: pass float16, bfloat16 or float32"):
            function(x.double(), weight)
    with pytest.raises(ValueError, match="x has 9 rows, w24_gemv takes at most 8: use w24_gemm"):
        w24_gemv(torch.randn(9, 48), weight)
    with pytest.raises(TypeError, match=r"dtype is torch.int8: ask for float16"):
        w24_dequantise(weight, torch.int8)


def test_the_cpu_has_no_product_without_decoding(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"VX measures loads on a GPU .* on the CPU ask for V0 to V3"):
        w24_gemm(torch.randn(16, 48), random_f24(8, 2, 1), "VX")


def test_costs():
    packed = f24_bytes(28672, 434, 78)
    assert cost(1, packed, 28672, 8192).bytes == packed + 2 * (28672 + 8192)
    assert gemm_module.cost(32, packed, 28672, 8192).flops == 2 * 32 * 28672 * 8192
    assert dequantise_module.cost(packed, 28672, 8192).bytes == packed + 2 * 28672 * 8192
