"""splitwise's stages. Each reads cfg.artifacts (and cfg.shared), writes to cfg.out, and knows no other path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from papers.splitwise.designs import Design

TRACES = ("code", "conv")
LEVELS = (0, 0.5, 0.9, 0.99, 1)
QUANTILES = {  # published quantiles (table t4) and least values (splitwise-sim, generate_trace.py), at LEVELS
    "code": {"prompt": (3, 1469, 5187.6, 7436, 7437), "output": (6, 13, 55, 251.46, 1899)},
    "conv": {"prompt": (2, 1020, 2734.5, 4142, 14050), "output": (7, 129, 424, 601, 1000)},
}
REQUESTS = {"code": 8819, "conv": 19366}


def data(cfg: DictConfig) -> None:
    """Writes code.csv and conv.csv (arrival, prompt_tokens, output_tokens), profile.csv (medians) and sources.json."""
    import pandas as pd

    from common.data.sources import Located, MissingSource, locate, record_sources
    from common.serving.latency import medians

    used: list[Located | str] = []

    def find(name: str) -> Path | None:
        try:
            located = locate(name, cfg.data_root, cfg.network)
        except MissingSource:
            if not cfg.substitute:
                raise
            used.append(name)  # under its own name, so that `make reproduce` notices when the file is there later
            return None
        used.append(located)
        return located.path

    for trace in TRACES:
        path = find(f"azure_llm/AzureLLMInferenceTrace_{trace}.csv")
        _trace(trace, path).to_csv(Path(cfg.out) / f"{trace}.csv", index=False)
    path = find("splitwise/perf_model.csv")
    profile = medians(pd.read_csv(path)) if path else _embedded_profile()
    profile[profile["tensor_parallel"] == 8].to_csv(Path(cfg.out) / "profile.csv", index=False)
    record_sources(Path(cfg.out), used)


def _trace(name: str, path: Path | None) -> pd.DataFrame:
    """The released trace, arrivals in seconds from its first request; or a substitute of as many sizes, no arrivals."""
    import pandas as pd

    from common.serving.traces import sizes_from_quantiles

    if path is None:
        sizes = {
            kind: sizes_from_quantiles(dict(zip(LEVELS, values, strict=True)), REQUESTS[name])
            for kind, values in QUANTILES[name].items()
        }
        return pd.DataFrame({"arrival": None, "prompt_tokens": sizes["prompt"], "output_tokens": sizes["output"]})
    frame = pd.read_csv(path, parse_dates=["TIMESTAMP"])
    arrival = (frame["TIMESTAMP"] - frame["TIMESTAMP"].iloc[0]).dt.total_seconds()
    sizes = {"prompt_tokens": frame["ContextTokens"], "output_tokens": frame["GeneratedTokens"]}
    return pd.DataFrame({"arrival": arrival, **sizes})


def _embedded_profile() -> pd.DataFrame:
    import pandas as pd

    from papers.splitwise.method.simulation import performance

    return pd.DataFrame(
        [
            {
                "model": model, "hardware": gpu, "tensor_parallel": 8, "batch_tokens": tokens,
                "prompt_time": ms, "token_time": curves["token_ms"][tokens],
            }
            for model, by_gpu in performance().items()
            for gpu, curves in by_gpu.items()
            for tokens, ms in curves["prompt_ms"].items()
        ]
    )  # fmt: skip


def infer(cfg: DictConfig) -> None:
    """Part A, the simulated clusters, in cfg.workers processes; then part B, the split on a real model."""
    import os

    import pandas as pd

    # Before torch is imported: two threads that spin for each other on a busy machine take a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from common.generation.steps import needs_transformers
    from common.workers import run_jobs
    from papers.splitwise import real, study

    needs_transformers(cfg.backend, "the phase split")
    out = Path(cfg.out)
    golden().to_csv(out / "golden.csv", index=False)
    jobs = _jobs(cfg)
    results = run_jobs(study.call, [job for _, _, job in jobs], cfg.workers)
    tables: dict[str, list[dict[str, Any]]] = {}
    for (table, labels, _), result in zip(jobs, results, strict=True):
        rows = result if isinstance(result, list) else [result]
        tables.setdefault(table, []).extend({**labels, **row} for row in rows)
    for table, rows in tables.items():
        pd.DataFrame(rows).to_csv(out / f"{table}.csv", index=False)
    real.run(cfg, out)


def golden() -> pd.DataFrame:
    """The two published runs on the three-request trace (tables t1 and t2)."""
    import pandas as pd

    from common.serving.metrics import request_table
    from papers.splitwise.method import simulate_log

    trace = pd.DataFrame({"arrival": [1, 3, 4], "prompt_tokens": [4096, 2048, 2048], "output_tokens": [32, 8, 16]})
    one = simulate_log(trace, scheduler="token_jsq", machines={"dgx-h100": 1})
    two = simulate_log(trace, prompt_machines={"dgx-h100": 1}, token_machines={"dgx-a100": 1})
    return pd.concat([request_table(log).assign(table=table) for table, log in (("t1", one), ("t2", two))])


Job = tuple[str, dict[str, Any], tuple[Any, tuple[Any, ...]]]


def _jobs(cfg: DictConfig) -> list[Job]:
    """(table, labels of its rows, call) of every simulation; rates in labels are at full scale."""
    from papers.splitwise import study
    from papers.splitwise.designs import NAMES, STUDIES, scaled

    folder, seconds = str(Path(cfg.artifacts) / "data"), float(cfg.seconds)
    seeds = [cfg.seed + seed for seed in (*cfg.trace_seeds, cfg.selection_seed)]
    first, judged = seeds[0], seeds[:-1]
    low, high, tolerance = (cfg.bisection[key] / cfg.scale for key in ("low", "high", "tolerance"))
    jobs: list[Job] = []

    def bisect(table: str, labels: dict[str, Any], design: Design, trace: str, seed: int, **settings: Any) -> None:
        named = {**labels, "design": design.name, "machines": design.label, "trace": trace, "seed": seed}
        call = (folder, design, trace, seconds, seed, settings, low, high, tolerance)
        jobs.append((table, named, (study.largest_rate_row, (cfg.scale, call))))

    done: set[tuple[Design, str]] = set()
    for name in cfg.studies:
        trace = name.split()[1]
        for design in scaled(name, cfg.scale).values():
            if (design, trace) not in done:  # rounding makes some designs of two studies one
                done.add((design, trace))
                for seed in seeds:
                    bisect("largest", {}, design, trace, seed)
    for kind in ("HA", "HHcap"):
        coding = scaled("iso-power code", cfg.scale)[f"Splitwise-{kind}"]
        for seed in judged:
            for scheduler in ("mixed_pool", "fixed_pools"):
                bisect("mismatch", {"scheduler": scheduler}, coding, "conv", seed, scheduler=scheduler)
    if cfg.ablations:
        designs = scaled("iso-power conv", cfg.scale)
        for name in ("Baseline-H100", "Splitwise-HA"):
            for setting in (
                {}, {"batching": "continuous"}, {"batching": "request"}, {"decode_axis": "context"}, {"overlap": True},
                {"bandwidth_gib": 12.5},
            ):  # fmt: skip
                label = ", ".join(f"{key}={value}" for key, value in setting.items()) or "as published"
                if name == "Splitwise-HA" or not {"overlap", "bandwidth_gib"} & set(setting):
                    bisect("ablations", {"setting": label}, designs[name], "conv", first, **setting)
    for trace in TRACES:
        designs = scaled(f"iso-power {trace}", cfg.scale)
        for name in NAMES:
            # every design once; on further seeds those that a claim compares
            compared = (trace == "conv" and name != "Baseline-A100") or name in ("Baseline-H100", "Splitwise-HHcap")
            for seed in [*judged[: cfg.provisioning.seeds], cfg.seed + cfg.selection_seed] if compared else [first]:
                call = (folder, name, trace, cfg.rate / cfg.provisioning.scale, seconds, seed, cfg.provisioning.most)
                jobs.append(("provisioned", {"trace": trace, "seed": seed}, (study.provisioned_rows, call)))
            for rate in cfg.rates:
                call = (folder, designs[name], trace, rate / cfg.scale, seconds, first, {})
                labels = {"trace": trace, "design": name, "machines": designs[name].label, "rate": rate}
                jobs.append(("rates", labels, (study.quantiles_at, call)))
        for seed in judged:
            links = {
                "overlapped, 200 GiB/s": {"overlap": True},
                "serialized, 200 GiB/s": {},
                "serialized, 12.5 GiB/s": {"bandwidth_gib": 12.5},
            }
            call = (folder, designs["Splitwise-HA"], trace, cfg.rate / cfg.scale, seconds, seed, links)
            jobs.append(("transfer", {"trace": trace, "seed": seed}, (study.transfer_overhead, call)))
            for name in ("Baseline-H100", "Splitwise-HA"):
                call = (folder, designs[name], trace, cfg.rate / cfg.scale, seconds, seed)
                labels = {"trace": trace, "design": name, "rate": cfg.rate, "seed": seed}
                jobs.append(("activity", labels, (study.activity, call)))
        for rate in cfg.activity_rates:
            call = (folder, designs["Baseline-H100"], trace, rate / cfg.scale, seconds, first)
            labels = {"trace": trace, "design": "Baseline-H100", "rate": rate, "seed": first}
            jobs.append(("activity", labels, (study.activity, call)))
    for name in STUDIES:
        trace = name.split()[1]
        rate = 130 if "130" in name else cfg.rate
        for design in scaled(name, cfg.scale).values():
            labels = {"study": name, "rate": rate, "design": design.name, "machines": design.label}
            labels |= {"cost": design.cost, "power": design.power}
            jobs.append(
                ("designs", labels, (study.quantiles_at, (folder, design, trace, rate / cfg.scale, seconds, first, {})))
            )
    shown = scaled("iso-power conv", cfg.scale)
    for name in ("Baseline-H100", "Splitwise-HA"):
        window = (cfg.strip.rate / cfg.scale, seconds, first, cfg.strip.start, cfg.strip.end)
        jobs.append(("strip", {"design": name}, (study.strip, (folder, shown[name], "conv", *window))))
    return jobs


def figures(cfg: DictConfig) -> None:
    """Tables, figures and verdicts from what data and infer wrote."""
    from papers.splitwise import judge

    judge.report(cfg)
