"""The session simulator's laws, the server against generation, the arena, and what the framework says."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.costs.catalogue import accelerator, from_config, tensor_parallel, transformer
from common.costs.roofline import CapacityError, concurrency, kv_bytes, session_seconds
from common.generation.sampler import generate
from common.models.build import build
from papers.long_context_peak import (
    Costs,
    Disk,
    Host,
    KVArena,
    Server,
    elasticities,
    four_metrics,
    minimal_products,
    session_costs,
    simulate,
)
from papers.long_context_peak.method.metrics import BOUND_BY, RESOURCES, upcycled, with_kv_heads
from papers.long_context_peak.method.server import Slot, cache_bytes, prefill
from papers.long_context_peak.method.session import Residency

YI, A100 = transformer("yi-34b-200k"), accelerator("a100-80gb")
COSTS = Costs(prefill=2.0, decode=0.5, out=0.25, into=0.125)  # sums of these are exact
TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


# --- sessions


@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 5), st.integers(0, 3))
def test_users_who_all_fit_never_switch(users: int, rounds: int, think: float, spare: int) -> None:
    found = simulate(COSTS, users, rounds, think, users + spare)
    assert found.switches == 0
    assert found.busy("out", "into") == 0
    assert [sum(e.what == what for e in found.events) for what in ("prefill", "decode")] == [users, users * rounds]


@given(st.integers(1, 8))
def test_one_round_without_thinking_takes_the_sum_of_its_parts_exactly(users: int) -> None:
    assert simulate(COSTS, users, rounds=1, think_seconds=0, resident=users).makespan == users * (2.0 + 0.5)


def test_one_place_and_no_thinking_is_the_worst_order_of_the_closed_form() -> None:
    """Every answer is one to a user who was swapped out: what `roofline.session_seconds` charges."""
    for users, rounds in ((2, 1), (3, 4), (5, 2)):
        found = simulate(COSTS, users, rounds, 0, resident=1)
        assert found.switches == users * rounds
        assert found.makespan == found.busy("prefill", "decode", "out", "into")
    costs, resident = session_costs(YI, A100, 50_000, 250)
    assert resident == 1
    many = simulate(costs, 20, 5, 0, resident)
    one = session_seconds(YI, A100, 50_000, rounds=5, output_tokens=250, users=20)
    assert many.busy("into") / 20 == pytest.approx(one["switch"] / 2)
    assert many.busy("prefill") / 20 == pytest.approx(one["prefill"])
    assert many.busy("decode") / 20 == pytest.approx(one["decode"])


def by_hand(costs: Costs, users: int, rounds: int, think: float, resident: int) -> tuple[float, int]:
    """The same rules without an event engine: a heap of arrivals, a list in order of service."""
    arrivals = [(0.0, user, user, 0) for user in range(users)]
    now, number, inside, outside, switches = 0.0, users, list[int](), set[int](), 0
    while arrivals:
        arrival, _, user, turn = heapq.heappop(arrivals)
        now = max(now, arrival)
        if user in inside:
            inside.remove(user)
        else:
            if len(inside) == resident:
                outside.add(inside.pop(0))
                now += costs.out
            if user in outside:
                outside.remove(user)
                switches += 1
                now += costs.into
        inside.append(user)
        now += costs.decode if turn else costs.prefill
        if turn == rounds:
            inside.remove(user)
        else:
            number += 1
            heapq.heappush(arrivals, (now + think, number, user, turn + 1))
    return now, switches


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 40), st.integers(1, 7))
def test_the_simulation_is_that_of_a_loop_by_hand(users: int, rounds: int, think: int, resident: int) -> None:
    """Costs and times in eighths: no rounding anywhere."""
    found = simulate(COSTS, users, rounds, think / 8, resident)
    assert (found.makespan, found.switches) == by_hand(COSTS, users, rounds, think / 8, resident)
    assert found.per_hour <= found.per_hour_bound * (1 + 1e-12)
    ends = [event.start + event.seconds for event in found.events]
    assert all(start.start >= end for start, end in zip(found.events[1:], ends[:-1], strict=True))  # one at a time
    assert ends[-1] == found.makespan


def test_the_least_recently_served_leaves_first() -> None:
    places = Residency(2)
    assert [places.enter(u) for u in (0, 1, 0, 2, 1, 2)] == [
        (None, False), (None, False), (None, False), (1, False), (0, True), (None, False)
    ]  # fmt: skip
    places.leave(1)
    assert places.enter(0) == (None, True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: simulate(COSTS, 2, 1, 0, 0), CapacityError, "context does not fit: .* the cache of 0 users"),
        (lambda: session_costs(YI, A100, 100_000, 250), CapacityError, "context does not fit"),
        (lambda: simulate(COSTS, 0, 1, 0, 1), ValueError, "users and rounds of at least 1 .* not 0, 1 and 0"),
        (lambda: simulate(COSTS, 1, 0, 0, 1), ValueError, "not 1, 0 and 0"),
        (lambda: simulate(COSTS, 1, 1, -1.0, 1), ValueError, "at least 0 s, not 1, 1 and -1.0"),
        (lambda: Costs(1.0, -2.0), ValueError, "decode takes 0 seconds or more, not -2.0"),
        (lambda: Costs(math.nan, 1.0), ValueError, "prefill takes 0 seconds or more, not nan"),
        (lambda: minimal_products([0.5, 2], 4), ValueError, "factors are 1 or more"),
        (lambda: minimal_products([1, 2], 0), ValueError, "target positive"),
        (lambda: upcycled(YI, 10, 2, 3), ValueError, "all of the 2 experts, not 3"),
        (lambda: with_kv_heads(YI, 9), ValueError, "cannot share 9"),
        (lambda: four_metrics(YI, A100, 0), ValueError, "at least 1, not 0"),
        (lambda: four_metrics(YI, accelerator("rtx-4090"), 4000), CapacityError, "more devices"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- the framework


def test_each_metric_answers_to_its_own_resource_alone() -> None:
    found = elasticities(YI, A100, 50_000)
    for metric, bound in BOUND_BY.items():
        for resource in RESOURCES:
            if metric == "users" and resource == bound:
                assert found[metric][resource] > 1  # the weights are stored once
            else:
                assert found[metric][resource] == (-1.0 if resource == bound else 0.0)


@pytest.mark.parametrize("kv_heads", [1, 8, 56])
def test_other_numbers_of_key_value_heads_count_as_in_a_configuration(kv_heads: int) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=7168, num_hidden_layers=60, num_attention_heads=56, num_key_value_heads=kv_heads,
        intermediate_size=20480, vocab_size=64000, tie_word_embeddings=False,
    )  # fmt: skip
    counted, ours = from_config(config), with_kv_heads(YI, kv_heads)
    assert (ours.parameters, ours.flop_parameters) == (counted.parameters, counted.flop_parameters)
    assert ours.kv_bytes_per_token == counted.kv_bytes_per_token


def test_an_upcycled_model_has_the_parameters_of_a_mixture_but_for_its_router() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": False}
    dense, mlp = from_config(LlamaConfig(**sizes)), 3 * 3 * 32 * 48
    with torch.device("meta"):
        mixture = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=8))
    stored, read = upcycled(dense, mlp, experts=8, active=2)
    assert stored.parameters == sum(p.numel() for p in mixture.parameters()) - 3 * 32 * 8
    assert read.parameters == dense.parameters + mlp
    assert stored.kv_bytes_per_token == read.kv_bytes_per_token == dense.kv_bytes_per_token
    assert upcycled(dense, mlp, 1, 1) == (dense, dense)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(2, 300))
def test_minimal_products_are_those_of_which_no_factor_can_be_lowered(levels: list[int], target: int) -> None:
    found = minimal_products(levels, target, count=3)
    steps = sorted(set(levels))
    reaching = {(a, b, c) for a in steps for b in steps for c in steps if a * b * c >= target}
    below = {w for w in reaching for v in reaching if v != w and all(x <= y for x, y in zip(v, w, strict=True))}
    assert set(found) == reaching - below
    assert len(found) == len(set(found))


def test_the_paths_to_one_million_tokens() -> None:
    found = minimal_products([1, 2, 5, 10], 250)
    assert {math.prod(f) for f in found} == {250, 400}
    assert (10, 5, 5, 1) in found
    assert (10, 10, 5, 1) not in found  # 5 instead of 10 does it, too


def test_users_on_eight_devices_hold_one_million_tokens() -> None:
    assert four_metrics(YI, tensor_parallel(A100, 8), 10**6)["users"] == 2


# --- the arena


def fill(arena: KVArena, tokens: int, slots: list[Slot]) -> None:
    while True:
        slots.append(arena.allocate(tokens))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
def test_an_arena_admits_as_many_as_the_formula_says(kv_heads: int, tokens: int) -> None:
    model = build(TINY, num_key_value_heads=kv_heads)
    shape, size = from_config(model.config, 4, 4), 2**20
    arena, slots = KVArena(model, size), list[Slot]()
    with pytest.raises(CapacityError, match=f"context does not fit: the cache of {tokens} tokens takes"):
        fill(arena, tokens, slots)
    assert len(slots) == concurrency(shape, shape.weight_bytes + size, tokens)
    assert all(slot.buffer.nbytes == kv_bytes(shape, tokens) == cache_bytes(model, tokens) for slot in slots)
    for number, slot in enumerate(slots):
        slot.buffer.fill_(number)
    for number, slot in enumerate(slots):  # no cache lies in another, and the layers' views are the buffer
        parts = [x for layer in slot.cache.layers for x in (layer.keys, layer.values)]
        assert all((x == number).all() for x in parts)
        assert sum(x.nbytes for x in parts) == slot.buffer.nbytes


def test_a_cache_of_the_arena_is_the_models_own() -> None:
    """Keys and values as in `past_key_values`, in float64."""
    model = build(TINY, num_key_value_heads=2, dtype=torch.float64)
    ids = torch.arange(1, 12)
    own = model(ids[None], use_cache=True).past_key_values
    slot = KVArena(model, cache_bytes(model, 20)).allocate(20)
    prefill(model, slot, ids)
    assert slot.length == 11
    for ours, theirs in zip(slot.cache.layers, own.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :11], theirs.keys)
        assert torch.equal(ours.values[:, :, :11], theirs.values)


def test_caches_of_no_token_and_servers_without_room() -> None:
    model = build(TINY)
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        KVArena(model, 100).allocate(0)
    with pytest.raises(ValueError, match="at least 1 token, not -3"):
        Server(model, -3, 1, Host())
    with pytest.raises(CapacityError, match="the cache of 0 users"):
        Server(model, 10, 0, Host())
    with pytest.raises(CapacityError, match=r"context does not fit: 8 [+] 2 x 2 tokens exceed a slot of 11"):
        Server(model, 11, 1, Host()).serve(torch.ones(1, 8, dtype=torch.long), 2, 2, 0)
    with pytest.raises(ValueError, match="at least 0 s, not 1, 2 and -1"):
        Server(model, 12, 1, Host()).serve(torch.ones(1, 8, dtype=torch.long), 2, 2, -1)


# --- the server


@pytest.mark.parametrize("store", ["disk", "host"])
@pytest.mark.parametrize(("architecture", "kv_heads"), [("llama", 4), ("llama", 2), ("qwen2", 1), ("gpt2", None)])
def test_texts_are_those_of_plain_generation_however_many_are_resident(
    store: str, architecture: str, kv_heads: int | None, tmp_path: Path
) -> None:
    """Token equality in float64: swapped out and resumed, or never swapped, or generated in one go."""
    model = build(TINY, architecture=architecture, num_key_value_heads=kv_heads, dtype=torch.float64, seed=1)
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))
    whole = generate(model, list(prompts), 1 + 3 * 2, stop_tokens=(), lean=False)
    expected = [tokens.tolist() for tokens in whole.tokens]
    for resident in (3, 2, 1):
        kept = Disk(tmp_path) if store == "disk" else Host()
        session, texts = Server(model, 15, resident, kept).serve(prompts, 3, 2, 0.001)
        assert texts == expected
        assert (session.switches == 0) == (resident == 3)
        assert sum(e.what == "decode" for e in session.events) == 9
        assert session.makespan >= session.busy("prefill", "decode", "out", "into")
        kept.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_swapped_out_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for store in (Disk(tmp_path), Host()):
        buffer = whole.clone()
        store.write(3, buffer[4:20])
        buffer.zero_()
        store.read(3, buffer[4:20])
        assert torch.equal(buffer[4:20], whole[4:20])
        assert not buffer[:4].any()
        assert not buffer[20:].any()


def test_a_file_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    store = Disk(tmp_path)
    store.write(0, torch.zeros(4))
    with pytest.raises(OSError, match="lacks 16 bytes of the cache"):
        store.read(0, torch.zeros(8))
