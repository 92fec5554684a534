"""Cost-of-pass (Erol et al. 2025) for a study: the paper's constants, who wins, votes, literal retries, public records.

The definitions are in common/costs/cost_of_pass.py (v = C / R, the frontier V_p = min over models and a human, gains,
essentialness, releases); this module adds what the paper does with them. Rules are those of the released code
(mhamzaerol/Cost-of-Pass: cost_of_pass/evaluation, cost_of_pass/testtime, analysis/analysis.ipynb).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from common.costs.cost_of_pass import (
    Attempts,
    attempts,
    cost_of_pass,
    essentialness,
    frontier,
    gain,
    half_life,
    split_frontier,
    tracking,
    values,
    vote_success,
    without,
)
from common.metrics.intervals import Measured

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Attempts", "attempts", "break_even", "cost_of_pass", "essentialness", "fresh_windows", "frontier",
    "gain", "half_life", "load_public", "resampled", "retries", "single", "split_frontier", "stored_windows",
    "tracking", "unsolved_at_most", "values", "vote", "vote_success", "winner_shares", "without",
]  # fmt: skip

CLASSES = ("lightweight", "large", "reasoning")
# Task -> class, US dollars that a human expert costs for one problem, problems asked for, metric (analysis.ipynb).
TASKS: dict[str, tuple[str, float, str, str]] = {
    "TwoDigitAddition": ("basic quantitative", 0.02, "128", "math match"),
    "GSM8K": ("basic quantitative", 3.5, "128", "math match"),
    "BBQ": ("knowledge", 0.1, "128", "multiple choice"),
    "GPQA_Diamond": ("knowledge", 58.0, "128", "multiple choice"),
    "MATH500": ("complex quantitative", 12.0, "128", "math match"),
    "AIME_2024": ("complex quantitative", 20.0, "128 (only 30 exist)", "math match"),
}
# Model, class, date that orders the releases (analysis.ipynb; o1's is not that of its name). A stable sort keeps the
# order of the list within a day.
MODELS: list[tuple[str, str, str]] = [
    ("Llama-3.1-8B", "lightweight", "2024-07-23"),
    ("gpt-4o-mini-2024-07-18", "lightweight", "2024-07-18"),
    ("Llama-3.3-70B", "lightweight", "2024-12-06"),
    ("Llama-3.1-405B", "large", "2024-07-23"),
    ("claude-3-5-sonnet-20240620", "large", "2024-06-20"),
    ("gpt-4o-2024-05-13", "large", "2024-05-13"),
    ("o1-mini-2024-09-12", "reasoning", "2024-09-12"),
    ("o1-2024-12-17", "reasoning", "2024-12-05"),
    ("DeepSeek-R1", "reasoning", "2025-01-20"),
    ("o3-mini-2025-01-31", "reasoning", "2025-01-31"),
]
DEEPSEEK_R1 = (3e-6, 7e-6)  # US dollars per prompt and output token (cost_of_pass/models/cost_data/litellm.json)


def break_even(cost: ArrayLike, human: float) -> np.ndarray:
    """The accuracy at which attempts of this cost are worth a human's: R = C / h, from C / R = h; above 1, never.

    Raises ValueError for a negative cost or a human cost that is not positive.
    """
    c = np.asarray(cost, dtype=float)
    if (c < 0).any() or not human > 0:
        raise ValueError(f"needs costs of at least 0 and a positive human cost, not {c.min()} and {human}")
    return c / human


def unsolved_at_most(value: float, human: float) -> float:
    """From a published V({m} and the human): at most this share of the problems was never solved by m.

    Each of those costs the human's price, so that their share is at most V / h. Raises ValueError for V outside [0, h].
    """
    if not 0 <= value <= human:
        raise ValueError(f"a frontier with the human lies in 0..{human}, not at {value}")
    return value / human


def single(data: Attempts, human: float, prior: float = 0.0) -> np.ndarray:
    """Cost-of-pass of each model alone with the human, by problem: [models, problems]; V({m} and human) is its mean.

    prior: pseudo-counts of both outcomes, see `values`.
    """
    return np.minimum(values(data, prior), human)


def winner_shares(
    data: Attempts,
    classes: Mapping[str, Sequence[str]],
    human: float,
    resamples: int,
    seed: int = 0,
    prior: float = 0.0,
) -> dict[str, float]:
    """Class -> share of bootstrap samples, over problems and over the runs of each, whose cheapest model is of it.

    The cheapest is the arg-min of V({m} and human); the first of equals. Raises KeyError for a model that is not there.
    """
    owner = {data.index(model): name for name, models in classes.items() for model in models}
    random = np.random.default_rng([seed, 0xC057])
    won = dict.fromkeys(classes, 0)
    for _ in range(resamples):
        problems = random.integers(0, len(data.problems), len(data.problems))
        runs = random.integers(0, data.correct.shape[-1], (len(problems), data.correct.shape[-1]))
        correct, usd = (x[:, problems[:, None], runs] for x in (data.correct, data.usd))
        drawn = Attempts(data.models, list(range(len(problems))), correct, usd)
        won[owner[int(single(drawn, human, prior).mean(1).argmin())]] += 1
    return {name: count / resamples for name, count in won.items()}


def stored_windows(runs: int, k: int) -> np.ndarray:
    """Which runs vote together, [runs, k], when votes are taken from stored runs: j, j+1, ..., around the end."""
    if not 1 <= k <= runs:
        raise ValueError(f"a vote of {k} needs as many runs, not {runs}")
    return (np.arange(runs)[:, None] + np.arange(k)) % runs


def fresh_windows(runs: int, k: int, votes: int) -> np.ndarray:
    """Which runs vote together, [votes, k], when no run votes twice. Raises ValueError for too few runs."""
    if k < 1 or votes * k > runs:
        raise ValueError(f"{votes} votes of {k} need {votes * k} runs, not {runs}")
    return np.arange(votes * k).reshape(votes, k)


def vote(answers: np.ndarray, correct: np.ndarray, usd: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Majority votes: (correct, usd), both [problems, votes]. The first seen of equals wins; a null does not vote.

    answers [problems, runs]: text or None. correct, usd [problems, runs]. windows [votes, k]. A vote costs the sum of
    its runs, and is wrong if no run answered.
    """
    codes = np.full(answers.shape, -1)
    for row, given in zip(codes, answers, strict=True):
        seen: dict[str, int] = {}
        row[:] = [-1 if not isinstance(a, str) else seen.setdefault(a, len(seen)) for a in given]
    cast = codes[:, windows]  # [problems, votes, k]
    counts = (cast[..., :, None] == cast[..., None, :]).sum(-1) * (cast >= 0)
    winner = counts.argmax(-1)[..., None]  # the first place of the largest count: that answer was seen first
    right = np.take_along_axis(correct[:, windows], winner, -1)[..., 0] * (counts.max(-1) > 0)
    return right, usd[:, windows].sum(-1)


def resampled(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    statistic: Callable[[list[tuple[np.ndarray, np.ndarray]]], float],
    seed: int = 0,
    resamples: int = 2000,
) -> Measured:
    """A statistic over several tasks with a 95% percentile interval; the problems of each task are resampled by
    themselves, the two arrays of a task (rows: problems) together."""
    random = np.random.default_rng([seed, 0x7A5C])
    found = np.empty(resamples)
    for i in range(resamples):
        drawn = [random.integers(0, len(a), len(a)) for a, _ in pairs]
        found[i] = statistic([(a[d], b[d]) for (a, b), d in zip(pairs, drawn, strict=True)])
    low, high = np.quantile(found, [0.025, 0.975])
    return Measured(statistic(list(pairs)), float(low), float(high), sum(len(a) for a, _ in pairs))


def retries(correct: np.ndarray, usd: np.ndarray, times: int, random: np.random.Generator) -> float:
    """Mean money spent until the first success over `times` literal series of retries. correct, usd: [runs].

    Each retry is one of the runs, drawn at random, with its own cost. Raises ValueError if no run succeeded.
    """
    if not np.any(correct):
        raise ValueError("no run succeeded: retries would never end")
    open_, spent = times, 0.0
    while open_:
        drawn = random.integers(0, len(correct), open_)
        spent += float(usd[drawn].sum())
        open_ -= int(np.count_nonzero(correct[drawn]))
    return spent / times


# --- the released records of API calls

PUBLIC = [
    "model_name", "task_name", "tt_method_name", "input_idx", "num_prompt_tokens", "num_completion_tokens",
    "cost_per_prompt_token", "cost_per_completion_token", "completed", "metric_name", "metric_score", "answer",
]  # fmt: skip


def load_public(folder: str | Path, technique: str | None = None, ignore_bad: bool = False) -> pd.DataFrame:
    """Records in the released format (evaluation/recording.py: MetricRecord), in the schema of our generation records
    with a column usd: dollars of all calls of a run, tokens times prices.

    folder: holds <task>/<model>/<technique>/<metric>_records/dataset.parquet, one row a run. An arm is the model's
    name, and with a technique other than VanillaPromptMethod 'model, technique'. technique: that one alone.
    ignore_bad: leaves out runs that were not completed, which is an error otherwise, as in the released code.
    Raises FileNotFoundError where there are no records, ValueError for missing columns, negative prices, scores other
    than 0 and 1, and for runs that were not completed.
    """
    import pandas as pd

    files = sorted(Path(folder).rglob("*_records/dataset.parquet"))
    frames = [(file, pd.read_parquet(file)) for file in files if file.parent.name != "full_records"]
    if not frames:
        raise FileNotFoundError(f"{folder} holds no <metric>_records/dataset.parquet")
    for file, frame in frames:
        if absent := sorted(set(PUBLIC) - set(frame.columns)):
            raise ValueError(f"{file} lacks the columns {', '.join(absent)}")
    table = pd.concat([frame[PUBLIC] for _, frame in frames], ignore_index=True)
    if technique is not None:
        table = table[table["tt_method_name"] == technique]
        if table.empty:
            raise ValueError(f"no records of technique {technique!r} in {folder}")
    bad = ~table["completed"].astype(bool)
    if bad.any() and not ignore_bad:
        first = table[bad].iloc[0]
        raise ValueError(
            f"{int(bad.sum())} runs were not completed, the first of {first['model_name']} on {first['task_name']} "
            f"{first['input_idx']}; ignore_bad=True leaves them out"
        )
    return _in_our_schema(table[~bad])


def _in_our_schema(table: pd.DataFrame) -> pd.DataFrame:
    from common.generation import records

    prices = table[["cost_per_prompt_token", "cost_per_completion_token"]]
    if (prices < 0).any(axis=None):
        raise ValueError(f"a price cannot be negative: {prices.min(axis=None)}")
    if not table["metric_score"].isin([0, 1]).all():
        raise ValueError(f"a score must be 0 or 1, not {table.loc[~table['metric_score'].isin([0, 1])].iloc[0, -2]}")
    plain = table["tt_method_name"] == "VanillaPromptMethod"
    arm = table["model_name"].where(plain, table["model_name"] + ", " + table["tt_method_name"])
    runs = table.assign(arm=arm).groupby(["arm", "task_name", "input_idx"]).cumcount()
    rows = {
        "arm": arm, "task": table["task_name"], "problem_id": table["input_idx"], "sample_id": runs,
        "prompt_tokens": table["num_prompt_tokens"], "output_tokens": table["num_completion_tokens"],
        "answer": table["answer"], "correct": table["metric_score"] == 1, "score": table["metric_score"],
    }  # fmt: skip
    unknown = {"difficulty": 0, "discarded_tokens": 0, "forwards": np.nan, "flops": np.nan, "seconds": np.nan}
    frame = records.frame(
        table.assign(**rows)[list(rows)].to_dict("records"), paper="cost_of_pass", profile="paper", seed=0, **unknown
    )
    usd = prices["cost_per_prompt_token"] * table["num_prompt_tokens"]
    usd += prices["cost_per_completion_token"] * table["num_completion_tokens"]
    return frame.assign(usd=usd.to_numpy())
