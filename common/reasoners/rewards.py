"""The process and outcome reward models of the reasoners, trained on Monte Carlo rollouts (Wang et al. 2023,
Math-Shepherd).

The policy answers training problems. Each answer is a rollout from each of its own prefixes, so that its outcome labels
all of them: one rollout a prefix, but many problems, which teaches more than many rollouts of few. Held-out labels are
success rates over further rollouts. The outcome model sees finished answers alone.

    prm/labels.parquet   task, problem, prompt, answer, text, step, finished, rate: one row a labelled prefix
    prm/{model files}, orm/{model files}, metrics.json (AUROC and calibration by step), calibration.csv
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.reasoners import policies

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

ROWS = 512  # sequences in one batch of rollouts
TASKS = {"chain": "chain_hard", "countdown": "countdown"}  # task -> the kept weights of the base reasoner


def rollout_labels(cfg: DictConfig, split: str, counts: dict[str, int], prefixes: int) -> pd.DataFrame:
    """Labelled prefixes of one answer to each of so many problems of a split, every prefix labelled with the outcome of
    its answer. prefixes: if not 0, only so many of each answer, with the mean over `rollouts` further completions."""
    import pandas as pd

    from common.models.hub import load_model

    frames = []
    for task, kept in TASKS.items():
        if counts[task]:
            model = load_model(Path(cfg.reasoners) / "reasoner_base" / kept)
            hard = "chain_hard" if task == "chain" else "countdown_hard"
            frames.append(_label(cfg, model, policies.problems(cfg, hard, split, counts[task]), task, prefixes))
    return pd.concat(frames, ignore_index=True)


def _label(cfg: DictConfig, model: PreTrainedModel, problems: list, task: str, prefixes: int) -> pd.DataFrame:
    import pandas as pd

    from common.generation.sampler import generate

    words, own = policies.tokenizer(), cfg.rewards
    end = words.convert_tokens_to_ids(policies.ANSWER_END)
    limit, random = policies.LONGEST_ANSWER[task], np.random.default_rng([cfg.seed, len(problems)])
    verify = policies.VERIFY[task]

    def finish(texts: list[str], stream: int) -> list[str]:
        ended = []
        for start in range(0, len(texts), ROWS):
            part = texts[start : start + ROWS]
            out = generate(
                model, words(part)["input_ids"], limit, do_sample=True, temperature=own.temperature, seed=cfg.seed,
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


def fit(cfg: DictConfig, labels: pd.DataFrame, *, outcome: bool = False, name: str = "prm") -> PreTrainedModel:
    """A reward model trained on labelled prefixes (outcome: on finished answers alone)."""
    from common.models.hub import load_model
    from common.models.reward import labelled_batches, reward_model, step_loss
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig, train

    words, own = policies.tokenizer(), cfg.rewards
    used = labels[labels["finished"]] if outcome else labels
    answers: dict[tuple[str, int], tuple[list[int], dict[int, float]]] = {}
    columns = (words(list(used[column]))["input_ids"] for column in ("prompt", "answer", "text"))
    for task, problem, rate, prompt, answer, text in zip(
        used["task"], used["problem"], used["rate"], *columns, strict=True
    ):
        _, labelled = answers.setdefault((task, problem), ([*prompt, *answer], {}))
        labelled[len(prompt) + len(text) - 1] = rate
    rows = [answers[key] for key in sorted(answers)]
    model = reward_model(load_model(Path(cfg.reasoners) / "reasoner_base" / "final", attention="eager"), seed=cfg.seed)
    steps = own.outcome_steps if outcome else own.steps
    config = TrainConfig(
        steps=steps, learning_rate=own.learning_rate, warmup_steps=steps // 10, seed=cfg.seed, weight_decay=0.05
    )
    folder = checkpoint_folder(cfg.checkpoints, name, [policies._plain(own), cfg.seed, labels["rate"].sum()])
    train(model, labelled_batches(rows, min(own.rows, len(rows)), seed=cfg.seed), config, loss=step_loss,
          checkpoints=folder, title=name)  # fmt: skip
    return model


def predict(model: PreTrainedModel, labels: pd.DataFrame) -> np.ndarray:
    """Scores in (0, 1) of labelled prefixes, by reading each of them whole."""
    from common.generation.steps import State
    from common.search.score import RewardModel

    words = policies.tokenizer()
    prompts = words(list(labels["prompt"]))["input_ids"]
    texts = words(list(labels["text"]))["input_ids"]
    states = [State(i, tuple(text), (len(text),)) for i, text in enumerate(texts)]
    score = RewardModel(model, prompts)
    return np.concatenate([score(states[i : i + 512]) for i in range(0, len(states), 512)])


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


def ranking(cfg: DictConfig, model: PreTrainedModel) -> dict[str, float]:
    """By task: of pairs of a right and a wrong answer to one problem, the share that the model puts in the right order.

    AUROC over all answers is flattered by problems that differ in difficulty; a search compares within a problem.
    Several answers of the policy to each of the held-out problems, which the training did not see.
    """
    import pandas as pd

    from common.models.hub import load_model

    shares = {}
    for task, kept in TASKS.items():
        policy = load_model(Path(cfg.reasoners) / "reasoner_base" / kept)
        hard = "chain_hard" if task == "chain" else "countdown_hard"
        problems = policies.problems(cfg, hard, "warmup", cfg.rewards.held_out[task])
        answers = _label(cfg, policy, problems * cfg.rewards.answers, task, 0)
        answers = answers[answers["finished"]]
        frame = pd.DataFrame({"score": predict(model, answers), "right": answers["rate"].to_numpy() > 0.5})
        frame["problem"] = (answers["problem"] % len(problems)).to_numpy()
        ordered = total = 0.0
        for _, group in frame.groupby("problem"):
            right, wrong = group["score"][group["right"]].to_numpy(), group["score"][~group["right"]].to_numpy()
            above = np.sign(right[:, None] - wrong[None, :])
            ordered, total = ordered + float((above + 1).sum()) / 2, total + above.size
        shares[f"{task} auroc within a problem"] = ordered / total if total else float("nan")
    return shares


def train_prm(cfg: DictConfig) -> None:
    """A stage: labels by rollouts, the process model, and its quality on problems of the warm-up split."""
    from common.models.hub import save_model

    own, out = cfg.rewards, Path(cfg.out)
    labels = rollout_labels(cfg, "train", dict(own.problems), 0)
    labels.to_parquet(out / "labels.parquet", index=False)
    model = fit(cfg, labels)
    _finish(cfg, model, out)
    save_model(model, out)


def train_orm(cfg: DictConfig) -> None:
    """A stage: the outcome model, on the finished answers of the process model's labels."""
    import pandas as pd

    from common.models.hub import save_model

    out = Path(cfg.out)
    labels = pd.read_parquet(Path(cfg.reasoners) / "prm" / "labels.parquet")
    model = fit(cfg, labels, outcome=True, name="orm")
    _finish(cfg, model, out)
    save_model(model, out)


def _finish(cfg: DictConfig, model: PreTrainedModel, out: Path) -> None:
    held_out = rollout_labels(cfg, "warmup", dict(cfg.rewards.held_out), cfg.rewards.prefixes)
    metrics, calibration = quality(held_out, predict(model, held_out))
    metrics |= ranking(cfg, model)
    metrics |= {f"{task} needed": cfg.rewards.needed for task in TASKS}
    calibration.to_csv(out / "calibration.csv", index=False)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics), flush=True)
