"""One arm is one method with its settings on all problems of one task: which arms there are, and how one is run.

Arms run in a pool of processes. All arms of a task and seed draw from the same random streams.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.search.beam import beam_search, dvts
from common.search.core import Budget, Propose, Score, SearchResult
from common.search.particles import Weighting, parallel_chains, particle_filter, particle_gibbs
from common.search.sampling import best_of_n, greedy, samples
from papers.particle_filtering.method import Recorder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.generation.steps import State
    from common.reasoners.workbench import Outcome, Workbench

CHAIN_ONLY = "chain only"  # the shared reward model of chains, as a judge of another task


@dataclass(frozen=True)
class Arm:
    """panel: the comparison that it belongs to. method: greedy, pool (independent samples, each step scored), bon,
    beam, dvts, pf, pg or chains. n: samples, beams or particles. repeats: iterations of pg, chains of `chains`.
    weights: of the policy, None: those of the task. key: how step scores become one. sigma: noise on the oracle's
    logit, None: the reward model judges. reward: None is the shared one of the task, else CHAIN_ONLY or one of `train`,
    (name, training seed).
    """

    panel: str
    task: str
    problems: int
    method: str
    n: int = 1
    seed: int = 0
    size: str = "base"
    weights: str | None = None
    repeats: int = 1
    temperature: float = 0.8
    key: str = "last"
    sigma: float | None = None
    reward: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """Tells the arms of a task and seed apart."""
        parts = [self.panel, self.size, self.weights or "", self.method, f"n={self.n}"]
        parts += [f"repeats={self.repeats}"] if self.repeats > 1 else []
        parts += [f"temperature={self.temperature:g}"] if self.panel == "temperature" else []
        parts += [self.key] if self.panel == "aggregation" else []
        parts += [f"sigma={self.sigma:g}"] if self.sigma is not None else []
        parts += [f"reward={self.reward[0]}/{self.reward[1]}"] if self.reward else []
        return " ".join(part for part in parts if part)


def listed(cfg: DictConfig) -> list[Arm]:
    """All arms of a profile, the long ones first, so that no process waits long at the end."""
    main, second = cfg.main.task, cfg.second
    arms: list[Arm] = []

    def add(panel: str, methods: str, **own: Any) -> None:
        arms.extend(Arm(panel, method=m, **({"temperature": cfg.temperature} | own)) for m in methods.split())

    for of in (cfg.main, second):
        for seed in of.seeds if of.problems else ():
            at: dict[str, Any] = {"task": of.task, "problems": of.problems, "seed": cfg.seed + seed}
            add("headline", "pool", n=max(of.widths), **at)
            for n in of.widths:
                if n > 1:  # one particle or beam is one sample of the pool
                    add("headline", "pf beam", n=n, **at)
                if n > cfg.width:  # up to `width` beams DVTS is one tree: beam search
                    add("headline", "dvts", n=n, **at)
    for of in (cfg.main, second):
        for size in ("small", "base", "large") if of.problems else ():
            add("headline" if size == "base" else "policies", "greedy", task=of.task, problems=of.problems, size=size)
    add("policies", "greedy", task=main, problems=cfg.main.problems, size="large", weights="final")
    for size in ("small", "large"):
        own = cfg.policies
        add("policies", "pool pf beam dvts", task=main, problems=own.problems, n=own.n, size=size)
    for n in cfg.small.widths:
        for seed in cfg.small.seeds:
            own = {"task": main, "problems": cfg.main.problems, "size": "small", "n": n, "seed": cfg.seed + seed}
            add("small", "pf", **own)
    ablated: dict[str, Any] = {"task": main, "problems": cfg.main.problems, "seed": cfg.seed}
    for sigma in cfg.noise.sigmas:
        own = ablated | {"problems": cfg.noise.problems}
        add("noise", "bon pf beam dvts", n=cfg.noise.n, sigma=float(sigma), **own)
    for key in cfg.aggregation.kinds:
        for n in cfg.aggregation.widths:
            add("aggregation", "pf", n=n, key=key, **ablated)
        if second.problems and cfg.aggregation.second:
            at = {"task": second.task, "problems": second.problems, "seed": cfg.seed}
            add("aggregation", "pf", n=cfg.aggregation.second, key=key, **at)
    for temperature in cfg.temperatures.grid:
        add("temperature", "pf", n=cfg.temperatures.n, **(ablated | {"temperature": float(temperature)}))
    ablated["problems"] = cfg.repeats.problems
    for seed in cfg.repeats.seeds:
        for n, times in cfg.repeats.pairs:
            own = ablated | {"seed": cfg.seed + seed, "n": n, "repeats": times}
            add("repeats", "pg chains" if times > 1 else "pf", **own)
    ablated["problems"] = cfg.judges.problems
    for seed in cfg.judges.seeds:
        for share in cfg.judges.shares:
            add("judges", "pf", n=cfg.judges.n, reward=(f"{share:g}", seed), **ablated)
        own = ablated | {"seed": cfg.seed + seed}
        add("judges", "pf beam bon", n=cfg.judges.n, reward=(CHAIN_ONLY, 0), **own)
    length = {main: 1, second.task: 3}
    return sorted(arms, key=lambda a: -a.n * a.repeats * a.problems * length[a.task] * (1 + 2 * (a.size == "large")))


_benches: dict[tuple[Any, ...], Workbench] = {}


def bench_of(cfg: DictConfig, arm: Arm, split: str = "test") -> Workbench:
    """Problems and models of an arm; loaded once in a process."""
    from common.models.reward import load_reward_model
    from common.reasoners import workbench
    from common.search.score import RewardModel

    shared = None if arm.reward or arm.sigma is not None else "prm"
    key = (str(cfg.reasoners), cfg.seed, arm.task, arm.problems, arm.size, arm.weights, shared, split)
    if key not in _benches:
        _benches[key] = workbench.load(
            cfg, arm.task, arm.problems, size=arm.size, weights=arm.weights, reward=shared, split=split
        )
    if not arm.reward:
        return _benches[key]
    bench = _benches[key]
    other = arm.reward[0] == CHAIN_ONLY
    folder = Path(cfg.reasoners) / "prm" / "chain" if other else Path(cfg.artifacts) / "train" / model_name(*arm.reward)
    if (own := (*key, folder)) not in _benches:
        model = load_reward_model(folder).to(cfg.device)
        _benches[own] = replace(bench, judge=lambda: RewardModel(model, bench.prompts))
    return _benches[own]


def model_name(name: str, seed: int) -> str:
    """The folder of a reward model of `train`."""
    return f"prm {name} {seed}".replace(" ", "_")


def run_arm(job: tuple[DictConfig, Arm]) -> dict[str, list[dict[str, Any]]]:
    """Rows of `records` (the common schema), `runs` (what the arm did on each problem) and `nodes` (a genealogy)."""
    cfg, arm = job
    bench = bench_of(cfg, arm)
    score: Score | None = None
    if arm.sigma is not None:
        from common.search.score import noisy

        score = noisy(oracle(bench, success_rates(cfg, arm.task, arm.size)), arm.sigma, arm.seed)
    drawn = is_drawn(cfg, arm)
    seen = Recorder(score or bench.scorer()) if drawn or arm.panel == "noise" else None
    sampling = {"greedy": True} if arm.method == "greedy" else {"temperature": arm.temperature}
    out = bench.run(
        functools.partial(search, cfg, arm), seed=arm.seed, stream="search", width=arm.n, score=seen or score,
        **sampling,
    )  # fmt: skip
    head = {"arm": arm.name, "seed": arm.seed, "task": arm.task}
    records = [head | row for row in bench.records(out, samples=arm.method == "pool")]
    return {
        "records": records,
        "runs": [
            vars(arm) | {"arm": arm.name} | row for row in _runs(bench, out, seen if arm.panel == "noise" else None)
        ],
        "nodes": [{"method": arm.method} | row for row in _nodes(bench, out, seen)] if seen and drawn else [],
    }


def is_drawn(cfg: DictConfig, arm: Arm) -> bool:
    """Whether the genealogy of an arm's particles or beams is kept for the figure."""
    own = cfg.genealogy
    return (
        arm.panel == "headline" and arm.method in ("pf", "beam") and (arm.task, arm.n) == (own.task, own.n)
        and arm.seed == cfg.seed
    )  # fmt: skip


def search(cfg: DictConfig, arm: Arm, problems: Sequence[int], propose: Propose, score: Score) -> SearchResult:
    """The arm's algorithm."""
    n, width = arm.n, cfg.width
    if arm.method == "greedy":
        return greedy(problems, propose)
    if arm.method == "pool":
        pool, cost = samples(problems, propose, Budget(), n=n, score=score)
        return SearchResult([states[0] for states in pool], pool, list(cost.values()))
    if arm.method == "bon":
        return best_of_n(problems, propose, score, n=n, every=arm.sigma is not None)
    if arm.method == "beam":
        return beam_search(problems, propose, score, n=n, width=width)
    if arm.method == "dvts":
        return dvts(problems, propose, score, n=n, width=width)
    weighting = Weighting(tau=cfg.tau, kind=cfg.weights, key=_key(arm.key))
    if arm.method == "pf":
        return particle_filter(problems, propose, score, n=n, seed=arm.seed, weighting=weighting)
    if arm.method == "pg":
        own: dict[str, Any] = {"n": n, "iterations": arm.repeats, "seed": arm.seed, "weighting": weighting}
        return particle_gibbs(problems, propose, score, **own)
    if arm.method == "chains":
        taus = (float(cfg.tau),) * arm.repeats
        return parallel_chains(problems, propose, score, n=n, taus=taus, seed=arm.seed, weighting=weighting)
    raise ValueError(f"unknown method {arm.method!r}; known: greedy, pool, bon, beam, dvts, pf, pg, chains")


def _key(name: str) -> Any:
    from common.search.score import aggregate

    return None if name == "last" else aggregate(name)  # None: the last score


def oracle(bench: Workbench, rates: dict[tuple[int, bool], float]) -> Score:
    """A scorer that knows the truth: the policy's success rate after prefixes of the same length and exact verdict."""

    def success_rate(states: Sequence[State]) -> np.ndarray:
        return np.array([rates.get((len(s.ends), _is_right(bench, s)), 0.5) for s in states])

    return success_rate


def _is_right(bench: Workbench, state: State) -> bool:
    """Whether a prefix can still be completed (a finished answer: is right), by the task's exact verifier."""
    if state.done:
        return bench.correct(state)
    assert bench.rules.verify_step is not None
    return bench.rules.verify_step(bench.problems[state.problem], bench.text(state))


_rates: dict[tuple[Any, ...], dict[tuple[int, bool], float]] = {}


def success_rates(cfg: DictConfig, task: str, size: str) -> dict[tuple[int, bool], float]:
    """(steps, exact verdict) of a prefix -> the policy's chance of a right answer, from samples on warm-up problems.

    With one right and one wrong answer added to each, so that no rate is 0 or 1.
    """
    own = cfg.noise
    key = (str(cfg.reasoners), cfg.seed, task, size, own.warmup, own.samples)
    if key in _rates:
        return _rates[key]
    probe = Arm("noise", task, own.warmup, "pool", own.samples, cfg.seed, size, sigma=0.0)
    bench = bench_of(cfg, probe, "warmup")

    def independent(problems: Sequence[int], propose: Propose, _: Score) -> SearchResult:
        pool, cost = samples(problems, propose, Budget(), n=own.samples)
        return SearchResult([states[0] for states in pool], pool, list(cost.values()))

    out = bench.run(independent, seed=cfg.seed, stream="rates", width=own.samples, temperature=cfg.temperature)
    counts: dict[tuple[int, bool], list[int]] = {}
    for state in (state for pool in out.pool for state in pool):
        right = bench.correct(state)
        for steps in range(1, len(state.ends) + 1):
            prefix = state.truncated(steps)
            count = counts.setdefault((steps, _is_right(bench, prefix)), [1, 2])
            count[0] += right
            count[1] += 1
    _rates[key] = {group: right / total for group, (right, total) in counts.items()}
    return _rates[key]


def _runs(bench: Workbench, out: Outcome, seen: Recorder | None) -> list[dict[str, Any]]:
    """One row a problem. right_in_pool: some final candidate is right. first_right: some first step was right;
    survived: the first such step still begins a final candidate."""
    rows = []
    for problem, (best, pool) in enumerate(zip(out.best, out.pool, strict=True)):
        row = {
            "problem_id": problem, "correct": bench.correct(best), "tokens": out.tokens[problem],
            "passes": out.passes[problem], "right_in_pool": any(map(bench.correct, pool)),
        }  # fmt: skip
        if seen is not None:
            first = [n.state for n in seen.nodes[problem] if n.step == 1 and _is_right(bench, n.state)][:1]
            lives = [any(s.tokens[: len(f.tokens)] == f.tokens for s in pool) for f in first]
            row |= {"first_right": bool(first), "survived": any(lives)}
        rows.append(row)
    return rows


def _nodes(bench: Workbench, out: Outcome, seen: Recorder) -> list[dict[str, Any]]:
    """One row a prefix that was scored. right: so far; ends: it is a final candidate."""
    rows = []
    for problem, nodes in seen.nodes.items():
        ends = {path[-1] for state in out.pool[problem] if (path := seen.lineage(state))}
        rows += [
            {
                "problem_id": problem, "node": i, "parent": node.parent, "step": node.step,
                "score": node.state.scores[-1], "right": _is_right(bench, node.state), "ends": i in ends,
            }
            for i, node in enumerate(nodes)
        ]  # fmt: skip
    return rows
