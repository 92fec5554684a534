"""The stages: train a family of models, let each answer every task many times, judge resampling by its verifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerFast

    from common.tasks.problem import Problem
    from common.training.data import Example

STYLES = ("first", "last")
CHUNK_ROWS = 2400  # sequences in one batch
STEP_TOKENS, STEPS = 8, 6  # finished sequences leave the batch every 8 tokens


def _tokenizer() -> PreTrainedTokenizerFast:
    from common.models.tokenizer import word_tokenizer
    from common.tasks import exprs

    return word_tokenizer([*exprs.SYMBOLS, *exprs.WORDS])


def train(cfg: DictConfig) -> None:
    """Writes a folder in hub format for each model of the family, which plays the paper's 17 models."""
    from common.models.tokenizer import encode
    from common.tasks import exprs
    from common.training.data import Example
    from common.workers import run_jobs

    words, own = _tokenizer(), cfg.training
    problems = exprs.generate(cfg.seed, own.problems)
    for style in STYLES:
        problems += exprs.generate(cfg.seed, round(own.problems * own.styled / 2), style=style)
    prompts, answers = (encode(words, [getattr(p, part) for p in problems]) for part in ("prompt", "answer"))
    examples = [Example([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)]
    names = sorted(cfg.family, key=lambda name: -cfg.family[name].steps * cfg.family[name].hidden_size)  # long first
    run_jobs(_train_member, [(cfg, name, examples) for name in names], cfg.workers)


def _train_member(job: tuple[DictConfig, str, list[Example]]) -> None:
    from common.models.build import build
    from common.models.hub import save_model
    from common.tasks import exprs
    from common.training.checkpoint import checkpoint_folder
    from common.training.data import bucketed, mixture
    from common.training.loop import TrainConfig
    from common.training.loop import train as fit

    cfg, name, examples = job
    words, own, member = _tokenizer(), cfg.training, cfg.family[name]
    seed = cfg.seed + member.seed
    sizes = {
        "hidden_size": member.hidden_size,
        "num_hidden_layers": member.layers,
        "intermediate_size": 2 * member.hidden_size,
        "vocab_size": len(words),
        "eos_token_id": words.convert_tokens_to_ids(exprs.END),
        "pad_token_id": words.pad_token_id,
    }
    model = build(sizes, seed=seed, attention="eager").to(cfg.device)
    config = TrainConfig(
        steps=member.steps, learning_rate=own.learning_rate, warmup_steps=own.warmup_steps, seed=seed, shards=1
    )
    settings = [{k: own[k] for k in own}, {k: member[k] for k in member}, cfg.seed]
    state = fit(
        model,
        mixture(bucketed(examples, own.rows, seed=seed)),
        config,
        checkpoints=checkpoint_folder(cfg.checkpoints, name, settings),
        title=name,
    )
    save_model(model.cpu(), Path(cfg.out) / name)
    loss = state.history[-1]["train_loss"]
    print(f"{name}: {state.step} steps, {state.seconds:.0f} s, training loss {loss:.2f}", flush=True)


def infer(cfg: DictConfig) -> None:
    """Writes records.parquet (a row a sample), counts.csv (a row a model, task and number of tests) and styles.csv."""
    import pandas as pd

    from common.generation import records
    from common.generation.steps import needs_transformers
    from common.models.hub import load_model
    from common.tasks import exprs

    needs_transformers(cfg.backend, "sampling from a forked prompt")
    words = _tokenizer()
    tasks = exprs.generate(cfg.seed, cfg.tasks, split="test")
    styled = {style: exprs.generate(cfg.seed, cfg.tasks, split="test", style=style) for style in STYLES}
    frames, counts, styles = [], [], []
    for name in cfg.family:
        model = load_model(Path(cfg.artifacts) / "train" / name).to(cfg.device)
        texts, rows = _answers(cfg, model, words, tasks, cfg.samples, name)
        frames.append(
            records.frame(
                rows, paper=cfg.slug, arm=name, profile=cfg.profile, seed=cfg.seed, task="exprs", discarded_tokens=0
            )
        )
        counts += [
            {"model": name, "task": t, "tests": tests} | _count(problem, texts[t], _inputs(cfg, tests, t))
            for t, problem in enumerate(tasks)
            for tests in sorted({*cfg.coverage, cfg.base_tests})
        ]
        for style, problems in styled.items():
            texts, _ = _answers(cfg, model, words, problems, cfg.style_samples, f"{name} {style}")
            styles += [
                {"model": name, "task": t, "style": style}
                | _count_style(problem, texts[t], style, _inputs(cfg, cfg.base_tests, t))
                for t, problem in enumerate(problems)
            ]  # fmt: skip
        print(f"{name}: {np.mean([row['correct'] for row in rows]):.3f} of the samples right", flush=True)
    out = Path(cfg.out)
    records.write(out / "records.parquet", pd.concat(frames, ignore_index=True))
    pd.DataFrame(counts).to_csv(out / "counts.csv", index=False)
    pd.DataFrame(styles).to_csv(out / "styles.csv", index=False)


def _answers(
    cfg: DictConfig, model: Any, words: PreTrainedTokenizerFast, tasks: list[Problem], samples: int, stream: str
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Texts [tasks][samples] and their records; each prompt is read once and its cache forked for the samples."""
    from common.generation.steps import StepSampler
    from common.search.core import Budget
    from common.search.sampling import samples as independent
    from common.tasks import exprs

    prompts = words([problem.prompt for problem in tasks])["input_ids"]
    sampler = StepSampler(
        model, prompts, step_tokens=(), end_tokens=[words.convert_tokens_to_ids(exprs.END)],
        max_step_tokens=STEP_TOKENS, max_steps=STEPS, temperature=cfg.temperature, seed=cfg.seed, algorithm=stream,
    )  # fmt: skip
    texts: list[list[str]] = []
    rows = []
    size = max(1, CHUNK_ROWS // samples)
    for start in range(0, len(tasks), size):
        problems = range(start, min(start + size, len(tasks)))
        before = (sampler.ledger.forwards, sampler.ledger.flops, sampler.ledger.seconds)
        pool, _ = independent(problems, sampler.propose, Budget(), n=samples)
        forwards, flops, seconds = (
            (after - b) / (len(problems) * samples)
            for after, b in zip(
                (sampler.ledger.forwards, sampler.ledger.flops, sampler.ledger.seconds), before, strict=True
            )
        )
        for t, states in zip(problems, pool, strict=True):
            texts.append(words.batch_decode([list(state.tokens) for state in states]))
            rows += [
                {
                    "problem_id": t, "sample_id": i, "difficulty": tasks[t].difficulty,
                    "prompt_tokens": len(prompts[t]),
                    "output_tokens": len(state.tokens), "forwards": forwards, "flops": flops, "seconds": seconds,
                    "answer": exprs.result_of(text), "correct": exprs.verify(tasks[t], text),
                }
                for i, (state, text) in enumerate(zip(states, texts[-1], strict=True))
            ]  # fmt: skip
    return texts, rows


def _inputs(cfg: DictConfig, tests: int, task: int) -> np.ndarray | None:
    """The inputs that the limited verifier of a task tries; None is the whole domain."""
    from common.tasks import exprs

    return None if tests >= len(exprs.DOMAIN) else exprs.base_inputs(tests, seed=cfg.seed + task)


def _count(problem: Problem, texts: list[str], inputs: np.ndarray | None) -> dict[str, int]:
    from common.tasks import exprs

    right = [exprs.verify(problem, text) for text in texts]
    accepted = [exprs.passes(problem, text, inputs) for text in texts]
    assert all(a for a, r in zip(accepted, right, strict=True) if r), "the limited tests are part of the full ones"
    return {
        "samples": len(texts),
        "right": sum(right),
        "wrong": sum(a and not r for a, r in zip(accepted, right, strict=True)),
        "distinct": len({exprs.behaviour(text) for text in texts}),
        "majority": int(_majority_is_right(texts, right)),
    }


def _majority_is_right(texts: list[str], right: list[bool]) -> bool:
    """Whether the most frequent behaviour (the first seen of equals) is the right one."""
    from common.tasks import exprs

    names = [exprs.behaviour(text) for text in texts]
    said = [name for name in names if name is not None]
    return bool(said) and right[names.index(max(said, key=said.count))]


def _count_style(problem: Problem, texts: list[str], style: str, inputs: np.ndarray | None) -> dict[str, int]:
    """Accepted answers that add a constant, right and wrong, and how many of each put it where it was asked for."""
    from common.tasks import exprs

    row = {"right": 0, "right_styled": 0, "wrong": 0, "wrong_styled": 0}
    for text in texts:
        stands = exprs.constants_stand(text, style)
        if stands is not None and exprs.passes(problem, text, inputs):
            kind = "right" if exprs.verify(problem, text) else "wrong"
            row[kind] += 1
            row[f"{kind}_styled"] += stands
    return row


def figures(cfg: DictConfig) -> None:
    """Tables t1 to t5, the family beside the reported models, three figures and the verdicts."""
    import pandas as pd

    from common.reporting.report import Report
    from papers.inference_flaws import analysis

    folder = Path(cfg.artifacts) / "infer"
    counts, styles = pd.read_csv(folder / "counts.csv"), pd.read_csv(folder / "styles.csv")
    report = Report(cfg)
    analysis.tables(cfg, report, counts, styles)
    analysis.plots(cfg, report, counts)
    analysis.verdicts(cfg, report, counts, styles)
    report.finish()
