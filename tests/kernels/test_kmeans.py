from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kmeans as module
from kernels.kmeans import cluster_means, cost, kmeans_step, reference

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@SETTINGS
@given(
    data=st.data(),
    heads=st.integers(1, 3),
    keys=st.sampled_from([1, 17, 65, 100]),
    clusters=st.sampled_from([1, 3, 40, 70]),
    d=st.sampled_from([3, 24, 64]),
    size=st.sampled_from([1.0, 30.0]),
)
def test_parity(where, data, heads, keys, clusters, d, size):
    """More clusters than keys (empty ones keep their centroid), one key, one cluster. Near ties may fall either way."""
    dtype = data.draw(st.sampled_from(where.dtypes))
    x = where.random(heads, keys, d, dtype=dtype, size=size)
    centroids = where.random(heads, clusters, d, dtype=dtype, seed=1, size=size)
    labels, means, counts = kmeans_step(x, centroids)
    assert labels.dtype == counts.dtype == torch.int32
    distance = torch.cdist(x.double(), centroids.double())
    chosen = distance.gather(2, labels.long()[:, :, None])[:, :, 0]
    where.close(chosen, distance.amin(2), dtype)
    for h in range(heads):
        torch.testing.assert_close(counts[h].long(), torch.bincount(labels[h], minlength=clusters))
    members = torch.nn.functional.one_hot(labels.long(), clusters).double().mT
    expected = members @ x.double() / counts.clamp(min=1)[:, :, None]
    expected = torch.where((counts == 0)[:, :, None], centroids.double(), expected)
    where.close(means, expected, torch.float32 if dtype != torch.float64 else dtype)


def test_labels_are_the_references_where_no_two_centroids_are_near(where):
    centres = 10 * torch.eye(8, device=where.device).expand(2, 8, 8)
    x = centres[:, where.integers(0, 7, 50).long()] + where.random(2, 50, 8, seed=1, size=0.3)
    labels, means, counts = kmeans_step(x, centres)
    expected = reference(x.cpu(), centres.cpu())
    assert torch.equal(labels.cpu().long(), expected[0])
    assert torch.equal(counts.cpu().long(), expected[2])
    where.close(means, expected[1], torch.float32)


def test_the_first_of_two_equal_centroids_wins(where):
    centroids = where.random(1, 1, 8).expand(1, 70, 8).contiguous()
    assert int(kmeans_step(where.random(1, 30, 8, seed=1), centroids)[0].max()) == 0


def test_steps_never_raise_the_distance(where):
    """Lloyd's algorithm on a mixture, from some of the keys."""
    x = where.random(2, 90, 16) + 4 * where.random(2, 1, 16, seed=1)
    centroids, before = x[:, :6], float("inf")
    for _ in range(4):
        labels, centroids, _ = kmeans_step(x, centroids)
        error = float((x - centroids.gather(1, labels.long()[:, :, None].expand_as(x))).square().sum())
        assert error <= before * (1 + 1e-5)
        before = error


def test_a_second_run_gives_the_same_bits(where):
    x = where.random(2, 200, 16)
    for one, two in zip(kmeans_step(x, x[:, :9]), kmeans_step(x, x[:, :9]), strict=True):
        assert torch.equal(one, two)


def test_means_of_raw_keys_with_labels_of_normalised_ones(where):
    raw = where.random(1, 40, 16)
    labels, *_ = kmeans_step(torch.nn.functional.normalize(raw, dim=-1), where.random(1, 3, 16, seed=1))
    means, counts = cluster_means(raw, labels, 4)
    assert float(means[0, 3].abs().max()) == int(counts[0, 3]) == 0
    for j in range(3):
        if int(counts[0, j]):
            where.close(means[0, j], raw[0, labels[0] == j].double().mean(0), torch.float32)


def test_strided_keys_and_blocks_of_distances(where, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 2 * 5 * 7)  # seven keys at a time
    x = where.random(50, 2, 40).transpose(0, 1)[:, :, 3:19]
    assert not x.is_contiguous()
    expected = kmeans_step(x.contiguous(), x[:, :5].contiguous())
    for one, two in zip(kmeans_step(x, x[:, :5]), expected, strict=True):
        torch.testing.assert_close(one, two)


def test_bad_input():
    x, c = torch.randn(2, 9, 8), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"centroids must be .* with D = 8 as in x, not \[2, 3, 7\]"):
        kmeans_step(x, c[..., :7])
    with pytest.raises(ValueError, match=r"no centroids \(K = 0\)"):
        kmeans_step(x, c[:, :0])
    with pytest.raises(TypeError, match=r"centroids are torch.float16: pass float32"):
        kmeans_step(x, c.half())
    with pytest.raises(ValueError, match=r"pass x\.contiguous\(\)"):
        kmeans_step(x.mT.contiguous().mT, c)
    with pytest.raises(ValueError, match=r"labels go from 0 to 3: clusters are 0\.\.2"):
        cluster_means(x, torch.arange(4, dtype=torch.int32).repeat(5)[:18].view(2, 9), 3)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        cluster_means(x, torch.zeros(2, 9, dtype=torch.int32), 0)


def test_cost():
    assert cost(heads=1, keys=100, clusters=10, head_dim=64).flops == 2 * 100 * 10 * 64 + 100 * 64
