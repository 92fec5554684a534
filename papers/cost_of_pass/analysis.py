"""From records and calls to dollars, and the tables. A found study knows the attempts of every task at every price."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.costs import cost_of_pass as cop
from common.costs import idealized_runtime as clock
from common.costs.cost_of_pass import Attempts
from common.metrics.intervals import Measured
from papers.cost_of_pass import method
from papers.cost_of_pass.method import CLASSES

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig


PRICES = ("parameters", "flat", "measured")  # the first is the one that claims are judged by
RUN = ["arm", "task", "problem_id", "sample_id"]
MICRO = 1e6  # tables are in millionths of a US dollar


@dataclass(frozen=True, eq=False)
class Found:
    """runs: records with a column of dollars for each price. judge: dollars of the reward model's calls, by run of the
    arm that it judges. releases: the zoo's entries, in the order of cfg.zoo."""

    cfg: DictConfig
    runs: pd.DataFrame
    judge: pd.DataFrame
    releases: pd.DataFrame
    guesses: pd.DataFrame
    sizes: dict[str, int]

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.cfg.tasks]

    def task(self, name: str) -> DictConfig:
        return next(task for task in self.cfg.tasks if task.name == name)

    def human(self, task: str) -> float:
        return float(self.task(task).human_usd)

    def of_class(self, name: str) -> list[str]:
        """The tasks of a class."""
        return [task.name for task in self.cfg.tasks if task["class"] == name]

    @functools.cache  # noqa: B019 (one study a process)
    def attempts(self, task: str, price: str = PRICES[0], fresh: bool = False) -> Attempts:
        """Of every release and of its refined answers; or, fresh, of the further runs that votes are taken from."""
        of = self.runs[(self.runs["task"] == task) & (self.runs["arm"].str.endswith(", fresh") == fresh)]
        return cop.attempts(of, of[price].to_numpy())

    def frontier(self, task: str, price: str = PRICES[0]) -> Attempts:
        """Of the models of the frontier that are asked this task."""
        data = self.attempts(task, price)
        return data.of([name for name in self.releases.loc[self.releases["frontier"], "name"] if name in data.models])

    def classes(self, task: str) -> dict[str, list[str]]:
        """Class -> its models of the frontier that are asked this task; classes without one are left out."""
        asked = self.frontier(task).models
        own = self.releases[self.releases["name"].isin(asked)]
        found = {name: own.loc[own["class"] == name, "name"].tolist() for name in CLASSES}
        return {name: models for name, models in found.items() if models}

    def direct(self, task: str) -> list[str]:
        """The models that do not reason: the base of the techniques."""
        return [m for name, models in self.classes(task).items() if name != "reasoning" for m in models]


def load(cfg: DictConfig) -> Found:
    """Reads what `infer` wrote and puts the three prices on every call."""
    import pandas as pd

    from common.generation import records

    folder = Path(cfg.artifacts) / "infer"
    sizes = json.loads((folder / "sizes.json").read_text())
    releases = pd.read_csv(folder / "releases.csv")
    calls = priced(
        cfg, pd.read_parquet(folder / "calls.parquet"), dict(zip(releases["name"], releases["of"], strict=True)), sizes,
        clock.load(folder / "profiles.json"),
    )  # fmt: skip
    usd = calls.groupby(RUN)[list(PRICES)].sum()
    runs = records.read(folder / "records.parquet").join(usd, on=RUN)
    judge = usd[usd.index.get_level_values("arm").str.endswith(", judge")]
    return Found(cfg, runs, judge, releases, pd.read_csv(folder / "guesses.csv"), sizes)


def priced(
    cfg: DictConfig, calls: pd.DataFrame, of: dict[str, str], sizes: dict[str, int], profiles: dict[str, clock.Profile]
) -> pd.DataFrame:
    """Calls with a column of US dollars for each of PRICES. of: release -> the model whose size and clock it has."""
    own, share = cfg.prices, cfg.prices.prompt_share
    kinds = calls["model"].map(lambda name: of.get(name, name))
    tokens = share * calls["prompt_tokens"] + calls["output_tokens"]
    measured = np.empty(len(calls))
    for name in kinds.unique():
        mine = (kinds == name).to_numpy()
        seconds = profiles[name].seconds(calls.loc[mine, "prompt_tokens"], calls.loc[mine, "output_tokens"])
        measured[mine] = clock.dollars(seconds, own.usd_per_hour)
    return calls.assign(
        parameters=tokens * kinds.map(sizes) * own.usd_per_parameter, flat=tokens * own.usd_per_token, measured=measured
    )


# --- techniques


def techniques(cfg: DictConfig) -> list[str]:
    """Their names, in the order of the tables."""
    votes = [f"vote of {k}, {mode}" for mode in ("stored", "fresh") for k in cfg.votes]
    return ["self-refine", *votes, f"best of {cfg.judge.best_of}"]


def technique(found: Found, task: str, name: str, price: str = PRICES[0]) -> tuple[Attempts, Attempts] | None:
    """(without, with) a technique: the base models, and the same with an arm each more. None: not run on this task.

    name: 'vote of k, stored', 'vote of k, fresh', 'self-refine' (base: the models that do not reason) or 'best of k'
    (base: the model that the reward model judges).
    """
    if name.startswith("best of"):
        return _best_of(found, task, int(name.split()[-1]), price)
    data = found.attempts(task, price)
    base = data.of(found.direct(task))
    if name == "self-refine":
        refined = [f"{model}, self-refine" for model in base.models]
        return (base, data.of([*base.models, *refined])) if set(refined) <= set(data.models) else None
    text, _, mode = name.partition(", ")
    return _votes(found, task, base, int(text.split()[-1]), mode, price)


def _votes(found: Found, task: str, base: Attempts, k: int, mode: str, price: str) -> tuple[Attempts, Attempts] | None:
    runs, fresh = base.correct.shape[-1], mode == "fresh"
    arms = [f"{model}, fresh" for model in base.models] if fresh else base.models
    if not set(arms) <= set(found.runs.loc[found.runs["task"] == task, "arm"]):
        return None
    source = found.attempts(task, price, fresh).of(arms)
    drawn = source.correct.shape[-1]
    windows = method.fresh_windows(drawn, k, runs) if fresh else method.stored_windows(drawn, k)
    votes = [
        method.vote(answers(found, task, arm), source.correct[i], source.usd[i], windows) for i, arm in enumerate(arms)
    ]
    return base, _joined(base, [f"{model}, vote" for model in base.models], votes)


def answers(found: Found, task: str, arm: str) -> np.ndarray:
    """Canonical answers [problems, runs] of an arm; what is no text is none."""
    of = found.runs[(found.runs["task"] == task) & (found.runs["arm"] == arm)].sort_values(["problem_id", "sample_id"])
    return of["answer"].to_numpy(dtype=object).reshape(of["problem_id"].nunique(), -1)


def _best_of(found: Found, task: str, k: int, price: str) -> tuple[Attempts, Attempts] | None:
    own = found.cfg.judge
    if task != own.task:
        return None
    base = found.attempts(task, price).of([own.of])
    at = (found.runs["task"] == task) & (found.runs["arm"] == own.of)
    scores = found.runs[at].sort_values(["problem_id", "sample_id"])["score"].to_numpy().reshape(base.correct.shape[1:])
    reading = found.judge.xs(task, level="task")[price].to_numpy().reshape(scores.shape)
    windows = method.stored_windows(scores.shape[-1], k)
    best = scores[:, windows].argmax(-1)[..., None]
    right = np.take_along_axis(base.correct[0][:, windows], best, -1)[..., 0]
    paid = (base.usd[0] + reading)[:, windows].sum(-1)
    return base, _joined(base, [f"{own.of}, best of {k}"], [(right, paid)])


def _joined(base: Attempts, names: list[str], more: list[tuple[np.ndarray, ...]]) -> Attempts:
    correct = np.concatenate([base.correct, np.stack([right for right, _ in more])])
    usd = np.concatenate([base.usd, np.stack([paid for _, paid in more])])
    return Attempts([*base.models, *names], base.problems, correct, usd)


@functools.cache
def gains(found: Found, task: str, name: str) -> tuple[np.ndarray, ...] | None:
    """(V_p without, with, split-sample without, with) a technique, each [problems]; None if it was not run."""
    pair = technique(found, task, name)
    if pair is None:
        return None
    human = found.human(task)
    return tuple(cop.frontier(cop.values(of), human) for of in pair) + tuple(
        cop.split_frontier(of, human) for of in pair
    )


@functools.cache
def gain_intervals(found: Found, task: str, name: str) -> tuple[Measured, Measured] | None:
    """The gain of a technique by the paper's estimator and by the split sample; None if it was not run."""
    of = gains(found, task, name)
    return None if of is None else (cop.gain_interval(of[0], of[1]), cop.gain_interval(of[2], of[3]))


def frontiers(found: Found, task: str) -> np.ndarray:
    """V_p of all models, and without each of CLASSES: [problems, 1 + classes]; without an absent class, all."""
    data, human, kinds = found.frontier(task), found.human(task), found.classes(task)
    sets = [data, *(cop.without(data, kinds.get(name, [])) for name in CLASSES)]
    return np.stack([cop.frontier(cop.values(of), human) for of in sets], axis=1)


def release_rows(found: Found) -> Iterator[dict[str, Any]]:
    """The frontier of every task as releases appear, in the order of the compute that trained them."""
    order = found.releases.sort_values("training_flops", kind="stable")
    spent = dict(zip(order["name"], order["training_flops"], strict=True))
    for task in found.tasks:
        data, human = found.attempts(task), found.human(task)
        names = [name for name in order["name"] if name in data.models]
        for row in cop.tracking(data, names, human).to_dict("records"):
            yield {"task": task, "release": row["model"], "training_flops": spent.get(row["model"], 0.0),
                   "cost_of_pass": MICRO * row["value"], "share_of_human": row["value"] / human,
                   "gain": row["gain"]}  # fmt: skip
