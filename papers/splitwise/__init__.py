"""Splitwise: serving a language model with its two phases on different machines (Patel et al., ISCA 2024)."""

from papers.splitwise.method import latency_model, simulate, simulate_log

__all__ = ["latency_model", "simulate", "simulate_log"]
