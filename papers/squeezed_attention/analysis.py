"""From rows to tables and verdicts. The unit is a context: its questions and tokens share one clustering.

Methods are compared at the budget that was measured, by interpolation between the sparsities of the sweep.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs.catalogue import Transformer, from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact, paired_bootstrap, sign_test

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

BUDGETS = {0.325: "Sq-70%", 0.225: "Sq-80%", 0.125: "Sq-90%"}  # of the paper, and what they are in t1
LABELS = {
    "all": "All KV", "window only": "window only", "squeezed": "Squeezed", "hierarchical": "Squeezed, two levels",
    "contiguous": "contiguous blocks", "per head": "threshold per head", "quest": "QUEST",
    "window attention": "SnapKV-like", "sink and recent": "sink and recent", "random": "random keys",
    "ideal": "ideal keys",
}  # fmt: skip


@dataclass
class Found:
    """What `train` and `infer` wrote. missed: task -> why it says nothing here, for a gate that was not met."""

    arms: pd.DataFrame
    heads: pd.DataFrame
    cache: pd.DataFrame
    exact: pd.DataFrame
    counts: pd.DataFrame
    times: pd.DataFrame
    training: dict[str, dict[str, float]]
    missed: dict[str, str]

    def of(self, task: str, method: str) -> pd.DataFrame:
        """The sweep of one method, a row a context and sparsity."""
        arms = self.arms
        return arms[(arms["sweep"] == "methods") & (arms["task"] == task) & (arms["method"] == method)]

    def mean(self, task: str, method: str, column: str) -> float:
        return float(self.of(task, method)[column].mean())


def load(cfg: DictConfig) -> Found:
    folder = Path(cfg.artifacts)
    names = ("arms", "heads", "cache", "exact", "counts", "times")
    frames = {name: pd.read_parquet(folder / "infer" / f"{name}.parquet") for name in names}
    files = {name: folder / "train" / name / "metrics.json" for name in ("recall", "text")}
    training = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    found = Found(**frames, training=training, missed={})
    accuracy = found.mean("recall", "all", "accuracy")
    if accuracy < cfg.gate.accuracy:
        found.missed["recall"] = (
            f"gate: recall accuracy with all keys is {accuracy:.3f}, needed {cfg.gate.accuracy} to 1"
        )
    worth = found.mean("text", "window only", "nll") - found.mean("text", "all", "nll")
    if worth < cfg.gate.context:
        found.missed["text"] = (
            f"gate: the context is worth {worth:.3f} nats a token to the text model, needed {cfg.gate.context} or more"
        )
    return found


def curve(of: pd.DataFrame, metric: str) -> np.ndarray:
    """[C, 2 k]: budgets and values of every context over the sweep of a method."""
    wide = of.pivot(index="context", columns="sparsity", values=["budget", metric])
    return wide.to_numpy(dtype=float)


def at_budget(rows: np.ndarray, budget: float) -> float:
    """The mean value at a measured budget, by interpolation over the mean budgets; a curve of one point is that point.

    A budget below all of them takes the smallest: that happens in resamples only, see `reaches`.
    """
    budgets, values = np.split(rows.mean(0), 2)
    order = np.argsort(budgets)
    return float(np.interp(budget, budgets[order], values[order]))


def reaches(rows: np.ndarray, budget: float) -> bool:
    """Whether a sweep gets down to a budget, so that nothing must be extrapolated."""
    return bool(np.split(rows.mean(0), 2)[0].min() <= budget)


def difference(found: Found, task: str, metric: str, one: str, other: str, budget: float, seed: int) -> Measured:
    """Of two methods at a measured budget, contexts resampled in pairs."""
    left, right = (curve(found.of(task, method), metric) for method in (one, other))
    width = left.shape[1]

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return at_budget(a[:, :width], budget) - at_budget(b, budget)

    return paired_bootstrap(left, right, gap, seed=seed)


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """Tables t1 and t3, methods at equal budgets, the ablations, the cache, comparisons, bytes."""
    for reason in found.missed.values():
        report.note(reason)
    report.table(
        "t1", _methods(found), note="Budgets: keys and values read of the context, centroids (or pages' bounds) "
        f"included. measured: mean over look-ups, layers and heads; the window of {cfg.window} tokens is part of it. "
        "nominal: 1 - sparsity + half of the share of centroids. NLL in nats.",
    )  # fmt: skip
    report.table(
        "equal_budget", _equal(found), "Methods at equal measured budgets",
        note="By interpolation over the sweep of sparsities.",
    )  # fmt: skip
    report.table(
        "clusters", _ablation(found), "Number of centroids and seed of K-means",
        note=f"Sparsity {cfg.ablation.sparsity}. share: centroids per key. vectors: centroids compared in a look-up, "
        "mean over layers and heads.",
    )  # fmt: skip
    report.table("variants", _variants(found), "Variants at a measured budget of 0.125")
    lists = found.cache.groupby("lists", sort=False)[["budget", "accuracy", "both"]].mean().reset_index()
    report.table(
        "lists", lists, "Lists of keys for heads of keys, or for each query head that shares one",
        note=f"Recall through SqueezedCache, sparsity {cfg.ablation.sparsity}, {found.cache['context'].nunique()} "
        "contexts. Lists of their own are all read, so that a shared key counts twice.",
    )  # fmt: skip
    counts = found.counts.drop(columns="trial").groupby("keys").mean().reset_index()
    report.table(
        "comparisons", counts, "Centroids compared a query, planted keys",
        note="mass: captured softmax weight; one and two levels keep a tenth of the keys, the tree one finest cluster "
        "(kept_tree keys).",
    )  # fmt: skip
    times = found.times.drop(columns=["low", "high", "rounds", "contended"])
    measured = ["clustering_s", "full_ms", "squeezed_ms", "speedup", "break_even_steps"]
    report.table(
        "t3", times, timing=measured,
        note=f"A decode step of one layer, {cfg.timing.heads} heads of {cfg.timing.head_dim}, {cfg.timing.dtype}. "
        f"Clustering: {cfg.timing.iterations} steps of Lloyd. break_even_steps: decode steps that save its time.",
    )  # fmt: skip
    from kernels.roofline import attention_table

    report.table(
        "bytes", attention_table(kept=1 - cfg.ablation.sparsity, clusters=cfg.clusters),
        "What a decode step of one layer must read, and the bound of the speed-up",
        note="Closed form of the kernels' costs, fp16, a list for each head of keys; times at the ceilings of an H200 "
        "(4.3 TB/s, 788 TFLOP/s). Of each head's keys a tenth is kept. measured: on a GPU, by `make bench-gpu`.",
    )  # fmt: skip
    model = from_checkpoint(Path(cfg.artifacts) / "train" / "recall", cfg.network)

    def reads(arm: str) -> Transformer:
        """The recall model, with the cache that the arm reads; its centroids may bring that above a whole one."""
        method, _, sparsity = arm.rpartition(" ")
        of = found.of("recall", method)
        return replace(model, kv_share=min(float(of[of["sparsity"] == float(sparsity)]["budget"].mean()), 1.0))

    report_costs(report, reads)
    models = [{"model": name} | of for name, of in found.training.items()]
    report.table("models", pd.DataFrame(models), "The two models", timing=["seconds"] if models else [])


def _methods(found: Found) -> pd.DataFrame:
    rows = []
    for method, label in LABELS.items():
        for sparsity in sorted(found.of("recall", method)["sparsity"].unique()):
            recall, text = (of[of["sparsity"] == sparsity] for of in (found.of(t, method) for t in ("recall", "text")))
            nominal = None
            if method == "all":
                nominal = 1.0
            elif method == "squeezed":
                nominal = 1 - sparsity + recall["share"].mean() / 2
            rows.append(
                {
                    "config": label, "sparsity": sparsity, "nominal budget": nominal,
                    "recall budget": recall["budget"].mean(), "recall accuracy": recall["accuracy"].mean(),
                    "two look-ups": recall["both"].mean(), "recall NLL": recall["nll"].mean(),
                    "recall weight": recall["mass"].mean(), "ideal keys found": recall["found"].mean(),
                    "code budget": text["budget"].mean(), "code NLL": text["nll"].mean(),
                    "code weight": text["mass"].mean(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _equal(found: Found) -> pd.DataFrame:
    columns = {
        "recall accuracy": ("recall", "accuracy"), "two look-ups": ("recall", "both"), "recall NLL": ("recall", "nll"),
        "recall weight": ("recall", "mass"), "code NLL": ("text", "nll"), "code weight": ("text", "mass"),
    }  # fmt: skip
    rows = []
    for method, label in LABELS.items():
        if method in ("all", "window only"):
            continue
        for budget in BUDGETS:
            values = {
                name: _or_nan(curve(found.of(task, method), metric), budget) for name, (task, metric) in columns.items()
            }
            rows.append({"method": label, "budget": budget} | values)
    return pd.DataFrame(rows)


def _or_nan(rows: np.ndarray, budget: float) -> float:
    """NaN where the sweep does not get down to the budget."""
    return at_budget(rows, budget) if reaches(rows, budget) else float("nan")


def _ablation(found: Found) -> pd.DataFrame:
    arms = found.arms
    usual = arms[(arms["sweep"] == "methods") & arms["method"].isin(["squeezed", "hierarchical"])]
    other = arms[arms["sweep"].isin(["clusters", "seeds"])]
    rows = pd.concat([usual[usual["sparsity"].isin(other["sparsity"].unique())], other])
    rows = rows[rows["task"] != "planted"]
    keys = ["task", "method", "share", "cluster_seed"]
    means = rows.groupby(keys)[["budget", "kept", "vectors", "mass", "accuracy", "nll"]].mean().reset_index()
    return means.assign(method=means["method"].map(LABELS))


def _variants(found: Found) -> pd.DataFrame:
    rows = []
    for task in ("recall", "text"):
        for method in ("squeezed", "per head", "contiguous", "hierarchical", "ideal"):
            of = found.of(task, method)
            values = {metric: _or_nan(curve(of, metric), 0.125) for metric in ("accuracy", "nll", "mass", "vectors")}
            rows.append({"task": task, "variant": LABELS[method]} | values)
    return pd.DataFrame(rows).rename(columns={"mass": "weight", "vectors": "vectors compared"})


def growth(counts: np.ndarray, keys: np.ndarray) -> float:
    """Exponent e of counts ~ keys^e, least squares over the logarithms."""
    return float(np.polyfit(np.log(keys), np.log(counts), 1)[0])


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim, or says why it cannot be; parts on a task that passed its gate stay shown."""
    both = ("recall", "text")
    for claim, tasks in {"c1": both, "c2": ("recall",), "c5": (*both, "planted"), "c7": both}.items():
        reasons = {task: found.missed[task] for task in tasks if task in found.missed}
        for task in set(tasks) - set(reasons):
            if beyond := _beyond(found, claim, task):
                reasons[task] = beyond
        if reasons:
            report.not_testable(claim, "; ".join(reasons[task] for task in tasks if task in reasons))
        _quality(cfg, report, found, claim, [task for task in tasks if task not in reasons])
    _speed(cfg, report, found)
    _comparisons(cfg, report, found)
    gaps = found.exact
    report.measure("c6", "largest difference of an attention output in float32", exact(gaps["gap"].max(), len(gaps)))
    report.measure("c6", "generated texts that differ", exact((~gaps["same"]).sum(), len(gaps)))
    own = found.cache.dropna(subset="gap")
    report.metric("largest difference of a log-probability, cache and masked attention", own["gap"].max())
    for task, metric in (("recall", "accuracy"), ("text", "nll")):
        report.metric(f"{task} {metric}, all KV", found.mean(task, "all", metric))


def _beyond(found: Found, claim: str, task: str) -> str:
    """Why a sweep says nothing about the claim's smallest budget: a method that does not get down to it."""
    methods = {"c1": ["squeezed"], "c5": ["squeezed", "contiguous"], "c7": ["squeezed", "per head"]}
    usual = ["squeezed", "quest", "window attention", "sink and recent", "random"]
    least = 0.325 if claim == "c1" else 0.125
    above = [m for m in methods.get(claim, usual) if not reaches(curve(found.of(task, m), "mass"), least)]
    return f"budget: no sparsity of {LABELS[above[0]]} on {task} reads as little as {least}" if above else ""


def _quality(cfg: DictConfig, report: Report, found: Found, claim: str, tasks: list[str]) -> None:
    """The parts of a claim about quality that these tasks can judge."""

    def gap(task: str, metric: str, one: str, other: str, budget: float) -> Measured:
        return difference(found, task, metric, one, other, budget, cfg.seed)

    for task in tasks:
        if claim == "c1":
            metric, unit = ("accuracy", "accuracy") if task == "recall" else ("nll", "NLL")
            measured = gap(task, metric, "squeezed", "all", 0.325)
            report.measure("c1", f"{task} {unit} at budget 0.325 minus all KV", measured)
        elif claim == "c2":
            names = {"all KV": "all", "QUEST": "quest", "window attention": "window attention"}
            names |= {"sink and recent": "sink and recent", "random keys": "random"}
            for name, method in names.items():
                measured = gap(task, "accuracy", "squeezed", method, 0.125)
                report.measure("c2", f"recall accuracy at budget 0.125 minus {name}", measured)
        elif claim == "c5":
            name = "planted keys" if task == "planted" else task
            for budget in [0.125] if task == "planted" else BUDGETS:
                measured = gap(task, "mass", "squeezed", "contiguous", budget)
                report.measure(
                    "c5", f"{name}, captured weight at budget {budget} minus contiguous", measured,
                    f"sign test over contexts: p = {signs(found, task, budget):.1e}",
                )  # fmt: skip
        else:
            measured = gap(task, "nll", "squeezed", "per head", 0.125)
            report.measure("c7", f"{task} NLL at budget 0.125, global minus per head", measured)


def signs(found: Found, task: str, budget: float) -> float:
    """p of the sign test over contexts that K-means captures more than blocks, each context on its own curve."""
    sides = []
    for method in ("squeezed", "contiguous"):
        rows = curve(found.of(task, method), "mass")
        sides.append([at_budget(row[None], budget) for row in rows])
    return sign_test(*sides)


def _speed(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claims c3 and c8."""
    from kernels import tree_attention
    from kernels.roofline import MODELS, squeezed_cost

    query_heads, heads, hidden, _ = MODELS["Llama-2-7B"]
    keys, head_dim = 131072, hidden // query_heads
    full = tree_attention.cost(1, query_heads, heads, 1, keys - 1, head_dim)
    squeezed = squeezed_cost(query_heads, heads, keys, head_dim, 1 - cfg.ablation.sparsity, cfg.clusters)
    report.measure(
        "c3", "bytes of full attention over squeezed, decode step, Llama-2-7B, 128K keys, 90%",
        exact(full.bytes / squeezed.bytes),
    )  # fmt: skip
    longest = found.times.loc[found.times["keys"].idxmax()]
    ratio = Measured(longest["speedup"], longest["low"], longest["high"], int(longest["rounds"]))
    detail = f"{longest['keys']} keys" + ("; contended" if longest["contended"] else "")
    report.measure("c3", "time of full attention over squeezed, decode step, longest context", ratio, detail)
    if cfg.device != "cuda":
        report.not_testable(
            "c3", f"hardware: the claim is about kernels on a GPU; {full.bytes / squeezed.bytes:.2f}x fewer bytes by "
            f"the kernels' costs, and on this processor {ratio.value:.2f}x at {longest['keys']} keys",
        )  # fmt: skip
    steps = longest["break_even_steps"]
    report.not_testable(
        "c8", f"report only: 24 minutes are of a 7B model at 128K tokens on hardware that is not named. Here "
        f"{longest['keys']} keys of one layer take {longest['clustering_s']:.2f} s, "
        + (f"which {steps:.0f} decode steps save" if pd.notna(steps) else "and a decode step is not faster"),
    )  # fmt: skip


def _comparisons(cfg: DictConfig, report: Report, found: Found) -> None:
    """Claim c4, with intervals over trials."""
    lengths = np.array(sorted(found.counts["keys"].unique()), dtype=float)
    wide = {
        name: found.counts.pivot(index="trial", columns="keys", values=name).to_numpy(dtype=float)
        for name in ("one_level", "two_levels", "tree")
    }

    def exponent(name: str) -> Measured:
        rows = wide[name]
        return paired_bootstrap(rows, rows, lambda a, _: growth(a.mean(0), lengths), seed=cfg.seed)

    report.measure("c4", "growth exponent of one level", exponent("one_level"))
    last = paired_bootstrap(
        wide["two_levels"][:, -1], wide["one_level"][:, -1], lambda a, b: float(a.sum() / b.sum()), seed=cfg.seed
    )
    report.measure("c4", "two levels over one level, longest context", last)
    two = growth(wide["two_levels"].mean(0), lengths)
    report.measure(
        "c4", "growth exponent of a tree of fixed branching", exponent("tree"),
        f"the paper's own two levels grow with exponent {two:.2f}",
    )  # fmt: skip
