"""Grids and GPTQ: exact laws, and parity with the literal algorithm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.quantisation.gptq import gptq, inverse_factor, output_error, round_to_nearest
from common.quantisation.grids import minmax


def matrix(seed: int, rows: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(seed: int, channels: int, mixed: bool = True) -> torch.Tensor:
    """H = 2 X^T X / n of inputs that depend on each other."""
    x = matrix(seed, 3 * channels, channels)
    x = x @ (torch.eye(channels) + matrix(seed + 1, channels, channels) / 3).double() if mixed else x
    return 2 * x.T @ x / len(x)


def groups(channels: int, width: int, bits: int) -> list:
    return [(width, minmax(bits))] * (channels // width)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 8]), st.floats(1e-3, 1e3), st.floats(-2, 2))
def test_a_value_is_off_by_half_a_step_at_most(seed, bits, size, shift):
    w = size * (matrix(seed, 5, 16) + shift)
    grid = minmax(bits)(w)
    codes = grid.codes(w)
    assert ((codes >= 0) & (codes < 2**bits)).all()
    assert (codes == codes.round()).all()
    # half a step, another half where the zero was rounded, and the rounding of the scale to float16 over the range
    slack = (1.001 + 2**bits * 2**-11) * grid.scale[:, None]
    assert ((w - grid.values(codes)).abs() <= slack).all()


def test_special_groups_are_exact():
    spaced = torch.tensor([[-0.5, 0.0, 0.5, 1.0]])
    constant = torch.tensor([[0.75, 0.75, 0.75, 0.75]])
    nothing = torch.zeros(1, 4)
    for w in (spaced, constant, -constant, nothing):
        grid = minmax(2)(w)
        assert torch.equal(grid.values(grid.codes(w)), w)
        assert 0 <= float(grid.zero) <= 3  # two bits hold it, for groups of one sign, too
    assert float(minmax(2)(nothing).scale) == 1


def test_a_diagonal_hessian_gives_rounding_to_nearest():
    w, parts = matrix(0, 6, 48), groups(48, 16, 2)
    plain = round_to_nearest(w, parts)
    for diagonal in (torch.ones(48), torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.1):
        found = gptq(w, torch.diag(diagonal).double(), parts)
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.weight, plain.weight)


def literal(w: torch.Tensor, hessian: torch.Tensor, width: int, bits: int, damp: float) -> torch.Tensor:
    """Column by column with the inverse of the open columns' Hessian taken anew each time (optimal brain surgeon)."""
    w, h = w.clone(), hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for c in range(w.shape[1]):
        if c % width == 0:
            grid = minmax(bits)(w[:, c : c + width])
        inverse = torch.linalg.inv(h[c:, c:])
        rounded = grid.values(grid.codes(w[:, c]))
        error = (w[:, c] - rounded) / inverse[0, 0]
        w[:, c:] -= error[:, None] * inverse[0]
        w[:, c] = rounded
    return w


@pytest.mark.parametrize(("width", "bits"), [(16, 2), (8, 3), (48, 4)])
def test_parity_with_the_literal_loop(width, bits):
    w, h = matrix(2, 7, 48), hessian_of(3, 48)
    found = gptq(w, h, groups(48, width, bits), damp=0.02)
    assert torch.allclose(found.weight, literal(w, h, width, bits, 0.02), atol=1e-9, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_compensation_reduces_the_output_error(seed):
    w, h = matrix(seed, 24, 48), hessian_of(seed, 48)
    parts = groups(48, 16, 2)
    plain, compensated = (output_error(w, r.weight, h) for r in (round_to_nearest(w, parts), gptq(w, h, parts)))
    assert compensated < plain


def test_the_output_error_is_that_of_outputs():
    x, w = matrix(0, 200, 16), matrix(1, 5, 16)
    rounded = round_to_nearest(w, groups(16, 16, 2)).weight
    h = 2 * x.T @ x / len(x)
    assert output_error(w, rounded, h) == pytest.approx(float((x @ (w - rounded).T).square().sum(1).mean()))


@pytest.mark.parametrize("how", ["gptq", "rtn"])
def test_kept_weights_stay_and_leave_the_range(how):
    w, h = matrix(4, 6, 32), hessian_of(5, 32)
    w[:, 3] = 50.0
    kept = torch.zeros_like(w, dtype=torch.bool)
    kept[:, 3] = True
    parts = groups(32, 16, 2)
    found = gptq(w, h, parts, kept) if how == "gptq" else round_to_nearest(w, parts, kept)
    without = gptq(w, h, parts) if how == "gptq" else round_to_nearest(w, parts)
    exact = found.weight[:, 3] - w[:, 3]  # GPTQ moves them with the others before their turn
    assert exact.abs().max() < (20 if how == "gptq" else 1e-12)
    assert float(found.grids[0].scale.max()) < 3 < float(without.grids[0].scale.min())
    assert torch.equal(found.codes[:, 3].double(), found.grids[0].zero)
    assert output_error(w, found.weight, h) < output_error(w, without.weight, h)


def test_a_channel_that_is_always_zero():
    h = hessian_of(6, 16)
    h[5], h[:, 5] = 0, 0
    w = matrix(7, 4, 16)
    found = gptq(w, h, groups(16, 16, 4))
    assert torch.isfinite(found.weight).all()
    factor = inverse_factor(h)
    assert torch.equal(factor[5, 6:], torch.zeros(10, dtype=torch.float64))


def test_bad_inputs_are_named():
    w, h, parts = matrix(0, 4, 32), hessian_of(0, 32), groups(32, 16, 2)
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        minmax(9)
    with pytest.raises(ValueError, match="groups have 16 channels, the matrix 32"):
        gptq(w, h, parts[:1])
    with pytest.raises(ValueError, match=r"\[rows, channels\], not \[4\]"):
        round_to_nearest(w[:, 0], parts)
    with pytest.raises(ValueError, match="matrix has values that are not finite"):
        gptq(torch.full_like(w, float("nan")), h, parts)
    with pytest.raises(ValueError, match="Hessian has values that are not finite"):
        gptq(w, torch.full_like(h, float("nan")), parts)
    with pytest.raises(ValueError, match="16 channels does not fit a matrix of 32"):
        gptq(w, h[:16, :16], parts)
    with pytest.raises(ValueError, match="damp must be above 0, not 0"):
        gptq(w, h, parts, damp=0)
    with pytest.raises(ValueError, match=r"kept must be \[4, 32\]"):
        gptq(w, h, parts, kept=torch.zeros(4, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[channels, channels\], not \[4, 32\]"):
        inverse_factor(w)
