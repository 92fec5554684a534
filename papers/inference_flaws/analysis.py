"""From counts to tables, figures and verdicts. A family is {model: [TaskCounts of each task]}."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact, paired_bootstrap
from papers.inference_flaws import method
from papers.inference_flaws.method import TaskCounts

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from common.reporting.report import Report

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 201)  # of the buckets of attempts
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2, 4, 10)  # false-positive cost over benefit, table t3
MIDDLE = ("m4", "m5", "m6", "m7")  # in the place of the four models of the paper's figure 4
LLAMA_3_1_8B = method.TwoTypes((0.8738248665464701, 0.13823971665148135), 0.56, 0.7516008131097383)
MOST_ATTEMPTS = 800  # of table t3
TIE = 1e-12  # rewards that differ by less are equal

Family = dict[str, list[TaskCounts]]


def family(counts: pd.DataFrame, tests: int) -> Family:
    """The counts of every model and task with a verifier of so many tests."""
    rows = counts[counts["tests"] == tests]
    return {
        str(name): [TaskCounts(r.samples, r.right, r.wrong) for r in group.sort_values("task").itertuples()]
        for name, group in rows.groupby("model", sort=True)
    }


def gate(cfg: DictConfig, limited: Family) -> str | None:
    """Why the family cannot carry the comparisons, or None if it can."""
    for name, (low, high) in ((cfg.weak, cfg.gates.weak), (cfg.strong, cfg.gates.strong)):
        rate = _pass_at_1(limited[name])
        if not low <= rate <= high:
            return f"gate: pass@1 of {name} measured {rate:.3f}, needed {low} to {high}"
    return None


def tables(cfg: DictConfig, report: Report, counts: pd.DataFrame, styles: pd.DataFrame) -> None:
    """Tables t1 to t5 for the family, and the coverage of the verifier."""
    import pandas as pd

    limited = family(counts, cfg.base_tests)
    rows = []
    for name, tasks in limited.items():
        own = counts[(counts["model"] == name) & (counts["tests"] == cfg.base_tests)]
        rows.append(
            {
                "model": name,
                "pass_at_1": _pass_at_1(tasks),
                "accuracy_given_pass": method.accuracy_given_pass(tasks),
                "undefined_as_0": method.ceiling(tasks),
                "undefined_as_1": method.accuracy_given_pass(tasks, 1.0),
                "coverage": method.coverage(tasks),
                "majority": own["majority"].mean(),
                "tasks_without_accepted": sum(t.accepted == 0 for t in tasks),
                "distinct_programs": own["distinct"].mean(),
            }
        )
    frame = pd.DataFrame(rows)
    report.table(
        "t1",
        frame,
        note=f"Our family on {cfg.tasks} tasks, {cfg.samples} samples each, verifier of {cfg.base_tests} inputs; "
        "distinct_programs: different behaviours among the samples of a task. undefined_as_0 is the ceiling.",
    )
    reported = _reported(report)
    lines = [("reported 17 models, recomputed", reported["pass_at_1"], reported["accuracy_given_pass"])]
    lines.append(("our family, all tasks", *_points(limited)))
    hard = _hard_half(limited)
    halved = {name: [tasks[t] for t in hard] for name, tasks in limited.items()}
    lines.append(("our family, the half with the lowest accuracy given pass", *_points(halved)))
    lines = [line for line in lines if len(line[1]) > 2]
    fits = [(name, *method.regression(x, y)) for name, x, y in lines]
    report.table("t2", pd.DataFrame(fits, columns=["benchmark", "slope", "intercept", "R2"]))
    report.table("t3", pd.DataFrame(_two_type_rows(limited)), note="Two-type model of each model, reach of the paper.")
    report.table("t4", pd.DataFrame(_curve_rows(cfg, limited)), note="K* at the last attempt is censored.")
    report.table("t5", _style_table(styles), note="Asked for: the constant of a sum first, or last.")
    sweep = []
    for tests in cfg.coverage:
        of = family(counts, tests)
        sweep += [
            {"tests": tests, "model": n, "ceiling": method.ceiling(tasks), "coverage": method.coverage(tasks)}
            for n, tasks in of.items()
        ]
    report.table("coverage", pd.DataFrame(sweep), "Ceiling by the number of tests of the verifier")
    report_costs(report, lambda arm: from_checkpoint(Path(cfg.artifacts) / "train" / arm))


def _two_type_rows(limited: Family) -> list[dict]:
    rows = []
    models = {"Llama 3.1 8B, recomputed": LLAMA_3_1_8B}
    for name, tasks in limited.items():
        base, plus = ([getattr(t, part) / t.n for t in tasks] for part in ("accepted", "right"))
        fitted = method.fit_two_types(base, plus, method.accuracy_given_pass(tasks))
        if fitted is not None:
            models[name] = fitted
    for name, model in models.items():
        best = [method.best_attempts(model.value(MOST_ATTEMPTS, -ratio, "paper")) for ratio in RATIOS]
        rows.append({"model": name} | {str(ratio): k for ratio, k in zip(RATIOS, best, strict=True)})
    return rows


def _curve_rows(cfg: DictConfig, limited: Family) -> list[dict]:
    rows = []
    for name, tasks in limited.items():
        outcomes = np.array([[1] * t.right + [-1] * t.wrong + [0] * (t.n - t.accepted) for t in tasks])
        for penalty in cfg.penalties:
            curve = method.mean_curve(tasks, cfg.attempts, penalty)
            simulated, _ = method.simulated_curve(outcomes, cfg.attempts, penalty, cfg.permutations, cfg.seed)
            rows.append(
                {
                    "model": name,
                    "penalty": penalty,
                    "best_reward": curve.max(),
                    "K_star": method.best_attempts(curve, TIE),
                    "best_reward_simulated": simulated.max(),
                    "K_star_simulated": method.best_attempts(simulated, TIE),
                }
            )
    return rows


def _style_table(styles: pd.DataFrame) -> pd.DataFrame:
    total = styles.groupby(["style", "model"], as_index=False)[["right", "right_styled", "wrong", "wrong_styled"]].sum()
    accepted = total["right"] + total["wrong"]
    total["given_pass"] = (total["right_styled"] + total["wrong_styled"]) / accepted.where(accepted > 0)
    total["given_correct"] = total["right_styled"] / total["right"].where(total["right"] > 0)
    total["given_false_positive"] = total["wrong_styled"] / total["wrong"].where(total["wrong"] > 0)
    shown = ["style", "model", "given_pass", "given_correct", "given_false_positive"]
    return total[shown].rename(columns={"style": "instruction"})


def plots(cfg: DictConfig, report: Report, counts: pd.DataFrame) -> None:
    """The scatter of the paper's figure 1a, reward against attempts, wrong submissions by attempt, ceiling by tests."""
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS

    limited, told = family(counts, cfg.base_tests), _reported(report)
    if gate(cfg, limited):
        return  # curves of models that solve nothing, or everything, show nothing
    strong = _pass_at_1(limited[cfg.strong])
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6))
    for x, y, colour, label in (
        (told["pass_at_1"], told["accuracy_given_pass"], "0.6", "reported, 17 models"),
        (*_points(limited), COLOURS[0], f"ours, {len(limited)} models"),
    ):
        slope, intercept, r2 = method.regression(x, y)
        axes[0].plot(x, y, "o", color=colour, label=f"{label}: slope {slope:.2f}, $R^2$ {r2:.2f}")
        ends = np.array([min(x), max(x)])
        axes[0].plot(ends, intercept + slope * ends, color=colour, lw=1)
    axes[0].axhline(strong, color=COLOURS[1], ls="--", lw=1)
    axes[0].annotate("our strong model, one sample", (0.02, strong), va="bottom", color=COLOURS[1], fontsize=8)
    axes[0].set(xlabel="accuracy of one sample (pass@1)", ylabel="accuracy given that the tests pass", xlim=(0, 1))
    axes[0].legend(loc="lower right", fontsize=8)
    tests = sorted(cfg.coverage)
    for name, colour in ((cfg.weak, COLOURS[2]), (MIDDLE[-1], COLOURS[3]), (cfg.strong, COLOURS[1])):
        axes[1].plot(tests, [method.ceiling(family(counts, n)[name]) for n in tests], "o-", color=colour, label=name)
        axes[1].axhline(method.coverage(limited[name]), color=colour, ls=":", lw=1)
    axes[1].set(xscale="log", xlabel="inputs that the verifier tests", ylabel="ceiling of resampling", ylim=(0, 1.02))
    axes[1].legend(title="dotted: perfect verifier", loc="lower right", fontsize=8)
    report.figure(
        "ceiling",
        fig,
        "Weak models are wrong more often when the tests pass",
        "Left: figure 1a of the paper with our family beside it. Right: more tests lift the ceiling to the coverage.",
    )
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.4))
    attempts = np.arange(1, cfg.attempts + 1)
    for penalty, colour in zip(cfg.penalties, COLOURS, strict=False):
        curve = method.mean_curve(limited[MIDDLE[0]], cfg.attempts, penalty)
        axes[0].plot(attempts, curve, color=colour, label=f"{penalty}")
        best = method.best_attempts(curve, TIE)
        if best:
            axes[0].plot(best, curve[best - 1], "o", color=colour)
    axes[0].set(xscale="log", xlabel=f"attempts allowed, model {MIDDLE[0]}", ylabel="mean reward a task")
    fig.legend(
        *axes[0].get_legend_handles_labels(), title="penalty of a wrong submission (dot: best number of attempts)",
        loc="outside upper left", ncols=5, fontsize=8, title_fontsize=8,
    )  # fmt: skip
    edges = [e for e in EDGES if e <= cfg.attempts] + [cfg.attempts + 1]
    labels = [f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in itertools.pairwise(edges)]
    shares = [method.wrong_by_attempt(tasks, edges) for tasks in limited.values() if any(t.accepted for t in tasks)]
    axes[1].bar(labels, np.nanmean(shares, axis=0), color=COLOURS[0])
    axes[1].set(xlabel="attempt at which the tests passed", ylabel="share of wrong submissions")
    axes[1].tick_params(axis="x", labelrotation=45)
    report.figure(
        "attempts",
        fig,
        "What more attempts buy",
        "Left: with a cost of wrong submissions a finite number of attempts is best. Right: late passes come from hard "
        "tasks and are wrong more often (mean over the family).",
    )


def verdicts(cfg: DictConfig, report: Report, counts: pd.DataFrame, styles: pd.DataFrame) -> None:
    """Measures every part of every claim."""
    limited, full = family(counts, cfg.base_tests), family(counts, max(cfg.coverage))
    tasks = range(cfg.tasks)
    row = [method.best_attempts(LLAMA_3_1_8B.value(MOST_ATTEMPTS, -ratio, "paper")) for ratio in RATIOS]
    printed = next(r for t in report.reported.tables if t.id == "t3" for r in t.rows if r[0] == "Llama 3.1 8B")[1:]
    differ = sum(a != b for a, b in zip(row, printed, strict=True))
    report.measure("c9", "entries of the reported row that differ", exact(differ, len(row)))
    for name, of in limited.items():
        report.metric(f"pass@1 {name}", _pass_at_1(of))
    if missed := gate(cfg, limited):
        for id_ in ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"):
            report.not_testable(id_, missed)
        return

    def over_tasks(statistic: Callable[[Family], float], of: Family = limited) -> Measured:
        """The statistic of the family with a bootstrap interval over tasks."""
        index = np.arange(len(tasks))[:, None]
        return paired_bootstrap(
            index,
            index,
            lambda a, _: statistic({n: [c[int(i)] for i in a[:, 0]] for n, c in of.items()}),
            cfg.seed,
            400,
        )

    at_end = [abs(method.mean_curve(t, cfg.samples)[-1] - method.ceiling(t)) for t in limited.values()]
    report.measure("c1", "curve at all samples minus the ceiling, largest difference", exact(max(at_end), len(limited)))
    report.measure(
        "c1", "ceiling lost to the limited tests",
        over_tasks(lambda f: float(np.mean([method.coverage(t) - method.ceiling(t) for t in f.values()]))),
    )  # fmt: skip
    lost = [method.coverage(t) - method.ceiling(t) for t in full.values()]
    report.measure("c1", "ceiling lost with the full tests", exact(max(lost), len(full)))
    report.measure("c2", "wrong ones among the accepted", over_tasks(_wrong_share))
    report.measure("c2", "share wrong at attempts 8 and later minus at attempt 1", over_tasks(_late_minus_first(cfg)))
    told = _reported(report)
    for name, value in zip(
        ("slope", "intercept", "R2"), method.regression(told["pass_at_1"], told["accuracy_given_pass"]), strict=True
    ):
        report.measure("c3", f"{name} recomputed from the 17 reported models", exact(value, len(told)))
    report.measure("c3", "slope over our family", _slope(limited))
    report.measure("c3", "R2 over our family", over_tasks(lambda f: method.regression(*_points(f))[2]))
    below = int((told["accuracy_given_pass"] < 0.855).sum())
    report.measure("c4", "reported models whose ceiling is below the strongest pass@1", exact(below, len(told)))
    report.measure(
        "c4", "pass@1 of the strong model minus the ceiling of the weak one",
        over_tasks(lambda f: _pass_at_1(f[cfg.strong]) - method.accuracy_given_pass(f[cfg.weak])),
    )  # fmt: skip

    def k_star(f: Family, penalty: float, names: Sequence[str]) -> list[int]:
        return [method.best_attempts(method.mean_curve(f[name], cfg.attempts, penalty), TIE) for name in names]

    everyone = list(limited)
    report.measure(
        "c5", "K* at a penalty of 4, median of the family",
        over_tasks(lambda f: float(np.median(k_star(f, 4, everyone)))),
    )  # fmt: skip
    rising = sum(
        any(b > a for a, b in itertools.pairwise(ks))
        for ks in ([k_star(limited, c, [name])[0] for c in cfg.penalties] for name in everyone)
    )
    report.measure("c5", "models whose K* rises with the penalty", exact(rising, len(everyone)))
    for penalty in (4, 8):
        report.measure(
            "c6", f"K* at a penalty of {penalty}, median of the middle models m4 to m7",
            over_tasks(lambda f, penalty=penalty: float(np.median(k_star(f, penalty, MIDDLE)))),
        )  # fmt: skip
    others = [name for name in everyone if name != cfg.strong]
    report.measure(
        "c7", "K* of the strong model minus the largest other K*, at a penalty of 2",
        over_tasks(lambda f: float(k_star(f, 2, [cfg.strong])[0] - max(k_star(f, 2, others)))),
    )  # fmt: skip
    report.measure("c8", "style kept by right answers minus by wrong ones", _style_gap(cfg, styles))


def _pass_at_1(tasks: list[TaskCounts]) -> float:
    return method.pass_at_1([t.right / t.n for t in tasks])


def _points(of: Family) -> tuple[list[float], list[float]]:
    """pass@1 and accuracy given pass of the models of which anything is accepted."""
    pairs = [(_pass_at_1(t), method.accuracy_given_pass(t)) for t in of.values()]
    kept = [pair for pair in pairs if not np.isnan(pair[1])]
    return [x for x, _ in kept], [y for _, y in kept]


def _hard_half(of: Family) -> list[int]:
    """The tasks with the lower accuracy given pass, averaged over the models."""
    count = len(next(iter(of.values())))
    shares = [
        np.mean([t[i].right / t[i].accepted for t in of.values() if t[i].accepted] or [1.0]) for i in range(count)
    ]
    return sorted(np.argsort(shares, kind="stable")[: count // 2].tolist())


def _wrong_share(of: Family) -> float:
    return float(np.nanmean([1 - method.accuracy_given_pass(t) for t in of.values()]))


def _late_minus_first(cfg: DictConfig) -> Callable[[Family], float]:
    def difference(of: Family) -> float:
        pairs = [method.wrong_by_attempt(t, (1, 2, 8, cfg.samples + 1)) for t in of.values()]
        found = [late - first for first, _, late in pairs if not np.isnan(late - first)]
        return float(np.mean(found)) if found else 0.0  # nobody submits that late

    return difference


def _slope(of: Family) -> Measured:
    """Slope over the models with Student's t interval."""
    from scipy import stats

    x, y = _points(of)
    line = stats.linregress(x, y)
    error = 0.0 if np.ptp(y) == 0 else line.stderr  # scipy has none for a constant
    half = float(stats.t.ppf(0.975, len(x) - 2) * error)
    return Measured(line.slope, line.slope - half, line.slope + half, len(x))


def _style_gap(cfg: DictConfig, styles: pd.DataFrame) -> Measured:
    """Mean over (model, style) of P(style | right) - P(style | wrong), bootstrap over tasks; pairs need both kinds."""
    columns = ["right", "right_styled", "wrong", "wrong_styled"]
    table = styles.pivot_table(index="task", columns=["model", "style"], values=columns, aggfunc="sum")
    cube = np.stack([table[column].to_numpy() for column in columns], axis=-1)  # [tasks, pairs, 4]

    def gap(rows: np.ndarray, _: np.ndarray) -> float:
        right, right_styled, wrong, wrong_styled = rows.sum(0).T
        both = (right > 0) & (wrong > 0)
        if not both.any():
            return 0.0
        return float(np.mean(right_styled[both] / right[both] - wrong_styled[both] / wrong[both]))

    return paired_bootstrap(cube, cube, gap, cfg.seed)


def _reported(report: Report) -> pd.DataFrame:
    """Table t1 as reported."""
    import pandas as pd

    table = next(t for t in report.reported.tables if t.id == "t1")
    return pd.DataFrame([list(row) for row in table.rows], columns=list(table.columns))
