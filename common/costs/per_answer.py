"""Two columns for a paper's report: idealized seconds per problem and cost per correct answer, from its records."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.costs.catalogue import Accelerator, Transformer, accelerator
from common.costs.idealized_runtime import dollars
from common.costs.roofline import query_seconds

if TYPE_CHECKING:
    import pandas as pd

    from common.reporting.report import Report

REFERENCE, USD_PER_HOUR = "h200-141gb", 3.0  # one machine for all papers, and a round price of renting it
RESAMPLES = 2000
Clock = Callable[[np.ndarray, np.ndarray], np.ndarray]  # prompt tokens, output tokens [n] -> idealized seconds [n]


def roofline_clock(model: Transformer, machine: Accelerator) -> Clock:
    """Seconds at a machine's peak rates. (The clock of a profiled model is `Profile.seconds`.)"""
    return partial(query_seconds, model, machine)


def per_answer(
    records: pd.DataFrame, clock: Clock, usd_per_hour: float, accelerators: int = 1, steps: str = "generated"
) -> pd.DataFrame:
    """One row a task and arm: problems, accuracy, and with intervals over problems

    - idealized_seconds: of an attempt, averaged over the attempts of a problem and then over problems;
    - usd_per_correct: dollars of all attempts over how many were right, of a problem drawn anew for each attempt. (The
      cost-of-pass of common/costs/cost_of_pass.py repeats one problem, and is infinite where that is never solved.)

    records: of one paper, in the schema of common/generation/records.py. The attempts at a problem are averaged over
    its samples and seeds: those are not independent. usd_per_hour: of each accelerator. steps: what decodes one after
    another, `generated` tokens (the answer's and the discarded ones, as HELM adds up several completions) or
    `forwards`, for a decoder that scores its discarded tokens within the forward pass that makes an output token, at
    batch 1. Raises ValueError for no records, another name of steps, and attempts that cost nothing.
    """
    import pandas as pd

    if records.empty:
        raise ValueError("no records")
    if steps == "generated":
        tokens = records["output_tokens"] + records["discarded_tokens"]
    elif steps == "forwards":
        tokens = records["forwards"].round().astype(int)
    else:
        raise ValueError(f"steps is 'generated' or 'forwards', not {steps!r}")
    seconds = clock(records["prompt_tokens"].to_numpy(), tokens.to_numpy())
    usd = dollars(seconds, usd_per_hour, accelerators)
    priced = records.assign(seconds=seconds, usd=usd, correct=records["correct"].astype(float))
    by_problem = priced.groupby(["task", "arm", "problem_id"], sort=False)[["seconds", "usd", "correct"]].mean()
    if not (by_problem["usd"] > 0).all():
        raise ValueError("every attempt must cost something: usd_per_hour and the clock's seconds must be positive")
    return pd.DataFrame(
        {"task": task, "arm": arm, "problems": len(group), "accuracy": group["correct"].mean()} | _columns(group)
        for (task, arm), group in by_problem.groupby(["task", "arm"], sort=False)
    )


def _columns(problems: pd.DataFrame) -> dict[str, float]:
    """The two columns with their intervals, nan for a single problem: a bootstrap over problems, all in one draw.

    Dollars per correct answer are resampled as correct answers per dollar, which stay finite, and inverted.
    """
    columns: dict[str, float] = {}
    values = problems[["seconds", "usd", "correct"]].to_numpy()
    means = np.concatenate([values.mean(0)[None], values[_draws(len(values))].mean(1)])  # of all, then of the resamples
    with np.errstate(divide="ignore"):
        found = {"idealized_seconds": means[:, 0], "usd_per_correct": 1 / (means[:, 2] / means[:, 1])}
    for name, of in found.items():
        low, high = np.quantile(of[1:], [0.025, 0.975], method="nearest") if len(values) > 1 else (np.nan, np.nan)
        columns |= {name: float(of[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return columns


@cache
def _draws(units: int) -> np.ndarray:
    """Units of each resample [RESAMPLES, units], the same for all arms."""
    return np.random.default_rng([0, 0xB007]).integers(0, units, size=(RESAMPLES, units))


def report_costs(
    report: Report, model_of: Transformer | Callable[[str], Transformer], steps: str = "generated"
) -> None:
    """Adds the table `costs` to a paper's page: what its records cost at the peak rates of the REFERENCE machine.

    model_of: the model that wrote all answers, or arm -> its model, with weights and cache of the size that the arm
    stores. The table is a closed form of the records: the same everywhere, and a bound that no real machine reaches.
    """
    import pandas as pd

    from common.generation import records

    table = records.read(Path(report.cfg.artifacts) / "infer" / "records.parquet")
    machine, arms = accelerator(REFERENCE), table["arm"].unique()
    models = {arm: model_of(arm) if callable(model_of) else model_of for arm in arms}
    parts = [
        per_answer(table[table["arm"].map(models) == model], roofline_clock(model, machine), USD_PER_HOUR, steps=steps)
        for model in dict.fromkeys(models.values())
    ]
    found = pd.concat(parts, ignore_index=True)
    ends = ("", "_low", "_high")
    shown = found[["task", "arm", "problems", "accuracy"]].assign(
        **{f"idealized_us{end}": 1e6 * found[f"idealized_seconds{end}"] for end in ends},
        **{f"usd_per_million_correct{end}": 1e6 * found[f"usd_per_correct{end}"] for end in ends},
    )
    once = "a token that was drafted with others is paid once" if steps == "forwards" else "discarded ones included"
    report.table(
        "costs", shown, "Idealized seconds per problem, and cost per correct answer",
        note=f"Microseconds of an attempt at the peak rates of one {machine.name}, batch 1 (roofline of the arm's own "
        f"model), all tokens one after another, {once}; dollars at {USD_PER_HOUR:g} an hour, a round price that scales "
        "all rows alike. 95% intervals over problems. The passes of reward models are left out.",
    )  # fmt: skip
