"""The figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from common.reporting.style import COLOURS, WIDTH, palette
from papers.idealized_runtime import analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report
    from papers.idealized_runtime.analysis import Found
    from papers.idealized_runtime.method import Profile

SHOWN = "openai_davinci"  # the released log that is drawn
SIZE_COLOURS = dict(zip(("small", "base", "large"), COLOURS, strict=False))
MARKERS = {"X": "^", "Y": "o", "Z": "s"}
TASK_NAMES = {"chain": "chains", "chain_hard": "long chains", "countdown": "countdown"}


def figures(cfg: DictConfig, report: Report, found: Found) -> None:
    """Every figure whose data are there."""
    _linear(cfg, report, found)
    if found.records is not None:
        _ranks(cfg, report, found)
        _tradeoff(report, found)


def _linear(cfg: DictConfig, report: Report, found: Found) -> None:
    """Runtime against output tokens: a released log (HELM's constants without it) and the largest own model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
    if found.cells is not None and found.a100 is not None:
        rows = found.cells[(found.cells["gpu"] == "a100") & (found.cells["run"] == SHOWN)]
        _lines(left, found.a100[SHOWN].profile, (1, 512, 1024, 1536, 1920), 64, rows, 1.0)
        said = "Left: the released log of GPT-3's shape on 8 A100."
    else:
        _lines(left, found.constants["openai/davinci"], (1, 512, 1024, 1536, 1920), 64, None, 1.0)
        said = "Left: HELM's constants for GPT-3's shape on 8 A100; the log was not there."
    left.set(xlabel="output tokens", ylabel="seconds", title="davinci, 8 A100")
    name = max(found.shapes, key=lambda n: found.shapes[n].parameters)
    prompts = [p for p in cfg.prompts if p == 1 or p >= 64] or list(cfg.prompts)
    rows = found.cells_of(name, cfg.clock)
    _lines(right, found.profiles[name], prompts, max(rows["output_tokens"]), rows, 1e3)
    right.set(
        xlabel="output tokens",
        ylabel="CPU milliseconds" if cfg.clock == "cpu" else "milliseconds",
        title=f"{name}, here",
    )
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        ax.legend(title="prompt tokens", loc="upper left", fontsize=7, title_fontsize=7, ncols=2)
        ax.set_ylim(top=1.35 * ax.get_ylim()[1])
    report.figure(
        "linear", figure, "Runtime is linear in output tokens, with one slope for all prompts",
        f"{said} Right: random weights on this machine. Points: measured; lines: F(p) + g (o - 1).",
    )  # fmt: skip


def _lines(
    ax: Axes, profile: Profile, prompts: tuple[int, ...] | list[int], most: int, rows: pd.DataFrame | None, unit: float
) -> None:
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(prompts)))
    for p, colour in zip(prompts, colours, strict=True):
        o = np.array([1, most])
        ax.plot(o, unit * profile.seconds(p, o), color=colour, linewidth=1.2, label=str(p))
        if rows is not None:
            own = rows[rows["prompt_tokens"] == p]
            ax.plot(own["output_tokens"], unit * own["seconds"], "o", color=colour, markersize=3)


def _ranks(cfg: DictConfig, report: Report, found: Found) -> None:
    """Raw against idealized runtime of the released table; raw, denoised and idealized runtime of nine APIs of ours."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.8))
    if found.scenarios is not None:
        _scatter(left, found.scenarios)
        said = "Left: the released table, a point a scenario; on the diagonal raw and idealized runtime are equal."
    else:
        _constants(left, found)
        said = "Left: HELM's constants for 512 prompt and 64 output tokens; the released table was not there."
    of = analysis.market(found)
    steps = ["raw", "denoised", "idealized"]
    for i, api in enumerate(of.apis):
        size, _, provider = api.partition("@")
        values = [1e3 * getattr(of, step)[:, i].mean() for step in steps]
        market = cfg.api.market[size] == provider
        right.plot(
            range(3), values, color=SIZE_COLOURS[size], marker=MARKERS.get(provider, "o"), markersize=5,
            linewidth=2.0 if market else 0.8, alpha=1.0 if market else 0.55,
        )  # fmt: skip
    right.set(yscale="log", xticks=range(3), xlim=(-0.3, 2.4), ylabel="ms of a query (mean)", title="nine APIs, here")
    right.set_xticklabels(steps)
    _plain_ticks(right)
    handles = [plt.Line2D([], [], color=colour, label=size) for size, colour in SIZE_COLOURS.items()]
    handles += [
        plt.Line2D([], [], color="#666666", marker=MARKERS[name], linestyle="none", label=f"provider {name}")
        for name in MARKERS
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    report.figure(
        "ranks", figure, "Raw, denoised and idealized runtime",
        f"{said} Right: three reasoners at three providers, the same problems; thick: the three that the claims "
        "judge. Idealized runtime knows the model and the tokens alone.",
    )  # fmt: skip


def _plain_ticks(ax: Axes) -> None:
    low, high = ax.get_ylim()
    ticks = [x * 10**k for k in range(-3, 6) for x in (1, 2, 5) if low <= x * 10**k <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _scatter(ax: Axes, scenarios: pd.DataFrame) -> None:
    both = scenarios.dropna(subset="idealized")
    named = {
        "openai_davinci": "davinci", "openai_text-davinci-001": "text-davinci-001", "ai21_j1-jumbo": "j1-jumbo",
        "anthropic_stanford-online-helpful-v4-s3": "anthropic",
    }  # fmt: skip
    rest = both[~both["model"].isin(named)]
    ax.plot(rest["idealized"], rest["raw"], "o", color="#BBBBBB", markersize=2, label="others")
    for (model, label), colour in zip(named.items(), palette(list(named)).values(), strict=True):
        own = both[both["model"] == model]
        ax.plot(own["idealized"], own["raw"], "o", color=colour, markersize=2.5, label=label)
    ends = [both["idealized"].min(), both["idealized"].max()]
    ax.plot(ends, ends, color="#666666", linestyle=":", linewidth=1.2)
    ax.set(xscale="log", yscale="log", xlabel="idealized seconds", ylabel="raw seconds", title="released table")
    ax.legend(loc="upper left", fontsize=7, markerscale=2, handletextpad=0.2)
    ax.set_ylim(top=6 * both["raw"].max())


def _constants(ax: Axes, found: Found) -> None:
    shared = [name for name in found.apis if name in found.constants]
    for name in shared:
        x, y = (float(of[name].seconds(512, 64)) for of in (found.constants, found.apis))
        ax.plot(x, y, "o", color=COLOURS[0], markersize=4)
        ax.annotate(name.partition("/")[2], (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", yscale="log", xlabel="idealized seconds", ylabel="denoised seconds", title="HELM's constants")


def _tradeoff(report: Report, found: Found) -> None:
    """Accuracy against idealized runtime: a panel a task, with its front."""
    of = analysis.answers(found)
    figure, axes = plt.subplots(1, len(of), figsize=(WIDTH, 3.1), sharey=True)
    for ax, (task, models) in zip(axes, of.items(), strict=True):
        front = analysis.front_of(models)
        points = {name: (1e3 * pair[0].mean(), pair[1].mean()) for name, pair in models.items()}
        kept = sorted(point for point, on in zip(points.values(), front, strict=True) if on)
        kept.append((1.06 * max(x for x, _ in points.values()), kept[-1][1]))  # who can wait longer need not
        ax.plot(*zip(*kept, strict=True), color="#666666", linewidth=1.0, drawstyle="steps-post", zorder=1)
        for name, (x, y) in points.items():
            size, _, weights = name.partition(" ")
            error = 1.96 * models[name][1].std() / np.sqrt(len(models[name][1]))
            ax.errorbar(
                x, y, yerr=error, color=SIZE_COLOURS[size], marker="o" if weights == "final" else "D", markersize=5,
                markerfacecolor=SIZE_COLOURS[size] if weights == "final" else "white", linewidth=0.8, capsize=2,
            )  # fmt: skip
        ax.set(xlabel="idealized ms of a query", title=TASK_NAMES.get(task, task), ylim=(-0.02, 1.06))
    axes[0].set_ylabel("accuracy")
    handles = [
        plt.Line2D([], [], color=c, marker="o", linestyle="none", label=size) for size, c in SIZE_COLOURS.items()
    ]
    grey = {"color": "#666666", "linestyle": "none"}
    handles += [
        plt.Line2D([], [], marker="o", label="fully trained", **grey),
        plt.Line2D([], [], marker="D", markerfacecolor="white", label="earlier checkpoint", **grey),
        plt.Line2D([], [], color="#666666", label="Pareto front"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    report.figure(
        "tradeoff", figure, "Accuracy against idealized runtime",
        "Greedy answers of three sizes of reasoners, fully trained and from an earlier checkpoint; bars: 95%. On the "
        "grey line stands what no other model beats in both.",
    )  # fmt: skip
