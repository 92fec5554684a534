"""The method: exact laws of its quantiser, packing and storage, and its place in real models."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.build import build
from common.quantisation.calibrate import hessians, linears_of
from common.quantisation.gptq import gptq, output_error, round_to_nearest
from common.quantisation.grids import minmax
from common.quantisation.packed import stored_bits
from kernels.w24 import SCALE_BITS, f24_bytes, unpacked
from papers.fast_2bit import F24Linear, bits_per_weight, quantise_matrix, quantize_, stripe_scores
from papers.fast_2bit.measure import scale_study
from papers.fast_2bit.method import order_of, stripes_in_4_bits, two_order


@pytest.fixture(autouse=True)
def _torch_paths(monkeypatch):
    """Whole models in Triton's interpreter take minutes; tests/kernels holds the kernels to the torch paths."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}


def model_of(architecture: str = "llama", **more) -> torch.nn.Module:
    return build({"architecture": architecture, "vocab_size": 40, **SIZES, **more}, seed=2)


def calibration() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 40, (4, 30), generator=random) for _ in range(3)]


def problem(seed: int, rows: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, channels, generator=random)
    x = torch.randn(4 * channels, channels, generator=random) @ (
        torch.eye(channels) + 0.2 * torch.randn(channels, channels, generator=random)
    )
    return w, 2 * x.T @ x / len(x)


def in_order(w: torch.Tensor, quantised) -> torch.Tensor:
    """The packed matrix in the original order of channels."""
    found = torch.empty_like(w)
    found[:, quantised.packed.perm.long()] = unpacked(quantised.packed)
    return found


# Two-order scales


def test_fine_second_order_codes_are_one_order():
    w = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    one, two = minmax(2)(w), two_order(2, 16, 16)(w)
    assert torch.allclose(one.scale, two.scale, rtol=2e-3)
    assert torch.equal(one.zero, two.zero)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 4]), st.integers(1, 20), st.integers(1, 40), st.floats(0, 3))
def test_what_is_stored_fits_and_is_what_rounding_sees(seed, bits, g2, rows, spread):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 16, generator=random) * torch.exp(spread * torch.randn(rows, 1, generator=random))
    w[torch.rand(rows, generator=random) < 0.1] = 0
    grid = two_order(2, bits, g2)(w)
    assert ((grid.scale_codes >= 0) & (grid.scale_codes < 2**bits)).all()
    assert ((grid.offsets >= 0) & (grid.offsets < 2**bits)).all()
    assert len(grid.s2) == len(grid.offsets) == -(-rows // g2)
    group = torch.arange(rows) // g2
    stored = (grid.scale_codes + grid.offsets[group]) * grid.s2[group]
    assert torch.equal(grid.scale, stored)
    assert torch.equal(grid.s2, grid.s2.half().float())
    assert ((grid.zero >= 0) & (grid.zero <= 3)).all()
    assert torch.isfinite(grid.values(grid.codes(w))).all()
    assert torch.equal(grid.values(grid.codes(torch.zeros(rows))), torch.zeros(rows))


def test_equal_scales_survive_two_orders():
    w = torch.tensor([[-1.0, 0.0, 1.0, 2.0] * 4]).repeat(16, 1)
    grid = two_order(2, 4, 16)(w)
    assert torch.allclose(grid.values(grid.codes(w)), w, rtol=1e-3)


def test_weight_errors_of_reference():
    """Computed by an independent program on the same draws: normal and Student t weights, 256 x 480, g1 = g2 = 16."""
    expected = [0.1223, 0.1224, 0.1228, 0.1236, 0.1243, 0.1266]
    assert [row["error"] for row in scale_study(0)] == pytest.approx(expected, abs=0.003)


# Which stripes


def test_a_wide_stripe_scores_highest_and_an_unused_one_lowest():
    w, h = problem(0, 24, 64)
    w[:, 16:32] *= 5
    for score in ("range", "hessian_range", "error"):
        assert int(stripe_scores(w, h, score).argmax()) == 1, score
    h[16:32], h[:, 16:32] = 0, 0
    assert int(stripe_scores(w, h, "range").argmax()) == 1
    assert int(stripe_scores(w, h).argmin()) == int(stripe_scores(w, h, "error").argmin()) == 1
    with pytest.raises(ValueError, match="unknown score 'width'; there are: range, hessian_range, error"):
        stripe_scores(w, h, "width")


def test_chosen_stripes_come_last_and_order_is_kept_within():
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 2.0])
    assert order_of(scores, 2).tolist() == [0, 2, 4, 1, 3]
    assert order_of(scores, 0).tolist() == order_of(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert order_of(torch.tensor([0.0, 0.0, 1.0]), 1).tolist() == [0, 1, 2]  # nothing moves where it stands already


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.floats(0, 1))
def test_the_share_is_met_to_one_stripe(counts, ratio):
    stripes = {str(i): n for i, n in enumerate(counts)}
    found = stripes_in_4_bits(stripes, ratio)
    assert all(0 <= found[name] <= n for name, n in stripes.items())
    assert abs(sum(found.values()) - ratio * sum(counts)) <= 1


def test_a_ratio_for_each_matrix():
    assert stripes_in_4_bits({"a": 6, "b": 12, "c": 6}, {"a": 0, "b": 1, "c": 0.5}) == {"a": 0, "b": 12, "c": 3}
    with pytest.raises(ValueError, match="no ratio for b"):
        stripes_in_4_bits({"a": 6, "b": 12}, {"a": 0})
    with pytest.raises(ValueError, match=r"share in 0\.\.1, not 1\.2"):
        stripes_in_4_bits({"a": 6}, 1.2)


# One matrix


def test_no_4_bits_and_all_4_bits_are_plain_gptq():
    w, h = problem(1, 32, 96)
    four = quantise_matrix(w, h, 6)
    assert four.order.tolist() == list(range(6))
    assert torch.equal(in_order(w, four), gptq(w, h, [(16, minmax(4))] * 6).weight)
    two = quantise_matrix(w, h, 0)
    fits = [(16, two_order(2, SCALE_BITS[i % 3], 16)) for i in range(6)]
    assert torch.equal(in_order(w, two), gptq(w, h, fits).weight)


@pytest.mark.parametrize(("rows", "four", "g2"), [(32, 2, 16), (40, 1, 16), (24, 3, 8), (7, 5, 64)])
@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_packing_loses_nothing(rows, four, g2, rounding):
    w, h = problem(2, rows, 96)
    found = quantise_matrix(w, h, four, rounding=rounding, g2=g2)
    perm = found.packed.perm.long()
    fits = [(16, two_order(2, SCALE_BITS[i % 3], g2)) for i in range(6 - four)] + [(16, minmax(4))] * four
    moved = w[:, perm]
    rounded = gptq(moved, h[perm][:, perm], fits) if rounding == "gptq" else round_to_nearest(moved, fits)
    assert torch.equal(unpacked(found.packed), rounded.weight)
    assert found.packed.stripes == (6 - four, four)


def test_4_bits_for_the_wide_stripe_lower_the_output_error_most():
    w, h = problem(3, 48, 96)
    w[:, 37] *= 8
    h[37], h[:, 37] = h[37] / 8, h[:, 37] / 8
    errors = []
    for stripe in range(6):
        score = torch.zeros(6)
        score[stripe] = 1
        found = quantise_matrix(w, h, 1, score=lambda weight, hessian, score=score: score, rounding="rtn")
        errors.append(float(output_error(w, in_order(w, found), h)))
    assert min(range(6), key=errors.__getitem__) == 37 // 16 == int(stripe_scores(w, h).argmax())


# The module


@pytest.mark.parametrize("rows", [1, 8, 9, 30])
@pytest.mark.parametrize(("outliers", "bias", "channels"), [(0.0, False, 96), (0.01, True, 96), (0.02, True, 90)])
def test_the_module_is_a_linear_layer_with_the_unpacked_matrix(rows, outliers, bias, channels):
    w, h = problem(4, 40, 96)
    w[:, channels:] = 0
    added = torch.randn(40, generator=torch.Generator().manual_seed(0)) if bias else None
    layer = F24Linear(quantise_matrix(w, h, 2, outliers=outliers), channels, added)
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    matrix = layer.weight_matrix()
    assert matrix.shape == (40, channels)
    assert torch.allclose(layer(x), F.linear(x, matrix, added), atol=1e-4)
    assert layer(x[None]).shape == (1, rows, 40)
    half = copy.deepcopy(layer).half()(x.half())
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), F.linear(x, matrix, added), atol=0.1)
    assert "stripes of 2 bits=4, of 4=2" in repr(layer)
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("rows", [3, 10])
def test_the_module_in_tritons_interpreter(rows, monkeypatch):
    pytest.importorskip("triton")
    w, h = problem(4, 40, 96)
    layer = F24Linear(quantise_matrix(w, h, 2), 96)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_outliers_are_kept_beside_the_planes():
    w, h = problem(5, 40, 96)
    w[3, 20] = 12.0
    w[:, 64:80] *= 4  # its stripe gets the 4 bits
    plain, kept = (F24Linear(quantise_matrix(w, h, 1, outliers=share, rounding="rtn"), 96) for share in (0.0, 0.01))
    assert abs(float(kept.weight_matrix()[3, 20]) - 12) < 0.01
    assert len(kept.kept.values) == round(0.01 * w.numel())
    beside = kept.kept.starts.nbytes + 4 * len(kept.kept.values)
    assert kept.weight_bytes() == plain.weight_bytes() + beside
    assert output_error(w, kept.weight_matrix(), h) < output_error(w, plain.weight_matrix(), h)
    chosen = kept.order[5:].long()
    assert not kept.kept.dense().view(40, 6, 16)[:, chosen].any()  # 4-bit stripes keep none


def test_stored_bits_are_those_of_the_format():
    """Sizes that divide evenly: the closed form, and an int16 for each stripe's place."""
    w = torch.randn(32, 16 * 7, generator=torch.Generator().manual_seed(0))
    layer = F24Linear(quantise_matrix(w, torch.eye(112), 4, rounding="rtn"), 112)
    assert layer.weight_bytes() == f24_bytes(32, 3, 4) + 2 * 7
    assert 8 * f24_bytes(32, 3, 4) / w.numel() == pytest.approx(bits_per_weight(4 / 7))
    assert [round(bits_per_weight(r), 4) for r in (0, 0.1, 0.153, 0.25, 1)] == [2.4167, 2.7, 2.8502, 3.125, 5.25]


# A model


@pytest.mark.parametrize(("architecture", "more"), [("llama", {"num_key_value_heads": 2}), ("qwen2", {})])
def test_a_model_is_quantised_in_place(architecture, more):
    model = model_of(architecture, **more)
    before, ids = copy.deepcopy(model), calibration()[0][:2, :12]
    if architecture == "qwen2":
        with torch.no_grad():
            before.model.layers[0].self_attn.q_proj.bias.fill_(0.3)
            model.model.layers[0].self_attn.q_proj.bias.fill_(0.3)
    assert quantize_(model, calibration(), 1.0) is model
    layers = [module for module in model.modules() if isinstance(module, F24Linear)]
    assert len(layers) == 14
    assert isinstance(model.lm_head, torch.nn.Linear)
    with torch.no_grad():
        full, found = before(input_ids=ids).logits, model(input_ids=ids).logits
        straight = copy.deepcopy(before)
        for name in linears_of(before):
            straight.get_submodule(name).weight.copy_(model.get_submodule(name).weight_matrix())
        assert torch.allclose(straight(input_ids=ids).logits, found, atol=1e-3)
    assert float((full - found).std() / full.std()) < 0.25
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 16)


def test_the_share_of_4_bits_is_seen_in_the_stored_bits():
    found = {}
    for ratio in (0.0, 0.5, 1.0):
        model = model_of()
        quantize_(model, calibration(), ratio, rounding="rtn")
        found[ratio] = stored_bits(model)
    assert found[0.0] < 2.5 < found[0.5] < 5.3 < found[1.0] < 5.4


def test_odd_widths_are_padded_on_request():
    model = model_of(intermediate_size=100)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has 100 input channels, no multiple of 16: pass pad"):
        quantize_(model, calibration())
    before = copy.deepcopy(model)
    quantize_(model, calibration(), 1.0, pad=True)
    ids = calibration()[0][:2, :12]
    with torch.no_grad():
        full, found = before(input_ids=ids).logits, model(input_ids=ids).logits
    assert float((full - found).std() / full.std()) < 0.25


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio_4bit": -0.1}, "share in 0..1, not -0.1"),
        ({"rounding": "floor"}, "unknown rounding 'floor'; there are: gptq, rtn"),
        ({"score": "width"}, "unknown score 'width'"),
        ({"g2": 0}, "at least 1, not 0"),
        ({"outliers": 0.2}, r"share in 0..0.0625, not 0.2"),
        ({"calibration": []}, "no calibration batch"),
    ],
)
def test_bad_settings_are_named_before_anything_is_replaced(wrong, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        quantize_(model, **({"calibration": calibration()} | wrong))
    assert len(linears_of(model)) == 14


def test_inputs_that_are_not_finite_and_other_architectures_are_named():
    model = model_of()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(ValueError, match="inputs that are not finite"):
        quantize_(model, [torch.tensor([[7, 8]])])
    with pytest.raises(ValueError, match="no list of decoder blocks in a GPT2LMHeadModel"):
        quantize_(model_of("gpt2"), calibration())


def test_gptq_lowers_the_error_of_a_models_layers():
    model = model_of()
    found = hessians(model, calibration())
    name = "model.layers.0.mlp.down_proj"
    weight, h = model.get_submodule(name).weight.detach(), found[name]
    errors = [
        float(output_error(weight, in_order(weight, quantise_matrix(weight, h, 2, rounding=how)), h))
        for how in ("gptq", "rtn")
    ]
    assert errors[0] < errors[1]


def test_the_readmes_example_runs():
    text = (Path(__file__).parents[3] / "papers" / "fast_2bit" / "README.md").read_text()
    block = re.search(r"\n\n((?:    .*\n|\n)*    from papers\.fast_2bit(?:.*\n)(?:    .*\n|\n)*)", text)[1]
    model = model_of()

    def tokenizer(text, return_tensors):
        ids = torch.tensor([[2 + ord(letter) % 38 for letter in text]])
        return type("Encoding", (), {"input_ids": ids})

    code = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    exec(code, {"model": model, "tokenizer": tokenizer, "texts": ["a short text", "another, somewhat longer one"]})
    assert any(isinstance(module, F24Linear) for module in model.modules())
