"""Times of the kernels' variants on a GPU, for the claims on dequantisation; every ratio within one round."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.metrics.timing import Timings, compare
from kernels.bench import repeated
from kernels.bench_cases import copies_of, normal
from kernels.w24 import STRIPE, random_f24
from kernels.w24_gemv import VARIANTS, w24_gemv

if TYPE_CHECKING:
    from omegaconf import DictConfig


def speed(cfg: DictConfig) -> list[dict[str, Any]]:
    """A row for each claimed quantity and shape, batch 1.

    Copies of a matrix take turns so that none is found in the GPU's cache, all calls of a round in one CUDA graph.
    """
    rows, on_gpu = [], cfg.device.startswith("cuda")
    for out, into in cfg.speed.shapes:
        four = round(cfg.headline * into / STRIPE)
        weight = random_f24(out, into // STRIPE - four, four).to(cfg.device)
        x = normal(0, 1, into, device=cfg.device, dtype=torch.float16 if on_gpu else torch.float32)
        size = sum(plane.nbytes for plane in weight.planes().values())
        copies = copies_of(lambda _, weight=weight: weight.clone(), size, cfg.speed.cold)
        calls = {v: repeated(partial(_call, x, copies, v), len(copies), len(copies), on_gpu) for v in VARIANTS}
        rows += quantities(compare(calls, cfg.speed.rounds), f"OC={out} IC={into}")
    return rows


def _call(x: torch.Tensor, copies: list[Any], variant: str, i: int) -> torch.Tensor:
    return w24_gemv(x, copies[i], variant)


def quantities(timings: Timings, shape: str) -> list[dict[str, Any]]:
    """What claims c3 and c4 name, with the range of order statistics that covers each median."""
    without, ahead, stored = timings.ratio("VX", "V1"), timings.ratio("V1", "V3"), timings.ratio("V0", "V3")
    found = {
        "share of the synchronous kernel's time": (1 - without.value, 1 - without.high, 1 - without.low),
        "scales ahead against synchronous": (ahead.value, ahead.low, ahead.high),
        "scales ahead against dequantise, then multiply": (stored.value, stored.low, stored.high),
    }
    us = 1e6 * timings.median("V3")
    return [
        {"shape": shape, "quantity": name, "value": value, "low": low, "high": high, "n": without.n, "us": us}
        for name, (value, low, high) in found.items()
    ]
