"""The stages: texts; quantised models on held-out text and problems; tables, figures and verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def data(cfg: DictConfig) -> None:
    """Writes texts.json: calibration texts for each draw, held-out text and problems."""
    from common.data.sources import record_sources
    from papers.fast_2bit import texts

    own = cfg.text
    held_out = texts.SOURCES[own.source](cfg, "test", own.windows, own.tokens, cfg.seed)
    problems = texts.problems(cfg, cfg.problems.task, "test", cfg.problems.count)
    content = {
        "calibration": [texts.calibration(cfg, draw) for draw in range(cfg.calibration.draws)],
        "text": held_out,
        "problems": [vars(problem) for problem in problems],
    }
    (Path(cfg.out) / "texts.json").write_text(json.dumps(content) + "\n")
    record_sources(Path(cfg.out), texts.sources(cfg))


def infer(cfg: DictConfig) -> None:
    """Writes arms.parquet (stored bits and weight errors of every run), windows.parquet (NLL and KL of every window),
    records.parquet (every answer, the draw as its sample), ranges.parquet (of stripes), scales.parquet, facts.json, and
    on a GPU speed.parquet."""
    import pandas as pd

    from common.generation import records
    from common.workers import run_jobs
    from papers.fast_2bit import measure

    out, todo = Path(cfg.out), measure.runs(cfg)
    found = run_jobs(measure.measured, [(cfg, todo[i :: cfg.workers]) for i in range(cfg.workers)], cfg.workers)
    rows = {name: [row for part in found for row in part[name]] for name in ("arms", "windows", "records")}
    answers = records.frame(rows.pop("records"), paper=cfg.slug, profile=cfg.profile, seed=cfg.seed)
    records.write(out / "records.parquet", answers)
    ground = measure.load(cfg)
    (out / "facts.json").write_text(json.dumps({"vocabulary": ground.model.config.vocab_size}) + "\n")
    rows["ranges"] = measure.stripe_ranges(cfg, ground)
    rows["scales"] = measure.scale_study(cfg.seed)
    if cfg.device.startswith("cuda"):
        from papers.fast_2bit.speed import speed

        rows["speed"] = speed(cfg)
    for name, table in rows.items():
        pd.DataFrame(table).to_parquet(out / f"{name}.parquet", index=False)


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts from what infer wrote."""
    from common.reporting.report import Report
    from papers.fast_2bit import analysis, plots

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    plots.figures(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
