"""Idealized runtime: what a query would take on one fixed stack without contention, from two measured quantities.

    T(p, o) = F(p) + g (o - 1),  o >= 1;    T(p, 0) = F(p)

F(p): seconds of reading p prompt tokens and writing the first output token, on a grid of p; g: seconds of each further
token, nearly the same for all p. Narayanan et al., "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive
Transformer APIs" (arXiv 2305.02440); profiling and fit as in stanford-crfm/benchmarking_efficiency (generate_text.py,
notebooks/fit_runtimes.ipynb), interpolation and the JSON schema as in stanford-crfm/helm (efficiency_metrics.py).
"""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from common.metrics.timing import Timings

CELL = ["prompt_tokens", "output_tokens"]


@dataclass(frozen=True)
class Profile:
    """Seconds of a query of one model on one stack.

    per_output_token: g. prompt: {p: F(p)}, ascending. overhead: constant seconds a call, of an API. accelerators: how
    many the model was measured on.
    """

    per_output_token: float
    prompt: Mapping[int, float]
    overhead: float = 0.0
    accelerators: int = 1

    def __post_init__(self) -> None:
        grid = list(self.prompt)
        if not grid or grid != sorted(grid) or grid[0] < 1:
            raise ValueError(f"a profile needs ascending prompt lengths of 1 or more, not {grid}")
        if min(self.per_output_token, self.overhead, *self.prompt.values()) < 0 or self.accelerators < 1:
            raise ValueError(f"negative seconds, or no accelerator, in {self}")

    def prompt_seconds(self, prompt_tokens: int) -> float:
        """F(p) by the published rule: of the smallest measured k >= p, F(k) p / k; beyond the grid, of its last k.

        Not a linear interpolation. Raises ValueError for p < 1.
        """
        if prompt_tokens < 1:
            raise ValueError(f"a query has 1 prompt token or more, not {prompt_tokens}")
        grid = list(self.prompt)
        k = grid[min(bisect_left(grid, prompt_tokens), len(grid) - 1)]
        return self.prompt[k] * prompt_tokens / k

    def seconds(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> np.ndarray:
        """T(p, o) of queries [n]. Several completions of a prompt: their tokens added up, as if one after another.

        Raises ValueError for p < 1 or o < 0.
        """
        prompt, output = np.broadcast_arrays(np.asarray(prompt_tokens), np.asarray(output_tokens))
        if (output < 0).any():
            raise ValueError(f"output_tokens must be at least 0, not {output.min()}")
        lengths, which = np.unique(prompt, return_inverse=True)
        reading = np.array([self.prompt_seconds(p) for p in lengths.tolist()])[which.reshape(prompt.shape)]
        return self.overhead + reading + self.per_output_token * np.maximum(output - 1, 0)


@dataclass(frozen=True)
class Fit:
    """A profile and how well it fits: slope and intercept of the regression before rounding, its R squared, and the
    mean and largest squared error of F(p) + g (o - 1), seconds squared."""

    profile: Profile
    slope: float
    intercept: float
    r_squared: float
    mean_squared_error: float
    max_squared_error: float


def fit(cells: pd.DataFrame, decimals: int | None = None, accelerators: int = 1) -> Fit:
    """The profile of measured cells: F(p) = T(p, 1), g by least squares of T(p, o) - F(p) on o over all p, with
    intercept (which comes out near -g, since T - F = g (o - 1)).

    cells: columns prompt_tokens, output_tokens, seconds; one row a cell; every p needs o = 1 and one p at least a
    second o. decimals: to round F and g to; the paper's 3. Raises ValueError for cells that cannot be fitted; warns
    where F falls, which real measurements do by their rounding.
    """
    table = _checked(cells).set_index(CELL)["seconds"].sort_index()
    if not table.index.is_unique:
        p, o = table.index[table.index.duplicated()][0]
        raise ValueError(f"cell ({p}, {o}) is there twice; take the median of its runs")
    prompts = table.index.get_level_values(0)
    if missing := sorted({int(p) for p in prompts} - {int(p) for p, o in table.index if o == 1}):
        raise ValueError(f"F(p) is measured with one output token; cells (p, 1) lack p = {missing}")
    first = {int(p): float(table[(p, 1)]) for p in prompts.unique()}
    if decimals is not None:
        first = {p: round(seconds, decimals) for p, seconds in first.items()}
    if any(b < a for a, b in zip(first.values(), list(first.values())[1:], strict=False)):
        warnings.warn("F(p) falls somewhere along p: noise, or a kernel that changes with the size", stacklevel=2)
    outputs = table.index.get_level_values(1).to_numpy(dtype=float)
    if len(np.unique(outputs)) < 2:
        raise ValueError("a slope needs two numbers of output tokens or more; the cells have o = 1 alone")
    y = table.to_numpy() - prompts.map(first).to_numpy(dtype=float)
    slope, intercept = (float(x) for x in np.polyfit(outputs, y, 1))
    if slope < 0:
        raise ValueError(f"the cells get faster with output tokens ({slope:.2e} s each): noise; repeat them more often")
    g = slope if decimals is None else round(slope, decimals)
    residual, error = y - (slope * outputs + intercept), y - g * (outputs - 1)
    return Fit(
        Profile(g, first, accelerators=accelerators),
        slope,
        intercept,
        r_squared=float(1 - residual @ residual / ((y - y.mean()) @ (y - y.mean()))),
        mean_squared_error=float(np.mean(error**2)),
        max_squared_error=float(np.max(error**2)),
    )


def denoise(calls: pd.DataFrame) -> Profile:
    """The profile of an API without contention: the fit of the fastest of the repeated calls of each cell.

    calls: as for `fit`, with repetitions. Contention only adds time, so that the minimum removes it and keeps what the
    provider optimised. A constant overhead and F(p) cannot be told apart; as in HELM's published constants, the
    shortest prompt is taken to cost what an output token does: overhead = T(p0, 1) - g, F(p) = T(p, 1) - overhead, not
    below g.
    """
    fastest = _checked(calls).groupby(CELL, as_index=False)["seconds"].min()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an API's F(p) falls more often than not
        profile = fit(fastest).profile
    g = profile.per_output_token
    overhead = max(next(iter(profile.prompt.values())) - g, 0.0)
    return Profile(g, {p: max(seconds - overhead, g) for p, seconds in profile.prompt.items()}, overhead)


def _checked(cells: pd.DataFrame) -> pd.DataFrame:
    if absent := {*CELL, "seconds"} - set(cells.columns):
        raise ValueError(f"the cells lack the columns {', '.join(sorted(absent))}")
    if cells.empty:
        raise ValueError("an empty grid: no cell was measured")
    bad = cells[(cells["prompt_tokens"] < 1) | (cells["output_tokens"] < 1) | ~(cells["seconds"] > 0)]
    if len(bad):
        raise ValueError(f"a cell has p >= 1, o >= 1 and positive seconds, not {bad.iloc[0].to_dict()}")
    return cells


def measure(
    model: PreTrainedModel, cells: Iterable[tuple[int, int]], rounds: int = 5, warmup: int = 2
) -> tuple[pd.DataFrame, Timings]:
    """Times greedy generation of exactly o tokens after p, for each cell (p, o), in interleaved rounds at batch 1.

    Returns (cells for `fit`, all rounds): seconds is the median CPU time of the process, which contention hardly
    touches on a busy machine as long as torch runs one thread; wall_seconds is beside it. The weights may be random.
    """
    import pandas as pd

    from common.generation.sampler import generate
    from common.metrics.timing import compare

    wanted = {f"{p} {o}": (p, o) for p, o in cells}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(generate, model, [[1] * p], o, stop_tokens=()) for name, (p, o) in wanted.items()
    }
    timings = compare(calls, rounds, warmup)
    rows = [
        {
            "prompt_tokens": p,
            "output_tokens": o,
            "seconds": float(np.median(timings.cpu[name])),
            "wall_seconds": timings.median(name),
        }
        for name, (p, o) in wanted.items()
    ]
    return pd.DataFrame(rows), timings


def cheap_cells(prompts: Sequence[int], outputs: Sequence[int]) -> list[tuple[int, int]]:
    """What has to be measured if one g serves all p: F on the grid of p, and every o at the middle p alone."""
    middle = sorted(prompts)[len(prompts) // 2]
    return [(p, 1) for p in prompts] + [(middle, o) for o in outputs if o != 1]


def read_log(text: str) -> pd.DataFrame:
    """The cells of a released profiling log (`Runtime for {'num_input_tokens': 1, ...}: 0.027 seconds +- 0.001`)."""
    import pandas as pd

    line = r"Runtime for \{'num_input_tokens': (\d+), 'num_output_tokens': (\d+)\}: ([\d.]+) seconds"
    rows = [(int(p), int(o), float(seconds)) for p, o, seconds in re.findall(line, text)]
    return pd.DataFrame(rows, columns=[*CELL, "seconds"])


def load(path: str | Path) -> dict[str, Profile]:
    """Model -> profile, from a file in HELM's schema (idealized or denoised runtimes), or one that `save` wrote."""
    return {
        model: Profile(
            entry["runtime_per_output_token"],
            {int(p): seconds for p, seconds in entry["runtime_for_prompt_tokens"].items()},
            entry.get("overhead", 0.0),
            entry.get("accelerators", 1),
        )
        for model, entry in json.loads(Path(path).read_text()).items()
    }


def save(path: str | Path, profiles: Mapping[str, Profile]) -> None:
    """Writes profiles in HELM's schema, which `accelerators` is added to."""
    entries = {
        model: {
            "runtime_per_output_token": profile.per_output_token,
            "runtime_for_prompt_tokens": profile.prompt,
            "overhead": profile.overhead,
            "accelerators": profile.accelerators,
        }
        for model, profile in profiles.items()
    }
    Path(path).write_text(json.dumps(entries, indent=2) + "\n")


def profile_of(profiles: Mapping[str, Profile], model: str) -> Profile:
    """The profile of a model; KeyError lists those there are."""
    if model not in profiles:
        raise KeyError(f"no profile of {model!r}; known: {', '.join(sorted(profiles))}")
    return profiles[model]


def dollars(seconds: ArrayLike, usd_per_hour: float, accelerators: int = 1) -> np.ndarray:
    """Price of running so many accelerators, each at usd_per_hour. Raises ValueError for a negative one."""
    if usd_per_hour < 0 or accelerators < 1:
        raise ValueError(
            f"a price needs usd_per_hour >= 0 and accelerators >= 1, not {usd_per_hour} and {accelerators}"
        )
    return np.asarray(seconds) * accelerators * usd_per_hour / 3600


def joules(seconds: ArrayLike, watts: float, accelerators: int = 1) -> np.ndarray:
    """Energy of so many accelerators, each drawing `watts`. Raises ValueError for negative watts."""
    if watts < 0 or accelerators < 1:
        raise ValueError(f"energy needs watts >= 0 and accelerators >= 1, not {watts} and {accelerators}")
    return np.asarray(seconds) * accelerators * watts


def decode_flops(layers: int, hidden: int) -> int:
    """Operations of one token in the blocks of a GPT: 24 h^2 l."""
    return 24 * hidden**2 * layers


def prompt_flops(prompt_tokens: int, layers: int, hidden: int, vocabulary: int) -> float:
    """Operations of reading p tokens: 24 p h^2 l (1 + p / (6 h) + V / (12 l h)).

    The published notebook has V / (16 l h), which belongs to training with recomputation.
    """
    blocks = 1 + prompt_tokens / (6 * hidden)
    return prompt_tokens * decode_flops(layers, hidden) * (blocks + vocabulary / (12 * layers * hidden))
