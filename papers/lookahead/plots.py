"""Figures from what `infer` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap

from common.generation.tree import tree_mask
from common.reporting.style import COLOURS, WIDTH, palette
from papers.lookahead.judge import Measurements, per_pass
from papers.lookahead.prompts import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

DECODERS = {"greedy": "#000000", "prompt lookup": "#999999", "one": COLOURS[4], "par": COLOURS[5], "hier": COLOURS[0]}
ACCEPTED, OTHER = COLOURS[1], "#B8C4CC"


def figures(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    """Draws and registers every figure."""
    example = json.loads((Path(cfg.artifacts) / "infer" / "example.json").read_text())
    _draft(cfg, report, measured, example)
    _decoders(cfg, report, measured)
    _warm_up(cfg, report, measured)
    _depth(cfg, report, measured)
    _sizes(cfg, report, measured)


def _draft(cfg: DictConfig, report: Report, measured: Measurements, example: dict[str, Any]) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH * 1.35, 3.6), width_ratios=(1.5, 1, 1.15))
    draw_tree(axes[0], example["words"], example["parents"], example["path"])
    draw_mask(axes[1], example["parents"], example["path"])
    latency, runs = measured["latency"], measured["runs"]
    for (model, rows), colour in zip(latency.groupby("model", sort=False), (COLOURS[0], COLOURS[2]), strict=False):
        name = "trained model" if model == cfg.models[0] else str(model)
        axes[2].plot(rows["tokens"], rows["ratio"], "o-", color=colour, label=name, markersize=4)
    grounded_task = cfg.roles.grounded
    grounded = runs[(runs["model"] == cfg.models[0]) & (runs["task"] == grounded_task) & (runs["arm"] == "hier")]
    committed = per_pass(grounded)
    axes[2].axhline(committed, color=ACCEPTED, linestyle="--", label=f"tokens committed per pass ({committed:.1f})")
    axes[2].set(xscale="log", yscale="log", xlabel="tokens in the pass, T", ylabel="time of a pass, t(T) / t(1)")
    axes[2].set_xticks(latency["tokens"].unique(), latency["tokens"].unique())
    axes[2].set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes[2].minorticks_off()
    axes[2].set_ylim(0.8, max(8.0, latency["ratio"].max() * 2.5))
    axes[2].set_title("what a draft may cost", fontsize=9)
    axes[2].legend(fontsize=7, loc="upper left")
    report.figure(
        "draft",
        fig,
        "A draft tree, its mask, and the time of a pass",
        "Left: the draft that follows the last committed token (root); orange: the path that the model took. Middle: "
        "each row sees the committed text, itself and the nodes above it. Right: a draft pays off where the "
        "time of its pass, in passes with one token, lies below the tokens that it commits (dashed: "
        f"{TITLES[grounded_task]}).",
    )


def draw_tree(ax: Axes, words: list[str], parents: list[int], path: list[int]) -> None:
    """A draft tree from left to right; the path in colour."""
    _, depth = tree_mask(parents)
    row, height = {}, 0.0
    for node in range(len(parents)):  # depth-first order: a leaf takes the next line, a node that of its first leaf
        first_child = node + 1 < len(parents) and parents[node + 1] == node
        row[node] = height
        height += 0.0 if first_child else 1.0
    for node in range(1, len(parents)):
        taken = node in path and parents[node] in path
        x, y = [depth[parents[node]], depth[node]], [row[parents[node]], row[node]]
        ax.plot(x, y, color=ACCEPTED if taken else OTHER, linewidth=2 if taken else 1, zorder=1)
    for node, word in enumerate(words):
        colour = ACCEPTED if node in path else "#444444"
        ax.text(
            depth[node],
            row[node],
            shown(word),
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour, "linewidth": 0.8},
        )
    ax.set(xlim=(-0.6, max(depth) + 0.6), ylim=(height - 0.4, -0.6), yticks=[])
    ax.set_xticks(range(max(depth) + 1), [str(d) if d else "root" for d in range(max(depth) + 1)])
    ax.set_xlabel("depth in the draft")
    ax.set_title("draft, accepted path in orange", fontsize=9)
    ax.grid(False)
    ax.spines["left"].set_visible(False)


def shown(word: str) -> str:
    """A token as text: white space made visible where the token is nothing else, and what has no glyph as a dot."""
    text = word.strip() or repr(word)[1:-1].replace(" ", "\u2423")
    return "".join(letter if letter.isprintable() else "\u00b7" for letter in text)


def draw_mask(ax: Axes, parents: list[int], path: list[int]) -> None:
    """Which draft node (row) sees which (column); rows of the path in colour."""
    mask, _ = tree_mask(parents)
    picture = mask.astype(int)
    picture[path] *= 2
    ax.imshow(picture, cmap=ListedColormap(["#F2F2F2", "#7F8C96", ACCEPTED]), vmin=0, vmax=2, interpolation="none")
    ax.set(xlabel="seen node", ylabel="node of the draft")
    ax.set_title("attention mask", fontsize=9)
    ax.grid(False)


def _short(task: str) -> str:
    return TITLES[task].partition(",")[0]


def _decoders(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    runs = measured["runs"][measured["runs"]["model"] == cfg.models[0]]
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
    width = 0.8 / len(DECODERS)
    for place, (arm, colour) in enumerate(DECODERS.items()):
        heights = [per_pass(runs[(runs["task"] == task) & (runs["arm"] == arm)]) for task in cfg.tasks]
        x = np.arange(len(cfg.tasks)) + (place - (len(DECODERS) - 1) / 2) * width
        name = arm if arm in ("greedy", "prompt lookup") else f"lookahead, {arm}"
        bars = ax.bar(x, heights, width * 0.92, color=colour, label=name)
        ax.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    ax.set_xticks(range(len(cfg.tasks)), [TITLES[task].replace(", ", ",\n") for task in cfg.tasks], fontsize=9)
    ax.set(ylabel="tokens per forward pass")
    ax.grid(axis="x", visible=False)
    ax.legend(ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2, handlelength=1.2)
    report.figure(
        "decoders",
        fig,
        "Tokens per forward pass by task and decoder",
        f"Main model, {runs['problem'].nunique()} test prompts a task, sizes chosen on train prompts. Every decoder "
        "gives greedy's text.",
    )


def _lines(measured: pd.DataFrame, by: str) -> dict[str, tuple[list[float], list[float]]]:
    out = {}
    for task, rows in measured.groupby("task", sort=False):
        grouped = list(rows.groupby(by))
        out[str(task)] = ([float(key) for key, _ in grouped], [per_pass(group) for _, group in grouped])
    return out


def _warm_up(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    fig, ax = plt.subplots(figsize=(WIDTH, 3.0))
    colours = palette(list(cfg.tasks))
    for (task, (x, y)), marker in zip(_lines(measured["warmup"], "answers").items(), "osD^v", strict=False):
        ax.plot(x, y, marker=marker, color=colours[task], label=_short(task))
    ax.set_xscale("symlog", base=4, linthresh=4)
    ax.set_xticks(list(cfg.sweep.warm), list(cfg.sweep.warm))
    ax.minorticks_off()
    ax.set(xlabel="answers in the trie before the first test prompt", ylabel="tokens per forward pass")
    ax.set_ylim(0, 1.1 * ax.dataLim.y1)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    report.figure(
        "warmup",
        fig,
        "A trie that has seen more answers drafts better",
        f"Main model, mode hier, decoding_length {cfg.decoding_length}, branch_length {cfg.branch_length}. With 0 "
        "answers the trie learns from the prompts and from the test prompts answered so far.",
    )


def _depth(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    fig, ax = plt.subplots(figsize=(WIDTH, 3.0))
    colours = palette(list(cfg.tasks))
    hier = measured["defaults"][measured["defaults"]["mode"] == "hier"]
    depths = np.arange(1, cfg.branch_length + 1)
    for (task, rows), marker in zip(hier.groupby("task", sort=False), "osD^v", strict=False):
        committed = np.concatenate(rows["accepted"].to_list())
        shares = [(committed > d).mean() for d in depths]
        ax.plot(depths, shares, marker=marker, color=colours[task], label=_short(str(task)))
    ax.set(xlabel="depth in the draft", ylabel="share of passes accepted so deep", ylim=(0, 1))
    ax.set_xticks(depths)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    report.figure(
        "depth",
        fig,
        "How deep drafts are accepted",
        f"Main model, mode hier, decoding_length {cfg.decoding_length}, branch_length {cfg.branch_length}.",
    )


def _sizes(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    sweep = measured["sweep"].query("mode == 'hier' and source == 'mix' and drafts == 'as described'")
    tables = {
        task: rows.pivot(index="branch_length", columns="decoding_length", values="tokens_per_pass")
        for task, rows in sweep.groupby("task", sort=False)
    }
    largest = max(2.0, 1.15 * sweep["tokens_per_pass"].max())
    fig, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 2.4), sharey=True, squeeze=False)
    for ax, (task, table) in zip(axes[0], tables.items(), strict=True):
        ax.imshow(table, cmap="Blues", vmin=1, vmax=largest, aspect="auto")
        for (i, j), value in np.ndenumerate(table.to_numpy()):
            bright = value - 1 > 0.6 * (largest - 1)
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if bright else "black")
        ax.set_xticks(range(len(table.columns)), table.columns)
        ax.set_yticks(range(len(table.index)), table.index)
        ax.set_title(_short(str(task)), fontsize=9)
        ax.grid(False)
    axes[0, 0].set_ylabel("branch_length")
    fig.supxlabel("decoding_length", fontsize=10)
    report.figure(
        "sizes",
        fig,
        "Tokens per forward pass by decoding_length and branch_length",
        f"Main model, mode hier, source mix, {cfg.sweep.prompts} test prompts a task.",
    )
