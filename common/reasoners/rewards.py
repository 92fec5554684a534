"""The process and outcome reward models of the reasoners, trained on Monte Carlo rollouts (Wang et al. 2023,
Math-Shepherd).

The policy answers training problems. Each answer is a rollout from each of its own prefixes, so that its outcome labels
all of them: one rollout a prefix, but many problems, which teaches more than many rollouts of few. Held-out labels are
success rates over further rollouts. The outcome model sees finished answers alone. Each task has its own model: in one
for both, the many steps of chains, whose labels say little, keep it from learning countdown.

    prm/labels.parquet   task, problem, prompt, answer, text, step, finished, rate: one row a labelled prefix
    prm/held_out.parquet, prm/answers.parquet: labelled prefixes and several answers a problem, on the warm-up split
    prm/<task>/{model files}, orm/<task>/{model files}
    prm/ and orm/: metrics.json (AUROC by step, ranking within a problem), calibration.csv
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.metrics.intervals import paired_bootstrap, ratio_of_sums
from common.reasoners import policies

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from common.tasks.problem import Problem
    from common.training.data import Batches

ROWS = 512  # sequences in one batch of rollouts
TASKS = {"chain": "chain_hard", "countdown": "countdown"}  # task -> the kept weights of the base reasoner


def rollout_labels(cfg: DictConfig, split: str, counts: dict[str, int], prefixes: int) -> pd.DataFrame:
    """Labelled prefixes of one answer to each of so many problems of a split, every prefix labelled with the outcome of
    its answer. prefixes: if not 0, only so many of each answer, with the mean over `rollouts` further completions."""
    import pandas as pd

    frames = [
        _label(cfg, policies.problems(cfg, f"{task}_hard", split, counts[task]), task, prefixes)
        for task in TASKS if counts[task]
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _label(cfg: DictConfig, problems: list[Problem], task: str, prefixes: int) -> pd.DataFrame:
    import pandas as pd

    from common.generation.vllm import backend
    from common.models.tokenizer import encode as encoded

    generate = backend(cfg.backend, Path(cfg.reasoners) / "reasoner_base" / TASKS[task], device=cfg.device)
    words, own = policies.tokenizer(), cfg.rewards
    end = words.convert_tokens_to_ids(policies.ANSWER_END)
    limit, random = policies.LONGEST_ANSWER[task], np.random.default_rng([cfg.seed, len(problems)])
    verify = policies.VERIFY[task]

    def finish(texts: list[str], stream: int) -> list[str]:
        ended = []
        for start in range(0, len(texts), ROWS):
            part = texts[start : start + ROWS]
            out = generate(
                encoded(words, part), limit, do_sample=True, temperature=own.temperature, seed=cfg.seed,
                stop_tokens=[end], streams=range(stream + start, stream + start + len(part)),
            )  # fmt: skip
            ended += words.batch_decode(out.tokens)
        return ended

    answers = finish([p.prompt for p in problems], 0)
    rows, open_rows = [], []
    for index, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        ends = [i + 1 for i, character in enumerate(answer[:-1]) if character in policies.STEP_ENDS] + [len(answer)]
        row = {
            "task": task, "problem": index, "prompt": problem.prompt, "answer": answer,
            "rate": float(verify(problem, answer)),
        }  # fmt: skip
        inner = [row | {"text": answer[:end], "step": i + 1, "finished": False} for i, end in enumerate(ends[:-1])]
        rows.append(row | {"text": answer, "step": len(ends), "finished": True})
        if prefixes:
            open_rows += [inner[i] for i in sorted(random.permutation(len(inner))[:prefixes])]
        else:
            rows += inner
    texts = [row["prompt"] + row["text"] for row in open_rows for _ in range(own.rollouts)]
    ended = finish(texts, len(problems))
    for i, row in enumerate(open_rows):
        mine = ended[i * own.rollouts : (i + 1) * own.rollouts]
        row["rate"] = float(np.mean([verify(problems[row["problem"]], row["text"] + rest) for rest in mine]))
    return pd.DataFrame(rows + open_rows).sort_values(["problem", "step"], ignore_index=True)


def encode(labels: pd.DataFrame) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Token ids of each answer with its prompt; of each labelled prefix its answer and the place of its last token, two
    times int64 [prefixes]."""
    from common.models.tokenizer import encode as encoded

    words = policies.tokenizer()
    ends = [words.convert_tokens_to_ids(end) for end in policies.STEP_ENDS]
    groups = labels.groupby(["task", "problem"], sort=True)
    answers = groups[["prompt", "answer"]].first()
    prompts, texts = (encoded(words, answers[column]) for column in ("prompt", "answer"))
    ids = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    row = groups.ngroup().to_numpy()
    places = [
        [*(len(prompt) + np.flatnonzero(np.isin(text[:-1], ends))), len(prompt) + len(text) - 1]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    place = np.array([places[r][step - 1] for r, step in zip(row, labels["step"], strict=True)])
    return ids, row, place


def fit(cfg: DictConfig, labels: pd.DataFrame, steps: int, name: str) -> PreTrainedModel:
    """A reward model trained on labelled prefixes. name: of its checkpoints."""
    from common.models.hub import load_model
    from common.models.reward import reward_model, step_loss
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig, train

    own = cfg.rewards
    ids, row, place = encode(labels)
    rates: list[dict[int, float]] = [{} for _ in ids]
    for r, at, rate in zip(row.tolist(), place.tolist(), labels["rate"], strict=True):
        rates[r][at] = rate
    rows = list(zip(ids, rates, strict=True))
    policy = load_model(Path(cfg.reasoners) / "reasoner_base" / "final", attention="eager").to(cfg.device)
    model = reward_model(policy, seed=cfg.seed)
    config = TrainConfig(
        steps=steps, learning_rate=own.learning_rate, warmup_steps=steps // 10, seed=cfg.seed, weight_decay=0.05,
        shards=own.shards,
    )  # fmt: skip
    folder = checkpoint_folder(cfg.checkpoints, name, [policies._plain(own), cfg.seed, labels["rate"].sum()])
    train(model, _balanced(cfg, rows, round(own.balanced * steps)), config, loss=step_loss, checkpoints=folder,
          title=name)  # fmt: skip
    return model


def _balanced(cfg: DictConfig, rows: list[tuple[list[int], dict[int, float]]], until: int) -> Batches:
    """step -> batches: before step `until` as many answers that end right as others, then answers as they were drawn.

    Right answers are few, and what sets them apart is learned far sooner where they are half; the last steps bring the
    scores back to success rates.
    """
    from common.models.reward import labelled_batches

    def source(some: list[tuple[list[int], dict[int, float]]], size: int) -> Batches:
        return labelled_batches(some, min(size, len(some)), seed=cfg.seed)

    half = cfg.rewards.rows // 2
    right, wrong = ([r for r in rows if (r[1][max(r[1])] > 0.5) == is_right] for is_right in (True, False))
    drawn = source(rows, cfg.rewards.rows)
    if not right or not wrong:
        return drawn
    first, second = source(right, half), source(wrong, half)
    return lambda step: [*first(step), *second(step)] if step < until else drawn(step)


def predict(model: PreTrainedModel, labels: pd.DataFrame) -> np.ndarray:
    """Scores in (0, 1) of labelled prefixes, float64 [prefixes]; each answer is read once."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, row, place = encode(labels)
    scores = np.empty(len(labels))
    by_length = np.argsort([len(answer) for answer in ids], kind="stable")
    for start in range(0, len(ids), ROWS):
        batch = by_length[start : start + ROWS]
        inside = np.flatnonzero(np.isin(row, batch))
        where = np.empty(len(ids), dtype=int)
        where[batch] = np.arange(len(batch))
        padded = pad_sequence([torch.tensor(ids[i]) for i in batch], batch_first=True).to(model.device)
        with torch.inference_mode():
            hidden = model.base_model(padded, use_cache=False).last_hidden_state
            logits = model.score(hidden[where[row[inside]], place[inside]])[:, 0]
        scores[inside] = logits.double().sigmoid().cpu().numpy()
    return scores


def quality(labels: pd.DataFrame, scores: np.ndarray, bins: int = 10) -> tuple[dict[str, float], pd.DataFrame]:
    """AUROC by task and step (rate >= 1/2 against below), Brier score, and the calibration table."""
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    frame = labels.assign(score=scores, good=labels["rate"] >= 0.5)
    metrics: dict[str, float] = {}
    for task, group in frame.groupby("task"):
        metrics[f"{task} brier"] = float(np.mean((group["score"] - group["rate"]) ** 2))
        if group["good"].nunique() == 2:  # else there is nothing to tell apart
            metrics[f"{task} auroc"] = float(roc_auc_score(group["good"], group["score"]))
        for step, part in group.groupby("step"):
            if part["good"].nunique() == 2 and len(part) >= 30:
                metrics[f"{task} auroc, step {step}"] = float(roc_auc_score(part["good"], part["score"]))
    edges = np.minimum((frame["score"] * bins).astype(int), bins - 1)
    table = frame.groupby(["task", edges.rename("bin")]).agg(
        score=("score", "mean"), rate=("rate", "mean"), prefixes=("rate", "size")
    )
    return metrics, pd.DataFrame(table).reset_index()


def several_answers(cfg: DictConfig) -> pd.DataFrame:
    """Finished answers of the policy to the held-out problems, several to each; `of` is the problem."""
    import pandas as pd

    frames = []
    for task in TASKS:
        problems = policies.problems(cfg, f"{task}_hard", "warmup", cfg.rewards.held_out[task])
        answers = _label(cfg, problems * cfg.rewards.answers, task, 0)
        frames.append(answers.assign(of=answers["problem"] % len(problems)))
    found = pd.concat(frames, ignore_index=True)
    return found[found["finished"]].reset_index(drop=True)


def ranking(answers: pd.DataFrame, scores: np.ndarray) -> dict[str, float]:
    """By task: of pairs of a right and a wrong answer to one problem, the share that the scores put in the right order,
    and the lower end of its 95% interval over problems (NaN with fewer than two of these).

    AUROC over all answers is flattered by problems that differ in difficulty; a search compares within a problem.
    """
    metrics = {}
    for task, of in answers.assign(score=scores).groupby("task"):
        ordered, pairs = pairs_in_order(of["of"], of["rate"] > 0.5, of["score"])
        metrics[f"{task} auroc within a problem"] = _share(ordered, pairs)
        several = len(pairs) > 1
        metrics[f"{task} auroc within a problem, low"] = (
            paired_bootstrap(ordered, pairs, ratio_of_sums).low if several else float("nan")
        )
    return metrics


def auroc_within(problems: ArrayLike, right: ArrayLike, scores: ArrayLike) -> float:
    """Of all pairs of a right and a wrong answer to one problem, the share in which the right one has the higher score;
    ties count half. NaN without such a pair. All [answers]."""
    return _share(*pairs_in_order(problems, right, scores))


def _share(ordered: np.ndarray, pairs: np.ndarray) -> float:
    return ratio_of_sums(ordered, pairs) if len(pairs) else float("nan")


def pairs_in_order(problems: ArrayLike, right: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Of each problem with right and wrong answers: pairs of the two that the scores put in the right order (a tie is
    half a pair), and all pairs; both float64 [such problems]."""
    of, good, score = np.asarray(problems), np.asarray(right, dtype=bool), np.asarray(scores, dtype=float)
    ordered, pairs = [], []
    for problem in np.unique(of):
        mine = of == problem
        above = np.sign(score[mine & good][:, None] - score[mine & ~good][None, :])
        if above.size:
            ordered.append(float((above + 1).sum()) / 2)
            pairs.append(float(above.size))
    return np.array(ordered), np.array(pairs)


def train_prm(cfg: DictConfig) -> None:
    """A stage: labels by rollouts, the process models, and their quality on problems of the warm-up split."""
    own, out = cfg.rewards, Path(cfg.out)
    labels = rollout_labels(cfg, "train", dict(own.problems), 0)
    labels.to_parquet(out / "labels.parquet", index=False)
    rollout_labels(cfg, "warmup", dict(own.held_out), own.prefixes).to_parquet(out / "held_out.parquet", index=False)
    several_answers(cfg).to_parquet(out / "answers.parquet", index=False)
    _train(cfg, labels, own.steps, out)


def train_orm(cfg: DictConfig) -> None:
    """A stage: the outcome models, on the finished answers of the process models' labels."""
    import pandas as pd

    prm = Path(cfg.reasoners) / "prm"
    labels = pd.read_parquet(prm / "labels.parquet")
    _train(cfg, labels[labels["finished"]], cfg.rewards.outcome_steps, prm)


def _train(cfg: DictConfig, labels: pd.DataFrame, steps: DictConfig, held_out: Path) -> None:
    """Writes a model a task, and metrics.json and calibration.csv, measured on the held-out answers of a folder."""
    import pandas as pd

    from common.models.hub import save_model

    out = Path(cfg.out)
    tests = [pd.read_parquet(held_out / f"{name}.parquet") for name in ("held_out", "answers")]
    scores = [np.empty(len(test)) for test in tests]
    for task in TASKS:
        model = fit(cfg, labels[labels["task"] == task], steps[task], f"{cfg.stage} {task}")
        save_model(model, out / task)
        for test, score in zip(tests, scores, strict=True):
            own = (test["task"] == task).to_numpy()
            score[own] = predict(model, test[own])
    metrics, calibration = quality(tests[0], scores[0])
    metrics |= ranking(tests[1], scores[1])
    metrics |= {f"{task} needed": cfg.rewards.needed for task in TASKS}
    calibration.to_csv(out / "calibration.csv", index=False)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics), flush=True)
