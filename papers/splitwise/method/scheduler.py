"""Splitwise's cluster scheduler: a pool of prompt machines, a pool of token machines, and a mixed pool between them.

Rules: splitwise-sim, scheduler.py, `MixedPoolScheduler`; paper section 4.2 (cluster-level scheduling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPT_QUEUE_TOKENS = 8192  # a machine with a queue takes no prompt that brings its pending tokens above this


def mixed_pool(request: Any, cluster: Any) -> tuple[Any, Any]:
    """The machines of a request's prompt and decode phase. cluster.pools: prompt, token, mixed.

    Each phase looks in its own pool, then in the mixed pool. When both are loaded, a machine of the other pool becomes
    mixed and takes the phase; it batches prompts beside decodes until it is idle (`return_to_pool`). A request of one
    output token has no decode phase and stays on its prompt machine.
    """
    pools = cluster.pools
    mixed = pools.setdefault("mixed", [])
    source = _prompt_machine(pools["prompt"], request) or _prompt_machine(mixed, request)
    split = request.output_tokens > 1
    target = (_token_machine(pools["token"], request) or _token_machine(mixed, request)) if split else None
    if source is None and pools["token"]:
        source = _move(min(pools["token"], key=_pending), pools["token"], mixed)
    if split and target is None and pools["prompt"]:
        target = _move(min(pools["prompt"], key=_reserved), pools["prompt"], mixed)
    if source is None or (split and target is None):  # every machine is mixed and loaded: the least loaded does both
        source = target = min([*pools["prompt"], *mixed, *pools["token"]], key=_pending)
    return source, target if split else source


def return_to_pool(machine: Any, cluster: Any) -> None:
    """A mixed machine that has run out of work goes back to the pool it came from."""
    mixed = cluster.pools.get("mixed", [])
    if machine in mixed:
        mixed.remove(machine)
        cluster.pools[machine.home].append(machine)


def fixed_pools(request: Any, cluster: Any) -> tuple[Any, Any]:
    """The phase split without a mixed pool: the same choices, and no machine ever changes its pool."""
    source = min(cluster.pools["prompt"], key=_pending)
    return source, min(cluster.pools["token"], key=_reserved) if request.output_tokens > 1 else source


def _pending(machine: Any) -> int:
    return machine.pending_tokens


def _reserved(machine: Any) -> int:
    return machine.reserved


def _prompt_machine(pool: list[Any], request: Any) -> Any | None:
    """The machine with the fewest pending tokens, unless its queue would be too long with this prompt."""
    if not pool:
        return None
    machine = min(pool, key=_pending)
    long = machine.queue_length > 0 and machine.pending_tokens + request.prompt_tokens > PROMPT_QUEUE_TOKENS
    return None if long else machine


def _token_machine(pool: list[Any], request: Any) -> Any | None:
    """The machine with the least reserved memory, unless the whole request would fill it."""
    if not pool:
        return None
    machine = min(pool, key=_reserved)
    return None if machine.reserved + request.memory >= machine.capacity else machine


def _move(machine: Any, pool: list[Any], mixed: list[Any]) -> Any:
    pool.remove(machine)
    mixed.append(machine)
    return machine


TWO_POOLS: dict[str, tuple[Callable[[Any, Any], tuple[Any, Any]], Callable[[Any, Any], None] | None]] = {
    "mixed_pool": (mixed_pool, return_to_pool),
    "fixed_pools": (fixed_pools, None),
}
