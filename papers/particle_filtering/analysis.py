"""From the records of all arms to tables and verdicts.

`runs` has a row for each arm, seed and problem. What independent samples would have given (self-consistency, BoN, WBoN)
is read off the stored pool, for every N at once, without new generation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.frontier import cost_ratios
from common.metrics.intervals import Measured, bootstrap_mean, exact, paired_bootstrap, paired_t
from common.metrics.pools import best_of_k, pass_at_k
from papers.particle_filtering.toy import ToyLanguageModel, starts_with_zero

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from common.reporting.report import Report

METHODS = {
    "greedy": "greedy", "sc": "self-consistency", "bon": "BoN", "wbon": "WBoN", "beam": "beam search", "dvts": "DVTS",
    "pf": "particle filter",
}  # fmt: skip
CHAIN_ONLY = "chain only"


@dataclass(frozen=True)
class Found:
    """runs: see above, with the rows of samples added. samples: the pools of the base policy. quality: of the reward
    models of `train`. gates: why a policy cannot carry a comparison, by "size task"; empty if it can."""

    runs: pd.DataFrame
    samples: pd.DataFrame
    nodes: pd.DataFrame
    toy: pd.DataFrame
    quality: pd.DataFrame
    gates: dict[str, str | None]


def load(cfg: DictConfig) -> Found:
    """Everything that `train` and `infer` wrote."""
    import pandas as pd

    from common.generation import records

    folder = Path(cfg.artifacts) / "infer"
    runs, samples = pd.read_parquet(folder / "runs.parquet"), records.read(folder / "records.parquet")
    rows = [row for arm in _pools(runs) for row in _from_pool(cfg, arm, samples)]
    searches = runs[runs["method"] != "pool"]
    few = searches[(searches["method"] == "beam") & (searches["n"] <= cfg.width) & (searches["panel"] == "headline")]
    runs = pd.concat([searches, few.assign(method="dvts"), pd.DataFrame(rows)], ignore_index=True)
    pools = samples[samples["arm"].str.startswith("headline base pool")]
    return Found(
        runs.astype({"correct": float}), pools, pd.read_parquet(folder / "nodes.parquet"),
        pd.read_parquet(folder / "toy.parquet"), pd.read_csv(Path(cfg.artifacts) / "train" / "quality.csv"),
        json.loads((folder / "gates.json").read_text()),
    )  # fmt: skip


def _pools(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    columns = ["arm", "panel", "task", "seed", "size", "n"]
    yield from runs[runs["method"] == "pool"][columns].drop_duplicates().to_dict("records")


def _from_pool(cfg: DictConfig, arm: dict[str, Any], samples: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of what N of the pool's samples give: BoN in closed form, votes averaged over the disjoint blocks of N.

    One particle and one beam are one sample, so they have the pool's mean.
    """
    of = samples[(samples["arm"] == arm["arm"]) & (samples["seed"] == arm["seed"]) & (samples["task"] == arm["task"])]
    widths = list((cfg.main if arm["task"] == cfg.main.task else cfg.second).widths)
    widths = widths if arm["panel"] == "headline" else [arm["n"]]
    for problem, group in of.groupby("problem_id"):
        answers, scores = group["answer"].tolist(), group["score"].to_numpy()
        correct, tokens = group["correct"].to_numpy(dtype=float), group["output_tokens"].mean()
        head = {k: arm[k] for k in ("panel", "task", "seed", "size")} | {"problem_id": problem}
        for n in widths:
            blocks = [slice(i, i + n) for i in range(0, len(answers) - n + 1, n)]
            found = {
                "bon": best_of_k(scores, correct, n),
                "sc": np.mean([_voted(answers[b], np.ones(n), correct[b]) for b in blocks]),
                "wbon": np.mean([_voted(answers[b], scores[b], correct[b]) for b in blocks]),
                "pass": pass_at_k(len(answers), int(correct.sum()), n),
            }
            if n == 1:
                found |= dict.fromkeys(("pf", "beam", "dvts"), float(correct.mean()))
            for method, value in found.items():
                passes = 0 if method in ("sc", "pass") else n
                yield head | {"method": method, "n": n, "correct": value, "tokens": n * tokens, "passes": passes}


def _voted(answers: Sequence[str | None], weights: np.ndarray, correct: np.ndarray) -> float:
    """Whether the answer of the largest total weight is right, the first seen of equals; 0 if nobody answered."""
    totals: dict[str, float] = {}
    right: dict[str, float] = {}
    for answer, weight, mark in zip(answers, weights, correct, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
            right[answer] = max(right.get(answer, 0.0), mark)
    return right[max(totals, key=totals.__getitem__)] if totals else 0.0


def rows(runs: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows with these values. Raises KeyError if there are none."""
    found = runs
    for column, value in where.items():
        found = found[found[column] == value]
    if found.empty:
        raise KeyError(f"no arm with {where}")
    return found


def by_problem(runs: pd.DataFrame, problems: int | None = None, **where: Any) -> np.ndarray:
    """Accuracy on each problem, averaged over seeds [problems]; problems: the first so many."""
    accuracy = rows(runs, **where).groupby("problem_id")["correct"].mean().sort_index().to_numpy()
    return accuracy[:problems]


def curve(runs: pd.DataFrame, task: str, method: str, widths: Sequence[int]) -> np.ndarray:
    """Accuracy of the base policy by problem and N [problems, N]."""
    return np.stack([by_problem(runs, panel="headline", task=task, method=method, n=n) for n in widths], axis=1)


def tables(cfg: DictConfig, report: Report, found: Found) -> None:
    """t1 to t3, the curves (figure 4), and the ablations (figures 5 to 7)."""
    import pandas as pd

    own = cfg.policies
    report.table(
        "t1", pd.DataFrame(_main_rows(cfg, found.runs)),
        note=f"std is over sampling seeds. The small and the large policy: {own.problems} problems, N={own.n}, one "
        "seed; on the second task greedy alone.",
    )  # fmt: skip
    if len(cfg.judges.seeds):
        report.table(
            "t2", pd.DataFrame(_transfer_rows(cfg, found)),
            note=f"{cfg.main.task}, N={cfg.judges.n}, {cfg.judges.problems} problems, mean over "
            f"{len(cfg.judges.seeds)} sampling seeds; the reward model saw chains alone.",
        )  # fmt: skip
    if len(cfg.judges.shares) and len(cfg.judges.seeds):
        report.table("judges", pd.DataFrame(_judge_rows(cfg, found)), "Reward models by labelled problems (figure 5a)")
    report.table(
        "reward", pd.DataFrame(_reward_rows(found.samples)), "The shared reward model on finished answers of the test",
        "Within a problem: mean over problems with right and wrong samples. Search needs this order.",
    )  # fmt: skip
    report.table("t3", pd.DataFrame(_size_rows(cfg, found.runs)), note=f"Task {cfg.main.task}.")
    report.table("curves", pd.DataFrame(_curve_rows(cfg, found.runs)), "Accuracy by budget (figure 4)")
    report.table("ratios", pd.DataFrame(_ratio_rows(cfg, found.runs)), "N of another method over N of PF (claim c1)")
    if len(cfg.noise.sigmas):
        report.table(
            "noise", pd.DataFrame(_noise_rows(cfg, found.runs)), "An oracle with noise on its logit (claim c4)"
        )
    report.table("ablations", pd.DataFrame(_ablation_rows(cfg, found.runs)), "Ablations (figures 5b, 5c, 6 and 7)")
    folder = Path(cfg.reasoners)
    report_costs(report, lambda arm: from_checkpoint(folder / f"reasoner_{arm.split()[1]}", cfg.network))


def _mean_std(frame: pd.DataFrame) -> tuple[float, float]:
    means = frame.groupby("seed")["correct"].mean()
    return float(means.mean()), float(means.std(ddof=1)) if len(means) > 1 else float("nan")


def _main_rows(cfg: DictConfig, runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for size in ("small", "base", "large"):
        panel, n = ("headline", max(cfg.main.widths)) if size == "base" else ("policies", cfg.policies.n)
        for method, name in METHODS.items():
            at = {"panel": panel, "size": size, "method": method, "n": 1 if method == "greedy" else n}
            of = rows(runs[runs["weights"].isna()], task=cfg.main.task, **at)
            mean, std = _mean_std(of)
            row = {
                "policy": size, "method": name, "N": at["n"], "problems": of["problem_id"].nunique(),
                "seeds": of["seed"].nunique(), cfg.main.task: mean, "std": std,
            }  # fmt: skip
            if cfg.second.problems:
                has = size == "base" or method == "greedy"
                at["n"] = 1 if method == "greedy" else max(cfg.second.widths)
                mean = _mean_std(rows(runs, task=cfg.second.task, **at))[0] if has else float("nan")
                row |= {f"{cfg.second.task}, N={max(cfg.second.widths)}": mean}
            yield row


def _transfer_rows(cfg: DictConfig, found: Found) -> Iterator[dict[str, Any]]:
    for method in ("greedy", "bon", "sc", "beam", "pf"):
        yield {"method": METHODS[method], cfg.main.task: _transferred(cfg, found.runs, method).mean()}


def _transferred(cfg: DictConfig, runs: pd.DataFrame, method: str) -> np.ndarray:
    """Accuracy by problem with the reward model of chains on the main task; greedy and the vote ask none."""
    if method not in ("greedy", "sc"):
        return _judged(runs, method, CHAIN_ONLY, 0)
    at = {"panel": "headline", "task": cfg.main.task, "size": "base", "n": 1 if method == "greedy" else cfg.judges.n}
    return by_problem(runs, cfg.judges.problems, method=method, **at)


def _reward_rows(samples: pd.DataFrame) -> Iterator[dict[str, Any]]:
    from sklearn.metrics import roc_auc_score

    for task, of in samples.groupby("task"):
        groups = [g for _, g in of.groupby(["seed", "problem_id"]) if g["correct"].nunique() == 2]
        within = [roc_auc_score(g["correct"], g["score"]) for g in groups]
        yield {
            "task": task, "samples": len(of), "right": of["correct"].mean(),
            "AUROC over all samples": roc_auc_score(of["correct"], of["score"]) if groups else float("nan"),
            "AUROC within a problem": float(np.mean(within)) if within else float("nan"),
            "problems with both": len({g["problem_id"].iloc[0] for g in groups}),
        }  # fmt: skip


def _judged(runs: pd.DataFrame, method: str, name: str, seed: int) -> np.ndarray:
    """Accuracy by problem with another reward model than the shared one of the task."""
    return by_problem(runs, panel="judges", method=method, reward=f"{name}/{seed}")


def _judge_rows(cfg: DictConfig, found: Found) -> Iterator[dict[str, Any]]:
    for name in (f"{share:g}" for share in cfg.judges.shares):
        of = found.quality[found.quality["name"].map("{:g}".format) == name]
        pf = [_judged(found.runs, "pf", name, seed).mean() for seed in cfg.judges.seeds]
        yield {
            "labelled problems": f"{float(name):.0%}",
            "problems": int(of["problems"].mean()), "AUROC": of["auroc"].mean(), "Brier": of["brier"].mean(),
            f"PF, N={cfg.judges.n}": float(np.mean(pf)),
            "std": float(np.std(pf, ddof=1)),
        }  # fmt: skip


def _size_rows(cfg: DictConfig, runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    own = cfg.policies
    for size in ("small", "base", "large"):
        at = {"task": cfg.main.task, "size": size}
        if size == "base":
            panel, n = "headline", own.n if own.n in cfg.main.widths else max(cfg.main.widths)
        else:
            panel, n = "policies", own.n
        plain = runs[runs["weights"].isna()]
        greedy = by_problem(plain, own.problems, panel=panel, method="greedy", **at)
        pf = by_problem(plain, own.problems, panel=panel, method="pf", n=n, **at)
        for method, values in (("greedy", greedy), (f"particle filter, N={n}", pf)):
            mean = bootstrap_mean(values, cfg.seed, cfg.resamples)
            yield {
                "policy": size, "method": method, "accuracy": mean.value, "low": mean.low, "high": mean.high,
                "problems": mean.n,
            }  # fmt: skip


def _curve_rows(cfg: DictConfig, runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for of in (cfg.main, cfg.second):
        for method in [m for m in (*METHODS, "pass") if of.problems]:
            for n in [1] if method == "greedy" else of.widths:
                frame = rows(runs, panel="headline", task=of.task, method=method, n=n, size="base")
                mean = bootstrap_mean(frame.groupby("problem_id")["correct"].mean(), cfg.seed, cfg.resamples)
                yield {
                    "task": of.task, "method": METHODS.get(method, "any sample right"), "N": n, "accuracy": mean.value,
                    "low": mean.low, "high": mean.high, "std over seeds": _mean_std(frame)[1],
                    "tokens": frame["tokens"].mean(), "reward model passes": frame["passes"].mean(),
                    "seeds": frame["seed"].nunique(), "problems": mean.n,
                }  # fmt: skip


def ratio_of_budgets(widths: Sequence[int]) -> Any:
    """Statistic of (accuracies of PF, of another method) [problems, N]: median over levels of other N / PF's N.

    1 where the curves share no level above their first point: nothing was gained, so nothing speaks for either.
    """

    costs = [int(n) for n in widths]

    def statistic(ours: np.ndarray, other: np.ndarray) -> float:
        _, ratios = cost_ratios(costs, ours.mean(0), costs, other.mean(0))
        return float(np.median(ratios)) if len(ratios) else 1.0

    return statistic


def _ratio_rows(cfg: DictConfig, runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for of in (cfg.main, cfg.second):
        for method in ("dvts", "beam", "wbon") if of.problems else ():
            ours, other = (curve(runs, of.task, m, of.widths) for m in ("pf", method))
            median = paired_bootstrap(ours, other, ratio_of_budgets(of.widths), cfg.seed, cfg.resamples)
            levels, ratios = cost_ratios(of.widths, ours.mean(0), of.widths, other.mean(0))
            yield {
                "task": of.task, "method": METHODS[method], "levels": len(levels), "median": median.value,
                "low": median.low, "high": median.high,
                "smallest": ratios.min() if len(ratios) else float("nan"),
                "largest": ratios.max() if len(ratios) else float("nan"),
            }  # fmt: skip


def _noise_rows(cfg: DictConfig, runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for sigma in cfg.noise.sigmas:
        for method in ("bon", "beam", "dvts", "pf"):
            frame = rows(runs, panel="noise", method=method, sigma=float(sigma))
            mean = bootstrap_mean(frame["correct"], cfg.seed, cfg.resamples)
            first = frame[frame["first_right"].astype(bool)]
            yield {
                "sigma": float(sigma), "method": METHODS[method], "accuracy": mean.value, "low": mean.low,
                "high": mean.high, "right among the final candidates": frame["right_in_pool"].mean(),
                "first right step survives": first["survived"].astype(float).mean() if len(first) else float("nan"),
            }  # fmt: skip


def _ablation_rows(cfg: DictConfig, runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    def row(ablation: str, setting: str, task: str, n: int, frame: pd.DataFrame) -> dict[str, Any]:
        mean = bootstrap_mean(frame.groupby("problem_id")["correct"].mean(), cfg.seed, cfg.resamples)
        return {
            "ablation": ablation, "setting": setting, "task": task, "N": n, "accuracy": mean.value, "low": mean.low,
            "high": mean.high, "tokens": frame["tokens"].mean(), "problems": mean.n,
        }  # fmt: skip

    own = cfg.aggregation
    asked = [(cfg.main.task, n) for n in own.widths]
    asked += [(cfg.second.task, own.second)] if cfg.second.problems and own.second else []
    for task, n in asked:
        for key in ("last", *own.kinds):
            at = (
                {"panel": "headline", "seed": cfg.seed + cfg.main.seeds[0]}
                if key == "last"
                else {"panel": "aggregation"}
            )
            at |= {} if key == "last" else {"key": key}
            yield row("aggregation", key, task, n, rows(runs, task=task, n=n, method="pf", **at))
    for temperature in sorted({*cfg.temperatures.grid, cfg.temperature}):
        at = {"panel": "temperature", "temperature": temperature}
        if temperature == cfg.temperature:
            at = {"panel": "headline", "seed": cfg.seed + cfg.main.seeds[0]}
        n = cfg.temperatures.n
        frame = rows(runs, task=cfg.main.task, n=n, method="pf", **at)
        yield row("temperature", f"{temperature:g}", cfg.main.task, n, frame)
    for n, times in cfg.repeats.pairs:
        for method, name in (("pg", "iterations"), ("chains", "chains")):
            frame = rows(runs, panel="repeats", n=n, repeats=times, method=method if times > 1 else "pf")
            yield row(f"{name} at N x {name} = {n * times}", f"{n} x {times}", cfg.main.task, n, frame)


def gate(cfg: DictConfig, found: Found, size: str, task: str) -> str | None:
    """Why a policy cannot carry a comparison: its shared weights missed their range, or greedy answers on these
    problems are outside cfg.gates; None if it can."""
    if reason := found.gates.get(f"{size} {task}"):
        return reason
    panel = "headline" if size == "base" else "policies"
    greedy = rows(found.runs[found.runs["weights"].isna()], panel=panel, task=task, size=size, method="greedy")
    accuracy, (low, high) = float(greedy["correct"].mean()), cfg.gates
    if low <= accuracy <= high:
        return None
    return f"gate: greedy accuracy of {size} on {task} measured {accuracy:.3f}, needed {low} to {high}"


def verdicts(cfg: DictConfig, report: Report, found: Found) -> None:
    """Measures every part of every claim, or says why it cannot be."""
    report.not_testable("c3", "the reference model is closed; profile=paper has the policy's side")
    report.not_testable("c14", "needs DeepSeekMath-7B and a trained twisted sampler")
    _theorem(cfg, report, found)
    for method in METHODS:
        at = {"panel": "headline", "task": cfg.main.task, "size": "base", "method": method}
        n = 1 if method == "greedy" else max(cfg.main.widths)
        report.metric(f"accuracy {method} n={n}", by_problem(found.runs, n=n, **at).mean())
    base = gate(cfg, found, "base", cfg.main.task)
    for claims, judge, reason in (
        ("c1 c12", _budgets, base), ("c2", _small_policy, gate(cfg, found, "small", cfg.main.task)),
        ("c4", _noise, base), ("c5", _ranks, base), ("c6", _transfer, base), ("c7 c8", _settings, base),
        ("c9", _judges, base), ("c10 c11", _repeats, base),
    ):  # fmt: skip
        if reason is None:
            judge(cfg, report, found)
        else:
            for id_ in claims.split():
                report.not_testable(id_, reason)


def _difference(cfg: DictConfig, a: np.ndarray, b: np.ndarray) -> Measured:
    return paired_bootstrap(a, b, seed=cfg.seed, resamples=cfg.resamples)


def _theorem(cfg: DictConfig, report: Report, found: Found) -> None:
    model = ToyLanguageModel(seed=cfg.seed)
    total = model.evidence(starts_with_zero)
    share = total / model.evidence()
    small, large = (found.toy[found.toy["n"] == n] for n in (cfg.toy.n, cfg.toy.n_large))
    product = (small["evidence"] * small["share"]).to_numpy()
    error = product.std(ddof=1) / np.sqrt(len(product))
    distance = abs(product.mean() - total) / error
    report.measure(
        "c13", "distance of the mean of Zhat times the estimate from the exact sum", exact(distance, len(product)),
        f"mean {product.mean():.5f}, exact {total:.5f}, {len(product)} runs",
    )  # fmt: skip
    random, ratios = np.random.default_rng([cfg.seed, 0xB1A5]), []
    for _ in range(cfg.resamples):
        biases = [abs(np.mean(random.choice(f["share"].to_numpy(), len(f))) - share) for f in (large, small)]
        ratios.append(biases[0] / biases[1])
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = abs(large["share"].mean() - share) / abs(small["share"].mean() - share)
    part = "bias of the self-normalised estimate, N=8 over N=2"
    report.measure("c13", part, Measured(value, min(low, value), max(high, value), len(large)))


def _budgets(cfg: DictConfig, report: Report, found: Found) -> None:
    widths = list(cfg.main.widths)
    ours, other = (curve(found.runs, cfg.main.task, m, widths) for m in ("pf", "dvts"))
    ratio = paired_bootstrap(ours, other, ratio_of_budgets(widths), cfg.seed, cfg.resamples)
    levels, _ = cost_ratios(widths, ours.mean(0), widths, other.mean(0))
    report.measure("c1", "N of DVTS over N of PF at equal accuracy", ratio, f"{len(levels)} levels")
    report.measure("c1", "the same ratio, its value", exact(ratio.value, ratio.n))
    quarter = widths.index(max(widths) // 4) if max(widths) // 4 in widths else 0
    part = "PF at a quarter of the largest N minus DVTS at the largest N"
    detail = f"N={widths[quarter]} against N={widths[-1]}"
    report.measure("c12", part, _difference(cfg, ours[:, quarter], other[:, -1]), detail)


def _small_policy(cfg: DictConfig, report: Report, found: Found) -> None:
    widths, main = list(cfg.small.widths), cfg.main.task
    large = by_problem(found.runs, panel="policies", task=main, size="large", method="greedy", weights="final")
    alone = by_problem(found.runs, panel="policies", task=main, size="small", method="greedy")
    if not large.mean() > alone.mean():  # to pass a weaker policy takes no search
        reason = f"gate: greedy accuracy of large {large.mean():.3f}, needed above that of small {alone.mean():.3f}"
        report.not_testable("c2", reason)
        return
    small = np.stack([by_problem(found.runs, panel="small", task=main, method="pf", n=n) for n in widths], axis=1)

    def smallest(ours: np.ndarray, reference: np.ndarray) -> float:
        above = np.flatnonzero(ours.mean(0) > reference.mean())
        return float(widths[above[0]]) if len(above) else 2.0 * widths[-1]

    measured = paired_bootstrap(small, large, smallest, cfg.seed, cfg.resamples)
    detail = f"greedy, large: {large.mean():.3f}; PF, small, at N={widths[-1]}: {small[:, -1].mean():.3f}"
    report.measure("c2", "smallest N at which PF with the small policy passes the greedy large one", measured, detail)


def _noise(cfg: DictConfig, report: Report, found: Found) -> None:
    sigmas = np.array([float(s) for s in cfg.noise.sigmas])
    if len(sigmas) < 2:
        report.not_testable("c4", "needs an oracle of partial answers, which the task does not have")
        return
    beam, pf = (
        np.stack([by_problem(found.runs, panel="noise", method=m, sigma=s) for s in sigmas], axis=1)
        for m in ("beam", "pf")
    )
    measured = paired_bootstrap(
        beam, pf, lambda a, b: float(np.polyfit(sigmas, a.mean(0) - b.mean(0), 1)[0]), cfg.seed, cfg.resamples
    )
    report.measure("c4", "slope of beam minus PF over the noise", measured)


def _lead(ours: np.ndarray, others: np.ndarray) -> float:
    """Accuracy of PF minus the highest of the others [problems, methods]."""
    return float(ours.mean() - others.mean(0).max())


def _ranks(cfg: DictConfig, report: Report, found: Found) -> None:
    if reason := gate(cfg, found, "small", cfg.main.task):
        report.not_testable("c5", reason)
        return
    if not cfg.second.problems:
        report.not_testable("c5", "this profile has one task")
        return
    if reason := gate(cfg, found, "base", cfg.second.task):
        report.not_testable("c5", f"the claim is on two tasks; {reason}")
        return
    cases = (
        ("main task", "headline", "base", cfg.main.task, max(cfg.main.widths)),
        ("second task", "headline", "base", cfg.second.task, max(cfg.second.widths)),
        ("small policy", "policies", "small", cfg.main.task, cfg.policies.n),
    )
    for name, panel, size, task, n in cases:
        at = {"panel": panel, "size": size, "task": task}
        problems = cfg.policies.problems if panel == "policies" else None
        plain = found.runs[found.runs["weights"].isna()]
        values = {m: by_problem(plain, problems, n=1 if m == "greedy" else n, method=m, **at) for m in METHODS}
        others = np.stack([v for m, v in values.items() if m != "pf"], axis=1)
        best = max((m for m in METHODS if m != "pf"), key=lambda m: values[m].mean())
        measured = paired_bootstrap(values["pf"], others, _lead, cfg.seed, cfg.resamples)
        detail = f"{METHODS[best]} {values[best].mean():.3f}, PF {values['pf'].mean():.3f}, N={n}"
        report.measure("c5", f"PF minus the best other method, {name}", measured, detail)


def _transfer(cfg: DictConfig, report: Report, found: Found) -> None:
    if not len(cfg.judges.seeds):
        report.not_testable("c6", "this profile has no reward model of another task")
        return
    pf = _transferred(cfg, found.runs, "pf")
    for name, method in (("greedy", "greedy"), ("self-consistency", "sc")):
        measured = _difference(cfg, pf, _transferred(cfg, found.runs, method))
        report.measure("c6", f"PF minus {name}, reward model of another task", measured)


def _settings(cfg: DictConfig, report: Report, found: Found) -> None:
    runs, main, first = found.runs, cfg.main.task, cfg.seed + cfg.main.seeds[0]
    pf = {"task": main, "method": "pf"}

    def mean_over_n(panel: str, **own: Any) -> np.ndarray:
        return np.mean([by_problem(runs, panel=panel, n=n, **pf, **own) for n in cfg.aggregation.widths], axis=0)

    last = mean_over_n("headline", seed=first)
    for key, name in (("prod", "product"), ("min", "minimum")):
        measured = _difference(cfg, last, mean_over_n("aggregation", key=key))
        report.measure("c7", f"last step (the whole prefix scored once) minus {name}", measured)
    n = cfg.temperatures.n
    by = {float(t): by_problem(runs, panel="temperature", temperature=t, n=n, **pf) for t in cfg.temperatures.grid}
    by[float(cfg.temperature)] = by_problem(runs, panel="headline", seed=first, n=n, **pf)
    usual = np.stack([values for t, values in sorted(by.items()) if t <= 1.0], axis=1)
    spread = paired_bootstrap(usual, usual, lambda a, _: float(np.ptp(a.mean(0))), cfg.seed, cfg.resamples)
    report.measure("c8", "largest minus smallest accuracy, temperatures 0.4 to 1.0", spread)
    report.measure("c8", "temperature 0.8 minus 1.4", _difference(cfg, by[float(cfg.temperature)], by[max(by)]))


def _judges(cfg: DictConfig, report: Report, found: Found) -> None:
    own = cfg.judges
    if len(own.seeds) < 3 or len(own.shares) < 3:
        report.not_testable(
            "c9", "budget: needs reward models of 3 shares of the labels and 3 seeds; "
            "`make reproduce PAPER=particle_filtering PROFILE=gpu` trains them",
        )  # fmt: skip
        return
    names = [f"{share:g}" for share in sorted(own.shares)]
    quality = found.quality
    auroc = {n: quality[quality["name"].map("{:g}".format) == n].sort_values("seed")["auroc"].to_numpy() for n in names}
    pf = {name: [_judged(found.runs, "pf", name, seed).mean() for seed in own.seeds] for name in names}
    low, middle, high = names
    if not np.isfinite([auroc[low], auroc[high]]).all():
        report.not_testable("c9", "the labelled prefixes held out are all of one kind, so AUROC is not defined")
        return
    report.measure("c9", "AUROC, all problems minus 5 percent of them", paired_t(auroc[high], auroc[low]))
    report.measure("c9", "PF, all problems minus 25 percent of them", paired_t(pf[high], pf[middle]))
    report.measure("c9", "PF, 25 percent of the problems minus 5 percent", paired_t(pf[middle], pf[low]))


def _repeats(cfg: DictConfig, report: Report, found: Found) -> None:
    pairs = [(n, times) for n, times in cfg.repeats.pairs]

    def accuracies(method: str) -> np.ndarray:
        values = [
            by_problem(found.runs, panel="repeats", n=n, repeats=times, method=method if times > 1 else "pf")
            for n, times in pairs
        ]
        return np.stack(values, axis=1)

    gibbs, chains = accuracies("pg"), accuracies("chains")
    once = [times for _, times in pairs].index(1)
    fewest = min(range(len(pairs)), key=lambda i: pairs[i][0])
    rest = [i for i in range(len(pairs)) if i != once]
    best = paired_bootstrap(
        gibbs[:, rest], gibbs[:, once], lambda a, b: float(a.mean(0).max() - b.mean()), cfg.seed, cfg.resamples
    )
    report.measure("c10", "best of the Gibbs settings minus PF", best)
    others = [i for i in range(len(pairs)) if i != fewest]
    worst = paired_bootstrap(
        gibbs[:, fewest], gibbs[:, others], lambda a, b: float(a.mean() - b.mean(0).min()), cfg.seed, cfg.resamples
    )
    report.measure("c10", "4 particles x 8 iterations minus the lowest other setting", worst)
    two = [times for _, times in pairs].index(2)
    report.measure(
        "c11", "two chains of 16 particles minus one filter of 32", _difference(cfg, chains[:, two], chains[:, once])
    )
