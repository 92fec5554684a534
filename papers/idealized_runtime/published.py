"""Part A: what the authors released. Reads their logs, refits them, and rebuilds their tables from the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs import idealized_runtime as ir
from papers.idealized_runtime.method import Profile, Shape, pareto_front

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.data.sources import Located

FOLDER = "idealized_runtime"
EMBEDDED = Path(__file__).with_name("helm")  # HELM's two files, for those who have neither the data nor a network
HELM = {"idealized": "inference_idealized_runtimes.json", "denoised": "inference_denoised_runtimes.json"}
SCENARIOS = "inference_runtimes_and_accuracies_all_scenarios.csv"
API_CALLS = ("inference_runtimes_07-10.csv", "inference_runtimes_07-11.csv")
DAVINCI = ("openai_davinci", "openai_text-davinci-001")  # two models of one architecture


@dataclass(frozen=True)
class Run:
    """A released profiling log. label: its name in table t2. helm: its name in HELM's constants. times: the run had a
    part of the layers, and its seconds are multiplied."""

    label: str
    shape: Shape
    helm: str | None = None
    times: int = 1


RUNS = {
    "openai_ada": Run("openai_ada", Shape(24, 1024), "openai/ada"),
    "gptj_6b": Run("gptj_6b", Shape(28, 4096), "gooseai/gpt-j-6b"),
    "ai21_j1_large": Run("ai21_j1_large", Shape(32, 4096), "ai21/j1-large"),
    "gpt2": Run("gpt2 (synthetic 48x4096)", Shape(48, 4096)),
    "gpt_neox_20b": Run("gpt_neox_20b", Shape(44, 6144), "gooseai/gpt-neo-20b"),
    "anthropic": Run("anthropic (64x8192)", Shape(64, 8192, accelerators=4), "anthropic/stanford-online-all-v4-s3"),
    "ai21_j1_jumbo": Run("ai21_j1_jumbo", Shape(76, 13824, accelerators=8), "ai21/j1-jumbo"),
    "openai_davinci": Run("openai_davinci", Shape(96, 12288, accelerators=8), "openai/davinci"),
    "mt_nlg": Run(
        "mt_nlg (105 layers, run with 35, time x3)", Shape(105, 20480, accelerators=8), "microsoft/TNLGv2_530B", 3
    ),
}
V100 = ("openai_ada", "gptj_6b", "ai21_j1_large", "ai21_j1_jumbo", "openai_davinci")
LOGS = {"a100": tuple(RUNS), "v100": V100}


def find(cfg: DictConfig, name: str, network: bool) -> Located | None:
    """A source of this paper, or None where it is in none of the places and the profile allows to go on without."""
    from common.data.sources import MissingSource, locate

    try:
        return locate(f"{FOLDER}/{name}", cfg.data_root, network)
    except MissingSource:
        if not cfg.substitute:
            raise
        return None


def collect(cfg: DictConfig, out: Path) -> None:
    """The stage `data`: HELM's two files (embedded where they are not found), cells.csv, scenarios.csv, calls.csv and
    sources.json. A source that is absent leaves its file away, and the network is not asked again after one failure."""
    from common.data.sources import record_sources

    used: list[Located | str] = []
    network = cfg.network

    def read(name: str) -> str | None:
        nonlocal network
        located = find(cfg, name, network)
        if located is None:
            network = False
            used.append(f"{FOLDER}/{name}")  # under its own name, so that a run notices when the file is there later
            return None
        used.append(located)
        return located.path.read_text()

    for file in HELM.values():
        (out / file).write_text(read(f"helm/{file}") or (EMBEDDED / file).read_text())
    logs = {(gpu, name): read(f"logs/{gpu}/{name}.log") for gpu, names in LOGS.items() for name in names}
    tables = {
        "cells": _cells({key: text for key, text in logs.items() if text}) if all(logs.values()) else None,
        "scenarios": _parsed(read(f"logs/{SCENARIOS}"), scenarios),
        "calls": _joined([_parsed(read(f"logs/{name}"), api_calls) for name in API_CALLS]),
    }
    for name, table in tables.items():
        if table is not None:
            table.to_csv(out / f"{name}.csv", index=False)
    record_sources(out, used)


def _cells(logs: dict[tuple[str, str], str]) -> pd.DataFrame:
    frames = []
    for (gpu, name), text in logs.items():
        table = ir.read_log(text)
        frames.append(table.assign(gpu=gpu, run=name, seconds=table["seconds"] * RUNS[name].times))
    return pd.concat(frames, ignore_index=True)


def _parsed(text: str | None, parse: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame | None:
    from io import StringIO

    return None if text is None else parse(pd.read_csv(StringIO(text)))


def _joined(tables: list[pd.DataFrame | None]) -> pd.DataFrame | None:
    found = [table for table in tables if table is not None]
    return pd.concat(found, ignore_index=True) if len(found) == len(tables) else None


def scenarios(raw: pd.DataFrame) -> pd.DataFrame:
    """One row a model and scenario: seconds raw and idealized (nan where the architecture was not profiled), tokens,
    exact match. scenario: its name and settings without the model; the first of rows that are there twice."""
    parts = raw["scenario"].str.extract(r"^(.*model=)([^,]*)(.*)$")
    table = pd.DataFrame(
        {
            "model": parts[1],
            "scenario": parts[0].str.removesuffix("model=") + parts[2],
            "raw": raw["inference_runtime"],
            "idealized": raw["inference_idealized_runtime"],
            "tokens": raw["num_tokens"],
            "exact_match": raw["exact_match"],
        }
    )
    return table.dropna(subset="raw").drop_duplicates(["model", "scenario"], ignore_index=True)


def api_calls(raw: pd.DataFrame) -> pd.DataFrame:
    """Calls of APIs with synthetic prompts: model, prompt and output tokens as asked for, wall seconds."""
    parts = raw["scenario"].str.extract(r"num_input_tokens=(\d+),num_output_tokens=(\d+),model=([^,]*)")
    table = pd.DataFrame({"model": parts[2].str.replace("_", "/", n=1), "seconds": raw["inference_runtime"]})
    return table.assign(prompt_tokens=parts[0].astype(int), output_tokens=parts[1].astype(int)).dropna()


def fits(cells: pd.DataFrame, gpu: str) -> dict[str, ir.Fit]:
    """Run -> the fit of its log with g and F rounded to 3 decimals, as published."""
    import warnings

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # F falls here and there by its rounding
        for name in LOGS[gpu]:
            rows = cells[(cells["gpu"] == gpu) & (cells["run"] == name)]
            found[name] = ir.fit(rows, 3, RUNS[name].shape.accelerators if gpu == "a100" else 1)
    return found


def constants_table(profiles: dict[str, Profile], models: Iterable[str], prompts: Iterable[int]) -> pd.DataFrame:
    """Table t1: g and F(p) of HELM's constants."""
    rows = []
    for name in models:
        profile = ir.profile_of(profiles, name)
        first = {f"F({p})": profile.prompt[p] for p in prompts}
        rows.append({"model": name, "g": profile.per_output_token, **first})
    return pd.DataFrame(rows)


def denoised_table(profiles: dict[str, Profile]) -> pd.DataFrame:
    """Table t4: overhead, g and F(p) of the APIs."""
    table = constants_table(profiles, profiles, (1, 256, 512, 1024, 1536)).rename(columns={"model": "api"})
    table.insert(1, "overhead", [profile.overhead for profile in profiles.values()])
    return table


def refit_table(found: dict[str, ir.Fit]) -> pd.DataFrame:
    """Table t2."""
    rows = []
    for name, one in found.items():
        run, g = RUNS[name], one.profile.per_output_token
        flops = ir.decode_flops(run.shape.layers, run.shape.hidden) / (g * run.shape.accelerators)
        rows.append(
            {
                "shape": run.label, "layers": run.shape.layers, "hidden": run.shape.hidden,
                "gpus": run.shape.accelerators, "slope_5dec": round(one.slope, 5), "g_rounded": g,
                **{f"F({p})": one.profile.prompt[p] for p in (1, 512, 1024, 1920)},
                "TFLOPs_per_gpu_decode": round(flops / 1e12, 3),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def v100_table(found: dict[str, ir.Fit]) -> pd.DataFrame:
    """Table t3."""
    rows = [
        {"shape": name, "slope_5dec": round(one.slope, 5)} | {f"F({p})": one.profile.prompt[p] for p in (1, 512)}
        for name, one in found.items()
    ]
    return pd.DataFrame(rows)


def slope_ratios(a100: dict[str, ir.Fit], v100: dict[str, ir.Fit]) -> dict[str, float]:
    """V100 slope over A100 slope, both to 5 decimals as printed."""
    return {name: round(v100[name].slope, 5) / round(a100[name].slope, 5) for name in v100}


def pair_table(table: pd.DataFrame) -> pd.DataFrame:
    """Table t5: ratios of the first over the second of DAVINCI, over the scenarios that both answered; the mean leaves
    infinite ones out."""
    first, second = (table[table["model"] == name].set_index("scenario") for name in DAVINCI)
    shared = first.index.intersection(second.index)
    rows = []
    for metric, column in (("raw runtime", "raw"), ("idealized runtime", "idealized"), ("generated tokens", "tokens")):
        ratio = first.loc[shared, column] / second.loc[shared, column]
        finite = ratio[np.isfinite(ratio)]
        rows.append({"metric": metric, "mean": finite.mean(), "max": ratio.max()})
        rows[-1] |= {"min": ratio.min(), "pairs": len(shared)}
    return pd.DataFrame(rows)


def raw_over_idealized(table: pd.DataFrame) -> pd.Series:
    """Model -> median of raw over idealized runtime over the scenarios that have both, ascending."""
    both = table.dropna(subset="idealized")
    return (both["raw"] / both["idealized"]).groupby(both["model"]).median().sort_values()


def mean_times(table: pd.DataFrame) -> pd.DataFrame:
    """Mean raw and idealized seconds of each model over the scenarios that all of raw_over_idealized's models share."""
    both = table.dropna(subset="idealized")
    models = [m for m in raw_over_idealized(table).index if (both["model"] == m).sum() > 10]
    both = both[both["model"].isin(models)]
    counts = both.groupby("scenario")["model"].nunique()
    shared = both[both["scenario"].isin(counts[counts == len(models)].index)]
    return shared.groupby("model")[["raw", "idealized"]].mean().assign(scenarios=shared["scenario"].nunique())


def fronts(table: pd.DataFrame) -> pd.DataFrame:
    """One row a scenario and model with idealized runtime and exact match: whether it is on the scenario's front. At
    least three models must have answered."""
    both = table.dropna(subset=["idealized", "exact_match"])
    rows = []
    for scenario, group in both.groupby("scenario", sort=True):
        if len(group) >= 3:
            front = pareto_front(group["idealized"], group["exact_match"])
            rows.append(group[["model", "idealized", "exact_match"]].assign(scenario=scenario, on_front=front))
    return pd.concat(rows, ignore_index=True)


def dominators(rows: pd.DataFrame) -> list[str]:
    """The models that alone are the front of every scenario that they answered."""
    sizes = rows.groupby("scenario")["on_front"].sum()
    alone = rows["on_front"] & (rows["scenario"].map(sizes) == 1)
    return [str(name) for name, won in alone.groupby(rows["model"]) if won.all()]


def disagreeing(a: np.ndarray, b: np.ndarray) -> int:
    """Pairs that a and b put in opposite order."""
    return sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in combinations(range(len(a)), 2))
