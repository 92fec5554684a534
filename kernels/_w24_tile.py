"""Reading a tile of an F24 matrix: shared by the kernels w24_gemv, w24_gemm and w24_dequantise.

A tile is a block of rows times a block of int32 words. A word of the 2-bit plane is a stripe (16 codes); a word of the
4-bit plane is half a stripe (8 codes), so two words have the same scale and zero. A plane comes as four pointers:
`codes` int32 [OC, words], `meta` (zs1 or z4), `scales` (s2 or s4) and `offsets` (z2; unused with 4 bits).
"""

from __future__ import annotations

from kernels._triton import tl, triton


@triton.jit
def load_codes(codes, row, word, OC, words):
    """uint32 [rows, words]: unsigned, so that the code in the highest bits is one like the others."""
    inside = (row < OC)[:, None] & (word < words)[None, :]
    return tl.load(codes + row.to(tl.int64)[:, None] * words + word, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def load_metadata(meta, scales, offsets, row, group, word, OC, words, BITS: tl.constexpr):
    """(meta int32, scale float32, offset int32) as they lie in memory, 0 behind the plane's last word.

    All are [rows, words], but for a 2-bit plane and a `group` of one element scale and offset are [1, words]: all rows
    are of that second-order group. group: min(row, OC - 1) // g2.
    """
    behind = (word < words)[None, :]
    inside = (row < OC)[:, None] & behind
    if BITS == 2:
        third, width = word // 3, tl.cdiv(words, 3)
        packed = tl.load(meta + (row * width)[:, None] + third, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + (group * words)[:, None] + word, mask=behind, other=0.0).to(tl.float32)
        offset = tl.load(offsets + (group * width)[:, None] + third, mask=behind, other=0).to(tl.int32)
    else:
        stripe, stripes = word // 2, words // 2
        packed = tl.load(meta + (row * tl.cdiv(stripes, 4))[:, None] + stripe // 4, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + (row * stripes)[:, None] + stripe, mask=inside, other=0.0).to(tl.float32)
        offset = packed
    return packed, scale, offset


@triton.jit
def decode_metadata(packed, scale, offset, word, BITS: tl.constexpr):
    """(scale, zero) float32 [rows, words] of what `load_metadata` gave: the two-order decoding."""
    if BITS == 2:
        slot = word % 3
        code = (packed >> (6 + 3 * slot)[None, :]) & tl.where(slot < 2, 7, 15)[None, :]
        scale = (code + ((offset >> (4 * slot)[None, :]) & 15)).to(tl.float32) * scale
        zero = (packed >> (2 * slot)[None, :]) & 3
    else:
        zero = (packed >> (4 * (word // 2 % 4))[None, :]) & 15
    return scale, zero.to(tl.float32)


@triton.jit
def dequantised(codes, scale, zero, BITS: tl.constexpr):
    """float32 [rows, words * codes per word]: (code - zero) scale, channels in order."""
    EACH: tl.constexpr = 32 // BITS
    shift = BITS * tl.arange(0, EACH)
    q = ((codes[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)).to(tl.float32)
    weights = (q - zero[:, :, None]) * scale[:, :, None]
    return tl.reshape(weights, [codes.shape[0], codes.shape[1] * EACH])
