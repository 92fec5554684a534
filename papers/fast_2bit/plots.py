"""The figures: the packed words, ways to spend bits, where 4 bits help and where they cannot, ranges of stripes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from common.reporting.style import COLOURS
from kernels.w24 import SCALE_BITS
from papers.fast_2bit.analysis import LABELS, RULES, Found, recovered
from papers.fast_2bit.arms import name_of
from papers.fast_2bit.measure import VARIANTS
from papers.fast_2bit.method import bits_per_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

RULE_COLOURS = dict(zip(RULES, (COLOURS[1], COLOURS[6], COLOURS[0]), strict=True))
POINTS = {
    "gptq2": ("GPTQ 2 bits", "s"),
    "rtn2": ("RTN 2 bits", "v"),
    "gptq3": ("GPTQ 3 bits", "D"),
    "gptq4": ("GPTQ 4 bits", "P"),
}


def figures(cfg: DictConfig, report: Report, found: Found) -> None:
    _layout(cfg, report)
    _rules(cfg, report, found)
    _recovered(cfg, report, found)
    _ranges(report, found)


def _layout(cfg: DictConfig, report: Report) -> None:
    """One vector load and one metadata word, bit by bit; bits a weight by what they are for."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.3), width_ratios=(3, 2))
    for word in range(4):
        for code in range(16):
            _box(left, 2 * code, 3.6 - word, 2, COLOURS[4] if code % 2 else COLOURS[0], "")
        left.text(-0.6, 3.6 - word + 0.35, f"stripe {word}", ha="right", va="center", fontsize=8)
    left.text(32.6, 2.45, "one 128-bit load:\n64 codes of\n2 bits", va="center", fontsize=8)
    start = 0
    for width, text, colour in (
        *((2, "z", COLOURS[2]) for _ in SCALE_BITS), *((bits, f"s{bits}", COLOURS[5]) for bits in SCALE_BITS),
    ):  # fmt: skip
        _box(left, start, -0.9, width, colour, text)
        start += width
    left.text(-0.6, -0.55, "metadata", ha="right", va="center", fontsize=8)
    left.text(
        16.6,
        -0.55,
        "one 16-bit word for three stripes: zeros of 2 bits,\nscale codes of 3, 3 and 4",
        va="center",
        fontsize=8,
    )
    left.set(xlim=(-6.5, 45), ylim=(-1.4, 4.8), title="2-bit stripes of one row, lowest bits left")
    left.axis("off")
    r = cfg.headline
    parts = {  # bits a weight, at sizes that divide evenly
        "codes": [16, 2, 2 * (1 - r) + 4 * r, 4],
        "scales and zeros": [0, 16 / 16 + 2 / 16, bits_per_weight(r) - (2 * (1 - r) + 4 * r), 16 / 16 + 4 / 16],
    }
    names = ["fp16", "2 bits, g=16,\nfp16 scales", f"F24,\nr = {r:g}", "4 bits, g=16,\nfp16 scales"]
    bottom = np.zeros(4)
    for (name, values), colour in zip(parts.items(), (COLOURS[0], COLOURS[5]), strict=True):
        right.bar(names, values, bottom=bottom, color=colour, label=name, width=0.65)
        bottom += np.array(values)
    for place, total in enumerate(bottom):
        right.text(place, total + 0.25, f"{total:.2f}\n{16 / total:.1f}x", ha="center", fontsize=8)
    right.set(ylabel="bits a weight", ylim=(0, 19.5))
    right.tick_params(axis="x", labelsize=8)
    right.legend(fontsize=8)
    report.figure(
        "layout", fig, "What a load brings, and what a weight costs",
        "Right: stored bits, and how many times fewer than in fp16: the bound of the speed-up from reading less.",
    )  # fmt: skip


def _box(axis: Axes, x: float, y: float, width: float, colour: str, text: str) -> None:
    import matplotlib.pyplot as plt

    axis.add_patch(plt.Rectangle((x, y), width, 0.7, facecolor=colour, edgecolor="white", linewidth=0.6))
    axis.text(x + width / 2, y + 0.35, text, ha="center", va="center", fontsize=7)


def _rules(cfg: DictConfig, report: Report, found: Found) -> None:
    """NLL and accuracy against measured bits on the model as trained."""
    import matplotlib.pyplot as plt

    trained = found.summary.loc[VARIANTS[0]]
    fig, axes = plt.subplots(1, 2, figsize=(10.0, 3.7))
    for axis, column in zip(axes, ("nll", "accuracy"), strict=True):
        for rule in cfg.rules:
            curve = trained.loc[["two", *(name_of(rule, ratio) for ratio in cfg.ratios), "four"]].sort_values("bits")
            axis.plot(curve["bits"], curve[column], "o-", ms=3.5, color=RULE_COLOURS[rule], label=RULES[rule])
        for prefix, (name, marker) in POINTS.items():
            points = trained[trained.index.str.startswith(f"{prefix}_")]
            axis.plot(points["bits"], points[column], marker, ms=5, color=COLOURS[2], label=name, mfc="none")
        spqr = trained.loc["spqr"]
        axis.plot(spqr["bits"], spqr[column], "*", ms=8, color=COLOURS[3], label=LABELS["spqr"])
        axis.axhline(trained.loc["full", column], color="grey", ls="--", lw=1, label="full precision")
        axis.set(xlabel="measured bits a weight")
    axes[0].set(ylabel="NLL of held-out text, nats a token")
    axes[1].set(ylabel="accuracy on held-out chains", ylim=(0, 1.03))
    axes[1].legend(fontsize=7.5)
    report.figure(
        "rules", fig, "Where the bits go",
        "Lines: F24 from all stripes in 2 bits to all in 4. Marks: groups with fp16 scales; 2 bits in groups of 16, "
        "32 and 64 channels, 3 and 4 bits in groups of 64.",
    )  # fmt: skip


def _recovered(cfg: DictConfig, report: Report, found: Found) -> None:
    """Share of the NLL lost by 2 bits that each rule wins back, on the three models."""
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(7.4, 3.4))
    for shift, rule in enumerate(cfg.rules):
        arm = name_of(rule, cfg.headline)
        shares = [
            recovered(*(found.nll(variant, name) for name in ("full", "two", arm)), seed=cfg.seed)
            for variant in VARIANTS
        ]
        places = np.arange(len(VARIANTS)) + 0.26 * (shift - 1)
        low = [max(s.value - s.low, 0) for s in shares]
        high = [max(s.high - s.value, 0) for s in shares]
        axis.bar(
            places, [s.value for s in shares], yerr=[low, high], width=0.24, color=RULE_COLOURS[rule],
            label=RULES[rule], error_kw={"lw": 1, "ecolor": "grey"},
        )  # fmt: skip
    axis.axhline(0, color="grey", lw=0.8)
    axis.set_xticks(range(len(VARIANTS)), VARIANTS)
    axis.set(ylabel="share of the 2-bit loss won back", xlabel="model (all three compute the same function)")
    axis.legend(fontsize=8)
    report.figure(
        "recovered", fig, f"What {cfg.headline:.1%} of the stripes in 4 bits win back",
        f"NLL of held-out text; bars: 95% over windows. Wide stripes: some channels' weights {cfg.widened.factor:g} "
        "times as large, all in one stripe of a layer. Wide channels everywhere: as many, one in each stripe.",
    )  # fmt: skip


def _ranges(report: Report, found: Found) -> None:
    """Histogram of stripe widths, those with 4 bits marked."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(VARIANTS), figsize=(10.0, 3.0), sharey=True)
    edges = np.geomspace(min(found.ranges["width"].min(), 0.5), max(found.ranges["width"].max(), 2) * 1.01, 24)
    for axis, variant in zip(axes, VARIANTS, strict=True):
        of = found.ranges[found.ranges["variant"] == variant]
        parts = [of.loc[~of["four"], "width"], of.loc[of["four"], "width"]]
        axis.hist(parts, edges, stacked=True, color=[COLOURS[4], COLOURS[1]], label=["2 bits", "4 bits"])
        axis.set(xscale="log", xlabel="width / median of its matrix", title=variant)
        axis.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
    axes[0].set(ylabel="stripes")
    axes[0].legend(fontsize=8)
    report.figure(
        "ranges", fig, "How wide stripes are, and which get 4 bits",
        "Width: root mean square over rows of a stripe's maximum less its minimum. Chosen by Hessian and range.",
    )  # fmt: skip
