"""From costs to curves, tables and verdicts. A curve holds, for each problem and limit, accuracy and cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.frontier import area_under, cost_at, cost_ratios
from common.metrics.intervals import Measured, exact
from common.metrics.pools import best_of_k, majority_at_k

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from common.reporting.report import Report

NAMES = {
    "a_star": "A*, first goal",
    "a_star_budget": "A*, until the budget ends",
    "best_of_n": "best-of-N",
    "self_consistency": "self-consistency",
    "particle_filter": "particle filter",
    "beam": "beam search",
}
SIZES = ("small", "base", "large")  # of policies; an arm names one that is not the base
VOTES = 100  # random subsets behind a point of self-consistency
Index = dict[str, np.ndarray]  # task -> problems, with repeats


@dataclass(frozen=True)
class Curve:
    """One method on one task, means over sampling seeds: [problems, limits] each. ns: the limits."""

    ns: tuple[int, ...]
    correct: np.ndarray
    tokens: np.ndarray
    passes: np.ndarray

    def points(self, cost: str, index: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(cost, accuracy) over the problems of index, by rising cost. Limits that cost the same, as when a search ends
        by itself before either, are one point: that of the larger limit."""
        rows = slice(None) if index is None else index
        x, y = getattr(self, cost)[rows].mean(0), self.correct[rows].mean(0)
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        last = np.append(np.diff(x) > 0, True) & (x > 0)
        return x[last], y[last]


@dataclass(frozen=True)
class Found:
    """What `infer` wrote, and the curves of each task and method."""

    costs: pd.DataFrame
    pool: pd.DataFrame
    nodes: pd.DataFrame
    lengths: dict[str, dict[str, list[float]]]
    gates: dict[str, str | None]
    curves: dict[str, dict[str, Curve]]


def load(cfg: DictConfig) -> Found:
    """Reads the outputs of `infer`."""
    import pandas as pd

    folder = Path(cfg.artifacts) / "infer"
    costs, pool = (pd.read_csv(folder / f"{name}.csv") for name in ("costs", "pool"))
    nodes = pd.read_csv(folder / "nodes.csv", dtype={"node": str, "parent": str}, keep_default_na=False)
    lengths, gates = (json.loads((folder / f"{name}.json").read_text()) for name in ("lengths", "gates"))
    curves = {}
    for task in cfg.tasks:
        ns = tuple(cfg.ns[task])
        searched = {
            arm: search_curve(costs[(costs["task"] == task) & (costs["arm"] == arm)], ns)
            for arm in ("a_star", "a_star_budget", "particle_filter", "beam", "small a_star")
        }
        curves[task] = searched | pool_curves(pool[pool["task"] == task], ns, cfg.seed)
    return Found(costs, pool, nodes, lengths, gates, curves)


def search_curve(rows: pd.DataFrame, ns: Sequence[int]) -> Curve:
    """Of the costs of one arm on one task."""
    mean = rows.astype({"correct": float}).groupby(["problem_id", "n"])[["correct", "tokens", "passes"]].mean()
    return Curve(tuple(ns), *(mean[name].unstack("n")[list(ns)].to_numpy() for name in ("correct", "tokens", "passes")))


def pool_curves(rows: pd.DataFrame, ns: Sequence[int], seed: int = 0) -> dict[str, Curve]:
    """Best-of-N with one pass a sample, the same with one a step, and self-consistency, from pools of samples."""
    ns = tuple(ns)
    vote, tokens, steps = (np.zeros((rows["problem_id"].nunique(), len(ns))) for _ in range(3))
    seeds = rows["seed"].nunique()
    for (problem, of_seed), group in rows.groupby(["problem_id", "seed"]):
        right = group["correct"].to_numpy(bool)
        said = [None if isinstance(answer, float) else str(answer) for answer in group["answer"]]
        for i, n in enumerate(ns):
            vote[problem, i] += majority_at_k(said, right, n, seed + int(of_seed), VOTES) / seeds
            tokens[problem, i] += n * group["tokens"].mean() / seeds
            steps[problem, i] += n * group["steps"].mean() / seeds
    best, once = best_of_pool(rows, ns), np.broadcast_to(np.array(ns, dtype=float), tokens.shape)
    return {
        "best_of_n": Curve(ns, best, tokens, once),
        "best_of_n, every step scored": Curve(ns, best, tokens, steps),
        "self_consistency": Curve(ns, vote, tokens, np.zeros_like(tokens)),
    }


def best_of_pool(rows: pd.DataFrame, ns: Sequence[int], score: str = "score") -> np.ndarray:
    """Expected correctness of best-of-N by a column of scores: [problems, limits], means over seeds."""
    best = np.zeros((rows["problem_id"].nunique(), len(ns)))
    for (problem, _), group in rows.groupby(["problem_id", "seed"]):
        scores, right = group[score].to_numpy(), group["correct"].to_numpy(bool)
        best[problem] += [best_of_k(scores, right, n) for n in ns]
    return best / rows["seed"].nunique()


def bootstrap(
    statistic: Callable[[Index], float], sizes: dict[str, int], seed: int, resamples: int, least: float = 0.9
) -> Measured | None:
    """statistic(task -> problems) with a 95% percentile interval over problems drawn anew within each task.

    None where the statistic is undefined (nan) on all problems, or on more than 1 - least of the draws.
    """
    random = np.random.default_rng([seed, 0xA57A])
    value = statistic({task: np.arange(n) for task, n in sizes.items()})
    draws = np.array(
        [statistic({task: random.integers(0, n, n) for task, n in sizes.items()}) for _ in range(resamples)]
    )
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(finite) < least * resamples:
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return Measured(value, min(low, value), max(high, value), sum(sizes.values()))


def savings(ours: Curve, other: Curve, cost: str, index: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(levels, other's cost over ours) at each accuracy on a grid of one point that both reach."""
    (x, y), (other_x, other_y) = ours.points(cost, index), other.points(cost, index)
    if not len(x) or not len(other_x):
        return np.array([]), np.array([])
    return cost_ratios(x, y, other_x, other_y)


def ratio_at(level: float, ours: Curve, other: Curve, cost: str, index: np.ndarray | None = None) -> float:
    """Other's cost over ours at one level: 0 where ours never reaches it; where only the other never does, its largest
    cost stands in, so that the ratio is a lower bound."""
    (x, y), (other_x, other_y) = ours.points(cost, index), other.points(cost, index)
    need, other_need = cost_at(level, x, y)[0], cost_at(level, other_x, other_y)[0]
    if np.isnan(need):
        return 0.0
    return float((other_x[-1] if np.isnan(other_need) else other_need) / need)


def area(curve: Curve, low: float, high: float, index: np.ndarray) -> float:
    """Mean accuracy over log tokens from low to high."""
    return area_under(*curve.points("tokens", index), low, high)


def at_cost(curve: Curve, cost: str, spent: float, index: np.ndarray) -> np.ndarray:
    """Accuracy of each problem of index at a mean cost between two limits: interpolated over its logarithm."""
    x = np.log(np.maximum(getattr(curve, cost)[index].mean(0), 1e-9))
    place = np.interp(np.log(max(spent, 1e-9)), x, np.arange(len(x)))
    below = min(int(place), len(x) - 2)
    share = place - below
    rows = curve.correct[index]
    return (1 - share) * rows[:, below] + share * rows[:, below + 1]


def dominance(ours: Curve, others: list[Curve], cost: str, index: np.ndarray) -> list[bool]:
    """For each limit above the first: whether ours is at most one standard error below the best other at the same cost.

    The best is chosen on one half of the problems and compared on the other, both ways round.
    """
    halves, verdicts = (index[0::2], index[1::2]), []
    for choose, compare in (halves, halves[::-1]):
        for i in range(1, len(ours.ns)):
            spent = float(getattr(ours, cost)[choose][:, i].mean())
            best = max(others, key=lambda c, s=spent, on=choose: at_cost(c, cost, s, on).mean())
            spent = float(getattr(ours, cost)[compare][:, i].mean())
            gap = ours.correct[compare][:, i] - at_cost(best, cost, spent, compare)
            verdicts.append(bool(gap.mean() >= -gap.std(ddof=1) / np.sqrt(len(gap))))
    return verdicts


def misplaced(nodes: pd.DataFrame) -> tuple[int, int]:
    """(extensions of a state whose f was not the lowest among the open ones, extensions): the queue, played again."""
    wrong = total = 0
    for _, tree in nodes.groupby(["task", "problem_id"]):
        f, place, made, done = (tree[name].to_numpy() for name in ("f", "place", "made", "done"))
        for i in np.flatnonzero((place > 0) & ~done.astype(bool)):
            open_ = (made < place[i]) & ((place < 0) | (place >= place[i]))
            wrong += int(f[i] > f[open_].min() + 1e-9)
            total += 1
    return wrong, total


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """t1 accuracy and cost, t2 savings, t3 ablation, t4 how searches ended, t5 noise."""
    import pandas as pd

    rows = []
    for task, curves in found.curves.items():
        for method, curve in curves.items():
            extra = _extra(found.costs, task, method)
            for i, n in enumerate(curve.ns):
                accuracy, tokens = curve.correct[:, i].mean(), curve.tokens[:, i].mean()
                rows.append(
                    {
                        "task": task, "method": NAMES.get(method, method), "N": n, "accuracy": accuracy,
                        "tokens": tokens, "prm_passes": curve.passes[:, i].mean(),
                        "expansions": extra.get((n, "expansions")), "abstained": extra.get((n, "abstained")),
                        "tokens_per_correct": tokens / accuracy if accuracy else None,
                    }
                )  # fmt: skip
        for arm in ("greedy", "small greedy", "large greedy", "dvts"):
            own = found.costs[(found.costs["task"] == task) & (found.costs["arm"] == arm)]
            if len(own):
                accuracy, tokens = own["correct"].mean(), own["tokens"].mean()
                rows.append(
                    {
                        "task": task, "method": arm, "N": own["n"].iloc[0], "accuracy": accuracy, "tokens": tokens,
                        "prm_passes": own["passes"].mean(),
                        "tokens_per_correct": tokens / accuracy if accuracy else None,
                    }
                )  # fmt: skip
    limits = ", ".join(f"{t} {of['base'][0]:.1f}" for t, of in found.lengths.items())
    report.table(
        "t1", pd.DataFrame(rows),
        note=f"Costs are means a problem. N: samples, particles or beams; for A* the limit in mean answers ({limits} "
        "tokens). best-of-N: one pass a sample, or one a step.",
    )  # fmt: skip
    report.table("t2", _saving_table(cfg, found), note="Cost of the other method over that of A* (first goal) at equal "
                 "accuracy, on a grid of one point; above 1 A* is cheaper. Empty: no level in common.")  # fmt: skip
    report.table("t3", _ablation_table(cfg, found), note=f"{cfg.ablation.task}, limit N={cfg.ablation.n}, one seed.")
    report.table("t4", _ending_table(found), note="A* with the default settings. false goals: wrong ones among the "
                 "first goals that left the queue. duplicates: share of the proposed steps.")  # fmt: skip
    report.table("t5", noise_table(cfg, found), "Accuracy under a noisy reward model",
                 note="Persistent noise on the logit of every score, one seed.")  # fmt: skip
    report.table("judge", judge_table(found), "The reward model on what it met",
                 note="0.5 is chance. right: share of the scored ones. spread: standard deviation of the scores of one "
                 "problem.")  # fmt: skip
    report.table("pops", pops(found.nodes), "Extensions by depth", note="A* at the largest limit, first seed.")
    sizes = {size: from_checkpoint(Path(cfg.reasoners) / f"reasoner_{size}", cfg.network) for size in SIZES}
    report_costs(report, lambda arm: sizes.get(arm.split()[0], sizes["base"]))


def _extra(costs: pd.DataFrame, task: str, arm: str) -> dict[tuple[int, str], float]:
    """(limit, name) -> expansions and share of abstentions of A*."""
    own = costs[(costs["task"] == task) & (costs["arm"] == arm)]
    if not own["expansions"].notna().any():
        return {}
    out = {}
    for n, group in own.groupby("n"):
        out[int(n), "expansions"] = group["expansions"].mean()
        out[int(n), "abstained"] = (group["ended"] == "none").mean()
    return out


def _saving_table(cfg: DictConfig, found: Found) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for task, curves in found.curves.items():
        compared = [("tokens", name) for name in ("best_of_n", "self_consistency", "particle_filter", "beam")]
        stepwise = ("particle_filter", "beam", "best_of_n, every step scored")
        compared += [("passes", name) for name in (*stepwise, "best_of_n")]
        for cost, name in compared:
            levels, ratios = savings(curves["a_star"], curves[name], cost)
            median = bootstrap(
                lambda index, task=task, name=name, cost=cost: _median(
                    savings(found.curves[task]["a_star"], found.curves[task][name], cost, index[task])[1]
                ),
                {task: len(curves[name].correct)}, cfg.seed, cfg.resamples,
            )  # fmt: skip
            rows.append(
                {
                    "task": task, "cost": {"passes": "PRM passes"}.get(cost, cost), "against": NAMES.get(name, name),
                    "levels": len(levels), "from": levels.min(initial=np.inf), "to": levels.max(initial=-np.inf),
                    "median": median.value if median else None, "low": median.low if median else None,
                    "high": median.high if median else None, "largest": ratios.max(initial=-np.inf),
                }
            )  # fmt: skip
    return pd.DataFrame(rows).replace([np.inf, -np.inf], None)


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _ablation_table(cfg: DictConfig, found: Found) -> pd.DataFrame:
    import pandas as pd

    own, n = cfg.search, cfg.ablation.n
    names = {"a_star": f"default: k={own.k}, {own.step_cost}, {own.stop}", "a_star_budget": "until the budget ends"}
    at = found.costs[(found.costs["task"] == cfg.ablation.task) & (found.costs["n"] == n) & (found.costs["seed"] == 0)]
    rows = []
    for arm in ("a_star", "a_star_budget", *cfg.ablation.variants):
        group = at[at["arm"] == arm]
        goals = group[group["ended"] == "goal"]
        k = cfg.ablation.variants[arm].get("k", own.k) if arm in cfg.ablation.variants else own.k
        rows.append(
            {
                "variant": names.get(arm, arm),
                "accuracy": group["correct"].mean(), "tokens": group["tokens"].mean(),
                "prm_passes": group["passes"].mean(), "expansions": group["expansions"].mean(),
                "false_goals": 1 - goals["correct"].mean() if len(goals) else None,
                "duplicates": group["duplicates"].sum() / max(1, k * group["expansions"].sum()),
                "abstained": (group["ended"] == "none").mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _ending_table(found: Found) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for (task, n), group in found.costs[found.costs["arm"] == "a_star"].groupby(["task", "n"]):
        goals = group[group["ended"] == "goal"]
        steps = group["duplicates"].sum() + group["passes"].sum() - (group["ended"] == "finish").sum()
        rows.append(
            {"task": task, "N": n} | {end: (group["ended"] == end).mean() for end in ("goal", "finish", "none")}
            | {"false_goals": 1 - goals["correct"].mean() if len(goals) else None,
               "duplicates": group["duplicates"].sum() / steps if steps else None}
        )  # fmt: skip
    return pd.DataFrame(rows)


def noise_table(cfg: DictConfig, found: Found) -> pd.DataFrame:
    """Accuracy of A*, particle filter and best-of-N by the noise of the scorer."""
    import pandas as pd

    rows = []
    for task in cfg.tasks:
        n = cfg.noise.n[task]
        costs = found.costs[(found.costs["task"] == task) & (found.costs["n"] == n) & (found.costs["seed"] == 0)]
        pool = found.pool[(found.pool["task"] == task) & (found.pool["seed"] == found.pool["seed"].min())]
        for sigma in (0, *cfg.noise.sigmas):
            row = {"task": task, "N": n, "sigma": sigma}
            for arm in ("a_star", "particle_filter"):
                mine = costs[costs["arm"] == (f"{arm}, sigma {sigma:g}" if sigma else arm)]
                row |= {NAMES[arm]: mine["correct"].mean(), f"{NAMES[arm]}, s.e.": mine["correct"].sem()}
            score = f"score, sigma {sigma:g}" if sigma else "score"
            best = best_of_pool(pool, (n,), score)[:, 0]
            row |= {NAMES["best_of_n"]: best.mean(), f"{NAMES['best_of_n']}, s.e.": best.std(ddof=1) / len(best) ** 0.5}
            rows.append(row)
    return pd.DataFrame(rows)


def pops(nodes: pd.DataFrame) -> pd.DataFrame:
    """Extensions by depth: how many a problem, the mean f and h = 1 - score, and how many were still right."""
    used = nodes[(nodes["place"] > 0) & ~nodes["done"]]
    problems = nodes.groupby("task")["problem_id"].nunique()
    table = used.assign(h=1 - used["score"], right=used["right"].astype(float)).groupby(["task", "depth"])
    out = table.agg(extensions=("f", "size"), f=("f", "mean"), h=("h", "mean"), right=("right", "mean")).reset_index()
    out["extensions"] /= out["task"].map(problems)
    return out


def judge_table(found: Found) -> pd.DataFrame:
    """AUROC of the reward model on what it met here: finished samples, and states that A* visited.

    Within problems: mean over problems that have both right and wrong ones; this is what a search can use.
    """
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    rows = []
    visited = found.nodes[found.nodes["right"].isin([True, False, "True", "False"])]
    visited = visited.assign(correct=visited["right"].astype(str) == "True", seed=0)
    for what, frame in (("finished samples", found.pool), ("states that A* visited", visited)):
        for task, of in frame.groupby("task"):
            each = [
                roc_auc_score(group["correct"], group["score"])
                for _, group in of.groupby(["seed", "problem_id"])
                if group["correct"].nunique() == 2
            ]
            both = of["correct"].nunique() == 2
            rows.append(
                {
                    "task": task, "scored": what, "right": of["correct"].mean(),
                    "auroc": roc_auc_score(of["correct"], of["score"]) if both else None,
                    "auroc_within_problems": np.mean(each) if each else None, "problems": len(each),
                    "spread_within_problems": of.groupby(["seed", "problem_id"])["score"].std().mean(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim."""
    wrong, total = misplaced(found.nodes)
    report.measure("c7", "extensions that were not of the lowest f among the open states", exact(wrong, total))
    report.not_testable("c4", "the reference is a closed model (o1) on MATH500 and AIME 2024")
    _small_against_large(cfg, report, found)
    for task, curves in found.curves.items():
        for method in NAMES:
            report.metric(f"{task}, {NAMES[method]}, accuracy at N={curves[method].ns[-1]}",
                          float(curves[method].correct[:, -1].mean()))  # fmt: skip
    found = replace(found, curves={t: c for t, c in found.curves.items() if not found.gates[f"{t} base"]})
    if not found.curves:
        for claim in ("c1", "c2", "c5", "c6"):
            report.not_testable(claim, "; ".join(found.gates[f"{task} base"] or "" for task in cfg.tasks))
        return
    sizes = {task: len(curves["a_star"].correct) for task, curves in found.curves.items()}
    _savings_claim(cfg, report, found, "c1", "tokens", ("best_of_n", "particle_filter"), sizes)
    _savings_claim(cfg, report, found, "c2", "passes", ("particle_filter",), sizes)

    def areas(name: str, index: Index) -> float:
        return float(np.mean([
            area(curves[name], cfg.ns[task][0] * found.lengths[task]["base"][0],
                 cfg.ns[task][-1] * found.lengths[task]["base"][0], index[task])
            for task, curves in found.curves.items()
        ]))  # fmt: skip

    for name in ("best_of_n", "self_consistency", "particle_filter", "beam"):
        measured = bootstrap(
            lambda index, name=name: areas("a_star_budget", index) - areas(name, index), sizes, cfg.seed, cfg.resamples
        )
        assert measured is not None, "an area is defined on any curve"
        each = [f"{task}: {_area_gap(cfg, found, task, name):+.3f}" for task in found.curves]
        report.measure("c5", f"area of A* minus {NAMES[name]}", measured, "; ".join(each))
    scored = ("particle_filter", "beam", "best_of_n, every step scored")
    for cost, others in (("tokens", ("best_of_n", "self_consistency", "particle_filter", "beam")), ("passes", scored)):

        def share(index: Index, cost: str = cost, others: Sequence[str] = others) -> float:
            marks = [
                mark
                for task, curves in found.curves.items()
                for mark in dominance(curves["a_star_budget"], [curves[o] for o in others], cost, index[task])
            ]
            return float(np.mean(marks))

        measured = bootstrap(share, sizes, cfg.seed, cfg.resamples)
        assert measured is not None, "a share is always defined"
        by = {"tokens": "tokens", "passes": "PRM passes"}[cost]
        report.measure("c6", f"share of limits at or above the best alternative, by {by}", measured)


def _area_gap(cfg: DictConfig, found: Found, task: str, name: str) -> float:
    length, curves = found.lengths[task]["base"][0], found.curves[task]
    everyone = np.arange(len(curves[name].correct))
    low, high = cfg.ns[task][0] * length, cfg.ns[task][-1] * length
    return area(curves["a_star_budget"], low, high, everyone) - area(curves[name], low, high, everyone)


def _savings_claim(
    cfg: DictConfig, report: Report, found: Found, claim: str, cost: str, against: Sequence[str], sizes: dict[str, int]
) -> None:
    """Median over all shared levels of all tasks, and the largest: chosen on one half, measured on the other."""
    tell = _as_ratio if cost == "tokens" else _as_saving

    def shared(name: str, index: Index) -> np.ndarray:
        return np.concatenate([savings(c["a_star"], c[name], cost, index[task])[1] for task, c in found.curves.items()])

    choices = []
    for name in against:
        measured = bootstrap(
            lambda index, name=name: tell(_median(shared(name, index))), sizes, cfg.seed, cfg.resamples
        )
        everyone = {task: np.arange(n) for task, n in sizes.items()}
        ratios = shared(name, everyone)
        if measured is None:
            report.not_testable(claim, f"A* and {NAMES[name]} share no accuracy above that of a single sample")
            return
        largest = tell(float(ratios.max()))
        report.measure(
            claim, f"against {NAMES[name]}, median", measured, f"{len(ratios)} levels, largest {largest:.2f}"
        )
        for task, curves in found.curves.items():
            odd = np.arange(1, sizes[task], 2)
            levels, values = savings(curves["a_star"], curves[name], cost, odd)
            choices += [(value, level, task, name) for level, value in zip(levels, values, strict=True)]
    if not choices:
        report.not_testable(claim, "A* shares no accuracy above that of a single sample on the odd problems")
        return
    _, level, task, name = max(choices, key=lambda c: (round(c[0], 6), -c[1]))  # of equals the lowest level
    curves, even = found.curves[task], np.arange(0, sizes[task], 2)
    measured = bootstrap(
        lambda index: tell(ratio_at(level, curves["a_star"], curves[name], cost, even[index[task]])),
        {task: len(even)}, cfg.seed, cfg.resamples,
    )  # fmt: skip
    assert measured is not None, "ratio_at is always a number"
    report.measure(
        claim, "largest, chosen on odd and measured on even problems", measured,
        f"at accuracy {level:.2f} of {task}, against {NAMES[name]}",
    )  # fmt: skip


def _as_ratio(ratio: float) -> float:
    return ratio


def _as_saving(ratio: float) -> float:
    """1 - ours / other's; -10 (spends far more) where ours never reaches the level."""
    return 1.0 - 1.0 / max(ratio, 1 / 11)


def _no_reference(found: Found, task: str) -> str | None:
    """Why the large policy cannot serve as the reference on a task: it missed its gate, or beats the small one not even
    when both decode greedily. None if it can."""
    greedy = found.costs[found.costs["task"] == task].groupby("arm")["correct"].mean()
    if found.gates[f"{task} large"]:
        return found.gates[f"{task} large"]
    small, large = greedy["small greedy"], greedy["large greedy"]
    return (
        None if large > small else f"gate: greedy accuracy of large {large:.3f}, needed above that of small {small:.3f}"
    )


def _small_against_large(cfg: DictConfig, report: Report, found: Found) -> None:
    """c3: the small policy with A* at the largest limit, less the greedy accuracy of the large one."""
    reasons = {task: _no_reference(found, task) for task in cfg.tasks}
    tasks = [task for task in cfg.tasks if not reasons[task]]
    if not tasks:
        report.not_testable("c3", "; ".join(f"{task}: {reason}" for task, reason in reasons.items()))
        return
    gaps, detail = {}, []
    for task in tasks:
        large = found.costs[(found.costs["task"] == task) & (found.costs["arm"] == "large greedy")]
        reached = large.sort_values("problem_id")["correct"].to_numpy(float)
        small = found.curves[task]["small a_star"]
        gaps[task] = small.correct[:, -1] - reached
        enough = [n for n, accuracy in zip(small.ns, small.correct.mean(0), strict=True) if accuracy >= reached.mean()]
        detail.append(
            f"{task}: small {small.correct[:, -1].mean():.3f}, large {reached.mean():.3f}, "
            f"{f'reached from N={enough[0]}' if enough else 'not reached'}"
        )
    detail += [f"{task} left out: {reason}" for task, reason in reasons.items() if reason]
    measured = bootstrap(
        lambda index: float(np.mean([gaps[task][index[task]].mean() for task in tasks])),
        {task: len(gap) for task, gap in gaps.items()}, cfg.seed, cfg.resamples,
    )  # fmt: skip
    assert measured is not None, "a mean is always defined"
    report.measure("c3", "small policy with A* minus large policy", measured, "; ".join(detail))
