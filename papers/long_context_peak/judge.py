"""Tables and verdicts from what `infer` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact
from papers.long_context_peak.analysis import (
    Found,
    decode_above,
    decode_gate,
    fits,
    forecasts,
    line,
    measured_costs,
    over_rounds,
    predictions,
)
from papers.long_context_peak.method.metrics import BOUND_BY, RESOURCES

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

SIZES = ("all users", "half of them", "one user")  # memory of the servers, in the order of session.resident


def tables(cfg: DictConfig, page: Report, found: Found) -> None:
    """Every table of the page, and the notes above."""
    page.note(
        "Part A: closed forms at the published rates of accelerators. Part B: a small model with random weights on "
        f"this machine, {cfg.threads} thread(s), {cfg.clock} clock for laws; its last cache has "
        f"{found.facts['last_cache_bytes'] / 2**20:.4g} MiB ({found.facts['last_cache_source']})."
        if not cfg.machine
        else f"Part B was measured on {cfg.device} and is held against the catalogue's peak rates of {cfg.machine}."
    )
    disturbed = [text for law in found.rounds["law"].unique() if (text := found.contended(law))]
    if disturbed or found.facts["contended"]:
        page.note("**The machine was busy with something else**: " + "; ".join(disturbed or ["its calibration"]) + ".")
    closed_tables(cfg, page, found)
    measured_tables(cfg, page, found)
    report_costs(page, found.shapes[found.first])


def closed_tables(cfg: DictConfig, page: Report, found: Found) -> None:
    """Part A."""
    closed, own = found.closed, cfg.closed
    page.table("t1", closed["t1"], note="The example under each reading of what the page about the paper leaves open.")
    page.table("t2", closed["t2"], note="Rounded to four decimals; the cache in GB is exact.")
    at = f"{own.model} on {own.machine}"
    titles = {
        "hardware": (
            "The four metrics by accelerator",
            f"{own.model}; as few devices as hold its weights and one context of {own.example:,} tokens, as one. "
            f"Decode: {own.sessions.output_tokens} tokens.",
        ),
        "tensor_parallel": (
            "The four metrics by number of devices",
            f"{at}, N = 34e9. users_over_linear: over as many times the users of one device. One link to the host.",
        ),
        "attention_types": (
            "Attention and mixtures of experts",
            "Weights of the key and value projections counted. A mixture stores all experts and reads the active ones "
            "for one user's token. Empty: the weights do not fit.",
        ),
        "one_source": (
            "Claim c1: the metrics of each context if its KV cache had the bytes of the short one",
            "Three metrics are then those of the short context; prefill is not, since tokens make its operations.",
        ),
        "compression": (
            f"Ways to compress the KV cache of {own.long:,} tokens to that of {own.short:,}",
            "Factors by dimension, none of which can be lowered. Prefill stays what it is.",
        ),
        "elasticities": (
            "Elasticity of each metric to each resource",
            "log(metric at twice the resource / metric) / log 2; -1 halves the seconds. Users as a fraction.",
        ),
        "sessions": (
            "Sessions an hour by simulation with the closed forms",
            f"{at}; {own.sessions.users} users, {own.sessions.rounds} answers of {own.sessions.output_tokens} tokens "
            f"each, {own.sessions.think_seconds} s to think. The last three columns: busy seconds a session.",
        ),
    }
    for name, (title, note) in titles.items():
        page.table(name, closed[name], title, note)


def measured_tables(cfg: DictConfig, page: Report, found: Found) -> None:
    """Part B."""
    machine = {
        "GFLOP/s (product of matrices)": found.machine.flops_per_s / 1e9,
        "GB/s (sum over a buffer)": found.machine.memory_bytes_per_s / 1e9,
        "GB/s (to the store and back)": found.machine.host_bytes_per_s / 1e9,
        "MiB of the last cache": found.facts["last_cache_bytes"] / 2**20,
    }
    page.table(
        "machine", pd.DataFrame(list(machine.items()), columns=["rate", "value"]), "This machine", timing=["value"],
        note="Measured in the same run." if not cfg.machine else found.machine.source,
    )  # fmt: skip
    page.table("arena", found.arena, "Users admitted to a memory of fixed size until an allocation fails")
    page.table("identity", found.identity, "Texts of the server: users whose text is that of the largest memory")
    page.table(
        "laws", predictions(found), "Predicted and measured, size by size",
        "Predicted: the closed form with this machine's rates. torch.cat: a cache that grows by copying, for contrast.",
        timing=["predicted_s", "measured_s", "predicted_over_measured"],
    )  # fmt: skip
    page.table(
        "fits", fits(cfg, found), "The fitted laws", "Median over rounds with the range that covers it with 95%.",
        timing=["value", "low", "high", "expected"],
    )  # fmt: skip
    page.table(
        "served", session_table(cfg, found), "The real server, predicted by simulation",
        f"{cfg.session.users} users, {cfg.session.tokens} tokens read, {cfg.session.rounds} answers of "
        f"{cfg.session.output_tokens} tokens, {cfg.session.think_seconds} s to think. "
        + ", ".join(f"{k} {1e3 * v:.3g} ms" for k, v in vars(measured_costs(found)).items()) + ".",
        timing=["predicted_s", "measured_s", "low", "high", "predicted_over_measured"],
    )  # fmt: skip


def session_table(cfg: DictConfig, found: Found) -> pd.DataFrame:
    """Makespans, predicted and measured."""
    rows = []
    for resident, (forecast, makespans) in forecasts(cfg, found).items():
        measured = over_rounds(makespans)
        rows.append(
            {
                "resident": resident, "switches": forecast.switches, "predicted_s": forecast.makespan,
                "measured_s": measured.value, "low": measured.low, "high": measured.high,
                "predicted_over_measured": forecast.makespan / measured.value,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(cfg: DictConfig, page: Report, found: Found) -> None:
    """Measures every part of every claim."""
    example_claims(cfg, page, found)
    structure_claims(cfg, page, found)
    one_source_claim(cfg, page, found)
    switch_claim(cfg, page, found)
    bound_claim(cfg, page, found)
    ratios = {}
    for size, (resident, (forecast, makespans)) in zip(SIZES, forecasts(cfg, found).items(), strict=True):
        ratio = over_rounds(forecast.makespan / makespans)
        ratios[size] = ratio.value
        detail = f"{resident} resident, {forecast.switches} switches"
        page.measure("c9", f"memory for {size}: predicted makespan over measured", ratio, detail)
    wrong = int((found.identity["users"] - found.identity["same_text"]).sum())
    page.measure("c9", "texts that a swap has changed", exact(wrong, int(found.identity["users"].sum())))
    for size, value in ratios.items():
        page.metric(f"server, memory for {size}: predicted over measured", value)


def reading(found: Found, context: int, begins: str) -> pd.Series:
    """A row of table t1."""
    table = found.closed["t1"]
    rows = table[(table["context"] == context) & table["reading"].str.startswith(begins)]
    return rows.iloc[0]


def example_claims(cfg: DictConfig, page: Report, found: Found) -> None:
    """c2 to c4: the running example's numbers."""
    own = cfg.closed
    for context, name in ((own.example, "50K"), (own.short, "4K")):
        reported, causal = reading(found, context, "as reported"), reading(found, context, "causal")
        detail = f"causal count: {causal['prefill_s']:.4f} s"
        page.measure("c2", f"{name}: seconds, as inferred", exact(reported["prefill_s"]), detail)
        page.measure("c3", f"{name}: seconds of 250 tokens", exact(reported["decode_s"]))
        detail = f"with 80 decimal GB: {reported['users_80_gb']}"
        page.measure("c4", f"{name}: users", exact(reported["users_80_gib"]), detail)
    ratio = reading(found, own.example, "causal")["prefill_s"] / reading(found, own.short, "causal")["prefill_s"]
    page.measure("c2", "causal count: 50K over 4K", exact(ratio), f"{own.example / own.short:g} times the tokens")


def structure_claims(cfg: DictConfig, page: Report, found: Found) -> None:
    """c6 and c8: compression and devices."""
    own, table = cfg.closed, found.closed["compression"]
    page.measure("c6", "required reduction of the KV cache, 1M over 4K", exact(table["required"].iloc[0]))
    hits = table[table["product"] == table["required"]]
    page.measure("c6", "ways to reach exactly it along four dimensions", exact(len(hits), len(table)))
    differ = (hits["as_the_short_context"] != "decode, users, switch").sum()
    page.measure("c6", "of these, ways that leave decode, users or switch unlike 4K's", exact(differ, len(hits)))
    by_devices = found.closed["tensor_parallel"].set_index(["context", "devices"])["users"].loc[own.example]
    for fewer, more in ((1, 2), (2, 4), (4, 8)):
        detail = f"{by_devices[fewer]:.0f} to {by_devices[more]:.0f} users; linear would be 2"
        page.measure("c8", f"users on {more} devices over {fewer}", exact(by_devices[more] / by_devices[fewer]), detail)


def one_source_claim(cfg: DictConfig, page: Report, found: Found) -> None:
    """c1: with the KV bytes of 4K all but prefill is that of 4K; seconds of decode and switch follow the bytes."""
    table = found.closed["one_source"]
    others = table[table["metric"] != "prefill"]
    page.measure("c1", "closed form: values of decode, users and switch that differ from 4K's",
                 exact(int((~others["equal"]).sum()), len(others)))  # fmt: skip
    prefill = table[(table["metric"] == "prefill") & (table["context"] == cfg.closed.example)].iloc[0]
    page.measure(
        "c1", "closed form: prefill at 50K with the KV bytes of 4K, over prefill at 4K",
        exact(prefill["with_the_kv_of_short"] / prefill["at_short"]), "operations on tokens, not on cached bytes",
    )  # fmt: skip
    explained = line(found.seconds("switch", "kv_bytes", "wall", arm="switch"))[2]
    page.measure(
        "c1", "small model: variance of switch seconds explained by KV bytes", over_rounds(explained),
        found.contended("switch"),
    )  # fmt: skip
    if reason := decode_gate(cfg, found):
        page.not_testable("c1", reason)
        return
    explained = line(decode_above(cfg, found, found.first))[2]
    page.measure(
        "c1", "small model: variance of decode seconds explained by KV bytes", over_rounds(explained),
        found.contended("decode"),
    )  # fmt: skip


def switch_claim(cfg: DictConfig, page: Report, found: Found) -> None:
    """c5."""
    at = found.closed["t2"].set_index("context_tokens").loc[cfg.closed.example]
    detail = f"with decimal GB: {at['switch_20GBps_decimal']:.4f}"
    page.measure("c5", "closed form: seconds at 50K", exact(at["switch_20GBps_GiB"]), detail)
    seconds = found.seconds("switch", "kv_bytes", "wall", arm="switch")
    remark = found.contended("switch")
    page.measure("c5", "small model: variance explained by KV bytes", over_rounds(line(seconds)[2]), remark)
    step = found.seconds("switch", "kv_bytes", "wall", arm="decode step")
    ratio: Measured = over_rounds((seconds[step.columns[0]] / step.iloc[:, 0]).to_numpy())
    detail = f"{step.columns[0] / 2**20:.4g} MiB"
    page.measure("c5", "small model: a switch over a decode step", ratio, detail)


def bound_claim(cfg: DictConfig, page: Report, found: Found) -> None:
    """c7: each metric answers to its own resource; on the small model, decode to bytes and prefill to operations."""
    table = found.closed["elasticities"].set_index("metric")
    wrong = 0
    for metric, bound in BOUND_BY.items():
        for resource in RESOURCES:
            value = table.loc[metric, resource]
            if metric == "users" and resource == bound:
                wrong += not value >= 1
            else:
                wrong += value != (-1.0 if resource == bound else 0.0)
    page.measure("c7", "closed form: entries of the elasticity table that differ from the claim",
                 exact(wrong, len(BOUND_BY) * len(RESOURCES)))  # fmt: skip
    if len(found.shapes) < 2:
        page.not_testable("c7", "gate: one kind of attention was measured, the comparison needs two")
        return
    if reason := decode_gate(cfg, found):
        page.not_testable("c7", reason)
        return
    many, few = list(found.shapes)[:2]
    slopes = [line(decode_above(cfg, found, name))[1] * found.shapes[name].kv_bytes_per_token for name in (many, few)]
    bytes_ratio = found.shapes[many].kv_bytes_per_token / found.shapes[few].kv_bytes_per_token
    page.measure(
        "c7", "small model: decode seconds a token of context, MHA over GQA", over_rounds(slopes[0] / slopes[1]),
        f"bytes {bytes_ratio:g}, operations 1",
    )  # fmt: skip
    read = [
        found.seconds("prefill", "tokens", attention=name, arm="causal")[cfg.prefill.compared].to_numpy()
        for name in (many, few)
    ]
    page.measure(
        "c7", "small model: prefill seconds, MHA over GQA", over_rounds(read[0] / read[1]),
        "; ".join(filter(None, [f"{cfg.prefill.compared} tokens", found.contended("prefill")])),
    )  # fmt: skip
