"""From records to tables, figures and verdicts. Arms were trained for the comparison: the unit is a training seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact, paired_t
from common.rl import arms
from common.rl.outcomes import area, outcomes, read
from papers.klear_reasoner.method import CELLS, gppo, gradient_weight

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

LABELS = {
    "start": "start", "dapo": "clip-higher (DAPO)", "gppo": "GPPO", "cispo": "CISPO",
    "gppo_alpha_0.1": "GPPO, alpha 0.1",
    "gppo_no_filter": "GPPO, no filter", "gppo_alpha_0.05": "GPPO, alpha 0.05", "gppo_alpha_0.2": "GPPO, alpha 0.2",
    "no_clipping": "no clipping",
    "dapo_on_policy": "clip-higher, on policy",
}  # fmt: skip
SILENT = ("low, A<0", "high, A>0")  # the cells that clipping silences


@dataclass
class Found:
    """The frames that `train` and `infer` wrote, and why the start policy cannot carry the comparison, if so."""

    records: pd.DataFrame
    steps: pd.DataFrame
    evaluations: pd.DataFrame
    cells: pd.DataFrame
    tokens: pd.DataFrame
    students: pd.DataFrame
    missed: str | None


def load(cfg: DictConfig) -> Found:
    folder, metrics = Path(cfg.artifacts), Path(cfg.reasoners) / cfg.rl.start
    frames = [
        pd.read_parquet(folder / "train" / f"{name}.parquet")
        for name in ("steps", "evaluations", "cells", "tokens", "students")
    ]
    missed = None  # checkpoints of the hub have no gate
    on_chains = cfg.rl.task.name == "chain"
    kept = json.loads((metrics.parent / "metrics.json").read_text())[metrics.name] if on_chains else {"inside": True}
    if not kept["inside"]:
        low, high = kept["range"]
        missed = f"gate: sampled accuracy of the start measured {kept['sampled']:.3f}, needed {low} to {high}"
    return Found(read(folder / "infer" / "records.parquet"), *frames, missed)


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """The outcomes of all arms, tables t1 to t4 and t6, and the clipping cells."""
    table = outcomes(found.records, found.evaluations, found.steps)
    report.table("rl_outcomes", table, "Every arm and training seed", note="AES: against the start, gamma 5.")
    mean = table.groupby(["arm", "split"], sort=False)[["acc_sampled", "acc_greedy", "len_mean", "AES"]].mean()
    wide, splits = mean.unstack("split"), list(dict.fromkeys(table["split"]))
    names = list(dict.fromkeys(table["arm"]))
    report.table(
        "t1",
        pd.DataFrame(
            {
                "Model": [LABELS[a] for a in names],
                "seeds": [table[table["arm"] == a]["seed"].nunique() for a in names],
                **{
                    f"{name} {split}": wide[(column, split)].reindex(names).to_numpy()
                    for split in splits
                    for column, name in (("acc_sampled", "sampled"), ("acc_greedy", "greedy"), ("len_mean", "tokens"))
                },
                f"AES {splits[0]}": wide[("AES", splits[0])].reindex(names).to_numpy(),
            }
        ),
        note="Accuracy of sampled and of greedy answers, tokens of sampled ones; means over training seeds. longer: up "
        "to two operations more than any seen in training.",
    )
    by_arm = found.students.groupby("arm")["correct"].mean()
    for id_, columns in (
        (
            "t2",
            {
                f"{k} {n}": f"{k} {v}"
                for k in ("easy", "hard", "overall")
                for n, v in (("right only", 0), ("mixed", 0.25))
            },
        ),
        ("t3", {"10% wrong": "teacher 0.1", "5% wrong": "teacher 0.05", "none wrong": "teacher 0"}),
        ("t4", {f"Top{k}": f"top {k}" for k in (1, 2, 4, 6)}),
    ):
        row = {"Benchmark": f"chain, {cfg.students.steps[0]} to {cfg.students.steps[1]} operations"}
        row |= {name: by_arm[arm] for name, arm in columns.items() if arm in by_arm}
        if len(row) > 1:
            report.table(id_, pd.DataFrame([row]), note="Greedy accuracy of the students, mean over training seeds.")
    alphas = {
        "start": "start",
        "0": "gppo",
        "0.05": "gppo_alpha_0.05",
        "0.1": "gppo_alpha_0.1",
        "0.2": "gppo_alpha_0.2",
    }
    report.table(
        "t6",
        pd.DataFrame(
            {
                "setting": alpha if alpha == "start" else f"alpha={alpha}",
                "seeds": table[table["arm"] == arm]["seed"].nunique(),
            }
            | {split: mean["acc_sampled"].get((arm, split)) for split in splits}
            for alpha, arm in alphas.items()
        ),
        note="Accuracy of sampled answers.",
    )
    report.table("clip_cells", _cells(found), "Tokens by clipping cell and optimiser step of a rollout, clip-higher")
    _, name, seed = arms.jobs(cfg)[0]  # one shape for all: that of the start
    report_costs(report, from_checkpoint(Path(cfg.artifacts) / "train" / f"{name}-{seed}"))


def _weighted(of: pd.DataFrame, column: str) -> float:
    """Mean of a column of cells over their tokens; NaN without tokens."""
    return float(np.average(of[column].fillna(0), weights=of["tokens"])) if of["tokens"].sum() else float("nan")


def _cells(found: Found) -> pd.DataFrame:
    rows = []
    of = found.cells[found.cells["arm"] == "dapo"]
    for minibatch, part in of.groupby("minibatch"):
        total = part["tokens"].sum()
        for cell in CELLS:
            mine = part[part["cell"] == cell]
            rows.append(
                {
                    "minibatch": int(minibatch) + 1, "cell": cell, "share": mine["tokens"].sum() / max(1, total),
                    "entropy": _weighted(mine, "entropy"), "mean |A|": _weighted(mine, "size"),
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["minibatch", "cell", "share", "entropy", "mean |A|"])


def plots(cfg: DictConfig, report: Report, found: Found) -> None:
    """Accuracy and length against generated tokens; gradient weights with the ratios that occurred."""
    import matplotlib.pyplot as plt
    import torch

    from common.reporting.style import COLOURS
    from common.rl.objectives import OBJECTIVES

    shown = ("dapo", "gppo", "cispo", "no_clipping")
    fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.5))
    for axis, column, label in zip(
        axes, ("accuracy", "length"), ("accuracy, sampled", "tokens an answer"), strict=True
    ):
        for arm, colour in zip(shown, COLOURS, strict=False):
            of = found.evaluations[found.evaluations["arm"] == arm]
            mean = of.groupby("step")[["tokens_generated", column]].mean()
            axis.plot(mean["tokens_generated"] / 1000, mean[column], "o-", ms=3, color=colour, label=LABELS[arm])
            for _, line in of.groupby("seed"):
                axis.plot(line["tokens_generated"] / 1000, line[column], color=colour, lw=0.5, alpha=0.5)
        axis.set(xlabel="thousand tokens generated in training", ylabel=label)
    axes[0].legend(fontsize=8)
    report.figure(
        "curves", fig, "Learning under four clipping rules",
        "Thick: mean over the training seeds (no clipping has one). Thin: each seed. Held-out problems, temperature 1.",
    )  # fmt: skip
    fig, axes = plt.subplots(2, 2, figsize=(9.0, 5.2), sharex=True, height_ratios=(3, 1.3))
    grid = torch.linspace(0.05, 2.2, 500, dtype=torch.double)
    rules = {"dapo": OBJECTIVES["dapo"], "gppo": gppo(cfg.clip.low, cfg.clip.high), "cispo": OBJECTIVES["cispo"]}
    tokens = found.tokens[found.tokens["arm"] == "gppo"]
    for column, (sign, name) in enumerate(((1.0, "A > 0"), (-1.0, "A < 0"))):
        top, below = axes[:, column]
        for (arm, rule), colour, style in zip(rules.items(), COLOURS, ("-", "--", ":"), strict=False):
            weight = gradient_weight(grid, torch.full_like(grid, sign), rule)
            top.plot(grid, weight, style, lw=2, color=colour, label=LABELS[arm])
        mine = tokens[np.sign(tokens["advantage"]) == sign]
        below.hist(mine["ratio"].clip(0.05, 2.2), bins=np.linspace(0, 2.2, 45).tolist(), color="0.5")
        below.set_yscale("symlog")
        below.set(xlabel="probability ratio delta")
        for axis in (top, below):
            for bound in (1 - cfg.clip.low, 1 + cfg.clip.high):
                axis.axvline(bound, color="0.7", lw=0.8, zorder=0)
        top.set_title(name)
    axes[0, 0].set_ylabel("gradient weight F")
    axes[1, 0].set_ylabel("tokens")
    axes[0, 0].legend(fontsize=8)
    report.figure(
        "weights", fig, "What the clipping rules leave of a token's gradient",
        "Top: F by automatic differentiation of each surrogate. Bottom: ratios of some tokens in training with GPPO.",
    )  # fmt: skip


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim, or says why it cannot be."""
    report.not_testable("c1", "needs the 8B model, 64 samples of up to 64K tokens each: days on this machine")
    report.not_testable(
        "c9", "budget: no shared policy writes programs (common/tasks/exprs.py); it would have to be trained first"
    )
    _exact_weights(cfg, report, found)
    _students(cfg, report, found)
    for arm in ("dapo", "gppo", "cispo"):
        of = found.records[(found.records["arm"] == arm) & (found.records["kind"] == "sampled")]
        report.metric(f"accuracy {arm}", of[of["task"] != "longer"]["correct"].mean())
    missed = found.missed or _clip_gate(cfg, found)
    if missed or len(cfg.seeds) < 3:
        for id_ in ("c4", "c6", "c7", "c8", "c10"):
            report.not_testable(id_, missed or f"{len(cfg.seeds)} training seeds; needs 3")
        return
    gaps = []
    for _, of in found.cells[(found.cells["arm"] == "dapo") & (found.cells["minibatch"] > 0)].groupby("seed"):
        clipped, inside = (of[of["cell"] == cell] for cell in ("high, A>0", "inside, A>0"))
        gaps.append(_weighted(clipped, "entropy") - _weighted(inside, "entropy"))
    report.measure("c4", "entropy of tokens clipped above minus that of other tokens with A > 0", paired_t(gaps))
    final, along, deviation, norm = (_by_seed(cfg, found, of) for of in ("final", "along", "deviation", "norm"))
    report.measure("c6", "GPPO minus clip-higher, at the end", paired_t(final["gppo"], final["dapo"]))
    report.measure("c6", "GPPO minus clip-higher, mean over training", paired_t(along["gppo"], along["dapo"]))
    report.measure("c6", "GPPO minus CISPO, at the end", paired_t(final["gppo"], final["cispo"]))
    for arm in ("gppo", "cispo"):
        name = f"95th percentile of the gradient norm of {LABELS[arm]} minus twice that of clip-higher"
        detail = f"{norm[arm].mean():.2f} against {norm['dapo'].mean():.2f}"
        report.measure("c7", name, paired_t(norm[arm], 2 * norm["dapo"]), detail)
    report.measure("c8", "alpha 0.1 minus alpha 0", paired_t(final["gppo_alpha_0.1"], final["gppo"]))
    report.measure(
        "c10", "deviation of the accuracy in the second half of training, filter minus none",
        paired_t(deviation["gppo"], deviation["gppo_no_filter"]),
    )  # fmt: skip


def _clip_gate(cfg: DictConfig, found: Found) -> str | None:
    """A comparison of clipping rules says something only if some tokens, and not most, are clipped."""
    of = found.cells[found.cells["arm"] == "dapo"]
    share = of[of["cell"].isin(SILENT)]["tokens"].sum() / max(1, of["tokens"].sum())
    low, high = cfg.clip.range
    return None if low <= share <= high else f"gate: clipped tokens measured {share:.4f} of all, needed {low} to {high}"


def _by_seed(cfg: DictConfig, found: Found, what: str) -> dict[str, np.ndarray]:
    """A number for each training seed of the headline arms: accuracy at the end, its mean over training (by generated
    tokens), its deviation in the second half of training, or the 95th percentile of the gradient norm."""
    values: dict[str, np.ndarray] = {}
    for arm in cfg.headline:
        row = []
        for seed in cfg.seeds:
            on = found.evaluations[(found.evaluations["arm"] == arm) & (found.evaluations["seed"] == seed)]
            if what == "final":
                of = found.records[(found.records["arm"] == arm) & (found.records["seed"] == seed)]
                row.append(of[(of["kind"] == "sampled") & (of["task"] != "longer")]["correct"].mean())
            elif what == "along":
                row.append(area(on.to_dict("records")))
            elif what == "deviation":
                row.append(on[on["step"] >= cfg.rl.train.steps / 2]["accuracy"].std(ddof=0))
            else:
                of = found.steps[(found.steps["arm"] == arm) & (found.steps["seed"] == seed)]
                row.append(of["grad_norm"].quantile(0.95))
        values[arm] = np.array(row, dtype=float)
    return values


def _exact_weights(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claim c5, on ratios and advantages that occurred in training."""
    import torch

    from common.rl.objectives import clipped

    ratio, advantage = (torch.tensor(found.tokens[c].to_numpy(dtype=float)) for c in ("ratio", "advantage"))
    low, high = cfg.clip.low, cfg.clip.high
    below, above = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)
    both = below | above
    total = found.cells["tokens"].sum()
    occurs = found.cells[found.cells["cell"] == "low, A<0"]["tokens"].sum() / max(1, total)
    name = "tokens with A < 0 below 1 - e_low"
    if not bool(both.any()):
        report.not_testable("c5", "no token of the sample left the clip range")
        return
    silent = gradient_weight(ratio, advantage, clipped(low, high))[both].abs().max()
    bound = torch.where(below, 1 - low, 1 + high)[both]
    off = (gradient_weight(ratio, advantage, gppo(low, high))[both] - bound).abs().max()
    n = int(both.sum())
    report.measure(
        "c5", "largest gradient weight of clipping with two ends in the clipped cells", exact(float(silent), n)
    )
    report.measure(
        "c5", "largest distance of the gradient weight of GPPO from its bounds in these cells", exact(float(off), n)
    )
    report.measure("c5", name, exact(float(occurs), int(total)))


def _students(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claims c2 and c3: accuracies of students, a number a training seed."""
    seeds = len(cfg.students.seeds) if cfg.students.arms else 0
    if seeds < 3:
        for id_ in ("c2", "c3"):
            report.not_testable(id_, f"students of {seeds} training seeds; needs 3")
        return
    table = found.students.groupby(["arm", "seed"])["correct"].mean().unstack("seed")[list(cfg.students.seeds)]

    def gap(one: str, other: str) -> Measured:
        return paired_t(table.loc[one].to_numpy(), table.loc[other].to_numpy())

    for one, other in ((1, 2), (2, 4), (4, 6)):
        report.measure("c2", f"top {one} minus top {other} sources", gap(f"top {one}", f"top {other}"))
    gains = {kind: (table.loc[f"{kind} 0"] - table.loc[f"{kind} 0.25"]).to_numpy() for kind in ("easy", "hard")}
    report.measure(
        "c3", "what a filter gains on easy problems minus what it gains on hard ones",
        paired_t(gains["easy"], gains["hard"]),
    )  # fmt: skip
    report.measure("c3", "what a filter gains on hard problems", paired_t(gains["hard"]))
