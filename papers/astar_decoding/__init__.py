"""A*-Decoding: best-first search over reasoning steps, guided by a process reward model."""

from papers.astar_decoding.method import STEP_COSTS, Budget, a_star, priority, running, solve

__all__ = ["STEP_COSTS", "Budget", "a_star", "priority", "running", "solve"]
