"""How long one iteration of a batch takes: two measured curves, piecewise linear in the number of batched tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

PROFILE_COLUMNS = ("model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "prompt_time", "token_time")


@dataclass
class Curve:
    """Seconds against batched tokens: linear between the points, and on along the outermost segments beyond them.

    tokens: ascending, at least two. Values are remembered, since a simulation asks for the same few thousand counts.
    """

    tokens: Sequence[float]
    seconds: Sequence[float]
    _known: dict[float, float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.seconds) or len(self.tokens) < 2:
            raise ValueError(
                f"a curve needs two points or more: {len(self.tokens)} tokens, {len(self.seconds)} seconds"
            )
        if any(b <= a for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ValueError(f"the tokens of a curve must ascend: {list(self.tokens)}")

    def __call__(self, tokens: float) -> float:
        """Seconds of an iteration of so many tokens; ValueError if the extrapolation is not positive."""
        known = self._known.get(tokens)
        if known is not None:
            return known
        right = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        x0, x1, y0, y1 = *self.tokens[right - 1 : right + 1], *self.seconds[right - 1 : right + 1]
        value = (y1 - y0) / (x1 - x0) * (tokens - x0) + y0
        if value <= 0:
            raise ValueError(
                f"the curve gives {value:.3g} s for {tokens} tokens: too far below its points to extrapolate"
            )
        self._known[tokens] = value
        return value


@dataclass
class LatencyModel:
    """Seconds of one iteration of p prompt tokens and t decodes: prompt(p), token(t), or mixed_factor * prompt(p + t).

    decode_axis: what the decode curve is read at, `tasks` (the number of decodes) or `context` (the tokens in their
    KV caches), whichever it was measured against.
    """

    prompt: Curve
    token: Curve
    mixed_factor: float = 1.0
    decode_axis: str = "tasks"

    def __post_init__(self) -> None:
        if self.decode_axis not in ("tasks", "context"):
            raise ValueError(f"decode_axis {self.decode_axis!r} is neither 'tasks' nor 'context'")

    def iteration(self, prompt_tokens: int, decodes: int, context_tokens: int = 0) -> float:
        """Seconds of one iteration; context_tokens: sum over the decodes, read only with decode_axis='context'."""
        if not prompt_tokens:
            return self.token(context_tokens if self.decode_axis == "context" else decodes)
        if not decodes:
            return self.prompt(prompt_tokens)
        return self.prompt(prompt_tokens + decodes) * self.mixed_factor


def medians(profile: pd.DataFrame) -> pd.DataFrame:
    """Median milliseconds by (model, hardware, tensor_parallel, batch_tokens), batch_tokens = prompt_size * batch_size.

    profile: one row a profiling run, with PROFILE_COLUMNS (times in ms). Raises ValueError naming absent columns.
    """
    absent = [column for column in PROFILE_COLUMNS if column not in profile.columns]
    if absent:
        raise ValueError(f"the profile lacks the columns {', '.join(absent)}; it has {', '.join(map(str, profile))}")
    keys = ["model", "hardware", "tensor_parallel", "batch_tokens"]
    rows = profile.assign(batch_tokens=profile["prompt_size"] * profile["batch_size"])
    return rows.groupby(keys, as_index=False)[["prompt_time", "token_time"]].median()


def from_profile(
    profile: pd.DataFrame, model: str, hardware: str, tensor_parallel: int = 8, mixed_factor: float = 1.0
) -> LatencyModel:
    """The latency model of a (model, hardware, tensor parallelism) of a profile; ValueError lists those there are."""
    table = medians(profile)
    rows = table[
        (table["model"] == model) & (table["hardware"] == hardware) & (table["tensor_parallel"] == tensor_parallel)
    ]
    if rows.empty:
        pairs = sorted(set(zip(table["model"], table["hardware"], table["tensor_parallel"], strict=True)))
        raise ValueError(f"no profile of {(model, hardware, tensor_parallel)}; there are: {', '.join(map(str, pairs))}")
    tokens = [float(n) for n in rows["batch_tokens"]]
    prompt = [float(ms) / 1000 for ms in rows["prompt_time"]]
    token = [float(ms) / 1000 for ms in rows["token_time"]]
    return LatencyModel(Curve(tokens, prompt), Curve(tokens, token), mixed_factor)


def from_points(
    prompt_ms: Mapping[int, float], token_ms: Mapping[int, float], mixed_factor: float = 1.0, decode_axis: str = "tasks"
) -> LatencyModel:
    """A latency model from {batched tokens: milliseconds} of the two phases."""
    curves = [
        Curve([float(n) for n in sorted(points)], [points[n] / 1000 for n in sorted(points)])
        for points in (prompt_ms, token_ms)
    ]
    return LatencyModel(curves[0], curves[1], mixed_factor, decode_axis)
