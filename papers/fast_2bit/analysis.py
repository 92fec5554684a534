"""From measurements to tables and verdicts. No arm was trained for a comparison: the units are windows and problems."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs.catalogue import Transformer, from_checkpoint
from common.costs.per_answer import report_costs
from common.generation import records
from common.metrics.intervals import Measured, exact, paired_bootstrap
from kernels.roofline import MODELS, weights_table
from kernels.w24 import STRIPE, f24_bytes, random_f24
from papers.fast_2bit.arms import name_of
from papers.fast_2bit.measure import VARIANTS, runs
from papers.fast_2bit.method import F24Linear, Quantised, bits_per_weight, stripes_in_4_bits

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

LABELS = {
    "full": "full precision", "rtn2_g16": "RTN 2 bits, g=16", "rtn2_g32": "RTN 2 bits, g=32",
    "rtn2_g64": "RTN 2 bits, g=64", "gptq2_g16": "GPTQ 2 bits, g=16", "gptq2_g32": "GPTQ 2 bits, g=32",
    "gptq2_g64": "GPTQ 2 bits, g=64", "gptq3_g64": "GPTQ 3 bits, g=64", "gptq4_g64": "GPTQ 4 bits, g=64",
    "two": "GPTQ 2 bits, two orders", "four": "GPTQ 4 bits, F24", "range": "stripes by range",
    "error": "stripes by predicted error", "rtn_two": "RTN 2 bits, two orders",
    "rtn": "RTN, stripes by Hessian and range", "g2_8": "g2 = 8", "g2_64": "g2 = 64",
    "outliers_05": "0.5% outliers beside", "outliers_15": "1.5% outliers beside",
    "spqr": "2 bits and 1.5% outliers",
}  # fmt: skip
RULES = {"hessian_range": "stripes by Hessian and range", "random": "random stripes", "matrices": "whole matrices"}
LAYERS = {"Llama-2-7B": 32, "Llama-2-13B": 40, "Llama-2-70B": 80}  # decoder blocks (the checkpoints' config.json)
VOCABULARY = 32000
SPARE = 0.9  # of a GPU's memory for weights; the rest for the KV cache and activations
MEASURED = ("bits", "nll", "kl", "accuracy", "draws")


@dataclass
class Found:
    """What `infer` wrote. summary: a row for each variant and arm, means over draws. missed: gates that the full model
    misses, `accuracy` and `nats`, with the reason."""

    windows: pd.DataFrame
    answers: pd.DataFrame
    summary: pd.DataFrame
    ranges: pd.DataFrame
    scales: pd.DataFrame
    speed: pd.DataFrame | None
    missed: dict[str, str]

    def nll(self, variant: str, arm: str) -> np.ndarray:
        """NLL of every window [n], mean over draws."""
        return _units(self.windows, variant, arm, "window", "nll")

    def correct(self, variant: str, arm: str) -> np.ndarray:
        """Share of draws in which each problem was answered right [n]."""
        return _units(self.answers, variant, arm, "problem_id", "correct")


def _units(frame: pd.DataFrame, variant: str, arm: str, unit: str, value: str) -> np.ndarray:
    of = frame[(frame["variant"] == variant) & (frame["arm"] == arm)]
    if of.empty:
        raise KeyError(f"no run of {arm!r} on {variant!r}")
    return of.groupby(unit)[value].mean().to_numpy(dtype=float)


def load(cfg: DictConfig) -> Found:
    folder = Path(cfg.artifacts) / "infer"
    arms, windows, ranges, scales = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("arms", "windows", "ranges", "scales")
    )
    answers = records.read(folder / "records.parquet")
    answers[["variant", "arm"]] = answers["arm"].str.split(", ", n=1, expand=True)
    answers = answers.rename(columns={"sample_id": "draw"})
    keys = ["variant", "arm"]
    summary = arms.groupby(keys, sort=False).agg(
        bits=("bits", "mean"), draws=("draw", "nunique"), error=("error", "mean"),
        error_two=("error_two", "mean"), error_four=("error_four", "mean"),
    )  # fmt: skip
    summary = summary.join(windows.groupby(keys)[["nll", "kl"]].mean())
    summary = summary.join(answers.groupby(keys)["correct"].mean().rename("accuracy"))
    summary = summary.loc[list(dict.fromkeys((run.variant, run.arm) for run in runs(cfg)))]
    full = summary.loc[(VARIANTS[0], "full")]
    missed, gate, uniform = {}, cfg.gate, math.log(json.loads((folder / "facts.json").read_text())["vocabulary"])
    if full["accuracy"] < gate.accuracy:
        missed["accuracy"] = f"gate: measured accuracy {full['accuracy']:.3f}, needed {gate.accuracy} or more"
    better = uniform - full["nll"]
    if better < gate.nats:
        missed["nats"] = f"gate: {better:.2f} nats a token better than a uniform guess, needed {gate.nats} or more"
    speed = folder / "speed.parquet"
    return Found(windows, answers, summary, ranges, scales, pd.read_parquet(speed) if speed.exists() else None, missed)


def label(arm: str) -> str:
    """An arm's name in a table."""
    rule, _, ratio = arm.partition(" ")
    return f"{RULES[rule]}, r = {ratio}" if ratio else LABELS.get(arm, arm)


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """Methods, ratios, ablations, two orders, models, weight errors, stripe ranges, traffic and cost."""
    at = {rule: name_of(rule, cfg.headline) for rule in cfg.rules}
    trained = found.summary.loc[VARIANTS[0]]
    full, two = trained.loc["full"], trained.loc["two"]

    def rows(names: list[str]) -> pd.DataFrame:
        shown = trained.loc[[name for name in names if name in trained.index], list(MEASURED)].copy()
        shown.insert(2, "nll_gained", shown["nll"] - full["nll"])
        return shown.rename(index=label).reset_index(names="method")

    groups = [name for name in cfg.arms if cfg.arms[name].kind == "groups"]
    report.table(
        "methods", rows(["full", *groups, "spqr", "two", *at.values(), "four"]), "Methods at their measured bits",
        note="Bits are counted from the stored tensors of the decoder's matrices. NLL and KL: nats a token of held-out "
        "text; accuracy: of held-out chains. Means over draws of calibration texts.",
    )  # fmt: skip
    ratios = [(RULES[rule], ratio, name_of(rule, ratio)) for rule in cfg.rules for ratio in cfg.ratios]
    ratios += [("all", 0.0, "two"), ("all", 1.0, "four")]
    by_ratio = [
        {"rule": rule, "ratio": ratio, **trained.loc[arm, ["bits", "nll", "kl", "accuracy"]]}
        for rule, ratio, arm in ratios
    ]
    report.table(
        "ratio", pd.DataFrame(by_ratio), "Share of stripes in 4 bits", "r = 0 and r = 1 leave nothing to choose."
    )
    chosen = at["hessian_range"]
    report.table(
        "ablations",
        rows(
            [chosen, "rtn", "range", "error", "g2_8", "g2_64", "outliers_05", "outliers_15", "two", "rtn_two", "spqr"]
        ),
        "One change at a time",
        note=f"Against {label(chosen)}: GPTQ, g2 = 16, no outliers.",
    )
    report.table("scales", found.scales, "Relative weight error of 2-bit rounding (RTN, g1 = g2 = 16)")
    report.table(
        "models", _recovered(cfg, found), "What 4 bits win back on three models of one function",
        note="recovered: share of the NLL that 2 bits lose. Intervals: over windows, selections as they were drawn.",
    )  # fmt: skip
    errors = found.summary[["bits", "error", "error_two", "error_four"]].dropna(subset="error")
    report.table(
        "weights", errors.rename(index=label, level=1).reset_index(),
        "Relative weight error, of all weights, and of those in stripes of 2 and of 4 bits",
        note="Under GPTQ it holds what was moved on purpose, too: 4-bit stripes, the last in order, take what others "
        "spoil. RTN shows the grids alone.",
    )  # fmt: skip
    report.table("ranges", _ranges(found), "Width of stripes over the median of their matrix")
    report.table(
        "traffic", _traffic(cfg.headline), "What a product reads, and the bound of the speed-up that follows",
        note="Batch 1, 4.3 TB/s. decode_mops: AND and conversion, one each a weight, beside one fused multiply-add. "
        "measured: on a GPU, by `make bench-gpu`.",
    )  # fmt: skip
    report.table(
        "cost", _cost(cfg.headline), "GPUs that hold the weights, and bounds on cost",
        note=f"{SPARE:.0%} of the memory for weights; embeddings, head and norms in fp16. price: of a GPU in the "
        "relative units of splitwise-sim. runtime_bound: price times time, if time is that of reading the weights.",
    )  # fmt: skip
    report_costs(report, partial(_stored, cfg, found))
    if found.speed is not None:
        report.table(
            "speed", found.speed, "The kernel's variants on this GPU", timing=["value", "low", "high", "us"],
        )  # fmt: skip
    report.metric("chain accuracy, full precision", full["accuracy"])
    report.metric("chain accuracy, 2 bits", two["accuracy"])
    report.metric("chain accuracy, chosen stripes", trained.loc[chosen, "accuracy"])
    report.metric("bits, chosen stripes", trained.loc[chosen, "bits"])
    for variant, of in found.ranges.groupby("variant", sort=False):
        report.metric(f"widest over median stripe, {variant}", of["width"].max())


def _stored(cfg: DictConfig, found: Found, arm: str) -> Transformer:
    """The model with the weights that an arm stores: its bits in the decoder's matrices, but never more than the 16 of
    everything else."""
    model = from_checkpoint(Path(cfg.shared) / cfg.model, cfg.network)
    bits = min(float(found.summary.loc[tuple(arm.split(", ", 1)), "bits"]), 16.0)
    vocabulary = json.loads((Path(cfg.artifacts) / "infer" / "facts.json").read_text())["vocabulary"]
    matrices = model.flop_parameters - vocabulary * model.attention_width  # without the head
    size = matrices * bits / 8 + (model.parameters - matrices) * 2
    return replace(model, bytes_per_weight=size / model.parameters)


def recovered(full: np.ndarray, two: np.ndarray, arm: np.ndarray, seed: int) -> Measured:
    """Share of the loss of 2 bits that an arm wins back, with an interval over windows."""
    stacked = np.stack([full, two, arm], 1)

    def share(rows: np.ndarray, _: np.ndarray) -> float:
        a, b, c = rows.mean(0)
        return float((b - c) / (b - a))

    return paired_bootstrap(stacked, np.zeros(len(full)), share, seed=seed)


def _recovered(cfg: DictConfig, found: Found) -> pd.DataFrame:
    rows = []
    for variant in VARIANTS:
        full, two = (found.nll(variant, arm) for arm in ("full", "two"))
        of = found.summary.loc[variant]
        for arm in [name for name in of.index if name in ("two", "range", "error", "four") or " " in name]:
            if " " in arm and arm not in {name_of(rule, cfg.headline) for rule in cfg.rules}:
                continue
            share = recovered(full, two, found.nll(variant, arm), cfg.seed)
            rows.append(
                {
                    "model": variant, "arm": label(arm), **of.loc[arm, ["bits", "nll", "kl", "accuracy"]],
                    "draws": int(of.loc[arm, "draws"]),
                    "recovered": share.value, "recovered_low": share.low, "recovered_high": share.high,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _ranges(found: Found) -> pd.DataFrame:
    widths = found.ranges.groupby("variant", sort=False)["width"]
    frame = widths.quantile([0.5, 0.9, 1.0]).unstack().set_axis(["median", "90%", "widest"], axis=1)
    frame["stripes"] = widths.size()
    chosen = found.ranges[found.ranges["four"]].groupby("variant", sort=False)["width"]
    frame["in_4_bits"], frame["median_in_4_bits"] = chosen.size(), chosen.median()
    return frame.reindex(list(VARIANTS)).reset_index(names="model")


def _traffic(ratio: float) -> pd.DataFrame:
    frame = weights_table(ratio)
    weights = frame["rows"] * frame["channels"]
    frame.insert(5, "fp16_mb", 2 * weights / 1e6)
    frame.insert(6, "f24_mb", frame["bits_per_weight"] * weights / 8e6)
    frame.insert(7, "mflop", 2 * weights / 1e6)
    frame.insert(8, "decode_mops", 2 * weights / 1e6)
    return frame


def model_bytes(model: str, ratio: float) -> tuple[int, int, int]:
    """(weights of the decoder's matrices, their bytes in F24 with the order of stripes, bytes of all else in fp16)."""
    query_heads, heads, hidden, inner = MODELS[model]
    key_value = heads * hidden // query_heads
    shapes = {"q": (hidden, hidden), "k": (key_value, hidden), "v": (key_value, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    named = {f"{layer}.{name}": shape for layer in range(LAYERS[model]) for name, shape in shapes.items()}
    four = stripes_in_4_bits({name: into // STRIPE for name, (_, into) in named.items()}, ratio)
    packed = sum(
        f24_bytes(out, into // STRIPE - four[name], four[name]) + 2 * into // STRIPE
        for name, (out, into) in named.items()
    )
    norms = (2 * LAYERS[model] + 1) * hidden
    return sum(out * into for out, into in named.values()), packed, 2 * (2 * VOCABULARY * hidden + norms)


def _cost(ratio: float) -> pd.DataFrame:
    from common.serving.catalogue import GIB, hardware

    rows = []
    for model in MODELS:
        weights, packed, rest = model_bytes(model, ratio)
        sizes = (2 * weights + rest, packed + rest)
        for name in ("dgx-a100", "dgx-h100"):
            machine = hardware(name)
            counts = [math.ceil(size / (SPARE * machine.gpu.memory_gib * GIB)) for size in sizes]
            price = (machine.cost or math.nan) / machine.gpus
            rows.append(
                {
                    "model": model, "gpu": machine.gpu.name, "price": price, "fp16_gb": sizes[0] / 1e9,
                    "f24_gb": sizes[1] / 1e9, "fp16_gpus": counts[0], "f24_gpus": counts[1],
                    "hardware_ratio": counts[0] / counts[1], "runtime_bound": sizes[0] / sizes[1],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim, or says why it cannot be."""
    at = {rule: name_of(rule, cfg.headline) for rule in cfg.rules}

    def gap(of: Callable[[str, str], np.ndarray], variant: str, one: str, other: str) -> Measured:
        return paired_bootstrap(of(variant, one), of(variant, other), seed=cfg.seed)

    def gate(claim: str, *gates: str) -> bool:
        reasons = [found.missed[name] for name in gates if name in found.missed]
        if reasons:
            report.not_testable(claim, "; ".join(reasons))
        return not reasons

    if gate("c1", "accuracy", "nats"):
        report.measure("c1", "accuracy lost on chains", gap(found.correct, VARIANTS[0], "full", "two"))
        report.measure("c1", "NLL gained on text", gap(found.nll, VARIANTS[0], "two", "full"))
    if gate("c2", "nats"):
        for variant in VARIANTS[:2]:
            for rule in ("random", "matrices"):
                bits = [found.summary.loc[(variant, at[r]), "bits"] for r in (rule, "hessian_range")]
                report.measure(
                    "c2", f"{variant}: {RULES[rule]} minus chosen stripes",
                    gap(found.nll, variant, at[rule], at["hessian_range"]),
                    detail=f"at {bits[0]:.3f} and {bits[1]:.3f} measured bits; "
                    + by_draw(found.windows, "nll", variant, at[rule], at["hessian_range"]),
                )  # fmt: skip
    if gate("c8", "accuracy"):
        report.measure(
            "c8", "accuracy, chosen stripes minus whole matrices",
            gap(found.correct, VARIANTS[0], at["hessian_range"], at["matrices"]),
            detail=by_draw(found.answers, "correct", VARIANTS[0], at["hessian_range"], at["matrices"]),
        )  # fmt: skip
        report.measure("c8", "accuracy lost by whole matrices", gap(found.correct, VARIANTS[0], "full", at["matrices"]))
    _storage(cfg, report)
    _speed(cfg, report, found)


def by_draw(frame: pd.DataFrame, value: str, variant: str, one: str, other: str) -> str:
    """The difference of two arms in each draw of calibration texts: the interval takes the draws as they are."""
    means = frame[frame["variant"] == variant].groupby(["arm", "draw"])[value].mean()
    return "by draw: " + ", ".join(f"{gap:+.3f}" for gap in means.loc[one] - means.loc[other])


def _storage(cfg: DictConfig, report: Report) -> None:
    """Claim c5, from tensors: one packed matrix, and all of Llama-2-7B by the same count."""
    import torch

    two, four = 156, 28  # multiples of the 3 and 4 stripes that share a word
    weight = random_f24(4096, two, four)
    layer = F24Linear(Quantised(weight, torch.arange(two + four), None), weight.channels)
    stored = 8 * layer.weight_bytes() / (weight.rows * weight.channels)
    report.measure("c5", "stored minus closed form, one matrix", exact(stored - bits_per_weight(four / (two + four))))
    weights, packed, _ = model_bytes("Llama-2-7B", cfg.headline)
    whole = exact(8 * packed / weights, LAYERS["Llama-2-7B"] * 7)
    report.measure("c5", f"all block matrices of Llama-2-7B at r = {cfg.headline:g}", whole)


def _speed(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claims on time: measured on a GPU, else said what they would need."""
    if found.speed is None:
        report.not_testable("c3", "hardware: no GPU; tables/traffic.csv counts bytes and decoding operations")
        report.not_testable(
            "c4", "hardware: no GPU; that all variants give the same product is tested in Triton's interpreter"
        )
    else:
        of = found.speed.groupby("quantity").first()  # the first shape is the claims'; all are in tables/speed.csv
        for claim, part in (
            ("c3", "share of the synchronous kernel's time"),
            ("c4", "scales ahead against synchronous"),
            ("c4", "scales ahead against dequantise, then multiply"),
        ):
            row = of.loc[part]
            report.measure(claim, part, Measured(row["value"], row["low"], row["high"], int(row["n"])), row["shape"])
    weights, packed, rest = model_bytes("Llama-2-7B", cfg.headline)
    report.not_testable(
        "c6", "hardware: an end-to-end time needs the 7B model on a GPU; reading fewer bytes allows "
        f"{(2 * weights + rest) / (packed + rest):.2f}x at most",
    )  # fmt: skip
    report.not_testable("c7", "the authors' prices were not seen; tables/cost.csv has bounds for published ones")
    report.not_testable(
        "c9", "hardware: the time of a sparse product beside the kernel needs a GPU; tables/ablations.csv has what "
        "outliers do for bits and accuracy",
    )  # fmt: skip
