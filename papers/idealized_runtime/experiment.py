"""The stages: the released logs and constants; own profiles, three providers, answers; tables, figures and verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def data(cfg: DictConfig) -> None:
    """Writes HELM's constants, cells.csv (of the profiling logs), scenarios.csv, calls.csv (of APIs), sources.json; a
    file of the logs is left away where its source is absent."""
    from papers.idealized_runtime import published

    published.collect(cfg, Path(cfg.out))


def infer(cfg: DictConfig) -> None:
    """Writes rounds.parquet, stacks.parquet and layers.parquet (every timed call of part B), profiles.json (HELM's
    schema), calls.parquet (synthetic calls of part C), records.parquet (every answer of parts C and D)."""
    import os

    # Before torch is imported: two threads that spin for each other on a busy machine take a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import gc

    import torch

    from common.costs.idealized_runtime import save
    from common.generation.steps import needs_transformers
    from papers.idealized_runtime import market, own

    needs_transformers(cfg.backend, "the timing of single queries")
    own.check(cfg)
    market.check(cfg)
    threads = torch.get_num_threads()
    gc.disable()  # a collection in the middle of a timed call is noise
    try:
        torch.set_num_threads(1)
        profiles = own.run(cfg, Path(cfg.out)) | market.run(cfg, Path(cfg.out))
        save(Path(cfg.out) / "profiles.json", profiles)
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts from what data and infer wrote."""
    from common.reporting.report import Report
    from papers.idealized_runtime import analysis, plots, tables, verdicts

    report = Report(cfg)
    found = analysis.load(cfg)
    tables.tables(cfg, report, found)
    plots.figures(cfg, report, found)
    verdicts.judge(cfg, report, found)
    report.finish()
