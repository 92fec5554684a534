from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.merge_partials import merge_partials
from kernels.sparse_attention import cost, reference, sparse_attention

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def inputs(where, heads=2, group=2, queries=1, keys=40, counts=(3, 17), d=16, dtype=torch.float32, size=1.0):
    """q, k, v, idx, cnt: a list for each of `counts`; behind a list's end stand indices far out of range."""
    q = where.random(heads * group, queries, d, dtype=dtype, size=size)
    k, v = (where.random(heads, keys, d, dtype=dtype, seed=i, size=size) for i in (1, 2))
    draw = torch.Generator().manual_seed(3)
    idx = torch.stack([torch.randperm(keys, generator=draw) for _ in counts]).to(torch.int32)
    for row, count in zip(idx, counts, strict=True):
        row[count:] = 10**6
    return q, k, v, idx.to(where.device), torch.tensor(counts, dtype=torch.int32, device=where.device)


def merged(where, *args, scale, dtype):
    parts = sparse_attention(*args, scale=scale)
    return merge_partials(*parts, dtype=dtype).o.view(args[0].shape)


@SETTINGS
@given(
    data=st.data(),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 2]),
    queries=st.sampled_from([1, 3, 33]),
    keys=st.sampled_from([1, 40, 300]),
    d=st.sampled_from([8, 24, 64]),
    size=st.sampled_from([1.0, 12.0]),
    per_query_head=st.booleans(),
)
def test_parity(where, data, heads, group, queries, keys, d, size, per_query_head):
    """Ragged and empty lists, one for a group or one for each query head, logits beyond +-200."""
    lists = heads * group if per_query_head else heads
    counts = data.draw(st.lists(st.integers(0, keys), min_size=lists, max_size=lists))
    dtype = data.draw(st.sampled_from(where.dtypes))
    args = inputs(where, heads, group, queries, keys, counts, d, dtype, size)
    output = merged(where, *args, scale=d**-0.5, dtype=dtype)
    # a logit of 500 is rounded by more than a small one, and its error is multiplied into the output
    where.close(output, reference(*args, scale=d**-0.5), dtype, factor=10 if size > 1 else 1)


def test_long_lists_are_cut_into_pieces(where):
    """Several pieces a list, more pieces than programs, and lists of none between them."""
    args = inputs(where, heads=4, group=1, keys=700, counts=(700, 0, 1, 513))
    parts = sparse_attention(*args, scale=0.25)
    if where.name == "interpreter":
        assert parts.start.tolist() == [0, 3, 3, 4, 7]
    where.close(merged(where, *args, scale=0.25, dtype=torch.float32), reference(*args, scale=0.25), torch.float32)


def test_no_list_has_a_key(where):
    args = inputs(where, counts=(0, 0))
    assert float(merged(where, *args, scale=0.25, dtype=torch.float32).abs().max()) == 0
    nothing = (*args[:3], args[3][:, :0], args[4])
    assert float(merged(where, *nothing, scale=0.25, dtype=torch.float32).abs().max()) == 0


def test_a_cache_with_room_and_one_with_odd_strides_work(where):
    q, k, v, idx, cnt = inputs(where)
    expected = merged(where, q, k, v, idx, cnt, scale=0.25, dtype=torch.float32)
    room = torch.full((2, 2, 64, 16), torch.nan, device=where.device)
    room[0, :, :40], room[1, :, :40] = k, v
    interleaved = torch.full((40, 2, 19), torch.nan, device=where.device)
    interleaved[:, :, :16] = k.transpose(0, 1)
    for keys, values in ((room[0, :, :40], room[1, :, :40]), (interleaved[:, :, :16].transpose(0, 1), v)):
        wide = torch.nn.functional.pad(idx, (0, 5))[:, :40]
        assert not keys.is_contiguous()
        actual = merged(where, q, keys, values, wide, cnt, scale=0.25, dtype=torch.float32)
        torch.testing.assert_close(actual, expected)


def test_all_keys_chosen_is_dense_attention(where):
    q, k, v, idx, cnt = inputs(where, counts=(40, 40))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q[None].double(), k[None].double(), v[None].double(), enable_gqa=True
    )[0]
    where.close(merged(where, q, k, v, idx, cnt, scale=0.25, dtype=torch.float32), dense, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda a: a | {"q": a["q"][0]}, ValueError, r"q must be \[Hq, M, D\], not \[1, 16\]"),
        (lambda a: a | {"v": a["v"][:, 1:]}, ValueError, r"v must be .* with N = 40 as in k"),
        (lambda a: a | {"q": a["q"][:3]}, ValueError, "3 query heads cannot share 2 heads of keys"),
        (lambda a: a | {"idx": a["idx"][:1], "cnt": a["cnt"][:1]}, ValueError, "1 lists: pass one for each of the 2 "),
        (lambda a: a | {"cnt": a["cnt"] + 30}, ValueError, r"cnt goes from 33 to 47: idx has room for 0\.\.40"),
        (lambda a: a | {"cnt": a["cnt"] + 1}, ValueError, r"idx goes from .* to 1000000: k has rows 0\.\.39"),
        (lambda a: a | {"idx": a["idx"].long()}, TypeError, r"idx is torch.int64: pass int32"),
        (lambda a: a | {"k": a["k"].half()}, TypeError, r"k is torch.float16 but q is torch.float32"),
        (lambda a: a | {"v": a["v"].mT.contiguous().mT}, ValueError, r"v has stride 40 .*: pass v\.contiguous\(\)"),
    ],
)
def test_bad_input(paths, change, error, says):
    names = ("q", "k", "v", "idx", "cnt")
    with pytest.raises(error, match=says):
        sparse_attention(**change(dict(zip(names, inputs(paths["torch"]), strict=True))), scale=0.25)


def test_cost_counts_kept_keys_only():
    assert cost(32, 32, 1, 1000, 128).bytes == 1000 * (2 * 128 * 2 + 4) + 32 * 128 * 2
