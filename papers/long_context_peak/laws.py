"""Two laws on a real model: prefill by the prompt's length, a decode step by the bytes of the cache.

Every timing goes through `common.metrics.timing.compare`; what is compared stands in one call of it. The rounds are
kept as they are, fits are made from them later (analysis.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from common.attention.interface import Attention, Call, attending, dense
from common.metrics.timing import compare
from papers.long_context_peak.machine import Calls, Row, new_slot, rounds_of, tokens_in, tokens_of
from papers.long_context_peak.method.server import Slot, cache_bytes, decode, prefill

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import DynamicCache, PreTrainedModel

THREADS = (1, 2)


def attend_causal(call: Call) -> torch.Tensor:
    """Causal attention; one query reads each key once for all query heads that share it."""
    group = call.query.shape[1] // call.key.shape[1]
    if call.query.shape[2] == 1:
        packed = call.query.reshape(*call.key.shape[:2], group, -1)
        return F.scaled_dot_product_attention(packed, call.key, call.value, scale=call.scale).reshape(call.query.shape)
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (call.key, call.value))
    return dense(call._replace(key=keys, value=values))


def attend_all(call: Call) -> torch.Tensor:
    """Attention of every token to every token, for its time: what a kernel does that does not skip masked keys."""
    group = call.query.shape[1] // call.key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (call.key, call.value))
    return F.scaled_dot_product_attention(call.query, keys, values, scale=call.scale)


@torch.inference_mode()
def filled(model: PreTrainedModel, capacity: int, read: int) -> Slot:
    """A cache of `capacity` tokens: the first `read` are really read, the others repeat their keys and values."""
    slot, read = new_slot(model, capacity), min(read, capacity)
    with attending(model, attend_causal):
        prefill(model, slot, tokens_of(model, read))
    for layer in slot.cache.layers:
        for x in (layer.keys, layer.values):
            for start in range(read, capacity, read):
                x[:, :, start : start + read] = x[:, :, : min(read, capacity - start)]
    return slot


def prefill_rounds(cfg: DictConfig, models: dict[str, PreTrainedModel]) -> list[Row]:
    """Prompts of several lengths, causal and with every pair; the other attention types at one length."""
    calls: Calls = {}
    labels: dict[str, Row] = {}
    for number, (attention, model) in enumerate(models.items()):
        slot = new_slot(model, max(cfg.prefill.tokens))
        arms: dict[str, Attention] = {"causal": attend_causal} | ({} if number else {"every pair": attend_all})
        for tokens in [cfg.prefill.compared] if number else cfg.prefill.tokens:
            for arm, function in arms.items():
                name = f"{attention}, {arm}, {tokens}"
                calls[name] = _reading(model, slot, function, tokens)
                labels[name] = {"law": "prefill", "arm": arm, "attention": attention, "tokens": tokens}
    return rounds_of(compare(calls, rounds=cfg.prefill.rounds), labels)


def _reading(model: PreTrainedModel, slot: Slot, function: Attention, tokens: int) -> Callable[[], None]:
    """Reads a prompt of so many tokens with this function as attention."""
    ids = tokens_of(model, tokens)

    def call() -> None:
        with attending(model, function):
            prefill(model, slot, ids)

    return call


def decode_rounds(cfg: DictConfig, models: dict[str, PreTrainedModel]) -> list[Row]:
    """A decode step behind caches of several sizes, preallocated, and grown by torch.cat as a contrast."""
    own = cfg.decode
    calls: Calls = {}
    labels: dict[str, Row] = {}
    for number, (attention, model) in enumerate(models.items()):
        slot = filled(model, tokens_in(model, max(own.kv_mib)) + 1, own.read)
        sizes = {"preallocated": own.kv_mib, "torch.cat": [] if number else own.growing_mib}
        for arm, kv_mib in sizes.items():
            for size in kv_mib:
                tokens, name = tokens_in(model, size), f"{attention}, {arm}, {size}"
                step = (preallocated if arm == "preallocated" else _growing)(model, slot, tokens)
                calls[name] = _repeat(step, own.steps)
                labels[name] = {
                    "law": "decode", "arm": arm, "attention": attention, "tokens": tokens,
                    "kv_bytes": cache_bytes(model, tokens),
                }  # fmt: skip
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(attending(model, attend_causal))
        return rounds_of(compare(calls, rounds=cfg.rounds), labels, per=own.steps)


def _repeat(step: Callable[[], None], times: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(times):
            step()

    return call


def preallocated(model: PreTrainedModel, slot: Slot, tokens: int) -> Callable[[], None]:
    """A decode step behind the first `tokens` tokens of a cache; the next step forgets it again."""

    def step() -> None:
        slot.length = tokens
        decode(model, slot, 1, 1)

    return step


@torch.inference_mode()
def _growing(model: PreTrainedModel, slot: Slot, tokens: int) -> Callable[[], None]:
    """The same with the cache that transformers grows by torch.cat, which copies it whole for every token."""
    from transformers import DynamicCache

    cache: DynamicCache = DynamicCache()
    for number, layer in enumerate(slot.cache.layers):
        cache.update(layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone(), number)
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def step() -> None:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        cache.crop(-1)

    return step


def thread_rounds(cfg: DictConfig, model: PreTrainedModel) -> list[Row]:
    """A prompt, and a decode step behind the largest cache, with one thread and with two. Wall seconds count here."""
    tokens = tokens_in(model, max(cfg.decode.kv_mib))
    slot, short = filled(model, tokens + 1, cfg.decode.read), new_slot(model, cfg.prefill.compared)
    ids = tokens_of(model, cfg.prefill.compared)
    works: dict[str, Callable[[], Any]] = {
        "prefill": lambda: prefill(model, short, ids),
        "decode": preallocated(model, slot, tokens),
    }

    def on(threads: int, work: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(threads)
            work()

        return call

    calls = {f"{arm}, {n} threads": on(n, work) for arm, work in works.items() for n in THREADS}
    labels = {name: {"law": "threads", "arm": name} for name in calls}
    try:
        with attending(model, attend_causal):
            return rounds_of(compare(calls, rounds=cfg.prefill.rounds), labels)
    finally:
        torch.set_num_threads(cfg.threads)
