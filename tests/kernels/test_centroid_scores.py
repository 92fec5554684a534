from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import centroid_scores as module
from kernels.centroid_scores import centroid_scores, cost, reference
from kernels.kmeans import cluster_means

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@SETTINGS
@given(
    data=st.data(),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 2, 40]),
    clusters=st.sampled_from([1, 31, 70]),
    d=st.sampled_from([8, 24, 64]),
    size=st.sampled_from([1.0, 12.0]),
    stored=st.booleans(),
)
def test_parity(where, data, heads, group, queries, clusters, d, size, stored):
    """Empty clusters, logits beyond +-200, with logits stored between the kernels and computed twice."""
    dtype = data.draw(st.sampled_from(where.dtypes))
    q = where.random(heads * group, queries, d, dtype=dtype, size=size)
    centroids = where.random(heads, clusters, d, dtype=dtype, seed=1, size=size)
    counts = where.integers(0, 4, heads, clusters, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STORED_BYTES", 1 << 26 if stored else 0)
        scores = centroid_scores(q, centroids, counts, d**-0.5)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((scores.view(heads, group, -1)[(counts == 0)[:, None].expand(-1, group, -1)] == 0).all())
    # logits of 200 are themselves rounded: their error is multiplied into the score
    where.close(scores, reference(q, centroids, counts, d**-0.5), dtype, factor=1 if size == 1.0 else 10)


def test_a_cluster_a_key_is_exact_softmax(where):
    q, k = where.random(2, 1, 16), where.random(2, 50, 16, seed=1)
    scores = centroid_scores(q, k, torch.ones(2, 50, dtype=torch.int32, device=where.device), 0.5)
    where.close(scores, (q.double() @ k.double().mT * 0.5).softmax(-1)[:, 0], torch.float32)


def test_equal_keys_make_the_estimate_exact_and_others_never_raise_it(where):
    """sum_j N_j exp(q.C_j) <= sum_i exp(q.k_i), with equality for equal keys: a score is never below the true one."""
    labels = where.integers(0, 5, 1, 60)
    for spread in (0.0, 1.0):
        k = where.random(1, 5, 16, seed=1)[:, labels[0].long()] + spread * where.random(1, 60, 16, seed=2)
        centroids, counts = cluster_means(k, labels, 5)
        q = where.random(1, 1, 16, seed=3)
        scores = centroid_scores(q, centroids, counts, 1.0)
        x = (q.double() @ centroids.double().mT)[0, 0]
        true = (x - (q.double() @ k.double().mT)[0, 0].logsumexp(0)).exp()
        if spread:
            assert bool((scores[0] >= true - 1e-6).all())
        else:
            where.close(scores[0], true, torch.float32)


def test_a_head_without_keys_scores_zero(where):
    counts = torch.zeros(2, 5, dtype=torch.int32, device=where.device)
    counts[1, 2] = 3
    scores = centroid_scores(where.random(2, 4, 8), where.random(2, 5, 8, seed=1), counts, 1.0)
    assert float(scores[0].abs().max()) == 0
    torch.testing.assert_close(float(scores[1, 2]), 1 / 3)


def test_strided_inputs_work(where):
    q, c = where.random(3, 2, 16), where.random(2, 9, 40, seed=1)
    counts = where.integers(0, 3, 2, 20, seed=2)
    args = (q.transpose(0, 1), c[:, :, 3:19], counts[:, 4:13])
    assert not any(t.is_contiguous() for t in args)
    torch.testing.assert_close(centroid_scores(*args, 0.3), centroid_scores(*(t.contiguous() for t in args), 0.3))


def test_bad_input(paths):
    q, c = paths["torch"].random(4, 2, 8), paths["torch"].random(2, 5, 8)
    counts = torch.ones(2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"counts must be \[H, K\] with K = 5 as in centroids, not \[2, 4\]"):
        centroid_scores(q, c, counts[:, :4], 1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        centroid_scores(q[:3], c, counts, 1.0)
    with pytest.raises(ValueError, match=r"0 queries \(M\) and 5 clusters"):
        centroid_scores(q[:, :0], c, counts, 1.0)
    with pytest.raises(TypeError, match=r"counts is torch.int64: pass int32"):
        centroid_scores(q, c, counts.long(), 1.0)
    with pytest.raises(ValueError, match=r"pass centroids\.contiguous\(\)"):
        centroid_scores(q, c.mT.contiguous().mT, counts, 1.0)


def test_cost_of_decoding_reads_the_centroids_once():
    assert cost(32, 32, 1, 6553, 128).bytes == pytest.approx(32 * 6553 * 128 * 2, rel=0.1)
    assert cost(32, 32, 4096, 6553, 128).flops == 4 * 32 * 4096 * 6553 * 128
