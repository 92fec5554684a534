"""What the measurements stand on: the models, this machine's rates, and rounds of timings as rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.costs.calibrate import calibrate
from common.costs.catalogue import Accelerator, accelerator, from_config
from common.metrics.timing import Timings
from common.models.build import build
from common.models.hub import load_model
from papers.long_context_peak.method.server import KVArena, Slot, cache_bytes

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from common.costs.catalogue import Transformer

Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]
MIB = 2**20
UNKNOWN_CACHE = 32 * MIB  # assumed where the system does not tell
LABELS = ("law", "arm", "attention", "tokens", "kv_bytes")


def load(cfg: DictConfig, attention: str) -> PreTrainedModel:
    """The model with a kind of attention: random weights in the configured sizes, or a checkpoint of the hub.

    Raises ValueError for a kind that the configuration does not name.
    """
    own, dtype = cfg.model, getattr(torch, cfg.model.dtype)
    if attention not in list(own.kv_heads):
        raise ValueError(f"unknown attention {attention!r}; model.kv_heads names: {', '.join(own.kv_heads)}")
    if own.hub_id:
        return load_model(own.hub_id, dtype=dtype, network=cfg.network).to(cfg.device)
    heads = own.kv_heads[attention]
    return build(dict(own.sizes), seed=cfg.seed, dtype=dtype, num_key_value_heads=heads).to(cfg.device)


def shape_of(model: PreTrainedModel) -> Transformer:
    """The model as the roofline sees it."""
    size = model.dtype.itemsize
    return from_config(model.config, bytes_per_weight=size, bytes_per_kv=size)


def last_cache_bytes() -> tuple[int, str]:
    """Bytes of the processor's last cache, and where the number is from."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return (max(found), "the system") if found else (UNKNOWN_CACHE, "assumed: the system does not tell")


def facts(cfg: DictConfig, folder: Path, models: dict[str, PreTrainedModel]) -> Row:
    """The machine's rates, measured now (or from the catalogue), its last cache, and the models' shapes."""
    size, source = (int(cfg.cache_mib * MIB), "configured") if cfg.cache_mib else last_cache_bytes()
    contended = None
    if cfg.machine:
        machine = accelerator(cfg.machine)
    else:
        own = cfg.calibration
        arena, buffer = (int(mib * MIB) for mib in (cfg.arena.mib, own.buffer_mib))
        machine, timings = calibrate(folder, arena, own.size, buffer, own.rounds)
        if cfg.clock == "cpu":
            machine = by_cpu_clock(machine, timings)
        contended = timings.contended
    shapes = {
        name: vars(shape_of(model)) | {"head_parameters": model.get_output_embeddings().weight.numel()}
        for name, model in models.items()
    }
    return {
        "machine": vars(machine), "last_cache_bytes": size, "last_cache_source": source, "contended": contended,
        "models": shapes,
    }  # fmt: skip


def by_cpu_clock(machine: Accelerator, timings: Timings) -> Accelerator:
    """The rates of arithmetic and memory by CPU seconds. The disk's stays in wall seconds: waiting takes no CPU."""
    share = {name: timings.median(name) / float(np.median(timings.cpu[name])) for name in ("product", "sum")}
    return replace(
        machine,
        flops_per_s=machine.flops_per_s * share["product"],
        memory_bytes_per_s=machine.memory_bytes_per_s * share["sum"],
    )


def rounds_of(timings: Timings, labels: dict[str, Row], per: float = 1) -> list[Row]:
    """A row a round and name: its labels, wall and CPU seconds divided by `per`, and whether it was disturbed."""
    return [
        {key: labels[name].get(key) for key in LABELS}
        | {"round": i, "wall_s": wall / per, "cpu_s": cpu / per, "contended": contended}
        for name in timings.wall
        for i, (wall, cpu, contended) in enumerate(
            zip(timings.wall[name], timings.cpu[name], timings.contended_rounds[name], strict=True)
        )
    ]


def tokens_of(model: PreTrainedModel, count: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [count]."""
    draws = torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    return draws.to(model.device)


def new_slot(model: PreTrainedModel, capacity: int) -> Slot:
    """A KV cache in an arena of its own."""
    return KVArena(model, cache_bytes(model, capacity)).allocate(capacity)


def tokens_in(model: PreTrainedModel, kv_mib: float) -> int:
    """How many tokens' keys and values are so many MiB."""
    return int(kv_mib * MIB) // cache_bytes(model, 1)
