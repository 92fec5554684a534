"""Resampling: n indices with given chances, by one uniform draw each or by one for all (lower variance)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import logit

Resample = Callable[[np.ndarray, np.ndarray], np.ndarray]
SMALLEST = float(np.finfo(float).eps)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Weights [n] that sum to 1."""
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def log_weights(scores: np.ndarray, kind: str = "logit") -> np.ndarray:
    """Scores in [0, 1] as log-weights: 'logit' (log r/(1-r)), 'log' (log r: the model's own potential) or 'raw' (r).

    Raises ValueError for another kind.
    """
    if kind == "raw":
        return np.asarray(scores, dtype=float)
    clipped = np.clip(scores, SMALLEST, 1 - SMALLEST)
    if kind == "logit":
        return logit(clipped)
    if kind == "log":
        return np.log(clipped)
    raise ValueError(f"unknown weights {kind!r}; known: logit, log, raw")


def multinomial(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """n independent indices; u [n] uniform."""
    return _invert(weights, u)


def systematic(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """n indices from one draw, u[0]: index i is taken floor or ceil of n * weights[i] times."""
    return _invert(weights, (np.arange(len(u)) + u[0]) / len(u))


def stratified(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """n indices, one draw in each of n strata."""
    return _invert(weights, (np.arange(len(u)) + u) / len(u))


def residual(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """floor(n * weights[i]) copies of each index, the rest independently by what remains."""
    n = len(u)
    copies = np.floor(n * weights + 1e-12).astype(int)
    kept = np.repeat(np.arange(len(weights)), copies)[:n]
    rest = np.clip(n * weights - copies, 0.0, None)
    left = n - len(kept)
    return np.concatenate([kept, _invert(rest / rest.sum(), u[:left])]) if left else kept


RESAMPLERS: dict[str, Resample] = {
    "multinomial": multinomial,
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
}


def effective_sample_size(weights: np.ndarray) -> float:
    """1 / sum of squared weights, between 1 and n; weights [n] sum to 1."""
    return float(1.0 / np.sum(np.square(weights)))


def _invert(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, u * cumulative[-1], side="right").clip(max=len(weights) - 1)
