"""Accuracy against cost with lines of equal cost-of-pass, the frontier by compute, essentialness and techniques."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from papers.cost_of_pass import method
from papers.cost_of_pass.analysis import MICRO, Found, frontiers, gain_intervals, release_rows, techniques
from papers.cost_of_pass.method import CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

MARKS = dict(zip(CLASSES, ("o", "s", "^"), strict=True))


def draw(cfg: DictConfig, report: Report, found: Found) -> None:
    """All figures."""
    _scatter(report, found)
    if found.releases["training_flops"].notna().all():
        _releases(report, found)
    _essentialness(report, found)
    _techniques(cfg, report, found)


def _scatter(report: Report, found: Found) -> None:
    """The odds of success against the cost of an attempt; v = C / R is constant along the grey lines."""
    import matplotlib.pyplot as plt

    from common.reporting.style import WIDTH

    columns = min(3, len(found.tasks))
    rows = -(-len(found.tasks) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 2.5 * rows + 0.5), sharey=True, squeeze=False)
    for ax, task in zip(axes.flat, found.tasks, strict=False):
        _task_scatter(ax, found, task)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy (log-odds)")
    for ax in axes.flat[len(found.tasks) :]:
        ax.axis("off")
    fig.supxlabel("cost of an attempt, millionths of a US dollar (price by parameters)", fontsize=9)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    report.figure(
        "scatter", fig, "Accuracy, cost, and lines of equal cost-of-pass",
        "Each grey line is ten times dearer than the one to its left. Above and left of the dashed line a model beats "
        "the human. The ring marks the smallest cost-of-pass of one model with the human, an average over problems. "
        "Accuracies of 0 and 1 are drawn half a run inside.",
    )  # fmt: skip


def _task_scatter(ax: Axes, found: Found, task: str) -> None:
    from common.reporting.style import COLOURS

    data, human = found.frontier(task), MICRO * found.human(task)
    runs = data.correct.shape[1] * data.correct.shape[2]
    cost = MICRO * data.usd.mean((1, 2))
    odds = _log_odds(np.clip(data.correct.mean((1, 2)), 0.5 / runs, 1 - 0.5 / runs))
    low, high = cost.min() / 4, max(cost.max() * 4, human)
    grid = np.geomspace(low, high, 200)
    for v in 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 4):
        _iso(ax, grid, v, color="0.85", lw=0.8, zorder=0)
    _iso(ax, grid, human, color="0.35", lw=1, ls="--", zorder=1, label="cost of the human")
    for name, models in found.classes(task).items():
        at = [data.index(model) for model in models]
        ax.plot(cost[at], odds[at], MARKS[name], color=COLOURS[CLASSES.index(name)], label=name)
    best = int(method.single(data, found.human(task)).mean(1).argmin())
    ax.plot(cost[best], odds[best], "o", ms=13, mfc="none", mec="black", mew=1)
    ticks = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
    ax.set_yticks(_log_odds(np.array(ticks)), [f"{tick:g}" for tick in ticks])
    ax.set(xscale="log", xlim=(low, high), ylim=(-8, 8), title=f"{task} ({found.task(task)['class']})")
    ax.grid(False)


def _iso(ax: Axes, cost: np.ndarray, v: float, **line: Any) -> None:
    """R = C / v, as far as R < 1."""
    r = cost[cost < 0.9999 * v] / v
    ax.plot(cost[: len(r)], _log_odds(r), **line)


def _log_odds(r: np.ndarray) -> np.ndarray:
    return np.log(r / (1 - r))


def _releases(report: Report, found: Found) -> None:
    """V of each task as releases appear, as a share of the human's cost."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from common.reporting.style import COLOURS

    kinds = dict(zip(found.releases["name"], found.releases["class"], strict=True))
    rows = pd.DataFrame(release_rows(found))
    fig, ax = plt.subplots(figsize=(7.0, 3.6))
    start = rows.loc[rows["training_flops"] > 0, "training_flops"].min() / 2
    for (task, of), colour in zip(rows.groupby("task", sort=False), COLOURS, strict=False):
        flops = of["training_flops"].clip(lower=start)
        ax.step(flops, of["share_of_human"], where="post", color=colour, label=task)
        for name, mark in MARKS.items():
            mine = (of["release"].map(kinds) == name) & (of["gain"] > 0.005)
            ax.plot(flops[mine], of["share_of_human"][mine], mark, color=colour, ms=5)
    ax.set(xscale="log", yscale="log", xlabel="training compute of a release, FLOP",
           ylabel="frontier cost-of-pass,\nshare of the human's")  # fmt: skip
    ax.legend(fontsize=8, loc="lower left")
    report.figure(
        "releases", fig, "The frontier falls as models appear",
        "Price by parameters. Marks: releases that lower the frontier by more than 0.5 percent (circle lightweight, "
        "square large, triangle reasoning). The left end is the human alone.",
    )  # fmt: skip


def _essentialness(report: Report, found: Found) -> None:
    """The heat map: what the frontier of each task loses without each class."""
    import matplotlib.pyplot as plt

    shares = np.array([1 - of[0] / of[1:] for task in found.tasks for of in [frontiers(found, task).mean(0)]]).T
    fig, ax = plt.subplots(figsize=(1.2 * len(found.tasks) + 1.6, 2.5))
    image = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        ax.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    ax.set_xticks(range(len(found.tasks)), [f"{t}\n({found.task(t)['class']})" for t in found.tasks])
    ax.set_yticks(range(len(CLASSES)), [f"without {name}" for name in CLASSES])
    ax.grid(False)
    fig.colorbar(image, label="percent of the cost")
    report.figure(
        "essential", fig, "Who would be missed",
        "(V without a class - V) / V without it, in percent. Price by parameters.",
    )  # fmt: skip


def _techniques(cfg: DictConfig, report: Report, found: Found) -> None:
    """Gains by the paper's estimator and by the split sample."""
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS

    rows = [
        (name, task, *of)
        for name in techniques(cfg) for task in found.tasks if (of := gain_intervals(found, task, name)) is not None
    ]  # fmt: skip
    names = list(dict.fromkeys(name for name, *_ in rows))
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharex=True, sharey=True)
    for ax, which, title in ((axes[0], 2, "as the paper: one sample"), (axes[1], 3, "split sample")):
        for task, colour in zip(found.tasks, COLOURS, strict=False):
            mine = [row for row in rows if row[1] == task]
            y = np.array([names.index(row[0]) for row in mine]) + 0.14 * (found.tasks.index(task) - 2)
            x = 100 * np.array([row[which].value for row in mine])
            ends = 100 * np.array([[row[which].low, row[which].high] for row in mine]).T
            ax.errorbar(
                x, y, xerr=np.abs(ends - x), fmt="o", ms=4, lw=1, color=colour, label=task, capsize=0
            )  # fmt: skip
        ax.axvline(0, color="0.4", lw=0.8)
        ax.set(xlabel="gain over the frontier, percent", title=title)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    report.figure(
        "techniques", fig, "Techniques seldom pay",
        "Gain of adding a technique to its base models, with 95% intervals over problems. Left the paper's estimator, "
        "which can only gain; right, winners chosen on half of the runs and paid by the other half.",
    )  # fmt: skip
