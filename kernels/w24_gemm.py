"""y = W x for many x and a matrix W in F24: tiles of W are dequantised in registers and go to the tensor cores.

With B rows of x a weight is read once and used B times, so that from some tens of rows on arithmetic is the bound and
the fused kernel's gain over V0 is V0's trip of the dequantised matrix through memory. Variants as in w24_gemv.py; VX
multiplies words as they are (numbers without meaning, V1's loads and products).
"""

from __future__ import annotations

import torch

from kernels._triton import block_of, processors, tl, triton, use_triton
from kernels._w24_tile import decode_metadata, dequantised, load_codes, load_metadata
from kernels.cost import Cost
from kernels.w24 import F24, check_product, product
from kernels.w24_dequantise import w24_dequantise
from kernels.w24_gemv import PIPELINE, check_variant


@triton.jit
def _plane(
    acc, x, codes, meta, scales, offsets, i, row, B, OC, words, x_b,
    BITS: tl.constexpr, G2: tl.constexpr, BLOCK_C: tl.constexpr,
    DECODE: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [x rows, W rows] plus the product over all channels of a plane."""
    EACH: tl.constexpr = 32 // BITS
    BLOCK_W: tl.constexpr = BLOCK_C // EACH
    lane, c = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_C)
    group = tl.minimum(row, OC - 1) // G2
    if AHEAD:
        packed, scale, offset = load_metadata(meta, scales, offsets, row, group, lane, OC, words, BITS)
        s, z = decode_metadata(packed, scale, offset, lane, BITS)
    for w0 in tl.range(0, words, BLOCK_W, num_stages=STAGES):
        word = w0 + lane
        tile = load_codes(codes, row, word, OC, words)
        if AHEAD:
            packed, scale, offset = load_metadata(meta, scales, offsets, row, group, word + BLOCK_W, OC, words, BITS)
            next_s, next_z = decode_metadata(packed, scale, offset, word + BLOCK_W, BITS)
        else:
            packed, scale, offset = load_metadata(meta, scales, offsets, row, group, word, OC, words, BITS)
        channel = w0 * EACH + c
        block = tl.load(
            x + (i * x_b)[:, None] + channel, mask=(i < B)[:, None] & (channel < words * EACH)[None, :], other=0.0
        )
        if DECODE:
            if not AHEAD:
                s, z = decode_metadata(packed, scale, offset, word, BITS)
            weights = dequantised(tile, s, z, BITS)
        else:
            raw = tile.to(tl.float32) + packed.to(tl.float32) + offset.to(tl.float32) + scale
            weights = tl.reshape(
                tl.broadcast_to(raw[:, :, None], [row.shape[0], BLOCK_W, EACH]), [row.shape[0], BLOCK_C]
            )
        acc = tl.dot(block, tl.trans(weights.to(block.dtype)), acc, input_precision="ieee")
        if AHEAD:
            s, z = next_s, next_z
    return acc


@triton.jit
def _gemm_kernel(
    x, qw2, zs1, s2, z2, qw4, s4, z4, out, B, OC, n2, n4, x_b,
    G2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_OC: tl.constexpr, BLOCK_C: tl.constexpr,
    DECODE: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows of x times BLOCK_OC rows of W."""
    i = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)
    acc = tl.zeros([BLOCK_B, BLOCK_OC], tl.float32)
    acc = _plane(acc, x, qw2, zs1, s2, z2, i, row, B, OC, n2, x_b, 2, G2, BLOCK_C, DECODE, AHEAD, STAGES)
    x += n2 * 16
    acc = _plane(acc, x, qw4, z4, s4, z2, i, row, B, OC, n4 * 2, x_b, 4, G2, BLOCK_C, DECODE, AHEAD, STAGES)
    place = i.to(tl.int64)[:, None] * OC + row
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(i < B)[:, None] & (row < OC)[None, :])


def w24_gemm(x: torch.Tensor, weight: F24, variant: str = "V3") -> torch.Tensor:
    """x W^T: [B, OC] in x's dtype; weights are rounded to x's dtype before they are multiplied, sums are in float32.

    x [B, IC] float16, bfloat16 or float32, channels in packed order (x[:, weight.perm] of the layer's input), rows
    dense. On the CPU without the interpreter one path serves V1 to V3, and there is no VX. Raises ValueError for shapes
    and an unknown variant, TypeError for dtypes.
    """
    check_product(x, weight)
    check_variant(variant)
    if variant == "V0":
        return torch.nn.functional.linear(x, w24_dequantise(weight, x.dtype))
    if not use_triton(x):
        if variant == "VX":
            raise ValueError("VX measures loads on a GPU and computes no product: on the CPU ask for V0 to V3")
        return product(x.float(), weight).to(x.dtype)
    out = x.new_empty(len(x), weight.rows)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    full = x.dtype == torch.float32  # products outside the tensor cores take many registers
    block_b = block_of(len(x), 16, 16 if full else 64)
    tiles = triton.cdiv(len(x), block_b)
    many = not full and tiles * (weight.rows // 64) >= processors(x.device)
    block_oc = 64 if many else 32  # enough programs for a small matrix
    _gemm_kernel[(tiles, triton.cdiv(weight.rows, block_oc))](
        x, *weight.planes().values(), out, len(x), weight.rows, *weight.stripes, x.stride(0),
        G2=weight.g2, BLOCK_B=block_b, BLOCK_OC=block_oc, BLOCK_C=64 if full else 128,
        DECODE=variant != "VX", AHEAD=variant in ("V2", "V3"), STAGES=PIPELINE if variant == "V3" else 1, num_warps=4,
    )  # fmt: skip
    return out


def cost(batch: int, weight_bytes: int, rows: int, channels: int, itemsize: int = 2) -> Cost:
    """weight_bytes: of all planes (`kernels.w24.f24_bytes`). Decoding is not counted among the FLOPs."""
    return Cost(weight_bytes + batch * (rows + channels) * itemsize, 2 * batch * rows * channels)
