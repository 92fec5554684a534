"""Figures: quality and captured weight by measured budget, budgets by head, comparisons and times by length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from common.reporting.style import COLOURS
from papers.squeezed_attention.analysis import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report
    from papers.squeezed_attention.analysis import Found

# black is kept for the ideal, which is no method
SHOWN = dict(
    zip(
        ("squeezed", "hierarchical", "quest", "window attention", "sink and recent", "random", "ideal"),
        COLOURS,
        strict=True,
    )
)
TICKS = (0.05, 0.1, 0.2, 0.5, 1.0)


def figures(cfg: DictConfig, report: Report, found: Found) -> None:
    """All figures; those of recall and code are left out where recall missed its gate."""
    if "recall" not in found.missed:
        _quality(report, found)
        _heads(cfg, report, found)
        _weight(cfg, report, found)
    _counts(report, found)
    _times(cfg, report, found)


def _line(axis: Axes, found: Found, task: str, method: str, metric: str, colour: str) -> None:
    of = found.of(task, method).groupby("sparsity")[["budget", metric]].mean().sort_values("budget")
    style = "o--" if method == "ideal" else "o-"
    axis.plot(of["budget"], of[metric], style, ms=3, color=colour, label=LABELS[method])


def _budget_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    axis.set_xlabel("measured KV budget (share of the context)")


def _quality(report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10.0, 4.0))
    for axis, (task, metric, label) in zip(
        axes,
        (("recall", "accuracy", "recall accuracy"), ("text", "nll", "NLL of code (nats a token)")),
        strict=True,
    ):
        for method, colour in SHOWN.items():
            _line(axis, found, task, method, metric, colour)
        axis.axhline(found.mean(task, "all", metric), color="#999999", lw=1.0, zorder=0)
        axis.text(
            0.99, found.mean(task, "all", metric), "all KV", color="#666666", fontsize=8, ha="right", va="bottom",
            transform=axis.get_yaxis_transform(),
        )  # fmt: skip
        _budget_axis(axis)
        axis.set_ylabel(label)
    axes[0].legend(fontsize=8)
    report.figure(
        "budget", fig, "Quality against the measured KV budget",
        "Points: sparsities of the sweep, means over contexts. The ideal knows the exact weights and pays nothing.",
    )  # fmt: skip


def _heads(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    sparsity = cfg.ablation.sparsity
    fig, axes = plt.subplots(2, 2, figsize=(7.0, 4.6))
    of = found.heads[found.heads["sparsity"] == sparsity]
    for row, task in enumerate(("recall", "text")):
        for column, method in enumerate(("squeezed", "per head")):
            axis = axes[row, column]
            part = of[(of["task"] == task) & (of["method"] == method)].assign(
                weighted=lambda frame: frame["kept"] * frame["contexts"]
            )
            sums = part.groupby(["layer", "head"])[["weighted", "contexts"]].sum()
            grid = (sums["weighted"] / sums["contexts"]).unstack("head").to_numpy()
            image = axis.imshow(grid, cmap="cividis", vmin=0, vmax=0.4, aspect="auto")
            for (i, j), value in np.ndenumerate(grid):
                axis.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.22 else "k"
                )
            axis.set_xticks(range(grid.shape[1]))
            axis.set_yticks(range(grid.shape[0]))
            axis.grid(False)
            name = "global threshold" if method == "squeezed" else "threshold per head"
            axis.set_title(f"{'recall' if task == 'recall' else 'code'}, {name}", fontsize=9)
            axis.set(xlabel="head of keys" if row else "", ylabel="" if column else "layer")
    fig.colorbar(image, ax=axes, label="kept share of the context", shrink=0.8)
    report.figure(
        "heads", fig, f"Where the kept keys are, at sparsity {sparsity}",
        "Means over look-ups and contexts; the window is part of it.",
    )  # fmt: skip


def _weight(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(11.0, 3.6))
    names = {"recall": "recall", "text": "code", "planted": "planted keys"}
    colours = {"squeezed": COLOURS[0], "contiguous": COLOURS[1], "ideal": COLOURS[6]}
    for axis, task in zip(axes[:2], ("recall", "text"), strict=True):
        for method, colour in colours.items():
            _line(axis, found, task, method, "mass", colour)
        _budget_axis(axis)
        axis.set_ylabel("captured softmax weight")
        axis.set_title(names[task], fontsize=10)
    axes[0].legend(fontsize=8)
    arms = found.arms[found.arms["sparsity"] == cfg.ablation.sparsity]
    arms = arms[(arms["cluster_seed"] == 0) & arms["sweep"].isin(["methods", "clusters"])]
    for task, colour in (("recall", COLOURS[0]), ("text", COLOURS[2])):
        for method, style in (("squeezed", "o-"), ("hierarchical", "s:")):
            of = arms[(arms["task"] == task) & (arms["method"] == method)].groupby("share")["mass"].mean()
            levels = "one level" if method == "squeezed" else "two levels"
            axes[2].plot(100 * of.index, of, style, ms=4, color=colour, label=f"{names[task]}, {levels}")
    axes[2].set_xscale("log")
    ticks = [100 * share for share in sorted({cfg.clusters, *cfg.ablation.shares})]
    axes[2].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[2].minorticks_off()
    axes[2].set(xlabel="centroids (% of the keys)", ylabel="captured softmax weight")
    axes[2].set_title(f"sparsity {cfg.ablation.sparsity}", fontsize=10)
    axes[2].legend(fontsize=8)
    report.figure(
        "weight", fig, "How much of the attention the kept keys have",
        "Left and middle: K-means beside blocks of neighbours of the same number. Right: number of centroids, at the "
        "sparsity of 90%; what is kept differs little, what is compared grows with the number.",
    )  # fmt: skip


def _counts(report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(6.0, 3.8))
    means = found.counts.groupby("keys").mean()
    for column, label, colour in (
        ("one_level", "one level, 5%", COLOURS[0]), ("two_levels", "two levels, 1% and 5%", COLOURS[4]),
        ("tree", "tree of fixed branching", COLOURS[1]),
    ):  # fmt: skip
        axis.plot(means.index, means[column], "o-", ms=4, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(list(means.index), [str(n) for n in means.index])
    axis.set_yticks([8, 16, 32, 64, 128, 256, 512], ["8", "16", "32", "64", "128", "256", "512"])
    axis.set(xlabel="keys in the context", ylabel="centroids compared a query")
    axis.legend()
    report.figure(
        "comparisons", fig, "What a look-up costs",
        "Planted keys, means over trials and queries. Two levels save a constant factor and stay linear.",
    )  # fmt: skip


def _times(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(6.0, 3.8))
    times = found.times.sort_values("keys")
    for column, label, colour in (("full_ms", "full attention", COLOURS[6]), ("squeezed_ms", "squeezed", COLOURS[0])):
        axis.plot(times["keys"], times[column], "o-", ms=4, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(times["keys"]), [str(n) for n in times["keys"]])
    axis.set(xlabel="keys in the context", ylabel="one layer's decode step (ms)")
    axis.legend()
    report.figure(
        "times", fig, "Time of a decode step against the length of the context",
        f"{cfg.timing.heads} heads of {cfg.timing.head_dim} on {'a GPU' if cfg.device == 'cuda' else 'the CPU'}, "
        f"sparsity {cfg.ablation.sparsity}. Look-up, compaction, attention and merging together.",
    )  # fmt: skip
