"""Cluster-level schedulers for one pool of interchangeable machines, as functions of (request, cluster).

A scheduler returns the machines of the prompt and of the decode phase; here both are the same, so that nothing is
transferred. It reads cluster.pools and each machine's pending_tokens, reserved, residents and queue_length.
(splitwise-sim, scheduler.py: RoundRobinScheduler, JSQScheduler, TokenJSQScheduler.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def token_jsq(request: Any, cluster: Any) -> tuple[Any, Any]:
    """Join the shortest queue, counted in tokens scheduled and not yet processed; the first machine among equals."""
    machine = min(cluster.machines, key=lambda m: m.pending_tokens)
    return machine, machine


def jsq(request: Any, cluster: Any) -> tuple[Any, Any]:
    """Join the shortest queue, counted in requests on the machine."""
    machine = min(cluster.machines, key=lambda m: m.residents)
    return machine, machine


def round_robin(request: Any, cluster: Any) -> tuple[Any, Any]:
    """The machines in turn, by the number of the request in the trace."""
    machine = cluster.machines[request.index % len(cluster.machines)]
    return machine, machine


ONE_POOL: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "token_jsq": token_jsq,
    "jsq": jsq,
    "round_robin": round_robin,
}
