"""Part B, the phase split on a real model over two processes: token identity, times, and a simulation fed with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.generation import records
from common.metrics.timing import Timings, compare
from common.models.flops import forward_flops
from common.models.hub import load_model, load_tokenizer
from common.serving import metrics, search, traces
from common.serving.batching import mixed_batching
from common.serving.engine import Cluster, MachineSpec, requests_of
from common.serving.latency import LatencyModel, from_points
from common.serving.schedulers import token_jsq
from common.tasks import multihop
from papers.splitwise.method.phases import MODES, PhaseSplit, decode, prefill
from papers.splitwise.method.scheduler import mixed_pool, return_to_pool
from papers.splitwise.method.simulation import MIXED_FACTOR
from papers.splitwise.study import SLO, sizes

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem

Row = dict[str, Any]
THREADS = (1, 2)  # the two machine types of a CPU


def run(cfg: DictConfig, out: Path) -> None:
    """Writes identity.csv, phases.csv, handover.csv, ratios.json, cpu_cluster.csv, and records.parquet in the common
    schema: every text of the identity test."""
    import pandas as pd

    model, tokenizer = _load(cfg)
    problems = multihop.generate(cfg.seed, cfg.real.prompts, split="test")
    prompts = [torch.tensor(tokenizer.encode(problem.prompt)) for problem in problems]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with PhaseSplit(model) as split:
            same, texts = identity(model, split, prompts, cfg.real.new_tokens)
            pd.DataFrame(same).to_csv(out / "identity.csv", index=False)
            handover, ratios = handover_times(model, split, cfg)
        phases, measured = phase_times(model, cfg)
    finally:
        torch.set_num_threads(threads)
    ratios["intensity"] = {"value": intensity(model, max(cfg.real.lengths)), "low": None, "high": None, "n": 1}
    pd.DataFrame(handover).to_csv(out / "handover.csv", index=False)
    pd.DataFrame(phases).to_csv(out / "phases.csv", index=False)
    (out / "ratios.json").write_text(json.dumps(ratios | measured, indent=2) + "\n")
    pd.DataFrame(cpu_clusters(cfg, phases, model)).to_csv(out / "cpu_cluster.csv", index=False)
    rows = samples(model, tokenizer, problems, texts)
    records.write(
        out / "records.parquet", records.frame(rows, paper=cfg.slug, profile=cfg.profile, seed=cfg.seed, sample_id=0)
    )


def _load(cfg: DictConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The shared model and its tokenizer, or the checkpoint of the hub that its folder names, in float32."""
    folder = Path(cfg.shared) / cfg.real.model
    record = folder / "model.json"
    source = json.loads(record.read_text())["hub_id"] if record.exists() else folder
    return load_model(source, network=cfg.network), load_tokenizer(source, network=cfg.network)


def identity(
    model: PreTrainedModel, split: PhaseSplit, prompts: list[torch.Tensor], new_tokens: int
) -> tuple[list[Row], list[Row]]:
    """Texts of the split against `generate` of transformers in one process, and received against computed KV values.

    Returns the comparisons and the texts: their prompt's number, arm, tokens and wall seconds.
    """
    rows, texts = [], []
    for number, prompt in enumerate(prompts):
        began = time.perf_counter()
        with torch.inference_mode():
            whole = model.generate(
                prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=new_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        expected = whole[0, len(prompt) :].tolist()
        seconds = time.perf_counter() - began
        texts.append({"prompt": number, "arm": "one process", "tokens": expected, "seconds": seconds})
        _, cache = prefill(model, prompt)
        for mode in MODES:
            received = split.received(prompt, mode)
            differing = sum(
                int((torch.from_numpy(ours) != theirs).sum())
                for layer, pair in zip(cache.layers, received, strict=True)
                for ours, theirs in zip(pair, (layer.keys, layer.values), strict=True)
            )
            began = time.perf_counter()
            tokens = split.generate(prompt, new_tokens, mode)
            texts.append({"prompt": number, "arm": mode, "tokens": tokens, "seconds": time.perf_counter() - began})
            rows.append(
                {"prompt": number, "mode": mode, "prompt_tokens": len(prompt), "new_tokens": new_tokens}
                | {"same_text": tokens == expected, "differing_values": differing}
            )
    return rows, texts


def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], texts: list[Row]
) -> list[Row]:
    """Rows of the common schema for the texts of `identity`, one forward pass a token: the prefill gives the first."""
    rows = []
    for text in texts:
        problem, tokens = problems[text["prompt"]], text["tokens"]
        read = len(tokenizer.encode(problem.prompt))
        flops = forward_flops(model.config, read, 0, 1, 1)
        flops += sum(forward_flops(model.config, 1, read + i) for i in range(len(tokens) - 1))
        answer = tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append(
            {
                "arm": text["arm"], "task": problem.task, "problem_id": text["prompt"],
                "difficulty": problem.difficulty, "prompt_tokens": read, "output_tokens": len(tokens),
                "discarded_tokens": 0, "forwards": len(tokens), "flops": flops, "seconds": text["seconds"],
                "answer": answer, "correct": multihop.verify(problem, answer),
            }
        )  # fmt: skip
    return rows


def handover_times(model: PreTrainedModel, split: PhaseSplit, cfg: DictConfig) -> tuple[list[Row], dict[str, Row]]:
    """Time to the second token with and without a transfer, per prompt length; each process has one thread."""
    rows, ratios = [], {}
    for length in cfg.real.lengths:
        prompt = _tokens(model, length)
        _, cache = prefill(model, prompt)
        calls: dict[str, Callable[[], Any]] = {
            "prefill": lambda prompt=prompt: prefill(model, prompt),
            "transfer": lambda cache=cache: split.transfer(cache),
            "one process": lambda prompt=prompt: decode(model, *prefill(model, prompt), 1),
            "serialized": lambda prompt=prompt: split.generate(prompt, 2, "serialized"),
            "layer by layer": lambda prompt=prompt: split.generate(prompt, 2, "layerwise"),
        }
        timings = compare(calls, rounds=cfg.real.rounds, min_seconds=cfg.real.min_seconds)
        frame = timings.frame().to_dict("records")
        size = sum(tensor.numel() * tensor.element_size() for keys, values, *_ in cache for tensor in (keys, values))
        rows += [{"length": length, "kv_bytes": size, **row} for row in frame]
        for mode in ("serialized", "layer by layer"):
            ratios[f"{mode}, {length}"] = _ratio(timings, mode, "one process")
    return rows, ratios


def phase_times(model: PreTrainedModel, cfg: DictConfig) -> tuple[list[Row], dict[str, Row]]:
    """Milliseconds of a prefill by length and of a decode step by batch size, with one and with two threads."""
    rows: list[Row] = []
    real = cfg.real

    def on(threads: int, call: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            torch.set_num_threads(threads)
            call()

        return timed

    for length in real.lengths:
        prompt = _tokens(model, length)
        calls = {str(n): on(n, lambda prompt=prompt: prefill(model, prompt)) for n in THREADS}
        timings = compare(calls, rounds=real.rounds, min_seconds=real.min_seconds)
        rows += [{"phase": "prefill", "size": length, **_named(row)} for row in timings.frame().to_dict("records")]
    for batch in real.batches:
        calls = {str(n): on(n, _decode_steps(model, batch, real.context, real.steps)) for n in THREADS}
        timings = compare(calls, rounds=real.rounds, min_seconds=real.min_seconds)
        for row in timings.frame().to_dict("records"):
            per_step = {key: row[key] / real.steps for key in ("wall_ms", "cpu_ms")}
            rows.append({"phase": "decode", "size": batch, **_named(row), **per_step})
    longest = max(real.lengths)
    prompt = _tokens(model, longest)
    calls = {
        "prefill": on(1, lambda: prefill(model, prompt)),
        "decode": on(1, _decode_steps(model, 1, longest, real.steps)),
    }
    timings = compare(calls, rounds=real.rounds, min_seconds=real.min_seconds)
    scale = longest / real.steps  # seconds of a call to tokens/s
    contrast = {
        key: value * scale if key in ("value", "low", "high") else value
        for key, value in _ratio(timings, "decode", "prefill").items()
    }
    return rows, {"prefill over decode": contrast}


def _named(row: Row) -> Row:
    return {"threads": int(row.pop("name")), **row}


def _decode_steps(model: PreTrainedModel, batch: int, context: int, steps: int) -> Callable[[], None]:
    """A call that decodes `steps` tokens for each of `batch` sequences of `context` tokens, and forgets them again."""
    from transformers import DynamicCache

    cache: DynamicCache = DynamicCache()
    ids = _tokens(model, batch * context).view(batch, context)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    def call() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-steps)

    return call


def _tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(count))


def _ratio(timings: Timings, slow: str, fast: str) -> Row:
    """Wall seconds of `slow` over `fast`, and whether the machine was busy with something else meanwhile."""
    measured = timings.ratio(slow, fast)
    return {
        "value": measured.value, "low": measured.low, "high": measured.high, "n": measured.n,
        "contended": timings.contended,
    }  # fmt: skip


def intensity(model: PreTrainedModel, tokens: int) -> float:
    """FLOP/byte of a prefill of `tokens` tokens over that of one decode step behind as many.

    FLOPs: 2 a weight and token, plus attention, 4 * hidden_size a layer and pair of positions (half of them causal).
    Bytes: every weight once, and the keys and values that are written (prefill) or read (decode).
    """
    config, weights = model.config, sum(p.numel() for p in model.parameters())
    pair = 4 * config.hidden_size * config.num_hidden_layers
    size = model.dtype.itemsize
    cache = 2 * config.num_hidden_layers * config.hidden_size * tokens
    prompt = (2 * weights * tokens + pair * tokens * (tokens + 1) / 2) / (size * (weights + cache))
    step = (2 * weights + pair * tokens) / (size * (weights + cache))
    return prompt / step


def cpu_clusters(cfg: DictConfig, phases: list[Row], model: PreTrainedModel) -> list[Row]:
    """The simulator fed with the measured times: machines of one and of two threads, eight threads in all.

    Conversation sizes, prompts cut to the longest measured one; memory for 64 requests of mean size; objectives against
    a machine of one thread alone. Rates in requests/s.
    """
    curves = {n: _curve(phases, n) for n in THREADS}
    prompt, output = sizes(str(Path(cfg.artifacts) / "data"), "conv")
    prompt = np.minimum(prompt, max(cfg.real.lengths))
    kv_bytes = 2 * model.config.hidden_size * model.config.num_hidden_layers * model.dtype.itemsize
    capacity = int(64 * (prompt.mean() + output.mean()) * kv_bytes)
    capacity = max(capacity, int(prompt.max() + output.max()) * kv_bytes)
    clusters = {
        "4 machines of 2 threads": [("all", 2)] * 4,
        "8 machines of 1 thread": [("all", 1)] * 8,
        "split: 2 prompt of 2 threads, 4 token of 1 thread": [("prompt", 2)] * 2 + [("token", 1)] * 4,
        "split: 4 prompt of 1 thread, 4 token of 1 thread": [("prompt", 1)] * 4 + [("token", 1)] * 4,
    }
    step_ms = 1e3 * curves[1].token(1)  # read at the batch size, unlike the published curve: alone is a batch of one
    alone = LatencyModel(curves[1].prompt, from_points({1: 1, 2: 2}, {1: step_ms, 2: step_ms}).token)
    mean_s = alone.prompt(float(prompt.mean())) + float(output.mean()) * curves[1].token(8) / 8
    guess = 8 / mean_s  # far above what eight machines of one thread can do, at a batch of eight decodes each

    def rate_of(machines: list[tuple[str, int]]) -> float:
        specs = [MachineSpec(f"{n} threads", pool, curves[n], capacity) for pool, n in machines]
        whole = machines[0][0] == "all"

        def feasible(rate: float) -> bool:
            trace = traces.poisson_trace(prompt, output, rate, min(cfg.seconds, 2000 / rate), cfg.seed)
            cluster = Cluster(
                specs, token_jsq if whole else mixed_pool, mixed_batching, on_idle=None if whole else return_to_pool,
                bandwidth=1e9,
            )  # fmt: skip
            log = cluster.run(requests_of(trace, kv_bytes), metrics.hopeless(SLO, alone, len(trace)))
            slowdown = metrics.slowdowns(metrics.request_table(log), alone)
            return not log.unfinished and metrics.meets(metrics.quantiles(slowdown), SLO)

        return search.largest_feasible(feasible, guess / 50, guess, guess / 50)

    return [
        {"cluster": name, "threads": sum(n for _, n in m), "largest_rate": rate_of(m)} for name, m in clusters.items()
    ]


def _curve(phases: list[Row], threads: int) -> LatencyModel:
    """The latency model of a machine of so many threads, flat below the smallest size that was measured.

    A larger size never takes less time, whatever the noise.
    """
    points = []
    for phase in ("prefill", "decode"):
        rows = sorted((r["size"], r["wall_ms"]) for r in phases if r["phase"] == phase and r["threads"] == threads)
        rising = np.maximum.accumulate([ms for _, ms in rows])
        points.append({0: rising[0]} | dict(zip([size for size, _ in rows], rising.tolist(), strict=True)))
    return from_points(*points, MIXED_FACTOR)
