"""The claims. Problems are resampled task by task, and the cheapest model of a class is chosen anew in each sample."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from common.costs import cost_of_pass as cop
from common.metrics.intervals import Measured, bootstrap_mean, exact
from papers.cost_of_pass import method
from papers.cost_of_pass.analysis import Found, frontiers, gains, release_rows
from papers.cost_of_pass.method import CLASSES

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

CLAIMED = {"basic": "lightweight", "knowledge": "large", "complex": "reasoning"}
GRID = (0.01, 0.05, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99, 1.0)  # chances of a right answer
SHAPES = ((1.0,), (0.5, 0.5), (0.8, 0.2), (0.4, 0.3, 0.3), (0.25, 0.25, 0.25, 0.25))  # how wrong answers agree
Pairs = list[tuple[np.ndarray, np.ndarray]]


def judge(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every claim or says why it cannot be."""
    missed = {kind: gate(found, kind) for kind in CLAIMED}
    for claim, kind in (("c1", "basic"), ("c2", "knowledge"), ("c3", "complex")):
        if reason := missed[kind]:
            report.not_testable(claim, reason)
            continue
        part = f"cheapest other class over the cheapest {CLAIMED[kind]} model, smallest of the {kind} tasks"
        report.measure(claim, part, margin(found, kind))
    if missed["complex"] is None:
        _tokens_and_prices(report, found)
    report.not_testable(
        "c4", "no calendar time: needs the records of the paper's API calls; tables releases and half_life have the "
        "frontier by training compute",
    )  # fmt: skip
    if reasons := [reason for reason in missed.values() if reason]:
        report.not_testable("c5", "; ".join(reasons))
    else:
        for kind, name in CLAIMED.items():
            part = f"essentialness of {name} minus the largest other, smallest of the {kind} tasks"
            report.measure("c5", part, lead(found, kind))
    _techniques(report, found)
    _definitions(cfg, report, found)


def gate(found: Found, kind: str) -> str | None:
    """Why a class of tasks cannot carry its claim: no task, no such models, or a class that cannot do it; or None."""
    if not found.of_class(kind):
        return f"no {kind} task in profile {found.cfg.profile}"
    for name in found.of_class(kind):
        data, kinds = found.frontier(name), found.classes(name)
        if len(kinds) < len(CLASSES):
            return f"not all classes have a model on {name} in profile {found.cfg.profile}"
        for owner, needed in found.task(name).gate.items():
            models = kinds.get(str(owner), [])
            best = max((data.correct[data.index(model)].mean() for model in models), default=0.0)
            if best < needed:
                return f"gate: accuracy of the best {owner} model on {name} measured {best:.3f}, needed {needed}"
    return None


def margin(found: Found, kind: str) -> Measured:
    """How many times dearer the cheapest model of another class is, at the task of the kind where that is least."""
    pairs = []
    for task in found.of_class(kind):
        data, kinds = found.frontier(task), found.classes(task)
        alone = method.single(data, found.human(task)).T
        own = [data.index(model) for model in kinds[CLAIMED[kind]]]
        others = [i for i in range(len(data.models)) if i not in own]
        pairs.append((alone[:, own], alone[:, others]))

    def smallest(drawn: Pairs) -> float:
        return min(float(others.mean(0).min() / own.mean(0).min()) for own, others in drawn)

    return method.resampled(pairs, smallest, found.cfg.seed)


def lead(found: Found, kind: str) -> Measured:
    """Essentialness of the claimed class minus the largest of another, at the task of the kind where that is least."""
    column = 1 + CLASSES.index(CLAIMED[kind])
    others = [i for i in range(1, 1 + len(CLASSES)) if i != column]

    def smallest(drawn: Pairs) -> float:
        leads = []
        for of, _ in drawn:
            share = 1 - of.mean(0)[0] / of.mean(0)
            leads.append(float(share[column] - share[others].max()))
        return min(leads)

    pairs = [(frontiers(found, task),) * 2 for task in found.of_class(kind)]
    return method.resampled(pairs, smallest, found.cfg.seed)


def _tokens_and_prices(report: Report, found: Found) -> None:
    task = found.of_class("complex")[0]
    kinds, runs = found.classes(task), found.runs[found.runs["task"] == task]
    written = runs.groupby(["arm", "problem_id"])["output_tokens"].mean().unstack("problem_id")
    reasoning, large = (written.loc[kinds[name]].to_numpy().T for name in ("reasoning", "large"))

    def ratio(drawn: Pairs) -> float:
        return float(drawn[0][0].mean(0).min() / drawn[0][1].mean(0).max())

    report.measure(
        "c3", "output tokens of a reasoning model over those of a direct answer, first complex task",
        method.resampled([(reasoning, large)], ratio, found.cfg.seed), detail=task,
    )  # fmt: skip
    sizes = {
        name: [found.sizes[of] for of in found.releases.loc[found.releases["name"].isin(kinds[name]), "of"]]
        for name in ("lightweight", "reasoning")
    }
    report.measure(
        "c3", "price of an output token, cheapest reasoning model over the dearest lightweight one",
        exact(min(sizes["reasoning"]) / max(sizes["lightweight"])),
    )  # fmt: skip


def _techniques(report: Report, found: Found) -> None:
    parts = {f"gain of a vote of {k} over stored runs, mean over tasks": (f"vote of {k}, stored", 0) for k in (3, 4)}
    parts |= {
        f"gain of a vote of {k} over fresh runs, split-sample, mean over tasks": (f"vote of {k}, fresh", 2)
        for k in (3, 4)
    }
    parts["gain of self-refinement, mean over tasks"] = ("self-refine", 0)
    for part, (name, first) in parts.items():
        listed = [of for task in found.tasks if (of := gains(found, task, name)) is not None]
        if not listed:
            report.not_testable("c6", f"{name} was not run in profile {found.cfg.profile}")
            continue
        pairs = [(of[first], of[first + 1]) for of in listed]
        report.measure("c6", part, method.resampled(pairs, mean_gain, found.cfg.seed))
    report.measure(
        "c6", "true cost-of-pass of a vote over that of one answer, smallest of a grid", exact(dearest_vote())
    )


def mean_gain(drawn: Pairs) -> float:
    """Mean over tasks of (V - V') / V."""
    return float(np.mean([cop.gain(before, after) for before, after in drawn]))


def dearest_vote() -> float:
    """The smallest (k C / R_k) / (C / R) over k = 2..9 and the grid of chances, each R_k by enumeration."""
    found = []
    for right, shape, k in itertools.product(GRID, SHAPES, range(2, 10)):
        chance = cop.vote_success([right, *((1 - right) * np.array(shape))], k)
        found.append(k * right / min(chance, 1.0))
    return min(found)


def _definitions(cfg: DictConfig, report: Report, found: Found) -> None:
    spent = _spent(cfg, found)
    if spent is None:
        report.not_testable("c7", "gate: fewer than two problems were ever solved, needed 2")
    else:
        report.measure(
            "c7", "money spent until the first success over C/R, mean over models and problems", spent
        )  # fmt: skip
    rises = [0.0]
    if found.releases["training_flops"].notna().all():
        rows = list(release_rows(found))
        pairs = [(a, b) for a, b in itertools.pairwise(rows) if a["task"] == b["task"]]
        rises = [(b["cost_of_pass"] - a["cost_of_pass"]) / 1e6 for a, b in pairs]
    report.measure("c7", "largest rise of a frontier when a release is added", exact(max(*rises, 0.0), len(rises)))
    above, under, problems = 0, [], 0
    for task in found.tasks:
        data, human = found.frontier(task), found.human(task)
        each = cop.frontier(cop.values(data), human)
        above, problems = above + int((each > human).sum()), problems + len(each)
        under.append(1 - each.mean() / method.single(data, human).mean(1).min())
    report.measure("c7", "problems whose frontier lies above the cost of the human", exact(above, problems))
    broken = sum(share < -1e-12 for share in under)
    report.measure("c8", "tasks where the mean of minima exceeds the minimum of means", exact(broken, len(under)))
    report.measure(
        "c8", "how far the mean of minima lies below the minimum of means, mean over tasks",
        exact(float(np.mean(under)), len(under)),
        detail=", ".join(f"{task} {share:.4f}" for task, share in zip(found.tasks, under, strict=True)),
    )  # fmt: skip


def _spent(cfg: DictConfig, found: Found) -> Measured | None:
    """Literal retries of the recorded runs over C/R: a value a problem, averaged over the models that solved it; None
    where fewer than two problems were solved."""
    random, ratios = np.random.default_rng([cfg.seed, 0x5BE7]), []
    for task in found.tasks:
        data = found.frontier(task)
        v = cop.values(data)
        for problem in range(len(data.problems)):
            solved = np.flatnonzero(np.isfinite(v[:, problem]))
            spent = [
                method.retries(data.correct[m, problem], data.usd[m, problem], cfg.retries, random) for m in solved
            ]
            if spent:
                ratios.append(float(np.mean(spent / v[solved, problem])))
    return bootstrap_mean(ratios, cfg.seed) if len(ratios) > 1 else None
