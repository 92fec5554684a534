"""Lookahead's stages. Each reads cfg.artifacts and cfg.shared, writes to cfg.out, and knows no other path."""

from __future__ import annotations

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
    from common.generation import records
    from common.models.build import build
    from common.workers import run_jobs
    from papers.lookahead import measure
    from papers.lookahead.decoders import load, torch_threads

    lines = (Path(cfg.artifacts) / "data" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    main = cfg.models[0]
    jobs = [(part, cfg, name, prompts) for name in cfg.models for part in ("compare", "exact")]
    found = run_jobs(_untimed, jobs, cfg.workers)
    compared, exact = dict(zip(cfg.models, found[::2], strict=True)), found[1::2]
    written = {key: [row for of in compared.values() for row in of[key]] for key in ("runs", "samples")}
    written |= compared[main]["replayed"] | {"exact": [row for rows in exact for row in rows]}
    (Path(cfg.out) / "example.json").write_text(json.dumps(compared[main]["example"]) + "\n")
    # From here on nothing runs beside: these are timed.
    with torch_threads(1):  # for every decoder alike; at these sizes a second thread gains nothing
        written["timing"], models = [], {}
        for name, of in compared.items():
            model, tokens = load(cfg, name), cfg.timing.tokens if name == main else cfg.timing.few_tokens
            for task in of["tasks"]:
                sizes = of["sizes"][task.name]
                written["timing"] += measure.timing(cfg, name, model, task, sizes, written["runs"], tokens)
            if name == main:
                models[name] = model
        tasks = {task.name: task for task in compared[main]["tasks"]}
        judged = [task for name, task in tasks.items() if name in (cfg.roles.grounded, cfg.roles.code)]
        written["capacity"] = [row for task in judged for row in measure.capacities(cfg, task)]
        if cfg.latency.build:
            vocabulary = models[main].config.vocab_size
            built = build(cfg.latency.build, vocab_size=vocabulary, seed=cfg.seed).to(cfg.device)
            models[cfg.latency.build] = built
        written["latency"] = measure.latency(cfg, models)
        written["trace"] = [measure.trace_driven(cfg, list(models.values())[-1], tasks[cfg.roles.grounded])]
    samples = records.frame(written.pop("samples"), paper=cfg.slug, profile=cfg.profile, seed=cfg.seed, sample_id=0)
    records.write(Path(cfg.out) / "records.parquet", samples)
    _write(Path(cfg.out), written)


def _untimed(job: tuple[str, DictConfig, str, list[dict[str, Any]]]) -> Any:
    """A part of one model's measurements that is not timed: "compare" runs the decoders side by side, "exact" against
    `generate` of transformers in the highest precision."""
    import torch

    from papers.lookahead import measure
    from papers.lookahead.decoders import (
        ask,
        choose_sizes,
        load,
        load_words,
        torch_threads,
        unanswered,
        without_collections,
    )

    part, cfg, name, prompts = job
    words, is_main = load_words(cfg, name), name == cfg.models[0]
    test = cfg.prompts if is_main else cfg.few_prompts
    with torch_threads(1):
        if part == "exact":
            model = load(cfg, name).to(getattr(torch, cfg.exact.dtype))
            return measure.exactness(cfg, name, model, unanswered(cfg, words, prompts, test))
        tasks = ask(cfg, name, words, prompts, test)
        model = load(cfg, name)  # after `ask`, whose engine may take most of the memory
        found: dict[str, Any] = {"tasks": tasks, "sizes": {}, "runs": [], "samples": []}
        with without_collections():
            for task in tasks:
                sizes = found["sizes"][task.name] = choose_sizes(cfg, task, cfg.token_cost)
                runs, samples = measure.side_by_side(cfg, name, model, words, task, sizes)
                found["runs"] += runs
                found["samples"] += samples
            if is_main:
                found["example"] = measure.example(cfg, tasks[0], words)
                found["replayed"] = _by_replay(cfg, tasks)
    for task in tasks:
        task.tries.clear()  # larger than all the rest together
    return found


def _by_replay(cfg: DictConfig, tasks: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """What needs no model: recorded answers are replayed through tries."""
    from papers.lookahead import measure

    others = {task.name: tasks[(i + 1) % len(tasks)] for i, task in enumerate(tasks)}
    return {
        "defaults": [row for task in tasks for row in measure.at_defaults(cfg, task)],
        "worst": [row for task in tasks for row in measure.worst_cases(cfg, task, others[task.name])],
        "warmup": [row for task in tasks for row in measure.warm_up_curve(cfg, task)],
        "sweep": [row for task in tasks for row in measure.sweep(cfg, task)],
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
