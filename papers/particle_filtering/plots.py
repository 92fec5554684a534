"""The figures: accuracy by budget, a genealogy, what noise does, and the ablations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from papers.particle_filtering.analysis import METHODS, Found

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

SHOWN = ("pf", "dvts", "beam", "wbon", "bon", "sc")  # methods of the curves, in the order of the colours
MARKERS = dict(zip(SHOWN, "osD^vX", strict=True))


def draw(cfg: DictConfig, report: Report, found: Found) -> None:
    """All figures, from the tables that `analysis.tables` wrote and the genealogies."""
    _curves(cfg, report)
    if len(found.nodes):
        _genealogy(report, found.nodes, cfg)
    if len(cfg.noise.sigmas):
        _noise(cfg, report)
    _ablations(cfg, report)
    if (Path(cfg.reasoners) / "prm" / "calibration.csv").exists():  # not of a checkpoint of the hub
        _reward_model(Path(cfg.reasoners) / "prm", report)


def _curves(cfg: DictConfig, report: Report) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    from common.reporting.style import palette

    table = pd.read_csv(report.out / "tables" / "curves.csv")
    colours = palette([METHODS[m] for m in SHOWN])
    tasks = [of.task for of in (cfg.main, cfg.second) if of.problems]
    fig, axes = plt.subplots(len(tasks), 3, figsize=(9.2, 2.9 * len(tasks)), sharey="row", squeeze=False)
    for task, line in zip(tasks, axes, strict=True):
        own = table[table["task"] == task]
        for column, axis in zip(("N", "tokens", "reward model passes"), line, strict=True):
            for method in SHOWN:
                of = own[own["method"] == METHODS[method]]
                of = of[of[column] > 0]  # self-consistency asks no reward model
                style: dict[str, Any] = {"marker": MARKERS[method], "color": colours[METHODS[method]], "ms": 4}
                axis.plot(of[column], of["accuracy"], label=METHODS[method], **style)
                if column == "N" and method in ("pf", "dvts"):
                    axis.fill_between(of["N"], of["low"], of["high"], color=style["color"], alpha=0.12, lw=0)
            greedy = own[own["method"] == "greedy"]["accuracy"].iloc[0]
            axis.axhline(greedy, color="0.4", ls=":", lw=1.2, label="greedy")
            axis.set(xscale="log", xlabel=f"{column} a problem" if column != "N" else "N")
            if column == "N":
                widths = sorted(own["N"].unique())
                axis.set_xticks(widths, [str(n) for n in widths])
                axis.minorticks_off()
        line[0].set_ylabel(f"accuracy, {task}")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=8)
    report.figure(
        "curves", fig, "Accuracy by budget",
        "The same runs against generations, generated tokens and prefixes that the reward model scored. Bands: 95% "
        "interval over problems. BoN and WBoN score finished answers only, so they pay fewer passes.",
    )  # fmt: skip


def winning(nodes: pd.DataFrame) -> set[int]:
    """Nodes of one search on one problem from which a right final candidate descends by right steps alone: two errors
    that cancel are not a right lineage."""
    parent, right = (dict(zip(nodes["node"], nodes[column], strict=True)) for column in ("parent", "right"))
    found: set[int] = set()
    for at in nodes[nodes["ends"]]["node"]:
        path = []
        while at >= 0:
            path.append(at)
            at = parent[at]
        if all(right[node] for node in path):
            found |= set(path)
    return found


def pick(nodes: pd.DataFrame) -> int:
    """The problem of the genealogy: the first of which the particle filter has a right lineage at the end and beam
    search has none, though it had a right first step; if there is none, the first that the filter has; else the first.
    """
    wins = {
        method: {p for p, of in group.groupby("problem_id") if winning(of)} for method, group in nodes.groupby("method")
    }
    ours = wins.get("pf", set())
    started = set(nodes[(nodes["method"] == "beam") & (nodes["step"] == 1) & nodes["right"]]["problem_id"])
    lost = (ours & started) - wins.get("beam", set())
    return int(min(lost or ours or {nodes["problem_id"].min()}))


def _genealogy(report: Report, nodes: pd.DataFrame, cfg: DictConfig) -> None:
    import matplotlib.pyplot as plt

    problem = pick(nodes)
    of = nodes[nodes["problem_id"] == problem]
    low, high = float(of["score"].min()), float(of["score"].max())
    fig, axes = plt.subplots(2, 1, figsize=(9.2, 6.4), sharex=True, sharey=True)
    for axis, method in zip(axes, ("pf", "beam"), strict=True):
        points = _tree(axis, of[of["method"] == method], low, high)
        axis.set(ylabel=f"{METHODS[method]}: place")
    axes[1].set_xlabel("reasoning step")
    fig.colorbar(points, ax=axes, label="score of the reward model", fraction=0.03)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8)
    report.figure(
        "genealogy", fig, "Who descends from whom",
        f"Problem {problem} of {cfg.genealogy.task}, N={cfg.genealogy.n}: the first, by number, of which the filter "
        "ends with an answer whose steps are all right and beam search with none, though one of its first steps was "
        "right (if there is none: the first that the filter has right). Each dot is a prefix that was scored; a line "
        "joins it to the one that it continues.",
    )  # fmt: skip


def _tree(axis: Axes, nodes: pd.DataFrame, low: float, high: float) -> Any:
    """Draws one search; the nodes of a step stand in the order of their parents, so that few lines cross."""
    from matplotlib.ticker import MaxNLocator

    from common.reporting.style import COLOURS

    at: dict[int, tuple[int, int]] = {}
    for step, line in nodes.groupby("step"):
        above = sorted(zip(line["parent"], line["node"], strict=True), key=lambda n: (at.get(n[0], (0, 0))[1], n[1]))
        at |= {node: (step, y) for y, (_, node) in enumerate(above, start=1)}
    labelled, green = False, winning(nodes)
    for node, parent in zip(nodes["node"], nodes["parent"], strict=True):
        wins = node in green
        if parent >= 0:
            (x0, y0), (x1, y1) = at[parent], at[node]
            style: dict[str, Any] = (
                {"color": COLOURS[2], "lw": 2.6, "zorder": 2} if wins else {"color": "0.75", "lw": 0.6}
            )
            name = "leads to a right answer by right steps" if wins and not labelled else None
            labelled = labelled or wins
            axis.plot([x0, x1], [y0, y1], label=name, **style)
    x, y = np.array([at[node] for node in nodes["node"]]).T
    points = axis.scatter(x, y, c=nodes["score"], vmin=low, vmax=high, cmap="cividis", s=26, zorder=3)
    right = nodes["right"].to_numpy(dtype=bool)
    axis.scatter(
        x[right], y[right], facecolors="none", edgecolors=COLOURS[1], s=58, lw=1.3, zorder=4, label="right so far"
    )
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return points


def _noise(cfg: DictConfig, report: Report) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    from common.reporting.style import palette

    table = pd.read_csv(report.out / "tables" / "noise.csv")
    colours = palette([METHODS[m] for m in SHOWN])
    fig, axes = plt.subplots(1, 3, figsize=(9.2, 3.1))
    columns = ("accuracy", "right among the final candidates", "first right step survives")
    for axis, column in zip(axes, columns, strict=True):
        for method in ("pf", "dvts", "beam", "bon"):
            of = table[table["method"] == METHODS[method]]
            style: dict[str, Any] = {"color": colours[METHODS[method]], "marker": MARKERS[method], "ms": 4}
            axis.plot(of["sigma"], of[column], label=METHODS[method], **style)
            if column == "accuracy" and method in ("pf", "beam"):
                axis.fill_between(of["sigma"], of["low"], of["high"], color=style["color"], alpha=0.12, lw=0)
        axis.set(xlabel="noise on the oracle's logit (sigma)", ylim=(-0.02, 1.02))
        axis.set_title(column, fontsize=9)
    axes[0].set_ylabel("share of problems")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    report.figure(
        "noise", fig, "What a worse reward model does to each method",
        f"{cfg.main.task}, N={cfg.noise.n}. The scorer knows whether a prefix can still be completed; a fixed "
        "error of the given size is added to the logit of its success rate. The answer is the candidate of the highest "
        "score.",
    )  # fmt: skip


def _ablations(cfg: DictConfig, report: Report) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    from common.reporting.style import COLOURS

    table = pd.read_csv(report.out / "tables" / "ablations.csv")
    table = table[table["task"] == cfg.main.task]
    groups = list(table.groupby("ablation", sort=False))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(9.2, 3.2), sharey=True, gridspec_kw={"width_ratios": [1.4, 1.4, 1, 1]}
    )
    for axis, (name, of) in zip(axes, groups, strict=True):
        widths = sorted(of["N"].unique()) if name == "aggregation" else [None]
        settings = list(dict.fromkeys(of["setting"]))
        for i, n in enumerate(widths):
            part = of if n is None else of[of["N"] == n]
            x = np.arange(len(settings)) + (i - (len(widths) - 1) / 2) * 0.25
            error = [part["accuracy"] - part["low"], part["high"] - part["accuracy"]]
            label = None if n is None else f"N={n}"
            axis.errorbar(x, part["accuracy"], yerr=error, fmt="o", ms=5, color=COLOURS[i], capsize=2, label=label)
        axis.set_xticks(np.arange(len(settings)), settings, rotation=45 if len(settings) > 3 else 0)
        axis.set_xlabel(str(name).replace(" at ", "\nat "))
        if len(widths) > 1:
            axis.legend(fontsize=8)
    axes[0].set_ylabel(f"accuracy, {cfg.main.task}")
    report.figure(
        "ablations", fig, "Ablations of the particle filter",
        "How step scores become one number; the sampler's temperature; iterations of particle Gibbs and parallel "
        "chains at equal budget. Bars: 95% interval over problems; settings share problems and random streams.",
    )  # fmt: skip


def _reward_model(folder: Path, report: Report) -> None:
    """Calibration and AUROC by step of the shared reward model, as its stage measured them."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from common.reporting.style import COLOURS

    table = pd.read_csv(folder / "calibration.csv")
    metrics = json.loads((folder / "metrics.json").read_text())
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.2))
    left.plot([0, 1], [0, 1], color="0.5", ls=":", label="calibrated")
    for i, (task, of) in enumerate(table.groupby("task")):
        left.plot(of["score"], of["rate"], color=COLOURS[i], lw=1)
        left.scatter(of["score"], of["rate"], s=4 + of["prefixes"] / 4, color=COLOURS[i], label=task)
        steps = {int(key.split()[-1]): v for key, v in metrics.items() if re.fullmatch(rf"{task} auroc, step \d+", key)}
        right.plot(list(steps), list(steps.values()), "os"[i % 2] + "-", color=COLOURS[i], label=task, ms=4)
    right.axhline(0.5, color="0.5", ls=":", label="a coin")
    left.set(xlabel="score of the reward model", ylabel="success rate of rollouts", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="step at which the prefix ends", ylabel="AUROC")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    report.figure(
        "reward_model", fig, "The shared reward model",
        "Prefixes of the base policy's answers to problems that the reward model did not learn from. Left: their mean "
        "score and mean success rate in ten bins of the score; area: number of prefixes. Right: how well the score "
        "tells prefixes that succeed at least half of the time from the others.",
    )  # fmt: skip
