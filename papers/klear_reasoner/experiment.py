"""The stages: policies trained with different clipping rules, students of data of known quality, their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig


COLUMNS = {
    "cells": ["arm", "seed", "cell", "tokens", "entropy", "size", "step", "minibatch"],
    "tokens": ["arm", "seed", "ratio", "advantage"],
}


def train(cfg: DictConfig) -> None:
    """Writes a policy for each arm and seed, steps.parquet and evaluations.parquet (the trainer's record),
    cells.parquet (tokens by clipping cell), tokens.parquet (some ratios and advantages) and students.parquet."""
    import pandas as pd

    from common.rl import arms
    from common.workers import run_jobs
    from papers.klear_reasoner.sources import train_student

    # A run that clips nothing has no tokens to show, and its columns all the same.
    arms.write(cfg, run_jobs(_train_arm, arms.jobs(cfg), cfg.workers), COLUMNS)
    own = cfg.students
    students = [(cfg, arm, seed) for arm in own.arms for seed in (own.seeds[:1] if arm in own.once else own.seeds)]
    answers = run_jobs(train_student, students, cfg.workers)
    rows = [row for part in answers for row in part]
    frame = pd.DataFrame(rows, columns=None if rows else ["arm", "seed", "problem", "correct"])
    frame.to_parquet(Path(cfg.out) / "students.parquet", index=False)


def _train_arm(job: tuple[DictConfig, str, int]) -> dict[str, list[dict[str, Any]]]:
    import pandas as pd
    import torch

    from common.rl import arms
    from common.rl.trainer import Minibatch
    from papers.klear_reasoner.method import clip_cells

    cfg, name, seed = job
    cells: list[pd.DataFrame] = []
    tokens: list[dict[str, Any]] = []

    def inspect(of: Minibatch) -> None:
        table = clip_cells(of.ratio, of.advantage, of.entropy, of.mask, cfg.clip.low, cfg.clip.high)
        cells.append(table.assign(step=of.step, minibatch=of.index))
        if seed == cfg.seeds[0] and of.step in cfg.clip.steps:
            counted = (of.mask & (of.advantage != 0)).nonzero().tolist()
            random = torch.Generator().manual_seed(of.step * 100 + of.index)
            chosen = torch.randperm(len(counted), generator=random)[: cfg.clip.tokens].tolist()
            tokens.extend(
                {"ratio": float(of.ratio[n, t]), "advantage": float(of.advantage[n, t])}
                for n, t in (counted[i] for i in chosen)
            )

    found = arms.train_job(job, inspect=inspect)
    head = {"arm": name, "seed": seed}
    table = pd.concat(cells) if cells else pd.DataFrame()
    return found | {
        "cells": [head | row for row in table.to_dict("records")],
        "tokens": [head | row for row in tokens],
    }


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet: answers of every trained policy and of the start, sampled and greedy, to held-out
    problems of the trained lengths (task `chain`) and of up to two operations more (`longer`)."""
    import pandas as pd

    from common.generation import records
    from common.generation.steps import needs_transformers
    from common.rl import arms
    from common.workers import run_jobs

    needs_transformers(cfg.backend, "answers of a trained policy")
    frames = run_jobs(_answer, [(cfg, "start", 0), *arms.jobs(cfg)], cfg.workers)
    records.write(Path(cfg.out) / "records.parquet", pd.concat(frames, ignore_index=True))


def _answer(job: tuple[DictConfig, str, int]) -> pd.DataFrame:
    from common.rl.outcomes import answers

    cfg, name, seed = job
    trained = Path(cfg.artifacts) / "train" / f"{name}-{seed}"
    return answers(cfg, name, seed, None if name == "start" else trained)


def figures(cfg: DictConfig) -> None:
    """Tables t1 to t6 of what ran, the clipping cells, two figures and the verdicts."""
    from common.reporting.report import Report
    from papers.klear_reasoner import analysis

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    analysis.plots(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
