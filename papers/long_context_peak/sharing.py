"""What users share: a memory of fixed size, the way out of it, and the time of one device; with real caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common.attention.interface import attending
from common.costs.roofline import CapacityError, concurrency
from common.metrics.timing import compare
from common.models.flops import forward_flops
from papers.long_context_peak.laws import attend_causal, filled, preallocated
from papers.long_context_peak.machine import MIB, Calls, Row, rounds_of, shape_of, tokens_in, tokens_of
from papers.long_context_peak.method.server import KVArena, Server, Slot, Store, cache_bytes, decode, prefill

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel


def arena_rows(cfg: DictConfig, models: dict[str, PreTrainedModel]) -> list[Row]:
    """Sessions admitted to an arena until an allocation fails, each with a copy of a cache that was really read,
    against floor((M - weights) / KV), where M is the arena and the weights."""
    size = int(cfg.arena.mib * MIB)
    rows = []
    for attention, model in models.items():
        shape = shape_of(model)
        for tokens in cfg.arena.tokens:
            one, arena, admitted = filled(model, tokens, tokens), KVArena(model, size), list[Slot]()
            try:
                while True:
                    slot = arena.allocate(tokens)
                    slot.buffer.copy_(one.buffer)
                    admitted.append(slot)
            except CapacityError:
                pass
            rows.append(
                {
                    "attention": attention, "tokens": tokens, "kv_bytes": cache_bytes(model, tokens),
                    "formula": concurrency(shape, shape.weight_bytes + size, tokens), "admitted": len(admitted),
                    "intact": all(torch.equal(slot.buffer, one.buffer) for slot in admitted),
                }
            )  # fmt: skip
    return rows


def switch_rounds(cfg: DictConfig, model: PreTrainedModel, store: Store) -> list[Row]:
    """Context switches: a cache goes out to the store and one of the same size comes in; and a decode step behind the
    largest of them."""
    calls: Calls = {}
    labels: dict[str, Row] = {}
    for number, size in enumerate(cfg.switch.kv_mib):
        tokens = tokens_in(model, size)
        label: Row = {"law": "switch", "arm": "switch", "tokens": tokens, "kv_bytes": cache_bytes(model, tokens)}
        slot = filled(model, tokens + 1, cfg.decode.read)
        used = slot.buffer[: label["kv_bytes"] // slot.buffer.itemsize]
        calls[str(size)], labels[str(size)] = _switching(used, number, store), label
        if size == max(cfg.switch.kv_mib):
            calls["step"], labels["step"] = preallocated(model, slot, tokens), label | {"arm": "decode step"}
    with attending(model, attend_causal):
        timings = compare(calls, rounds=cfg.rounds)
    store.clear()
    return rounds_of(timings, labels)


def _switching(buffer: torch.Tensor, name: int, store: Store) -> Callable[[], None]:
    def call() -> None:
        store.write(name, buffer)
        store.read(name, buffer)

    return call


def session_rounds(cfg: DictConfig, model: PreTrainedModel, store: Store) -> tuple[list[Row], list[Row], list[Row]]:
    """The server with memory for all users, for fewer and for one: its texts, the records of them, and all times.

    The first run of each server gives the texts and warms up. The costs that the simulation is fed with are measured
    on the same model, one request at a time.
    """
    own = cfg.session
    prompts = torch.stack([tokens_of(model, own.tokens, cfg.seed + user) for user in range(own.users)])
    capacity = own.tokens + own.rounds * own.output_tokens
    servers = {n: Server(model, capacity, n, store) for n in own.resident}
    arguments = (own.rounds, own.output_tokens, own.think_seconds)
    served, samples = list[Row](), list[Row]()
    reference: list[list[int]] = []
    for resident, server in servers.items():
        session, texts = server.serve(prompts, *arguments)
        reference = reference or texts
        same = [text == whole for text, whole in zip(texts, reference, strict=True)]
        served.append(
            {"resident": resident, "users": own.users, "swapped": session.switches > 0, "tokens": len(texts[0])}
            | {"same_text": sum(same)}
        )
        samples += _samples(cfg, model, f"resident {resident}", texts, same, session.makespan)
    costs = _single_requests(cfg, model, servers[own.resident[-1]].slots[0], prompts[0], store)
    labels = {name: {"law": "costs", "arm": name, "tokens": own.tokens} for name in costs}
    rows = rounds_of(compare(costs, rounds=own.repeats), labels)
    runs: Calls = {
        f"resident {n}": lambda server=server: server.serve(prompts, *arguments) for n, server in servers.items()
    }
    labels = {name: {"law": "session", "arm": name, "tokens": own.tokens} for name in runs}
    rows += rounds_of(compare(runs, rounds=own.repeats, warmup=0), labels)
    return served, samples, rows


def _single_requests(
    cfg: DictConfig, model: PreTrainedModel, slot: Slot, prompt: torch.Tensor, store: Store
) -> dict[str, Callable[[], Any]]:
    """What a server does for one request: the fields of `Costs`."""
    own = cfg.session
    middle = own.tokens + (own.rounds - 1) * own.output_tokens // 2  # of the contexts at which answers begin

    def answer() -> None:
        slot.length = middle
        decode(model, slot, 1, own.output_tokens)

    return {
        "prefill": lambda: prefill(model, slot, prompt),
        "decode": answer,
        "out": lambda: store.write(0, slot.buffer),
        "into": lambda: store.read(0, slot.buffer),
    }


def _samples(
    cfg: DictConfig, model: PreTrainedModel, arm: str, texts: list[list[int]], same: list[bool], seconds: float
) -> list[Row]:
    """A row of the common schema for each user's text, correct if it is that of a user who was never swapped out."""
    own, config = cfg.session, model.config
    flops = forward_flops(config, own.tokens, 0, 1, 1)
    flops += sum(forward_flops(config, 1, own.tokens + i) for i in range(own.rounds * own.output_tokens))
    return [
        {
            "arm": arm, "task": "session", "problem_id": user, "sample_id": 0, "difficulty": own.tokens,
            "prompt_tokens": own.tokens, "output_tokens": len(text), "discarded_tokens": 0, "forwards": len(text),
            "flops": flops, "seconds": seconds / len(texts), "answer": " ".join(map(str, text)), "correct": equal,
        }
        for user, (text, equal) in enumerate(zip(texts, same, strict=True))
    ]  # fmt: skip
