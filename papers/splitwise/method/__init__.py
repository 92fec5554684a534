"""Splitwise (Patel et al., ISCA 2024): the prompt and the decode phase of a request on different machines.

table = simulate("trace.csv", prompt_machines={"dgx-h100": 2}, token_machines={"dgx-a100": 2})
"""

from papers.splitwise.method.scheduler import fixed_pools, mixed_pool, return_to_pool
from papers.splitwise.method.simulation import latency_model, simulate, simulate_log

__all__ = ["fixed_pools", "latency_model", "mixed_pool", "return_to_pool", "simulate", "simulate_log"]
