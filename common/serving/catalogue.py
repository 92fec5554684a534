"""Published figures of GPUs, machines and served models (catalogue.yaml), each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """bf16_tflops: dense. memory_gib in 2**30 bytes, memory_gb_per_s in 1e9 bytes a second."""

    name: str
    bf16_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    tdp_watts: float
    source: str


@dataclass(frozen=True)
class Hardware:
    """A machine of several GPUs. cost and power: in the units of their source; None where none is published."""

    name: str
    gpu: Gpu
    gpus: int
    max_watts: float
    network_gbit_per_s: float
    cost: float | None
    power: float | None
    source: str

    @property
    def memory_bytes(self) -> int:
        return round(self.gpus * self.gpu.memory_gib * GIB)


@dataclass(frozen=True)
class ServedModel:
    """What serving a language model takes. kv_bytes: of one token, keys and values of every layer, one head a query."""

    name: str
    hidden_size: int
    layers: int
    weight_bytes: int
    bytes_per_value: int
    source: str

    @property
    def kv_bytes(self) -> int:
        return 2 * self.hidden_size * self.layers * self.bytes_per_value


@cache
def _content() -> dict[str, dict[str, dict[str, Any]]]:
    return yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text())


def _entry(section: str, name: str) -> dict[str, Any]:
    entries = _content()[section]
    if name not in entries:
        raise ValueError(f"unknown {section[:-1]} {name!r}; known: {', '.join(entries)}")
    return {"name": name, **entries[name]}


def gpu(name: str) -> Gpu:
    """A GPU of the catalogue; ValueError lists the names there are."""
    return Gpu(**_entry("gpus", name))


def hardware(name: str) -> Hardware:
    """A machine of the catalogue, such as 'dgx-h100'; ValueError lists the names there are."""
    entry = _entry("machines", name)
    return Hardware(**{**entry, "gpu": gpu(entry["gpu"])})


def served_model(name: str) -> ServedModel:
    """A served model of the catalogue, such as 'bloom-176b'; ValueError lists the names there are."""
    return ServedModel(**_entry("models", name))


def kv_capacity(machine: Hardware, model: ServedModel) -> int:
    """Bytes that the weights leave for KV caches; ValueError if the weights alone do not fit."""
    left = machine.memory_bytes - model.weight_bytes
    if left <= 0:
        raise ValueError(
            f"{model.name} ({model.weight_bytes:,} B) does not fit {machine.name} ({machine.memory_bytes:,} B)"
        )
    return left
