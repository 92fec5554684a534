"""From records to curves, laws and saturation points.

A pool of n samples a problem is cut in two: laws and plans come from the first half (pilot), what they are held against
from the second. Chains of rethinking are cut likewise. Curves are [problems, N], so that problems can be resampled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.costs.catalogue import Transformer, accelerator
from common.costs.per_answer import roofline_clock
from common.costs.saturation import Geometric, LeakyChain, fit_leaky_chain, hit_curves
from common.metrics.pools import best_of_k
from papers.scaling_over_scaling import method

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

HIT, MAJORITY, BEST = "hit@N", "majority", "best-of-N"
FIRST, LAST = "sequential, first success", "sequential, last answer"


@dataclass(frozen=True)
class Pool:
    """Answers of one arm, each array [problems, answers]; of chains the answers are [chains * (rounds + 1)].

    tokens: generated. read: of the prompts. seconds: idealized. answers: canonical, None where there is none.
    """

    right: np.ndarray
    answers: np.ndarray
    scores: np.ndarray
    tokens: np.ndarray
    read: np.ndarray
    seconds: np.ndarray

    def part(self, columns: slice) -> Pool:
        """Some of the answers of each problem."""
        return Pool(**{name: values[:, columns] for name, values in vars(self).items()})

    def halves(self) -> tuple[Pool, Pool]:
        """(pilot, evaluation): the first and the second half of the answers of each problem."""
        middle = self.right.shape[1] // 2
        return self.part(slice(middle)), self.part(slice(middle, None))


@dataclass(frozen=True)
class Curves:
    """One mode on one task: accuracy [problems, N] at N = 1, 2, ... of the pilot half, of the other one and of all, and
    the geometric law of the pilot's first N."""

    pilot: np.ndarray
    evaluation: np.ndarray
    whole: np.ndarray
    law: Geometric

    def predicted(self, epsilon: float) -> int:
        """N* of the law."""
        return method.saturation_budget(self.law.p, epsilon, self.law.ceiling)

    def observed(self, epsilon: float) -> int | None:
        """N* of the evaluation half's curve; None if it does not get there."""
        return method.observed_saturation([0.0, *self.evaluation.mean(0)], epsilon)

    def of(self, problems: np.ndarray, up_to: int) -> Curves:
        """Of some problems, with a law of their own."""
        return curves_of(self.pilot[problems], self.evaluation[problems], self.whole[problems], up_to)


@dataclass(frozen=True)
class Found:
    """pools: by (task, arm). curves: by (task, mode). gates: by task why the reward model cannot select, or None.
    quality: a row an arm and problem. length: answers of a chain."""

    pools: dict[tuple[str, str], Pool]
    curves: dict[tuple[str, str], Curves]
    gates: dict[str, str | None]
    quality: pd.DataFrame
    length: int

    def pool(self, task: str, role: str = "small") -> Pool:
        return self.pools[task, f"parallel {role}"]

    def states(self, task: str) -> np.ndarray:
        """Whether the answer of each round of rethinking is right, bool [problems, chains, rounds + 1]."""
        right = self.pools[task, "sequential rethinker"].right
        return right.reshape(len(right), -1, self.length)

    def rethinks(self, task: str) -> bool:
        """Whether chains were drawn on a task."""
        return (task, "sequential rethinker") in self.pools

    def modes(self, task: str) -> list[str]:
        """The ways to choose among samples of a task."""
        return [mode for mode in (HIT, MAJORITY, BEST) if (task, mode) in self.curves]

    def selection(self, task: str) -> str:
        """How an answer is chosen without knowing which is right: by the reward model where it passed its gate on other
        problems, by majority elsewhere. Decided before these answers were looked at."""
        return MAJORITY if self.gates[task] or (task, BEST) not in self.curves else BEST


def load(cfg: DictConfig) -> Found:
    """Everything that `infer` wrote, with idealized seconds from the roofline of each model's own sizes."""
    import pandas as pd

    from common.generation import records

    folder = Path(cfg.artifacts) / "infer"
    table = records.read(folder / "records.parquet")
    models = json.loads((folder / "models.json").read_text())
    machine = accelerator(cfg.cost.accelerator)
    clocks = {(m["task"], m["arm"]): roofline_clock(Transformer(**m["sizes"]), machine) for m in models}
    pools = {key: _pool(rows, clocks[key]) for key, rows in table.groupby(["task", "arm"], sort=False)}
    gates = json.loads((folder / "gates.json").read_text())
    bare = Found(pools, {}, gates, pd.read_csv(folder / "pools.csv"), cfg.rounds + 1)
    curves: dict[tuple[str, str], Curves] = {}
    for task in cfg.tasks:
        pool = bare.pool(task)
        scored = [BEST] if np.isfinite(pool.scores).all() else []
        for mode in (HIT, MAJORITY, *scored):
            parts = [
                pool_curves(part, mode, seed=cfg.seed, draws=cfg.majority_draws) for part in (*pool.halves(), pool)
            ]
            curves[task, mode] = curves_of(*parts, cfg.fit_up_to)
        if not bare.rethinks(task):
            continue
        states = bare.states(task)
        middle = states.shape[1] // 2
        for mode in (FIRST, LAST):
            parts = [chain_curves(part, mode) for part in (states[:, :middle], states[:, middle:], states)]
            curves[task, mode] = curves_of(*parts, min(cfg.fit_up_to, bare.length))
    return Found(pools, curves, gates, bare.quality, bare.length)


def _pool(rows: pd.DataFrame, clock: Any) -> Pool:
    import pandas as pd

    ordered = rows.sort_values(["problem_id", "sample_id"])
    seconds = clock(ordered["prompt_tokens"].to_numpy(), ordered["output_tokens"].to_numpy())
    said = np.array([None if pd.isna(answer) else str(answer) for answer in ordered["answer"]], dtype=object)
    arrays: list[np.ndarray] = [
        ordered["correct"].to_numpy(dtype=bool), said, ordered["score"].to_numpy(dtype=float),
        ordered["output_tokens"].to_numpy(dtype=int), ordered["prompt_tokens"].to_numpy(dtype=int), seconds,
    ]  # fmt: skip
    return Pool(*(values.reshape(ordered["problem_id"].nunique(), -1) for values in arrays))


def curves_of(pilot: np.ndarray, evaluation: np.ndarray, whole: np.ndarray, up_to: int) -> Curves:
    return Curves(pilot, evaluation, whole, method.fit_curve(pilot[:, :up_to]))


def pool_curves(pool: Pool, mode: str, *, seed: int = 0, draws: int = 100) -> np.ndarray:
    """Expected accuracy [problems, n] of N = 1..n samples of a pool: any right, majority, or highest score."""
    n = pool.right.shape[1]
    if mode == HIT:
        return hit_curves(pool.right.sum(1), n, range(1, n + 1))
    pairs = zip(pool.answers if mode == MAJORITY else pool.scores, pool.right, strict=True)
    if mode == MAJORITY:
        return np.array([majority_curve(said, right, seed, draws) for said, right in pairs])
    if mode == BEST:
        return np.array([[best_of_k(scores, right, k) for k in range(1, n + 1)] for scores, right in pairs])
    raise ValueError(f"unknown mode {mode!r} of samples; known: {HIT}, {MAJORITY}, {BEST}")


def majority_curve(answers: Sequence[str | None], right: Sequence[bool], seed: int = 0, draws: int = 100) -> np.ndarray:
    """Mean correctness [n] of the majority answer of N = 1..n samples, over random orders of the pool.

    `common.metrics.pools.majority_at_k` at all N at once, from the same orders: None does not vote, the first seen of
    equals wins, and without any vote the answer is wrong.
    """
    said = np.asarray(answers, dtype=object)
    labels = sorted({answer for answer in said if answer is not None})
    if not labels:
        return np.zeros(len(said))
    codes = np.array([labels.index(answer) if answer is not None else -1 for answer in said])
    marks = np.array([any(np.asarray(right)[codes == code]) for code in range(len(labels))])
    random = np.random.default_rng([seed, 0x3A])
    orders = np.array([codes[random.permutation(len(codes))] for _ in range(draws)])  # [draws, n]
    votes = (orders[:, :, None] == np.arange(len(labels))).cumsum(1)  # [draws, n, labels]
    seen = (votes == 0).sum(1)[:, None]  # place of the first vote for a label, [draws, 1, labels]
    winner = (votes * (len(codes) + 1) - seen).argmax(2)
    return (marks[winner] & (votes.max(2) > 0)).mean(0)


def chain_curves(states: np.ndarray, mode: str) -> np.ndarray:
    """Accuracy [problems, rounds + 1] of N = 1, 2, ... answers of chains [problems, chains, rounds + 1]: any right so
    far, or the last one."""
    if mode == FIRST:
        return np.logical_or.accumulate(states, axis=2).mean(1)
    if mode == LAST:
        return states.mean(1)
    raise ValueError(f"unknown mode {mode!r} of chains; known: {FIRST}, {LAST}")


def leaky(found: Found, task: str) -> LeakyChain:
    """The leaky chain of the pilot chains: where they start, and the chances to mend and to spoil an answer."""
    states = found.states(task)
    return fit_leaky_chain(states[:, : states.shape[1] // 2].reshape(-1, found.length))


def rate_gate(cfg: DictConfig, found: Found, task: str, role: str = "small") -> str | None:
    """Why a model cannot show saturation on a task: its pilot accuracy at one answer leaves no room; None if it can."""
    if role == "rethinker":
        rate = float(found.curves[task, LAST].pilot[:, 0].mean())
    else:
        rate = float(found.pool(task, role).halves()[0].right.mean())
    low, high = cfg.gates.rate
    if low <= rate <= high:
        return None
    return f"gate: accuracy of one answer of {role} on {task} measured {rate:.3f}, needed {low} to {high}"


def usable(cfg: DictConfig, found: Found, role: str = "small") -> tuple[list[str], str]:
    """(tasks whose gate is passed, why the others are left out)."""
    tasks = [task for task in cfg.tasks if role != "rethinker" or found.rethinks(task)]
    missed = {task: rate_gate(cfg, found, task, role) for task in tasks}
    return [task for task, why in missed.items() if why is None], "; ".join(why for why in missed.values() if why)


def per_problem(found: Found, task: str, epsilon: float, role: str = "small") -> np.ndarray:
    """[interior problems, 2]: N* from each problem's pilot rate, and the observed one of its other samples.

    Interior: right and wrong answers in the pilot. Both are cut at the samples of a half, since more were not seen.
    """
    pilot, evaluation = found.pool(task, role).halves()
    n, right = pilot.right.shape[1], pilot.right.sum(1)
    points = []
    for problem in np.flatnonzero((right > 0) & (right < n)):
        curve = hit_curves([evaluation.right[problem].sum()], evaluation.right.shape[1], range(1, n + 1))[0]
        seen = method.observed_saturation([0.0, *curve], epsilon)
        planned = method.saturation_budget(right[problem] / n, epsilon)
        points.append([min(planned, n), n if seen is None else seen])
    return np.array(points, dtype=float).reshape(-1, 2)


@dataclass(frozen=True)
class Spent:
    """Of one way to stop, each [problems], means over the orders of drawing: answers, generated tokens, idealized
    seconds, and whether the choice is right."""

    answers: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    right: np.ndarray


def replay(cfg: DictConfig, found: Found, task: str) -> dict[str, Spent]:
    """What each rule to stop would have drawn of the small model's stored samples, and whether its choice is right.

    Samples come in `orders` random orders, the same for all rules.
    """
    pool, own, epsilon = found.pool(task), cfg.allocation, cfg.epsilons[-1]
    best = found.selection(task) == BEST
    planned = found.curves[task, found.selection(task)].predicted(epsilon)
    rules = {
        "one answer": lambda draw: 1,
        f"fixed N = {own.most}": lambda draw: own.most,
        "fixed N* of the curve": lambda draw: min(max(planned, 1), own.most),
        "N* by agreement": lambda draw: len(
            method.allocate(draw, pilot=own.pilot, most=own.most, epsilon=epsilon).answers
        ),
        f"{own.votes} equal votes": lambda draw: len(method.until_votes(draw, own.votes, own.most).answers),
    }
    problems, size = pool.right.shape
    sums = {name: np.zeros((4, problems)) for name in rules}
    for problem in range(problems):
        for order in range(own.orders):
            drawn = np.random.default_rng([cfg.seed, problem, order]).permutation(size)
            said, tokens = pool.answers[problem, drawn].tolist(), pool.tokens[problem, drawn].tolist()
            for name, rule in rules.items():
                taken = rule(lambda i, said=said, tokens=tokens: (said[i], tokens[i]))
                first = drawn[:taken]
                chosen = _chosen(said[:taken], pool.scores[problem, first] if best else None)
                sums[name][:, problem] += [
                    taken, pool.tokens[problem, first].sum(), pool.seconds[problem, first].sum(),
                    chosen is not None and pool.right[problem, first[chosen]],
                ]  # fmt: skip
    return {name: Spent(*(total / own.orders)) for name, total in sums.items()}


def _chosen(said: Sequence[str | None], scores: np.ndarray | None) -> int | None:
    """Place of the answer that is given: of the highest score, or the first that says what most say; None if none."""
    if scores is not None:
        return int(np.argmax(scores))
    winner = method.vote(said)
    return None if winner is None else list(said).index(winner)
