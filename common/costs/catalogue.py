"""Accelerators and transformers as the roofline sees them: a few numbers each, with their source (catalogue.yaml)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from common.models.flops import forward_flops
from common.serving.catalogue import GIB, gpu

GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


@dataclass(frozen=True)
class Accelerator:
    """What bounds inference: flops_per_s (dense bfloat16), bytes of memory, bytes/s of memory and to the host, watts.

    memory_bytes: what the device holds. label_bytes: the number on the box read as decimal gigabytes; 80 "GB" are
    80 GiB, and the 7% between them decide whether one more context fits. host_bytes_per_s: one direction.
    """

    name: str
    flops_per_s: float
    memory_bytes: int
    label_bytes: int
    memory_bytes_per_s: float
    host_bytes_per_s: float
    watts: float
    source: str


@dataclass(frozen=True)
class Transformer:
    """A dense decoder-only transformer.

    heads, kv_heads: query heads, and key-value heads (fewer for GQA, one for MQA). parameters: all weights, which
    memory holds. flop_parameters: those that a token is multiplied with, two operations each (an input embedding is a
    lookup, a norm is no matrix product). bytes_per_weight, bytes_per_kv: 2 for bfloat16. kv_share: the part of the KV
    cache that compression leaves.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    flop_parameters: int
    source: str
    bytes_per_weight: float = 2
    bytes_per_kv: int = 2
    kv_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "parameters", "flop_parameters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: {self.heads} query heads cannot share {self.kv_heads} key-value heads evenly"
            )
        if not 0 < self.kv_share <= 1:
            raise ValueError(f"{self.name}: kv_share must lie in (0, 1], not {self.kv_share}")

    @property
    def weight_bytes(self) -> int:
        return round(self.parameters * self.bytes_per_weight)

    @property
    def kv_bytes_per_token(self) -> float:
        """2 L H_kv d_h b, keys and values of all layers; a whole number unless the cache is compressed."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_kv * self.kv_share

    @property
    def attention_width(self) -> int:
        """Of the queries of all heads, which equals the hidden size in most models."""
        return self.heads * self.head_dim


@cache
def _content() -> dict[str, dict[str, dict[str, Any]]]:
    return yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text())


def names(section: str) -> list[str]:
    """The entries of a section, 'accelerators' or 'models'."""
    return list(_content()[section])


def _entry(section: str, name: str) -> dict[str, Any]:
    if name not in _content()[section]:
        raise ValueError(f"unknown {section[:-1]} {name!r}; known: {', '.join(names(section))}")
    return dict(_content()[section][name])


def accelerator(name: str) -> Accelerator:
    """An accelerator of the catalogue, such as 'a100-80gb'; ValueError lists the names there are."""
    entry = _entry("accelerators", name)
    source = entry["source"]
    if "gpu" in entry:
        entry = asdict(gpu(entry["gpu"])) | entry
        source = f"{gpu(entry['gpu']).source}; {source}"
    return Accelerator(
        name,
        flops_per_s=entry["bf16_tflops"] * 1e12,
        memory_bytes=round(entry["memory_gib"] * GIB),
        label_bytes=entry["memory_label_gb"] * 10**9,
        memory_bytes_per_s=entry["memory_gb_per_s"] * 1e9,
        host_bytes_per_s=entry["host_gb_per_s"] * 1e9,
        watts=entry["tdp_watts"],
        source=source,
    )


def tensor_parallel(one: Accelerator, devices: int) -> Accelerator:
    """`devices` of them as one: operations, memory, bandwidth and power add up; communication is free.

    The link to the host is that of one device, as in the closed form of `roofline.switch_seconds`.
    """
    if devices < 1:
        raise ValueError(f"tensor parallelism needs at least 1 device, not {devices}")
    summed = ("flops_per_s", "memory_bytes", "label_bytes", "memory_bytes_per_s", "watts")
    return replace(one, name=f"{devices} x {one.name}", **{field: devices * getattr(one, field) for field in summed})


def transformer(name: str) -> Transformer:
    """A model of the catalogue, such as 'yi-34b-200k'; ValueError lists the names there are."""
    return Transformer(name=name, **_entry("models", name))


@cache
def from_checkpoint(source: str | Path, network: bool = False) -> Transformer:
    """Of a folder in hub format, or of a shared model's folder: its weights `final`, or the checkpoint of the hub that
    its model.json names, for profiles that allow downloads. Raises FileNotFoundError as `common.models.hub` does.

    A folder is read without `transformers`, whose import would take longer than all that is done with the result.
    """
    folder = Path(source)
    if (folder / "model.json").exists():
        source = str(json.loads((folder / "model.json").read_text())["hub_id"])
    elif (folder / "final").is_dir():
        source = folder / "final"
    if not (Path(source) / "config.json").exists():
        from transformers import AutoConfig

        from common.models.hub import check_source

        check_source(source, network, ["config.json"])
        return from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    from safetensors import safe_open

    parameters = 0
    for file in Path(source).glob("*.safetensors"):
        with safe_open(file, framework="np") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    told = json.loads((Path(source) / "config.json").read_text())
    told |= {name: told[old] for name, old in GPT2_NAMES.items() if old in told}
    return _shape(SimpleNamespace(name_or_path=str(source), **told), parameters)


def from_config(config: Any, bytes_per_weight: int = 2, bytes_per_kv: int = 2) -> Transformer:
    """The transformer of a Hugging Face configuration (Llama, Qwen2 or GPT-2), counted on the meta device.

    Raises ValueError for an architecture without a FLOP count.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = _shape(config, sum(parameter.numel() for parameter in model.parameters()))
    return replace(counted, bytes_per_weight=bytes_per_weight, bytes_per_kv=bytes_per_kv)


def _shape(config: Any, parameters: int) -> Transformer:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * config.num_hidden_layers * heads * head_dim  # of one token that attends to itself alone
    return Transformer(
        name=config.name_or_path or config.model_type,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        parameters=parameters,
        flop_parameters=(forward_flops(config, new_tokens=1) - attention) // 2,
        source="its configuration",
    )
