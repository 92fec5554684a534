"""Counter-based uniform draws for many streams at once: SplitMix64 (Steele, Lea & Flood 2014), vectorised.

A draw is a function of its key and its place alone. `uniforms` in common/generation/sampler.py draws whole sequences;
this draws a step of each of many sequences, whose keys differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: every bit of the input changes about half of the output's bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(*parts: ArrayLike) -> np.ndarray:
    """64-bit keys [rows] of non-negative integers, each a scalar or [rows]: seed, algorithm, problem, sample, ..."""
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(part, dtype=np.uint64)) for part in parts))
    with np.errstate(over="ignore"):
        key = np.zeros(arrays[0].shape, dtype=np.uint64)
        for part in arrays:
            key = _mix(key + GOLDEN + _mix(part + GOLDEN))
    return key


def draws(key: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in (0, 1), float64 [rows, count], on a grid of 2^-32 without its ends. key: uint64 [rows]."""
    with np.errstate(over="ignore"):
        place = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
        words = _mix(key[:, None] + place)
    return ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32


def name_key(name: str) -> int:
    """A number for the name of an algorithm, the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
