"""One job is one method on all problems of one task with one seed: what it chose, what that cost, and what it visited.

Jobs run in a pool of processes, each with one thread of torch; a result does not depend on how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from common.search.core import Budget, SearchResult
from papers.astar_decoding import method

if TYPE_CHECKING:
    import numpy as np
    from omegaconf import DictConfig

    from common.generation.steps import State
    from common.reasoners.workbench import Outcome, Workbench

STREAM = "search"  # of random numbers: the same for all methods, so that they see the same luck


@dataclass(frozen=True)
class Job:
    """arm: its name in the tables. kind: pool, greedy, particle_filter, beam, dvts or a_star. n: samples, particles or
    beams; of a_star the token limit in mean answer lengths. settings: of a_star beside those of the configuration.
    sigma: noise of the scorer. record: keep every visited state."""

    arm: str
    kind: str
    task: str
    seed: int = 0
    n: int = 1
    size: str = "base"
    settings: dict[str, Any] = field(default_factory=dict)
    sigma: float = 0.0
    record: bool = False


_benches: dict[tuple[Any, ...], Workbench] = {}


def bench_of(cfg: DictConfig, task: str, size: str, split: str = "test") -> Workbench:
    """The problems, policy and reward model of a task; loaded once in a process."""
    from common.reasoners import workbench

    key = (str(cfg.reasoners), task, size, split, cfg.seed, cfg.problems[task], cfg.warmup)
    if key not in _benches:
        count = cfg.warmup if split == "warmup" else cfg.problems[task]
        weights = cfg.policy[size][task]
        _benches[key] = workbench.load(cfg, task, count, size=size, weights=weights, split=split)
    return _benches[key]


def answer_length(given: tuple[DictConfig, str, str]) -> tuple[float, float]:
    """(configuration, task, size) -> mean tokens of a sampled answer, and of a step, on the warm-up split."""
    from common.search.sampling import samples

    cfg, task, size = given
    bench = bench_of(cfg, task, size, "warmup")

    def once(problems: Sequence[int], propose: Any, _: Any) -> SearchResult:
        pool, cost = samples(problems, propose, Budget(), n=1)
        return SearchResult([states[0] for states in pool], pool, list(cost.values()))

    out = bench.run(once, seed=cfg.seed, stream="length", width=1, temperature=cfg.temperature)
    steps = sum(len(state.ends) for state in out.best if state)
    return sum(out.tokens) / len(out.tokens), sum(out.tokens) / steps


def limits(n: int, k: int, length: float, step: float, reserve: float, slack: float) -> tuple[int, int]:
    """(token limit, tokens of it kept back) of a search that may generate n mean answers.

    An extension starts only if its k steps of mean length still fit beside the reserve, an answer's length or so. The
    completion of an answer may pass n answer lengths by slack answers, as a longer answer of a baseline does.
    """
    total = round((n + slack) * length)
    return total, total - max(0, round((n - reserve) * length - k * step))


def run_job(given: tuple[DictConfig, Job, dict[str, tuple[float, float]]]) -> dict[str, list[dict[str, Any]]]:
    """(configuration, job, lengths) -> rows of `records` (the common schema), `costs` (one a problem), `pool` (one a
    sample) and `nodes` (one a state).

    lengths: mean tokens of an answer and of a step, by size of the policies that have a token limit.
    """
    cfg, job, lengths = given
    bench, seed = bench_of(cfg, job.task, job.size), cfg.seed + job.seed
    score = method.running(bench.scorer(), job.settings.get("aggregation", cfg.search.aggregation))
    if job.sigma:
        from common.search.score import noisy

        score = noisy(score, job.sigma, seed)
    seen = Visited(score) if job.record else None
    algorithm = _algorithm(cfg, job, lengths.get(job.size, (0.0, 0.0)), seed, seen)
    out = bench.run(
        algorithm, seed=seed, stream=STREAM, width=_width(cfg, job),
        score=seen.score if seen else score, **_sampling(cfg, job),
    )  # fmt: skip
    head = {"arm": job.arm, "seed": job.seed, "task": job.task}
    rows: dict[str, list[dict[str, Any]]] = {"records": [], "costs": [], "pool": [], "nodes": []}
    arm = f"{job.arm}@{job.n}"
    rows["records"] = [head | {"arm": arm} | row for row in bench.records(out, samples=job.kind == "pool")]
    if job.kind == "pool":
        rows["pool"] = _pool_rows(cfg, bench, out, head, seed)
    else:
        rows["costs"] = [head | {"n": job.n} | row for row in _cost_rows(cfg, bench, out, job)]
    if seen:
        rows["nodes"] = [{"task": job.task} | row for row in seen.rows(cfg, bench, out)]
    return rows


def _width(cfg: DictConfig, job: Job) -> int:
    """Partial answers of a problem at one time."""
    return job.settings.get("k", cfg.search.k) if job.kind == "a_star" else job.n


def _sampling(cfg: DictConfig, job: Job) -> dict[str, Any]:
    return {"greedy": True} if job.kind == "greedy" else {"temperature": cfg.temperature}


def _algorithm(cfg: DictConfig, job: Job, length: tuple[float, float], seed: int, seen: Visited | None) -> Any:
    from common.search import beam, sampling
    from common.search.particles import Weighting, particle_filter

    def pool(problems: Sequence[int], propose: Any, score: Any) -> SearchResult:
        states, cost = sampling.samples(problems, propose, Budget(), n=job.n, score=score)
        return SearchResult([of[0] for of in states], states, list(cost.values()))

    def search(problems: Sequence[int], propose: Any, score: Any) -> SearchResult:
        own = {k: cfg.search[k] for k in ("k", "step_cost", "stop", "root_score")}
        own |= {k: v for k, v in job.settings.items() if k != "aggregation"}
        if seen:
            propose = seen.watch(propose)
        limit, reserve = limits(job.n, own["k"], *length, cfg.search.reserve, cfg.search.slack)
        return method.a_star(problems, propose, score, Budget(tokens=limit), reserve=reserve, **own)

    weighting, width = Weighting(**cfg.particle_filter), cfg.beam.width
    return {
        "pool": pool,
        "greedy": lambda problems, propose, _: sampling.greedy(problems, propose),
        "particle_filter": lambda *given: particle_filter(*given, n=job.n, seed=seed, weighting=weighting),
        "beam": lambda *given: beam.beam_search(*given, n=job.n, width=min(width, job.n)),
        "dvts": lambda *given: beam.dvts(*given, n=job.n, width=min(width, job.n)),
        "a_star": search,
    }[job.kind]


def _cost_rows(cfg: DictConfig, bench: Workbench, out: Outcome, job: Job) -> Iterator[dict[str, Any]]:
    """expansions, duplicates and ended are of A* alone. ended: goal (left the queue), finish (completed when the budget
    ended) or none (abstained)."""
    k = _width(cfg, job)
    for problem, best in enumerate(out.best):
        row = {
            "problem_id": problem, "correct": bench.correct(best), "tokens": out.tokens[problem],
            "passes": out.passes[problem], "score": best.scores[-1] if best and best.scores else float("nan"),
        }  # fmt: skip
        if job.kind == "a_star":
            kept = [step["children"] for step in out.trace[problem]]
            row |= {
                "expansions": len(kept), "duplicates": k * len(kept) - sum(kept),
                "ended": "none" if best is None else "finish" if _completed(out, problem) else "goal",
            }  # fmt: skip
        yield row


def _completed(out: Outcome, problem: int) -> bool:
    """Whether the answer was completed when the budget ended: then it was scored beside the children that were kept."""
    return out.passes[problem] > sum(step["children"] for step in out.trace[problem])


def _pool_rows(
    cfg: DictConfig, bench: Workbench, out: Outcome, head: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """A row a sample: its cost, its answer, its score, the score under noise, and scores and tokens step by step."""
    import numpy as np

    from common.search.score import noisy

    states = [state for pool in out.pool for state in pool]
    clean: np.ndarray = np.array([state.scores[-1] for state in states])
    under = {s: noisy(lambda _: clean, s, seed)(states) for s in cfg.noise.sigmas}
    samples = Counter[int]()
    rows = []
    for i, state in enumerate(states):
        rows.append(
            head
            | {
                "problem_id": state.problem, "sample_id": samples[state.problem], "tokens": len(state.tokens),
                "steps": len(state.ends), "answer": bench.answer(state), "correct": bench.correct(state),
                "score": state.scores[-1], "scores": " ".join(f"{s:.6g}" for s in state.scores),
                "ends": " ".join(map(str, state.ends)),
            }
            | {f"score, sigma {s:g}": values[i] for s, values in under.items()}
        )  # fmt: skip
        samples[state.problem] += 1
    return rows


class Visited:
    """Every state that a search proposed, in order; wraps its propose and its scorer."""

    def __init__(self, score: Any) -> None:
        self.plain = score
        self.extended: dict[tuple[int, tuple[int, ...]], int] = {}  # problem and tokens -> place in its problem's order
        self.children: dict[tuple[int, tuple[int, ...]], State] = {}
        self.copies: Counter[tuple[int, tuple[int, ...]]] = Counter()
        self.counts: Counter[int] = Counter()

    def score(self, states: Sequence[State]) -> Any:
        values = self.plain(states)
        for state, value in zip(states, values, strict=True):
            self.children[state.problem, state.tokens] = replace(state, scores=(*state.scores, float(value)))
        return values

    def watch(self, propose: Any) -> Any:
        def watched(states: Sequence[State], samples: Sequence[int]) -> list[State]:
            for state in states:
                if (state.problem, state.tokens) not in self.extended:
                    self.extended[state.problem, state.tokens] = self.counts[state.problem]
                    self.counts[state.problem] += 1
            children = propose(states, samples)
            self.copies.update((child.problem, child.tokens) for child in children)
            return children

        return watched

    def rows(self, cfg: DictConfig, bench: Workbench, out: Outcome) -> list[dict[str, Any]]:
        """A row a state that was scored while the queue ran. place: when it was extended (0 is the root), -1 if never.
        tokens: of its step, those of its duplicates included. right: whether the steps so far are right."""
        chosen = {(state.problem, state.tokens) for state in out.best if state}
        verify, rows = bench.rules.verify_step, []
        for key, state in self.children.items():
            if key in chosen and _completed(out, state.problem):
                continue  # it was never in the queue
            before = state.tokens[: len(state.tokens) - state.step_tokens]
            *_, f = method.priority(state, cfg.search.step_cost, cfg.search.root_score)
            rows.append(
                {
                    "problem_id": state.problem, "node": " ".join(map(str, state.tokens)),
                    "parent": " ".join(map(str, before)), "depth": len(state.ends), "score": state.scores[-1], "f": f,
                    "tokens": state.step_tokens * self.copies[key], "copies": self.copies[key],
                    "place": self.extended.get(key, -1), "made": self.extended[state.problem, before],
                    "done": state.done, "chosen": key in chosen,
                    "right": bool(verify(bench.problems[state.problem], bench.text(state))) if verify else None,
                }
            )  # fmt: skip
        return rows
