"""From records to tables, figures and verdicts. Arms were trained for the comparison: the unit is a training seed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact, paired_bootstrap, paired_t
from common.rl import arms
from common.rl.outcomes import read
from papers.anytime_reasoner.method import parts, prior

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

    from common.reporting.report import Report

LABELS = {
    "start": "start", "grpo": "GRPO", "grpo_linear": "GRPO+linear", "grpo_decouple": "GRPO+decouple",
    "grpo_vr": "GRPO+vr", "ar_base": "AR-base", "ar_linear": "AR-linear", "ar_uniform": "AR-uniform",
    "length_penalty_1": "length penalty 1", "length_penalty_2": "length penalty 2",
}  # fmt: skip
COLUMNS = (
    "By difficulty: operations of a chain (7 and 8: more than any in training), or a level. Means over training seeds."
)
OPERATION = r"[A-T][+*-]\d"
PRIORS = ("ar_base", "ar_linear", "ar_uniform")


@dataclass
class Found:
    """What `train` and `infer` wrote. accuracy: [arm, seed, budget] -> mean over held-out problems. rewards: of the
    start, [P, G, m]. missed: why forced answers say nothing here, if so."""

    records: pd.DataFrame
    thoughts: pd.DataFrame
    steps: pd.DataFrame
    evaluations: pd.DataFrame
    accuracy: pd.Series
    rewards: np.ndarray
    reached: np.ndarray
    timing: dict[str, Any]
    missed: str | None


def load(cfg: DictConfig) -> Found:
    folder = Path(cfg.artifacts)
    steps, evaluations = (pd.read_parquet(folder / "train" / f"{name}.parquet") for name in ("steps", "evaluations"))
    of = read(folder / "infer" / "records.parquet")
    of = of.assign(budget=of["kind"].astype(int))
    accuracy = of[of["task"] != "longer"].groupby(["arm", "seed", "budget"], sort=False)["correct"].mean()
    start = accuracy.loc["start", 0]
    first, last = (float(start[b]) for b in (min(cfg.arms.ar_uniform.forcing.budgets), max(cfg.sweep.budgets)))
    rise = cfg.gate.rise
    missed = None if last - first >= rise else (
        f"gate: the start's accuracy rises by {last - first:.3f} from the first to the last budget, needed {rise}"
    )  # fmt: skip
    with np.load(folder / "infer" / "rewards.npz") as arrays:
        rewards, reached = arrays["rewards"], arrays["reached"]
    timing = json.loads((folder / "infer" / "timing.json").read_text())
    thoughts = pd.read_parquet(folder / "infer" / "thoughts.parquet")
    return Found(of, thoughts, steps, evaluations, accuracy, rewards, reached, timing, missed)


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """Tables t1 and t2, every arm and seed, accuracy by budget, the variance of baselines, thoughts by budget."""
    last = max(cfg.sweep.budgets)
    report.table(
        "t1", _by_difficulty(cfg, found.records[found.records["budget"] == last]), note=f"At {last} tokens. {COLUMNS}"
    )
    report.table("t2", _by_difficulty(cfg, found.records), note=f"Mean over the budgets of the sweep. {COLUMNS}")
    report.table(
        "rl_outcomes", _outcomes(found), "Every arm and training seed",
        note="Held-out chains of the trained lengths. step, entropy, tokens: of the training run.",
    )  # fmt: skip
    wide = found.accuracy.groupby(["arm", "budget"], sort=False).mean().unstack("budget")
    report.table(
        "budgets", wide.rename(index=LABELS).reset_index(names="arm"), "Accuracy at each budget",
        note="Mean over training seeds; the same thoughts, cut at each budget and answered greedily.",
    )  # fmt: skip
    report.table(
        "variance", _variance(cfg, found), "What baselines leave of the variance of the return, by budget",
        note="Start policy, uniform prior. ratio: Var[R - V] / Var[R] over all thoughts; reaching: over those that are "
        "longer than the budget before. corr: of V and R.",
    )  # fmt: skip
    test = found.thoughts[found.thoughts["task"] != "longer"]
    shares = {
        b: test.assign(done=test["finished"] & (test["length"] <= b)).groupby("arm", sort=False)["done"].mean()
        for b in cfg.sweep.budgets
    }
    report.table(
        "finished", pd.DataFrame(shares).rename(index=LABELS).reset_index(names="arm"),
        "Share of thoughts that have ended by themselves at each budget",
    )  # fmt: skip
    if cfg.rl.task.name == "chain":
        report.table(
            "left", _by_operations_left(found), "Accuracy by how many operations a cut thought has left",
            note="All budgets, chains of the trained lengths, means over training seeds; share: of the start's cuts. "
            "An operation is left until the ',' after its segment.",
        )  # fmt: skip
    timing = found.timing
    rows = [{"arm": LABELS[name], "seconds a step": timing[name]} for name in ("grpo", "ar_uniform")]
    report.table("overhead", pd.DataFrame(rows), "Time of a training step", timing=["seconds a step"])
    _, name, seed = arms.jobs(cfg)[0]  # one shape for all: that of the start
    report_costs(report, from_checkpoint(Path(cfg.artifacts) / "train" / f"{name}-{seed}"))


def _by_difficulty(cfg: DictConfig, records: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for arm, of in records.groupby("arm", sort=False):
        row: dict[str, Any] = {"Algorithm": LABELS[str(arm)], "seeds": of["seed"].nunique()}
        found = {
            f"{low}-{high}" if low < high else str(low): of[of["difficulty"].between(low, high)]["correct"].mean()
            for low, high in cfg.groups
        }
        rows.append(row | found | {"Avg": np.mean(list(found.values()))})
    return pd.DataFrame(rows)


def operations_left(prompt: str, thought: str) -> int:
    """Operations of a chain that a thought has not yet written in whole segments."""
    *whole, _ = thought.split(",")
    return len(re.findall(OPERATION, prompt)) - len(re.findall(OPERATION, ",".join(whole)))


def _by_operations_left(found: Found) -> pd.DataFrame:
    thoughts = found.thoughts.set_index(["arm", "seed", "task", "problem_id"])
    of = found.records[found.records["task"] != "longer"].join(thoughts, on=["arm", "seed", "task", "problem_id"])
    # A token of chains is one character but for the numbers of other tasks, so that a cut text is a prefix.
    left = [operations_left(row.prompt, row.text[: row.budget]) for row in of.itertuples()]
    of = of.assign(left=np.clip(left, 0, 4))
    wide = of.groupby(["arm", "left"], sort=False)["correct"].mean().unstack("left")[sorted(set(of["left"]))]
    share = of[of["arm"] == "start"]["left"].value_counts(normalize=True)
    table = pd.concat([wide.rename(index=LABELS), share.rename("share").to_frame().T])
    return table.rename(columns={4: "4 or more"}).reset_index(names="arm")


def _outcomes(found: Found) -> pd.DataFrame:
    rows = []
    for (arm, seed), of in found.accuracy.groupby(["arm", "seed"], sort=False):
        thoughts = found.thoughts[(found.thoughts["arm"] == arm) & (found.thoughts["seed"] == seed)]
        thoughts = thoughts[thoughts["task"] != "longer"]
        row = {
            "arm": LABELS[str(arm)], "seed": seed, "anytime": of.mean(), "final": of.iloc[-1],
            "thought": thoughts["length"].mean(), "finished": thoughts["finished"].mean(),
        }  # fmt: skip
        way = found.steps[(found.steps["arm"] == arm) & (found.steps["seed"] == seed)]
        if len(way):
            row |= {key: way.iloc[-1][key] for key in ("step", "entropy", "tokens_generated")}
            row["tokens_trained"] = way["tokens_trained"].sum()
        rows.append(row)
    return pd.DataFrame(rows)


def baselines(rewards: np.ndarray, weights: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns [P, G, m] and the three baselines of the same shape."""
    import torch

    of = parts(torch.tensor(rewards, dtype=torch.float64), weights)
    return of.returns.numpy(), {"V1": of.v1.numpy(), "V2": of.v2.numpy(), "BRPO": of.mixed.numpy()}


def left_over(returns: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Var[R - V] / Var[R] [m] over all thoughts; NaN where R does not vary."""
    flat, rest = returns.reshape(-1, returns.shape[-1]), (returns - baseline).reshape(-1, returns.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return rest.var(0) / flat.var(0)


def _variance(cfg: DictConfig, found: Found) -> pd.DataFrame:
    budgets = list(cfg.sweep.budgets)
    returns, of = baselines(found.rewards, prior("uniform", budgets))
    rows = [{"budget": b, "thoughts that reach it": found.reached[..., j].mean()} for j, b in enumerate(budgets)]
    for name, baseline in of.items():
        ratios = left_over(returns, baseline)
        for j, row in enumerate(rows):
            there = found.reached[..., j]
            r, v = returns[..., j], baseline[..., j]
            row[f"ratio {name}"] = ratios[j]
            row[f"reaching {name}"] = (
                (r - v)[there].var() / r[there].var() if there.sum() > 1 and r[there].var() else np.nan
            )
            row[f"corr {name}"] = np.corrcoef(r.ravel(), v.ravel())[0, 1] if v.var() and r.var() else np.nan
    return pd.DataFrame(rows)


def plots(cfg: DictConfig, report: Report, found: Found) -> None:
    """Accuracy by budget with the priors beneath, learning curves, and what baselines leave of the variance."""
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS

    budgets = list(cfg.sweep.budgets)
    shown = dict(zip(("start", "grpo", "grpo_decouple", *PRIORS), [COLOURS[6], *COLOURS[:5]], strict=True))
    by_budget = found.accuracy.groupby(["arm", "budget"], sort=False).mean()
    train = list(cfg.arms.ar_uniform.forcing.budgets)
    fig, (axis, gap, below) = plt.subplots(3, 1, figsize=(6.6, 6.8), sharex=True, height_ratios=(3, 2.4, 1))
    for arm in ("start", "grpo", "ar_uniform"):
        axis.plot(budgets, by_budget.loc[arm], "o-", ms=3, color=shown[arm], label=LABELS[arm])
    axis.fill_between(budgets, by_budget.loc["grpo"], by_budget.loc["ar_uniform"], color=COLOURS[4], alpha=0.2, lw=0)
    for arm in ("grpo_decouple", *PRIORS):
        difference = 100 * (by_budget.loc[arm] - by_budget.loc["grpo"])
        gap.plot(budgets, difference, "o-", ms=3, color=shown[arm], label=LABELS[arm])
    gap.axhline(0, color=shown["grpo"], lw=1.2)
    axis.set(ylabel="accuracy")
    gap.set(ylabel="minus GRPO, points")
    for with_labels in (axis, gap):
        with_labels.legend(fontsize=8)
    for place, arm in enumerate(PRIORS):
        name = arm.removeprefix("ar_")
        weights = prior(name, train).numpy()
        below.bar(np.array(train) + (place - 1) * 1.1, weights, width=1.0, color=shown[arm], label=name)
    below.set(xlabel="thinking budget, tokens", ylabel="prior", ylim=(0, 1.05))
    report.figure(
        "budgets", fig, "Accuracy at every budget",
        "Mean over training seeds. The same thoughts are cut at each budget. Below: priors over budgets in training.",
    )  # fmt: skip
    _curves(report, found, shown)
    table = _variance(cfg, found)
    fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.4), sharex=True)
    for name, colour in zip(("V1", "V2", "BRPO"), COLOURS, strict=False):
        axes[0].plot(
            budgets, table[f"ratio {name}"], "o-", ms=3, color=colour, label=f"{name} alone" if name != "BRPO" else name
        )
        axes[1].plot(budgets, table[f"corr {name}"], "o-", ms=3, color=colour)
    axes[0].set(ylabel="Var[R - V] / Var[R]", xlabel="up to budget, tokens")
    axes[1].set(ylabel="correlation of V and R", xlabel="up to budget, tokens")
    axes[0].legend(fontsize=8)
    report.figure(
        "variance", fig, "What a baseline takes out of the return's variance",
        "Start policy, uniform prior, all thoughts. V1: what the thought has reached; V2: the group's mean.",
    )  # fmt: skip


def _curves(report: Report, found: Found, shown: dict[str, str]) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(11.0, 3.4), sharex=True)
    columns = {
        "anytime": "anytime accuracy",
        "accuracy": "accuracy at the last budget",
        "length": "tokens of a thought",
    }

    def draw(axis: Axes, arm: str, column: str) -> None:
        of = found.evaluations[found.evaluations["arm"] == arm]
        mean = of.groupby("step")[["tokens_generated", column]].mean()
        axis.plot(mean["tokens_generated"] / 1000, mean[column], "o-", ms=3, color=shown[arm], label=LABELS[arm])

    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for arm in shown:
            if arm != "start":
                draw(axis, arm, column)
        axis.set(xlabel="thousand tokens generated in training", ylabel=label)
    axes[0].legend(fontsize=8)
    report.figure(
        "curves", fig, "Learning",
        "Held-out problems, mean over training seeds. Arms with several answers a thought generate more tokens a step. "
        "Anytime accuracy: mean over four budgets, for every arm.",
    )  # fmt: skip


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim, or says why it cannot be."""
    report.not_testable(
        "c6", "budget: equal lengths need a sweep over the penalties' weights with three seeds each; profile=gpu "
        "trains both penalties with one weight",
    )  # fmt: skip
    report.not_testable(
        "c9", f"scale: answers of 2 tokens at four budgets weigh much beside thoughts of some 25; a step takes "
        f"{found.timing['ratio']:.2f} times that of GRPO here",
    )  # fmt: skip
    timing = found.timing
    ratio = Measured(timing["ratio"], timing["low"], timing["high"], timing["n"])
    report.measure("c9", "time of a step over that of GRPO", ratio)
    _bounds(cfg, report, found)
    _baselines(cfg, report, found)
    anytime, final = (found.accuracy.groupby(["arm", "seed"]).agg(how) for how in ("mean", "last"))
    for arm in (a for a in LABELS if a in anytime.index.get_level_values(0)):
        report.metric(f"anytime {LABELS[arm]}", anytime.loc[arm].mean())
    if found.missed or len(cfg.seeds) < 3:
        for id_ in ("c1", "c2", "c3", "c4", "c5", "c7"):
            report.not_testable(id_, found.missed or f"{len(cfg.seeds)} training seeds; needs 3")
        return

    def gap(of: pd.Series, one: str, other: str) -> Measured:
        a, b = (of.loc[arm].loc[list(cfg.seeds)].to_numpy(dtype=float) for arm in (one, other))
        return paired_t(a, b)

    at = found.accuracy.unstack("budget")
    below = 0
    for arm in PRIORS:
        report.measure("c1", f"{LABELS[arm]} minus GRPO, mean over budgets", gap(anytime, arm, "grpo"))
        report.measure("c2", f"{LABELS[arm]} minus GRPO, last budget", gap(final, arm, "grpo"))
        below += sum(gap(at[budget], arm, "grpo").high < 0 for budget in at.columns)
    of_all = len(PRIORS) * len(at.columns)
    report.measure("c1", "budgets and priors at which the interval lies below GRPO", exact(below, of_all))
    report.measure("c3", "AR-uniform minus GRPO, anytime accuracy", gap(anytime, "ar_uniform", "grpo"))
    small = at[sorted(at.columns)[:2]].mean(axis=1)
    report.measure("c4", "uniform minus linear, two smallest budgets", gap(small, "ar_uniform", "ar_linear"))
    report.measure("c4", "linear minus base, two smallest budgets", gap(small, "ar_linear", "ar_base"))
    ends = np.array([final.loc[arm].loc[list(cfg.seeds)].to_numpy(dtype=float) for arm in PRIORS])
    spread = paired_t(ends.max(0) - ends.min(0))
    report.measure("c4", "largest minus smallest of the three priors, last budget", spread)
    lengths = found.thoughts[found.thoughts["task"] != "longer"].groupby(["arm", "seed"])["length"].mean()
    report.measure("c5", "GRPO+linear minus GRPO, tokens of a thought", gap(lengths, "grpo_linear", "grpo"))
    report.measure("c5", "GRPO+linear minus GRPO, anytime accuracy", gap(anytime, "grpo_linear", "grpo"))
    report.measure("c7", "GRPO+decouple minus GRPO, anytime accuracy", gap(anytime, "grpo_decouple", "grpo"))


def _bounds(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claim c10: the best answer of all budgets so far, as an optimal answering policy would give at least."""
    best = np.maximum.accumulate(found.rewards, axis=2).mean(1)  # [P, m], by question
    broken = 0
    for name in ("uniform", "linear"):
        weights = prior(name, list(cfg.sweep.budgets)).double().numpy()
        anytime, final = best @ weights, best[:, -1]
        broken += int((anytime > final + 1e-9).sum() + (final > anytime / weights[-1] + 1e-9).sum())
    report.measure("c10", "questions that break a bound", exact(broken, 2 * len(best)))


def _baselines(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claim c8, with intervals over questions: groups are resampled whole."""
    returns, of = baselines(found.rewards, prior("uniform", list(cfg.sweep.budgets)))
    ratios = {name: left_over(returns, baseline) for name, baseline in of.items()}
    if not np.isfinite(ratios["V2"]).all():
        report.not_testable(
            "c8", "the start's answers are all right or all wrong at some budget: no variance to reduce"
        )
        return
    stacked = np.stack([returns, of["V1"], of["V2"], of["BRPO"]], axis=-1)

    def excess(rows: np.ndarray, _: np.ndarray) -> float:
        v1, v2, both = (left_over(rows[..., 0], rows[..., k]) for k in (1, 2, 3))
        return float(np.nanmax(both - np.minimum(v1, v2)))

    def late(rows: np.ndarray, _: np.ndarray) -> float:
        v2, both = (left_over(rows[..., 0], rows[..., k]) for k in (2, 3))
        return float(np.nanmean((both - v2)[-2:]))

    blank = np.zeros(len(stacked))
    name = "largest excess of BRPO over the better of V1 and V2, over budgets"
    report.measure("c8", name, paired_bootstrap(stacked, blank, excess, seed=cfg.seed))
    report.measure(
        "c8", "BRPO minus V2 only, two largest budgets", paired_bootstrap(stacked, blank, late, seed=cfg.seed)
    )
