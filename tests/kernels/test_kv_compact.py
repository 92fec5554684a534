from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_compact import cost, kv_compact, reference

SETTINGS = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def tensors(where, paths, counts, contexts):
    width = max(map(len, paths))
    rows = [path + [10**6] * (width - len(path)) for path in paths]
    return tuple(torch.tensor(x, dtype=torch.int32, device=where.device) for x in (rows, counts, contexts))


@SETTINGS
@given(
    data=st.data(),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    d=st.sampled_from([5, 16, 64]),
    drafted=st.sampled_from([1, 7, 90]),
    caches=st.integers(1, 3),
)
def test_parity(where, data, batch, heads, d, drafted, caches):
    """Ragged paths and contexts; sources and targets overlap, beyond one tile of rows, too. Other rows stay."""
    dtype = data.draw(st.sampled_from(where.dtypes))
    paths, counts, contexts = [], [], []
    for _ in range(batch):
        path = sorted(data.draw(st.sets(st.integers(0, drafted - 1), min_size=1)))
        paths.append(path)
        counts.append(data.draw(st.integers(0, len(path))))
        contexts.append(data.draw(st.integers(0, 4)))
    args = tensors(where, paths, counts, contexts)
    layers = [where.random(batch, heads, drafted + 4, d, dtype=dtype, seed=i) for i in range(caches)]
    expected = [reference(layer, *args) for layer in layers]
    kv_compact(layers, *args)
    assert all(torch.equal(layer, want) for layer, want in zip(layers, expected, strict=True))


def test_every_second_of_many_rows_overlaps(where):
    path = [[0, *range(1, 150, 2)]]
    layer = where.random(1, 1, 160, 16)
    args = tensors(where, path, [len(path[0])], [3])
    expected = reference(layer, *args)
    kv_compact([layer], *args)
    assert torch.equal(layer, expected)


def test_slices_of_preallocated_caches(where):
    """Keys and values of two layers as `PreallocatedLayer` returns them; what lies around the slices stays."""
    whole = [where.random(2, 3, 40, 16, seed=i) for i in range(4)]
    before = [cache.clone() for cache in whole]
    args = tensors(where, [[0, 2, 5], [0, 1, 3]], [3, 3], [9, 12])
    kv_compact([cache[:, 1:, :30] for cache in whole], *args)
    for cache, old in zip(whole, before, strict=True):
        assert torch.equal(cache[:, :1], old[:, :1])
        assert torch.equal(cache[:, 1:, 30:], old[:, 1:, 30:])
        assert torch.equal(cache[:, 1:, :30], reference(old[:, 1:, :30], *args))


def test_two_steps_of_one_cache(where):
    """The second call finds the addresses of the first; contexts grow."""
    layers = [where.random(1, 2, 20, 8, seed=i) for i in range(2)]
    for context in (2, 5):
        args = tensors(where, [[0, 3, 4]], [3], [context])
        expected = [reference(layer, *args) for layer in layers]
        kv_compact(layers, *args)
        assert all(torch.equal(layer, want) for layer, want in zip(layers, expected, strict=True))


def test_compacted_is_what_a_fresh_prefill_would_hold(where):
    """Row i of the cache holds position i's key when the draft's rejected rows are gone."""
    keys = torch.arange(12.0, device=where.device)[None, None, :, None].repeat(1, 1, 1, 8)
    kv_compact([keys], *tensors(where, [[0, 2, 3, 6]], [4], [5]))
    assert keys[0, 0, :9, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 11]


@pytest.mark.parametrize(
    ("paths", "counts", "contexts", "says"),
    [
        ([[0, 2, 2]], [3], [1], r"path must ascend from 0 or more: sequence 0 is \[0, 2, 2\]"),
        ([[3, 1]], [2], [1], r"path must ascend .* \[3, 1\]"),
        ([[-1, 1]], [2], [1], r"path must ascend from 0 or more"),
        ([[0, 1]], [3], [1], r"count goes from 3 to 3: path has 0\.\.2 nodes"),
        ([[0, 5]], [2], [6], r"lead to row 11: the caches have rows 0\.\.9"),
        ([[0, 5]], [2], [-1], r"ctx_len \[-1\]"),
    ],
)
def test_bad_paths(paths, counts, contexts, says):
    args = [torch.tensor(x, dtype=torch.int32) for x in (paths, counts, contexts)]
    with pytest.raises(ValueError, match=says):
        kv_compact([torch.randn(1, 2, 10, 8)], *args)


def test_bad_caches(paths):
    args = tensors(paths["torch"], [[0, 1]], [2], [1])
    cache = torch.randn(1, 2, 10, 8)
    with pytest.raises(ValueError, match="caches is empty"):
        kv_compact([], *args)
    with pytest.raises(ValueError, match=r"cache 1 is torch.float32 .*compact caches of one layout together"):
        kv_compact([cache, torch.randn(1, 2, 11, 8)], *args)
    with pytest.raises(ValueError, match=r"path must be \[B, P\] with B = 2 as in cache"):
        kv_compact([torch.randn(2, 2, 10, 8)], *args)
    with pytest.raises(TypeError, match=r"path is torch.int64: pass int32"):
        kv_compact([cache], args[0].long(), *args[1:])
    with pytest.raises(ValueError, match=r"pass cache\.contiguous\(\)"):
        kv_compact([cache.mT.contiguous().mT], *args)


def test_cost_is_reading_and_writing_what_moves():
    assert cost(caches=4, heads=2, moved=3, head_dim=16) == (2 * 4 * 2 * 3 * 16 * 2, 0)
