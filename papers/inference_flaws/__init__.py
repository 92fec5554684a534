"""Inference Scaling fLaws: resampling until a test passes, when the test is imperfect."""

from papers.inference_flaws.method import (
    TaskCounts,
    TwoTypes,
    accuracy_given_pass,
    best_attempts,
    ceiling,
    coverage,
    mean_curve,
    reward_curve,
    simulated_curve,
)

__all__ = [
    "TaskCounts",
    "TwoTypes",
    "accuracy_given_pass",
    "best_attempts",
    "ceiling",
    "coverage",
    "mean_curve",
    "reward_curve",
    "simulated_curve",
]
