"""Laws of the method: what it must equal at its limits, on models with and without shared heads of keys."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention.interface import Call, States, attending
from common.models.build import build
from kernels._triton import INTERPRETED
from kernels.centroid_scores import centroid_scores
from papers.squeezed_attention import SqueezedCache, squeeze
from papers.squeezed_attention.method import calibration, cluster_keys, coarsen, lookup, threshold
from papers.squeezed_attention.method.cache import from_states
from papers.squeezed_attention.method.tree import CentroidTree

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=[4, 2], ids=["MHA", "GQA"])
def model(request):
    model = build(SIZES, num_key_value_heads=request.param, seed=1, dtype=torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)  # keys must differ in a model that nobody trained
    return model


def ids(rows, length, seed=0):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def written(model, context, user, cache):
    full = torch.cat([context.expand(len(user), -1), user], 1)
    with cache.attached(model):
        return model.generate(full, past_key_values=cache, attention_mask=torch.ones_like(full), **OPTIONS)


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize(
    "how", [{}, {"per_query_head": True}, {"coarse": 0.02, "coarse_sparsity": 0.0}], ids=["one level", "lists", "two"]
)
def test_without_sparsity_tokens_are_those_of_full_attention(model, how, requests):
    context, user = ids(1, 120), ids(requests, 5, seed=1)
    full = torch.cat([context.expand(requests, -1), user], 1)
    expected = model.generate(full, attention_mask=torch.ones_like(full), **OPTIONS)
    cache = SqueezedCache(squeeze(model, context, sparsity=0.0, clusters=0.1, window=16, **how))
    assert torch.equal(written(model, context, user, cache), expected)
    assert cache.get_seq_length() == full.shape[1] + OPTIONS["max_new_tokens"] - 1
    lists = 4 // model.config.num_key_value_heads if "per_query_head" in how else 1
    assert cache.budget() >= lists


def test_above_the_largest_score_only_the_window_and_the_own_tokens_are_seen(model):
    context, user, window = ids(1, 60), ids(2, 6, seed=1), 10
    cache = SqueezedCache(squeeze(model, context, sparsity=1.0, clusters=0.1, window=window))
    object.__setattr__(cache.context, "threshold", math.inf)
    with torch.inference_mode(), cache.attached(model):
        found = model(user, past_key_values=cache).logits

    def masked(call):
        rows, length = call.query.shape[2], call.key.shape[2]
        place = torch.arange(length)
        sees = (place >= 60 - window) & (place <= (length - rows + torch.arange(rows))[:, None])
        sees |= (torch.arange(length - rows, length) < 60)[:, None] & (place <= torch.arange(rows)[:, None])
        return torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, sees, scale=call.scale, enable_gqa=True
        )

    with torch.inference_mode(), attending(model, masked):
        past = model(context.expand(2, -1), use_cache=True).past_key_values
        expected = model(user, past_key_values=past).logits
    assert torch.allclose(found, expected, atol=1e-10)
    kept = torch.cat([torch.cat(passes) for passes in cache.kept])
    assert (kept == window).all()


def test_requests_side_by_side_are_served_as_each_alone(model):
    context, user = ids(1, 120), ids(3, 5, seed=2)
    ready = squeeze(model, context, sparsity=0.8, clusters=0.1, window=16)
    together = written(model, context, user, SqueezedCache(ready))
    for row in range(3):
        cache = SqueezedCache(ready)
        assert torch.equal(written(model, context, user[row : row + 1], cache)[0], together[row])


def test_a_padded_context_is_refused(model):
    context, user = ids(1, 40), ids(1, 4, seed=1)
    full = torch.cat([context, user], 1)
    mask = torch.ones_like(full)
    mask[0, :3] = 0
    cache = SqueezedCache(squeeze(model, context, clusters=0.1, window=8))
    with cache.attached(model), pytest.raises(ValueError, match="a padded context"):
        model.generate(full, past_key_values=cache, attention_mask=mask, **OPTIONS)


def test_clusters_of_one_key_give_exact_weights_and_the_ideal_selection():
    draw = torch.Generator().manual_seed(0)
    keys, query = (torch.randn(2, n, 8, generator=draw, dtype=torch.float64) for n in (30, 1))
    fine = cluster_keys(keys, 1.0)
    scores = lookup(query, fine, 0.5, 2).scores.gather(1, fine.labels.long())
    exact = (query @ keys.mT * 0.5).softmax(-1)[:, 0]
    assert torch.allclose(scores.double(), exact, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 8.0))
def test_the_estimated_denominator_never_exceeds_the_true_one(seed, spread):
    """Jensen: N exp(q.mean) <= sum exp(q.k); equality where the keys of a cluster are alike."""
    draw = torch.Generator().manual_seed(seed)
    keys, query = (spread * torch.randn(1, n, 6, generator=draw, dtype=torch.float64) for n in (40, 1))
    fine = cluster_keys(keys, 0.1)
    x = (fine.centroids @ query.mT)[0, :, 0]
    alive = fine.counts[0] > 0
    estimated = torch.logsumexp(x[alive] + fine.counts[0, alive].double().log(), 0)
    assert estimated <= torch.logsumexp((keys @ query.mT)[0, :, 0], 0) + 1e-9
    alike = keys[:, :4].repeat_interleave(10, 1)
    fine = cluster_keys(alike, 0.1)
    x = (fine.centroids @ query.mT)[0, :, 0]
    estimated = torch.logsumexp(x + fine.counts[0].double().log(), 0)
    assert torch.allclose(estimated, torch.logsumexp((alike @ query.mT)[0, :, 0], 0))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_the_threshold_is_the_quantile_over_all_keys(seed, sparsity):
    random = np.random.default_rng(seed)
    scores, counts = random.random(23).round(2), random.integers(0, 9, 23)
    counts[0] += 1
    found = threshold(
        [torch.tensor(scores[:9]), torch.tensor(scores[9:])],
        [torch.tensor(counts[:9]), torch.tensor(counts[9:])],
        sparsity,
    )
    copied = np.repeat(scores, counts)
    assert found == np.quantile(copied, sparsity, method="inverted_cdf")
    ties = counts[scores == found].sum()
    assert 0 <= (1 - sparsity) - (copied > found).mean() + 1e-9 <= (ties + 1) / len(copied) + 1e-9


def test_calibration_keeps_the_wanted_share_for_its_own_queries():
    draw = torch.Generator().manual_seed(0)
    keys, window = (torch.randn(2, n, 8, generator=draw) for n in (400, 12))
    fine = cluster_keys(keys, 0.25)
    scores, counts = calibration(window, fine, 0.5, 2)
    limit = threshold([scores], [counts], 0.8)
    kept = (scores.gather(1, fine.labels.long()) > limit).float().mean()
    assert 0.2 - fine.counts.max() / 800 <= kept <= 0.2


def test_what_two_levels_keep_is_part_of_what_the_coarse_one_opens():
    draw = torch.Generator().manual_seed(0)
    keys, query = (torch.randn(2, n, 8, generator=draw) for n in (300, 1))
    fine = cluster_keys(keys, 0.1)
    upper = coarsen(fine, 0.02)
    assert upper.counts.sum(1).tolist() == [300, 300]
    limit = 1 / 300
    one, two = lookup(query, fine, 0.5, 2), lookup(query, fine, 0.5, 2, upper, limit)
    opened = (lookup(query, upper, 0.5, 2).scores > limit).gather(1, upper.labels.long())
    assert (two.scores[~opened] == -math.inf).all()
    counts = torch.where(opened, fine.counts, 0)
    assert torch.allclose(two.scores[opened], centroid_scores(query, fine.centroids, counts, 0.5)[opened])
    assert two.compared.tolist() == (upper.counts.gt(0).sum(1) + opened.sum(1)).tolist()
    everything = lookup(query, fine, 0.5, 2, upper, -math.inf)
    assert torch.allclose(everything.scores, one.scores)


def test_empty_clusters_and_large_logits_stay_finite():
    keys = torch.ones(1, 40, 4)
    keys[:, 20:] = -200.0
    fine = cluster_keys(keys, 0.25)
    assert (fine.counts == 0).any()
    scores, counts = calibration(torch.full((1, 3, 4), 1.0), fine, 1.0, 1)
    assert torch.isfinite(scores).all()
    assert math.isfinite(threshold([scores], [counts], 0.5))
    assert coarsen(fine, 0.1).counts.sum() == 40


def test_bad_input_is_named():
    model = build(SIZES, seed=1)
    with pytest.raises(ValueError, match="window has 20 tokens: pass 1 to 19"):
        squeeze(model, ids(1, 20), window=20)
    with pytest.raises(ValueError, match="one sequence"):
        squeeze(model, ids(2, 20), window=4)
    with pytest.raises(ValueError, match=r"not 1\.5"):
        squeeze(model, ids(1, 20), window=4, clusters=0.2, sparsity=1.5)
    with pytest.raises(ValueError, match="above 0 and at most 1, not 0"):
        squeeze(model, ids(1, 20), window=4, clusters=0)
    with pytest.warns(UserWarning, match="0.01 of 16 keys is no cluster"):
        squeeze(model, ids(1, 20), window=4, clusters=0.01)
    with pytest.raises(RuntimeError, match="not finite"):
        threshold([torch.tensor([0.1, math.nan])], [torch.tensor([1, 1])], 0.5)
    with pytest.raises(ValueError, match="nothing was attended to yet"):
        SqueezedCache(squeeze(model, ids(1, 20), window=4, clusters=0.2)).budget()
    with pytest.raises(ValueError, match="4 keys, 8 children"):
        CentroidTree(torch.randn(4, 2), 8)


def test_a_tree_leads_to_the_keys_of_the_query():
    directions = torch.eye(16)
    keys = directions.repeat(16, 1)
    tree = CentroidTree(keys, 4, seed=0)
    for which in range(16):
        found, compared = tree.descend(directions[which])
        assert compared < len(keys) // 4
        assert (keys[found] @ directions[which]).max() == 1


def test_the_example_of_the_readme_runs(model):
    text = Path("papers/squeezed_attention/README.md").read_text()
    code = re.search(r"own model\n\n((?:    .*\n|\n)+)", text)
    assert code
    names = {"model": model, "context_ids": ids(1, 200), "user_ids": ids(1, 6, seed=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec("\n".join(line[4:] for line in code[1].splitlines()), names)
    assert names["output"].shape == (1, 206 + 64)
    assert 0 < names["cache"].budget() < 1


@pytest.mark.parametrize("how", [{}, {"per_query_head": True}, {"coarse": 0.05}], ids=["one level", "lists", "two"])
def test_the_kernels_serve_a_request_as_their_torch_paths_do(how, monkeypatch):
    """States without a model are enough for a context; requests stand side by side."""
    draw = torch.Generator().manual_seed(0)
    states = States(*(torch.randn(1, h, n, 16, generator=draw) for h, n in ((2, 64), (2, 64), (4, 8))), 0.25)
    query, key, value = (torch.randn(2, h, 3, 16, generator=draw) for h in (4, 2, 2))
    found = {}
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        if interpreted == "1" and not INTERPRETED:
            pytest.skip("kernels are compiled in this process")
        context = from_states([states], sparsity=0.7, clusters=0.2, **how)
        assert (context.length, context.window) == (64, 8)
        cache = SqueezedCache(context)
        found[interpreted] = cache.attend(Call(0, query, key, value, None, 0.25)), cache.budget()
    assert torch.allclose(found["0"][0], found["1"][0], atol=1e-5)
    assert found["0"][1] == found["1"][1]
