"""An F24 matrix unpacked to memory: the first half of variant V0 (dequantise, then multiply)."""

from __future__ import annotations

import torch

from kernels._triton import tl, triton, use_triton
from kernels._w24_tile import decode_metadata, dequantised, load_codes, load_metadata
from kernels.cost import Cost
from kernels.w24 import F24, STRIPE, unpacked


@triton.jit
def _store_tile(
    codes, meta, scales, offsets, out, row, tile, OC, words, first, channels,
    BITS: tl.constexpr, G2: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 32 // BITS
    group = tl.minimum(row, OC - 1) // G2
    word = tile * (BLOCK_C // EACH) + tl.arange(0, BLOCK_C // EACH)
    packed, scale, offset = load_metadata(meta, scales, offsets, row, group, word, OC, words, BITS)
    s, z = decode_metadata(packed, scale, offset, word, BITS)
    weights = dequantised(load_codes(codes, row, word, OC, words), s, z, BITS)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    place = row.to(tl.int64)[:, None] * channels + first + c
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=(row < OC)[:, None] & (c < words * EACH)[None, :])


@triton.jit
def _dequantise_kernel(
    qw2, zs1, s2, z2, qw4, s4, z4, out, OC, n2, n4, channels,
    G2: tl.constexpr, BLOCK_OC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OC rows times BLOCK_C channels of one plane."""
    row, tile = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC), tl.program_id(0)
    tiles2 = tl.cdiv(n2 * 16, BLOCK_C)
    if tile < tiles2:
        _store_tile(qw2, zs1, s2, z2, out, row, tile, OC, n2, 0, channels, 2, G2, BLOCK_C)
    else:
        _store_tile(qw4, z4, s4, z2, out, row, tile - tiles2, OC, n4 * 2, n2 * 16, channels, 4, G2, BLOCK_C)


def w24_dequantise(weight: F24, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """The matrix [OC, IC] in packed channel order, rounded to dtype (float16, bfloat16 or float32; else TypeError)."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype is {dtype}: ask for float16, bfloat16 or float32")
    out = torch.empty(weight.rows, weight.channels, dtype=dtype, device=weight.qw2.device)
    if not use_triton(out):
        return unpacked(weight).to(dtype)
    (n2, n4), block_oc, block_c = weight.stripes, 16, 256
    tiles = triton.cdiv(n2 * STRIPE, block_c) + triton.cdiv(n4 * STRIPE, block_c)
    if out.numel():
        _dequantise_kernel[(tiles, triton.cdiv(weight.rows, block_oc))](
            *weight.planes().values(), out, weight.rows, n2, n4, weight.channels,
            G2=weight.g2, BLOCK_OC=block_oc, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out


def cost(weight_bytes: int, rows: int, channels: int, itemsize: int = 2) -> Cost:
    """weight_bytes: of all planes (`kernels.w24.f24_bytes`)."""
    return Cost(weight_bytes + rows * channels * itemsize, 2 * rows * channels)
