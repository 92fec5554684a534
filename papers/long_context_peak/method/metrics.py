"""The four metrics of a long context, what bounds each of them, and what compression of the KV cache buys.

The closed forms are those of common/costs/roofline.py; here is what the paper does with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from common.costs.catalogue import Accelerator, Transformer
from common.costs.roofline import concurrency, decode_seconds, kv_bytes, prefill_seconds, switch_seconds

OUTPUT_TOKENS = 250  # of one answer; with it the reported decode seconds come out
RESOURCES = {  # what the paper calls it -> the field of an Accelerator
    "FLOP/s": "flops_per_s",
    "HBM bandwidth": "memory_bytes_per_s",
    "HBM size": "memory_bytes",
    "PCIe bandwidth": "host_bytes_per_s",
}
BOUND_BY = {"prefill": "FLOP/s", "decode": "HBM bandwidth", "users": "HBM size", "switch": "PCIe bandwidth"}
DIMENSIONS = ("layer", "head", "token", "hidden")


def four_metrics(
    model: Transformer,
    machine: Accelerator,
    context: int,
    output_tokens: int = OUTPUT_TOKENS,
    attention: str = "causal",
) -> dict[str, float]:
    """{'prefill', 'decode', 'users', 'switch'}: seconds until the first token, seconds of an answer of `output_tokens`
    for one user, users whose caches fit, seconds of a context switch.

    attention: a convention of `roofline.ATTENTION`. Raises CapacityError where the weights alone do not fit.
    """
    return {
        "prefill": prefill_seconds(model, machine, context, attention),
        "decode": decode_seconds(model, machine, context, output_tokens),
        "users": concurrency(model, machine.memory_bytes, context),
        "switch": switch_seconds(model, machine, context),
    }


def elasticities(
    model: Transformer, machine: Accelerator, context: int, factor: float = 2.0
) -> dict[str, dict[str, float]]:
    """metric -> resource -> log(metric with factor times the resource / metric) / log(factor).

    -1: twice the resource halves the seconds. 0: it changes nothing. Users are a fraction here, (M - weights) / KV,
    so that a whole number does not hide a change; theirs exceeds 1 because the weights are stored once.
    """

    def metrics(given: Accelerator) -> dict[str, float]:
        left = given.memory_bytes - model.weight_bytes
        return four_metrics(model, given, context) | {"users": left / kv_bytes(model, context)}

    before = metrics(machine)
    found: dict[str, dict[str, float]] = {name: {} for name in before}
    for resource, field in RESOURCES.items():
        more = type(getattr(machine, field))(factor * getattr(machine, field))
        after = metrics(replace(machine, **{field: more}))
        for name, value in before.items():
            found[name][resource] = math.log(after[name] / value) / math.log(factor)
    return found


def with_kv_heads(model: Transformer, kv_heads: int) -> Transformer:
    """The same model with another number of key-value heads, the weights of their projections counted.

    Raises ValueError for a number that does not divide the query heads.
    """
    width = model.attention_width  # the hidden size too, in the models of the catalogue
    more = 2 * model.layers * width * model.head_dim * (kv_heads - model.kv_heads)
    return replace(
        model, kv_heads=kv_heads, parameters=model.parameters + more, flop_parameters=model.flop_parameters + more
    )


def upcycled(model: Transformer, mlp_parameters: int, experts: int, active: int) -> tuple[Transformer, Transformer]:
    """A dense model whose MLPs became `experts` copies of which a token uses `active`: (as stored, as one token reads).

    mlp_parameters: of all layers together. The router is left out. The KV cache stays as it was.
    Raises ValueError unless 1 <= active <= experts.
    """
    if not 1 <= active <= experts:
        raise ValueError(f"a token uses between 1 and all of the {experts} experts, not {active}")
    flops = model.flop_parameters + (active - 1) * mlp_parameters
    stored, read = (model.parameters + (n - 1) * mlp_parameters for n in (experts, active))
    return tuple(replace(model, parameters=n, flop_parameters=flops) for n in (stored, read))  # type: ignore[return-value]


def minimal_products(levels: Sequence[float], target: float, count: int = len(DIMENSIONS)) -> list[tuple[float, ...]]:
    """Every way to reach `target` as a product of `count` factors of `levels` from which no factor can be lowered.

    levels: factors, 1 (nothing) and up. Sorted. Raises ValueError for a level below 1 or a target of 0 or less.
    """
    steps = sorted(set(levels))
    if not steps or steps[0] < 1 or target <= 0:
        raise ValueError(f"compression factors are 1 or more and the target positive, not {list(levels)} and {target}")
    lower = dict(zip(steps[1:], steps[:-1], strict=True))

    def minimal(factors: tuple[float, ...]) -> bool:
        product = math.prod(factors)
        return product >= target and all(f not in lower or product / f * lower[f] < target for f in factors)

    return [factors for factors in itertools.product(steps, repeat=count) if minimal(factors)]
