"""Cost-of-pass: the money that one correct answer is expected to take, the frontier over models, and who moves it.

    v(m, p) = C_m(p) / R_m(p)            attempts of cost C that succeed with chance R, repeated until the first success
    V_p(M)  = min over m in M of v(m, p), and the cost of a human expert
    V(M)    = mean over problems of V_p(M)

Erol et al., "Cost-of-Pass: An Economic Framework for Evaluating Language Models" (arXiv 2504.13359), with the
estimators of mhamzaerol/Cost-of-Pass (cost_of_pass/evaluation/estimate.py). The mean of the minima, not the minimum of
the means.

Attempts are read from the generation records (common/generation/records.py); a model is an `arm` there.

Voting never lowers the true cost-of-pass: k votes cost k C, and are right at most as often as one of the k answers is,
R_k <= 1 - (1 - R)^k <= k R, so that k C / R_k >= C / R. A gain that is measured is the winner's curse of a minimum over
noisy estimates (`split_frontier` is free of it).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from common.metrics.intervals import Measured, paired_bootstrap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Price:
    """US dollars per prompt token and per output token (an API's list price is per million of them)."""

    prompt: float
    output: float

    def __post_init__(self) -> None:
        if min(self.prompt, self.output) < 0:
            raise ValueError(f"a price cannot be negative: {self}")


@dataclass(frozen=True)
class Attempts:
    """n runs of each model on each problem. correct, usd [models, problems, n]."""

    models: list[str]
    problems: list[int]
    correct: np.ndarray
    usd: np.ndarray

    def index(self, model: str) -> int:
        """Of a model; KeyError lists those there are."""
        if model not in self.models:
            raise KeyError(f"no attempts of {model!r}; there are: {', '.join(self.models)}")
        return self.models.index(model)

    def of(self, models: Sequence[str]) -> Attempts:
        """The attempts of some of the models, in the order given."""
        chosen = [self.index(model) for model in models]
        return Attempts(list(models), self.problems, self.correct[chosen], self.usd[chosen])


def attempts(
    records: pd.DataFrame,
    usd: ArrayLike | Mapping[str, Price],
    ignore_bad: bool = False,
) -> Attempts:
    """The attempts in the records of one task and one training seed.

    usd: dollars of every record [n], or a price for every arm; then discarded tokens are paid as output is, since they
    were generated. Every arm needs as many runs of every problem; ignore_bad leaves out the problems where that is not
    so, instead of raising ValueError.
    """
    tasks = records[["task", "seed"]].drop_duplicates()
    if len(tasks) != 1:
        raise ValueError(f"cost-of-pass is of one task and one seed; the records hold {tasks.to_dict('records')}")
    if not records["correct"].isin([0, 1]).all():
        raise ValueError(
            f"correct must be 0 or 1, not {records.loc[~records['correct'].isin([0, 1]), 'correct'].iloc[0]}"
        )
    cost = _usd(records, usd)
    if not np.isfinite(cost).all() or (cost < 0).any():
        raise ValueError(f"a cost must be finite and not negative, not {cost[~(np.isfinite(cost) & (cost >= 0))][0]}")
    models = records["arm"].drop_duplicates().tolist()
    counts = records.groupby(["arm", "problem_id"]).size().unstack("problem_id", fill_value=0)
    runs = int(counts.to_numpy().max())
    whole = (counts == runs).all()
    if not whole.all() and not ignore_bad:
        problem = counts.columns[~whole.to_numpy()][0]
        arm = counts.index[(counts[problem] != runs).to_numpy()][0]
        raise ValueError(
            f"{arm!r} has {counts.loc[arm, problem]} of {runs} runs of problem {problem}; repeat what is missing, or "
            "pass ignore_bad=True to leave such problems out"
        )
    problems = counts.columns[whole.to_numpy()].tolist()
    if not problems:
        raise ValueError("no problem has all its runs by every model")
    order = records.assign(usd=cost)[records["problem_id"].isin(problems).to_numpy()]
    order = order.assign(place=order["arm"].map(models.index)).sort_values(["place", "problem_id", "sample_id"])
    shape = (len(models), len(problems), runs)
    correct = order["correct"].to_numpy(dtype=float).reshape(shape)
    return Attempts(models, problems, correct, order["usd"].to_numpy(dtype=float).reshape(shape))


def _usd(records: pd.DataFrame, usd: ArrayLike | Mapping[str, Price]) -> np.ndarray:
    if not isinstance(usd, Mapping):
        return np.asarray(usd, dtype=float)
    if absent := sorted(set(records["arm"]) - set(usd)):
        raise ValueError(f"no price of {', '.join(absent)}")
    prices = records["arm"].map(dict(usd))
    output = (records["output_tokens"] + records["discarded_tokens"]).to_numpy()
    per_prompt, per_output = (np.array([getattr(price, kind) for price in prices]) for kind in ("prompt", "output"))
    return per_prompt * records["prompt_tokens"].to_numpy() + per_output * output


def cost_of_pass(cost: ArrayLike, success: ArrayLike) -> np.ndarray:
    """C / R elementwise; infinite where nothing succeeds. Raises ValueError for C < 0 or R outside [0, 1]."""
    c, r = np.broadcast_arrays(np.asarray(cost, dtype=float), np.asarray(success, dtype=float))
    if (c < 0).any() or (r < 0).any() or (r > 1).any():
        raise ValueError(f"costs cannot be negative and success lies in [0, 1]: {c.min()}, {r.min()} to {r.max()}")
    return np.divide(c, r, out=np.full(c.shape, np.inf), where=r > 0)


def values(data: Attempts, prior: float = 0.0) -> np.ndarray:
    """v [models, problems]: mean cost over mean correctness of the n runs.

    prior: pseudo-counts of both outcomes; 1/2 shrinks R as the Beta(1/2, 1/2) posterior mean does, so that a model that
    failed n times is expensive and not impossible.
    """
    n = data.correct.shape[-1]
    success = (data.correct.sum(-1) + prior) / (n + 2 * prior)
    return cost_of_pass(data.usd.mean(-1), success)


def frontier(v: np.ndarray, human: float = math.inf) -> np.ndarray:
    """V_p [problems]: the cheapest of the models (rows of v) and of a human expert, for each problem.

    No models is the human. Its mean over problems is V(M). Raises ValueError for a human cost that is not positive.
    """
    if not human > 0:
        raise ValueError(f"a human expert's cost must be positive, not {human}")
    return np.minimum(np.min(v, axis=0, initial=np.inf), human)


def split_frontier(data: Attempts, human: float = math.inf) -> np.ndarray:
    """V_p [problems] without the winner's curse: the winner chosen on half of the runs, its cost from the other half.

    Both ways, averaged. R is the Beta(1/2, 1/2) posterior mean, since half of the runs may all fail; the human is
    chosen where he is cheaper, and caps the cost that the other half finds.
    """
    halves = [Attempts(data.models, data.problems, data.correct[..., i::2], data.usd[..., i::2]) for i in (0, 1)]
    if min(half.correct.shape[-1] for half in halves) < 1:
        raise ValueError("splitting needs at least 2 runs of each problem")
    v = [values(half, prior=0.5) for half in halves]
    each = np.arange(len(data.problems))
    paid = [
        np.where(choose.min(0) < human, np.minimum(judge[choose.argmin(0), each], human), human)
        for choose, judge in (v, v[::-1])
    ]
    return np.mean(paid, axis=0)


def gain(before: ArrayLike, after: ArrayLike) -> float:
    """(V - V') / V of two frontiers [problems], by their means: what the additions to the first one are worth.

    0 for equal frontiers, infinite ones included; 1 when an infinite one becomes finite.
    """
    old, new = (float(np.mean(np.asarray(v, dtype=float))) for v in (before, after))
    if old == new:
        return 0.0
    return 1.0 if math.isinf(old) else (old - new) / old


def gain_interval(before: ArrayLike, after: ArrayLike, seed: int = 0) -> Measured:
    """`gain` with a paired bootstrap over problems. Raises ValueError where a frontier is infinite."""
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not np.isfinite([old, new]).all():
        raise ValueError(
            f"problem {int(np.argmin(np.isfinite(old) & np.isfinite(new)))} has no finite cost-of-pass; an interval "
            "needs a human cost, or a prior in `values`"
        )
    return paired_bootstrap(old, new, gain, seed=seed)


def without(data: Attempts, removed: Sequence[str]) -> Attempts:
    """The attempts of all but the removed models; KeyError for one that is not there."""
    gone = {data.index(model) for model in removed}
    return data.of([model for i, model in enumerate(data.models) if i not in gone])


def essentialness(data: Attempts, family: Sequence[str], human: float = math.inf, seed: int = 0) -> Measured:
    """(V(M \\ g) - V(M)) / V(M \\ g): what the frontier loses with family g, with its interval over problems."""
    return gain_interval(frontier(values(without(data, family)), human), frontier(values(data), human), seed)


def tracking(data: Attempts, releases: Sequence[str], human: float = math.inf) -> pd.DataFrame:
    """The frontier as models appear, in this order: columns model, value V(M_t) and gain over the one before.

    The first row is the human alone. Models of one day stay in the order given.
    """
    import pandas as pd

    rows = [{"model": "human", "value": human, "gain": 0.0}]
    now = np.full(len(data.problems), human)
    for model in releases:
        new = np.minimum(now, values(data.of([model]))[0])
        rows.append({"model": model, "value": float(new.mean()), "gain": gain(now, new)})
        now = new
    return pd.DataFrame(rows)


def half_life(times: ArrayLike, value: ArrayLike) -> dict[str, float]:
    """Least squares of a exp(-b (t - t_0)) + c, c >= 0, to a frontier's values: {'a', 'b', 'c', 'half_life': ln 2 / b}.

    times: of any unit, ascending, at least 4. Raises ValueError for fewer or for values that do not fall.
    """
    from scipy.optimize import least_squares

    t, y = np.asarray(times, dtype=float), np.asarray(value, dtype=float)
    if len(t) != len(y) or len(t) < 4 or not (np.diff(t) > 0).all():
        raise ValueError(f"a decay needs 4 values or more at ascending times, not {len(y)} at {t.tolist()}")
    if not y[-1] < y[0]:
        raise ValueError(f"the values do not fall: {y[0]} to {y[-1]}")
    scale, span = float(y.max()), float(t[-1] - t[0])

    def residuals(theta: np.ndarray) -> np.ndarray:
        a, b, c = theta
        return a * np.exp(-b * (t - t[0]) / span) + c - y / scale

    start = [(y[0] - y[-1]) / scale, 3.0, max(y[-1], 0.0) / scale]
    found = least_squares(residuals, start, bounds=([0, 1e-9, 0], np.inf), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    a, b, c = (float(x) for x in found.x)
    return {"a": a * scale, "b": b / span, "c": c * scale, "half_life": math.log(2) * span / b}


def vote_success(chances: Sequence[float], k: int) -> float:
    """Chance that the most frequent of k independent answers is answer 0; equals are won by the first one seen.

    chances [answers]: of each distinct answer, of sum 1. Exact, over all counts; the first seen of equals is any of
    them alike, as the order of answers is exchangeable.
    """
    p = np.asarray(chances, dtype=float)
    if (p < 0).any() or abs(p.sum() - 1) > 1e-9 or k < 1:
        raise ValueError(f"needs chances of sum 1 and k >= 1, not {p.tolist()} and {k}")
    total = 0.0
    for bars in itertools.combinations(range(k + len(p) - 1), len(p) - 1):
        counts = np.diff([-1, *bars, k + len(p) - 1]) - 1
        if counts[0] == counts.max():
            ways = math.factorial(k) // math.prod(math.factorial(int(c)) for c in counts)
            total += ways * float(np.prod(p**counts)) / int((counts == counts[0]).sum())
    return total


def voted(records: pd.DataFrame, k: int) -> pd.DataFrame:
    """Records of majority votes over k stored runs, paid in full: arm '<arm>, vote of k', as many as there were runs.

    Vote j of a problem takes its runs j, j+1, ..., j+k-1 (around the end), so that each run votes k times; the first
    seen of equals wins, and an answer that is null does not vote. Costs are the sums over the runs that vote.
    """
    import pandas as pd

    summed = ["prompt_tokens", "output_tokens", "discarded_tokens", "forwards", "flops", "seconds"]
    rows = []
    for _, group in records.groupby(["arm", "seed", "task", "problem_id"], sort=False):
        runs = group.sort_values("sample_id").to_dict("records")
        if not 1 <= k <= len(runs):
            raise ValueError(f"a vote of {k} needs as many runs; {runs[0]['arm']!r} has {len(runs)}")
        for j, run in enumerate(runs):
            voters = [runs[(j + i) % len(runs)] for i in range(k)]
            answers = Counter(v["answer"] for v in voters if not pd.isna(v["answer"]))
            row = {**run, "arm": f"{run['arm']}, vote of {k}", "answer": None, "correct": False}
            if answers:  # most_common keeps the order of first sight among equals
                winner = answers.most_common(1)[0][0]
                chosen = next(v for v in voters if v["answer"] == winner)
                row |= {"answer": winner, "correct": chosen["correct"], "score": chosen["score"]}
            rows.append(row | {name: sum(v[name] for v in voters) for name in summed})
    return pd.DataFrame(rows, columns=list(records.columns)).astype(records.dtypes.to_dict())
