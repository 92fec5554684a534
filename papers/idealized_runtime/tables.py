"""The tables: t1 to t5 as far as their sources are there, and our own."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs import idealized_runtime as ir
from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import per_answer, report_costs
from papers.idealized_runtime import analysis, published
from papers.idealized_runtime.method import along_layers, leave_one_out
from papers.idealized_runtime.own import grid
from papers.idealized_runtime.published import RUNS

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report
    from papers.idealized_runtime.analysis import Found
    from papers.idealized_runtime.method import Profile, Shape

Frame = pd.DataFrame


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """All of them. Columns of measured times are named as such."""
    if found.absent:
        report.note(f"**{found.absent[0].upper()}{found.absent[1:]}.** What rests on them is not testable here.")
    report.note(f"Own models: {cfg.dtype}, random weights, {cfg.clock} seconds, medians of {cfg.rounds} rounds.")
    _reported(report, found)
    _beside_helm(report, found)
    _own(cfg, report, found)
    _architectures(cfg, report, found)
    if found.records is not None:
        report.table(
            "apis", market_table(cfg, found), "Nine APIs: mean seconds over the same problems",
            f"Sizes at providers; in_market: the three that are judged. X: {_words(cfg, 'X')}. Y: {_words(cfg, 'Y')}. "
            f"Z: {_words(cfg, 'Z')}.",
            timing=["raw_ms", "denoised_ms", "idealized_ms", "raw_rank", "denoised_rank", "idealized_rank"],
        )  # fmt: skip
        report.table(
            "tradeoff", tradeoff_table(cfg, found), "Six reasoners: accuracy against idealized runtime",
            "kept: share of resampled sets of problems in which the model is on the front.",
            timing=["idealized_ms", "low_ms", "high_ms", "usd_per_million_correct", "on_front", "kept"],
        )  # fmt: skip
        folder = Path(cfg.reasoners)
        report_costs(
            report, lambda arm: from_checkpoint(folder / f"reasoner_{re.split('[@ ]', arm)[0]}", cfg.network)
        )  # an arm is "size@provider" or "size weights"
    if found.scenarios is not None:
        report.table("fronts", fronts_table(found.scenarios), "Released table: models on the fronts of its scenarios")


def _words(cfg: DictConfig, provider: str) -> str:
    one = cfg.api.providers[provider]
    forward = "fused forward" if one.lean else "plain forward"
    return f"{one.threads} thread{'s'[: one.threads > 1]}, {forward}{', noisy neighbour' if one.neighbour else ''}"


def _reported(report: Report, found: Found) -> None:
    told = {table.id: table for table in report.reported.tables}
    models = [str(row[0]) for row in told["t1"].rows]
    report.table("t1", published.constants_table(found.constants, models, (1, 256, 512, 1024, 1536, 1920)))
    if found.a100 is not None and found.v100 is not None:
        report.table("t2", published.refit_table(found.a100))
        report.table("t3", published.v100_table(found.v100))
    report.table("t4", published.denoised_table(found.apis))
    if found.scenarios is not None:
        pairs = published.pair_table(found.scenarios)
        report.table("t5", pairs.drop(columns="pairs").round(4), note=f"{pairs['pairs'].iloc[0]} pairs; 4 decimals.")


def _beside_helm(report: Report, found: Found) -> None:
    """HELM's constants beside our refit, and our denoising of released calls beside HELM's denoised constants."""
    if found.a100 is not None:
        rows = []
        for name, run in RUNS.items():
            if run.helm is None:
                continue
            ours, theirs = found.a100[name].profile, ir.profile_of(found.constants, run.helm)
            off = {p: 100 * (ours.prompt[p] / theirs.prompt[p] - 1) for p in ours.prompt if p in theirs.prompt}
            worst = max(off, key=lambda p: abs(off[p]))
            rows.append(
                {
                    "shape": name, "g_refit": ours.per_output_token, "g_HELM": theirs.per_output_token,
                    "F_largest_difference_percent": off[worst], "at_prompt": worst,
                    "F_mean_difference_percent": float(np.mean(np.abs(list(off.values())))),
                }
            )  # fmt: skip
        note = "HELM's F comes from later runs for some shapes, and both are rounded to 1 ms."
        report.table("helm", pd.DataFrame(rows), "HELM's constants against the released logs", note)
    if found.calls is not None:
        rows = []
        for name, calls in found.calls.groupby("model"):
            pair = {"ours": ir.denoise(calls), "HELM": ir.profile_of(found.apis, str(name))}
            for whose, one in pair.items():
                first = {f"F({p})": one.prompt[p] for p in (512, 1024, 1536)}
                rows.append({"api": name, "from": whose, "overhead": one.overhead, "g": one.per_output_token, **first})
        note = "HELM's come from other calls; the faster of two days' trials leaves much of the contention in."
        report.table("denoised", pd.DataFrame(rows), "Released API calls denoised by us, beside HELM's constants", note)


def _own(cfg: DictConfig, report: Report, found: Found) -> None:
    """Part B."""
    own = own_table(cfg, found)
    timing = [column for column in own.columns if column not in ("model", "parameters")]
    report.table("own", own, "Own models: profiles, and errors on held-out cells", timing=timing)
    both = [analysis.own_quality(cfg, found)]
    if found.cells is not None:
        both.append(analysis.public_quality(found.cells))
    report.table(
        "cheap", pd.concat(both)[["model", "where", "saving", "cheap_error", "r_squared"]],
        "The cheap procedure against the full sweep",
        "saving: seconds of one generation a cell, full over cheap. cheap_error: median over the cells left out.",
        timing=["saving", "cheap_error", "r_squared"],
    )  # fmt: skip
    report.table(
        "stacks", stacks_table(found.stacks), "One architecture on several software stacks, wall clock",
        "ratio: g over the reference's, median over rounds.", timing=["g_ms", "F_ms", "ratio", "low", "high"],
    )  # fmt: skip
    report.table("layers", layers_table(cfg, found), "More layers of one width", timing=["g_ms", "F_ms"])
    ratio = analysis.doubling(cfg, found)
    *_, few, many = cfg.layers.counts
    report.note(f"g of {many} layers over {few}, hidden size {cfg.layers.hidden}: {ratio}.")
    report.metric("g of twice the layers", ratio.value)


def _architectures(cfg: DictConfig, report: Report, found: Found) -> None:
    """Proxies, the closed form and costs, for the released shapes and the own models."""
    proxies, taus = proxy_tables(cfg, found)
    report.table(
        "proxies", proxies, f"One query of {cfg.query.prompt} and {cfg.query.output} tokens",
        timing=["idealized_ms", "TFLOPs_per_accelerator"],
    )  # fmt: skip
    report.table("taus", taus, "Kendall tau of naive proxies with idealized runtime", timing=["tau"])
    report.table(
        "closed_form", closed_form(found), "Closed form: errors on the model that was left out of its fit",
        "g = bP/(BW n) + c l and F(p) = max(bP/(BW n), FLOPs(p)/(R n)) + c l; three numbers a stack. Ours, after a "
        "later version of the paper that was not at hand.", timing=["g_error_percent", "F_error_percent"],
    )  # fmt: skip
    note = f"At {cfg.usd_per_hour} USD an hour and {cfg.watts} W an accelerator: units, as the prices were not seen."
    report.table("cost_aware", costs_table(cfg, found), "Cost-aware variants of the same query, HELM's constants", note)


def own_table(cfg: DictConfig, found: Found) -> Frame:
    """Table B1: one row an own model."""
    rows, (full, held_out) = [], grid(cfg)
    of = analysis.own_quality(cfg, found).set_index("model")
    for name in found.shapes:
        calls, profile = found.rounds[found.rounds["model"] == name], found.profiles[name]
        cells = found.cells_of(name, cfg.clock).set_index(ir.CELL)["seconds"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # F may fall
            one = ir.fit(cells.loc[full].reset_index())
            fastest = calls.groupby(ir.CELL)[cfg.clock].min().rename("seconds").loc[full]
            best = ir.fit(fastest.reset_index()).r_squared
        slopes = [np.polyfit(of.index.get_level_values(1), of, 1)[0] for _, of in fastest.groupby(level=0)]
        spread = calls.groupby(ir.CELL)[cfg.clock].agg(lambda x: (x - x.median()).abs().median() / x.median())
        p, o = np.array(held_out).T
        rows.append(
            {
                "model": name, "parameters": int(calls["parameters"].iloc[0]), "g_ms": 1e3 * one.slope,
                **{f"F({p})_ms": 1e3 * seconds for p, seconds in profile.prompt.items() if p > 1},
                "R2": one.r_squared, "R2_of_fastest_rounds": best,
                "g_over_prompts_max_over_min": max(slopes) / min(slopes),
                "intercept_over_g": one.intercept / one.slope,
                "held_out_MAPE_percent": 100 * of.loc[name, "held_out_mean"],
                "other_output_max_percent": 100 * of.loc[name, "other_output"],
                "other_prompt_max_percent": 100 * of.loc[name, "other_prompt"],
                "measured_over_idealized": float(cells.loc[held_out].sum() / profile.seconds(p, o).sum()),
                "wall_over_cpu": float(calls["wall"].sum() / calls["cpu"].sum()),
                "spread_percent": 100 * float(spread.median()), "contended": float(calls["contended"].mean()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def proxy_tables(cfg: DictConfig, found: Found) -> tuple[Frame, Frame]:
    """(a row a model: parameters, operations, idealized runtime of one query; Kendall tau of each proxy)."""
    from scipy import stats

    p, o = cfg.query.prompt, cfg.query.output
    rows = []
    for name, (group, shape, profile) in analysis.architectures(found).items():
        seconds, flops = float(profile.seconds(p, o)), shape.query_flops(p, o)
        rows.append(
            {
                "group": group, "model": name, "parameters": shape.parameters, "accelerators": shape.accelerators,
                "TFLOPs": flops / 1e12, "idealized_ms": 1e3 * seconds,
                "TFLOPs_per_accelerator": flops / seconds / shape.accelerators / 1e12,
            }
        )  # fmt: skip
    table, taus = pd.DataFrame(rows), []
    for group, of in table.groupby("group", sort=False):
        runtimes = {"idealized seconds": of["idealized_ms"]}
        runtimes["idealized accelerator-seconds"] = of["idealized_ms"] * of["accelerators"]
        for against, values in runtimes.items():
            for proxy in ("parameters", "TFLOPs"):
                tau = float(stats.kendalltau(of[proxy], values).statistic)
                taus.append({"group": group, "proxy": proxy, "against": against, "models": len(of), "tau": tau})
    return table, pd.DataFrame(taus)


def closed_form(found: Found) -> Frame:
    """Leave-one-model-out errors of the closed form on each stack with four models or more."""
    rows = []
    stacks: dict[str, dict[str, tuple[Shape, Profile]]] = {}
    for name, (group, shape, profile) in analysis.architectures(found).items():
        label = group if group == "A100" else f"here, {name.split()[0]}"  # fused and plain forward are two stacks
        stacks.setdefault(label, {})[name] = (shape, profile)
    for group, of in stacks.items():
        if len(of) < 4:
            continue
        left_out = leave_one_out({n: s for n, (s, _) in of.items()}, {n: p for n, (_, p) in of.items()})
        rows += [
            {"stack": group, "model": n, "g_error_percent": 100 * e["g"], "F_error_percent": 100 * e["F"]}
            for n, e in left_out.items()
        ]
    return pd.DataFrame(rows, columns=["stack", "model", "g_error_percent", "F_error_percent"])


def costs_table(cfg: DictConfig, found: Found) -> Frame:
    """The same query in seconds, accelerator-seconds, dollars and joules, with ranks by seconds and by dollars."""
    rows = []
    for run in RUNS.values():
        if run.helm is not None:
            n = run.shape.accelerators
            seconds = float(ir.profile_of(found.constants, run.helm).seconds(cfg.query.prompt, cfg.query.output))
            usd, joules = ir.dollars(seconds, cfg.usd_per_hour, n), ir.joules(seconds, cfg.watts, n)
            row = {"model": run.helm, "accelerators": n, "seconds": seconds, "accelerator_seconds": n * seconds}
            rows.append(row | {"usd": float(usd), "joules": float(joules)})
    table = pd.DataFrame(rows)
    ranks = table[["seconds", "usd"]].rank().astype(int)
    return table.assign(rank_by_seconds=ranks["seconds"], rank_by_usd=ranks["usd"])


def stacks_table(stacks: Frame) -> Frame:
    """g and F of each stack by wall clock; g over the reference's with the range of rounds that covers the median."""
    from common.metrics.timing import Timings

    p = int(stacks.groupby("prompt_tokens")["output_tokens"].nunique().idxmax())  # the one with every o
    longest = int(stacks["prompt_tokens"].max())
    first = stacks[(stacks["prompt_tokens"] == longest) & (stacks["output_tokens"] == 1)]
    per_token = {str(name): analysis.token_seconds(of, p, "wall") for name, of in stacks.groupby("model", sort=False)}
    rows = []
    for name, seconds in per_token.items():
        ratio = Timings(wall=per_token).ratio(name, "reference")
        whole = first.loc[first["model"] == name, "wall"].median()
        row = {"stack": name, "g_ms": 1e3 * float(np.median(seconds)), "F_at": longest, "F_ms": 1e3 * float(whole)}
        rows.append(row | {"ratio": ratio.value, "low": ratio.low, "high": ratio.high})
    return pd.DataFrame(rows)


def layers_table(cfg: DictConfig, found: Found) -> Frame:
    """Measured profiles, and two predictions of the deepest: the line through the others, and so many times one."""
    of, p = analysis.by_layers(cfg, found), max(cfg.layers.prompts)
    one, few, many = cfg.layers.counts
    line, times = along_layers(of[one], of[few], (one, few), many), many / few
    seconds = {f"{n} layers, measured": (of[n].per_output_token, of[n].prompt[p]) for n in of}
    seconds[f"{many} layers, on the line through {one} and {few}"] = (line.per_output_token, line.prompt[p])
    seconds[f"{many} layers, {times:g} times {few}"] = (times * of[few].per_output_token, times * of[few].prompt[p])
    return pd.DataFrame([{"what": what, "g_ms": 1e3 * g, "F_ms": 1e3 * first} for what, (g, first) in seconds.items()])


def market_table(cfg: DictConfig, found: Found) -> Frame:
    """Mean runtimes and ranks of the nine APIs."""
    of = analysis.market(found)
    rows = pd.DataFrame({"api": of.apis})
    judged = {f"{size}@{provider}" for size, provider in cfg.api.market.items()}
    rows["in_market"] = rows["api"].isin(judged)
    rows["output_tokens"] = rows["api"].map(found.records.groupby("arm")["output_tokens"].mean())
    for name in ("raw", "denoised", "idealized"):
        rows[f"{name}_ms"] = 1e3 * getattr(of, name).mean(axis=0)
        rows[f"{name}_rank"] = rows[f"{name}_ms"].rank()
    return rows


def tradeoff_table(cfg: DictConfig, found: Found) -> Frame:
    """A row a task and model: accuracy, idealized runtime and price of a right answer with intervals, and the front."""
    rows = []
    for task, of in analysis.answers(found).items():
        front, count = analysis.front_of(of), len(next(iter(of.values()))[0])
        kept = np.mean(analysis.resampled(cfg, count, lambda draw, of=of: analysis.front_of(of, draw)), axis=0)
        for i, arm in enumerate(of):
            own = found.records[(found.records["task"] == task) & (found.records["arm"] == arm)]
            clock = found.profiles[f"reasoner_{arm.split()[0]}"].seconds
            priced = per_answer(own, clock, cfg.usd_per_hour).iloc[0]
            rows.append(
                {
                    "task": task, "model": arm, "accuracy": priced["accuracy"],
                    "idealized_ms": 1e3 * priced["idealized_seconds"], "low_ms": 1e3 * priced["idealized_seconds_low"],
                    "high_ms": 1e3 * priced["idealized_seconds_high"],
                    "usd_per_million_correct": 1e6 * priced["usd_per_correct"], "on_front": bool(front[i]),
                    "kept": float(kept[i]),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def fronts_table(scenarios: Frame) -> Frame:
    """A row a model of the released table: scenarios, on how many fronts, how often alone, mean idealized seconds."""
    rows = published.fronts(scenarios)
    sizes = rows["scenario"].map(rows.groupby("scenario")["on_front"].sum())
    table = (
        rows.assign(alone=rows["on_front"] & (sizes == 1))
        .groupby("model")
        .agg(
            scenarios=("scenario", "size"), on_front=("on_front", "sum"), alone_on_front=("alone", "sum"),
            mean_exact_match=("exact_match", "mean"), mean_idealized_s=("idealized", "mean"),
        )
    )  # fmt: skip
    table["share_on_front"] = table["on_front"] / table["scenarios"]
    return table.sort_values("mean_idealized_s").reset_index()
