"""Attention plugged into models, captured states, parts of attention, K-means of many heads, budgets."""

import pytest
import torch

from common.attention.budget import kv_budget
from common.attention.clustering import kmeans, plus_plus
from common.attention.interface import attending, capture, dense
from common.attention.partial import causal_state
from common.models.build import build
from kernels.merge_partials import State, merge_partials

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def model_of(architecture="llama", heads=4):
    return build(SIZES, architecture=architecture, num_key_value_heads=heads, seed=1, dtype=torch.float64)


def ids(rows, length, seed=0):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_dense_in_the_place_of_a_models_attention_changes_nothing(architecture, heads):
    model, text = model_of(architecture, heads), ids(2, 20)
    before = model.config._attn_implementation
    padded = torch.ones_like(text)
    padded[1, :5] = 0
    with torch.inference_mode():
        for mask in (None, padded):
            expected = model(text, attention_mask=mask).logits
            with attending(model, dense):
                found = model(text, attention_mask=mask).logits
            assert torch.allclose(found[0], expected[0], atol=1e-12)
            assert torch.allclose(found[1, 5:], expected[1, 5:], atol=1e-12)
        with attending(model, dense):
            written = model.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(written, model.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert model.config._attn_implementation == before


def test_the_models_own_attention_comes_back_after_an_error():
    from transformers import AttentionInterface

    model = model_of()
    before, known = model.config._attn_implementation, len(AttentionInterface._global_mapping)
    with pytest.raises(ZeroDivisionError), attending(model, lambda call: 1 / 0):
        model(ids(1, 4))
    assert model.config._attn_implementation == before
    assert len(AttentionInterface._global_mapping) == known


def test_captured_states_are_those_of_the_cache():
    model, text = model_of(heads=2), ids(2, 15)
    with torch.inference_mode():
        cache = model(text, use_cache=True).past_key_values
    states = capture(model, text, last=3)
    assert len(states) == 2
    for layer, of in zip(cache.layers, states, strict=True):
        assert torch.allclose(of.keys, layer.keys)
        assert torch.allclose(of.values, layer.values)
        assert of.queries.shape == (2, 4, 3, 8)
        assert of.scale == pytest.approx(8**-0.5)
    with pytest.raises(ValueError, match="15 tokens has no 16 last queries"):
        capture(model, text, last=16)


def test_states_of_parts_merge_into_the_whole():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=draw, dtype=torch.float64) for h, n in ((4, 5), (2, 9), (2, 9)))
    whole = causal_state(q, k, v, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, torch.ones(5, 9, dtype=torch.bool).tril(4), scale=0.3, enable_gqa=True
    )
    assert torch.allclose(whole.o.view(2, 4, 5, 8), expected)
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4)
    parts = [
        causal_state(q, k[:, :, at], v[:, :, at], 0.3, seen[None, None, :, at]) for at in (slice(0, 4), slice(4, 9))
    ]
    first, second = (State(*(t.flatten(0, 1) for t in part)) for part in parts)
    merged = merge_partials(first.o, first.m, first.l, 1, second, torch.float64)
    assert torch.allclose(merged.o.view(2, 4, 5, 8), expected)


def test_kmeans_agrees_with_scikit_learn_from_the_same_centroids():
    from sklearn.cluster import KMeans

    x = torch.randn(2, 200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = plus_plus(x, 7, seed=3)
    labels = kmeans(x, 7, seed=3)
    for head in range(2):
        theirs = KMeans(7, init=start[head].numpy(), n_init=1, max_iter=300, tol=0).fit(x[head].numpy())
        assert (labels[head].numpy() == theirs.labels_).all()


def test_kmeans_of_a_head_does_not_depend_on_the_others():
    x = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0))
    together = kmeans(x, 5, seed=1)
    for head in range(3):
        assert torch.equal(together[head], kmeans(x[head : head + 1], 5, seed=1)[0])


def test_kmeans_of_equal_points_and_as_many_clusters_as_points():
    assert (kmeans(torch.ones(1, 6, 3), 4)[0] == 0).all()  # the others stay empty
    x = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0))
    assert sorted(kmeans(x, 9)[0].tolist()) == list(range(9))
    for count in (0, 10):
        with pytest.raises(ValueError, match=f"9 points cannot make {count} clusters"):
            kmeans(x, count)


def test_budgets_of_the_papers_table():
    assert kv_budget(300, 50, 1000) == pytest.approx(0.325)
    assert kv_budget(200, 50, 1000) == pytest.approx(0.225)
    assert kv_budget(100, 50, 1000) == pytest.approx(0.125)
    with pytest.raises(ValueError, match="-1 kept tokens"):
        kv_budget(-1, 0, 10)
