"""From records to tables, figures and verdicts. Arms were trained for the comparison: the unit is a training seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, bootstrap_mean, exact, paired_t
from common.rl import arms
from common.rl.outcomes import outcomes
from papers.self_aligned_reward.answers import KINDS

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

LABELS = {
    "start": "start", "grpo": "GRPO", "self_aligned": "SA-GRPO", "self_aligned_alone": "R_SA alone",
    "confidence_alone": "R_EM alone", "self_aligned_1.0": "SA-GRPO, alpha 1", "confidence": "GRPO with R_EM",
    "o1_pruner": "GRPO-O1", "efficient_reasoner": "GRPO-ER", "ppo": "PPO", "self_aligned_ppo": "SA-PPO",
}  # fmt: skip


NO_KINDS = "answers of known kind, and what answers consist of, are for chains alone (profile=cpu)"


@dataclass
class Found:
    """What `train` and `infer` wrote, and why the start policy cannot carry the comparison, if so."""

    records: pd.DataFrame
    steps: pd.DataFrame
    evaluations: pd.DataFrame
    behaviours: pd.DataFrame
    kinds: pd.DataFrame
    tokens: pd.DataFrame
    timing: dict[str, Any]
    missed: str | None


def load(cfg: DictConfig) -> Found:
    from common.rl.outcomes import read

    folder = Path(cfg.artifacts)
    steps, evaluations = (pd.read_parquet(folder / "train" / f"{name}.parquet") for name in ("steps", "evaluations"))
    behaviours, kinds, tokens = (
        pd.read_parquet(folder / "infer" / f"{name}.parquet") for name in ("behaviours", "kinds", "tokens")
    )
    of = read(folder / "infer" / "records.parquet")
    start = of[(of["arm"] == "start") & (of["kind"] == "sampled") & (of["task"] != "longer")]["correct"].mean()
    low, high = cfg.gate
    missed = (
        None
        if low <= start <= high
        else f"gate: sampled accuracy of the start measured {start:.3f}, needed {low} to {high}"
    )
    timing = json.loads((folder / "infer" / "timing.json").read_text())
    return Found(of, steps, evaluations, behaviours, kinds, tokens, timing, missed)


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """The outcomes of all arms, tables t1 to t3, the reward by kind of answer, and what answers consist of."""
    table = outcomes(found.records, found.evaluations, found.steps)
    report.table("rl_outcomes", table, "Every arm and training seed", note="AES: against the start, gamma 5.")
    mean = table.groupby(["arm", "split"], sort=False)[["acc_sampled", "acc_greedy", "len_mean", "AES"]].mean()
    rows, splits = [], list(dict.fromkeys(table["split"]))
    for arm in dict.fromkeys(table["arm"]):
        row: dict[str, Any] = {"Model": cfg.model_name, "Method": LABELS[arm]}
        row["seeds"] = table[table["arm"] == arm]["seed"].nunique()
        for split in splits:
            at = mean.loc[(arm, split)]
            row |= {
                f"acc {split}": at["acc_sampled"],
                f"greedy {split}": at["acc_greedy"],
                f"len {split}": at["len_mean"],
            }
        rows.append(row | {"AES": mean.loc[(arm, splits[0])]["AES"]})
    report.table(
        "t1", pd.DataFrame(rows), note="Sampled answers, means over training seeds; longer: up to two operations more."
    )
    named = {
        "R_VR": "grpo", "R_EM = -log ppl(a|q)": "confidence_alone", "R_SA": "self_aligned_alone",
        "R_VR + alpha R_EM": "confidence", "R_VR + alpha R_SA": "self_aligned",
    }  # fmt: skip
    chosen = [
        {
            "Reward": name,
            "Avg acc": mean.loc[(arm, splits[0])]["acc_sampled"],
            "Avg len": mean.loc[(arm, splits[0])]["len_mean"],
        }
        for name, arm in named.items()
    ]
    report.table("t2", pd.DataFrame(chosen), note="alpha 0.2; chains of trained lengths.")
    if len(found.kinds):
        _tables_of_kinds(report, found)
    _, name, seed = arms.jobs(cfg)[0]  # one shape for all: that of the start
    report_costs(report, from_checkpoint(Path(cfg.artifacts) / "train" / f"{name}-{seed}"))


def _tables_of_kinds(report: Report, found: Found) -> None:
    report.table(
        "t3",
        _properties(found.kinds),
        note="Measured on answers of known kind to the same problems, by the start policy.",
    )
    by_kind = found.kinds.groupby("kind")[["reward", "tokens"]].mean().reindex(list(KINDS)).reset_index()
    above = [_wins(found.kinds, "concise", kind).mean() if kind != "concise" else float("nan") for kind in KINDS]
    report.table(
        "kinds", by_kind.assign(**{"concise is above": above}), "Reward of answers of known kind, by the start"
    )
    said = found.behaviours.groupby("arm", sort=False).mean().drop(columns=["seed", "segments"]).reset_index()
    report.table(
        "behaviours", said.assign(arm=said["arm"].map(LABELS)), "What sampled answers consist of, a written value"
    )


def _wins(kinds: pd.DataFrame, one: str, other: str) -> np.ndarray:
    """1 where an answer of one kind has the higher reward, 0.5 for ties, by problem."""
    a, b = (kinds[kinds["kind"] == k].sort_values("problem")["reward"].to_numpy() for k in (one, other))
    return (np.sign(a - b) + 1) / 2


def _properties(kinds: pd.DataFrame) -> pd.DataFrame:
    """Correctness, length and self-alignment as rewards of the same answers: what each of them sees."""
    from scipy import stats

    right = ~kinds["kind"].isin(["last step wrong", "all steps wrong", "of another problem"])
    rewards = {
        "Correctness": right.astype(float),
        "Length penalty": -kinds["tokens"].astype(float),
        "Self-aligned": kinds["reward"],
    }
    rows = []
    for name, values in rewards.items():
        of = kinds.assign(value=values, right=right)
        good = of[of["right"]]
        swapped = of[of["kind"].isin(["concise", "of another problem"])].pivot(
            index="problem", columns="kind", values="value"
        )
        constant = good["value"].nunique() == 1
        rows.append(
            {
                "Reward": name,
                "distinct values": int(of["value"].round(6).nunique()),
                "rank correlation with correctness": 1.0
                if name == "Correctness"
                else stats.spearmanr(of["value"], of["right"]).statistic,
                "with length, right answers": float("nan")
                if constant
                else stats.spearmanr(good["value"], good["tokens"]).statistic,
                "prefers the own answer to another problem's": float(
                    (swapped["concise"] > swapped["of another problem"]).mean()
                ),
            }
        )
    return pd.DataFrame(rows)


def plots(cfg: DictConfig, report: Report, found: Found) -> None:
    """One problem's answers token by token, the reward by kind, and accuracy against length."""
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS

    if len(found.kinds):
        _plot_information(report, found)
    table = outcomes(found.records, found.evaluations, found.steps)
    of = table[table["split"] != "longer"].groupby("arm", sort=False)[["acc_sampled", "len_mean"]].mean()
    fig, axes = plt.subplots(1, 2, figsize=(11.0, 3.8), width_ratios=(1, 1.1))
    if len(found.kinds):
        values = [found.kinds[found.kinds["kind"] == kind]["reward"].to_numpy() for kind in KINDS]
        axes[0].boxplot(values, orientation="horizontal", showfliers=False, medianprops={"color": COLOURS[1]})
        axes[0].set(yticks=range(1, len(KINDS) + 1), yticklabels=KINDS, xlabel="self-aligned reward, start policy")
        axes[0].invert_yaxis()
    else:
        axes[0].set_axis_off()
    near = axes[1].inset_axes((0.13, 0.36, 0.5, 0.42))
    close = of[(of["acc_sampled"] - of["acc_sampled"]["grpo"]).abs() < 0.05]
    markers = "oosD^vPX*<>"
    for (arm, row), colour, marker in zip(of.iterrows(), [*COLOURS, *COLOURS], markers, strict=False):
        for axis in (axes[1], near) if arm in close.index else (axes[1],):
            axis.plot(row["len_mean"], row["acc_sampled"], marker, color=colour, label=LABELS[str(arm)])
    near.margins(0.2)
    near.tick_params(labelsize=7)
    axes[1].indicate_inset_zoom(near)
    axes[1].margins(0.12)
    axes[1].set(xlabel="tokens an answer", ylabel="accuracy, sampled")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    report.figure(
        "frontier", fig, "What the reward prefers, and what training with it gives",
        "Left: quartiles over problems. Right: mean over training seeds of each arm; up and to the left is better.",
    )  # fmt: skip


def _plot_information(report: Report, found: Found) -> None:
    """One problem's answers, token by token."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    shown = ("concise", "padded", "verified", "of another problem")
    largest = max(1e-6, float(found.tokens["information"].abs().quantile(0.95)))
    longest = int(found.tokens["place"].max()) + 1
    fig, axis = plt.subplots(figsize=(min(13.0, 2.4 + 0.24 * longest), 2.6))
    colours = plt.get_cmap("PuOr_r")
    for line, kind in enumerate(shown):
        for row in found.tokens[found.tokens["kind"] == kind].itertuples():
            face = colours(0.5 + 0.38 * float(np.clip(row.information / largest, -1, 1)))
            axis.add_patch(Rectangle((row.place, line), 1, 0.86, facecolor=face, edgecolor="white", lw=0.5))
            axis.text(row.place + 0.5, line + 0.43, row.token, ha="center", va="center", fontsize=8, family="monospace")
    axis.set(
        xlim=(0, longest),
        ylim=(len(shown), 0),
        xlabel="token of the answer",
        yticks=np.arange(len(shown)) + 0.43,
        yticklabels=shown,
    )
    axis.grid(False)
    fig.colorbar(
        plt.cm.ScalarMappable(plt.Normalize(-largest, largest), colours),
        ax=axis,
        label="information, nats",
        fraction=0.03,
        pad=0.01,
    )
    report.figure(
        "information", fig, "What the question tells about each token",
        "v of each token: its log-probability with the question minus without, start policy, one problem.",
    )  # fmt: skip


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim, or says why it cannot be."""
    for one, other, claim in (
        ("concise", "padded", "c3"), ("concise", "verified", "c3"),
        ("last step wrong", "all steps wrong", "c4"), ("last step wrong", "of another problem", "c4"),
    ):  # fmt: skip
        named = {"of another problem": "an answer to another problem"}.get(other, other)
        if not len(found.kinds):
            report.not_testable(claim, NO_KINDS)
            continue
        report.measure(claim, f"{one} above {named}", bootstrap_mean(_wins(found.kinds, one, other), seed=cfg.seed))
    report.not_testable(
        "c5", "budget: the frontier needs several weights of each reward with three training seeds each, some 30 runs; "
        "single points of one seed are in table t1",
    )  # fmt: skip
    timing = found.timing
    report.measure(
        "c8", "time of a step with the reward over without",
        Measured(timing["ratio"], timing["low"], timing["high"], timing["n"]),
        "contended: another process was using the cores" if timing["contended"] else "",
    )  # fmt: skip
    report.measure("c8", "further forward passes a rollout", exact(timing["passes"]))
    missed = found.missed
    if missed or len(cfg.seeds) < 3:
        for id_ in ("c1", "c2", "c6", "c7"):
            report.not_testable(id_, missed or f"{len(cfg.seeds)} training seeds; needs 3")
        return
    of = found.records[(found.records["kind"] == "sampled") & (found.records["task"] != "longer")]
    by = of.groupby(["arm", "seed"])[["correct", "output_tokens"]].mean()
    accuracy, length = (
        {a: by[c].loc[a].loc[list(cfg.seeds)].to_numpy(dtype=float) for a in cfg.headline}
        for c in ("correct", "output_tokens")
    )
    for arm in cfg.headline:
        report.metric(f"accuracy {arm}", float(accuracy[arm].mean()))
        report.metric(f"tokens {arm}", float(length[arm].mean()))
    gain = paired_t(accuracy["self_aligned"], accuracy["grpo"])
    report.measure("c1", "self-aligned reward minus GRPO", gain)
    report.measure("c2", "tokens saved against GRPO", paired_t(1 - length["self_aligned"] / length["grpo"]))
    if len(found.kinds):
        corrections = found.behaviours.set_index(["arm", "seed"])["corrections"]
        kept, usual = (corrections.loc[a].loc[list(cfg.seeds)].to_numpy(dtype=float) for a in ("self_aligned", "grpo"))
        report.measure(
            "c6", "corrections of the self-aligned reward minus 0.8 times those of GRPO", paired_t(kept, 0.8 * usual)
        )
    else:
        report.not_testable("c6", NO_KINDS)
    for arm, name in (("self_aligned_alone", "self-aligned alone"), ("confidence_alone", "confidence alone")):
        report.measure("c7", f"{name} minus GRPO", paired_t(accuracy[arm], accuracy["grpo"]))
    report.measure(
        "c7", "self-aligned alone minus GRPO, tokens", paired_t(length["self_aligned_alone"], length["grpo"])
    )
    report.measure("c7", "self-aligned and right answers minus GRPO", gain)
