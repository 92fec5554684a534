"""The figures: the four metrics over context, the four laws measured, what a session costs, how 250x splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from common.reporting.style import COLOURS, WIDTH, palette
from papers.long_context_peak.analysis import Found, decode_above, decode_gate, forecasts, line, predictions
from papers.long_context_peak.method.metrics import DIMENSIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

PARTS = {"prefill_s": "prefill", "decode_s": "decode", "switch_s": "context switches"}
GREY = "#666666"


def figures(cfg: DictConfig, page: Report, found: Found) -> None:
    """Every figure of the page."""
    over_context(cfg, page, found)
    measured(cfg, page, found)
    sessions(cfg, page, found)
    compression(cfg, page, found)


def short(tokens: float) -> str:
    """4000 -> 4K, 1000000 -> 1M."""
    return f"{tokens / 1e6:g}M" if tokens >= 1e6 else f"{tokens / 1e3:g}K"


def over_context(cfg: DictConfig, page: Report, found: Found) -> None:
    """Four panels with the same axis, each with the resource that limits it and the reported values."""
    from common.costs.catalogue import accelerator

    own, table = cfg.closed, found.closed["context"]
    machine = accelerator(own.machine)
    panels = {
        "prefill": ("prefill (s)", f"bound by operations: {machine.flops_per_s / 1e12:g} TFLOP/s"),
        "decode": (f"{own.sessions.output_tokens} tokens (s)",
                   f"bound by HBM bandwidth: {machine.memory_bytes_per_s / 1e12:.3g} TB/s"),
        "users": ("users", f"bound by HBM size: {machine.memory_bytes / 2**30:g} GiB"),
        "switch": ("context switch (s)", f"bound by PCIe bandwidth: {machine.host_bytes_per_s / 1e9:g} GB/s"),
    }  # fmt: skip
    reported = {"prefill": (0.89, 14.1), "decode": (8.5, 9.8), "users": (20, 1)}
    colours = palette([str(n) for n in own.devices])
    fig, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.4), sharex=True)
    for ax, (metric, (label, limit)) in zip(axes.flat, panels.items(), strict=True):
        for count in own.devices if metric != "switch" else own.devices[:1]:
            rows = table[table["devices"] == count]
            values = rows[metric].where(rows[metric] > 0) if metric == "users" else rows[metric]
            ax.plot(rows["context"], values, color=colours[str(count)], label=f"{count} x {own.machine}")
        if metric in reported:
            points = (own.short, own.example)
            ax.plot(points, reported[metric], "D", color=COLOURS[6], markersize=5, label="reported, 1 device")
        ax.set(xscale="log", yscale="log", ylabel=label)
        ax.set_title(limit, fontsize="small", loc="left")
        ticks = [own.short, 10_000, own.example, 200_000, own.long]
        ax.set_xticks(ticks, [short(n) for n in ticks])
        ax.minorticks_off()
    for ax in axes[1]:
        ax.set_xlabel("context (tokens)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    page.figure(
        "context", fig, "Four metrics, four limits",
        f"{own.model} in closed form with the exact causal count. Users end where no context fits. A context switch "
        "goes over one device's link. Reported prefill came out of another count (table t1).",
    )  # fmt: skip


def measured(cfg: DictConfig, page: Report, found: Found) -> None:
    """Dots: medians on this machine. Lines: the closed forms with the rates of this machine."""
    fig, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.8))
    table = predictions(found)
    _prefill(axes[0][0], table)
    _decode(axes[0][1], cfg, found, table)
    _arena(axes[1][0], cfg, found)
    rows = table[table["law"] == "switch"]
    axes[1][1].plot(rows["kv_mib"], 1e3 * rows["predicted_s"], color=COLOURS[0], label="closed form")
    axes[1][1].plot(rows["kv_mib"], 1e3 * rows["measured_s"], "o", color=COLOURS[0], label="measured")
    axes[1][1].set(xlabel="KV cache (MiB)", ylabel="ms a context switch", title=f"switch to the {cfg.store} and back")
    axes[1][1].set(xlim=(0, None), ylim=(0, None))
    axes[1][1].legend(fontsize="small")
    page.figure(
        "measured", fig, "The four laws on this machine",
        f"Dots: medians ({cfg.clock} clock; switch: wall), a model of "
        f"{found.shapes[found.first].parameters / 1e6:.2g}M parameters. Lines: closed forms with rates from the same "
        "run. Dashed: the fits of decode, from several times the processor's last cache on.",
    )  # fmt: skip


def _series(ax: Axes, rows: pd.DataFrame, x: str, colour: str, label: str, scale: float = 1e3) -> None:
    ax.plot(rows[x], scale * rows["predicted_s"], color=colour)
    ax.plot(rows[x], scale * rows["measured_s"], "o", color=colour, markersize=4, label=label)


def _prefill(ax: Axes, table: pd.DataFrame) -> None:
    of = table[table["law"] == "prefill"]
    names = list(dict.fromkeys(of["what"]))
    for name, colour in palette(names).items():
        _series(ax, of[of["what"] == name], "tokens", colour, name, 1)
    ax.set(xscale="log", yscale="log", xlabel="prompt (tokens)", ylabel="seconds", title="prefill")
    ticks = sorted(int(n) for n in of["tokens"].unique())
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(fontsize="small")


def _decode(ax: Axes, cfg: DictConfig, found: Found, table: pd.DataFrame) -> None:
    of = table[table["law"] == "decode"]
    first = of[of["what"] == f"{found.first}, preallocated"]
    ax.plot(first["kv_mib"], 1e3 * first["predicted_s"], color=GREY, label="closed form")
    gate = decode_gate(cfg, found)
    for name, colour in palette(list(dict.fromkeys(of["what"]))).items():
        rows = of[of["what"] == name]
        ax.plot(rows["kv_mib"], 1e3 * rows["measured_s"], "o", color=colour, markersize=4, label=name)
        attention, arm = name.split(", ")
        if gate is None and arm == "preallocated":
            seconds = decode_above(cfg, found, attention)
            alpha, beta, _ = (float(np.median(x)) for x in line(seconds))
            ends = np.array([seconds.columns.min(), seconds.columns.max()])
            ax.plot(ends / 2**20, 1e3 * (alpha + beta * ends), color=colour, ls="--", lw=1.2)
    ax.set(xlabel="KV cache (MiB)", ylabel="ms a token", title="decode", xlim=(0, None), ylim=(0, None))
    ax.legend(fontsize="small")


def _arena(ax: Axes, cfg: DictConfig, found: Found) -> None:
    for name, colour in palette(list(found.shapes)).items():
        rows = found.arena[found.arena["attention"] == name]
        dense = np.geomspace(rows["tokens"].min(), rows["tokens"].max(), 200)
        each = found.shapes[name].kv_bytes_per_token * np.floor(dense)
        ax.plot(dense, np.maximum(cfg.arena.mib * 2**20 // each, 0.5), color=colour)
        ax.plot(rows["tokens"], rows["admitted"], "o", color=colour, markersize=4, label=name)
    ticks = sorted(found.arena["tokens"].unique())
    ax.set(
        xscale="log", yscale="log", xlabel="context (tokens)", ylabel="users", title=f"memory of {cfg.arena.mib:g} MiB"
    )
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(fontsize="small")


def sessions(cfg: DictConfig, page: Report, found: Found) -> None:
    """What a session's busy seconds are made of, short and long, in closed form; the real server and its prediction."""
    own, table = cfg.closed, found.closed["sessions"]
    shown = table[table["context"].isin([own.short, own.example, 200_000, own.long])].reset_index(drop=True)
    total = shown[list(PARTS)].sum(axis=1)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.7), width_ratios=(5, 3))
    places = shown.index + 0.6 * (shown["devices"] > min(own.devices))  # a gap between the two machines
    bottom = np.zeros(len(shown))
    for column, colour in zip(PARTS, COLOURS, strict=False):
        share = 100 * shown[column] / total
        left.bar(places, share, bottom=bottom, color=colour, label=PARTS[column], width=0.7)
        bottom += share.to_numpy()
    for place, seconds, resident in zip(places, total, shown["resident"], strict=True):
        left.text(place, 102, f"{seconds:.3g} s\n{resident} fit", ha="center", va="bottom", fontsize=7.5)
    names = [f"{short(c)}\n{n} x A100" for c, n in zip(shown["context"], shown["devices"], strict=True)]
    left.set_xticks(places, names, fontsize=8)
    left.set(ylabel="share of a session (%)", ylim=(0, 122), yticks=range(0, 101, 25), title="closed form")
    left.grid(axis="x", visible=False)
    _server(right, cfg, found)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    page.figure(
        "sessions", fig, "What a session costs",
        f"Left: {own.model}, {own.sessions.users} users who share the devices, {own.sessions.rounds} answers each, by "
        "simulation with the closed forms; above the bars, a session's busy seconds and how many users' caches fit. "
        "Right: the real server on this machine; error bars: all repeats.",
    )  # fmt: skip


def _server(ax: Axes, cfg: DictConfig, found: Found) -> None:
    runs = forecasts(cfg, found)
    for place, (forecast, makespans) in enumerate(runs.values()):
        middle = float(np.median(makespans))
        spread = [[middle - makespans.min()], [makespans.max() - middle]]
        ax.bar(place - 0.2, middle, 0.36, color=COLOURS[4], yerr=spread, label="measured" * (not place),
               error_kw={"lw": 1, "ecolor": GREY})  # fmt: skip
        ax.bar(place + 0.2, forecast.makespan, 0.36, color=COLOURS[5], label="predicted" * (not place))
    ax.set_xticks(range(len(runs)), [f"{n}" for n in runs])
    ax.set(xlabel=f"caches in memory, {cfg.session.users} users", ylabel="makespan (s)", title="real server")
    ax.grid(axis="x", visible=False)
    ax.set_ylim(0, 1.3 * max(max(m.max(), f.makespan) for f, m in runs.values()))
    ax.legend(fontsize="small", loc="upper left")


def compression(cfg: DictConfig, page: Report, found: Found) -> None:
    """How the required reduction can be split over the four dimensions, one row a split."""
    table = found.closed["compression"]
    ways = table[table["product"] == table["required"]]
    order = [tuple(sorted((row[d] for d in DIMENSIONS), reverse=True)) for _, row in ways.iterrows()]
    ways = ways.assign(kind=order).sort_values(["kind", *DIMENSIONS], ascending=False, kind="stable")
    fig, ax = plt.subplots(figsize=(WIDTH, 0.24 * len(ways) + 1.5))
    colours = palette(list(DIMENSIONS))
    at, left = np.arange(len(ways))[::-1], np.zeros(len(ways))
    for name in DIMENSIONS:
        widths = np.log10(ways[name].to_numpy(float))
        ax.barh(at, widths, left=left, color=colours[name], edgecolor="white", label=name, height=0.8)
        for y, start, width, factor in zip(at, left, widths, ways[name], strict=True):
            if factor > 1:
                ax.text(start + width / 2, y, f"{factor:g}x", ha="center", va="center", color="white", fontsize=7)
        left += widths
    required = float(table["required"].iloc[0])
    ticks = [1, 2, 5, 10, 20, 50, 100, required]
    ax.set_xticks(np.log10(ticks), [f"{n:g}x" for n in ticks])
    ax.set_yticks([])
    ax.set(xlabel=f"reduction of the KV cache (logarithmic); {short(cfg.closed.long)} as small as "
           f"{short(cfg.closed.short)} needs {required:g}x", ylim=(-0.6, len(ways) - 0.4))  # fmt: skip
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, title="dimension")
    page.figure(
        "compression", fig, f"How {required:g}x splits over four dimensions",
        f"All ways with factors {', '.join(map(str, cfg.closed.levels))} that reach it exactly. All leave prefill as "
        "it is, unless tokens are dropped before attention or layers are not computed.",
    )  # fmt: skip
