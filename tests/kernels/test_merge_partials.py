from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.merge_partials import State, cost, merge_partials, reference

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def parts_of(where, parts, rows, d, seed=0, size=1.0, empty=()):
    """Random parts; those numbered in `empty` have no key."""
    o, m = where.random(parts, rows, d, seed=seed), where.random(parts, rows, seed=seed + 1, size=size)
    l = where.random(parts, rows, seed=seed + 2).abs() + 1
    for part in empty:
        o[part], m[part], l[part] = 0, -torch.inf, 0
    return State(o, m, l)


@SETTINGS
@given(
    data=st.data(),
    counts=st.lists(st.sampled_from([0, 1, 2, 17, 33]), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    d=st.sampled_from([5, 16, 64]),
    size=st.sampled_from([1.0, 300.0]),
    with_own=st.booleans(),
)
def test_parity(where, data, counts, rows, d, size, with_own):
    """Ragged numbers of parts, none at all, parts without keys, maxima beyond +-200."""
    total = sum(counts) + 2  # two behind the last head's, which nobody may read
    dtype = data.draw(st.sampled_from([t for t in where.dtypes if t != torch.float64]))
    empty = data.draw(st.sets(st.integers(0, total - 1), max_size=2))
    parts = parts_of(where, total, rows, d, size=size, empty=empty)
    for part in parts:
        part[sum(counts) :] = torch.nan
    start = torch.tensor([0, *counts], dtype=torch.int32, device=where.device).cumsum(0, dtype=torch.int32)
    own = parts_of(where, len(counts), rows, d, seed=7, size=size) if with_own else None
    merged = merge_partials(*parts, start, own, dtype)
    expected = reference(*parts, start.tolist(), own)
    assert merged.o.dtype == dtype
    where.close(merged.o, expected.o, dtype)
    torch.testing.assert_close(merged.m.double(), expected.m)
    where.close(merged.l, expected.l, torch.float32)


def test_equal_numbers_of_parts(where):
    parts = parts_of(where, 6, 2, 16)
    start = torch.tensor([0, 3, 6], dtype=torch.int32, device=where.device)
    for few, ragged in zip(merge_partials(*parts, 3), merge_partials(*parts, start), strict=True):
        assert torch.equal(few, ragged)


def test_merging_is_associative_and_order_free(where):
    parts = parts_of(where, 4, 2, 16, size=5.0)
    whole = merge_partials(*parts, 4)
    turned = merge_partials(*(t.flip(0) for t in parts), 4)
    first, second = (merge_partials(*(t[i : i + 2] for t in parts), 2) for i in (0, 2))
    for other in (turned, merge_partials(*first, 1, second)):
        where.close(other.o, whole.o, torch.float32)
        where.close(other.m + other.l.log2(), whole.m + whole.l.log2(), torch.float32)


def test_without_parts_the_own_state_comes_back_unchanged(where):
    own = parts_of(where, 2, 3, 16)
    none = State(*(t[:0] for t in own))
    start = torch.zeros(3, dtype=torch.int32, device=where.device)
    merged = merge_partials(*none, start, own)
    torch.testing.assert_close(merged.o, own.o, rtol=1e-6, atol=1e-6)  # (o l) / l
    assert torch.equal(merged.m, own.m)
    assert torch.equal(merged.l, own.l)
    empty = merge_partials(*none, start)
    assert float(empty.o.abs().max()) == float(empty.l.max()) == 0
    assert float(empty.m.max()) == -torch.inf


def test_parts_of_a_split_make_attention_on_the_whole(where):
    """Attention to parts of the keys, computed with torch, merged."""
    q, k, v = where.random(1, 3, 16, size=6.0), where.random(1, 50, 16, seed=1), where.random(1, 50, 16, seed=2)
    states = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        x = (q @ k[:, part].mT).double() * 1.4426950408889634
        m = x.amax(-1)
        p = torch.exp2(x - m[..., None])
        states.append((p @ v[:, part].double() / p.sum(-1, keepdim=True), m, p.sum(-1)))
    merged = merge_partials(*(torch.cat(t).float() for t in zip(*states, strict=True)), 3)
    where.close(merged.o, (q @ k.mT).double().softmax(-1) @ v.double(), torch.float32)


def test_bad_input(paths):
    o, m, l = parts_of(paths["torch"], 4, 2, 8)
    with pytest.raises(ValueError, match=r"m must be \[P, R\] with P = 4 as in o, not \[3, 2\]"):
        merge_partials(o, m[:3], l, 2)
    with pytest.raises(ValueError, match="4 parts cannot be 3 for every head"):
        merge_partials(o, m, l, 3)
    with pytest.raises(TypeError, match=r"o is torch.float16: pass float32"):
        merge_partials(o.half(), m, l, 2)
    with pytest.raises(TypeError, match=r"start is torch.int64: pass int32"):
        merge_partials(o, m, l, torch.tensor([0, 4]))
    with pytest.raises(TypeError, match=r"own_m is torch.float16: pass float32"):
        merge_partials(o, m, l, 2, State(o[:2], m[:2].half(), l[:2]))
    with pytest.raises(ValueError, match=r"own has shapes \[1, 2, 8\], .* a head is o \[2, 2, 8\], m and l \[2, 2\]"):
        merge_partials(o, m, l, 2, State(o[:1], m[:1], l[:1]))


def test_cost():
    assert cost(parts=10, heads=2, rows=3, head_dim=64).bytes == 30 * 64 * 4 + 30 * 8 + 6 * (64 * 2 + 8)
