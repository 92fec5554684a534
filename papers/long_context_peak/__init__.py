"""What long context costs: four metrics, each bound by one resource, and a session on limited memory (Fu 2024)."""

from papers.long_context_peak.method import (
    Costs,
    Disk,
    Host,
    KVArena,
    Server,
    elasticities,
    four_metrics,
    minimal_products,
    session_costs,
    simulate,
)

__all__ = [
    "Costs",
    "Disk",
    "Host",
    "KVArena",
    "Server",
    "elasticities",
    "four_metrics",
    "minimal_products",
    "session_costs",
    "simulate",
]
