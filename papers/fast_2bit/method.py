"""2-bit weights with 4-bit stripes and two-order scales (Li et al. 2023), for any Llama-like model.

    quantize_(model, calibration)          # linear layers of the decoder blocks -> F24Linear, in place

A matrix W [OC, IC] is cut into stripes of 16 input channels, the same for all rows; every row of a stripe is a group
with a scale and a zero of its own. Stripes have 2 bits, but the share `ratio_4bit` that matters most has 4
(`stripe_scores`). The scales of 2-bit groups are quantised again, g2 rows at a time (`two_order`). The packed planes
are described in kernels/w24.py, whose kernels unpack them while they load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from common.quantisation.calibrate import linears_of, replace_linears
from common.quantisation.gptq import Rounded, gptq, round_to_nearest
from common.quantisation.grids import Fit, Grid, minmax, ranges, zero_of
from common.quantisation.outliers import SparseRows, choose_outliers
from common.quantisation.packed import PackedLinear
from kernels.w24 import F24, SCALE_BITS, STRIPE, pack_f24
from kernels.w24_dequantise import w24_dequantise
from kernels.w24_gemm import w24_gemm
from kernels.w24_gemv import MOST_ROWS, w24_gemv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # weight, Hessian -> a score for each stripe
ROUNDINGS = ("gptq", "rtn")


def bits_per_weight(ratio_4bit: float, g2: int = 16) -> float:
    """The format's closed form for sizes that divide evenly: codes, a third of a metadata word, second-order scales."""
    two = 2 + 16 / (3 * STRIPE) + (16 + 16 / 3) / (STRIPE * g2)
    four = 4 + 16 / STRIPE + 4 / STRIPE
    return two * (1 - ratio_4bit) + four * ratio_4bit


# Two-order scales


@dataclass(frozen=True)
class TwoOrderGrid(Grid):
    """A grid whose scale is (scale_codes + offset of the row's group) * s2; scale_codes [rows], s2 and offsets
    [ceil(rows / g2)]."""

    scale_codes: torch.Tensor
    s2: torch.Tensor
    offsets: torch.Tensor


def two_order(bits: int, scale_bits: int, g2: int) -> Fit:
    """The min-max grid of `bits`, its scales quantised to `scale_bits` in second-order groups of g2 rows.

    Scales are positive, so a textbook zero of the second order would be negative; an offset o >= 0 is stored instead:

        s2 = max((s_max - s_min) / L, s_min / L),  o = round(s_min / s2),  code = clamp(round(s / s2) - o, 0, L)

    with L = 2^scale_bits - 1, which keeps both o and the code in 0..L. The first-order zero is computed from the scale
    that is stored. A row of zeros may get scale 0, which knows only the weight 0.
    """
    most = 2**scale_bits - 1

    def fit(w: torch.Tensor) -> TwoOrderGrid:
        low, high = ranges(w)
        first = (high - low) / (2**bits - 1)
        row = torch.arange(len(w), device=w.device)
        by_group = F.pad(first, (0, -len(w) % g2), value=float("nan")).view(-1, g2)
        s_max = by_group.nan_to_num(nan=-1.0).amax(1)
        s_min = by_group.nan_to_num(nan=float("inf")).amin(1)
        s2 = (torch.maximum(s_max - s_min, s_min) / most).to(torch.float16).to(w.dtype)
        safe = torch.where(s2 > 0, s2, 1.0)
        offsets = torch.where(s2 > 0, (s_min / safe).round(), 0.0).clamp(0, most)
        group = row // g2
        codes = ((first / safe[group]).round() - offsets[group]).clamp(0, most)
        scale = (codes + offsets[group]) * s2[group]
        return TwoOrderGrid(scale, zero_of(low, scale, bits), bits, codes, s2, offsets)

    return fit


# Which stripes get 4 bits


def _by_stripe(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, STRIPE))


def _spread(weight: torch.Tensor) -> torch.Tensor:
    """Mean over rows of (max - min)^2 [stripes]."""
    stripes = _by_stripe(weight)
    return (stripes.amax(2) - stripes.amin(2)).square().mean(0)


def range_score(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Width alone (first version of the paper): an error of rounding grows with the square of the group's range."""
    return _spread(weight)


def hessian_range_score(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Width and what the layer's inputs make of it (later version, "Hessian value and range variation")."""
    return _spread(weight) * _by_stripe(hessian.diagonal()).mean(1)


def error_score(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The predicted output error of 2 bits, sum of H_cc (w - w~)^2: ours, for comparison."""
    groups = [(STRIPE, minmax(2))] * (weight.shape[1] // STRIPE)
    error = (weight - round_to_nearest(weight, groups).weight).square().sum(0)
    return _by_stripe(error * hessian.diagonal()).sum(1)


SCORES: dict[str, Score] = {"range": range_score, "hessian_range": hessian_range_score, "error": error_score}


def stripe_scores(weight: torch.Tensor, hessian: torch.Tensor, score: str | Score = "hessian_range") -> torch.Tensor:
    """A score for each stripe [IC / 16] of weight [OC, IC], H [IC, IC]. Raises ValueError for an unknown name."""
    if callable(score):
        return score(weight, hessian)
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; there are: {', '.join(SCORES)}")
    return SCORES[score](weight, hessian)


def order_of(scores: torch.Tensor, four: int) -> torch.Tensor:
    """Stripes in packed order, int64: those of 2 bits, then the `four` with the highest scores; each in their order."""
    chosen = scores.argsort(descending=True, stable=True)[:four].sort().values
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[chosen] = False
    return torch.cat([rest.nonzero()[:, 0], chosen])


# One matrix


@dataclass(frozen=True)
class Quantised:
    """A packed matrix, the order of its stripes, and the weights kept beside it (dense, 0 elsewhere; None: none)."""

    packed: F24
    order: torch.Tensor
    kept: torch.Tensor | None


def quantise_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    four: int,
    *,
    score: str | Score = "hessian_range",
    rounding: str = "gptq",
    g2: int = 16,
    outliers: float = 0.0,
    damp: float = 0.01,
) -> Quantised:
    """Quantises weight [OC, IC], IC a multiple of 16, with `four` stripes in 4 bits; hessian [IC, IC], H = 2 X^T X / n.

    Columns are rounded in packed order: what GPTQ moves out of 2-bit stripes ends in those of 4 bits. outliers: share
    of the weights that stays in float16, all in 2-bit stripes. Errors as `quantize_`.
    """
    channels = weight.shape[1]
    if channels % STRIPE:
        raise ValueError(f"{channels} input channels are no multiple of {STRIPE}: pad them")
    w, h = weight.float(), hessian.float()
    order = order_of(stripe_scores(w, h, score), four)
    perm = _perm(order)
    w, h, two = w[:, perm], h[perm][:, perm], len(order) - four
    fits = [two_order(2, SCALE_BITS[place % 3], g2) for place in range(two)] + [minmax(4)] * four
    kept = None
    if outliers:
        kept = torch.zeros_like(w, dtype=torch.bool)
        in_two = slice(0, STRIPE * two)
        share = outliers * channels / max(STRIPE * two, 1)
        kept[:, in_two] = choose_outliers(w[:, in_two], h.diagonal()[in_two], STRIPE, minmax(2), share)
    groups = [(STRIPE, fit) for fit in fits]
    rounded = gptq(w, h, groups, kept, damp) if rounding == "gptq" else round_to_nearest(w, groups, kept)
    beside = None
    if kept is not None:
        beside = torch.empty_like(w)
        beside[:, perm] = torch.where(kept, rounded.weight, 0.0)
    return Quantised(_pack(rounded, two, perm, g2), order, beside)


def _perm(order: torch.Tensor) -> torch.Tensor:
    """The original channel of each packed one."""
    return (STRIPE * order[:, None] + torch.arange(STRIPE, device=order.device)).flatten()


def _pack(rounded: Rounded, two: int, perm: torch.Tensor, g2: int) -> F24:
    codes, grids = _by_stripe(rounded.codes), rounded.grids
    rows = len(codes)

    def stack(values: list[torch.Tensor], size: int) -> torch.Tensor:
        return torch.stack(values, 1) if values else perm.new_zeros(size, 0)

    of_two = [grid for grid in grids[:two] if isinstance(grid, TwoOrderGrid)]
    groups = -(-rows // g2)
    return pack_f24(
        codes[:, :two], stack([g.zero.long() for g in of_two], rows),
        stack([g.scale_codes.long() for g in of_two], rows), stack([g.s2 for g in of_two], groups),
        stack([g.offsets.long() for g in of_two], groups),
        codes[:, two:], stack([g.zero.long() for g in grids[two:]], rows), stack([g.scale for g in grids[two:]], rows),
        perm, g2,
    )  # fmt: skip


# A model


class F24Linear(PackedLinear):
    """y = W x + b from F24 planes: `kernels.w24_gemv` up to 8 rows of x, `kernels.w24_gemm` beyond.

    order int16 [IC / 16] says which stripe stands where. Inputs narrower than the planes are padded with zeros.
    """

    order: torch.Tensor

    def __init__(self, quantised: Quantised, in_features: int, bias: torch.Tensor | None = None) -> None:
        super().__init__(in_features, quantised.packed.rows, bias)
        for name, plane in quantised.packed.planes().items():
            self.register_buffer(name, plane)
        self.register_buffer("order", quantised.order.to(torch.int16))
        self.g2 = quantised.packed.g2
        self.kept = None if quantised.kept is None else SparseRows(quantised.kept[:, :in_features])

    @property
    def packed(self) -> F24:
        planes = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name not in ("order", "bias")}
        return F24(**planes, perm=_perm(self.order.int()), g2=self.g2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, weight = x.reshape(-1, self.in_features), self.packed
        packed = F.pad(rows, (0, weight.channels - self.in_features)).index_select(1, weight.perm)
        if len(rows) <= MOST_ROWS:
            y = w24_gemv(packed, weight)
        else:  # for many rows a CPU is faster when it unpacks the matrix once
            y = w24_gemm(packed, weight, "V0" if x.device.type == "cpu" else "V3")
        if self.kept is not None:
            y = y + self.kept(rows)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def weight_matrix(self) -> torch.Tensor:
        weight = self.packed
        unpacked = w24_dequantise(weight, torch.float32)
        w = torch.empty_like(unpacked)
        w[:, weight.perm.long()] = unpacked
        w = w[:, : self.in_features]
        return w if self.kept is None else w + self.kept.dense()

    def extra_repr(self) -> str:
        two, four = self.packed.stripes
        return f"{self.in_features}, {self.out_features}, stripes of 2 bits={two}, of 4={four}"


def stripes_in_4_bits(stripes: Mapping[str, int], ratio_4bit: float | Mapping[str, float]) -> dict[str, int]:
    """How many stripes of each matrix get 4 bits. What rounding gives one matrix too much the next gets less, so that
    the share over all matrices is met to one stripe. A mapping gives each matrix a ratio of its own.

    Raises ValueError for a ratio outside 0..1 and for matrices that a mapping lacks.
    """
    if isinstance(ratio_4bit, Mapping) and (missing := sorted(set(stripes) - set(ratio_4bit))):
        raise ValueError(f"ratio_4bit names no ratio for {', '.join(missing)}")
    counts, wanted = {}, 0.0
    for name, count in stripes.items():
        ratio = ratio_4bit[name] if isinstance(ratio_4bit, Mapping) else ratio_4bit
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio_4bit is a share in 0..1, not {ratio}")
        wanted += ratio * count
        counts[name] = min(max(round(wanted - sum(counts.values())), 0), count)
    return counts


def quantize_(
    model: PreTrainedModel,
    calibration: Iterable[torch.Tensor],
    ratio_4bit: float | Mapping[str, float] = 0.153,
    *,
    score: str | Score = "hessian_range",
    rounding: str = "gptq",
    g2: int = 16,
    outliers: float = 0.0,
    damp: float = 0.01,
    pad: bool = False,
) -> PreTrainedModel:
    """Replaces the linear layers of the decoder blocks by `F24Linear`, in place, and returns the model.

    calibration: token ids, int64 [rows, length] each; some ten thousand tokens of text that the model is meant for.
    ratio_4bit: share of stripes in 4 bits; 0.153 gives 2.85 bits a weight. A mapping gives each layer its own.
    score: `range`, `hessian_range`, `error`, or a function (weight [OC, IC], H [IC, IC]) -> [IC / 16].
    rounding: `gptq` or `rtn`. g2: rows that share a second-order scale. outliers: share of the weights kept in
    float16, at most 1/16 of those in 2-bit stripes. pad: fill layers up to a multiple of 16 channels.

    Raises ValueError, before anything is replaced, for settings out of range, for a model that is not Llama-like and
    for a layer whose channels are no multiple of 16 unless `pad`; and for calibration inputs that are not finite.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; there are: {', '.join(ROUNDINGS)}")
    if not callable(score) and score not in SCORES:
        raise ValueError(f"unknown score {score!r}; there are: {', '.join(SCORES)}")
    if g2 < 1:
        raise ValueError(f"g2 is a number of rows, at least 1, not {g2}")
    if not 0 <= outliers <= 1 / STRIPE:
        raise ValueError(f"outliers is a share in 0..{1 / STRIPE}, not {outliers}")
    linears = linears_of(model)
    for name, layer in linears.items():
        if layer.in_features % STRIPE and not pad:
            raise ValueError(f"{name} has {layer.in_features} input channels, no multiple of {STRIPE}: pass pad=True")
    four = stripes_in_4_bits({name: -(-layer.in_features // STRIPE) for name, layer in linears.items()}, ratio_4bit)

    def replace(name: str, layer: nn.Linear, hessian: torch.Tensor) -> F24Linear:
        width = -layer.in_features % STRIPE
        quantised = quantise_matrix(
            F.pad(layer.weight.detach(), (0, width)), F.pad(hessian, (0, width, 0, width)), four[name],
            score=score, rounding=rounding, g2=g2, outliers=outliers, damp=damp,
        )  # fmt: skip
        return F24Linear(quantised, layer.in_features, layer.bias)

    replace_linears(model, calibration, replace)
    return model
