"""The tables: t1 to t4 of the paper and those behind them. Costs are in millionths of a US dollar."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.costs import cost_of_pass as cop
from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import bootstrap_mean
from papers.cost_of_pass import method, zoo
from papers.cost_of_pass.analysis import MICRO, Found, frontiers, gain_intervals, gains, release_rows, techniques
from papers.cost_of_pass.method import CLASSES

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from common.reporting.report import Report


def write(cfg: DictConfig, report: Report, found: Found) -> None:
    """t1 to t4, the frontiers and who would be missed, and how sure that is."""
    import pandas as pd

    report.table("t1", pd.DataFrame(_human_rows()), note="attempt: 10,000 output and 500 prompt tokens.")
    dated = sorted(method.MODELS, key=lambda row: row[2])
    report.table("t2", pd.DataFrame(dated, columns=["model", "class", "release"]))
    report.table(
        "bounds", pd.DataFrame(_bound_rows(report)), "What the published cells of t3 say about unsolved problems",
        "At most this share of the problems was never solved: each of those costs the human's price.",
    )  # fmt: skip
    report.table(
        "t3", pd.DataFrame(_single_rows(found)),
        note="Our models, each with the human; costs in millionths of a US dollar. cost: of an attempt. A random guess "
        "writes what a direct answer takes, at the lowest price of a token, and reads nothing.",
    )  # fmt: skip
    report.table(
        "measured", pd.DataFrame(_measured_rows(found)), "The same at the measured price", timing=["micro_usd"]
    )
    report.table(
        "t4", _gain_table(found),
        note="Percent, price by parameters, the paper's estimator. Votes and self-refine: over the models that do not "
        "reason; best of n by the reward model: over the model that it judges.",
    )  # fmt: skip
    report.table(
        "techniques", pd.DataFrame(_gain_rows(found)), "Gains of techniques, and without the winner's curse",
        "split: winners chosen on half of the runs, paid by the other half.",
    )  # fmt: skip
    _cheapest(report, found)
    report.table("essential", pd.DataFrame(_essential_rows(found)), "Essentialness of classes (shares of the cost)")
    report.table("leave_one_out", pd.DataFrame(_leave_one_rows(found)), "Frontiers without one model")
    if found.releases["training_flops"].notna().all():
        report.table("releases", pd.DataFrame(release_rows(found)), "The frontier by training compute of the releases")
        report.table("half_life", pd.DataFrame(_half_life_rows(found)), "Exponential fits to the frontier's fall")
    report.table(
        "estimators", pd.DataFrame(_estimator_rows(found)), "One frontier, three estimators",
        "naive: the paper's. shrinkage: Beta(1/2, 1/2). split: chosen and judged on different runs.",
    )  # fmt: skip
    _public(cfg, report)
    weights = {entry.name: zoo.weights(cfg, entry) for entry in cfg.zoo}
    report_costs(report, lambda arm: from_checkpoint(weights[arm.split(", ")[0]], cfg.network))


def _cheapest(report: Report, found: Found) -> None:
    import pandas as pd

    report.table(
        "winners", pd.DataFrame(_winner_rows(found, ("parameters", "flat"), (0.0, 0.5))), "Who is cheapest, by price",
        "Shares: of bootstrap samples over problems and runs with a cheapest model of the class. shrinkage: R with half"
        " a success and half a failure more.",
    )  # fmt: skip
    report.table(
        "winners_measured", pd.DataFrame(_winner_rows(found, ("measured",))), "Who is cheapest at the measured price",
        timing=["model", "class", "micro_usd", *CLASSES],
    )  # fmt: skip
    report.table("human", pd.DataFrame(_sweep_rows(found)), "Who is cheapest, by what the human costs")
    if rows := list(_more_runs_rows(found)):
        report.table("more_runs", pd.DataFrame(rows), "What eight runs miss: a never solved problem costs the human")


def _human_rows() -> Iterator[dict[str, Any]]:
    prompt, output = method.DEEPSEEK_R1
    cost = 500 * prompt + 10_000 * output
    for task, (kind, human, samples, metric) in method.TASKS.items():
        even = float(method.break_even(cost, human))
        yield {
            "task": task, "class": kind, "human_usd": human, "samples": samples, "metric": metric,
            "R1_attempt_usd": cost, "breaks_even_at_accuracy": even if even <= 1 else float("nan"),
        }  # fmt: skip


def _bound_rows(report: Report) -> Iterator[dict[str, Any]]:
    (table,) = [table for table in report.reported.tables if table.id == "t3"]
    for task, model, usd in table.rows:
        human = method.TASKS[task][1]
        share = method.unsolved_at_most(usd, human)
        yield {"task": task, "model": model, "usd": usd, "human_usd": human, "unsolved_at_most": share}


def _single_rows(found: Found) -> Iterator[dict[str, Any]]:
    kinds = dict(zip(found.releases["name"], found.releases["class"], strict=True))
    for task in found.tasks:
        human, data = found.human(task), found.frontier(task)
        flat = found.frontier(task, "flat")
        alone = {price: method.single(of, human).mean(1) for price, of in (("parameters", data), ("flat", flat))}
        runs = found.runs[found.runs["task"] == task].groupby("arm")
        written = (runs["output_tokens"].mean() + runs["discarded_tokens"].mean()).to_dict()
        for i, model in enumerate(data.models):
            interval = bootstrap_mean(method.single(data, human)[i])
            yield {
                "task": task, "model": model, "class": kinds[model], "accuracy": data.correct[i].mean(),
                "output_tokens": written[model], "cost": MICRO * data.usd[i].mean(),
                "cost_of_pass": MICRO * interval.value, "low": MICRO * interval.low, "high": MICRO * interval.high,
                "cost_of_pass_flat": MICRO * alone["flat"][i],
            }  # fmt: skip
        guess = _guess(found, task, written)
        if guess is not None:
            yield guess
        yield {"task": task, "model": "human", "class": "human", "accuracy": 1.0, "cost": MICRO * human,
               "cost_of_pass": MICRO * human, "cost_of_pass_flat": MICRO * human}  # fmt: skip


def _guess(found: Found, task: str, written: dict[str, float]) -> dict[str, Any] | None:
    """The row of a random guess; exact. None for tasks whose answers cannot be enumerated."""
    chances = found.guesses.loc[found.guesses["task"] == task, "chance"].to_numpy()
    if not len(chances) or not found.direct(task):
        return None
    tokens = min(written[model] for model in found.direct(task))
    human, own = found.human(task), found.cfg.prices
    each = {
        "cost_of_pass": tokens * own.usd_per_parameter * min(found.sizes.values()),
        "cost_of_pass_flat": tokens * own.usd_per_token,
    }
    row = {"task": task, "model": "random guess", "class": "none", "accuracy": chances.mean(), "output_tokens": tokens}
    row["cost"] = MICRO * each["cost_of_pass"]
    return row | {
        key: MICRO * np.minimum(cop.cost_of_pass(cost, chances), human).mean() for key, cost in each.items()
    }  # fmt: skip


def _measured_rows(found: Found) -> Iterator[dict[str, Any]]:
    for task in found.tasks:
        data = found.frontier(task, "measured")
        for model, value in zip(data.models, method.single(data, found.human(task)).mean(1), strict=True):
            yield {"task": task, "model": model, "micro_usd": MICRO * value}


def _gain_rows(found: Found) -> Iterator[dict[str, Any]]:
    for name in techniques(found.cfg):
        for task in found.tasks:
            of = gain_intervals(found, task, name)
            if of is None:
                continue
            plain, split = of
            yield {
                "technique": name, "task": task, "gain": plain.value, "low": plain.low, "high": plain.high,
                "split": split.value, "split_low": split.low, "split_high": split.high,
            }  # fmt: skip


def _gain_table(found: Found) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name in techniques(found.cfg):
        row: dict[str, Any] = {"technique": name}
        for task in found.tasks:
            of = gains(found, task, name)
            row[task] = float("nan") if of is None else 100 * cop.gain(of[0], of[1])
        rows.append(row)
    return pd.DataFrame(rows)


def _winner_rows(found: Found, prices: tuple[str, ...], priors: tuple[float, ...] = (0.0,)) -> Iterator[dict[str, Any]]:
    for task, price, prior in itertools.product(found.tasks, prices, priors):
        data, human, kinds = found.frontier(task, price), found.human(task), found.classes(task)
        alone = method.single(data, human, prior).mean(1)
        best = int(alone.argmin())
        shares = method.winner_shares(data, kinds, human, found.cfg.resamples, found.cfg.seed, prior)
        owner = next(name for name, models in kinds.items() if data.models[best] in models)
        yield {
            "task": task, "price": price, "estimator": "shrinkage" if prior else "naive", "model": data.models[best],
            "class": owner, "micro_usd": MICRO * alone[best],
        } | {name: shares.get(name, 0.0) for name in CLASSES}  # fmt: skip


def _more_runs_rows(found: Found) -> Iterator[dict[str, Any]]:
    """Of the models with further runs: accuracy and cost-of-pass with the human from the runs of the study, and from
    the further ones."""
    for task in found.tasks:
        arms = [f"{model}, fresh" for model in found.direct(task)]
        if not set(arms) <= set(found.runs.loc[found.runs["task"] == task, "arm"]):
            continue
        few, many = found.attempts(task).of(found.direct(task)), found.attempts(task, fresh=True).of(arms)
        alone = [MICRO * method.single(of, found.human(task)).mean(1) for of in (few, many)]
        for i, model in enumerate(few.models):
            yield {
                "task": task, "model": model, "runs": few.correct.shape[-1], "accuracy": few.correct[i].mean(),
                "cost_of_pass": alone[0][i], "further_runs": many.correct.shape[-1],
                "their_accuracy": many.correct[i].mean(), "their_cost_of_pass": alone[1][i],
            }  # fmt: skip


def _sweep_rows(found: Found) -> Iterator[dict[str, Any]]:
    for task in found.tasks:
        data = found.frontier(task)
        for factor in found.cfg.human_factors:
            human = factor * found.human(task)
            alone = method.single(data, human).mean(1)
            best = int(alone.argmin())
            below = alone[best] < human * (1 - 1e-12)
            yield {"task": task, "factor": factor, "human": MICRO * human,
                   "cheapest": data.models[best] if below else "human",
                   "cost_of_pass": MICRO * alone[best]}  # fmt: skip


def _essential_rows(found: Found) -> Iterator[dict[str, Any]]:
    for task in found.tasks:
        of, human = frontiers(found, task), found.human(task)
        data, kinds = found.frontier(task), found.classes(task)
        for i, name in enumerate(CLASSES):
            share = cop.gain_interval(of[:, 1 + i], of[:, 0])
            less = cop.without(data, kinds.get(name, []))
            split = cop.gain(cop.split_frontier(less, human), cop.split_frontier(data, human))
            yield {"task": task, "class": name, "essentialness": share.value, "low": share.low, "high": share.high,
                   "split": split}  # fmt: skip


def _leave_one_rows(found: Found) -> Iterator[dict[str, Any]]:
    for task in found.tasks:
        data, human = found.frontier(task), found.human(task)
        for model in data.models:
            found_share = cop.essentialness(data, [model], human)
            yield {"task": task, "without": model, "essentialness": found_share.value, "low": found_share.low,
                   "high": found_share.high}  # fmt: skip


def _half_life_rows(found: Found) -> Iterator[dict[str, Any]]:
    import pandas as pd

    rows = pd.DataFrame(release_rows(found))
    for task, of in rows.groupby("task", sort=False):
        try:
            fit = cop.half_life(of["training_flops"], of["share_of_human"])
        except ValueError as error:  # too few releases, or a frontier that nothing lowered
            yield {"task": task, "note": str(error)}
            continue
        yield {"task": task, "half_life_flops": fit["half_life"], "a": fit["a"], "c": fit["c"], "note": ""}


def _estimator_rows(found: Found) -> Iterator[dict[str, Any]]:
    for task in found.tasks:
        data, human = found.frontier(task), found.human(task)
        naive = bootstrap_mean(cop.frontier(cop.values(data), human))
        others = {
            "shrinkage": cop.frontier(cop.values(data, prior=0.5), human),
            "split": cop.split_frontier(data, human),
        }
        means = method.single(data, human).mean(1).min()
        yield {"task": task, "naive": MICRO * naive.value, "low": MICRO * naive.low, "high": MICRO * naive.high} | {
            name: MICRO * of.mean() for name, of in others.items()
        } | {"minimum_of_means": MICRO * means}  # fmt: skip


def _public(cfg: DictConfig, report: Report) -> None:
    """Table 1 of the paper from its own records, where the data folder has them."""
    import pandas as pd

    folder = Path(cfg.data_root or ".") / str(cfg.public)
    if not cfg.data_root or not folder.is_dir():
        report.note(
            f"The records of the paper's API calls are not in the data folder ({cfg.public}): t3 and t4 of its ten "
            "models are not testable here."
        )
        return
    table = method.load_public(folder, "VanillaPromptMethod")
    rows = []
    for task, of in table.groupby("task"):
        data = method.attempts(of.drop(columns="usd"), of["usd"].to_numpy())
        alone = method.single(data, method.TASKS[str(task)][1]).mean(1)
        rows += [{"task": task, "model": m, "usd": v} for m, v in zip(data.models, alone, strict=True)]
    report.table("t3_public", pd.DataFrame(rows), "Table 1 of the paper, from its records of API calls")
