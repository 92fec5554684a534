"""Idealized runtime: what a query takes on one stack without contention (Narayanan et al., NeurIPS 2023)."""

from papers.idealized_runtime.method import (
    Profile,
    Shape,
    denoise,
    fit_stack,
    leave_one_out,
    pareto_front,
    profile_model,
)

__all__ = ["Profile", "Shape", "denoise", "fit_stack", "leave_one_out", "pareto_front", "profile_model"]
