"""Every part of every claim, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs import idealized_runtime as ir
from common.metrics.intervals import Measured, bootstrap_mean, exact, paired_bootstrap
from papers.idealized_runtime import analysis, published, tables

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report
    from papers.idealized_runtime.analysis import Found, Market

SIZES = ("small", "base", "large")
CSV_NAMES = {"anthropic": "anthropic_stanford-online-helpful-v4-s3"} | {
    name: f"{'ai21' if name.startswith('j1') else 'openai'}_{name}"
    for name in ("text-davinci-001", "text-davinci-002", "text-curie-001", "davinci", "j1-jumbo", "curie", "j1-large")
}


def judge(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures what can be measured, and says why the rest cannot."""
    if found.absent:
        for claim in ("c1", "c2", "c3", "c4", "c5", "c7", "c8"):
            report.not_testable(claim, found.absent)
    if found.scenarios is not None:
        _released_table(report, found.scenarios)
    if found.cells is not None:
        _released_logs(report, found)
    worst = analysis.worst_over_rounds(cfg, found)
    shown = f"{cfg.dtype}; rounds as units; the worst of {len(found.shapes)} models"
    report.measure("c3", "own models: least R squared", worst["r_squared"], shown)
    report.measure(
        "c3", "own models: largest error at a held-out number of output tokens", worst["other_output"], shown
    )
    report.measure("c4", "own models: full sweep over cheap procedure, least", worst["saving"], shown)
    report.measure("c4", "own models: median error of the cheap profile, largest", worst["cheap_error"], shown)
    report.measure("c4", "own models: largest error at a held-out prompt length", worst["other_prompt"], shown)
    _costs(cfg, report, tables.costs_table(cfg, found))
    if found.records is None:
        for claim in ("c1", "c5", "c8"):
            report.not_testable(
                claim, f"profile {cfg.profile} measures architectures alone; the reasoners are served in profile=cpu"
            )
        return
    _providers(cfg, report, found)
    if missed := gate(cfg, found):
        report.not_testable("c8", missed)
    else:
        _tradeoff(cfg, report, found)


def _released_table(report: Report, scenarios: pd.DataFrame) -> None:
    """c1, c2, c5 and c8 as far as the released table decides them."""
    pairs = published.pair_table(scenarios).set_index("metric")
    count = int(pairs["pairs"].iloc[0])
    for name in ("mean", "max", "min"):
        raw, idealized = pairs.loc["raw runtime", name], pairs.loc["idealized runtime", name]
        report.measure("c1", f"davinci over text-davinci-001, raw: {name}", exact(raw, count))
        report.measure("c2", f"davinci over text-davinci-001, idealized: {name}", exact(idealized, count))
    report.measure("c2", "generated tokens: mean", exact(pairs.loc["generated tokens", "mean"], count))
    report.measure("c2", "scenarios that both answered", exact(count))
    medians = published.raw_over_idealized(scenarios)
    for name, full in CSV_NAMES.items():
        report.measure("c5", f"raw over idealized, median: {name}", exact(medians[full]))
    from scipy import stats

    means = published.mean_times(scenarios)
    tau = float(stats.kendalltau(means["raw"], means["idealized"]).statistic)
    detail = f"{len(means)} models, {int(means['scenarios'].iloc[0])} shared scenarios"
    report.measure("c5", "Kendall tau of raw and idealized runtime over models", exact(tau, len(means)), detail)
    fronts = published.fronts(scenarios)
    alone = published.dominators(fronts)
    report.measure(
        "c8", "released table: models that alone are the front of every scenario",
        exact(len(alone), fronts["scenario"].nunique()), ", ".join(alone),
    )  # fmt: skip
    shared = (fronts.groupby("scenario")["on_front"].sum() >= 2).astype(float)
    report.measure("c8", "released table: scenarios with two models or more on the front", bootstrap_mean(shared))


def _released_logs(report: Report, found: Found) -> None:
    """c3, c4 and c7 as far as the released logs decide them."""
    of = analysis.public_quality(found.cells).set_index("model")
    runs = len(of)
    least, slow = of["r_squared"].min(), of["cheap_error"].max()
    report.measure("c3", "released logs: least R squared", exact(least, runs), of["r_squared"].idxmin())
    report.measure(
        "c4", "released logs: full sweep over cheap procedure, least", exact(of["saving"].min(), runs),
        of["saving"].idxmin(),
    )  # fmt: skip
    report.measure(
        "c4", "released logs: median error of the cheap profile, largest", exact(slow, runs), of["cheap_error"].idxmax()
    )
    for name, ratio in published.slope_ratios(found.a100, found.v100).items():
        report.measure("c7", f"slope on V100 over A100: {name}", exact(ratio))


def _costs(cfg: DictConfig, report: Report, costs: pd.DataFrame) -> None:
    """c6."""
    seconds, n = costs["seconds"].to_numpy(), costs["accelerators"].to_numpy()
    unit = np.abs(ir.dollars(seconds, 3600.0) - seconds).max()
    usd = np.abs(costs["usd"] / (seconds * n * cfg.usd_per_hour / 3600) - 1).max()
    joules = np.abs(costs["joules"] / (seconds * n * cfg.watts) - 1).max()
    moved = int((costs["rank_by_seconds"] != costs["rank_by_usd"]).sum())
    shapes = len(costs)
    report.measure("c6", "dollars at 3600 an hour on one accelerator minus seconds, largest", exact(unit, shapes))
    report.measure(
        "c6", "dollars over seconds x accelerators x price / 3600, largest error", exact(usd, shapes),
        f"{moved} of {shapes} models have another rank by dollars than by seconds",
    )  # fmt: skip
    report.measure("c6", "joules over seconds x accelerators x watts, largest error", exact(joules, shapes))


def _ratio(of: Market, seconds: np.ndarray, over: str, under: str) -> Measured:
    """Mean over sizes of (mean seconds at one provider / at another), with an interval over problems."""
    left, right = (of.columns([f"{size}@{name}" for size in SIZES]) for name in (over, under))
    return paired_bootstrap(seconds[:, left], seconds[:, right], lambda a, b: float(np.mean(a.mean(0) / b.mean(0))))


def _spread(of: Market, seconds: np.ndarray, providers: list[str], least: bool) -> Measured:
    """Slowest over fastest provider of one size: the least, or the largest, of the sizes."""
    columns = np.array([of.columns([f"{size}@{name}" for name in providers]) for size in SIZES])

    def statistic(a: np.ndarray, _: np.ndarray) -> float:
        means = a.mean(axis=0)[columns]  # [sizes, providers]
        ratios = means.max(axis=1) / means.min(axis=1)
        return float(ratios.min() if least else ratios.max())

    return paired_bootstrap(seconds, seconds, statistic)


def _providers(cfg: DictConfig, report: Report, found: Found) -> None:
    """Part C: c1 and c5."""
    from scipy import stats

    of, names = analysis.market(found), list(cfg.api.providers)
    report.measure(
        "c1", "one reasoner behind three providers, raw: slowest over fastest", _spread(of, of.raw, names, least=True)
    )
    report.measure(
        "c1", "one reasoner behind three providers, idealized: largest over smallest",
        _spread(of, of.idealized, names, least=False),
    )  # fmt: skip
    judged = of.columns([f"{size}@{provider}" for size, provider in cfg.api.market.items()])
    g = np.array([found.profiles[f"reasoner_{size}"].per_output_token for size in cfg.api.market])
    shown = ", ".join(f"{s}@{p} {1e3 * of.raw[:, c].mean():.1f} ms" for (s, p), c in zip(cfg.api.market.items(), judged,
                                                                                       strict=True))  # fmt: skip

    def wrong(a: np.ndarray, _: np.ndarray) -> float:
        return float(published.disagreeing(a.mean(axis=0), g))

    def tau(a: np.ndarray, _: np.ndarray) -> float:
        return float(stats.kendalltau(a.mean(axis=0), g).statistic)

    raw, idealized = of.raw[:, judged], of.idealized[:, judged]
    report.measure(
        "c1", "market of three APIs: pairs of architectures that raw runtime puts in the wrong order",
        paired_bootstrap(raw, raw, wrong), shown,
    )  # fmt: skip
    report.measure(
        "c5", "market of three APIs: Kendall tau of idealized runtime and the profile's g",
        paired_bootstrap(idealized, idealized, tau),
    )  # fmt: skip
    fixed = "the denoised profile is taken as it is"
    report.measure("c5", "neighbour's noise in raw runtime: Z over Y", _ratio(of, of.raw, "Z", "Y"))
    report.measure("c5", "neighbour's noise in denoised runtime: Z over Y", _ratio(of, of.denoised, "Z", "Y"), fixed)
    report.measure("c5", "X's optimisations in denoised runtime: X over Y", _ratio(of, of.denoised, "X", "Y"), fixed)


def gate(cfg: DictConfig, found: Found) -> str | None:
    """Why part D says nothing: a model that gets no chain right trades nothing off."""
    rows = found.records[(found.records["task"] == "chain") & found.records["arm"].str.endswith(f" {cfg.api.weights}")]
    right = rows.groupby("arm")["correct"].mean()
    if right.min() >= cfg.gate:
        return None
    return f"gate: accuracy of {right.idxmin()} on chains measured {right.min():.3f}, needed {cfg.gate} or more"


def _tradeoff(cfg: DictConfig, report: Report, found: Found) -> None:
    """Part D: c8. The tasks have as many problems each, and are resampled alike."""
    of = analysis.answers(found)
    count = len(next(iter(next(iter(of.values())).values()))[0])

    def dominating(draw: np.ndarray | slice) -> int:
        fronts = np.array([analysis.front_of(task, draw) for task in of.values()])
        return int((fronts & (fronts.sum(axis=1, keepdims=True) == 1)).all(axis=0).sum())

    drawn = analysis.resampled(cfg, count, dominating)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = dominating(slice(None))
    report.measure(
        "c8", "six reasoners: those that alone are the front of all three tasks",
        Measured(value, min(low, value), max(high, value), count),
        f"on a front: {'; '.join(_front_names(task, models) for task, models in of.items())}",
    )  # fmt: skip


def _front_names(task: str, models: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    names = [name for name, kept in zip(models, analysis.front_of(models), strict=True) if kept]
    return f"{task}: {', '.join(names)}"
