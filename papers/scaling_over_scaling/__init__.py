"""Scaling over Scaling: when more answers, or more rounds of rethinking, stop paying."""

from papers.scaling_over_scaling.method import (
    Allocation,
    allocate,
    fit_laws,
    fit_leaky_chain,
    geometric,
    hit_curves,
    leaky_chain,
    observed_saturation,
    rethink,
    saturation_budget,
    solve,
    until_votes,
)

__all__ = [
    "Allocation",
    "allocate",
    "fit_laws",
    "fit_leaky_chain",
    "geometric",
    "hit_curves",
    "leaky_chain",
    "observed_saturation",
    "rethink",
    "saturation_budget",
    "solve",
    "until_votes",
]
