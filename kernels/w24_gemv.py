"""y = W x for few x and a matrix W in F24 (kernels/w24.py): decoding, where the time is that of reading W.

Two identities keep the arithmetic below the loads. Zeros leave the inner loop,

    sum_c (q_c - z) s x_c = s (sum_c q_c x_c - z sum_c x_c),

with sum_c x_c computed once for all rows. And codes are not shifted down: word & (3 << 2j) is code_j 4^j, so x_j is
multiplied by 4^-j beforehand (exact, a power of two), and a weight costs one AND, one conversion and one FMA.

The variants differ in when scales are decoded ("asynchronous dequantisation" is V2 and V3):

    V0  the whole matrix is dequantised to x's dtype in memory, then torch multiplies
    V1  in one kernel; the scales of a tile are decoded before its words are used
    V2  the scales of the next tile are decoded while this tile's words are on their way
    V3  V2, and the loads of several tiles are in flight (num_stages > 1)
    VX  V1's loads of W without decoding: no product, but what V1 would take if dequantisation were free. It gives
        sum over words of (word as unsigned) sum_c x_c + metadata word + offset word + stored scale
"""

from __future__ import annotations

import math

import torch

from kernels._triton import block_of, split_count, tl, triton, use_triton
from kernels._w24_tile import decode_metadata, load_codes, load_metadata
from kernels.cost import Cost
from kernels.w24 import F24, STRIPE, check_product, product
from kernels.w24_dequantise import w24_dequantise

VARIANTS = ("V0", "V1", "V2", "V3", "VX")
MOST_ROWS = 8  # of x; w24_gemm serves more
PIPELINE = 3  # stages of V3


@triton.jit
def _arrange(x, out, b, tile, words, BITS: tl.constexpr, BLOCK_W: tl.constexpr):
    EACH: tl.constexpr = 32 // BITS
    word, j = tile * BLOCK_W + tl.arange(0, BLOCK_W), tl.arange(0, EACH)
    inside = (word < words)[:, None] & (j < EACH)
    values = tl.load(x + word[:, None] * EACH + j, mask=inside, other=0.0).to(tl.float32)
    power = ((127 - BITS * j) << 23).to(tl.float32, bitcast=True)  # 2^(-BITS j), by its exponent
    out += b * (EACH + 1) * words
    tl.store(out + j[None, :] * words + word[:, None], values * power[None, :], mask=inside)
    tl.store(out + EACH * words + word, tl.sum(values, 1), mask=word < words)


@triton.jit
def _arrange_kernel(x, out2, out4, words2, words4, x_b, BLOCK_W: tl.constexpr):
    """x [B, IC] -> float32 [B, codes + 1, words] of each plane: channel j of a word times 2^(-BITS j); their sum."""
    tile, b = tl.program_id(0), tl.program_id(1)
    tiles2 = tl.cdiv(words2, BLOCK_W)
    x += b * x_b
    if tile < tiles2:
        _arrange(x, out2, b, tile, words2, 2, BLOCK_W)
    else:
        _arrange(x + words2 * 16, out4, b, tile - tiles2, words4, 4, BLOCK_W)


@triton.jit
def _plane(
    acc, x, codes, meta, scales, offsets, row, group, b, B, OC, words,
    BITS: tl.constexpr, BLOCK_W: tl.constexpr,
    DECODE: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [B, rows, BLOCK_W] plus what this program's part (axis 1 of the grid) of a plane's words adds."""
    EACH: tl.constexpr = 32 // BITS
    share = tl.cdiv(tl.cdiv(words, tl.num_programs(1)), BLOCK_W) * BLOCK_W
    first = tl.program_id(1) * share
    lane, j = tl.arange(0, BLOCK_W), tl.arange(0, EACH)
    mask = (((1 << BITS) - 1) << (BITS * j)).to(tl.uint32, bitcast=True)
    if AHEAD:
        packed, scale, offset = load_metadata(meta, scales, offsets, row, group, first + lane, OC, words, BITS)
        s, z = decode_metadata(packed, scale, offset, first + lane, BITS)
    for w0 in tl.range(first, tl.minimum(first + share, words), BLOCK_W, num_stages=STAGES):
        word = w0 + lane
        tile = load_codes(codes, row, word, OC, words)
        if AHEAD:
            packed, scale, offset = load_metadata(meta, scales, offsets, row, group, word + BLOCK_W, OC, words, BITS)
            next_s, next_z = decode_metadata(packed, scale, offset, word + BLOCK_W, BITS)
        else:
            packed, scale, offset = load_metadata(meta, scales, offsets, row, group, word, OC, words, BITS)
        channel = x + (b * (EACH + 1) * words)[:, None] + word
        here = (b < B)[:, None] & (word < words)[None, :]
        total = tl.load(channel + EACH * words, mask=here, other=0.0)[:, None, :]
        if DECODE:
            if not AHEAD:
                s, z = decode_metadata(packed, scale, offset, word, BITS)
            values = tl.load(channel[None, :, :] + j[:, None, None] * words, mask=here[None, :, :], other=0.0)
            code = (tile[None, None, :, :] & mask[:, None, None, None]).to(tl.float32)
            part = tl.sum(code * values[:, :, None, :], 0)  # over the codes of a word, all in one thread
            acc += s[None, :, :] * (part - z[None, :, :] * total)
            if AHEAD:
                s, z = next_s, next_z
        else:
            acc += (
                tile.to(tl.float32)[None, :, :] * total
                + (packed.to(tl.float32) + offset.to(tl.float32) + scale)[None, :, :]
            )
    return acc


@triton.jit
def _gemv_kernel(
    x2, x4, qw2, zs1, s2, z2, qw4, s4, z4, out, B, OC, words2, words4,
    G2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_OC: tl.constexpr, BLOCK_W: tl.constexpr,
    DECODE: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OC rows times its part of both planes' words, for all x; out [parts, B, OC]."""
    row, b = tl.program_id(0) * BLOCK_OC + tl.arange(0, BLOCK_OC), tl.arange(0, BLOCK_B)
    group = tl.program_id(0) * BLOCK_OC // G2 + tl.arange(0, 1)  # BLOCK_OC divides G2
    acc = tl.zeros([BLOCK_B, BLOCK_OC, BLOCK_W], tl.float32)
    acc = _plane(acc, x2, qw2, zs1, s2, z2, row, group, b, B, OC, words2, 2, BLOCK_W, DECODE, AHEAD, STAGES)
    acc = _plane(acc, x4, qw4, z4, s4, z2, row, group, b, B, OC, words4, 4, BLOCK_W, DECODE, AHEAD, STAGES)
    place = (tl.program_id(1) * B + b)[:, None] * OC + row
    tl.store(out + place, tl.sum(acc, 2), mask=(b < B)[:, None] & (row < OC)[None, :])


def loads_alone(x: torch.Tensor, weight: F24) -> torch.Tensor:
    """What variant VX computes, in float64 [B, OC]. For 4 bits the metadata word counts as the offset word, too."""
    n2, n4 = weight.stripes
    group, third = (torch.arange(weight.rows) // weight.g2).to(x.device), torch.arange(n2, device=x.device) // 3
    sums2 = x[:, : STRIPE * n2].double().unflatten(1, (n2, STRIPE)).sum(2)
    sums4 = x[:, STRIPE * n2 :].double().unflatten(1, (2 * n4, STRIPE // 2)).sum(2)
    y = sums2 @ (weight.qw2.long() & 0xFFFFFFFF).double().T
    y = y + sums4 @ (weight.qw4.flatten(1).long() & 0xFFFFFFFF).double().T
    meta2 = weight.zs1.double()[:, third] + weight.z2.double()[group][:, third] + weight.s2.double()[group]
    meta4 = 2 * weight.z4.double()[:, torch.arange(n4, device=x.device) // 4] + weight.s4.double()
    return y + meta2.sum(1) + 2 * meta4.sum(1)


def w24_gemv(x: torch.Tensor, weight: F24, variant: str = "V3") -> torch.Tensor:
    """x W^T for at most 8 rows of x: [B, OC] in x's dtype, sums in float32.

    x [B, IC] float16, bfloat16 or float32, channels in packed order (x[:, weight.perm] of the layer's input), any
    strides. variant: see the module; V0 to V3 agree up to rounding. On the CPU without the interpreter one path serves
    V1 to V3. Raises ValueError for shapes, more than 8 rows (use w24_gemm) and an unknown variant, TypeError for
    dtypes.
    """
    check_product(x, weight)
    check_variant(variant)
    if len(x) > MOST_ROWS:
        raise ValueError(f"x has {len(x)} rows, w24_gemv takes at most {MOST_ROWS}: use w24_gemm")
    if variant == "V0":
        return torch.nn.functional.linear(x, w24_dequantise(weight, x.dtype))
    if not use_triton(x):
        y = loads_alone(x, weight) if variant == "VX" else product(x.float(), weight)
        return y.to(x.dtype)
    if not len(x) or not weight.rows:
        return x.new_zeros(len(x), weight.rows)
    batch, (n2, n4) = len(x), weight.stripes
    words4 = 2 * n4
    x2 = torch.empty(batch, 17, n2, device=x.device)
    x4 = torch.empty(batch, 9, words4, device=x.device)
    x, block_w = x.contiguous(), 32
    _arrange_kernel[(triton.cdiv(n2, block_w) + triton.cdiv(words4, block_w), batch)](
        x, x2, x4, n2, words4, x.stride(0), BLOCK_W=block_w, num_warps=4
    )
    block_b = block_of(batch, 1, MOST_ROWS)
    block_oc = math.gcd(weight.g2, 16)
    blocks = triton.cdiv(weight.rows, block_oc)
    parts = split_count(blocks, max(n2, words4), 2 * block_w, x.device, each=8)  # programs have few warps
    out = torch.empty(parts, batch, weight.rows, device=x.device, dtype=x.dtype if parts == 1 else torch.float32)
    _gemv_kernel[(blocks, parts)](
        x2, x4, *weight.planes().values(), out, batch, weight.rows, n2, words4,
        G2=weight.g2, BLOCK_B=block_b, BLOCK_OC=block_oc, BLOCK_W=block_w,
        DECODE=variant != "VX", AHEAD=variant in ("V2", "V3"), STAGES=PIPELINE if variant == "V3" else 1,
        num_warps=max(2, block_b),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


def check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are: {', '.join(VARIANTS)}")


def cost(batch: int, weight_bytes: int, rows: int, channels: int, itemsize: int = 2) -> Cost:
    """weight_bytes: of all planes (see `kernels.w24.f24_bytes`). Decoding is not counted among the FLOPs."""
    return Cost(weight_bytes + batch * (rows + channels) * itemsize, 2 * batch * rows * channels)
