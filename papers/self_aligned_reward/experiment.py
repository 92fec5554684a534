"""The stages: a start that knows blank prompts, policies trained with each reward, what the reward says of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig
    from transformers import PreTrainedModel


def train(cfg: DictConfig) -> None:
    """Writes the start, a policy for each arm and seed, and the record: steps.parquet and evaluations.parquet."""
    import pandas as pd

    from common.models.hub import save_model
    from common.rl import arms
    from common.workers import run_jobs
    from papers.self_aligned_reward.answers import train_start

    for name in cfg.arms:
        arms.settings(cfg, name)
    save_model(train_start(cfg).cpu(), Path(cfg.out) / "start")
    jobs = [(cfg, name, seed) for name in cfg.arms for seed in _seeds(cfg, name)]
    found = run_jobs(_train_arm, jobs, cfg.workers)
    for name in ("steps", "evaluations"):
        pd.DataFrame([row for part in found for row in part[name]]).to_parquet(
            Path(cfg.out) / f"{name}.parquet", index=False
        )


def _seeds(cfg: DictConfig, name: str) -> list[int]:
    """The training seeds of an arm in this profile."""
    if name in cfg.cut:
        return []
    return list(cfg.seeds if name in cfg.headline else cfg.seeds[:1])


def _train_arm(job: tuple[DictConfig, str, int]) -> dict[str, list[dict[str, Any]]]:
    from common.models.hub import save_model
    from common.rl import arms

    cfg, name, seed = job
    arm = arms.train_arm(cfg, name, seed, start=Path(cfg.out) / "start")
    save_model(arm.policy.cpu(), Path(cfg.out) / f"{name}-{seed}")
    head = {"arm": name, "seed": seed}
    return {
        "steps": [head | row for row in arm.record.rows],
        "evaluations": [head | row for row in arm.record.evaluations],
    }


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (answers of every policy), behaviours.parquet (checks and corrections in them),
    kinds.parquet (the reward of answers of known kind), tokens.parquet (its parts, token by token, for one problem) and
    timing.json (seconds of a step with and without the reward)."""
    import pandas as pd

    from common.generation import records
    from common.generation.steps import needs_transformers
    from common.workers import run_jobs

    needs_transformers(cfg.backend, "answers of a trained policy")
    out = Path(cfg.out)
    jobs = [("start", 0), *((name, seed) for name in cfg.arms for seed in _seeds(cfg, name))]
    found = run_jobs(_answer, [(cfg, *job) for job in jobs], cfg.workers)
    records.write(out / "records.parquet", pd.concat([frame for frame, _ in found], ignore_index=True))
    pd.DataFrame([row for _, row in found]).to_parquet(out / "behaviours.parquet", index=False)
    kinds, tokens = _kinds(cfg)
    kinds.to_parquet(out / "kinds.parquet", index=False)
    tokens.to_parquet(out / "tokens.parquet", index=False)
    (out / "timing.json").write_text(json.dumps(_timing(cfg)) + "\n")


def _answer(job: tuple[DictConfig, str, int]) -> tuple[pd.DataFrame, dict[str, Any]]:
    import pandas as pd

    from common.generation import records
    from common.models.hub import load_model
    from common.rl import arms
    from common.rl.outcomes import answer_rows
    from common.tasks import chain

    cfg, name, seed = job
    folder = Path(cfg.artifacts) / "train" / ("start" if name == "start" else f"{name}-{seed}")
    policy, own = load_model(folder).to(cfg.device), cfg.final
    high = cfg.rl.chain.steps[1]
    tests = {
        "chain": arms.problems(cfg.rl, cfg.seed + 1, "test", own.problems),
        "longer": chain.generate(cfg.seed + 1, own.longer, (high + 1, high + 2), "test", style="concise"),
    }
    frames, behaviour = [], {"arm": name, "seed": seed}
    for task, test in tests.items():
        for kind, samples in (("sampled", own.samples), ("greedy", 1)):
            texts: list[str] = []
            rows = answer_rows(
                policy, test, cfg.rl.train.max_new_tokens + 24, samples, cfg.seed, greedy=kind == "greedy", texts=texts
            )
            head = {"paper": cfg.slug, "profile": cfg.profile, "arm": f"{name} {kind}", "seed": seed, "task": task}
            frames.append(records.frame(rows, **head))
            if (task, kind) == ("chain", "sampled"):
                behaviour |= _behaviour(texts)
    return pd.concat(frames, ignore_index=True), behaviour


def _behaviour(texts: list[str]) -> dict[str, float]:
    """Of sampled answers: values written, checks ("?=") a value, and how many of the checks correct it."""
    import re

    segments = [segment for text in texts for segment in text.split(",") if "=" in segment]
    pairs = [re.search(r"=(\d)\?=(\d)", segment) for segment in segments]
    checked = [pair for pair in pairs if pair]
    corrected = sum(pair.group(1) != pair.group(2) for pair in checked)
    count, operations = max(1, len(segments)), sum(segment.count(o) for segment in segments for o in "+-*")
    return {
        "segments": len(segments), "checks": len(checked) / count, "corrections": corrected / count,
        "fillers": sum("~~" in segment for segment in segments) / count,
        "operations a segment": operations / count,
    }  # fmt: skip


def _kinds(cfg: DictConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The reward of answers of each kind by the start policy, and v_j of the kinds' answers to one problem."""
    import pandas as pd

    from common.models.hub import load_model
    from common.reasoners import policies
    from papers.self_aligned_reward.answers import blank_ids, of_kinds
    from papers.self_aligned_reward.method import from_information, information

    model, words = load_model(Path(cfg.artifacts) / "train" / "start").to(cfg.device), policies.tokenizer()
    problems, kinds = of_kinds(cfg.seed, cfg.analysis.problems, tuple(cfg.rl.chain.steps))
    prompts = words([p.prompt for p in problems])["input_ids"]
    rows, tokens = [], []
    for kind, texts in kinds.items():
        answers = words(texts)["input_ids"]
        for i, v in enumerate(information(model, prompts, answers, blank_ids())):
            reward = float(from_information(v[None], v[None] == v[None])[0])
            rows.append({"kind": kind, "problem": i, "reward": reward, "tokens": len(v)})
            if i == cfg.analysis.shown:
                parts = words.convert_ids_to_tokens(answers[i])
                tokens += [
                    {"kind": kind, "place": j, "token": token, "information": float(x)}
                    for j, (token, x) in enumerate(zip(parts, v, strict=True))
                ]
    return pd.DataFrame(rows), pd.DataFrame(tokens)


def _timing(cfg: DictConfig) -> dict[str, Any]:
    """Seconds of a training step with and without the reward's forward pass, interleaved."""
    import copy
    import functools

    from common.metrics.timing import compare
    from common.models.hub import load_model
    from common.rl import arms

    start = Path(cfg.artifacts) / "train" / "start"
    model = load_model(start, attention="eager").to(cfg.device)
    steps = {
        name: functools.partial(lambda name: arms.one_step(cfg, name, copy.deepcopy(model)), name)
        for name in ("grpo", "self_aligned")
    }
    passes = {name: _passes(cfg, name, copy.deepcopy(model)) for name in steps}
    timings = compare(steps, rounds=cfg.timing.rounds)
    ratio = timings.ratio("self_aligned", "grpo")
    return {
        "grpo": timings.median("grpo"), "self_aligned": timings.median("self_aligned"), "ratio": ratio.value,
        "low": ratio.low, "high": ratio.high, "n": ratio.n, "contended": timings.contended,
        "passes": passes["self_aligned"] - passes["grpo"],
    }  # fmt: skip


def _passes(cfg: DictConfig, name: str, model: PreTrainedModel) -> int:
    """Forward passes of the module in one step; the sampler has its own forward, the same in all arms."""
    from common.rl import arms

    calls: list[int] = []
    handle = model.base_model.register_forward_hook(lambda *_: calls.append(1))
    arms.one_step(cfg, name, model)
    handle.remove()
    return len(calls)


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts."""
    from common.reporting.report import Report
    from papers.self_aligned_reward import analysis

    report = Report(cfg)
    found = analysis.load(cfg)
    analysis.tables(cfg, report, found)
    analysis.plots(cfg, report, found)
    analysis.verdicts(cfg, report, found)
    report.finish()
