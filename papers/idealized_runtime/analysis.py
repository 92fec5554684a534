"""What data and infer wrote, and the quantities that tables, figures and verdicts ask of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.costs import idealized_runtime as ir
from common.generation import records
from common.metrics.intervals import Measured
from papers.idealized_runtime import published
from papers.idealized_runtime.method import Profile, Shape, pareto_front
from papers.idealized_runtime.own import medians
from papers.idealized_runtime.published import RUNS

if TYPE_CHECKING:
    from omegaconf import DictConfig


Frame = pd.DataFrame
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class Found:
    """Everything that was read. None: the released file, or the part of the profile, was not there."""

    constants: dict[str, Profile]
    apis: dict[str, Profile]
    a100: dict[str, ir.Fit] | None
    v100: dict[str, ir.Fit] | None
    cells: Frame | None
    scenarios: Frame | None
    calls: Frame | None
    absent: str | None  # why what rests on the released files cannot be judged
    rounds: Frame
    stacks: Frame
    layers: Frame
    profiles: dict[str, Profile]
    shapes: dict[str, Shape]  # of the own models
    asked: Frame | None  # synthetic calls of part C
    records: Frame | None

    def cells_of(self, model: str, clock: str) -> Frame:
        return medians(self.rounds[self.rounds["model"] == model], clock)


def load(cfg: DictConfig) -> Found:
    """The files of the stages data and infer."""
    data, infer = Path(cfg.artifacts) / "data", Path(cfg.artifacts) / "infer"

    def csv(name: str) -> Frame | None:
        return pd.read_csv(data / f"{name}.csv") if (data / f"{name}.csv").exists() else None

    def parquet(name: str) -> Frame | None:
        return pd.read_parquet(infer / f"{name}.parquet") if (infer / f"{name}.parquet").exists() else None

    cells, rounds = csv("cells"), pd.read_parquet(infer / "rounds.parquet")
    models = rounds.drop_duplicates("model").set_index("model")
    shapes = {
        str(name): Shape(int(row["layers"]), int(row["hidden"]), cfg.vocabulary, 1, BYTES[cfg.dtype])
        for name, row in models.iterrows()
    }
    has_records = (infer / "records.parquet").exists()
    return Found(
        constants=ir.load(data / published.HELM["idealized"]),
        apis=ir.load(data / published.HELM["denoised"]),
        a100=None if cells is None else published.fits(cells, "a100"),
        v100=None if cells is None else published.fits(cells, "v100"),
        cells=cells,
        scenarios=csv("scenarios"),
        calls=csv("calls"),
        absent=_absent(json.loads((data / "sources.json").read_text())),
        rounds=rounds,
        stacks=pd.read_parquet(infer / "stacks.parquet"),
        layers=pd.read_parquet(infer / "layers.parquet"),
        profiles=ir.load(infer / "profiles.json"),
        shapes=shapes,
        asked=parquet("calls"),
        records=records.read(infer / "records.parquet") if has_records else None,
    )


def _absent(sources: list[dict[str, Any]]) -> str | None:
    names = [s["name"] for s in sources if s["origin"] == "embedded" and "/logs/" in s["name"]]
    if not names:
        return None
    return (
        f"data not present: {len(names)} of the released files, such as {names[0]}; they come with FRUGAL_DATA "
        f"or with: make data SOURCE={names[0]}"
    )


def quality(prompts: Sequence[int], outputs: Sequence[int], cells: Frame) -> dict[str, float]:
    """How well the profile of the full grid, and that of the cheap procedure, describe one model's cells.

    r_squared: of the full fit. held_out_mean: mean relative error on the cells outside the grid; the largest at other
    numbers of output tokens (other_output) and at other prompt lengths (other_prompt).
    cheap_error: median relative error of the cheap profile on the cells that it leaves out. saving: seconds of the full
    grid over seconds of the cheap cells.
    """
    table = cells.set_index(ir.CELL)["seconds"]
    full, cheap = [(p, o) for p in prompts for o in outputs], ir.cheap_cells(prompts, outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # F may fall
        fitted = ir.fit(table.loc[full].reset_index())
        quick = ir.fit(table.loc[cheap].reset_index()).profile
    found = {
        "r_squared": fitted.r_squared,
        "cheap_error": float(np.median(errors(quick, table.loc[full].drop(cheap)))),
        "saving": float(table.loc[full].sum() / table.loc[cheap].sum()),
    }
    other = table.drop(full)
    if len(other):
        off = errors(fitted.profile, other)
        between = ~other.index.get_level_values(0).isin(prompts)
        found["held_out_mean"] = float(off.mean())
        found |= {"other_output": float(off[~between].max()), "other_prompt": float(off[between].max())}
    return found


def errors(profile: Profile, seconds: pd.Series) -> np.ndarray:
    """Relative errors of a profile on measured cells, a series over (prompt tokens, output tokens)."""
    p, o = (seconds.index.get_level_values(i).to_numpy() for i in (0, 1))
    return np.abs(profile.seconds(p, o) / seconds.to_numpy() - 1)


def public_quality(cells: Frame) -> Frame:
    """`quality` of each released log."""
    cells = cells[cells["gpu"] == "a100"]
    rows = []
    for name in RUNS:
        own = cells[cells["run"] == name]
        p, o = (sorted({int(x) for x in own[column]}) for column in ir.CELL)
        rows.append({"model": name, "where": "released log"} | quality(p, o, own[[*ir.CELL, "seconds"]]))
    return pd.DataFrame(rows)


def own_quality(cfg: DictConfig, found: Found) -> Frame:
    """`quality` of each own model, from medians over rounds."""
    rows = [
        {"model": name, "where": "own model"}
        | quality(list(cfg.prompts), list(cfg.outputs), found.cells_of(name, cfg.clock))
        for name in found.shapes
    ]
    return pd.DataFrame(rows)


def worst_over_rounds(cfg: DictConfig, found: Found) -> dict[str, Measured]:
    """The worst own model in each quantity of `quality`, with an interval from resampled rounds."""
    cubes = [rows.pivot(index=ir.CELL, columns="round", values=cfg.clock) for _, rows in found.rounds.groupby("model")]

    def worst(draw: np.ndarray) -> dict[str, float]:
        of = pd.DataFrame(
            [
                quality(list(cfg.prompts), list(cfg.outputs), cube[draw].median(axis=1).rename("seconds").reset_index())
                for cube in cubes
            ]
        )
        least, most = of.min(), of.max()
        return {name: least[name] for name in ("r_squared", "saving")} | {
            name: most[name] for name in ("other_output", "other_prompt", "cheap_error")
        }

    rounds = found.rounds["round"].nunique()
    random = np.random.default_rng([cfg.seed, 0x1D])
    center = worst(np.arange(rounds))
    drawn = pd.DataFrame([worst(random.integers(0, rounds, rounds)) for _ in range(cfg.round_resamples)])
    low, high = drawn.quantile(0.025), drawn.quantile(0.975)
    return {
        name: Measured(value, min(low[name], value), max(high[name], value), rounds) for name, value in center.items()
    }


def architectures(found: Found) -> dict[str, tuple[str, Shape, Profile]]:
    """Name -> group, shape and profile of the released shapes (refitted, else HELM's) and of the own models."""
    of = {}
    for name, run in RUNS.items():
        if found.a100 is not None:
            of[name] = ("A100", run.shape, found.a100[name].profile)
        elif run.helm is not None:
            of[name] = ("A100", run.shape, found.constants[run.helm])
    return of | {name: ("own", shape, found.profiles[name]) for name, shape in found.shapes.items()}


def by_layers(cfg: DictConfig, found: Found) -> dict[int, Profile]:
    """Number of layers -> profile, of models of one width."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            n: ir.fit(medians(found.layers[found.layers["model"] == str(n)], cfg.clock)).profile
            for n in cfg.layers.counts
        }


def token_seconds(calls: Frame, prompt_tokens: int, clock: str) -> list[float]:
    """g of one model in each round: from the most and the least output tokens behind one prompt length."""
    at = calls[calls["prompt_tokens"] == prompt_tokens].pivot(index="round", columns="output_tokens", values=clock)
    first, last = min(at.columns), max(at.columns)
    return ((at[last] - at[first]) / (last - first)).tolist()


def doubling(cfg: DictConfig, found: Found) -> Measured:
    """g of the most over g of the second most layers, paired by round, behind the shorter prompt."""
    from common.metrics.timing import Timings

    *_, few, many = map(str, cfg.layers.counts)
    per_token = {
        n: token_seconds(found.layers[found.layers["model"] == n], cfg.layers.prompts[0], cfg.clock)
        for n in (few, many)
    }
    return Timings(wall=per_token).ratio(many, few)


@dataclass
class Market:
    """Part C, seconds [problems, APIs] of the same problems. apis: 'size@provider'."""

    apis: list[str]
    raw: np.ndarray
    denoised: np.ndarray
    idealized: np.ndarray

    def columns(self, apis: Sequence[str]) -> list[int]:
        return [self.apis.index(api) for api in apis]


def market(found: Found) -> Market:
    """The three runtimes of every answer of part C."""
    rows = found.records[found.records["arm"].str.contains("@")]
    apis = [str(api) for api in rows["arm"].unique()]
    kinds: dict[str, dict[str, np.ndarray]] = {"raw": {}, "denoised": {}, "idealized": {}}
    for api, own in rows.groupby("arm"):
        own = own.sort_values(["task", "problem_id"])
        tokens = own["prompt_tokens"].to_numpy(), own["output_tokens"].to_numpy()
        calls = found.asked[found.asked["model"] == api].rename(columns={"wall": "seconds"})
        kinds["raw"][str(api)] = own["seconds"].to_numpy()
        kinds["denoised"][str(api)] = ir.denoise(calls).seconds(*tokens)
        size = str(api).partition("@")[0]
        kinds["idealized"][str(api)] = found.profiles[f"reasoner_{size}"].seconds(*tokens)
    return Market(apis, *(np.stack([of[api] for api in apis], axis=1) for of in kinds.values()))


def answers(found: Found) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Part D: task -> model -> (idealized seconds [problems], whether right [problems])."""
    rows = found.records[~found.records["arm"].str.contains("@")]
    of: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (task, arm), own in rows.groupby(["task", "arm"], sort=False):
        own = own.sort_values("problem_id")
        profile = found.profiles[f"reasoner_{str(arm).split()[0]}"]
        seconds = profile.seconds(own["prompt_tokens"].to_numpy(), own["output_tokens"].to_numpy())
        of.setdefault(str(task), {})[str(arm)] = (seconds, own["correct"].to_numpy(dtype=float))
    return of


def resampled(cfg: DictConfig, count: int, statistic: Callable[[np.ndarray], Any]) -> list[Any]:
    """statistic(problem numbers) of `resamples` sets of problems, drawn with replacement."""
    random = np.random.default_rng([cfg.seed, 0xF0])
    return [statistic(random.integers(0, count, count)) for _ in range(cfg.resamples)]


def front_of(of: Mapping[str, tuple[np.ndarray, np.ndarray]], draw: np.ndarray | slice = slice(None)) -> np.ndarray:
    """bool [models]: which are on the front of one task, over the drawn problems."""
    seconds, right = (np.array([pair[i][draw].mean() for pair in of.values()]) for i in (0, 1))
    return pareto_front(seconds, right)
