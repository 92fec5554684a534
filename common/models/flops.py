"""Floating-point operations of a forward pass with a KV cache, in closed form.

A multiplication and an addition are counted as two operations, and only matrix products count, as in
torch.utils.flop_counter; the formulas are exact against it (tests/common/models/test_models_flops.py).
"""

from __future__ import annotations

from typing import Any

SUPPORTED = ("llama", "qwen2", "gpt2")


def forward_flops(
    config: Any, new_tokens: int, past_tokens: int = 0, batch: int = 1, logit_tokens: int | None = None
) -> int:
    """Operations of one forward pass of a `transformers` causal LM (Llama, Qwen2 or GPT-2).

    config: the model's configuration. new_tokens: query tokens per row. past_tokens: keys already in the cache per row,
    so that attention spans past_tokens + new_tokens keys (masked ones cost the same). batch: rows. logit_tokens:
    positions per row that go through the output head (default: all new tokens).
    Raises ValueError for another architecture or for a negative count.
    """
    if config.model_type not in SUPPORTED:
        raise ValueError(f"no FLOP count for model type {config.model_type!r}; known: {', '.join(SUPPORTED)}")
    logit_tokens = new_tokens if logit_tokens is None else logit_tokens
    if min(new_tokens, past_tokens, batch, logit_tokens) < 0:
        raise ValueError(f"negative count: {new_tokens=}, {past_tokens=}, {batch=}, {logit_tokens=}")
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    if config.model_type == "gpt2":
        inner = config.n_inner if config.n_inner is not None else 4 * hidden
        weights = 4 * hidden * hidden + 2 * hidden * inner  # fused q, k, v; output projection; two MLP matrices
    else:
        key_value = config.num_key_value_heads * head_dim
        weights = 2 * hidden * heads * head_dim + 2 * hidden * key_value + 3 * hidden * config.intermediate_size
    attention = 4 * heads * head_dim * (past_tokens + new_tokens)  # q k^T and weights v
    per_token = config.num_hidden_layers * (2 * weights + attention)
    return batch * (new_tokens * per_token + logit_tokens * 2 * hidden * config.vocab_size)
