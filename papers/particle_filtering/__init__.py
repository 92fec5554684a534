"""Inference-time scaling by particle filtering, particle Gibbs and parallel chains over reasoning steps."""

from papers.particle_filtering.method import (
    Budget,
    Weighting,
    linear_annealing,
    parallel_chains,
    particle_filter,
    particle_gibbs,
    solve,
)

__all__ = [
    "Budget",
    "Weighting",
    "linear_annealing",
    "parallel_chains",
    "particle_filter",
    "particle_gibbs",
    "solve",
]
