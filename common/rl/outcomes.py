"""What every paper that trains a policy reports: accuracy and tokens of its answers, and one number for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.rl.ground import Ground, ground

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from common.tasks.problem import Problem

BEYOND = 24  # further tokens than in training that a final answer may have


def answers(
    cfg: DictConfig, name: str, seed: int, folder: Path | None, texts: dict[tuple[str, str], list[str]] | None = None
) -> pd.DataFrame:
    """Records of a policy's answers, sampled and greedy, to the problems of `cfg.final`: held-out ones of the task, and
    harder ones (task `longer`) where there are such. folder: of its weights; None is rl.start. texts: gets the answers,
    by (task, 'sampled' or 'greedy')."""
    import pandas as pd

    from common.generation import records

    on, own = ground(cfg, cfg.rl, folder), cfg.final
    policy = on.load()
    tests = {cfg.rl.task.name: on.problems(cfg.seed + 1, "test", own.problems)}
    if on.longer is not None:
        tests["longer"] = on.longer(cfg.seed + 1, own.longer)
    frames = []
    for task, test in tests.items():
        for kind, samples in (("sampled", own.samples), ("greedy", 1)):
            said: list[str] = []
            most = cfg.rl.train.max_new_tokens + BEYOND
            rows = answer_rows(on, policy, test, most, samples, cfg.seed, greedy=kind == "greedy", texts=said)
            head = {"paper": cfg.slug, "profile": cfg.profile, "arm": f"{name} {kind}", "seed": seed, "task": task}
            frames.append(records.frame(rows, **head))
            if texts is not None:
                texts[task, kind] = said
    return pd.concat(frames, ignore_index=True)


def answer_rows(
    on: Ground,
    policy: PreTrainedModel,
    test: Sequence[Problem],
    max_new_tokens: int,
    samples: int,
    seed: int,
    *,
    greedy: bool = False,
    texts: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows for common.generation.records, without the columns that are the same in all: `samples` answers to each
    problem at temperature 1, or greedy ones. texts: the answers are appended to it."""
    from common.generation.random import keys
    from common.generation.sampler import generate

    repeated = [prompt for prompt in on.prompts(test) for _ in range(samples)]
    number = range(len(repeated))
    streams = [int(k) for k in keys(seed, [n // samples for n in number], [n % samples for n in number])]
    out = generate(
        policy, repeated, max_new_tokens, do_sample=not greedy, seed=seed, streams=streams, stop_tokens=on.ends
    )
    said = on.words.batch_decode(out.tokens)
    if texts is not None:
        texts += said
    return [
        {
            "problem_id": n // samples, "sample_id": n % samples, "difficulty": test[n // samples].difficulty,
            "prompt_tokens": len(repeated[n]), "output_tokens": len(out.tokens[n]), "discarded_tokens": 0,
            "forwards": out.ledger.forwards / len(repeated), "flops": out.ledger.flops / len(repeated),
            "seconds": out.ledger.seconds / len(repeated), "answer": on.result(test[n // samples], said[n]),
            "correct": on.verify(test[n // samples], said[n]),
        }
        for n in number
    ]  # fmt: skip


def read(path: Path) -> pd.DataFrame:
    """Records whose arm is '<arm> sampled' or '<arm> greedy', with the two in columns of their own, arm and kind."""
    from common.generation import records

    frame = records.read(path)
    parts = frame["arm"].str.rpartition(" ")
    return frame.assign(arm=parts[0], kind=parts[2])


def outcomes(answers: pd.DataFrame, evaluations: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """One row an arm, seed and task of `read`: accuracy sampled and greedy, length, the arm's way there, and its AES
    against the arm `start`. evaluations, steps: the trainer's records, with columns arm and seed."""
    import pandas as pd

    rows = []
    for (arm, seed, task), of in answers.groupby(["arm", "seed", "task"], sort=False):
        sampled, greedy = (of[of["kind"] == kind] for kind in ("sampled", "greedy"))
        row = {"arm": arm, "seed": seed, "split": task, "n_tasks": sampled["problem_id"].nunique()}
        row |= {"acc_sampled": sampled["correct"].mean(), "acc_greedy": greedy["correct"].mean()}
        row |= {"len_mean": sampled["output_tokens"].mean(), "len_p90": sampled["output_tokens"].quantile(0.9)}
        told, way = (f[(f["arm"] == arm) & (f["seed"] == seed)] for f in (evaluations, steps))
        if len(way):
            last, on_the_way = way.iloc[-1], told.to_dict("records")
            row |= {
                "step": last["step"], "entropy": last["entropy"], "tokens_generated": last["tokens_generated"],
                "tokens_to_95pct_of_best_acc": tokens_to_share(on_the_way), "acc_over_training": area(on_the_way),
            }  # fmt: skip
        rows.append(row)
    table = pd.DataFrame(rows)
    start = table[table["arm"] == "start"].set_index("split")
    scores = [
        aes(r.acc_sampled, r.len_mean, start["acc_sampled"][r.split], start["len_mean"][r.split])
        for r in table.itertuples()
    ]
    return table.assign(AES=scores)


def aes(
    accuracy: float, length: float, reference_accuracy: float, reference_length: float, gamma: float = 5.0
) -> float:
    """Accuracy-efficiency score: relative saving of tokens plus gamma times the relative gain of accuracy; NaN
    against a reference that is always wrong."""
    if not reference_accuracy:
        return float("nan")
    return (reference_length - length) / reference_length + gamma * (accuracy - reference_accuracy) / reference_accuracy


def tokens_to_share(evaluations: Sequence[Mapping[str, float]], share: float = 0.95) -> float:
    """Tokens generated in training until the accuracy first reached so much of its best, interpolated between
    evaluations (those of a `common.rl.trainer.Record`)."""
    tokens = np.array([e["tokens_generated"] for e in evaluations], dtype=float)
    accuracy = np.array([e["accuracy"] for e in evaluations], dtype=float)
    wanted = share * accuracy.max()
    first = int(np.argmax(accuracy >= wanted))
    if first == 0 or accuracy[first] == accuracy[first - 1]:
        return float(tokens[first])
    part = (wanted - accuracy[first - 1]) / (accuracy[first] - accuracy[first - 1])
    return float(tokens[first - 1] + part * (tokens[first] - tokens[first - 1]))


def area(evaluations: Sequence[Mapping[str, float]]) -> float:
    """Mean accuracy along training, over generated tokens (trapezoids)."""
    tokens = np.array([e["tokens_generated"] for e in evaluations], dtype=float)
    accuracy = np.array([e["accuracy"] for e in evaluations], dtype=float)
    return float(np.trapezoid(accuracy, tokens) / (tokens[-1] - tokens[0]))
