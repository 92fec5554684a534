"""What is compared: a model in full, group-wise baselines, and F24 under rules that say where the 4 bits go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.quantisation.calibrate import hessians, linears_of, replace_linears
from common.quantisation.gptq import gptq, output_error, round_to_nearest
from common.quantisation.grids import minmax
from common.quantisation.packed import GroupLinear, groups_of
from kernels.w24 import STRIPE, f24_bytes
from papers.fast_2bit.method import Score, quantize_, stripes_in_4_bits

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

Batches = Sequence[torch.Tensor]


def arms(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Name -> settings of every arm on the model as trained: the configured ones, and each rule at each ratio."""
    found: dict[str, dict[str, Any]] = {str(name): dict(arm) for name, arm in cfg.arms.items()}
    for rule in cfg.rules:
        found |= {name_of(rule, ratio): {"kind": rule, "ratio_4bit": ratio} for ratio in cfg.ratios}
    return found


def name_of(rule: str, ratio: float) -> str:
    return f"{rule} {ratio:g}"


def quantised(
    cfg: DictConfig, model: PreTrainedModel, arm: Mapping[str, Any], calibration: Batches, seed: int
) -> PreTrainedModel:
    """The model under an arm's settings, changed in place. Raises ValueError for an unknown kind."""
    settings = dict(arm)
    kind = settings.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of arm {kind!r}; there are: {', '.join(KINDS)}")
    if kind not in ("full", "groups"):
        settings = {"ratio_4bit": cfg.headline, "pad": True} | settings
    KINDS[kind](model, calibration, seed, **settings)
    return model


def full(model: PreTrainedModel, calibration: Batches, seed: int) -> None:
    """As it is."""


def groups(model: PreTrainedModel, calibration: Batches, seed: int, *, bits: int, group: int, rounding: str) -> None:
    """Every matrix in one precision, groups of `group` channels with float16 scales."""

    def replace(name: str, layer: torch.nn.Linear, hessian: torch.Tensor) -> GroupLinear:
        weight = layer.weight.detach()
        fits = [(width, minmax(bits)) for width in groups_of(layer.in_features, group)]
        rounded = gptq(weight, hessian, fits) if rounding == "gptq" else round_to_nearest(weight, fits)
        return GroupLinear(rounded, group, layer.bias)

    replace_linears(model, calibration, replace)


def stripes(model: PreTrainedModel, calibration: Batches, seed: int, **settings: Any) -> None:
    """The method, with the settings of `quantize_`."""
    quantize_(model, calibration, **settings)


def random_stripes(model: PreTrainedModel, calibration: Batches, seed: int, **settings: Any) -> None:
    """The method, but any stripes get the 4 bits."""
    quantize_(model, calibration, score=random_score(seed), **settings)


def random_score(seed: int) -> Score:
    """Scores from a generator that goes on from matrix to matrix."""
    draw = torch.Generator().manual_seed(seed)
    return lambda weight, hessian: torch.rand(weight.shape[1] // STRIPE, generator=draw).to(weight.device)


def matrices(model: PreTrainedModel, calibration: Batches, seed: int, *, ratio_4bit: float, **settings: Any) -> None:
    """Whole matrices in 4 bits (as LLM-MQ and APTQ mix), the most sensitive first: those whose predicted output error
    falls most for each weight, until the model has at least the bits that stripes would take at this ratio."""
    chosen = whole_matrices(model, calibration, ratio_4bit)
    quantize_(model, calibration, {name: float(name in chosen) for name in linears_of(model)}, **settings)


def whole_matrices(model: PreTrainedModel, calibration: Batches, ratio_4bit: float) -> set[str]:
    """Names of the matrices that get 4 bits."""
    linears, found = linears_of(model), hessians(model, calibration)
    counts = {name: -(-layer.in_features // STRIPE) for name, layer in linears.items()}
    gains = {}
    for name, layer in linears.items():
        weight = layer.weight.detach().float()
        two, four = (
            output_error(weight, round_to_nearest(weight, widths(weight, bits)).weight, found[name]) for bits in (2, 4)
        )
        gains[name] = float(two - four) / weight.numel()

    def size(four: Mapping[str, int]) -> int:
        return sum(f24_bytes(linears[name].out_features, n - four[name], four[name]) for name, n in counts.items())

    budget = size(stripes_in_4_bits(counts, ratio_4bit))
    chosen = dict.fromkeys(counts, 0)
    for name in sorted(gains, key=lambda name: -gains[name]):
        if size(chosen) >= budget:
            break
        chosen[name] = counts[name]
    return {name for name, four in chosen.items() if four}


def widths(weight: torch.Tensor, bits: int) -> list[tuple[int, Any]]:
    return [(width, minmax(bits)) for width in groups_of(weight.shape[1], STRIPE)]


KINDS: dict[str, Callable[..., None]] = {
    "full": full,
    "groups": groups,
    "stripes": stripes,
    "hessian_range": partial(stripes, score="hessian_range"),
    "random": random_stripes,
    "matrices": matrices,
}
