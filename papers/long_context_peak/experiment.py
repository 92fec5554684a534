"""long_context_peak's stages. Each reads cfg.artifacts, writes to cfg.out, and knows no other path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def infer(cfg: DictConfig) -> None:
    """Part A, the closed forms: closed/*.csv. Part B, measured: machine.json (this machine's rates), rounds.parquet (a
    row a measurement), arena.csv, identity.csv (deterministic), records.parquet (the texts of the server)."""
    import json
    import os

    # Before torch is imported: two threads that spin for each other on a busy machine take a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import pandas as pd
    import torch

    from common.generation import records
    from common.generation.steps import needs_transformers
    from papers.long_context_peak import closed, laws, machine, sharing
    from papers.long_context_peak.method import Disk, Host

    needs_transformers(cfg.backend, "the measured part")
    out = Path(cfg.out)
    (out / "closed").mkdir()
    for name, rows in closed.tables(cfg).items():
        pd.DataFrame(rows).to_csv(out / "closed" / f"{name}.csv", index=False)
    threads, store = torch.get_num_threads(), Disk(out) if cfg.store == "disk" else Host()
    torch.set_num_threads(cfg.threads)
    try:
        models = {name: machine.load(cfg, name) for name in cfg.attention}
        first = models[cfg.attention[0]]
        (out / "machine.json").write_text(json.dumps(machine.facts(cfg, out, models), indent=2) + "\n")
        pd.DataFrame(sharing.arena_rows(cfg, models)).to_csv(out / "arena.csv", index=False)
        rows = laws.prefill_rounds(cfg, models) + laws.decode_rounds(cfg, models) + laws.thread_rounds(cfg, first)
        rows += sharing.switch_rounds(cfg, first, store)
        served, samples, timed = sharing.session_rounds(cfg, first, store)
    finally:
        store.clear()
        torch.set_num_threads(threads)
    pd.DataFrame(rows + timed).to_parquet(out / "rounds.parquet", index=False)
    pd.DataFrame(served).to_csv(out / "identity.csv", index=False)
    table = records.frame(samples, paper=cfg.slug, profile=cfg.profile, seed=cfg.seed)
    records.write(out / "records.parquet", table)


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts from what infer wrote."""
    from common.reporting.report import Report
    from papers.long_context_peak import analysis, judge, plots

    report, found = Report(cfg), analysis.load(cfg)
    judge.tables(cfg, report, found)
    plots.figures(cfg, report, found)
    judge.verdicts(cfg, report, found)
    report.finish()
