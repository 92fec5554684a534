"""What a transformer's inference costs in closed form: prefill, decode, KV cache, concurrency, context switch.

    KV(S)      = 2 L H_kv d_h b S                                  bytes of S tokens, keys and values
    prefill(S) = max(S (2N + c L d S) / F, weights / B)            seconds; bound by operations for all but short S
    decode(o)  = o max((weights + m KV(S)) / B, m (2N + 4 L d S) / F)   for m users; bound by bandwidth for few
    users(S)   = floor((M - weights) / KV(S))                      bound by the size of the memory
    switch(S)  = 2 KV(S) / P                                       one user's cache out, another's in, over the link

F operations/s, B bytes/s, M bytes, P bytes/s to the host. Yao Fu, "Challenges in Deploying Long-Context Transformers: A
Theoretical Peak Performance Analysis" (arXiv 2405.08944), sections on the four metrics. Beyond the paper: prefill reads
the weights too, and decoding counts the operations of attention. Both terms leave its numbers as they are. Peak rates
are never reached; a measured rate goes in as an `Accelerator` with measured figures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from common.costs.catalogue import Accelerator, Transformer

# c in c L d S^2: QK^T and AV are 4 operations for each pair of a query and a key, and a causal mask leaves half the
# pairs. `full` is what torch.utils.flop_counter counts and an attention that does not skip masked pairs does; `halved`
# gives the values that the paper is reported with (inferred from them); `linear` leaves attention out.
ATTENTION = {"full": 4, "causal": 2, "halved": 1, "linear": 0}


class CapacityError(ValueError):
    """The weights, or one user's context, do not fit into the memory."""


def _check_tokens(tokens: ArrayLike, least: int = 1) -> None:
    if (np.asarray(tokens) < least).any():
        raise ValueError(f"token counts must be at least {least}, not {int(np.min(tokens))}")


def kv_bytes(model: Transformer, tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens in all layers (equation 1 of the module)."""
    _check_tokens(tokens)
    return round(model.kv_bytes_per_token * tokens)


def compressed(
    model: Transformer, layer: float = 1.0, head: float = 1.0, token: float = 1.0, hidden: float = 1.0
) -> Transformer:
    """The model with the share of its KV cache that methods along the four dimensions leave, each in (0, 1].

    Concurrency, the KV part of decoding and the context switch improve by the product. Prefill does not: a method that
    drops tokens before attention is a smaller S.
    """
    for name, share in (("layer", layer), ("head", head), ("token", token), ("hidden", hidden)):
        if not 0 < share <= 1:
            raise ValueError(f"the share that {name} compression leaves must lie in (0, 1], not {share}")
    return replace(model, kv_share=model.kv_share * layer * head * token * hidden)


def prefill_flops(model: Transformer, tokens: int, attention: str = "causal") -> int:
    """Operations of reading a prompt of S tokens, S (2N + c L d S), logits of every token included."""
    _check_tokens(tokens)
    if attention not in ATTENTION:
        raise ValueError(f"unknown attention convention {attention!r}; known: {', '.join(ATTENTION)}")
    square = ATTENTION[attention] * model.layers * model.attention_width * tokens
    return tokens * (2 * model.flop_parameters + square)


def decode_flops(model: Transformer, context: int) -> int:
    """Operations of one token that attends to `context` keys, its own included."""
    _check_tokens(context)
    return 2 * model.flop_parameters + 4 * model.layers * model.attention_width * context


def prefill_seconds(model: Transformer, machine: Accelerator, tokens: int, attention: str = "causal") -> float:
    """Seconds of reading a prompt of `tokens` tokens: the larger of its operations and one reading of the weights."""
    compute = prefill_flops(model, tokens, attention) / machine.flops_per_s
    return max(compute, model.weight_bytes / machine.memory_bytes_per_s)


def decode_seconds(
    model: Transformer, machine: Accelerator, context: int, output_tokens: int = 1, users: int = 1
) -> float:
    """Seconds of `output_tokens` steps of a batch of `users`, each with a cache of `context` tokens.

    A step reads the weights once for all users and each user's cache; the context is held fixed, as in the paper
    (`query_seconds` lets it grow).
    """
    _check_tokens(context)
    if output_tokens < 0 or users < 1:
        raise ValueError(f"decoding needs output_tokens >= 0 and users >= 1, not {output_tokens} and {users}")
    memory = (model.weight_bytes + users * kv_bytes(model, context)) / machine.memory_bytes_per_s
    return output_tokens * max(memory, users * decode_flops(model, context) / machine.flops_per_s)


def concurrency(model: Transformer, memory_bytes: int, context: int) -> int:
    """How many users' caches of `context` tokens fit beside the weights: floor((M - weights) / KV(S)), possibly 0.

    memory_bytes: `Accelerator.memory_bytes`, or `label_bytes` for decimal gigabytes. Raises CapacityError if the
    weights alone do not fit.
    """
    left = memory_bytes - model.weight_bytes
    if left < 0:
        raise CapacityError(
            f"the weights of {model.name} ({model.weight_bytes:,} B) do not fit into {memory_bytes:,} B; "
            "spread them over more devices (`tensor_parallel`) or store them in fewer bytes"
        )
    return left // kv_bytes(model, context)


def switch_seconds(model: Transformer, machine: Accelerator, context: int) -> float:
    """Seconds of a context switch: one user's cache goes to the host's memory and another's comes back."""
    return 2 * kv_bytes(model, context) / machine.host_bytes_per_s


def session_seconds(
    model: Transformer, machine: Accelerator, context: int, rounds: int, output_tokens: int, users: int
) -> dict[str, float]:
    """Busy seconds of one user's session: {'prefill', 'decode', 'switch'}.

    The paper's framework in its simplest reading (its formula was not seen): a user reads a document once and asks
    `rounds` questions, each answered by `output_tokens` tokens, served one user at a time. With more users than fit
    into the memory, each round pays a context switch (the worst order: all take turns). 3600 / sum(...) bounds the
    sessions per hour. Raises CapacityError if not even one context fits.
    """
    if min(rounds, users) < 1:
        raise ValueError(f"a session needs rounds and users of at least 1, not {rounds} and {users}")
    resident = concurrency(model, machine.memory_bytes, context)
    if not resident:
        raise CapacityError(
            f"context does not fit: the cache of {context:,} tokens ({kv_bytes(model, context):,} B) exceeds what the "
            f"weights of {model.name} leave of {machine.name}"
        )
    switches = rounds if users > resident else 0
    return {
        "prefill": prefill_seconds(model, machine, context),
        "decode": rounds * decode_seconds(model, machine, context, output_tokens),
        "switch": switches * switch_seconds(model, machine, context),
    }


def query_seconds(
    model: Transformer, machine: Accelerator, prompt_tokens: ArrayLike, output_tokens: ArrayLike
) -> np.ndarray:
    """Seconds of single queries [n]: the prompt gives the first token, each further one a step with the grown cache.

    prompt_tokens, output_tokens: integers [n]; no output is scoring only. The sum over steps is exact.
    """
    prompt, output = np.broadcast_arrays(np.asarray(prompt_tokens), np.asarray(output_tokens))
    _check_tokens(prompt)
    _check_tokens(output, 0)
    steps = np.maximum(output - 1, 0)
    prompts, which = np.unique(prompt, return_inverse=True)
    prefill = np.array([prefill_seconds(model, machine, int(tokens)) for tokens in prompts])[
        which.reshape(prompt.shape)
    ]
    context = np.arange(1, int((prompt + steps).max(initial=0)) + 1)
    memory = (model.weight_bytes + model.kv_bytes_per_token * context) / machine.memory_bytes_per_s
    attention = 4.0 * model.layers * model.attention_width
    compute = (2.0 * model.flop_parameters + attention * context) / machine.flops_per_s
    until = np.concatenate([[0.0], np.maximum(memory, compute).cumsum()])  # until[k]: steps that attend to 1..k keys
    return prefill + until[prompt + steps] - until[prompt]
