"""Hessians of real modules, replacing layers, packed storage, outliers and the count of bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models.build import build
from common.quantisation.calibrate import blocks_of, by_length, hessians, linears_of, replace_linears
from common.quantisation.gptq import round_to_nearest
from common.quantisation.grids import minmax
from common.quantisation.outliers import SparseRows, choose_outliers, removal_gain
from common.quantisation.packed import GroupLinear, groups_of, stored_bits

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def model_of(architecture: str = "llama", **more) -> nn.Module:
    return build({"architecture": architecture, "vocab_size": 40, **SIZES, **more}, seed=2)


def batches() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 40, shape, generator=random) for shape in ((3, 9), (2, 5), (1, 1))]


@pytest.mark.parametrize(("architecture", "more"), [("llama", {"num_key_value_heads": 2}), ("qwen2", {})])
def test_hessians_are_those_of_the_inputs(architecture, more):
    model = model_of(architecture, **more)
    found = hessians(model, batches())
    assert list(found) == list(linears_of(model))
    assert len(found) == 14
    inputs = []
    target = model.model.layers[1].mlp.down_proj
    handle = target.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, 48)))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch)
    handle.remove()
    x = torch.cat(inputs)
    assert len(x) == 27 + 10 + 1
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], 2 * x.T @ x / len(x), atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_replacing_by_itself_changes_nothing_and_sees_the_same_hessians():
    model = model_of(num_key_value_heads=2)
    expected, before = hessians(model, batches()), copy.deepcopy(model.state_dict())
    seen = {}

    def keep(name, layer, hessian):
        seen[name] = hessian
        return layer

    replace_linears(model, batches(), keep)
    assert list(seen) == list(expected)
    for name, hessian in seen.items():
        assert torch.allclose(hessian, expected[name], atol=1e-5), name
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_block_is_calibrated_on_what_the_replaced_ones_give():
    model = model_of()
    expected, seen = hessians(model, batches()), {}

    def silence(name, layer, hessian):
        seen[name] = hessian
        silent = nn.Linear(layer.in_features, layer.out_features, bias=False)
        nn.init.zeros_(silent.weight)
        return silent

    replace_linears(model, batches(), silence)
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    assert torch.allclose(seen[first], expected[first], atol=1e-6)
    # silent blocks hand the embeddings on: the second block's inputs differ from the first's by the norm's weight alone
    assert torch.allclose(seen[second], seen[first], atol=1e-6)
    assert not torch.allclose(seen[second], expected[second], atol=1e-3)


def test_what_cannot_be_calibrated_is_named():
    model = model_of()
    with pytest.raises(ValueError, match="no calibration batch"):
        hessians(model, [])
    with pytest.raises(ValueError, match=r"token ids \[rows, length\], not torch.float32"):
        hessians(model, [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match=r"ids go from 1 to 40: the vocabulary is 0\.\.39"):
        hessians(model, [torch.tensor([[1, 40]])])
    with pytest.raises(ValueError, match="no list of decoder blocks in a GPT2LMHeadModel"):
        blocks_of(model_of("gpt2"))
    broken = model_of()
    with torch.no_grad():
        broken.model.embed_tokens.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"gives model.layers.0.self_attn.q_proj inputs that are not finite"):
        hessians(broken, [torch.tensor([[2, 3]])])
    replace_linears(model, batches(), lambda name, layer, h: nn.Identity())
    with pytest.raises(ValueError, match=r"no nn\.Linear: is it quantised already"):
        linears_of(model)


def test_texts_of_one_length_share_a_batch():
    rows = [[1, 2], [3], [4, 5], [6, 7], [8]]
    found = [batch.tolist() for batch in by_length(rows, most=2)]
    assert found == [[[1, 2], [4, 5]], [[6, 7]], [[3], [8]]]


@pytest.mark.parametrize(("bits", "group", "channels"), [(2, 16, 48), (2, 32, 40), (3, 64, 96), (4, 16, 50)])
def test_packed_groups_are_the_rounded_matrix(bits, group, channels):
    random = torch.Generator().manual_seed(bits)
    w, x = torch.randn(10, channels, generator=random), torch.randn(2, 3, channels, generator=random)
    bias = torch.randn(10, generator=random)
    rounded = round_to_nearest(w, [(width, minmax(bits)) for width in groups_of(channels, group)])
    layer = GroupLinear(rounded, group, bias)
    assert torch.equal(layer.weight_matrix(), rounded.weight)
    assert torch.equal(layer(x), F.linear(x, rounded.weight, bias))
    words, count = -(-channels // (32 // bits)), -(-channels // group)
    assert layer.weight_bytes() == 10 * (4 * words + 2 * count + 2 * -(-count // (16 // bits)))
    with pytest.raises(ValueError, match="at least 1 channel, not 0"):
        groups_of(8, 0)


def test_bits_are_counted_from_what_is_stored():
    model = model_of()
    assert stored_bits(model) == 32
    assert stored_bits(model.half()) == 16
    half = dict(list(linears_of(model).items())[:7])

    def replace(name, layer, hessian):
        weight = layer.weight.detach().float()
        rounded = round_to_nearest(weight, [(16, minmax(2))] * (weight.shape[1] // 16))
        return GroupLinear(rounded, 16) if name in half else layer

    model = model.float()
    replace_linears(model, batches(), replace)
    expected = sum(layer.weight.numel() for layer in half.values())
    packed = sum(model.get_submodule(name).weight_bytes() for name in half)
    assert stored_bits(model) == pytest.approx((8 * packed / expected + 32) / 2)


def test_sparse_rows_are_their_dense_matrix():
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(9, 20, generator=random).half().float() * (torch.rand(9, 20, generator=random) < 0.2)
    dense[4] = 0
    sparse, x = SparseRows(dense), torch.randn(5, 20, generator=random)
    assert torch.equal(sparse.dense(), dense)
    assert torch.allclose(sparse(x), x @ dense.T, atol=1e-6)
    count = int((dense != 0).sum())
    assert sum(buffer.nbytes for buffer in sparse.buffers()) == 4 * 10 + 4 * count
    empty = SparseRows(torch.zeros(3, 4))
    assert torch.equal(empty(torch.ones(2, 4)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="40000 channels: int16"):
        SparseRows(torch.zeros(1, 40000))


def test_outliers_are_where_keeping_them_helps_most():
    random = torch.Generator().manual_seed(0)
    w = torch.randn(6, 32, generator=random)
    w[2, 20] = 30.0
    diagonal = torch.rand(32, generator=random) + 0.5
    gain, place = removal_gain(w, diagonal, 16, minmax(2))
    assert gain.shape == place.shape == (6, 2)
    assert int(place[2, 1]) == 20

    def error(group):
        grid = minmax(2)(group)
        return float(((group - grid.values(grid.codes(group))) ** 2 * diagonal[16:]).sum())

    group = w[2:3, 16:]
    without = group.clone()
    without[0, 4] = 0
    assert float(gain[2, 1]) == pytest.approx(error(group) - error(without), rel=1e-5)
    kept = choose_outliers(w, diagonal, 16, minmax(2), 1 / 192)
    assert kept.nonzero().tolist() == [[2, 20]]
    assert not choose_outliers(w, diagonal, 16, minmax(2), 0.0).any()
    many = choose_outliers(w, diagonal, 16, minmax(2), 1 / 16)
    assert int(many.sum()) == int((gain > 0).sum())
    assert many.view(6, 2, 16).sum(2).max() == 1
    with pytest.raises(ValueError, match=r"0..0.0625 \(one of 16\), not 0.1"):
        choose_outliers(w, diagonal, 16, minmax(2), 0.1)
