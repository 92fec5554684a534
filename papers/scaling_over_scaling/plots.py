"""The figures: accuracy against N with the laws, predicted against observed saturation, accuracy against tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from papers.scaling_over_scaling import analysis, method, tables
from papers.scaling_over_scaling.analysis import BEST, FIRST, HIT, LAST, MAJORITY, Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

SHOWN = {HIT: "any of N right (hit@N)", MAJORITY: "majority", BEST: "best-of-N", FIRST: "rethinking, any right so far",
         LAST: "rethinking, last answer"}  # fmt: skip
MARKS = dict(zip(SHOWN, "osD^v", strict=True))


def draw(cfg: DictConfig, report: Report, found: Found) -> None:
    """All figures."""
    _accuracy(cfg, report, found)
    _saturation(cfg, report, found)
    _pareto(cfg, report, found)


def _colours() -> dict[str, str]:
    from common.reporting.style import palette

    return palette(list(SHOWN))


def _ticks(axis: Axes, numbers: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()


def _accuracy(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    epsilon = cfg.epsilons[-1]
    fig, axes = plt.subplots(2, len(cfg.tasks), figsize=(9.2, 5.6), sharey="col", squeeze=False)
    for (above, below), task in zip(axes.T, cfg.tasks, strict=True):
        _samples(above, cfg, found, task, epsilon)
        if found.rethinks(task):
            _chains(below, cfg, found, task, epsilon)
        else:
            below.axis("off")
        above.set_title(task.replace("_", " "), fontsize=9)
        above.set(xlabel="N samples", ylim=(0, 1.02))
        below.set(xlabel="N answers, one after another", ylim=(0, 1.02))
    for row in axes:
        row[0].set_ylabel("accuracy")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)
    report.figure(
        "accuracy", fig, "Accuracy against N, with the laws",
        f"Marks: evaluation half. Lines: laws fitted to N <= {cfg.fit_up_to} (shaded) of the pilot. Vertical: N* "
        f"as the geometric law predicts it at epsilon {epsilon:g} (dashed), and as observed if it is reached (dotted).",
    )  # fmt: skip


def _samples(axis: Axes, cfg: DictConfig, found: Found, task: str, epsilon: float) -> None:
    colours, half = _colours(), cfg.samples.small // 2
    budgets = [n for n in cfg.budgets if n <= half]
    smooth = np.geomspace(1, half, 100)
    laws = method.fit_laws(found.pool(task).halves()[0].right, cfg.fit_up_to)
    axis.axvspan(1, cfg.fit_up_to, color="0.93", lw=0)
    axis.plot(smooth, laws["geometric"](smooth), color=colours[HIT], lw=1.2, label="geometric law")
    axis.plot(smooth, laws["beta-binomial"](smooth), color=colours[HIT], ls="--", lw=1.2, label="beta-binomial law")
    for mode in found.modes(task):
        seen = found.curves[task, mode].evaluation.mean(0)
        axis.plot(
            budgets, seen[[n - 1 for n in budgets]], MARKS[mode], color=colours[mode], ms=4, label=SHOWN[mode],
            ls="none" if mode == HIT else ":", lw=1,
        )  # fmt: skip
    _stars(axis, found.curves[task, HIT], epsilon, colours[HIT], half)
    _ticks(axis, budgets)


def _chains(axis: Axes, cfg: DictConfig, found: Found, task: str, epsilon: float) -> None:
    colours, length = _colours(), found.length
    numbers = np.arange(1, length + 1)
    smooth = np.linspace(1, length, 100)
    axis.axvspan(1, min(cfg.fit_up_to, length), color="0.93", lw=0)
    axis.plot(smooth, found.curves[task, FIRST].law(smooth), color=colours[FIRST], lw=1.2)
    leaky = analysis.leaky(found, task)
    at = smooth if leaky.p01 + leaky.p10 <= 1 else numbers  # beyond 1 it alternates and has no value between rounds
    axis.plot(at, leaky(at - 1), color=colours[LAST], lw=1.2, label="leaky chain")
    for mode in (FIRST, LAST):
        seen = found.curves[task, mode].evaluation.mean(0)
        axis.plot(numbers, seen, MARKS[mode], color=colours[mode], ms=4, label=SHOWN[mode])
    _stars(axis, found.curves[task, FIRST], epsilon, colours[FIRST], length)
    _ticks(axis, [n for n in (1, 2, 4, 8, 12) if n <= length])


def _stars(axis: Axes, curves: analysis.Curves, epsilon: float, colour: str, most: int) -> None:
    predicted, observed = curves.predicted(epsilon), curves.observed(epsilon)
    if 1 <= predicted <= most:
        axis.axvline(predicted, color=colour, ls="--", lw=1)
    if observed:
        axis.axvline(observed, color=colour, ls=":", lw=1.4)


def _saturation(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    from common.reporting.style import palette

    epsilon, colours = cfg.epsilons[-1], palette(list(cfg.tasks))
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.2))
    random, most = np.random.default_rng(0), cfg.samples.small // 2
    for task in cfg.tasks:
        points = analysis.per_problem(found, task, epsilon)
        shaken = points + random.uniform(-0.35, 0.35, points.shape)
        name = task.replace("_", " ")
        axes[0].plot(*shaken.T, "o", ms=4, alpha=0.5, color=colours[task], mec="none", label=name)
    pearson, spearman = tables.correlations(
        np.concatenate([analysis.per_problem(found, task, epsilon) for task in cfg.tasks])
    )
    axes[0].set_title(f"a dot is a problem: Pearson {pearson:.2f}, Spearman {spearman:.2f}", fontsize=9)
    rows = [
        row for row in tables.saturation_rows(cfg, found) if row["mode"] in (HIT, FIRST) and row["epsilon"] == epsilon
    ]
    for row in rows:
        if row["observed"] is not None:
            mark = MARKS[row["mode"]]
            filled = colours[row["task"]] if row["problems"] != "all" else "none"
            axes[1].plot(
                row["predicted"], row["observed"], mark, ms=7 if filled == "none" else 5, mfc=filled,
                mec=colours[row["task"]], mew=1.2,
            )  # fmt: skip
    axes[1].set_title("by bin; open: whole task; triangles: rethinking", fontsize=9)
    for axis in axes:
        top = max(most, *axis.get_xlim(), *axis.get_ylim()) * 1.02
        axis.plot([0, top], [0, top], color="0.5", lw=1, ls="--", zorder=0)
        axis.set(xlabel=f"N* predicted from the pilot half, epsilon {epsilon:g}", xlim=(-1, top), ylim=(-1, top))
    axes[0].set_ylabel("N* observed on the other half")
    axes[0].legend(fontsize=8, loc="upper left")
    report.figure(
        "saturation", fig, "Predicted and observed saturation points",
        "Left: problems with right and wrong pilot samples, shaken a little, cut at the samples of a half. Right: mean "
        "curves of bins and tasks that get there. Below the line the law saturates too late, above it too early.",
    )  # fmt: skip


def _pareto(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    colours = _colours()
    fig, axes = plt.subplots(1, len(cfg.tasks), figsize=(9.2, 3.6), squeeze=False)
    for axis, task in zip(axes[0], cfg.tasks, strict=True):
        pool = found.pool(task)
        each = (pool.tokens + pool.read).mean()
        for mode in found.modes(task):
            seen = found.curves[task, mode].whole.mean(0)
            budgets = [n for n in cfg.budgets if n <= len(seen)]
            axis.plot(
                each * np.array(budgets), seen[[n - 1 for n in budgets]], color=colours[mode], marker=MARKS[mode], ms=4,
                label=SHOWN[mode],
            )  # fmt: skip
        if found.rethinks(task):
            chains, shape = found.pools[task, "sequential rethinker"], found.states(task).shape
            spent = (chains.tokens + chains.read).reshape(shape).mean((0, 1)).cumsum()
            for mode in (FIRST, LAST):
                seen = found.curves[task, mode].whole.mean(0)
                axis.plot(spent, seen, color=colours[mode], marker=MARKS[mode], ms=4, label=SHOWN[mode])
        axis.axhline(
            found.pool(task, "large").right.mean(), color="0.4", ls="--", lw=1, label="large model, one answer"
        )
        axis.set(xscale="log", xlabel="tokens a problem", ylim=(0, 1.02))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.set_title(task.replace("_", " "), fontsize=9)
    axes[0, 0].set_ylabel("accuracy")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)
    report.figure(
        "pareto", fig, "Accuracy against tokens",
        "Tokens read and generated. Rethinking reads the last answer and the problem again in each round. "
        "hit@N and the first success know which answer is right; majority, best-of-N and the last answer do not.",
    )  # fmt: skip
