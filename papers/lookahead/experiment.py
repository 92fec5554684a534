"""Lookahead's stages. Each reads cfg.artifacts and cfg.shared, writes to cfg.out, and knows no other path."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def data(cfg: DictConfig) -> None:
    """Writes prompts.jsonl: the prompts of every task and split. No answers: the models give those themselves."""
    from common.data.sources import record_sources
    from papers.lookahead.prompts import TASKS

    used = []
    with (Path(cfg.out) / "prompts.jsonl").open("w") as file:
        for task in cfg.tasks:
            prompts, sources = TASKS[task](cfg)
            used += sources
            for split, texts in prompts.items():
                file.writelines(json.dumps({"task": task, "split": split, "prompt": t}) + "\n" for t in texts)
    record_sources(Path(cfg.out), list(dict.fromkeys(used)))


def infer(cfg: DictConfig) -> None:
    """Runs the decoders and writes one parquet file a measurement; see `papers.lookahead.measure` for their columns.

    records.parquet has the common schema: a row an answer of `side_by_side`, whose arm is "model, decoder".
    """
    import torch

    from common.generation import records
    from common.models.build import build
    from papers.lookahead import measure
    from papers.lookahead.decoders import ask, choose_sizes, load, load_words, torch_threads, without_collections

    lines = (Path(cfg.artifacts) / "data" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    written: dict[str, list[dict[str, Any]]] = {name: [] for name in ("runs", "samples", "exact", "timing")}
    main_tasks, main_model = [], None
    with torch_threads(1):  # for every decoder alike; at these sizes a second thread gains nothing
        for number, name in enumerate(cfg.models):
            words = load_words(cfg, name)
            tasks = ask(cfg, name, words, prompts, cfg.few_prompts if number else cfg.prompts)
            model, sizes = load(cfg, name), {}  # after `ask`, whose engine may take most of the memory
            with without_collections():
                for task in tasks:
                    sizes[task.name] = choose_sizes(cfg, task, cfg.token_cost)
                    runs, samples = measure.side_by_side(cfg, name, model, words, task, sizes[task.name])
                    written["runs"] += runs
                    written["samples"] += samples
            tokens = cfg.timing.few_tokens if number else cfg.timing.tokens
            for task in tasks:
                written["timing"] += measure.timing(cfg, name, model, task, sizes[task.name], written["runs"], tokens)
            if number == 0:
                main_tasks, main_model = tasks, model
                (Path(cfg.out) / "example.json").write_text(json.dumps(measure.example(cfg, tasks[0], words)) + "\n")
            exact = copy.deepcopy(model).to(getattr(torch, cfg.exact.dtype))
            written["exact"] += measure.exactness(cfg, name, exact, tasks)
        written |= _by_replay(cfg, main_tasks)
        models = {cfg.models[0]: main_model}
        if cfg.latency.build:
            vocabulary = main_model.config.vocab_size
            built = build(cfg.latency.build, vocab_size=vocabulary, seed=cfg.seed).to(cfg.device)
            models[cfg.latency.build] = built
        written["latency"] = measure.latency(cfg, models)
        grounded = next(task for task in main_tasks if task.name == cfg.roles.grounded)
        written["trace"] = [measure.trace_driven(cfg, list(models.values())[-1], grounded)]
    samples = records.frame(written.pop("samples"), paper=cfg.slug, profile=cfg.profile, seed=cfg.seed, sample_id=0)
    records.write(Path(cfg.out) / "records.parquet", samples)
    _write(Path(cfg.out), written)


def _by_replay(cfg: DictConfig, tasks: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """What needs no model: recorded answers are replayed through tries."""
    from papers.lookahead import measure
    from papers.lookahead.decoders import without_collections

    judged = (cfg.roles.grounded, cfg.roles.code)
    others = {task.name: tasks[(i + 1) % len(tasks)] for i, task in enumerate(tasks)}
    with without_collections():
        return {
            "defaults": [row for task in tasks for row in measure.at_defaults(cfg, task)],
            "worst": [row for task in tasks for row in measure.worst_cases(cfg, task, others[task.name])],
            "warmup": [row for task in tasks for row in measure.warm_up_curve(cfg, task)],
            "sweep": [row for task in tasks for row in measure.sweep(cfg, task)],
            "capacity": [row for task in tasks if task.name in judged for row in measure.capacities(cfg, task)],
        }


def _write(out: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    import pandas as pd

    for name, rows in tables.items():
        pd.DataFrame(rows).to_parquet(out / f"{name}.parquet", index=False)


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts from what infer wrote."""
    from common.reporting.report import Report
    from papers.lookahead import judge, plots

    report = Report(cfg)
    measured = judge.read(Path(cfg.artifacts) / "infer")
    judge.tables(cfg, report, measured)
    plots.figures(cfg, report, measured)
    judge.claims(cfg, report, measured)
    report.finish()
