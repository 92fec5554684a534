"""Request traces: a table of arrival (s), prompt_tokens, output_tokens; read, checked, or drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("arrival", "prompt_tokens", "output_tokens")


def load_trace(trace: pd.DataFrame | str | Path) -> pd.DataFrame:
    """A checked copy of a trace: float arrival [s], int prompt_tokens and output_tokens, and request_id.

    trace: a table or the path of a CSV file, with the columns COLUMNS; request_id defaults to the number of the row.
    Raises ValueError that names row (from 0, the header not counted) and column of a missing, non-numeric, negative,
    zero (token counts) or fractional (token counts) entry, or of a repeated request_id.
    """
    import pandas as pd

    frame = pd.read_csv(trace) if isinstance(trace, str | Path) else trace
    absent = [column for column in COLUMNS if column not in frame.columns]
    if absent:
        raise ValueError(f"the trace lacks the column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}")
    checked = {column: _numbers(frame, column) for column in COLUMNS}
    _check(checked["arrival"] >= 0, frame, "arrival", "is negative; arrivals are seconds from 0 on")
    for column in COLUMNS[1:]:
        _check(checked[column] >= 1, frame, column, "is below 1; a request has at least one token of each kind")
        _check(checked[column] % 1 == 0, frame, column, "is no whole number of tokens")
    ids = frame["request_id"] if "request_id" in frame.columns else pd.RangeIndex(len(frame))
    if len(set(ids)) < len(frame):
        _check(~pd.Series(ids).duplicated().to_numpy(), frame, "request_id", "occurs twice")
    return pd.DataFrame(
        {
            "request_id": np.asarray(ids),
            "arrival": checked["arrival"],
            "prompt_tokens": checked["prompt_tokens"].astype(np.int64),
            "output_tokens": checked["output_tokens"].astype(np.int64),
        }
    )


def _numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    import pandas as pd

    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float)
    _check(np.isfinite(values), frame, column, "is no finite number")
    return values


def _check(good: np.ndarray, frame: pd.DataFrame, column: str, what: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        value = frame[column].iloc[row]
        raise ValueError(f"trace row {row}, column {column}: {getattr(value, 'item', lambda: value)()!r} {what}")


def poisson_trace(
    prompt_tokens: np.ndarray, output_tokens: np.ndarray, rate: float, seconds: float, seed: int
) -> pd.DataFrame:
    """Poisson arrivals at `rate` per second until `seconds`, sizes drawn with replacement, each column on its own.

    prompt_tokens, output_tokens: [n] the sizes to draw from. Of one seed, a higher rate is the same sequence of
    requests with all gaps shortened (common random numbers). Raises ValueError for a rate or duration that is not
    positive.
    """
    import pandas as pd

    if not rate > 0 or not seconds > 0:
        raise ValueError(f"rate {rate} and seconds {seconds} must be positive")
    rngs = [np.random.default_rng([seed, stream]) for stream in (0xA1, 0xA2, 0xA3)]
    arrivals, prompts, outputs = [], [], []
    total, last, chunk = 0, 0.0, 4096  # whole chunks, so that a longer trace begins like a shorter one
    while last < seconds * rate:
        gaps = last + np.cumsum(rngs[0].exponential(size=chunk))
        arrivals.append(gaps)
        prompts.append(rngs[1].choice(prompt_tokens, chunk))
        outputs.append(rngs[2].choice(output_tokens, chunk))
        total, last = total + chunk, float(gaps[-1])
    times = np.concatenate(arrivals) / rate
    inside = times < seconds
    return pd.DataFrame(
        {
            "arrival": times[inside],
            "prompt_tokens": np.concatenate(prompts)[inside],
            "output_tokens": np.concatenate(outputs)[inside],
        }
    )


def sizes_from_quantiles(quantiles: dict[float, float], count: int) -> np.ndarray:
    """`count` whole token numbers whose distribution runs log-linearly through the given quantiles (0 and 1 included).

    The values stand at the probabilities (i + 1/2) / count: no draw, so the same substitute everywhere.
    """
    levels = sorted(quantiles)
    if levels[0] != 0 or levels[-1] != 1:
        raise ValueError(f"quantiles must include 0 and 1 (the least and the largest value), got {levels}")
    logs = np.log([quantiles[level] for level in levels])
    at = (np.arange(count) + 0.5) / count
    return np.maximum(1, np.rint(np.exp(np.interp(at, levels, logs)))).astype(np.int64)
