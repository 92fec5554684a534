"""The framework: four metrics in closed form, sessions that share a memory by simulation, and a server that is real."""

from papers.long_context_peak.method.metrics import elasticities, four_metrics, minimal_products
from papers.long_context_peak.method.server import Disk, Host, KVArena, Server
from papers.long_context_peak.method.session import Costs, session_costs, simulate

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
