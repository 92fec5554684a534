"""Tables, figures and verdicts from what `data` and `infer` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact, paired_t
from common.reporting.report import Report
from common.serving import catalogue
from papers.splitwise import plots
from papers.splitwise.designs import BASELINES, NAMES, counts_at_equal, published, scaled
from papers.splitwise.method.simulation import latency_model
from papers.splitwise.study import SLO

if TYPE_CHECKING:
    from omegaconf import DictConfig

Frames = dict[str, pd.DataFrame]
MODELS = {"bloom-176b": "bloom", "llama2-70b": "llama"}
GPUS = {"a100-80gb": "a100", "h100-80gb": "h100"}
SPLITS = [name for name in NAMES if name not in BASELINES]
RATIOS = [  # study, design, baseline, what the paper reports for the ratio of their largest rates
    ("iso-cost conv", "Splitwise-AA", "Baseline-H100", 1.4),
    ("iso-power conv", "Splitwise-AA", "Baseline-A100", 2.15),
    ("iso-power conv", "Splitwise-HA", "Baseline-H100", 1.18),
]


def report(cfg: DictConfig) -> None:
    """The whole `figures` stage."""
    page, study = Report(cfg), Study(cfg)
    if study.basis:
        page.note(
            "**The trace files were not there**: sizes are drawn from their published quantiles, and every claim that "
            "rests on them has the basis *analogue*."
        )
    page.note(
        f"Clusters and rates are 1/{cfg.scale} of the paper's, rounded to whole machines "
        f"(1/{cfg.provisioning.scale} for provisioning); traces of {cfg.seconds} s. "
        "Rates are given at full scale. Part B is a small Llama on this CPU."
    )
    published_tables(page, study)
    own_tables(page, study)
    plots.all_figures(page, study)
    closed_form_claims(page, study)
    cluster_claims(page, study)
    page.finish()


class Study:
    """The frames of the stages `data` and `infer`, and the questions that claims ask of them."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.data = {path.stem: pd.read_csv(path) for path in sorted((Path(cfg.artifacts) / "data").glob("*.csv"))}
        infer = Path(cfg.artifacts) / "infer"
        self.frames: Frames = {path.stem: pd.read_csv(path) for path in sorted(infer.glob("*.csv"))}
        self.timing = json.loads((infer / "ratios.json").read_text())
        sources = json.loads((Path(cfg.artifacts) / "data" / "sources.json").read_text())
        substitute = any(s["name"].startswith("azure_llm/") and s["origin"] == "embedded" for s in sources)
        self.basis = "analogue" if substitute else None
        self.seeds = [cfg.seed + seed for seed in cfg.trace_seeds]
        self.selection = cfg.seed + cfg.selection_seed

    def largest(self, study: str, name: str, seeds: list[int] | None = None) -> np.ndarray:
        """The largest feasible rates [seeds] of a design in a study, requests/s at full scale."""
        design, frame = scaled(study, self.cfg.scale)[name], self.frames["largest"]
        same = (frame["design"] == name) & (frame["machines"] == design.label) & (frame["trace"] == study.split()[1])
        return frame[same].set_index("seed")["largest_rate"].loc[self.seeds if seeds is None else seeds].to_numpy()

    def ratio(self, study: str, name: str, baseline: str) -> Measured | None:
        """Largest rate over the baseline's, paired by trace: t interval over seeds; None if the baseline has none."""
        ours, theirs = self.largest(study, name), self.largest(study, baseline)
        return paired_t(ours / theirs) if (theirs > 0).all() else None

    def chosen_ratio(self, study: str, name: str, baseline: str) -> float:
        """The same on the selection seed alone; 0 if the baseline meets the objectives at no rate."""
        ours, theirs = (self.largest(study, n, [self.selection])[0] for n in (name, baseline))
        return float(ours / theirs) if theirs > 0 else 0.0

    def least(self, trace: str, name: str, quantity: str, seeds: list[int]) -> np.ndarray:
        """Least cost or power [seeds] of the feasible clusters of a design; NaN where none was found."""
        frame = self.frames["provisioned"]
        same = frame[(frame["trace"] == trace) & (frame["design"] == name)]
        return same.groupby("seed")[quantity].min().reindex(seeds).to_numpy()

    @property
    def provisioning_seeds(self) -> list[int]:
        return self.seeds[: self.cfg.provisioning.seeds]


def published_tables(page: Report, study: Study) -> None:
    """Tables t1 to t7 of reported.yaml."""
    golden = study.frames["golden"].rename(columns={"prompt_tokens": "prompt_size", "output_tokens": "token_size"})
    columns = ["request_id", "prompt_size", "token_size", "response_time", "ttft", "tbt", "nth_token_overhead"]
    for table in ("t1", "t2"):
        page.table(table, golden.loc[golden["table"] == table, columns], note="Seconds.")
    page.table("t3", six_decimals(profile_table(study.data["profile"])))
    page.table("t4", six_decimals(pd.DataFrame([trace_row(name, study.data[name]) for name in ("code", "conv")])))
    rows = [[m.upper(), *(SLO[f"{m}_{q}"] for q in ("p50", "p90", "p99"))] for m in ("ttft", "tbt", "e2e")]
    page.table("t5", pd.DataFrame(rows, columns=["metric", "p50", "p90", "p99"]), note="Constants of the experiment.")
    designs = study.frames["designs"].copy()
    designs["feasible"] = [all(row[name] < limit for name, limit in SLO.items()) for _, row in designs.iterrows()]
    page.table(
        "t6",
        designs,
        note=f"Every design at 1/{study.cfg.scale} of its size and at the rate shown (full scale): "
        f"quantiles of slowdown, cost and power of the cluster as simulated. Seed {study.seeds[0]}.",
    )
    machines = {"A100": "dgx-a100", "H100": "dgx-h100", "H100 capped token machine": "dgx-h100-pcap"}
    rows = [[name, catalogue.hardware(m).cost, catalogue.hardware(m).power] for name, m in machines.items()]
    page.table("t7", pd.DataFrame(rows, columns=["machine", "cost_per_unit", "power_units"]))
    budgets = {
        "h100_kept": list(range(0, 41, 5)),
        "a100_iso_power": counts_at_equal("power"),
        "a100_iso_cost": counts_at_equal("cost"),
        "capped_h100_iso_power": counts_at_equal("hhcap"),
    }
    page.table("budgets", pd.DataFrame(budgets), "Machines that the rest of a budget of 40 H100 machines buys")


def profile_table(profile: pd.DataFrame) -> pd.DataFrame:
    """Table t3: median milliseconds by batched tokens."""
    table = pd.DataFrame({"batch_tokens": sorted(profile["batch_tokens"].unique())})
    for model, short in MODELS.items():
        for gpu, name in GPUS.items():
            rows = profile[(profile["model"] == model) & (profile["hardware"] == gpu)].set_index("batch_tokens")
            for phase in ("prompt", "token"):
                table[f"{short}_{name}_{phase}"] = rows[f"{phase}_time"].reindex(table["batch_tokens"]).to_numpy()
    return table


def six_decimals(table: pd.DataFrame) -> pd.DataFrame:
    """Fractions as text with six decimals, which the page's nine significant digits would cut for large numbers."""
    return table.map(lambda value: f"{value:.6f}" if isinstance(value, float) and np.isfinite(value) else value)


def trace_row(name: str, frame: pd.DataFrame) -> dict[str, Any]:
    """One row of table t4; a substitute has no span."""
    row: dict[str, Any] = {"trace": name, "requests": len(frame), "span_s": frame["arrival"].max()}
    for kind in ("prompt", "output"):
        tokens = frame[f"{kind}_tokens"]
        row |= {f"{kind}_mean": tokens.mean(), f"{kind}_std": tokens.std()}
        row |= {f"{kind}_p{round(100 * q)}": tokens.quantile(q) for q in (0.5, 0.9, 0.99)}
        row[f"{kind}_max"] = tokens.max()
    return row


def own_tables(page: Report, study: Study) -> None:
    """What the paper shows as figures, as tables of our own."""
    cfg, frames = study.cfg, study.frames
    page.table("latency", frames["rates"], "Slowdown against rate", "iso-power designs; rate at full scale.")
    page.table(
        "throughput",
        throughput_table(study),
        "Largest rate that meets all nine objectives",
        "Requests/s at full scale, mean over seeds; ratios paired by trace.",
    )
    page.table("ratios", ratio_table(study), "Reported and reproduced ratios of largest rates")
    least = [
        {"trace": trace, "design": name, "seed": seed, "least_cost": cost, "least_power": power}
        for (trace, name, seed), (cost, power) in frames["provisioned"]
        .groupby(["trace", "design", "seed"], sort=False)[["cost", "power"]].min().iterrows()
    ]  # fmt: skip
    page.table(
        "provisioning",
        pd.DataFrame(least),
        f"Cheapest and least-power clusters for {cfg.rate} requests/s",
        f"At 1/{cfg.provisioning.scale} scale; empty: none with up to {cfg.provisioning.most} machines a pool. "
        f"Seed {study.selection} chooses the kind of claim c3.",
    )
    page.table("activity", activity_table(frames["activity"]), "Share of busy time with few active tokens")
    page.table(
        "transfer",
        transfer_table(frames["transfer"]),
        f"KV-cache transfer in Splitwise-HA at {cfg.rate} requests/s",
        "Mean over seeds. Delay: first token to start of the decode task, queueing included.",
    )
    page.table(
        "mismatch",
        mismatch_table(study),
        "Designs provisioned for coding on the conversation trace",
        "Loss against the design provisioned for conversation, mixed pool on.",
    )
    if "ablations" in frames:
        page.table(
            "ablations",
            frames["ablations"].drop(columns=["seed"]),
            "One thing changed at a time: largest rate, iso-power conv",
        )
    identity = (
        frames["identity"]
        .groupby("mode", as_index=False)
        .agg(prompts=("prompt", "size"), same_text=("same_text", "sum"), differing_values=("differing_values", "sum"))
    )
    page.table("identity", identity, "The real split against one process")
    clocks = ["wall_ms", "cpu_ms", "contended"]
    page.table(
        "handover",
        frames["handover"],
        "The real split: milliseconds to the second token, by prompt length",
        timing=clocks,
    )
    page.table(
        "phases", frames["phases"], "The two phases of a small Llama on this CPU, 1 and 2 threads", timing=clocks
    )
    page.table(
        "cpu_cluster",
        frames["cpu_cluster"],
        "The simulator fed with these times: largest feasible requests/s",
        timing=["largest_rate"],
    )
    report_costs(page, from_checkpoint(Path(study.cfg.shared) / study.cfg.real.model, study.cfg.network))
    for name in ("Baseline-A100", "Baseline-H100", "Splitwise-AA", "Splitwise-HA"):
        page.metric(f"iso-power conv {name}: requests/s", float(study.largest("iso-power conv", name).mean()))


def throughput_table(study: Study) -> pd.DataFrame:
    """Largest rates by study and design, with the full-scale cost and power."""
    rows = []
    for name in study.cfg.studies:
        for design in scaled(name, study.cfg.scale).values():
            rates = study.largest(name, design.name)
            full = published()[name][design.name]
            row = {"study": name, "design": design.name, "machines": full.label, "simulated": design.label}
            row |= {
                "rate": rates.mean(),
                "least": rates.min(),
                "most": rates.max(),
                "cost": full.cost,
                "power": full.power,
            }
            for baseline in BASELINES:
                ratio = study.ratio(name, design.name, baseline)
                row[f"x_{baseline}"] = ratio.value if ratio else np.nan
            rows.append(row)
    return pd.DataFrame(rows)


def ratio_table(study: Study) -> pd.DataFrame:
    """The ratios that the paper gives a number for, and 2.35 and 1.76 whose pairs of designs are not established."""
    rows = []
    for name, design, baseline, told in RATIOS:
        rows.append(
            {
                "comparison": f"{name}: {design} / {baseline}",
                "reported": told,
                **_interval(study.ratio(name, design, baseline)),
            }
        )
    for name in study.cfg.studies:
        best = best_split(study, name)
        rows.append(
            {
                "comparison": f"{name}: best split ({best}) / Baseline-A100",
                "reported": 2.35,
                **_interval(study.ratio(name, best, "Baseline-A100")),
            }
        )
    name, design, baseline = closest_pair(study)
    rows.append(
        {
            "comparison": f"{name}: {design} / {baseline} (closest pair)",
            "reported": 1.76,
            **_interval(study.ratio(name, design, baseline)),
        }
    )
    return pd.DataFrame(rows)


def _interval(measured: Measured | None) -> dict[str, float]:
    if measured is None:
        return {"reproduced": np.nan, "low": np.nan, "high": np.nan}
    return {"reproduced": measured.value, "low": measured.low, "high": measured.high}


def best_split(study: Study, name: str) -> str:
    """The split design with the largest rate on the selection seed."""
    return max(SPLITS, key=lambda design: study.largest(name, design, [study.selection])[0])


def closest_pair(study: Study) -> tuple[str, str, str]:
    """(study, design, baseline) at equal cost closest to 1.76 x the rate at 0.85 x the power, on the selection seed."""

    def distance(triple: tuple[str, str, str]) -> float:
        name, design, baseline = triple
        return float(np.hypot(study.chosen_ratio(*triple) - 1.76, _full_ratio(name, design, baseline, "power") - 0.85))

    names = [name for name in study.cfg.studies if name.startswith("iso-cost")]
    return min(((n, d, b) for n in names for d in SPLITS for b in BASELINES), key=distance)


def _full_ratio(study: str, design: str, baseline: str, quantity: str) -> float:
    """Cost or power of a design over a baseline's at full scale."""
    return getattr(published()[study][design], quantity) / getattr(published()[study][baseline], quantity)


def activity_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares of busy time with one and with at most 20 active tokens, mean over seeds."""
    keys = ["trace", "design", "pool", "rate"]
    few = frame.assign(one=frame["share"] * (frame["tokens"] == 1), to_20=frame["share"] * (frame["tokens"] <= 20))
    by_seed = few.groupby([*keys, "seed"], as_index=False)[["one", "to_20"]].sum()
    return by_seed.groupby(keys, as_index=False)[["one", "to_20"]].mean()


def busy_share(study: Study, trace: str, most: int) -> np.ndarray:
    """Share of busy time [seeds] of Baseline-H100 with at most so many active tokens."""
    frame = study.frames["activity"]
    rows = frame[(frame["trace"] == trace) & (frame["design"] == "Baseline-H100") & (frame["rate"] == study.cfg.rate)]
    return np.array([rows.loc[(rows["seed"] == s) & (rows["tokens"] <= most), "share"].sum() for s in study.seeds])


def transfer_table(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.groupby(["trace", "link"], as_index=False, sort=False).mean(numeric_only=True).drop(columns=["seed"])


def losses(study: Study, name: str, scheduler: str) -> np.ndarray:
    """Share of the largest rate [seeds] that a design provisioned for coding loses on conversation."""
    frame = study.frames["mismatch"]
    rows = frame[(frame["design"] == name) & (frame["scheduler"] == scheduler)].set_index("seed")
    return 1 - rows["largest_rate"].loc[study.seeds].to_numpy() / study.largest("iso-power conv", name)


def mismatch_table(study: Study) -> pd.DataFrame:
    rows = []
    for (name, scheduler), group in study.frames["mismatch"].groupby(["design", "scheduler"], sort=False):
        loss = losses(study, str(name), str(scheduler)).mean()
        rows.append(
            {
                "design": name,
                "machines": group["machines"].iloc[0],
                "scheduler": scheduler,
                "rate": group["largest_rate"].mean(),
                "loss": loss,
            }
        )
    return pd.DataFrame(rows)


def closed_form_claims(page: Report, study: Study) -> None:
    """Claims that the released profile, the trace's mean and the catalogue decide (c1, c5 to c8); c1's real part."""
    table = profile_table(study.data["profile"]).set_index("batch_tokens")
    grow = {
        phase: table.filter(like=f"_{phase}").loc[8192] / table.filter(like=f"_{phase}").loc[1024]
        for phase in ("prompt", "token")
    }
    page.measure("c1", "prompt phase, 8192 over 1024 batched tokens", exact(grow["prompt"].min(), 4))
    page.measure("c1", "token phase, 8192 over 1024 batched tokens", exact(grow["token"].max(), 4))
    page.measure(
        "c1", "small Llama here, arithmetic intensity of prefill over decode", exact(study.timing["intensity"]["value"])
    )
    contrast = study.timing["prefill over decode"]
    page.measure(
        "c1",
        "small Llama here, tokens/s of prefill over decode",
        Measured(contrast["value"], contrast["low"], contrast["high"], contrast["n"]),
        "rounds as units" + ("; machine contended" if contrast["contended"] else ""),
    )

    def times(model: str, gpu: str) -> Any:
        return latency_model(model, gpu)

    for model, label in (("llama2-70b", "Llama2-70B"), ("bloom-176b", "BLOOM-176B")):
        a100, h100 = times(model, "a100-80gb"), times(model, "h100-80gb")
        for tokens in (1500, 1020):
            page.measure("c5", f"{label} TTFT, {tokens} tokens", exact(h100.prompt(tokens) / a100.prompt(tokens)))
        page.measure("c5", f"{label} TBT, batch 1", exact(h100.token(1) / a100.token(1)))
        if model == "llama2-70b":
            page.measure(
                "c5", "Llama2-70B TTFT against the paper's 0.51", exact(h100.prompt(1500) / a100.prompt(1500) - 0.51)
            )
            page.measure("c5", "Llama2-70B TBT against the paper's 0.70", exact(h100.token(1) / a100.token(1) - 0.70))
    for model, short in MODELS.items():
        for gpu, name in GPUS.items():
            speed = table.index.to_numpy() / table[f"{short}_{name}_prompt"]
            page.measure("c6", f"{model} on {gpu}", exact(int(speed.idxmax())), f"{1e3 * speed.max():.1f} tokens/s")
    served = catalogue.served_model("bloom-176b")
    tokens = catalogue.kv_capacity(catalogue.hardware("dgx-a100"), served) // served.kv_bytes
    mean = float((study.data["conv"]["prompt_tokens"] + study.data["conv"]["output_tokens"]).mean())
    page.measure(
        "c7",
        "mean conversation requests that fit one machine",
        exact(tokens / mean),
        f"{tokens} tokens / {mean:.1f}",
        basis=study.basis,
    )
    for name, gpu in (("A100", "a100-80gb"), ("H100", "h100-80gb")):
        latency = times("bloom-176b", gpu)
        page.measure(
            "c8",
            f"{name}: prompt of 1500 tokens over one decode iteration",
            exact(latency.prompt(1500) / latency.token(1)),
        )


def cluster_claims(page: Report, study: Study) -> None:
    """Claims that the simulated clusters decide."""
    cfg, basis = study.cfg, study.basis

    def judge(claim: str, part: str, measured: Measured | None, detail: str = "") -> None:
        if measured is None or not np.isfinite(measured.value):
            page.not_testable(
                claim, f"gate: {part}: one of the two clusters meets the objectives at no rate or size tried"
            )
        else:
            page.measure(claim, part, measured, detail, basis)

    judge("c2", "conversation: busy time with at most 20 active tokens", paired_t(busy_share(study, "conv", 20)))
    judge("c2", "coding: busy time with one active token", paired_t(busy_share(study, "code", 1)))
    ratio = study.ratio("iso-cost conv", "Splitwise-AA", "Baseline-H100")
    coding = study.ratio("iso-cost code", "Splitwise-AA", "Baseline-H100")
    judge(
        "c3", "iso-cost conv: Splitwise-AA over Baseline-H100", ratio, f"iso-cost code, not part of the claim: {coding}"
    )
    judge("c3", "iso-cost conv: Splitwise-AA over Baseline-H100, near 1.4", ratio)
    kind = cheapest_split(study)
    seeds = study.provisioning_seeds
    costs = study.least("conv", kind, "cost", seeds) / study.least("conv", "Baseline-H100", "cost", seeds)
    part = "conv: cost of the cheapest feasible split cluster over the cheapest Baseline-H100"
    judge("c3", part, _t(costs), f"{kind}, chosen on seed {study.selection}")
    for name in cfg.studies:
        best = best_split(study, name)
        judge("c4", f"{name}: best split design over Baseline-A100", study.ratio(name, best, "Baseline-A100"), best)
    transfer_claim(page, study)
    for trace in ("conv", "code"):
        power = study.least(trace, "Splitwise-HHcap", "power", seeds) / study.least(
            trace, "Baseline-H100", "power", seeds
        )
        judge("c10", f"{trace}: power of the least-power HHcap over the least-power Baseline-H100", _t(power))
    for name, design, baseline, _ in RATIOS[1:]:
        judge("c11", f"{name}: {design} over {baseline}", study.ratio(name, design, baseline))
    cost = _full_ratio("iso-power conv", "Splitwise-HA", "Baseline-H100", "cost")
    judge("c11", "iso-power conv: cost of Splitwise-HA over Baseline-H100", exact(cost))
    name, design, baseline = closest_pair(study)
    detail = f"{name}, {design} over {baseline}, chosen on seed {study.selection}"
    judge(
        "c12",
        "iso-cost: throughput ratio of the pair closest to (1.76, -15 percent power)",
        study.ratio(name, design, baseline),
        detail,
    )
    judge("c12", "iso-cost: power ratio of that pair", exact(_full_ratio(name, design, baseline, "power")))
    for name in ("Splitwise-HA", "Splitwise-HHcap"):
        mixed, fixed = (losses(study, name, scheduler) for scheduler in ("mixed_pool", "fixed_pools"))
        part = f"{name} provisioned for coding, on conversation: loss with the mixed pool minus loss without"
        judge("c13", part, _t(mixed - fixed), f"losses {mixed.mean():.3f} and {fixed.mean():.3f}")


def cheapest_split(study: Study) -> str:
    """The kind of split cluster with the least cost for conversation on the selection seed; the first if all fail."""
    costs = [study.least("conv", name, "cost", [study.selection])[0] for name in SPLITS]
    return SPLITS[int(np.argmin(np.nan_to_num(costs, nan=np.inf)))]


def _t(values: np.ndarray) -> Measured | None:
    return paired_t(values) if np.isfinite(values).all() else None


def transfer_claim(page: Report, study: Study) -> None:
    """c9: the simulated overhead of a transfer, and the real split's exactness."""
    frame = study.frames["transfer"]
    conv = (
        frame[frame["trace"] == "conv"]
        .pivot(index="seed", columns="link", values="e2e_overhead_percent")
        .loc[study.seeds]
    )
    serial, overlap = conv["serialized, 200 GiB/s"].to_numpy(), conv["overlapped, 200 GiB/s"].to_numpy()
    page.measure("c9", "end-to-end overhead, serialized transfer", paired_t(serial), "reported 3", study.basis)
    page.measure(
        "c9",
        "overlapped minus serialized overhead",
        paired_t(overlap, serial),
        f"overlapped {overlap.mean():.3f}; reported 0.8",
        study.basis,
    )
    identity = study.frames["identity"]
    page.measure(
        "c9",
        "real split over two processes: texts that differ",
        exact(int((~identity["same_text"]).sum()), len(identity)),
    )
    layerwise = identity[identity["mode"] == "layerwise"]
    page.measure(
        "c9",
        "real split: KV values that differ after layer-by-layer sending",
        exact(int(layerwise["differing_values"].sum()), len(layerwise)),
    )
