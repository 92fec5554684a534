"""F24: weights in 2 bits, a share of the input channels in 4, laid out for vector loads (Fast 2-bit, storage figure).

W [OC, IC] is cut into stripes of 16 input channels, the same for all rows. A stripe has 2 or 4 bits; all 2-bit stripes
come first (`perm` says which channel stands where, so a layer computes y = W x from x[perm]). Within a stripe every row
is a group with its own scale s and zero z:

    w = (code - z) s

A 4-bit stripe keeps s in fp16. The scales of a 2-bit stripe are themselves quantised ("two-order"): g2 rows share an
fp16 second-order scale s2 and an offset o, and a row stores a code of 3 or 4 bits:

    s = (scale code + o) s2

Three 2-bit stripes share one 16-bit word for their zeros (2 2 2 bits) and scale codes (3 3 4 bits): two of three codes
give up a bit so that the word is aligned ("scale clipping").

    plane  dtype, shape                       bits from the lowest
    qw2    int32 [OC, n2]                     16 codes of 2 bits
    zs1    int16 [OC, ceil(n2/3)]             z z z (2 each), scale codes 3 3 4
    s2     fp16  [ceil(OC/g2), n2]
    z2     int16 [ceil(OC/g2), ceil(n2/3)]    o o o (4 each), 4 unused
    qw4    int32 [OC, n4, 2]                  8 codes of 4 bits
    s4     fp16  [OC, n4]
    z4     int16 [OC, ceil(n4/4)]             z z z z (4 each)

With g2 = 16 a 2-bit stripe takes 2 + 16/48 + (16 + 16/3)/256 = 2.4167 bits a weight, a 4-bit stripe 5.25.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from kernels._checks import check_device, check_dtypes, sizes_of
from kernels.packing import check_codes, join, pack, unpack

STRIPE = 16  # channels of a stripe: 16 codes of 2 bits fill an int32 word
SCALE_BITS = (3, 3, 4)  # of the scale codes of stripes 3t, 3t + 1, 3t + 2


@dataclass(frozen=True)
class F24:
    """One packed matrix: the module's planes, perm int32 [IC], and g2, the rows of a second-order group."""

    qw2: torch.Tensor
    zs1: torch.Tensor
    s2: torch.Tensor
    z2: torch.Tensor
    qw4: torch.Tensor
    s4: torch.Tensor
    z4: torch.Tensor
    perm: torch.Tensor
    g2: int

    @property
    def rows(self) -> int:
        """OC, output channels."""
        return self.qw2.shape[0]

    @property
    def stripes(self) -> tuple[int, int]:
        """(n2, n4)."""
        return self.qw2.shape[1], self.qw4.shape[1]

    @property
    def channels(self) -> int:
        """IC, input channels."""
        return STRIPE * sum(self.stripes)

    def planes(self) -> dict[str, torch.Tensor]:
        """What a product reads, perm aside."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("perm", "g2")}

    @property
    def bits_per_weight(self) -> float:
        """Of the planes as they lie in memory, without perm: the layer before can store its outputs in that order."""
        return 8 * sum(plane.nbytes for plane in self.planes().values()) / (self.rows * self.channels)

    def to(self, device: torch.device | str) -> F24:
        moved = {name: plane.to(device) for name, plane in self.planes().items()}
        return replace(self, perm=self.perm.to(device), **moved)

    def clone(self) -> F24:
        return replace(self, perm=self.perm.clone(), **{name: plane.clone() for name, plane in self.planes().items()})


def f24_bytes(rows: int, n2: int, n4: int, g2: int = 16) -> int:
    """Bytes of the planes of a matrix with n2 stripes in 2 bits and n4 in 4."""
    groups = -(-rows // g2)
    thirds = -(-n2 // 3)
    return rows * (4 * n2 + 2 * thirds) + groups * (2 * n2 + 2 * thirds) + rows * (8 * n4 + 2 * n4 + 2 * -(-n4 // 4))


def pack_f24(
    codes2: torch.Tensor,
    zeros2: torch.Tensor,
    scale_codes: torch.Tensor,
    s2: torch.Tensor,
    offsets: torch.Tensor,
    codes4: torch.Tensor,
    zeros4: torch.Tensor,
    s4: torch.Tensor,
    perm: torch.Tensor,
    g2: int = 16,
) -> F24:
    """Packs a quantised matrix. Integers of any dtype; ranges are checked, nothing is clamped.

    2-bit stripes: codes2 [OC, n2, 16] and zeros2 [OC, n2] in 0..3, scale_codes [OC, n2] in 0..7 (0..15 in every third
    stripe), s2 [ceil(OC/g2), n2] float, offsets like it in 0..15. 4-bit stripes: codes4 [OC, n4, 16] and zeros4
    [OC, n4] in 0..15, s4 [OC, n4] float. perm [IC]: the original channel of each packed one, a permutation. Scales are
    stored in fp16. Raises ValueError for shapes and values out of range, TypeError for codes that are no integers.
    """
    if g2 < 1:
        raise ValueError(f"g2 is a number of rows, at least 1, not {g2}")
    sizes = sizes_of(
        codes2=(codes2, "OC n2 16"), zeros2=(zeros2, "OC n2"), scale_codes=(scale_codes, "OC n2"),
        s2=(s2, "groups n2"), offsets=(offsets, "groups n2"),
        codes4=(codes4, "OC n4 16"), zeros4=(zeros4, "OC n4"), s4=(s4, "OC n4"), perm=(perm, "IC"),
    )  # fmt: skip
    rows, n2, n4 = sizes["OC"], sizes["n2"], sizes["n4"]
    if sizes["16"] != STRIPE:
        raise ValueError(f"codes2 has stripes of {sizes['16']} channels: they have {STRIPE}; pad the matrix")
    if sizes["groups"] != -(-rows // g2):
        raise ValueError(
            f"s2 has {sizes['groups']} second-order groups: {rows} rows make {-(-rows // g2)} of g2 = {g2}"
        )
    if sorted(perm.tolist()) != list(range(STRIPE * (n2 + n4))):
        raise ValueError(f"perm must be a permutation of the {STRIPE * (n2 + n4)} input channels")
    check_codes("scale_codes", scale_codes, 4)
    widths = torch.tensor([SCALE_BITS[g % 3] for g in range(n2)], device=scale_codes.device, dtype=torch.long)
    if bool((scale_codes >= 1 << widths).any()):
        raise ValueError("scale_codes must lie in 0..7, and in 0..15 in stripes 2, 5, 8, ... only: clamp the others")
    check_codes("zeros2", zeros2, 2)
    check_codes("offsets", offsets, 4)
    for name, scale in (("s2", s2), ("s4", s4)):
        if not bool(torch.isfinite(scale.to(torch.float16)).all()):
            raise ValueError(f"{name} has values that are not finite in float16 (largest: {float(scale.abs().max())})")
    return F24(
        pack(codes2, 2)[..., 0].contiguous(),
        join(torch.cat([_by_three(zeros2), _by_three(scale_codes)], -1), [2, 2, 2, *SCALE_BITS], torch.int16),
        s2.to(torch.float16),
        join(_by_three(offsets), [4, 4, 4], torch.int16),
        pack(codes4, 4),
        s4.to(torch.float16),
        pack(zeros4, 4, torch.int16),
        perm.to(torch.int32),
        g2,
    )


def _by_three(values: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., ceil(n/3), 3], filled with zeros."""
    return torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % 3)).unflatten(-1, (-1, 3))


def _thirds(words: torch.Tensor, shifts: list[int], masks: list[int], n: int) -> torch.Tensor:
    """Field t of each word for stripe 3w + t: [..., ceil(n/3)] -> [..., n]."""
    shift, mask = (torch.tensor(x, dtype=torch.int32, device=words.device) for x in (shifts, masks))
    return (words.int()[..., None] >> shift & mask).flatten(-2)[..., :n]


def scales_of(weight: F24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(s float32, z float32) of the 2-bit groups [OC, n2], then of the 4-bit groups [OC, n4]."""
    n2, n4 = weight.stripes
    group = torch.arange(weight.rows, device=weight.s2.device) // weight.g2
    offsets = _thirds(weight.z2, [0, 4, 8], [15, 15, 15], n2)
    codes = _thirds(weight.zs1, [6, 9, 12], [7, 7, 15], n2)
    s = (codes + offsets[group]).float() * weight.s2.float()[group]
    z = _thirds(weight.zs1, [0, 2, 4], [3, 3, 3], n2).float()
    return s, z, weight.s4.float(), unpack(weight.z4, 4, n4).float()


def unpacked(weight: F24) -> torch.Tensor:
    """The matrix float32 [OC, IC] in packed channel order; weight[:, perm] of the original.

    All groups of some rows at once, as many as stay in the processor's cache between the steps.
    """
    s, z, s4, z4 = (scale[:, :, None].split(64) for scale in scales_of(weight))
    out = torch.empty(weight.rows, sum(weight.stripes), STRIPE, device=weight.qw2.device)
    n2, _ = weight.stripes
    for i, rows in enumerate(out.split(64)):
        for part, words, bits, scale, zero in (
            (rows[:, :n2], weight.qw2[64 * i :][:64], 2, s[i], z[i]),
            (rows[:, n2:], weight.qw4[64 * i :][:64].flatten(1), 4, s4[i], z4[i]),
        ):
            codes = unpack(words, bits, STRIPE * part.shape[1]).view(part.shape)
            torch.sub(codes, zero, out=part).mul_(scale)
    return out.flatten(1)


def product(x: torch.Tensor, weight: F24) -> torch.Tensor:
    """x W^T float32 [B, OC] for x float32 [B, IC], without the matrix in memory: one code of every word at a time.

    sum_c (q_c - z) s x_c = sum over the places j of a word of (s q_j) x_j, less (s z) sum_c x_c.
    """
    n2 = STRIPE * weight.stripes[0]
    s, z, s4, z4 = scales_of(weight)
    s4, z4 = s4.repeat_interleave(2, 1), z4.repeat_interleave(2, 1)  # a stripe of 4 bits has two words
    y = torch.zeros(len(x), weight.rows, device=x.device)
    for words, part, bits, scale, zero in (
        (weight.qw2, x[:, :n2], 2, s, z),
        (weight.qw4.flatten(1), x[:, n2:], 4, s4, z4),
    ):
        places = part.unflatten(1, (words.shape[1], 32 // bits)).permute(2, 0, 1).contiguous()  # [codes, B, words]
        y -= places.sum(0) @ (scale * zero).T
        for j, place in enumerate(places):
            y += place @ (scale * (words >> bits * j & (1 << bits) - 1)).T
    return y


def reference(weight: F24) -> torch.Tensor:
    """Float64 [OC, IC] in packed order, weight by weight from the layout's description."""
    n2, n4 = weight.stripes
    w = torch.zeros(weight.rows, weight.channels, dtype=torch.float64)
    for r in range(weight.rows):
        for g in range(n2):
            word, slot, zs, o = (
                int(weight.qw2[r, g]),
                g % 3,
                int(weight.zs1[r, g // 3]),
                int(weight.z2[r // weight.g2, g // 3]),
            )
            code = zs >> (6, 9, 12)[slot] & (7, 7, 15)[slot]
            s = (code + (o >> 4 * slot & 15)) * float(weight.s2[r // weight.g2, g])
            for j in range(STRIPE):
                w[r, STRIPE * g + j] = ((word >> 2 * j & 3) - (zs >> 2 * slot & 3)) * s
        for g in range(n4):
            z = int(weight.z4[r, g // 4]) >> 4 * (g % 4) & 15
            for j in range(STRIPE):
                code = int(weight.qw4[r, g, j // 8]) >> 4 * (j % 8) & 15
                w[r, STRIPE * (n2 + g) + j] = (code - z) * float(weight.s4[r, g])
    return w


def check_product(x: torch.Tensor, weight: F24) -> None:
    """What every product with a packed matrix asks of its arguments."""
    sizes_of(x=(x, "B IC"), perm=(weight.perm, "IC"))
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x is {x.dtype}: pass float16, bfloat16 or float32")
    check_dtypes(torch.int32, qw2=weight.qw2, qw4=weight.qw4)
    check_device(x=x, **weight.planes())


def random_f24(rows: int, n2: int, n4: int, seed: int = 0, g2: int = 16) -> F24:
    """A matrix of random codes with weights of order 1/sqrt(IC), on the CPU: for benchmarks and tests."""
    draw = torch.Generator().manual_seed(seed)
    groups, size = -(-rows // g2), (STRIPE * max(n2 + n4, 1)) ** -0.5

    def words(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        bounds = torch.iinfo(dtype)
        return torch.randint(bounds.min, bounds.max + 1, shape, generator=draw, dtype=dtype)

    return F24(
        words(torch.int32, rows, n2),
        words(torch.int16, rows, -(-n2 // 3)),
        (size * (0.05 + 0.1 * torch.rand(groups, n2, generator=draw))).half(),
        words(torch.int16, groups, -(-n2 // 3)) & 0xFFF,
        words(torch.int32, rows, n4, 2),
        (size * 0.2 * torch.rand(rows, n4, generator=draw)).half(),
        words(torch.int16, rows, -(-n4 // 4)),
        torch.randperm(STRIPE * (n2 + n4), generator=draw).int(),
        g2,
    )
