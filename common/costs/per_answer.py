"""Two columns for a paper's report: idealized seconds per problem and cost per correct answer, from its records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from common.costs.catalogue import Accelerator, Transformer
from common.costs.idealized_runtime import dollars
from common.costs.roofline import query_seconds
from common.metrics.intervals import Measured, bootstrap_mean, paired_bootstrap

if TYPE_CHECKING:
    import pandas as pd

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
    rows = []
    for (task, arm), group in by_problem.groupby(["task", "arm"], sort=False):
        rows.append({"task": task, "arm": arm, "problems": len(group), "accuracy": group["correct"].mean()})
        columns = {
            "idealized_seconds": bootstrap_mean(group["seconds"]),
            "usd_per_correct": _per_correct(group["usd"].to_numpy(), group["correct"].to_numpy()),
        }
        for name, found in columns.items():
            rows[-1] |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return pd.DataFrame(rows)


def _per_correct(usd: np.ndarray, correct: np.ndarray) -> Measured:
    """Dollars over correct answers. Resampled as correct answers over dollars, which stays finite, and inverted."""
    if not (usd > 0).all():
        raise ValueError("every attempt must cost something: usd_per_hour and the clock's seconds must be positive")
    rate = paired_bootstrap(correct, usd, lambda c, u: float(np.sum(c) / np.sum(u)))
    with np.errstate(divide="ignore"):
        value, low, high = (float(np.divide(1.0, x)) for x in (rate.value, rate.high, rate.low))
    return Measured(value, low, high, rate.n)
