"""The stages: search with every method at every limit and write what it chose and cost; judge that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from papers.astar_decoding.jobs import Job


def jobs_of(cfg: DictConfig, task: str) -> list[Job]:
    """All jobs of a task, the long ones first."""
    from papers.astar_decoding.jobs import Job

    ns, seeds, few = list(cfg.ns[task]), range(cfg.seeds[task]), range(min(cfg.beam.seeds, cfg.seeds[task]))
    most = max(ns)
    jobs = [Job("pool", "pool", task, s, most) for s in seeds]
    for n in sorted(ns, reverse=True):
        jobs += [Job("a_star", "a_star", task, s, n, record=n == most and s == 0) for s in seeds]
        jobs += [Job("a_star_budget", "a_star", task, s, n, settings={"stop": "budget"}) for s in few]
        jobs += [Job("particle_filter", "particle_filter", task, s, n) for s in seeds]
        jobs += [Job("beam", "beam", task, s, n) for s in few]
        jobs += [Job("small a_star", "a_star", task, s, n, size="small") for s in few]
    jobs += [Job("greedy", "greedy", task, size="base"), Job("large greedy", "greedy", task, size="large")]
    jobs.append(Job("small greedy", "greedy", task, size="small"))
    if task == cfg.ablation.task:
        n = cfg.ablation.n
        variants = cfg.ablation.variants.items()
        jobs += [Job(str(name), "a_star", task, n=n, settings=dict(own)) for name, own in variants]
        jobs.append(Job("dvts", "dvts", task, n=n))
    for sigma in cfg.noise.sigmas:
        for kind in ("a_star", "particle_filter"):
            jobs.append(Job(f"{kind}, sigma {sigma:g}", kind, task, n=cfg.noise.n[task], sigma=float(sigma)))
    return jobs


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet in the common schema, and costs.csv, pool.csv, nodes.csv, lengths.json and gates.json."""
    import pandas as pd

    from common.generation import records
    from common.reasoners import workbench
    from common.workers import run_jobs
    from papers.astar_decoding import jobs as work

    check(cfg)
    out, sizes = Path(cfg.out), ("base", "small")
    listed = sorted((job for task in cfg.tasks for job in jobs_of(cfg, task)), key=lambda job: -job.n)
    asked = [(task, size) for task in cfg.tasks for size in sizes]
    found = run_jobs(work.answer_length, [(cfg, *of) for of in asked], cfg.workers)
    lengths: dict[str, dict[str, tuple[float, float]]] = {task: {} for task in cfg.tasks}
    for (task, size), length in zip(asked, found, strict=True):
        lengths[task][size] = length
    print("mean tokens of an answer and of a step:", lengths, flush=True)
    results = run_jobs(work.run_job, [(cfg, job, lengths[job.task]) for job in listed], cfg.workers)
    frames = {
        name: pd.DataFrame([row for result in results for row in result[name]])
        for name in ("records", "costs", "pool", "nodes")
    }
    rows = frames.pop("records").to_dict("records")
    records.write(out / "records.parquet", records.frame(rows, paper=cfg.slug, profile=cfg.profile))
    for name, frame in frames.items():
        frame.to_csv(out / f"{name}.csv", index=False)
    gates = {
        f"{task} {size}": workbench.gate(cfg, size, cfg.policy[size][task]) or workbench.reward_gate(cfg, task)
        for task in cfg.tasks
        for size in ("base", "large")
    }
    for name, content in (("lengths", lengths), ("gates", gates)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def check(cfg: DictConfig) -> None:
    """Raises ValueError, before any model is loaded, for settings out of range; names the key and what is allowed."""
    from papers.astar_decoding.method import AGGREGATIONS, STEP_COSTS, STOPS

    own = cfg.search
    for key, value, known in (
        ("search.step_cost", own.step_cost, STEP_COSTS),
        ("search.stop", own.stop, STOPS),
        ("search.aggregation", own.aggregation, AGGREGATIONS),
    ):
        if value not in known:
            raise ValueError(f"{key}={value!r} is unknown; known: {', '.join(known)}")
    for task in cfg.tasks:
        ns = list(cfg.ns[task])
        if len(ns) < 2 or min(ns) < 1 or sorted(set(ns)) != ns:
            raise ValueError(f"ns.{task}={ns} must be at least two rising whole numbers of at least 1")
        if any(n > cfg.beam.width and n % cfg.beam.width for n in ns):
            raise ValueError(f"ns.{task}={ns}: beam.width={cfg.beam.width} must divide those above it")
        if cfg.problems[task] < 4 or cfg.seeds[task] < 1:
            raise ValueError(
                f"problems.{task}={cfg.problems[task]} and seeds.{task}={cfg.seeds[task]}: at least 4 and 1"
            )
        if cfg.noise.n[task] not in ns or (task == cfg.ablation.task and cfg.ablation.n not in ns):
            raise ValueError(
                f"noise.n.{task}={cfg.noise.n[task]} and ablation.n={cfg.ablation.n} must be among ns.{task}={ns}"
            )
    if not cfg.temperature > 0:
        raise ValueError(f"temperature={cfg.temperature} must be positive")
    if own.k < 1 or min(own.reserve, own.slack) < 0 or not 0 <= own.root_score <= 1:
        raise ValueError(
            f"search.k={own.k} must be at least 1, search.reserve={own.reserve} and search.slack={own.slack} at "
            f"least 0, search.root_score={own.root_score} in [0, 1]"
        )


def figures(cfg: DictConfig) -> None:
    """Tables t1 to t5, four figures and the verdicts."""
    from common.reporting.report import Report
    from papers.astar_decoding import analysis, plots

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    plots.figures(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
