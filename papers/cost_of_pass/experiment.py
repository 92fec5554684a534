"""The stages: train models of three classes, ask all of them everything eight times, say whose answers are cheapest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

TECHNIQUES = ("fresh", "refine", "judge")


def train(cfg: DictConfig) -> None:
    """Writes <name>/half and <name>/final of every model that is trained here, and sizes.json."""
    from common.workers import run_jobs
    from papers.cost_of_pass import zoo

    found = run_jobs(zoo.train_member, [(cfg, name) for name in cfg.trained], cfg.workers if cfg.trained else 1)
    sizes = {row.pop("name"): row for row in found}
    (Path(cfg.out) / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (a row a run), calls.parquet (a row a call), releases.csv, guesses.csv and the clock of
    each model: profiles.json, timing.csv, sizes.json."""
    import pandas as pd

    from common.generation import records
    from common.workers import run_jobs
    from papers.cost_of_pass import sampling, zoo

    check(cfg)
    order = sorted(cfg.zoo, key=lambda entry: entry.style == "direct")  # reasoning takes longest
    parts = run_jobs(sampling.run_entry, [(cfg, entry) for entry in order], cfg.workers)
    out = Path(cfg.out)
    records.write(out / "records.parquet", pd.concat([part["records"] for part in parts], ignore_index=True))
    pd.concat([part["calls"] for part in parts], ignore_index=True).to_parquet(out / "calls.parquet", index=False)
    sizes = _clocks(cfg, out)
    rows = [
        {
            "name": entry.name, "class": entry["class"], "of": entry.of, "frontier": entry.frontier,
            "parameters": sizes[entry.of], "training_flops": zoo.training_flops(cfg, entry),
        }
        for entry in cfg.zoo
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(out / "releases.csv", index=False)
    _guesses(cfg).to_csv(out / "guesses.csv", index=False)


def _clocks(cfg: DictConfig, out: Path) -> dict[str, int]:
    """Measures every model of the frontier at batch 1 with one thread; returns the parameters of each, and of the
    reward model, which is priced by the clock of the policy whose size it has."""
    import warnings

    import pandas as pd
    import torch

    from common.costs import idealized_runtime as clock
    from common.models.build import count_parameters
    from common.models.hub import load_model
    from common.models.reward import load_reward_model
    from papers.cost_of_pass import zoo
    from papers.cost_of_pass.sampling import JUDGE

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cells = clock.cheap_cells(list(cfg.timing.prompts), list(cfg.timing.outputs))
    profiles, sizes, frames = {}, {}, []
    for entry in cfg.zoo:
        if not entry.frontier:
            continue
        hub = str(entry.weights).startswith("hub:")
        model = load_model(zoo.weights(cfg, entry), network=cfg.network and hub).to(cfg.device)
        measured, timings = clock.measure(model, cells, cfg.timing.rounds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that F falls somewhere: noise of a few microseconds
            profiles[entry.of] = clock.fit(measured).profile
        sizes[entry.of] = count_parameters(model)
        frames.append(measured.assign(model=entry.of, contended=timings.contended))
    torch.set_num_threads(threads)
    if cfg.judge.task in [task.name for task in cfg.tasks]:
        sizes[JUDGE] = count_parameters(load_reward_model(Path(cfg.reasoners) / "prm" / cfg.judge.task))
        profiles[JUDGE] = profiles[cfg.judge.of]
    clock.save(out / "profiles.json", profiles)
    pd.concat(frames).to_csv(out / "timing.csv", index=False)
    (out / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")
    return sizes


def _guesses(cfg: DictConfig) -> pd.DataFrame:
    """The chance of a guess for every problem of our own tasks."""
    import pandas as pd

    from papers.cost_of_pass import tasks

    rows = [
        {"task": of.name, "problem_id": i, "chance": tasks.chance_of_a_guess(item)}
        for of in cfg.tasks
        if of.name in tasks.GENERATORS
        for i, item in enumerate(tasks.items(of.name, cfg.seed, of.problems, "test", cfg.facts))
    ]
    return pd.DataFrame(rows, columns=["task", "problem_id", "chance"])


def check(cfg: DictConfig) -> None:
    """Raises ValueError, before any model is loaded, for settings out of range; names the key and what is allowed."""
    from papers.cost_of_pass.method import CLASSES

    names = [entry.name for entry in cfg.zoo]
    if len(set(names)) != len(names):
        raise ValueError(f"a name stands twice in zoo: {names}")
    for entry in cfg.zoo:
        if entry["class"] not in CLASSES:
            raise ValueError(f"zoo {entry.name}: class={entry['class']!r} is unknown; known: {', '.join(CLASSES)}")
        if unknown := sorted(set(entry.techniques) - set(TECHNIQUES)):
            raise ValueError(f"zoo {entry.name}: techniques={unknown} are unknown; known: {', '.join(TECHNIQUES)}")
        if entry.of not in names:
            raise ValueError(f"zoo {entry.name}: of={entry.of!r} is not in the zoo: {', '.join(names)}")
    for of in cfg.tasks:
        if of.problems < 2 or not of.human_usd > 0:
            raise ValueError(
                f"tasks {of.name}: problems={of.problems} must be at least 2, human_usd={of.human_usd} positive"
            )
    if cfg.runs < 2 or not all(2 <= k <= cfg.runs for k in cfg.votes):
        raise ValueError(f"runs={cfg.runs} must be at least 2 and votes={list(cfg.votes)} lie in 2..runs")
    own = cfg.prices
    if min(own.prompt_share, own.usd_per_parameter, own.usd_per_token, own.usd_per_hour) < 0:
        raise ValueError(f"prices must not be negative: {dict(own)}")
    if not cfg.temperature > 0:
        raise ValueError(f"temperature={cfg.temperature} must be positive: greedy runs are all the same")


def figures(cfg: DictConfig) -> None:
    """Tables t1 to t4 and those behind them, four figures and the verdicts."""
    from common.reporting.report import Report
    from papers.cost_of_pass import analysis, plots, tables, verdicts

    report = Report(cfg)
    found = analysis.load(cfg)
    tables.write(cfg, report, found)
    plots.draw(cfg, report, found)
    verdicts.judge(cfg, report, found)
    report.finish()
