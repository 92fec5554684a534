"""The stages: two models, every arm on both, and what was measured beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """Writes recall/ and text/, models in hub format with their tokenizers and metrics.json."""
    from common.workers import run_jobs
    from papers.squeezed_attention import training

    run_jobs(training.job, [(cfg, "recall"), (cfg, "text")], cfg.workers)


def infer(cfg: DictConfig) -> None:
    """Writes arms.parquet (a row an arm and context), heads.parquet, cache.parquet, exact.parquet, counts.parquet,
    times.parquet, and records.parquet (a row a recall question and arm)."""
    import pandas as pd

    from common.generation import records
    from common.generation.steps import needs_transformers
    from common.workers import run_jobs
    from papers.squeezed_attention import measure

    needs_transformers(cfg.backend, "attention to chosen keys")
    jobs = [(cfg, "text", first) for first in range(0, cfg.text.files, cfg.text.batch)]
    jobs += [(cfg, "recall", first) for first in range(0, cfg.recall.contexts, cfg.recall.batch)]
    jobs += [(cfg, "counts", 0), (cfg, "rest", 0)]
    found: dict[str, list[dict[str, Any]]] = {}
    for tables in run_jobs(_job, jobs, cfg.workers):
        for name, rows in tables.items():
            found.setdefault(name, []).extend(rows)
    found["times"] = measure.times(cfg)  # alone on the machine
    out = Path(cfg.out)
    samples = records.frame(found.pop("records"), paper=cfg.slug, profile=cfg.profile)
    records.write(out / "records.parquet", samples)
    for name, rows in found.items():
        pd.DataFrame(rows).to_parquet(out / f"{name}.parquet", index=False)


def _job(of: tuple[DictConfig, str, int]) -> dict[str, list[dict[str, Any]]]:
    """A part of what `infer` measures, as rows of its tables."""
    from papers.squeezed_attention import measure, planted

    cfg, name, first = of
    if name == "counts":
        return {"counts": planted.comparisons(cfg), "arms": planted.selections(cfg)}
    if name == "rest":
        return {"cache": measure.through_the_cache(cfg), "exact": measure.exactness(cfg)}
    rows, heads, samples = measure.run_arms(cfg, name, first)
    return {"arms": rows, "heads": heads, "records": samples}


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts from what `infer` wrote."""
    from common.reporting.report import Report
    from papers.squeezed_attention import analysis, plots

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    plots.figures(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
