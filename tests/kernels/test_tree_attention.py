from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.tree import tree_mask
from kernels.merge_partials import merge_partials
from kernels.sparse_attention import sparse_attention
from kernels.tree_attention import cost, reference, tree_attention

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def inputs(where, batch=2, group=2, heads=2, drafted=5, contexts=(7, 0), d=16, dtype=torch.float32, size=1.0, seed=0):
    """q, k, v, a random tree's mask, contexts. Behind each sequence's end lies NaN, which must not be read."""
    capacity = max(contexts) + drafted + 3
    q = where.random(batch, group * heads, drafted, d, dtype=dtype, seed=seed, size=size)
    k, v = (where.random(batch, heads, capacity, d, dtype=dtype, seed=seed + i, size=size) for i in (1, 2))
    for b, context in enumerate(contexts):
        k[b, :, context + drafted :], v[b, :, context + drafted :] = torch.nan, torch.nan
    draw = torch.Generator().manual_seed(seed)
    parents = [-1, *(int(torch.randint(0, i, (1,), generator=draw)) for i in range(1, drafted))]
    mask = torch.from_numpy(tree_mask(parents)[0].copy()).expand(batch, -1, -1).to(where.device)
    return q, k, v, mask, torch.tensor(contexts, dtype=torch.int32, device=where.device)


@SETTINGS
@given(
    data=st.data(),
    group=st.sampled_from([1, 3, 4]),
    heads=st.integers(1, 2),
    drafted=st.sampled_from([1, 3, 16, 33]),
    d=st.sampled_from([8, 24, 64]),
    size=st.sampled_from([0.0, 1.0, 12.0]),
)
def test_parity(where, data, group, heads, drafted, d, size):
    """Ragged contexts, heads that share keys, sizes that are no multiple of a block, logits beyond +-200."""
    contexts = data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 130]), min_size=1, max_size=2))
    dtype = data.draw(st.sampled_from(where.dtypes))
    args = inputs(where, len(contexts), group, heads, drafted, contexts, d, dtype, size)
    output = tree_attention(*args, scale=d**-0.5)
    assert output.dtype == dtype
    # a logit of 500 is rounded by more than a small one, and its error is multiplied into the output
    where.close(output, reference(*args, scale=d**-0.5), dtype, factor=10 if size > 1 else 1)


@pytest.mark.parametrize("drafted", [1, 5])
def test_a_preallocated_cache_and_transposed_queries_work(where, drafted):
    """Slices of a larger cache, queries as [B, T, H, D] in memory, a mask that is a slice."""
    q, k, v, mask, contexts = inputs(where, drafted=drafted)
    expected = tree_attention(q, k, v, mask, contexts, 0.3)
    room = [torch.full((2, 3, 50, 16), float("nan"), device=where.device) for _ in range(2)]
    for cache, rows in zip(room, (k, v), strict=True):
        cache[:, 1:, : rows.shape[2]] = rows
    k, v = (cache[:, 1:, : k.shape[2]] for cache in room)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(2, drafted, 40, dtype=torch.bool, device=where.device)
    wide[:, :, :drafted] = mask
    assert not q.is_contiguous() or drafted == 1
    torch.testing.assert_close(tree_attention(q, k, v, wide[:, :, :drafted], contexts, 0.3), expected)


def test_a_query_that_sees_nothing_gets_zeros(where):
    q, k, v, mask, contexts = inputs(where, batch=1, contexts=(0,))
    mask = mask.clone()
    mask[0, 2] = False
    output = tree_attention(q, k, v, mask, contexts, 0.3)
    assert output[0, :, 2].abs().max() == 0
    where.close(output, reference(q, k, v, mask, contexts, 0.3), torch.float32)
    state = tree_attention(q, k, v, mask, contexts, 0.3, return_state=True)
    assert bool((state.l[0, :, 2] == 0).all())
    assert bool((state.m[0, :, 2] == -torch.inf).all())


def test_packed_rows_of_a_thought_and_its_answers(where):
    """Token i sees j iff j <= i and j is not in another answer: each answer is what it would be alone."""
    thought, answers = 9, (4, 1, 6)
    total = thought + sum(answers)
    q, k, v = (where.random(1, 2, total, 16, seed=i) for i in range(3))
    mask = torch.ones(1, total, total, dtype=torch.bool, device=where.device).tril()
    start = thought
    for length in answers:
        mask[:, start : start + length, thought:start] = False
        start += length
    packed = tree_attention(q, k, v, mask, torch.zeros(1, dtype=torch.int32, device=where.device), 0.25)
    start = thought
    for length in answers:
        rows = [*range(thought), *range(start, start + length)]
        alone = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], is_causal=True, scale=0.25
        )
        where.close(packed[:, :, rows], alone, torch.float32)
        start += length


def test_states_of_two_parts_of_the_keys_merge_to_the_whole(where):
    """What Squeezed Attention does in prefill: chosen context keys, and causally its own tokens."""
    q, k, v, mask, _ = inputs(where, batch=1, drafted=6, contexts=(40,))
    contexts = torch.tensor([40], dtype=torch.int32, device=where.device)
    whole = tree_attention(q, k, v, mask, contexts, 0.3, return_state=True)
    own = tree_attention(q, k[:, :, 40:], v[:, :, 40:], mask, contexts * 0, 0.3, return_state=True)
    idx = torch.arange(40, dtype=torch.int32, device=where.device).expand(2, 40)
    parts = sparse_attention(q[0], k[0], v[0], idx, torch.full_like(idx[:, 0], 40), 0.3)
    flat = type(own)(own.o.view(2, -1, 16), own.m.view(2, -1), own.l.view(2, -1))
    merged = merge_partials(*parts, own=flat)
    where.close(merged.o.view_as(whole.o), whole.o, torch.float32)
    where.close(merged.m.view_as(whole.m) + merged.l.view_as(whole.m).log2(), whole.m + whole.l.log2(), torch.float32)


def test_sequences_do_not_depend_on_their_batch(paths):
    """In float64, as a lossless decoder needs it; the torch path, since kernels accumulate in float32."""
    q, k, v, mask, contexts = inputs(paths["torch"], dtype=torch.float64)
    both = tree_attention(q, k, v, mask, contexts, 0.3)
    for b in range(2):
        row = slice(b, b + 1)
        alone = tree_attention(q[row], k[row], v[row], mask[row], contexts[row], 0.3)
        torch.testing.assert_close(both[row], alone, rtol=0, atol=1e-14)


def test_gradients_take_the_torch_path(where):
    q, k, v, mask, contexts = inputs(where)
    q.requires_grad_()
    k.requires_grad_()
    tree_attention(q, k, v, mask, contexts, 0.3).square().sum().backward()
    expected = [t.detach().clone().requires_grad_() for t in (q, k)]
    reference(*expected, v, mask, contexts, 0.3).square().sum().backward()
    where.close(q.grad, expected[0].grad, torch.float32)
    where.close(k.grad, expected[1].grad, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda a: a | {"q": a["q"][0]}, ValueError, r"q must be \[B, Hq, T, D\], not \[4, 5, 16\]"),
        (lambda a: a | {"v": a["v"][:, :, :-1]}, ValueError, r"v must be .* with S = 15 as in k, not \[2, 2, 14, 16\]"),
        (lambda a: a | {"tree_mask": a["tree_mask"][:, :3]}, ValueError, r"tree_mask must be \[B, T, T\] with T = 5"),
        (lambda a: a | {"q": a["q"][:, :3]}, ValueError, "3 query heads cannot share 2 heads of keys"),
        (lambda a: a | {"ctx_len": a["ctx_len"] + 4}, ValueError, r"ctx_len goes from 4 to 11, .* must lie in 0\.\.10"),
        (lambda a: a | {"ctx_len": a["ctx_len"] - 1}, ValueError, "ctx_len goes from -1"),
        (lambda a: a | {"ctx_len": a["ctx_len"].long()}, TypeError, "ctx_len is torch.int64: pass int32"),
        (lambda a: a | {"tree_mask": a["tree_mask"].int()}, TypeError, "tree_mask is torch.int32: pass bool"),
        (lambda a: a | {"k": a["k"].half()}, TypeError, "k is torch.float16 but q is torch.float32"),
        (lambda a: a | {"q": a["q"].int()}, TypeError, "q is torch.int32: pass float16"),
        (lambda a: a | {"k": a["k"].mT.contiguous().mT}, ValueError, r"k has stride 15 .*: pass k\.contiguous\(\)"),
    ],
)
def test_bad_input(paths, change, error, says):
    names = ("q", "k", "v", "tree_mask", "ctx_len")
    with pytest.raises(error, match=says):
        tree_attention(**change(dict(zip(names, inputs(paths["torch"]), strict=True))), scale=0.3)


def test_nothing_drafted_gives_nothing(where):
    q, k, v, mask, contexts = inputs(where)
    assert tree_attention(q[:, :, :0], k, v, mask[:, :0, :0], contexts, 0.3).shape == (2, 4, 0, 16)


def test_cost_is_that_of_reading_the_cache_once():
    """Lookahead's sheet: C = 4096, 32 heads of 128 in fp16 are 67 MB."""
    one = cost(1, 32, 32, 64, 4096, 128)
    assert one.bytes == pytest.approx(2 * 4160 * 32 * 128 * 2 + 2 * 64 * 32 * 128 * 2, rel=1e-3)
    assert one.flops == 4 * 64 * 32 * 4160 * 128
    assert one.seconds(4.8e12, 1e15) == pytest.approx(14.5e-6, rel=0.02)
