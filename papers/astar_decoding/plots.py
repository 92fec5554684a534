"""The figures: two frontiers (as figure 1 of the paper), tokens by difficulty, one search tree, and robustness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from papers.astar_decoding import analysis, method
from papers.astar_decoding.analysis import NAMES, Found

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

MARKS = dict(zip(NAMES, "osD^vX", strict=True))


def figures(cfg: DictConfig, report: Report, found: Found) -> None:
    """All figures."""
    _frontiers(cfg, report, found)
    _difficulty(cfg, report, found)
    _tree(cfg, report, found)
    _robustness(cfg, report, found)


def _frontiers(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    from common.reporting.style import COLOURS

    fig, axes = plt.subplots(len(cfg.tasks), 2, figsize=(8.6, 3.0 * len(cfg.tasks) + 0.7), squeeze=False)
    for (left, right), task in zip(axes, cfg.tasks, strict=True):
        curves = found.curves[task]
        for axis, cost in ((left, "tokens"), (right, "passes")):
            for (name, label), colour in zip(NAMES.items(), COLOURS, strict=False):
                if cost == "passes" and name == "self_consistency":
                    continue
                _line(axis, curves[name], cost, colour, MARKS[name], label)
            if cost == "passes":
                stepwise = curves["best_of_n, every step scored"]
                _line(axis, stepwise, cost, COLOURS[list(NAMES).index("best_of_n")], "D", None, ls=":")
            for arm, label, style in (("greedy", "greedy", "--"), ("large greedy", "greedy, large policy", "-.")):
                own = found.costs[(found.costs["task"] == task) & (found.costs["arm"] == arm)]
                axis.axhline(own["correct"].mean(), color="0.45", ls=style, lw=1, label=label)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_ylabel(f"{task}: accuracy")
        left.set_xlabel("generated tokens a problem")
        right.set_xlabel("PRM passes a problem")
    handles = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1], strict=True))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8)
    report.figure(
        "frontiers", fig, "Accuracy against what it cost",
        "Points are the limits N; means over problems and sampling seeds, bars one standard error over problems. "
        "Right: best-of-N with one pass a sample (solid) and one a step (dotted); self-consistency needs no pass.",
    )  # fmt: skip


def _line(
    axis: Axes, curve: analysis.Curve, cost: str, colour: str, mark: str, label: str | None, **style: Any
) -> None:
    spent, accuracy = getattr(curve, cost).mean(0), curve.correct.mean(0)
    error = curve.correct.std(0, ddof=1) / np.sqrt(len(curve.correct))
    axis.errorbar(spent, accuracy, error, color=colour, marker=mark, ms=4, elinewidth=0.6, label=label, **style)


def _difficulty(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS

    fig, axes = plt.subplots(1, len(cfg.tasks), figsize=(8.6, 3.4), squeeze=False)
    for axis, task in zip(axes[0], cfg.tasks, strict=True):
        curves = found.curves[task]
        rate = found.pool[found.pool["task"] == task].groupby("problem_id")["correct"].mean().to_numpy()
        quarters = np.array_split(np.argsort(rate, kind="stable"), 4)
        for name, colour in (("a_star", COLOURS[0]), ("best_of_n", COLOURS[2])):
            tokens = curves[name].tokens[:, -1]
            axis.plot(rate, tokens, "o", ms=3, alpha=0.35, color=colour)
            means = [(rate[q].mean(), tokens[q].mean()) for q in quarters]
            axis.plot(*zip(*means, strict=True), f"-{MARKS[name]}", color=colour, label=NAMES[name])
        axis.set(xlabel="share of right samples of the problem", ylabel="tokens spent on the problem", ylim=(0, None))
        axis.set_title(f"{task}, limit N={curves['a_star'].ns[-1]}", fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    report.figure(
        "difficulty", fig, "Where the tokens go",
        "A dot is a problem, a large mark the mean of a quarter of the problems by difficulty. Best-of-N spends the "
        "same on every problem; A* stops when a finished answer leaves the queue.",
    )  # fmt: skip


def tree_of(found: Found, task: str) -> pd.DataFrame:
    """The visited states of the problem that is drawn: the first whose chosen answer is finished and that took at least
    twice as many extensions as the answer has steps; if there is none, that of most extensions."""
    trees = [tree for _, tree in found.nodes[found.nodes["task"] == task].groupby("problem_id", sort=True)]
    for tree in trees:
        chosen = tree[tree["chosen"] & tree["done"]]
        if len(chosen) and tree["place"].max() + 1 >= 2 * chosen["depth"].iloc[0]:
            return tree
    return max(trees, key=lambda tree: tree["place"].max())


def _tree(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    task = cfg.ablation.task if (found.nodes["task"] == cfg.ablation.task).any() else found.nodes["task"].iloc[0]
    tree = tree_of(found, task)
    problem, spent = int(tree["problem_id"].iloc[0]), int(tree["tokens"].sum())
    samples = found.pool[(found.pool["task"] == task) & (found.pool["problem_id"] == problem)]
    samples = samples[samples["seed"] == samples["seed"].min()].sort_values("sample_id")
    samples = samples[samples["tokens"].cumsum().shift(fill_value=0) < spent]
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.0), sharey=True, sharex=True)
    _draw_tree(axes[0], tree, 1 - cfg.search.root_score)
    _draw_comb(axes[1], cfg, samples)
    axes[0].set(
        xlabel="steps", ylabel="f = g + 1 - r (low is good)", title=f"A*: {spent} tokens (numbers: order of extension)"
    )
    axes[1].set(xlabel="steps", title=f"best-of-{len(samples)}: {int(samples['tokens'].sum())} tokens")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    low, high = axes[0].dataLim.y1, axes[0].dataLim.y1
    for axis in axes:
        drawn = [y for line in axis.lines for y in line.get_ydata()[1:]]
        low, high = min(low, *drawn), max(high, *drawn)
        axis.title.set_fontsize(9)
    pad = 0.12 * (high - low)
    axes[0].set(ylim=(low - 2 * pad, high + pad), xlim=(-0.3, tree["depth"].max() + 0.3))
    for axis in axes:
        axis.annotate(
            f"1: root, f = {1 - cfg.search.root_score:.2f}", (0.03, 0.02), xycoords="axes fraction", fontsize=8
        )
    costs = found.costs[(found.costs["task"] == task) & (found.costs["arm"] == "a_star") & (found.costs["seed"] == 0)]
    solved = costs[costs["problem_id"] == problem].sort_values("n")["correct"].iloc[-1]
    best = samples["correct"][samples["score"].idxmax()]
    completed = "" if tree["chosen"].any() else " (completed when the budget ended, not drawn)"
    report.figure(
        "tree", fig, f"One problem, {'solved' if solved else 'not solved'} by A*: a tree and a comb",
        f"Problem {problem} of {task}, the first on which A* finished and extended at least twice as many states as "
        f"the answer has steps. Area: tokens, duplicates included; the root lies below. Blue: extended, grey: never, "
        f"orange: the answer{completed}. Right: as many samples as the same tokens buy, by the same f; orange has the "
        f"highest score and is {'right' if best else 'wrong'}.",
    )  # fmt: skip


def _draw_tree(axis: Axes, tree: pd.DataFrame, start: float) -> None:
    from common.reporting.style import COLOURS

    x = tree["depth"] + _spread(tree.groupby("depth").cumcount().to_numpy())
    place = {"": (0.0, start)} | dict(zip(tree["node"], zip(x, tree["f"], strict=True), strict=True))
    for row in tree.itertuples():
        axis.plot(*zip(place[row.parent], place[row.node], strict=True), color="0.75", lw=0.8, zorder=1)
    colours = [COLOURS[1] if row.chosen else COLOURS[0] if row.place >= 0 else "0.8" for row in tree.itertuples()]
    axis.scatter(x, tree["f"], s=7 * tree["tokens"], c=colours, edgecolors="white", lw=0.5, zorder=2)
    for row in tree[tree["place"] >= 0].itertuples():
        axis.annotate(
            str(row.place + 1), place[row.node], ha="center", va="center", fontsize=7, color="white", zorder=3
        )


def _spread(order: np.ndarray) -> np.ndarray:
    """Sideways shifts in [-0.2, 0.2], so that states of one depth and nearly one f do not hide each other."""
    return (order % 5 - 2) / 10


def _draw_comb(axis: Axes, cfg: DictConfig, samples: pd.DataFrame) -> None:
    from common.generation.steps import State
    from common.reporting.style import COLOURS

    best = samples["score"].idxmax()
    for shift, (index, row) in zip(_spread(np.arange(len(samples))), samples.iterrows(), strict=True):
        ends, scores = [int(e) for e in str(row["ends"]).split()], [float(s) for s in str(row["scores"]).split()]
        path = State(0, (0,) * ends[-1], tuple(ends), True, (0.0,) * len(ends), tuple(scores))
        values = method.priority(path, cfg.search.step_cost, cfg.search.root_score)
        x = np.arange(len(values)) + shift * (np.arange(len(values)) > 0)
        axis.plot(x, values, color="0.75", lw=0.8, zorder=1)
        colour, area = COLOURS[1] if index == best else COLOURS[2], 7 * np.diff([0, *ends])
        axis.scatter(x[1:], values[1:], s=area, c=colour, edgecolors="white", lw=0.5, zorder=2)


def _robustness(cfg: DictConfig, report: Report, found: Found) -> None:
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS

    noise, depths = analysis.noise_table(cfg, found), analysis.pops(found.nodes)
    fig, axes = plt.subplots(1, 2 * len(cfg.tasks), figsize=(10.4, 3.2), squeeze=False)
    for column, task in enumerate(cfg.tasks):
        left, right = axes[0, column], axes[0, len(cfg.tasks) + column]
        own = noise[noise["task"] == task]
        for name in ("a_star", "particle_filter", "best_of_n"):
            colour, label = COLOURS[list(NAMES).index(name)], NAMES[name]
            error = own[f"{label}, s.e."]
            left.errorbar(own["sigma"], own[label], error, color=colour, marker=MARKS[name], ms=4, label=label)
        left.set(xlabel="noise of the logit, sigma", ylabel="accuracy", title=f"{task}, N={cfg.noise.n[task]}")
        part = depths[depths["task"] == task]
        right.bar(part["depth"], part["extensions"], color="0.75", label="extensions a problem")
        if part["right"].notna().any():
            right.bar(part["depth"], part["extensions"] * part["right"], color=COLOURS[0], label="of them still right")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="depth (steps)", ylabel="extensions a problem", title=f"{task}: what A* extends")
    for axis in axes[0]:
        axis.title.set_fontsize(9)
    handles = [*zip(*axes[0, 0].get_legend_handles_labels(), strict=True),
               *zip(*axes[0, -1].get_legend_handles_labels(), strict=True)]  # fmt: skip
    fig.legend(*zip(*handles, strict=True), loc="outside upper center", ncols=5, fontsize=8)
    report.figure(
        "robustness", fig, "Noise in the reward model, and which depths are extended",
        "Left: a persistent error on the logit of every score; bars are one standard error over problems. Right: A* at "
        "the largest limit; 'still right' is known to the task's checker, not to the search.",
    )  # fmt: skip
