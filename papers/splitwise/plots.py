"""The figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from common.reporting.style import COLOURS, WIDTH, palette
from papers.splitwise.designs import NAMES
from papers.splitwise.study import SLO

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from common.reporting.report import Report

TRACES = {"conv": "conversation", "code": "coding"}
DESIGN_COLOURS = dict(zip(NAMES, (COLOURS[6], "#8A8A8A", *COLOURS[:4]), strict=True))
BASELINE_STYLE = {"Baseline-A100": (0, (4, 2)), "Baseline-H100": (0, (4, 2))}


def all_figures(page: Report, study: Any) -> None:
    """Every figure of the page."""
    latency(page, study)
    gantt(page, study)
    ratios(page, study)
    active_tokens(page, study)
    transfer(page, study)


def latency(page: Report, study: Any) -> None:
    """p90 slowdown against rate: rows of metrics, columns of traces."""
    frame = study.frames["rates"]
    figure, axes = plt.subplots(3, 2, figsize=(WIDTH, 6.6), sharex="col", sharey="row")
    for column, (trace, title) in enumerate(TRACES.items()):
        for row, metric in enumerate(("ttft", "tbt", "e2e")):
            ax, limit = axes[row][column], SLO[f"{metric}_p90"]
            for name in NAMES:
                rows = frame[(frame["trace"] == trace) & (frame["design"] == name)]
                style = BASELINE_STYLE.get(name, "-")
                ax.plot(
                    rows["rate"],
                    rows[f"{metric}_p90"],
                    color=DESIGN_COLOURS[name],
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    label=name,
                )
            ax.axhline(limit, color="#666666", linestyle=":", linewidth=1.2, label="objective (p90)")
            ax.set_ylim(0, 2.5 * limit)
            if not column:
                ax.set_ylabel(f"{metric.upper()} slowdown, p90")
        axes[0][column].set_title(title)
        axes[2][column].set_xlabel("requests/s (full scale)")
        feasible = frame.loc[(frame["trace"] == trace) & (frame["e2e_p90"] < 2.5 * SLO["e2e_p90"]), "rate"]
        axes[2][column].set_xlim(frame["rate"].min() - 5, max(feasible.max(), frame["rate"].min()) + 10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    page.figure(
        "latency", figure, "Latency against request rate",
        "Iso-power designs. Slowdown: against the same request alone on one DGX-A100. Dotted: the objective at this "
        "quantile; curves leave the panel where the queue grows without bound.",
    )  # fmt: skip


def gantt(page: Report, study: Any) -> None:
    """What one machine of each pool does over a few seconds: height is the number of tokens in the batch."""
    frame, strip = study.frames["strip"], study.cfg.strip
    rows = [
        ("Baseline-H100", "all", "Baseline-H100: a machine"),
        ("Splitwise-HA", "prompt", "Splitwise-HA: a prompt machine"),
        ("Splitwise-HA", "token", "Splitwise-HA: a token machine"),
    ]
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 4.6), sharex=True)
    kinds = palette(["prompts only", "decodes only", "prompts and decodes"])
    for ax, (design, pool, title) in zip(axes, rows, strict=True):
        blocks = frame[(frame["design"] == design) & (frame["pool"] == pool)]
        for _, block in blocks.iterrows():
            kind = (
                "decodes only"
                if not block["prompts"]
                else "prompts and decodes"
                if block["decodes"]
                else "prompts only"
            )
            height = block["decodes"] + block["prompt_tokens"]
            ax.bar(
                block["start"],
                height,
                block["end"] - block["start"],
                align="edge",
                color=kinds[kind],
                edgecolor="white",
                linewidth=0.3,
            )
        ax.set_yscale("log")
        ax.set_ylim(1, 20000)
        ax.set_title(title, loc="left", fontsize="medium")
        ax.set_ylabel("tokens")
    axes[-1].set_xlim(strip.start, strip.end)
    axes[-1].set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in kinds.values()]
    figure.legend(handles, list(kinds), loc="outside lower center", ncols=3)
    page.figure(
        "gantt", figure, "One machine of each pool at work",
        f"Conversation trace at {strip.rate} requests/s (full scale). A bar is a block of iterations of one batch, its "
        "height the tokens of one iteration: a prompt counts its length, a decode one. White: idle.",
    )  # fmt: skip


def ratios(page: Report, study: Any) -> None:
    """Reported and reproduced ratios of largest rates."""
    from papers.splitwise.judge import ratio_table

    table = ratio_table(study)
    figure, ax = plt.subplots(figsize=(WIDTH, 4.4))
    at = np.arange(len(table))[::-1]
    spread = [table["reproduced"] - table["low"], table["high"] - table["reproduced"]]
    ax.errorbar(
        table["reproduced"], at, xerr=spread, fmt="o", color=COLOURS[0], capsize=3, label="reproduced, 95% interval"
    )
    ax.plot(table["reported"], at, "D", color=COLOURS[1], markersize=6, label="reported")
    ax.axvline(1, color="#666666", linestyle=":", linewidth=1.2)
    ax.set_yticks(at, [text.replace(": ", ":\n") for text in table["comparison"]])
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.set_xlabel("ratio of the largest feasible rates")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    page.figure(
        "ratios", figure, "Reported and reproduced throughput ratios",
        f"Paired by trace over {len(study.seeds)} traces. 2.35 and 1.76 are reported without their designs: they "
        "stand at candidates that were chosen on another trace.",
    )  # fmt: skip


def active_tokens(page: Report, study: Any) -> None:
    """Cumulative share of busy time against the tokens in the batch."""
    frame = study.frames["activity"]
    frame = frame[(frame["seed"] == study.seeds[0]) & (frame["rate"] == study.cfg.rate)]
    lines = [
        ("Baseline-H100", "all", "Baseline-H100"),
        ("Splitwise-HA", "prompt", "Splitwise-HA, prompt pool"),
        ("Splitwise-HA", "token", "Splitwise-HA, token pool"),
    ]
    colours = palette([label for *_, label in lines])
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.1), sharey=True)
    for ax, (trace, title) in zip(axes, TRACES.items(), strict=True):
        for design, pool, label in lines:
            rows = frame[(frame["trace"] == trace) & (frame["design"] == design) & (frame["pool"] == pool)]
            ax.step(
                [*rows["tokens"], 20000], [*rows["cumulative"], 1.0], where="post", color=colours[label], label=label
            )
        ax.axvline(20, color="#666666", linestyle=":", linewidth=1.2)
        ax.set(xscale="log", xlim=(1, 20000), ylim=(0, 1.02), title=title, xlabel="tokens in the batch")
    axes[0].set_ylabel("share of busy time")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    page.figure(
        "active_tokens", figure, "Busy time with few tokens in the batch",
        f"At {study.cfg.rate} requests/s (full scale), cumulative. Dotted: 20 tokens. The baseline spends half of its "
        "busy time or more on batches far too small for its compute; the split leaves them to the token pool.",
    )  # fmt: skip


def transfer(page: Report, study: Any) -> None:
    """Simulated overhead of the transfer, and the real hand-over of a small model."""
    from papers.splitwise.judge import transfer_table

    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3))
    table = transfer_table(study.frames["transfer"])
    links = list(dict.fromkeys(table["link"]))
    for offset, (trace, title) in zip((-0.2, 0.2), TRACES.items(), strict=True):
        rows = table[table["trace"] == trace].set_index("link").loc[links]
        bars = left.barh(np.arange(len(links)) + offset, rows["e2e_overhead_percent"], 0.36, label=title)
        left.bar_label(bars, fmt="%.2g", padding=3, fontsize="small")
    left.set_yticks(range(len(links)), [link.replace(", ", ",\n") for link in links])
    left.set(xlabel="end-to-end overhead (percent)", title="simulated, Splitwise-HA")
    left.set_xlim(0, 1.15 * table["e2e_overhead_percent"].max())
    left.grid(axis="y", visible=False)
    left.legend(loc="lower right")
    _handover(right, study.frames["handover"])
    page.figure(
        "transfer", figure, "What moving the KV cache costs",
        f"Left: against an infinitely fast link, {study.cfg.rate} requests/s (full scale), mean over seeds. Right: a "
        "small Llama on this CPU, prompt in one process and decode in another, from the prompt to the second token.",
    )  # fmt: skip


def _handover(ax: Axes, frame: pd.DataFrame) -> None:
    names = ["one process", "serialized", "layer by layer"]
    frame = frame[frame["name"].isin(names)]
    for name in names:
        rows = frame[frame["name"] == name]
        ax.plot(rows["length"], rows["wall_ms"], marker="o", markersize=4, label=name)
    ax.set(xscale="log", yscale="log", xlabel="prompt tokens", title="measured, two processes")
    ax.set_ylabel("ms to the second token")
    ax.set_xticks(sorted(frame["length"].unique()), [str(n) for n in sorted(frame["length"].unique())])
    low, high = 0.8 * frame["wall_ms"].min(), frame["wall_ms"].max()
    ticks = [n for n in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200) if low <= n <= 1.1 * high]
    ax.set_yticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(loc="upper left")
