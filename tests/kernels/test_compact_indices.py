from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.compact_indices import compact_indices, cost, reference

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def lists(result):
    idx, cnt = result
    assert idx.dtype == cnt.dtype == torch.int32
    return [row[:count].tolist() for row, count in zip(idx.cpu(), cnt.tolist(), strict=True)]


@SETTINGS
@given(
    heads=st.integers(1, 3),
    clusters=st.sampled_from([1, 7, 300]),
    keys=st.sampled_from([0, 1, 100, 1023, 1024, 2500]),
    always=st.sampled_from([0, 1, 1500]),
    threshold=st.sampled_from([-1.0, 0.3, 0.9, 2.0]),
    label=st.sampled_from([torch.int16, torch.int32]),
    seed=st.integers(0, 3),
)
def test_parity(where, heads, clusters, keys, always, threshold, label, seed):
    """Ascending, complete, without duplicates; all, some and none of the keys kept."""
    scores = where.random(heads, clusters, seed=seed).sigmoid()
    scores[0, 0] = -torch.inf
    labels = where.integers(0, clusters, heads, keys, seed=seed, dtype=label)
    kept = lists(compact_indices(scores, labels, threshold, always))
    assert kept == reference(scores.cpu(), labels.cpu().long(), threshold, always)
    assert all(row == sorted(set(row)) for row in kept)


def test_a_score_at_the_threshold_is_not_kept(where):
    scores = torch.tensor([[0.25, 0.5]], device=where.device)
    labels = torch.tensor([[1, 0, 1]], dtype=torch.int16, device=where.device)
    assert lists(compact_indices(scores, labels, 0.25)) == [[0, 2]]
    assert lists(compact_indices(scores, labels, 0.5)) == [[]]


def test_a_coarser_level_rules_keys_out(where):
    """Two levels as the caller combines them: a subset of the first level's keys, all of them for -inf."""
    fine, coarse = where.random(2, 12).sigmoid(), where.random(2, 3, seed=1).sigmoid()
    labels, above = where.integers(0, 12, 2, 90, seed=2), where.integers(0, 3, 2, 12, seed=3)
    first = coarse.gather(1, above.long())
    level1 = lists(compact_indices(first, labels, 0.5))
    both = lists(compact_indices(fine.masked_fill(first <= 0.5, -torch.inf), labels, 0.4))
    assert all(set(b) <= set(a) for a, b in zip(level1, both, strict=True))
    open_ = lists(compact_indices(fine.masked_fill(first <= -torch.inf, -torch.inf), labels, 0.4))
    assert open_ == lists(compact_indices(fine, labels, 0.4))


def test_strided_inputs_work(where):
    scores, labels = where.random(4, 9).sigmoid()[::2, 2:], where.integers(0, 7, 4, 50)[::2, 5:]
    assert not scores.is_contiguous()
    assert lists(compact_indices(scores, labels, 0.4)) == reference(scores.cpu(), labels.cpu().long(), 0.4)


def test_bad_input():
    scores, labels = torch.rand(2, 5), torch.zeros(2, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="threshold is nan, which would keep nothing: calibrate it again"):
        compact_indices(scores, labels, float("nan"))
    with pytest.raises(ValueError, match=r"labels go from 0 to 5: scores has clusters 0\.\.4"):
        compact_indices(scores, labels + torch.tensor([[0], [5]], dtype=torch.int32), 0.1)
    with pytest.raises(ValueError, match=r"labels must be \[H, n\] with H = 2 as in scores"):
        compact_indices(scores, labels[:1], 0.1)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        compact_indices(scores, labels, 0.1, -1)
    with pytest.raises(TypeError, match=r"labels is torch.int64: pass int16 or int32"):
        compact_indices(scores, labels.long(), 0.1)
    with pytest.raises(TypeError, match=r"scores is torch.float16: pass float32"):
        compact_indices(scores.half(), labels, 0.1)


def test_cost():
    assert cost(heads=2, keys=100, clusters=5, kept=30) == (2 * (200 + 20) + 4 * 32, 0)
