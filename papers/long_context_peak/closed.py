"""Part A: the tables that follow from closed forms alone. Every function returns rows; nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from common.costs import catalogue
from common.costs.catalogue import Accelerator, Transformer, accelerator, tensor_parallel, transformer
from common.costs.roofline import (
    CapacityError,
    compressed,
    concurrency,
    decode_seconds,
    kv_bytes,
    prefill_seconds,
    switch_seconds,
)
from common.serving.catalogue import GIB
from papers.long_context_peak.method.metrics import (
    DIMENSIONS,
    OUTPUT_TOKENS,
    elasticities,
    four_metrics,
    minimal_products,
    upcycled,
    with_kv_heads,
)
from papers.long_context_peak.method.session import session_costs, simulate

if TYPE_CHECKING:
    from omegaconf import DictConfig

Row = dict[str, Any]
VOCABULARY = 64_000  # of Yi-34B (its config.json): the output head is no MLP
REPORTED_N = 34_000_000_000  # the paper rounds the parameters, and 2 bytes of each make its 68 GB
REPORTED_WIDTH_HEADS = 52  # of 128: width 6656, with which the reported prefill comes out
SWITCH_BYTES_PER_S = 20e9  # the effective rate that the reported switch comes out with


def rounded(model: Transformer) -> Transformer:
    """The model with the parameters that the paper calculates with."""
    return replace(model, parameters=REPORTED_N, flop_parameters=REPORTED_N)


def narrow(model: Transformer) -> Transformer:
    """As `rounded`, with the width that the reported prefill comes out with; its KV cache is not the model's."""
    return replace(rounded(model), heads=REPORTED_WIDTH_HEADS, kv_heads=4)


def tables(cfg: DictConfig) -> dict[str, list[Row]]:
    """All tables of part A by name."""
    own = cfg.closed
    model, machine = transformer(own.model), accelerator(own.machine)
    return {
        "t1": running_example(model, machine, own),
        "t2": recomputed(model, machine, own),
        "hardware": hardware(model, own),
        "tensor_parallel": parallel(model, machine, own),
        "attention_types": attention_types(model, machine, own),
        "one_source": one_source(rounded(model), machine, own),
        "compression": compression(rounded(model), machine, own),
        "elasticities": [
            {"metric": metric, **by_resource}
            for metric, by_resource in elasticities(model, machine, own.example).items()
        ],
        "sessions": sessions(model, machine, own),
        "context": over_context(model, machine, own),
    }


def running_example(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """Table t1 under each reading of what the paper left open, side by side."""
    paper = rounded(model)
    readings = {
        "as reported (inferred): N = 34e9, c = 1, width 6656": (narrow(model), "halved", paper),
        "causal: N = 34e9, c = 2, width 7168": (paper, "causal", paper),
        "no causal saving: N = 34e9, c = 4, width 7168": (paper, "full", paper),
        f"exact: N = {model.parameters:,}, c = 2": (model, "causal", model),
    }
    return [
        {
            "context": context,
            "reading": name,
            "prefill_s": prefill_seconds(for_prefill, machine, context, convention),
            "decode_s": decode_seconds(held, machine, context, OUTPUT_TOKENS),
            "users_80_gib": concurrency(held, machine.memory_bytes, context),
            "users_80_gb": concurrency(held, machine.label_bytes, context),
        }
        for context in (own.short, own.example)
        for name, (for_prefill, convention, held) in readings.items()
    ]


def recomputed(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """Table t2, rounded to the four decimals that it is printed with (a cache in GB is exact)."""
    paper = rounded(model)
    conventions = {"c0": "linear", "c1_d7168": "halved", "c2_d7168": "causal", "c4_d7168": "full"}
    links = {"decimal": SWITCH_BYTES_PER_S, "GiB": 20 * GIB}
    rows = []
    for context in own.contexts:
        kv = kv_bytes(paper, context)
        row = {
            **{f"prefill_{k}": prefill_seconds(paper, machine, context, c) for k, c in conventions.items()},
            "prefill_c1_d6656": prefill_seconds(narrow(model), machine, context, "halved"),
            "decode_250tok": decode_seconds(paper, machine, context, OUTPUT_TOKENS),
            **{
                f"switch_20GBps_{name}": switch_seconds(paper, replace(machine, host_bytes_per_s=rate), context)
                for name, rate in links.items()
            },
        }
        users = {
            f"users_{count}gpu": concurrency(paper, tensor_parallel(machine, count).memory_bytes, context)
            for count in own.devices
        }
        sizes = {"context_tokens": context, "KV_GB_decimal": kv / 1e9, "KV_GiB": round(kv / GIB, 4)}
        rows.append(sizes | {name: round(value, 4) for name, value in row.items()} | users)
    return rows


def users_or_none(model: Transformer, machine: Accelerator, context: int) -> int | None:
    """None where the weights do not fit."""
    try:
        return concurrency(model, machine.memory_bytes, context)
    except CapacityError:
        return None


def least_devices(model: Transformer, one: Accelerator, context: int) -> int:
    """How many devices hold the weights and one context."""
    return math.ceil((model.weight_bytes + kv_bytes(model, context)) / one.memory_bytes)


def hardware(model: Transformer, own: DictConfig) -> list[Row]:
    """The four metrics on every accelerator of the catalogue: as few devices as hold one context of the example."""
    rows = []
    for name in catalogue.names("accelerators"):
        one = accelerator(name)
        count = least_devices(model, one, own.example)
        for context in (own.short, own.example):
            rows.append(
                {
                    "accelerator": name, "tflops": one.flops_per_s / 1e12, "memory_gib": one.memory_bytes / GIB,
                    "memory_tb_per_s": one.memory_bytes_per_s / 1e12, "host_gb_per_s": one.host_bytes_per_s / 1e9,
                    "devices": count, "context": context,
                    **four_metrics(model, tensor_parallel(one, count), context),
                }
            )  # fmt: skip
    return rows


def parallel(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """The four metrics by number of devices, and users over those that a linear law would give."""
    rows = []
    for context in (own.short, own.example, own.long):
        alone = concurrency(rounded(model), machine.memory_bytes, context)
        for count in own.devices:
            found = four_metrics(rounded(model), tensor_parallel(machine, count), context)
            over_linear = found["users"] / (count * alone) if alone else None
            rows.append({"context": context, "devices": count, **found, "users_over_linear": over_linear})
    return rows


def attention_types(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """More and fewer key-value heads, and a mixture of experts made of the same model."""
    width = model.attention_width
    attention = 2 * model.layers * width * (width + model.kv_heads * model.head_dim)
    mlp = model.flop_parameters - attention - width * VOCABULARY
    types = {f"GQA, {model.kv_heads} heads (the model)": (model, model)}
    for name, heads in (("MHA", model.heads), ("MQA", 1)):
        types[f"{name}, {heads} head{'s' * (heads > 1)}"] = (with_kv_heads(model, heads),) * 2
    experts = own.experts
    mixture = upcycled(model, mlp, experts.count, experts.active)
    types[f"GQA, upcycled to {experts.count} experts, {experts.active} active"] = mixture
    rows = []
    for count in (min(own.devices), max(own.devices)):
        together = tensor_parallel(machine, count)
        for name, (stored, read) in types.items():
            row: Row = {
                "devices": count, "type": name, "weights_gb": stored.weight_bytes / 1e9,
                "kv_bytes_per_token": stored.kv_bytes_per_token, "kv_gb": kv_bytes(stored, own.example) / 1e9,
            }  # fmt: skip
            for context in (own.short, own.example):
                row[f"users_{context}"] = users_or_none(stored, together, context)
            fits = row[f"users_{own.short}"] is not None
            row["prefill_s"] = prefill_seconds(read, together, own.example) if fits else None
            row["decode_s"] = decode_seconds(read, together, own.example, OUTPUT_TOKENS) if fits else None
            row["switch_s"] = switch_seconds(stored, together, own.example)
            rows.append(row)
    return rows


def one_source(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """Claim c1: the metrics of each context if its KV cache had the bytes of the short one."""
    at_short = four_metrics(model, machine, own.short)
    rows = []
    for context in own.contexts:
        if context > own.short:
            cut = compressed(model, token=own.short / context)
            same = four_metrics(cut, machine, context)
            full = four_metrics(model, machine, context)
            rows += [
                {
                    "context": context, "metric": name, "at_short": at_short[name], "at_context": full[name],
                    "with_the_kv_of_short": same[name], "equal": same[name] == at_short[name],
                }
                for name in at_short
            ]  # fmt: skip
    return rows


def compression(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """Which factors along the four dimensions make the KV cache of the long context as small as the short one's."""
    required = kv_bytes(model, own.long) / kv_bytes(model, own.short)
    at_short = four_metrics(model, machine, own.short)
    rows = []
    for factors in minimal_products(list(own.levels), required):
        by_dimension = dict(zip(DIMENSIONS, factors, strict=True))
        small = compressed(model, **{name: 1 / factor for name, factor in by_dimension.items()})
        found = four_metrics(small, machine, own.long)
        better = [name for name in ("decode", "users", "switch") if found[name] == at_short[name]]
        rows.append(
            by_dimension
            | {"product": math.prod(factors), "required": required, "kv_gb": kv_bytes(small, own.long) / 1e9}
            | found
            | {"as_the_short_context": ", ".join(better) or "none is equal: smaller than needed"}
        )
    return rows


def sessions(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """Sessions an hour of users who share one device or all of them, by simulation with the closed forms' seconds."""
    told, rows = own.sessions, []
    for count in (min(own.devices), max(own.devices)):
        together = tensor_parallel(machine, count)
        for context in own.contexts:
            try:
                costs, resident = session_costs(model, together, context, told.output_tokens)
            except CapacityError:
                continue
            found = simulate(costs, told.users, told.rounds, told.think_seconds, resident)
            rows.append(
                {
                    "devices": count, "context": context, "users": told.users, "resident": resident,
                    "switches": found.switches, "makespan_s": found.makespan, "sessions_per_hour": found.per_hour,
                    "bound_per_hour": found.per_hour_bound,
                    "prefill_s": found.busy("prefill") / told.users, "decode_s": found.busy("decode") / told.users,
                    "switch_s": found.busy("out", "into") / told.users,
                }
            )  # fmt: skip
    return rows


def over_context(model: Transformer, machine: Accelerator, own: DictConfig) -> list[Row]:
    """The four metrics between the shortest and the longest context, for the figure."""
    steps = 48
    ratio = (own.long / own.short) ** (1 / steps)
    return [
        {"devices": count, "context": context, **four_metrics(model, tensor_parallel(machine, count), context)}
        for count in own.devices
        for context in (round(own.short * ratio**i) for i in range(steps + 1))
    ]
