"""Tables and verdicts from what `infer` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.costs.catalogue import from_checkpoint
from common.costs.per_answer import report_costs
from common.metrics.intervals import Measured, exact, paired_bootstrap, sign_test
from papers.lookahead.prompts import TITLES

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.reporting.report import Report

Measurements = dict[str, pd.DataFrame]
ARCHITECTURES = {"lm_llama": "Llama", "lm_qwen2": "Qwen2", "lm_gpt2": "GPT-2"}
NEAR_TIE = 1e-3  # logits closer than that may change places in float32
FEWEST = 8  # answers that a comparison of answers without repetition needs


def read(folder: Path) -> Measurements:
    """name -> what `infer` wrote under it."""
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def per_pass(rows: pd.DataFrame) -> float:
    """Tokens per forward pass over all rows together."""
    return float(rows["new_tokens"].sum() / rows["forwards"].sum())


def modelled_speed_up(rows: pd.DataFrame, curve: pd.DataFrame) -> float:
    """t(1) for each token over the sum of t(T) over passes of T tokens, t interpolated in the measured latencies."""
    drafted = np.concatenate(rows["drafted"].to_list())
    times = np.interp(drafted, curve["tokens"], curve["ms"])
    return float(curve["ms"].iloc[0] * rows["new_tokens"].sum() / times.sum())


def tables(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    """tables/*.csv; those that the paper has and that were not seen keep their shape."""
    _main_tables(cfg, report, measured)
    exactness = measured["exact"].assign(
        other_text=lambda t: ~t["same"], more_passes=lambda t: t["forwards"] > t["new_tokens"]
    )
    by_setting = exactness.groupby(["model", "mode", "decoding_length", "branch_length"], sort=False)
    report.table(
        "exact",
        by_setting.agg(
            prompts=("same", "size"), other_text=("other_text", "sum"), more_passes=("more_passes", "sum")
        ).reset_index(),
        f"The public decoder against `generate` in {cfg.exact.dtype}: prompts with another text, with more passes",
    )
    report.table("repetition", _repetition(cfg, measured), "Answers that repeat themselves are easy to draft")
    worst = measured["worst"].assign(more_passes=lambda t: t["forwards"] > t["new_tokens"])
    grouped = worst.groupby(["task", "condition"], sort=False)
    summary = grouped.agg(prompts=("problem", "size"), more_passes=("more_passes", "sum")).reset_index()
    summary["tokens_per_pass"] = [per_pass(rows) for _, rows in grouped]
    report.table("worst", summary, "What fills the trie, from nothing to shuffled answers")
    grouped = measured["warmup"].groupby(["task", "answers"], sort=False)
    summary = pd.DataFrame([(*key, per_pass(rows)) for key, rows in grouped])
    summary.columns = ["task", "warm_answers", "tokens_per_pass"]
    report.table("warmup", summary, "Tokens per pass against the number of answers that filled the trie beforehand")
    report.table(
        "sweep",
        measured["sweep"],
        "Tokens per pass by mode, source and sizes",
        f"By replay of the main model's answers to {cfg.sweep.prompts} test prompts a task. Rows 'released code' "
        "draft as the authors' code does, its slips included.",
    )
    report.table(
        "capacity",
        measured["capacity"],
        "Capacity of the trie: tokens per pass, microseconds, memory",
        "capacity: output nodes that one tree may hold, in decoding lengths; pruned after every request.",
        timing=["query_us", "insert_us_per_token"],
    )
    report.table(
        "latency",
        measured["latency"],
        f"Time of a pass with T tokens over a cache of {cfg.latency.context}",
        timing=["ms", "ratio", "ratio_low", "ratio_high", "contended"],
    )
    trace = measured["trace"]
    report.table(
        "trace",
        trace,
        "Recorded drafts run through the latency model",
        timing=[c for c in trace.columns if c.startswith(("greedy_", "hier_"))],
    )


def _main_tables(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    runs, timing, latency = measured["runs"], measured["timing"], measured["latency"]
    curve = latency[latency["model"] == cfg.models[0]]
    decoders, main = [], []
    for (model, task, arm), clock in timing.groupby(["model", "task", "arm"], sort=False):
        rows = runs[(runs["model"] == model) & (runs["task"] == task) & (runs["arm"] == arm)]
        row = {"model": model, "task": task, "decoder": arm, "tokens_per_pass": None, "tokens_scored_per_pass": None}
        if len(rows):
            row["tokens_per_pass"] = per_pass(rows)
            row["tokens_scored_per_pass"] = float(np.concatenate(rows["drafted"].to_list()).mean())
            row["other_text_float32"] = int(rows["margin"].notna().sum())
        columns = ["tokens_per_s", "speed_up", "speed_up_low", "speed_up_high", "speed_up_cpu_time", "contended"]
        decoders.append(row | clock[columns].iloc[0].to_dict())
    for (model, task), clock in timing.groupby(["model", "task"], sort=False):
        speed = clock.set_index("arm")["tokens_per_s"]
        own = runs[(runs["model"] == model) & (runs["task"] == task)]
        hier = own[own["arm"] == "hier"]
        scored = np.concatenate(hier["drafted"].to_list())
        row = {
            "model": model,
            "task": task,
            "decoding_length": int(hier["decoding_length"].iloc[0]),
            "greedy tok/s": speed["greedy"],
            "lookahead tok/s": speed["hier"],
            "speed-up": clock.set_index("arm")["speed_up"]["hier"],
        }
        if model == cfg.models[0]:
            row["modelled speed-up"] = modelled_speed_up(hier, curve)
        row |= {
            "EDL": per_pass(hier),
            "EDL of prompt lookup": per_pass(own[own["arm"] == "prompt lookup"]),
            "DL": float(scored.mean()),
            "forwards": int(hier["forwards"].sum()),
            "exact match float32": float(hier["margin"].isna().mean()),
        }
        main.append(row)
    report.table(
        "t1",
        pd.DataFrame(main),
        note="EDL: tokens committed per pass; DL: tokens scored per pass. lookahead: mode hier at the decoding_length "
        "chosen on train prompts. tok/s: batch 1, one thread, prefill included.",
        timing=["greedy tok/s", "lookahead tok/s", "speed-up", "modelled speed-up"],
    )
    report.table(
        "decoders",
        pd.DataFrame(decoders),
        "Five decoders in one loop, and `generate` of transformers as context",
        "speed_up: greedy's time over the decoder's, median of interleaved rounds; low and high bound the median.",
        timing=["tokens_per_s", "speed_up", "speed_up_low", "speed_up_high", "speed_up_cpu_time", "contended"],
    )
    report_costs(
        report, lambda arm: from_checkpoint(Path(cfg.shared) / arm.split(", ")[0], cfg.network), steps="forwards"
    )
    for row in main[: len(cfg.tasks)]:
        report.metric(f"{row['task']}: tokens per pass", row["EDL"])
        report.metric(f"{row['task']}: tokens per pass of prompt lookup", row["EDL of prompt lookup"])


def _repetition(cfg: DictConfig, measured: Measurements) -> pd.DataFrame:
    rows = []
    for task, own in measured["defaults"].query("mode == 'hier'").groupby("task", sort=False):
        plain = own[own["repetition"] <= cfg.repetitive_above]
        rows.append(
            {"task": task, "answers": len(own), "repetition_rate": own["repetition"].mean()}
            | {"answers_not_repetitive": len(plain), "tokens_per_pass": per_pass(own)}
            | {"tokens_per_pass_not_repetitive": per_pass(plain) if len(plain) else None}
        )
    return pd.DataFrame(rows)


def claims(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    """Measures every part that reported.yaml declares."""
    grounded, chat = cfg.roles.grounded, cfg.roles.chat
    timing, latency, trace = measured["timing"], measured["latency"], measured["trace"].iloc[0]
    main = timing[timing["model"] == cfg.models[0]]

    def speed_up(task: str) -> Measured:
        row = main[(main["task"] == task) & (main["arm"] == "hier")].iloc[0]
        return _timed(row)

    _lossless(cfg, report, measured)
    for condition, rows in measured["worst"].groupby("condition", sort=False):
        excess = int((rows["forwards"] > rows["new_tokens"]).sum())
        report.measure("c2", str(condition), exact(excess, len(rows)), f"{per_pass(rows):.2f} tokens per pass")

    defaults = measured["defaults"]
    hier = defaults[(defaults["task"] == grounded) & (defaults["mode"] == "hier")]
    counts = _counts(hier)
    edl = paired_bootstrap(counts, np.zeros_like(counts), lambda a, _: _ratio(a), seed=cfg.seed)
    report.measure("c3", "tokens per pass, default sizes", edl)
    contended = f"{main['contended'].mean():.0%} of all measurements were contended"
    report.measure("c3", "tokens/s, trained model", speed_up(grounded), contended)
    detail = (
        f"decoding_length {int(trace['decoding_length'])}, {trace['tokens'] / trace['forwards']:.2f} tokens per pass"
    )
    measured_trace = Measured(
        trace["hier_speed_up"], trace["hier_speed_up_low"], trace["hier_speed_up_high"], int(trace["hier_rounds"])
    )
    report.measure("c3", "tokens/s, recorded drafts on the 30M model", measured_trace, detail)
    report.not_testable("c4", "AntGLM-10B and the requests of Citizen Biz Agent are private")
    _code_against_chat(cfg, report, defaults)
    _branches(cfg, report, defaults)

    last = latency[(latency["model"] == latency["model"].iloc[-1]) & (latency["tokens"] == 32)].iloc[0]
    ratio = Measured(last["ratio"], last["ratio_low"], last["ratio_high"], int(last["rounds"]))
    report.measure("c7", "32 tokens, 30M model", ratio, f"{last['model']}, {cfg.device}, one thread")
    report.measure("c8", "free answers", speed_up(chat), TITLES[chat])
    report.measure("c8", "answers from documents", speed_up(grounded), TITLES[grounded])


def _timed(row: pd.Series) -> Measured:
    return Measured(row["speed_up"], row["speed_up_low"], row["speed_up_high"], int(row["rounds"]))


def _lossless(cfg: DictConfig, report: Report, measured: Measurements) -> None:
    if cfg.exact.dtype != "float64" or set(cfg.models) != set(ARCHITECTURES):
        report.not_testable("c1", f"needs three architectures in float64; this profile has {cfg.exact.dtype} and one")
        return
    for model, rows in measured["exact"].groupby("model", sort=False):
        runs = f"{rows['problem'].nunique()} prompts, {len(rows)} texts"
        report.measure(
            "c1", f"{ARCHITECTURES[str(model)]}, float64", exact(int((~rows["same"]).sum()), len(rows)), runs
        )
    runs = measured["runs"]
    differing = runs[runs["margin"].notna()]
    detail = f"{len(differing)} of {len(runs)} texts differ at all"
    wide = int((differing["margin"] >= NEAR_TIE).sum())
    report.measure("c1", "float32, differences that are no near tie", exact(wide, len(runs)), detail)


def _counts(rows: pd.DataFrame) -> np.ndarray:
    """[problems, 2]: tokens and passes."""
    return rows[["new_tokens", "forwards"]].to_numpy(float)


def _ratio(counts: np.ndarray) -> float:
    tokens, passes = counts.sum(0)
    return float(tokens / passes)


def _unpaired(a: np.ndarray, b: np.ndarray, seed: int, resamples: int = 2000) -> Measured:
    """Difference of tokens per pass between two sets of problems [n, 2] and [m, 2], each resampled on its own."""
    rng = np.random.default_rng([seed, 0x2A])
    drawn = [
        _ratio(a[rng.integers(len(a), size=len(a))]) - _ratio(b[rng.integers(len(b), size=len(b))])
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Measured(_ratio(a) - _ratio(b), float(low), float(high), min(len(a), len(b)))


def _code_against_chat(cfg: DictConfig, report: Report, defaults: pd.DataFrame) -> None:
    hier = defaults[defaults["mode"] == "hier"]
    plain = hier[hier["repetition"] <= cfg.repetitive_above]
    for part, rows in (("code minus free answers", hier), ("code minus free answers, not repetitive", plain)):
        code, chat = (_counts(rows[rows["task"] == task]) for task in (cfg.roles.code, cfg.roles.chat))
        if min(len(code), len(chat)) < FEWEST:
            found = f"{len(code)} code and {len(chat)} free answers"
            report.not_testable("c5", f"gate: {found} that are not repetitive, needed {FEWEST} of each")
            return
        detail = f"{_ratio(code):.2f} against {_ratio(chat):.2f}, {len(code)} and {len(chat)} answers"
        report.measure("c5", part, _unpaired(code, chat, cfg.seed), detail)


def _branches(cfg: DictConfig, report: Report, defaults: pd.DataFrame) -> None:
    """All tasks together; the problems of the three modes are the same, in the same order."""
    modes = {str(mode): rows for mode, rows in defaults.groupby("mode", sort=False)}
    for better, worse in (("hier", "par"), ("par", "one")):
        difference = paired_bootstrap(
            _counts(modes[better]), _counts(modes[worse]), lambda a, b: _ratio(a) - _ratio(b), seed=cfg.seed
        )
        by_task = [
            f"{task} {per_pass(rows):.2f} and {per_pass(modes[worse][modes[worse]['task'] == task]):.2f}"
            for task, rows in modes[better].groupby("task", sort=False)
        ]
        report.measure("c6", f"{better} minus {worse}", difference, "; ".join(by_task))
    hier, one = modes["hier"]["forwards"].to_numpy(), modes["one"]["forwards"].to_numpy()
    ahead, behind = int((hier < one).sum()), int((hier > one).sum())
    p = sign_test(-hier, -one) if ahead > behind else 1.0
    report.measure("c6", "hier against one, sign test", exact(p, len(hier)), f"{ahead} prompts ahead, {behind} behind")
