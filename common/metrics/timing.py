"""Timing on a noisy machine: interleaved rounds, wall and CPU clocks, and a calibration kernel around each measurement.

Every timing in the project goes through `compare`. Two things are compared only within one call of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common.metrics.intervals import Measured

if TYPE_CHECKING:
    import pandas as pd

CONTENDED_ABOVE = 0.10  # two calibrations of one measurement that differ by more mark it as contended


def _calibrate(repeats: int = 3) -> float:
    """Seconds of a fixed small piece of work (interpreter and arithmetic, about 2 ms); the best of a few."""
    matrix = np.ones((96, 96), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        total = 0
        for i in range(20_000):
            total += i & 7
        for _ in range(10):
            matrix = matrix @ matrix * np.float32(1e-2)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronise() -> None:
    """Waits for queued GPU work, if torch is loaded and has a GPU; without torch there is nothing to wait for."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Timings:
    """Rounds of seconds for each name: wall[name], cpu[name] (of the process, all threads), and whether contended."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    contended_rounds: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def contended(self) -> bool:
        """True when more than half of all rounds were disturbed, so that medians cannot be trusted either."""
        flags = [flag for rounds in self.contended_rounds.values() for flag in rounds]
        return sum(flags) * 2 > len(flags)

    def median(self, name: str) -> float:
        """Median wall seconds of one call."""
        return float(np.median(self.wall[name]))

    def ratio(self, slow: str, fast: str, clock: str = "wall") -> Measured:
        """Speed-up of `fast` over `slow`: median over rounds of slow / fast, paired by round.

        The interval: the range of order statistics that covers the median with 95% or more (all, if fewer than 6).
        """
        seconds = getattr(self, clock)
        ratios = np.sort(np.array(seconds[slow]) / np.array(seconds[fast]))
        n = len(ratios)
        from scipy import stats

        k = int(stats.binom.ppf(0.025, n, 0.5))
        k = max(k, 1)
        return Measured(float(np.median(ratios)), float(ratios[k - 1]), float(ratios[n - k]), n)

    def frame(self) -> pd.DataFrame:
        """One row a name: median wall and CPU milliseconds, CPU/wall, rounds, share of rounds that were contended."""
        import pandas as pd

        return pd.DataFrame(
            {
                "name": list(self.wall),
                "wall_ms": [1e3 * self.median(n) for n in self.wall],
                "cpu_ms": [1e3 * float(np.median(self.cpu[n])) for n in self.wall],
                "rounds": [len(self.wall[n]) for n in self.wall],
                "contended": [float(np.mean(self.contended_rounds[n])) for n in self.wall],
            }
        )


def compare(
    functions: dict[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1, min_seconds: float = 0.0
) -> Timings:
    """Times each function once a round, in rotating order, and returns the rounds.

    functions: name -> call without arguments, doing the same amount of work every time. warmup: untimed calls first.
    min_seconds: a measurement repeats its call until this much wall time has passed and reports the mean of the calls.
    Raises ValueError for no function or fewer than one round.
    """
    if not functions or rounds < 1:
        raise ValueError(f"nothing to time: {len(functions)} functions, {rounds} rounds")
    timings = Timings({n: [] for n in functions}, {n: [] for n in functions}, {n: [] for n in functions})
    for call in functions.values():
        for _ in range(warmup):
            call()
    names = list(functions)
    for round_ in range(rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            before = _calibrate()
            _synchronise()
            wall, cpu, calls = time.perf_counter(), time.process_time(), 0
            while True:
                functions[name]()
                calls += 1
                if time.perf_counter() - wall >= min_seconds:
                    break
            _synchronise()
            wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
            after = _calibrate()
            timings.wall[name].append(wall)
            timings.cpu[name].append(cpu)
            timings.contended_rounds[name].append(abs(after - before) > CONTENDED_ABOVE * min(before, after))
    return timings
