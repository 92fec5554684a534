"""The tables: accuracy against N, laws, saturation points, held-out errors, allocation, small against large."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.costs.catalogue import Transformer
from common.costs.idealized_runtime import dollars
from common.costs.per_answer import report_costs
from common.costs.saturation import BetaBinomial, Geometric, log_likelihood
from papers.scaling_over_scaling import analysis, method
from papers.scaling_over_scaling.analysis import FIRST, HIT, LAST, MAJORITY, Found, Pool

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

EPSILONS = (0.1, 0.05, 0.01, 0.001)  # of the closed-form table


def write(cfg: DictConfig, report: Report, found: Found) -> None:
    """All tables."""
    import pandas as pd

    own, price = cfg.allocation, f"{cfg.cost.accelerator} at {cfg.cost.usd_per_hour:g} dollars an hour"
    made: dict[str, tuple[str, list[dict[str, Any]], str]] = {
        "t1": (
            "", accuracy_rows(cfg, found),
            "Mean over problems and its standard error. small: all samples. best-of-N: highest score by the "
            "reward model. rethinker: N counts the first answer and the rounds after it. tokens: generated a problem.",
        ),
        "t2": ("", closed_form(), "Smallest N >= 0 with p (1 - p)^N <= epsilon."),
        "laws": (
            "Fitted laws by task and mode", law_rows(cfg, found),
            f"p and F_max: geometric law through N <= {cfg.fit_up_to} of the pilot. mend, spoil, start: of the pilot "
            "chains; limit: mend / (mend + spoil).",
        ),
        "saturation": (
            "Predicted and observed saturation points", saturation_rows(cfg, found),
            "predicted: from the pilot's law. observed: first N of the other half whose next two gains are at "
            "most epsilon, empty where there is none. Bins from easy to hard, with a law each.",
        ),
        "correlations": (
            "Predicted against observed saturation points", correlation_rows(cfg, found),
            "By problem: those with right and wrong pilot samples, cut at the samples of a half. By bin: bins of each "
            "task for which both points exist.",
        ),
        "held_out": (
            "Error of the laws beyond the fit", held_out_rows(cfg, found),
            f"Fitted to N <= {cfg.fit_up_to} of the pilot half, held against the other half, whose counts have the "
            "log_likelihood.",
        ),
        "allocation": (
            "What stopping saves", allocation_rows(cfg, found),
            f"Stored samples of the small model in {own.orders} random orders. Seconds and dollars: samples one after "
            f"another at the peak rates of {price}.",
        ),
        "small_large": (
            "Small with N against large with one", small_large_rows(cfg, found),
            "crossing_N: fewest samples of the small model whose selected answer (oracle: any) is right as often "
            "as one of the large model. cost_ratio: idealized seconds of the small model at N over the large one's.",
        ),
        "quality": (
            "What the samples are like", quality_rows(found),
            "distinct: different texts within a problem, over samples. truncated: without an end, counted as wrong. "
            "lucky: share of the right ones that have a wrong step.",
        ),
    }  # fmt: skip
    for id_, (title, rows, note) in made.items():
        report.table(id_, pd.DataFrame(rows), title, note)
    models = json.loads((Path(cfg.artifacts) / "infer" / "models.json").read_text())
    sizes = {m["arm"]: Transformer(**m["sizes"]) for m in models}  # an arm's model has one shape on all tasks
    report_costs(report, sizes.__getitem__)


def closed_form() -> list[dict[str, Any]]:
    """N* of the reported grid."""
    return [
        {"p": p} | {f"eps_{epsilon:g}": method.saturation_budget(p, epsilon) for epsilon in EPSILONS}
        for p in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    ]


def accuracy_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows = []

    def add(model: str, task: str, mode: str, n: int, column: np.ndarray, tokens: float) -> None:
        error = column.std(ddof=1) / np.sqrt(len(column))
        head = {"model": model, "benchmark": task, "mode": mode, "N": n}
        rows.append(head | {"accuracy_percent": 100 * column.mean(), "standard_error": 100 * error, "tokens": tokens})

    for task in cfg.tasks:
        for role in ("small", "large"):
            pool = found.pool(task, role)
            for mode in found.modes(task) if role == "small" else (HIT, MAJORITY):
                curve = found.curves[task, mode].whole if role == "small" else _large(cfg, pool, mode)
                for n in (n for n in cfg.budgets if n <= curve.shape[1]):
                    add(role, task, mode, n, curve[:, n - 1], n * pool.tokens.mean())
        if not found.rethinks(task):
            continue
        states, chains = found.states(task), found.pools[task, "sequential rethinker"]
        spent = chains.tokens.reshape(states.shape).mean((0, 1)).cumsum()
        for mode in (FIRST, LAST):
            curve = found.curves[task, mode].whole
            for n in sorted({*(n for n in cfg.budgets if n < found.length), found.length}):
                add("rethinker", task, mode, n, curve[:, n - 1], spent[n - 1])
    return rows


def _large(cfg: DictConfig, pool: Pool, mode: str) -> np.ndarray:
    return analysis.pool_curves(pool, mode, seed=cfg.seed, draws=cfg.majority_draws)


def law_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows = []
    for task in cfg.tasks:
        for mode in (*found.modes(task), *([FIRST] if found.rethinks(task) else [])):
            law = found.curves[task, mode].law
            row: dict[str, Any] = {"task": task, "mode": mode, "p": law.p, "F_max": law.ceiling}
            row |= {f"N*({epsilon:g})": found.curves[task, mode].predicted(epsilon) for epsilon in cfg.epsilons}
            if mode == HIT:
                row["p of one sample"] = found.pool(task).halves()[0].right.mean()
                for name, fitted in _laws(cfg, found, task).items():
                    if isinstance(fitted, BetaBinomial):
                        row |= {f"{name} a": fitted.a, f"{name} b": fitted.b, f"{name} hopeless": fitted.hopeless}
            rows.append(row)
        if not found.rethinks(task):
            continue
        chain = analysis.leaky(found, task)
        total = chain.p01 + chain.p10
        row = {"task": task, "mode": LAST, "mend": chain.p01, "spoil": chain.p10, "start": chain.start}
        rethinker = found.pools.get((task, "parallel rethinker"))
        row["p of one sample"] = float("nan") if rethinker is None else rethinker.right.mean()
        rows.append(row | {"limit": chain.p01 / total if total else chain.start})
    return rows


def _laws(cfg: DictConfig, found: Found, task: str) -> dict[str, Geometric | BetaBinomial]:
    return method.fit_laws(found.pool(task).halves()[0].right, cfg.fit_up_to)


def bins_of(cfg: DictConfig, problems: int) -> list[np.ndarray]:
    """The problems of each bin; they stand one bin after another."""
    return [np.arange(start, start + cfg.problems) for start in range(0, problems, cfg.problems)]


def saturation_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows = []
    for task in cfg.tasks:
        for mode in (*found.modes(task), *([FIRST] if found.rethinks(task) else [])):
            whole = found.curves[task, mode]
            parts = {"all": whole}
            bins = bins_of(cfg, len(whole.pilot))
            if mode in (HIT, FIRST) and len(bins) > 1:
                parts |= {f"bin {i}": whole.of(bin_, cfg.fit_up_to) for i, bin_ in enumerate(bins, 1)}
            for name, part in parts.items():
                for epsilon in cfg.epsilons:
                    rows.append(
                        {
                            "task": task, "mode": mode, "problems": name, "epsilon": epsilon,
                            "one answer": part.evaluation[:, 0].mean(), "predicted": part.predicted(epsilon),
                            "observed": part.observed(epsilon), "most": part.evaluation.shape[1],
                        }
                    )  # fmt: skip
    return rows


def correlations(points: np.ndarray) -> tuple[float, float]:
    """(Pearson, Spearman) of points [n, 2]; nan where one of the two does not vary."""
    from scipy import stats

    if len(points) < 3 or np.ptp(points, axis=0).min() == 0:
        return float("nan"), float("nan")
    pearson = float(np.corrcoef(points.T)[0, 1])
    return pearson, float(stats.spearmanr(points[:, 0], points[:, 1]).statistic)


def correlation_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows = []

    def add(unit: str, model: str, task: str, epsilon: float, points: np.ndarray) -> None:
        pearson, spearman = correlations(points)
        head = {"unit": unit, "model": model, "task": task, "epsilon": epsilon, "points": len(points)}
        rows.append(head | {"pearson": pearson, "spearman": spearman})

    table = saturation_rows(cfg, found)
    for epsilon in cfg.epsilons:
        for role in ("small", "large"):
            by_task = {task: analysis.per_problem(found, task, epsilon, role) for task in cfg.tasks}
            for task, points in by_task.items():
                add("problem", role, task, epsilon, points)
            add("problem", role, "all", epsilon, np.concatenate(list(by_task.values())))
        for mode, model in ((HIT, "small"), (FIRST, "rethinker")):
            points = [
                [row["predicted"], row["observed"]]
                for row in table
                if row["mode"] == mode and row["problems"] != "all" and row["epsilon"] == epsilon
                and row["observed"] is not None
            ]  # fmt: skip
            add(f"bin, {mode}", model, "all", epsilon, np.array(points, dtype=float).reshape(-1, 2))
    return rows


def held_out_budgets(cfg: DictConfig, found: Found) -> tuple[list[int], list[int]]:
    """(of samples, of chains): N beyond the fit that the other half can show."""
    half = cfg.samples.small // 2
    samples = [n for n in cfg.budgets if cfg.fit_up_to < n <= half]
    chains = {(found.length + cfg.fit_up_to) // 2, found.length}
    return samples, sorted(n for n in chains if cfg.fit_up_to < n <= found.length)


def held_out_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    samples, chains = held_out_budgets(cfg, found)
    for task in cfg.tasks:
        _, evaluation = found.pool(task).halves()
        counts, n = evaluation.right.sum(1), evaluation.right.shape[1]
        seen = found.curves[task, HIT].evaluation.mean(0)
        for name, law in _laws(cfg, found, task).items():
            row = {"task": task, "mode": HIT, "law": name, "log_likelihood": log_likelihood(law, counts, n)}
            rows.append(row | _errors(law, seen, samples))
        if not found.rethinks(task):
            continue
        for mode, law, offset in (
            (FIRST, found.curves[task, FIRST].law, 0), (LAST, analysis.leaky(found, task), 1),
        ):  # fmt: skip
            seen = found.curves[task, mode].evaluation.mean(0)
            name = "leaky chain" if offset else "geometric"
            rows.append({"task": task, "mode": mode, "law": name} | _errors(law, seen, chains, offset))
    return rows


def _errors(law: Any, seen: np.ndarray, budgets: list[int], offset: int = 0) -> dict[str, float]:
    """Columns of predicted minus seen accuracy, and their mean absolute value. offset: a law that counts rounds after
    the first answer is asked for N - 1."""
    errors = {f"error at N={n}": float(law(n - offset)) - seen[n - 1] for n in budgets}
    return errors | {"mean absolute error": float(np.mean(np.abs(list(errors.values())))) if errors else float("nan")}


def allocation_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows = []
    for task in cfg.tasks:
        for rule, spent in analysis.replay(cfg, found, task).items():
            usd = dollars(spent.seconds.sum(), cfg.cost.usd_per_hour)
            right = spent.right.sum()
            rows.append(
                {
                    "task": task, "rule": rule, "selection": found.selection(task), "answers": spent.answers.mean(),
                    "tokens": spent.tokens.mean(), "accuracy": spent.right.mean(),
                    "idealized_milliseconds": 1000 * spent.seconds.mean(),
                    "usd_per_million_correct": 1e6 * float(usd) / right if right else float("inf"),
                }
            )  # fmt: skip
    return rows


def small_large_rows(cfg: DictConfig, found: Found) -> list[dict[str, Any]]:
    rows = []
    for task in cfg.tasks:
        small, large = found.pool(task), found.pool(task, "large").halves()[1]
        one = large.right.mean()
        row: dict[str, Any] = {
            "task": task, "small, one": small.right.mean(), "large, one": one, "selection": found.selection(task),
        }  # fmt: skip
        for name, mode in (("selected", found.selection(task)), ("oracle", HIT)):
            curve = found.curves[task, mode].evaluation.mean(0)
            row[f"small, {name} of {cfg.headline}"] = curve[cfg.headline - 1]
            reached = np.flatnonzero(curve >= one)
            n = int(reached[0]) + 1 if len(reached) else None
            row[f"crossing_N, {name}"] = n
            row[f"cost_ratio, {name}"] = n * small.seconds.mean() / large.seconds.mean() if n else None
        rows.append(row)
    return rows


def quality_rows(found: Found) -> list[dict[str, Any]]:
    total = found.quality.groupby(["task", "arm"], sort=False)[["answers", "distinct", "truncated", "right", "lucky"]]
    sums = total.sum().reset_index()
    return [
        {
            "task": row.task, "arm": row.arm, "answers": row.answers, "right": row.right / row.answers,
            "distinct": row.distinct / row.answers, "truncated": row.truncated / row.answers,
            "lucky": row.lucky / row.right if row.right else float("nan"),
        }
        for row in sums.itertuples()
    ]  # fmt: skip
