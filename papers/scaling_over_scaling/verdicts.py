"""What the claims' parts measure."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from common.costs.saturation import fit_geometric
from common.metrics.intervals import Measured, exact, paired_bootstrap
from papers.scaling_over_scaling import analysis, method, tables
from papers.scaling_over_scaling.analysis import FIRST, HIT, Found

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

C1 = ("parallel, hit@N", "parallel, selected answer", "sequential, first success")
C2 = (
    "parallel, mean absolute error of hit@N beyond the fit",
    "sequential, mean absolute error of the first success beyond the fit",
)


def judge(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim. Claims about models stand on the tasks whose gates are passed."""
    report.measure("c3", "N samples against the absorbing chain, largest difference", identity())
    reported = fit_geometric([1, 32], [0.3, 16 / 30])
    report.measure("c5", "chance p of the law through the two reported points", exact(reported.p))
    report.not_testable("c5", "needs DeepSeek-R1-Distill-Qwen-1.5B on AIME 2024; the two points alone fit the law")
    tasks, missed = analysis.usable(cfg, found)
    chained, missed_chains = analysis.usable(cfg, found, "rethinker")
    if missed or missed_chains:
        report.note(f"Left out: {'; '.join(why for why in (missed, missed_chains) if why)}.")
    for task in cfg.tasks:
        report.metric(f"p of one sample, {task}", float(found.pool(task).right.mean()))
        if found.rethinks(task):
            report.metric(f"chance to mend, {task}", analysis.leaky(found, task).p01)
    _saturates(cfg, report, found, tasks, chained)
    _predicts(cfg, report, found, tasks, chained)
    for id_, reason in (("c1", missed), ("c2", missed)):
        if not tasks:
            report.not_testable(id_, reason)
        elif not chained:
            report.not_testable(id_, f"the sequential part: {missed_chains}")
    if tasks:
        _allocates(cfg, report, found, tasks)
    else:
        report.not_testable("c4", missed)
    _small_and_large(cfg, report, found, tasks, missed)
    _correlates(cfg, report, found, tasks)


def identity() -> Measured:
    """Largest difference of the two paradigms on a grid, the chain by powers of its transition matrix."""
    worst, count = 0.0, 0
    for p, n in itertools.product(np.linspace(0, 1, 41), range(65)):
        step = np.array([[1 - p, p], [0.0, 1.0]])  # rows: wrong, right
        chain = np.linalg.matrix_power(step, n)[0, 1]
        worst, count = max(worst, abs(float(method.geometric(n, p)) - chain)), count + 1
    return exact(worst, count)


def _saturates(cfg: DictConfig, report: Report, found: Found, tasks: list[str], chained: list[str]) -> None:
    first, last = (1, cfg.budgets[2]), (cfg.budgets[-3], cfg.budgets[-1])
    if tasks:
        for part, mode_of in ((C1[0], lambda task: HIT), (C1[1], found.selection)):
            whole = [
                analysis.pool_curves(found.pool(task), mode_of(task), seed=cfg.seed, draws=cfg.majority_draws)
                for task in tasks
            ]
            _contrast(report, part, whole, first, last, tasks)
    quarter = found.length // 4
    if chained:
        whole = [analysis.chain_curves(found.states(task), FIRST) for task in chained]
        if quarter > 1:
            _contrast(report, C1[2], whole, (1, 4), (quarter, 4 * quarter), chained)
        else:
            report.not_testable("c1", f"chains of {found.length} answers have no two doublings beyond the first two")


def _contrast(
    report: Report, part: str, curves: list[np.ndarray], first: tuple[int, int], last: tuple[int, int], tasks: list[str]
) -> None:
    """The largest over tasks of (slope over the last two doublings - a quarter of that over the first two)."""
    points = np.stack([curve[:, [n - 1 for n in (*first, *last)]] for curve in curves], axis=1)  # [problems, tasks, 4]

    def contrasts(rows: np.ndarray) -> np.ndarray:
        mean = rows.mean(0)
        return (mean[:, 3] - mean[:, 2]) / 2 - 0.25 * (mean[:, 1] - mean[:, 0]) / 2

    detail = ", ".join(f"{task} {value:.4f}" for task, value in zip(tasks, contrasts(points), strict=True))
    found = paired_bootstrap(points, points, lambda rows, _: float(contrasts(rows).max()))
    report.measure("c1", f"{part}, the task that saturates least", found, detail)


def _predicts(cfg: DictConfig, report: Report, found: Found, tasks: list[str], chained: list[str]) -> None:
    samples, rounds = tables.held_out_budgets(cfg, found)
    for part, mode, own, budgets in ((C2[0], HIT, tasks, samples), (C2[1], FIRST, chained, rounds)):
        if own and budgets:
            report.measure("c2", part, held_out_error(cfg, found, mode, own, budgets))
        elif own:
            report.not_testable("c2", f"nothing was drawn beyond N = {cfg.fit_up_to}")


def held_out_error(cfg: DictConfig, found: Found, mode: str, tasks: list[str], budgets: list[int]) -> Measured:
    """Mean absolute error of the geometric law over tasks and budgets; laws are fitted anew for each resample."""
    curves = [found.curves[task, mode] for task in tasks]
    problems = np.arange(len(curves[0].pilot), dtype=float)

    def error(rows: np.ndarray, _: np.ndarray) -> float:
        index = rows.astype(int)
        errors = []
        for curve in curves:
            law = method.fit_curve(curve.pilot[index][:, : cfg.fit_up_to])
            errors.append(np.abs(law(budgets) - curve.evaluation[index].mean(0)[[n - 1 for n in budgets]]))
        return float(np.mean(errors))

    return paired_bootstrap(problems, problems, error, cfg.seed, cfg.refits)


def _allocates(cfg: DictConfig, report: Report, found: Found, tasks: list[str]) -> None:
    spent = [analysis.replay(cfg, found, task) for task in tasks]
    stopped, fixed = "N* by agreement", f"fixed N = {cfg.allocation.most}"
    tokens, right = (
        {rule: np.stack([getattr(of[rule], name) for of in spent], 1) for rule in (stopped, fixed)}
        for name in ("tokens", "right")
    )
    saved = paired_bootstrap(tokens[stopped], tokens[fixed], lambda a, b: float(1 - a.sum() / b.sum()))
    report.measure("c4", "tokens saved by stopping at N*", saved)
    lost = paired_bootstrap(right[stopped], right[fixed])
    detail = ", ".join(
        f"{task} {(of[stopped].right - of[fixed].right).mean():.4f}" for task, of in zip(tasks, spent, strict=True)
    )
    report.measure("c4", "accuracy of stopping at N* minus that of the fixed largest N", lost, detail)


def _small_and_large(cfg: DictConfig, report: Report, found: Found, tasks: list[str], missed: str) -> None:
    """On the tasks on which the large model leads at one sample, seen on the pilot halves."""
    lead = {
        task: found.pool(task, "large").halves()[0].right.mean() - found.pool(task).halves()[0].right.mean()
        for task in tasks
    }
    ahead = [task for task in tasks if lead[task] > 0]
    if not ahead:
        measured = ", ".join(f"{task} {value:.3f}" for task, value in lead.items())
        report.not_testable(
            "c6", f"gate: lead of the large model at one sample: {measured}, needed above 0" if lead else missed
        )
        return
    small = np.stack([found.curves[t, found.selection(t)].evaluation[:, cfg.headline - 1] for t in ahead], 1)
    large = np.stack([found.pool(task, "large").halves()[1].right.mean(1) for task in ahead], 1)
    difference = (small - large).mean(0)
    detail = ", ".join(f"{task} {value:.3f}" for task, value in zip(ahead, difference, strict=True))
    part = "small model, answer selected from 32, minus large model, one answer"
    report.measure("c6", part, paired_bootstrap(small, large), detail)


def _correlates(cfg: DictConfig, report: Report, found: Found, tasks: list[str]) -> None:
    points = [analysis.per_problem(found, task, cfg.epsilons[-1]) for task in tasks]
    pairs = np.concatenate(points) if points else np.zeros((0, 2))
    if len(pairs) < cfg.gates.interior:
        report.not_testable("c7", f"gate: {len(pairs)} problems with interior p, needed {cfg.gates.interior}")
        return
    for i, name in enumerate(("Pearson", "Spearman")):
        value = paired_bootstrap(pairs, pairs, lambda rows, _, i=i: tables.correlations(rows)[i], resamples=1000)
        report.measure("c7", f"{name} correlation over problems", value)
