"""The stages: policies trained for one budget or for all, their answers at every budget, the variance of baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """Writes a policy for each arm and seed, and the record: steps.parquet and evaluations.parquet."""
    from common.rl import arms
    from common.workers import run_jobs

    arms.write(cfg, run_jobs(arms.train_job, arms.jobs(cfg), cfg.workers))


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (an answer at every budget to each thought of every policy), thoughts.parquet (these,
    whole), rewards.npz (of the start policy's answers) and timing.json (seconds of a step)."""
    import numpy as np
    import pandas as pd

    from common.generation import records
    from common.generation.steps import needs_transformers
    from common.rl import arms
    from common.workers import run_jobs

    needs_transformers(cfg.backend, "answers of a trained policy")
    out = Path(cfg.out)
    found = run_jobs(_sweep, [(cfg, "start", 0), *arms.jobs(cfg)], cfg.workers)
    answers, thoughts = (pd.concat(frames, ignore_index=True) for frames in zip(*found, strict=True))
    records.write(out / "records.parquet", answers)
    thoughts.to_parquet(out / "thoughts.parquet", index=False)
    rewards, reached = _rewards_of_start(cfg)
    np.savez(out / "rewards.npz", rewards=rewards, reached=reached)
    (out / "timing.json").write_text(json.dumps(_timing(cfg)) + "\n")


def _sweep(job: tuple[DictConfig, str, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Thoughts of a policy on held-out problems, each cut at all budgets; the arm of a record is '<arm> <budget>'."""
    import pandas as pd

    from common.generation import records
    from common.rl import arms
    from common.rl.branches import force
    from common.rl.ground import ground
    from common.rl.rollout import sample

    cfg, name, seed = job
    own = cfg.sweep
    folder = None if name == "start" else Path(cfg.artifacts) / "train" / f"{name}-{seed}"
    on = ground(cfg, cfg.rl, folder)
    policy = on.load()
    how = arms.forcing(cfg.rl, on, budgets=tuple(own.budgets), answers=1)
    tests = {cfg.rl.task.name: on.problems(cfg.seed + 1, "test", own.problems)}
    if on.longer is not None:
        tests["longer"] = on.longer(cfg.seed + 1, own.longer)
    frames, thoughts = [], []
    for task, test in tests.items():
        rollout, spent = sample(
            policy, on.words, test, 1, how.budgets[-1], stop_tokens=[how.delimiter], temperature=own.temperature,
            seed=cfg.seed, step=10**6 + 1, score=False,
        )  # fmt: skip
        branches, forced = force(policy, on.words, rollout, how, on.verify, greedy=True, seed=cfg.seed)
        costs = {
            key: (vars(spent)[key] + vars(forced)[key]) / len(branches.texts)
            for key in ("forwards", "flops", "seconds")
        }
        prompts = on.prompts(test)
        rows: list[dict[str, Any]] = []
        for n, text in enumerate(branches.texts):
            problem, j = n // len(how.budgets), n % len(how.budgets)
            rows.append(
                costs | {
                    "arm": f"{name} {how.budgets[j]}", "problem_id": problem, "sample_id": 0,
                    "difficulty": test[problem].difficulty, "prompt_tokens": len(prompts[problem]),
                    "output_tokens": int(branches.cut[problem, j]) + len(branches.answers[n]), "discarded_tokens": 0,
                    "answer": on.result(test[problem], text), "correct": bool(branches.right[problem, j, 0]),
                }
            )  # fmt: skip
        head = {"seed": seed, "task": task}
        frames.append(records.frame(rows, paper=cfg.slug, profile=cfg.profile, **head))
        lengths = {"length": rollout.length.tolist(), "finished": rollout.finished.tolist()}
        texts = {"prompt": [p.prompt for p in test], "text": rollout.texts}
        thoughts.append(pd.DataFrame({"problem_id": range(len(test))} | lengths | texts).assign(arm=name, **head))
    return pd.concat(frames, ignore_index=True), pd.concat(thoughts, ignore_index=True)


def _rewards_of_start(cfg: DictConfig) -> tuple[Any, Any]:
    """Of the start policy, at every budget of the sweep: rewards [P, G, m], and whether a thought gets that far, that
    is beyond the budget before."""
    import numpy as np

    from common.rl import arms
    from common.rl.branches import force
    from common.rl.ground import ground
    from common.rl.rollout import sample

    own, on = cfg.variance, ground(cfg, cfg.rl)
    policy, budgets = on.load(), tuple(cfg.sweep.budgets)
    how = arms.forcing(cfg.rl, on, budgets=budgets, answers=own.answers)
    problems = on.problems(cfg.seed + 2, "test", own.problems)
    rollout, _ = sample(
        policy, on.words, problems, own.group_size, budgets[-1], stop_tokens=[how.delimiter], seed=cfg.seed, score=False
    )
    branches, _ = force(policy, on.words, rollout, how, on.verify, seed=cfg.seed)
    shape = (own.problems, own.group_size, len(budgets))
    before = [0, *budgets[:-1]]
    reached = [[length > b for b in before] for length in rollout.length.tolist()]
    return branches.right.mean(-1).view(shape).cpu().numpy(), np.array(reached).reshape(shape)


def _timing(cfg: DictConfig) -> dict[str, Any]:
    """Seconds of a training step of GRPO and of AR-uniform, interleaved."""
    import copy
    from functools import partial

    from common.metrics.timing import compare
    from common.rl import arms
    from common.rl.ground import ground

    model = ground(cfg, cfg.rl).load()
    steps = {
        name: partial(lambda name: arms.one_step(cfg, name, copy.deepcopy(model)), name)
        for name in ("grpo", "ar_uniform")
    }
    timings = compare(steps, rounds=cfg.timing.rounds)
    ratio = timings.ratio("ar_uniform", "grpo")
    return {name: timings.median(name) for name in steps} | {
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "n": ratio.n,
        "contended": timings.contended,
    }


def figures(cfg: DictConfig) -> None:
    """Tables t1 and t2, accuracy by budget, the variance of baselines, three figures and the verdicts."""
    from common.reporting.report import Report
    from papers.anytime_reasoner import analysis

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    analysis.plots(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
