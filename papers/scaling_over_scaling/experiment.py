"""The stages: models that rethink, answers drawn in parallel and one after another, and where they stop paying."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """Writes the rethinking models that the tasks need, in hub format, and metrics.json."""
    from common.workers import run_jobs
    from papers.scaling_over_scaling import training

    names = sorted({cfg.grounds[task].rethinker for task in cfg.sequential} - {None})
    rows = run_jobs(training.train_one, [(cfg, name) for name in names], min(cfg.workers, max(1, len(names))))
    for row in rows:
        print(json.dumps(row), flush=True)
    (Path(cfg.out) / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n")


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (the common schema), pools.csv (a row an arm and problem), models.json (sizes for the
    roofline) and gates.json (why the reward model cannot select on a task, or null)."""
    import pandas as pd

    from common.generation import records
    from common.workers import run_jobs
    from papers.scaling_over_scaling import arms

    check(cfg)
    results = run_jobs(arms.run_arm, [(cfg, arm) for arm in arms.listed(cfg)], cfg.workers)
    out = Path(cfg.out)
    rows = [row for result in results for row in result["records"]]
    fixed = {"paper": cfg.slug, "profile": cfg.profile, "seed": cfg.seed, "discarded_tokens": 0}
    records.write(out / "records.parquet", records.frame(rows, **fixed))
    pd.DataFrame([row for result in results for row in result["pools"]]).to_csv(out / "pools.csv", index=False)
    content = {"models": [result["model"] for result in results], "gates": reward_gates(cfg)}
    for name, what in content.items():
        (out / f"{name}.json").write_text(json.dumps(what, indent=2) + "\n")


def reward_gates(cfg: DictConfig) -> dict[str, str | None]:
    """By task why the reward model cannot choose an answer, measured on other problems; None where it can."""
    from common.reasoners import workbench
    from papers.scaling_over_scaling import arms

    kinds = {task: arms.KINDS.get(task) for task in cfg.tasks}
    return {
        task: workbench.reward_gate(cfg, kind, cfg.reward) if kind and cfg.reward else "there is no reward model"
        for task, kind in kinds.items()
    }


def check(cfg: DictConfig) -> None:
    """Raises ValueError, before any model is loaded, for settings out of range; names the key and what is allowed."""
    budgets, small, up_to = list(cfg.budgets), cfg.samples.small, cfg.fit_up_to
    if len(budgets) < 3 or budgets[0] != 1 or any(b != 2 * a for a, b in itertools.pairwise(budgets)):
        raise ValueError(f"budgets={budgets} must be doublings of 1, at least three of them")
    if budgets[-1] > small:
        raise ValueError(f"budgets={budgets} exceed the samples.small={small}")
    if up_to < 2 or small < 2 * up_to:
        raise ValueError(f"fit_up_to={up_to} must be at least 2 and at most half of samples.small={small}")
    if not 1 <= cfg.headline <= small // 2:
        raise ValueError(f"headline={cfg.headline} must lie in 1..{small // 2}, the samples that judge")
    if cfg.chains < 2 or cfg.chains % 2 or cfg.rounds < 1:
        raise ValueError(f"chains={cfg.chains} must be even and at least 2, rounds={cfg.rounds} at least 1")
    if min(cfg.samples.large, small) < 2 or cfg.samples.rethinker < 0:
        raise ValueError(f"samples={dict(cfg.samples)}: the small and the large model need at least 2 each")
    if not cfg.temperature > 0 or not 0 < cfg.top_p <= 1:
        raise ValueError(f"temperature={cfg.temperature} must be positive and top_p={cfg.top_p} in (0, 1]")
    if not list(cfg.epsilons) or not all(0 < epsilon < 1 for epsilon in cfg.epsilons):
        raise ValueError(f"epsilons={list(cfg.epsilons)} must lie in (0, 1)")
    own = cfg.allocation
    if not 1 <= own.pilot <= own.most <= small or min(own.votes, own.orders) < 1:
        raise ValueError(
            f"allocation={dict(own)}: needs 1 <= pilot <= most <= samples.small={small}, votes and orders at least 1"
        )
    for name in ("sequential", "scored"):
        if unknown := sorted(set(cfg[name]) - set(cfg.tasks)):
            raise ValueError(f"{name}={list(cfg[name])}: {', '.join(unknown)} not in tasks={list(cfg.tasks)}")
    if cfg.problems < 1 or cfg.problems * min(len(cfg.grounds[task].bins) for task in cfg.tasks) < 2:
        raise ValueError(f"problems={cfg.problems}: a task needs at least 2 problems")


def figures(cfg: DictConfig) -> None:
    """Tables, three figures and the verdicts."""
    from common.reporting.report import Report
    from papers.scaling_over_scaling import analysis, plots, tables, verdicts

    report = Report(cfg)
    found = analysis.load(cfg)
    tables.write(cfg, report, found)
    plots.draw(cfg, report, found)
    verdicts.judge(cfg, report, found)
    report.finish()
