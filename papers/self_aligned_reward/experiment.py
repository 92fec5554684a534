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
    from functools import partial

    from common.models.hub import save_model
    from common.rl import arms
    from common.workers import run_jobs
    from papers.self_aligned_reward.answers import train_start

    jobs, start = arms.jobs(cfg), _start(cfg, Path(cfg.out))
    if start is not None:
        save_model(train_start(cfg).cpu(), start)
    arms.write(cfg, run_jobs(partial(arms.train_job, start=start), jobs, cfg.workers))


def _start(cfg: DictConfig, folder: Path) -> Path | None:
    """Where the start of the arms is; None for a checkpoint of the hub, which has seen texts without questions."""
    return folder / "start" if cfg.rl.task.name == "chain" else None


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (answers of every policy), behaviours.parquet (checks and corrections in them),
    kinds.parquet (the reward of answers of known kind), tokens.parquet (its parts, token by token, for one problem) and
    timing.json (seconds of a step with and without the reward)."""
    import pandas as pd

    from common.generation import records
    from common.generation.steps import needs_transformers
    from common.rl import arms
    from common.workers import run_jobs

    needs_transformers(cfg.backend, "answers of a trained policy")
    out = Path(cfg.out)
    found = run_jobs(_answer, [(cfg, "start", 0), *arms.jobs(cfg)], cfg.workers)
    records.write(out / "records.parquet", pd.concat([frame for frame, _ in found], ignore_index=True))
    pd.DataFrame([row for _, row in found]).to_parquet(out / "behaviours.parquet", index=False)
    kinds, tokens = _kinds(cfg)
    kinds.to_parquet(out / "kinds.parquet", index=False)
    tokens.to_parquet(out / "tokens.parquet", index=False)
    (out / "timing.json").write_text(json.dumps(_timing(cfg)) + "\n")


def _answer(job: tuple[DictConfig, str, int]) -> tuple[pd.DataFrame, dict[str, Any]]:
    from common.rl.outcomes import answers

    cfg, name, seed = job
    trained = Path(cfg.artifacts) / "train"
    texts: dict[tuple[str, str], list[str]] = {}
    frame = answers(cfg, name, seed, _start(cfg, trained) if name == "start" else trained / f"{name}-{seed}", texts)
    return frame, {"arm": name, "seed": seed} | _behaviour(texts[cfg.rl.task.name, "sampled"])


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

    if cfg.rl.task.name != "chain":
        return pd.DataFrame(columns=["kind", "problem"]), pd.DataFrame(columns=["kind", "place"])
    model, words = load_model(Path(cfg.artifacts) / "train" / "start").to(cfg.device), policies.tokenizer()
    problems, kinds = of_kinds(cfg.seed, cfg.analysis.problems, tuple(cfg.rl.task.steps))
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
    from common.rl import arms
    from common.rl.ground import ground

    model = ground(cfg, cfg.rl, _start(cfg, Path(cfg.artifacts) / "train")).load()
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


def _passes(cfg: DictConfig, name: str, model: PreTrainedModel) -> float:
    """Forward passes of each answer in one step; the sampler has its own forward, the same in all arms."""
    from common.rl import arms

    rows: list[int] = []
    handle = model.base_model.register_forward_hook(lambda _, __, output: rows.append(len(output.last_hidden_state)))
    arms.one_step(cfg, name, model)
    handle.remove()
    return sum(rows) / (cfg.rl.prompts * cfg.rl.group_size)


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
