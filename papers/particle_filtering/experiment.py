"""The stages: reward models of lower quality, all searches, and what they say about the paper's claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """Writes reward models on shares of the main task's labelled problems, one for each seed, and quality.csv: how well
    each tells right from wrong on labelled problems that none of them saw."""
    import pandas as pd

    from common.workers import run_jobs

    own = cfg.judges
    jobs = [(cfg, f"{share:g}", seed) for share in own.shares for seed in own.seeds]
    rows = run_jobs(_train_judge, jobs, cfg.workers if jobs else 1)
    columns = ["name", "seed", "problems", "auroc", "brier"]
    pd.DataFrame(rows, columns=columns).to_csv(Path(cfg.out) / "quality.csv", index=False)


def _train_judge(job: tuple[DictConfig, str, int]) -> dict:
    """One reward model; returns its row of quality.csv."""
    import pandas as pd

    from common.models.hub import save_model
    from common.reasoners import rewards
    from papers.particle_filtering.arms import model_name

    cfg, name, seed = job
    own, task = cfg.judges, cfg.main.task
    labels = pd.read_parquet(Path(cfg.reasoners) / "prm" / "labels.parquet", filters=[("task", "==", task)])
    held_out = labels["problem"] % own.held_out == own.held_out - 1
    tested = labels[held_out & (labels["problem"] < own.held_out * own.tested)]
    seeded = cfg.copy()
    seeded.seed = cfg.seed + seed
    used = _share(labels[~held_out & (labels["problem"] < own.labels)], float(name), seeded.seed)
    model = rewards.fit(seeded, used, cfg.rewards.steps, model_name(name, seed))
    save_model(model, Path(cfg.out) / model_name(name, seed))
    metrics, _ = rewards.quality(tested, rewards.predict(model, tested))
    return {
        "name": name, "seed": seed, "problems": int(used["problem"].nunique()),
        "auroc": metrics.get(f"{task} auroc", float("nan")), "brier": metrics[f"{task} brier"],
    }  # fmt: skip


def _share(labels: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The labels of a share of the problems of one task; a smaller share of the same seed is part of a larger one."""
    problems = np.sort(labels["problem"].unique())
    kept = np.random.default_rng([seed, 0x5A]).permutation(problems)[: max(2, round(share * len(problems)))]
    return labels[labels["problem"].isin(kept)]


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (the common schema), runs.parquet (a row an arm and problem), nodes.parquet (genealogies),
    toy.parquet (claim c13) and gates.json."""
    import pandas as pd

    from common.generation import records
    from common.reasoners import workbench
    from common.workers import run_jobs
    from papers.particle_filtering import arms

    check(cfg)
    listed = arms.listed(cfg)
    results = run_jobs(arms.run_arm, [(cfg, arm) for arm in listed], cfg.workers)
    out = Path(cfg.out)
    frames = {
        name: pd.DataFrame([row for part in results for row in part[name]]) for name in ("records", "runs", "nodes")
    }
    rows = frames.pop("records").to_dict("records")
    records.write(out / "records.parquet", records.frame(rows, paper=cfg.slug, profile=cfg.profile))
    frames["runs"]["reward"] = [f"{r[0]}/{r[1]}" if r else "" for r in frames["runs"]["reward"]]
    frames["toy"] = _toy(cfg)
    for name, frame in frames.items():
        frame.to_parquet(out / f"{name}.parquet", index=False)
    tasks = {cfg.main.task, *([cfg.second.task] if cfg.second.problems else [])}
    missed = {
        f"{size} {task}": workbench.gate(cfg, size, {"chain": "chain_hard"}.get(task, task))
        or workbench.reward_gate(cfg, task)
        for task in sorted(tasks) for size in ("small", "base", "large")
    }  # fmt: skip
    (out / "gates.json").write_text(json.dumps(missed, indent=2) + "\n")


def _toy(cfg: DictConfig) -> pd.DataFrame:
    """One row a particle filter on the enumerable model: its evidence and its estimate of an event's chance."""
    import pandas as pd

    from papers.particle_filtering.toy import ToyLanguageModel, estimates, starts_with_zero

    frames = []
    for runs, n in ((cfg.toy.runs, cfg.toy.n), (cfg.toy.runs_large, cfg.toy.n_large)):
        evidence, share = estimates(ToyLanguageModel(seed=cfg.seed), runs, n, starts_with_zero)
        frames.append(pd.DataFrame({"n": n, "evidence": evidence, "share": share}))
    return pd.concat(frames, ignore_index=True)


def check(cfg: DictConfig) -> None:
    """Raises ValueError, before any model is loaded, for settings out of range; names the key and what is allowed."""
    from papers.particle_filtering.method import Weighting

    for name in ("main", "second"):
        of = cfg[name]
        widths = list(of.widths)
        if not widths or min(widths) < 1 or sorted(set(widths)) != widths:
            raise ValueError(f"{name}.widths={widths} must rise and be at least 1")
        if any(n > cfg.width and n % cfg.width for n in widths):
            raise ValueError(f"{name}.widths={widths}: those above width={cfg.width} must be multiples of it")
        if of.problems and (of.problems < 4 or not of.seeds):
            raise ValueError(f"{name} needs 4 problems and a seed, not {of.problems} and {list(of.seeds)}")
    if not cfg.temperature > 0:
        raise ValueError(f"temperature={cfg.temperature} must be positive")
    Weighting(tau=cfg.tau, kind=cfg.weights)
    if len({n * times for n, times in cfg.repeats.pairs}) != 1:
        raise ValueError(f"repeats.pairs={list(cfg.repeats.pairs)} must all have the same product: the budget")


def figures(cfg: DictConfig) -> None:
    """Tables t1 to t3, the curves, four figures and the verdicts."""
    from common.reporting.report import Report
    from papers.particle_filtering import analysis, plots

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    plots.draw(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
