"""Part B: profiles of own architectures with random weights, software stacks, and more layers of one width."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.costs import idealized_runtime as ir
from common.metrics.timing import Timings, compare
from papers.idealized_runtime.method import Profile

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

Cell = tuple[int, int]  # prompt tokens, output tokens


def check(cfg: DictConfig) -> None:
    """Raises ValueError, before any model is built, for settings out of range; names the key and what is allowed."""
    prompts, outputs, held = list(cfg.prompts), list(cfg.outputs), cfg.held_out
    for name, values in (("prompts", prompts), ("outputs", outputs)):
        if len(values) < 2 or values != sorted(set(values)) or values[0] < 1:
            raise ValueError(f"{name}={values} must be two or more rising numbers of tokens, of at least 1")
    if outputs[0] != 1:
        raise ValueError(f"outputs={outputs} must begin with 1: F(p) is measured with one output token")
    if seen := {held.output} & {*outputs} | {held.prompt} & {*prompts}:
        raise ValueError(f"held_out={dict(held)}: {sorted(seen)} is in the grid, and so is not held out")
    outputs_of_all = [*outputs, *cfg.stacks.outputs, held.output, cfg.layers.output]
    longest = max(*prompts, held.prompt, *cfg.stacks.prompts, *cfg.layers.prompts) + max(outputs_of_all)
    if longest > cfg.positions:
        raise ValueError(f"positions={cfg.positions} is less than the longest query, {longest} tokens")
    widths = [hidden for _, hidden in cfg.shapes] + [cfg.layers.hidden, cfg.stacks.hidden]
    if bad := [hidden for hidden in widths if hidden % cfg.head_size]:
        raise ValueError(f"hidden sizes {bad} are no multiples of head_size={cfg.head_size}")
    if cfg.rounds < 1 or cfg.warmup < 0:
        raise ValueError(f"rounds={cfg.rounds} must be at least 1 and warmup={cfg.warmup} at least 0")
    if cfg.clock not in ("cpu", "wall"):
        raise ValueError(f"clock={cfg.clock!r} is neither 'cpu' nor 'wall'")


def build_model(
    cfg: DictConfig, architecture: str, layers: int, hidden: int, dtype: str | None = None, attention: str = "sdpa"
) -> PreTrainedModel:
    """A model with random weights on the profile's device; 12 l h^2 weights in its blocks, nearly."""
    from common.models.build import build

    sizes = {
        "architecture": architecture, "vocab_size": cfg.vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // cfg.head_size, "intermediate_size": 16 * round(hidden / 6),
        "max_position_embeddings": cfg.positions,
    }  # fmt: skip
    with torch.device(cfg.device):
        return build(sizes, seed=cfg.seed, dtype=getattr(torch, dtype or cfg.dtype), attention=attention)


def grid(cfg: DictConfig) -> tuple[list[Cell], list[Cell]]:
    """(the full grid of cells, the held-out ones: another number of output tokens, another prompt length)."""
    full = [(p, o) for p in cfg.prompts for o in cfg.outputs]
    other = [(p, cfg.held_out.output) for p in cfg.prompts]
    return full, other + [(cfg.held_out.prompt, o) for o in (1, *cfg.held_out.outputs, cfg.held_out.output)]


def rounds_of(timings: Timings) -> pd.DataFrame:
    """One row a timed call of names 'model|p|o': seconds of both clocks, and whether the machine was disturbed."""
    import pandas as pd

    rows = []
    for name, wall in timings.wall.items():
        model, p, o = name.split("|")
        cells = {"model": model, "prompt_tokens": int(p), "output_tokens": int(o)}
        both = zip(wall, timings.cpu[name], timings.contended_rounds[name], strict=True)
        rows += [{**cells, "round": i, "wall": w, "cpu": c, "contended": bad} for i, (w, c, bad) in enumerate(both)]
    return pd.DataFrame(rows)


def medians(rounds: pd.DataFrame, clock: str) -> pd.DataFrame:
    """The cells of one model for `fit`: median over rounds of a clock, 'cpu' or 'wall'."""
    return rounds.groupby(ir.CELL, as_index=False)[clock].median().rename(columns={clock: "seconds"})


def together(
    calls: Mapping[str, Callable[[int, int], Any]], cells: Iterable[Cell], rounds: int, warmup: int
) -> pd.DataFrame:
    """Times call(p, o) of each name at each cell, all in the same interleaved rounds, so that names compare."""
    timed = {f"{name}|{p}|{o}": partial(call, p, o) for name, call in calls.items() for p, o in cells}
    return rounds_of(compare(timed, rounds, warmup))


def query(model: PreTrainedModel, threads: int, lean: bool | None, prompt_tokens: int, output_tokens: int) -> None:
    """One greedy query of exactly so many tokens."""
    from common.generation.sampler import generate

    torch.set_num_threads(threads)
    generate(model, [[1] * prompt_tokens], output_tokens, stop_tokens=(), lean=lean)


def profile_of(
    cfg: DictConfig, model: PreTrainedModel, on_grid: list[Cell], held_out: Sequence[Cell] = ()
) -> tuple[pd.DataFrame, Profile]:
    """(every timed call, the profile fitted to the grid's cells) of one model."""
    import warnings

    _, timings = ir.measure(model, [*on_grid, *held_out], cfg.rounds, cfg.warmup)
    named = {f"|{name.replace(' ', '|')}": name for name in timings.wall}
    kinds = (timings.wall, timings.cpu, timings.contended_rounds)
    frame = rounds_of(Timings(*({new: kind[old] for new, old in named.items()} for kind in kinds)))
    cells = medians(frame, cfg.clock).set_index(ir.CELL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that F falls by noise is shown in the tables
        return frame, ir.fit(cells.loc[on_grid].reset_index()).profile


def run(cfg: DictConfig, out: Path) -> dict[str, Profile]:
    """Writes rounds.parquet, stacks.parquet and layers.parquet; returns the profiles by model."""
    import pandas as pd

    from common.models.build import count_parameters

    frames, profiles = [], {}
    full, held_out = grid(cfg)
    for architecture in cfg.architectures:
        for layers, hidden in cfg.shapes:
            model = build_model(cfg, architecture, layers, hidden)
            frame, profile = profile_of(cfg, model, full, held_out)
            name = f"{architecture} {layers}x{hidden}"
            sizes = {"layers": layers, "hidden": hidden, "parameters": count_parameters(model)}
            frames.append(frame.assign(model=name, architecture=architecture, **sizes))
            profiles[name] = profile
            print(f"{name}: g {1e3 * profile.per_output_token:.2f} ms", flush=True)
            del model
            gc.collect()  # which the stage has switched off
    pd.concat(frames, ignore_index=True).to_parquet(out / "rounds.parquet", index=False)
    stacks(cfg).to_parquet(out / "stacks.parquet", index=False)
    more_layers(cfg).to_parquet(out / "layers.parquet", index=False)
    return profiles


def stacks(cfg: DictConfig) -> pd.DataFrame:
    """One architecture on several software stacks, in the same rounds."""
    own = cfg.stacks
    calls = {}
    for name, stack in own.variants.items():
        model = build_model(cfg, own.architecture, own.layers, own.hidden, stack.dtype, stack.attention)
        calls[name] = partial(query, model, stack.threads, stack.lean)
    try:
        return together(calls, ir.cheap_cells(list(own.prompts), list(own.outputs)), cfg.rounds, cfg.warmup)
    finally:
        torch.set_num_threads(1)


def more_layers(cfg: DictConfig) -> pd.DataFrame:
    """Models of one width and different numbers of layers, in the same rounds: their number is the name."""
    own = cfg.layers
    models = {layers: build_model(cfg, own.architecture, layers, own.hidden) for layers in own.counts}
    calls = {str(layers): partial(query, model, 1, False) for layers, model in models.items()}
    cells = [(p, o) for p in own.prompts for o in (1, own.output)]
    return together(calls, cells, cfg.rounds, cfg.warmup)
