"""Build a Hugging Face causal language model from a named tiny configuration, with random weights from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = ("llama", "qwen2", "gpt2")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder-only model, in the words of `transformers`, the same for every architecture.

    num_key_value_heads: None is one per query head (GPT-2 has no other). intermediate_size: width of the gated MLP of
    Llama and Qwen2; GPT-2's plain MLP gets 1.5 times that, so that the parameter counts agree. initializer_range:
    standard deviation of the initial weights; None is 1/sqrt(hidden_size), with which narrow models learn faster than
    with the 0.02 that suits wide ones.
    """

    architecture: str = "llama"
    vocab_size: int = 32
    hidden_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int = 192
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}; known: {', '.join(ARCHITECTURES)}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.hidden_size=} is not a multiple of {self.num_attention_heads=}")
        groups = self.num_key_value_heads
        if groups is not None and (groups < 1 or self.num_attention_heads % groups):
            raise ValueError(f"{self.num_attention_heads=} is not a multiple of {groups=} (num_key_value_heads)")
        if self.architecture == "gpt2" and groups not in (None, self.num_attention_heads):
            raise ValueError(f"GPT-2 has one key-value head per query head, not {groups}")


# Named by their parameters with a 32-symbol vocabulary; `count_parameters` gives the number for any other.
SIZES: dict[str, ModelConfig] = {
    "0.1m": ModelConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=176),
    "0.28m": ModelConfig(hidden_size=96, num_hidden_layers=3, intermediate_size=192),
    "0.8m": ModelConfig(hidden_size=128, num_hidden_layers=4, intermediate_size=344),
    "30m": ModelConfig(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=960),
}


def named_config(name: str) -> ModelConfig:
    """The configuration called '<architecture>-<size>', for example 'llama-0.28m'; ValueError lists the valid names."""
    architecture, _, size = name.partition("-")
    if architecture not in ARCHITECTURES or size not in SIZES:
        known = ", ".join(f"{a}-{s}" for a in ARCHITECTURES for s in SIZES)
        raise ValueError(f"unknown model {name!r}; known: {known}")
    return replace(SIZES[size], architecture=architecture)


def model_config(config: str | Mapping[str, Any] | ModelConfig, **overrides: Any) -> ModelConfig:
    """A name, a mapping (a YAML node; key `name` starts from a named one) or a ModelConfig, with fields overridden.

    Raises ValueError for an unknown name or key and for sizes that do not fit together.
    """
    given: dict[str, Any] = {}
    if isinstance(config, str):
        base = named_config(config)
    elif isinstance(config, ModelConfig):
        base = config
    else:
        given = {str(key): value for key, value in config.items()}
        name = given.pop("name", None)
        base = ModelConfig() if name is None else named_config(name)
    given |= overrides
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"unknown model setting {', '.join(unknown)}; known: name, {', '.join(sorted(known))}")
    return replace(base, **given)


def build(
    config: str | Mapping[str, Any] | ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **overrides: Any,
) -> PreTrainedModel:
    """A `transformers` model with random weights, in evaluation mode, on the CPU.

    config, overrides: see `model_config`. seed: the weights are a function of it alone; torch's global generator is
    left as it was. attention: 'sdpa' or 'eager' (faster for training at these sizes on a CPU).
    """
    from transformers import AutoModelForCausalLM

    own = model_config(config, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_hub_config(own), dtype=dtype, attn_implementation=attention)
    return model.eval()


def _hub_config(own: ModelConfig) -> PretrainedConfig:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    sizes = asdict(own)
    architecture = sizes.pop("architecture")
    sizes["initializer_range"] = own.initializer_range or own.hidden_size**-0.5
    sizes["bos_token_id"] = None
    sizes["num_key_value_heads"] = own.num_key_value_heads or own.num_attention_heads
    if architecture == "gpt2":
        del sizes["num_key_value_heads"]
        sizes["n_inner"] = sizes.pop("intermediate_size") * 3 // 2
        return GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return (LlamaConfig if architecture == "llama" else Qwen2Config)(**sizes)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
