"""The roofline against a model's own cache and torch's FLOP counter, the paper's numbers, and its laws."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from common.costs import catalogue, roofline
from common.costs.catalogue import Transformer, accelerator, from_config, tensor_parallel, transformer
from common.models.build import build, count_parameters
from common.serving.catalogue import GIB

A100 = accelerator("a100-80gb")
YI = transformer("yi-34b-200k")
PAPER = replace(YI, parameters=34_000_000_000, flop_parameters=34_000_000_000)  # the paper rounds to 34e9 and 68 GB
NARROW = replace(PAPER, heads=52, kv_heads=4)  # width 6656, with which the reported prefill comes out
SWITCH = replace(A100, host_bytes_per_s=20e9)  # the effective rate that the reported switch comes out with
TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES = {"MHA": ("llama", 4), "GQA": ("llama", 2), "MQA": ("qwen2", 1), "GPT-2": ("gpt2", None)}


def tiny(attention: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> torch.nn.Module:
    architecture, kv_heads = SHAPES[attention]
    sizes = {
        "architecture": architecture,
        "tie_word_embeddings": False,
        **TINY,
        "num_key_value_heads": kv_heads,
    } | sizes
    return build(sizes, attention="eager", dtype=dtype)


# --- a real model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", SHAPES)
def test_kv_bytes_are_those_of_past_key_values(attention: str, dtype: torch.dtype) -> None:
    model = tiny(attention, dtype)
    cache = model(torch.ones(2, 13, dtype=torch.long), use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 2 * roofline.kv_bytes(from_config(model.config, bytes_per_kv=dtype.itemsize), 13)


@pytest.mark.parametrize("attention", SHAPES)
def test_flops_are_those_of_the_counter(attention: str) -> None:
    """`full`: the counter sees whole squares. Exact for a prompt and for a step."""
    model = tiny(attention)
    shape = from_config(model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(torch.ones(1, 11, dtype=torch.long), use_cache=True).past_key_values
    assert counter.get_total_flops() == roofline.prefill_flops(shape, 11, "full")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert counter.get_total_flops() == roofline.decode_flops(shape, 12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", SHAPES)
def test_parameters_are_those_of_the_model(attention: str, tied: bool) -> None:
    model = tiny(attention, tie_word_embeddings=tied)
    shape = from_config(model.config, bytes_per_weight=4)
    assert shape.parameters == count_parameters(model)
    assert shape.weight_bytes == sum(p.nbytes for p in model.parameters())
    matrices = [m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]  # the head included
    assert shape.flop_parameters == sum(matrix.numel() for matrix in matrices)


CONFIGURATIONS = {  # of the checkpoints' config.json: class, hidden size, layers, query and key-value heads, MLP, words
    "yi-34b-200k": ("Llama", 7168, 60, 56, 8, 20480, 64000),
    "llama-3.1-8b": ("Llama", 4096, 32, 32, 8, 14336, 128256),
    "llama-3.1-70b": ("Llama", 8192, 80, 64, 8, 28672, 128256),
    "qwen2.5-7b": ("Qwen2", 3584, 28, 28, 4, 18944, 152064),
}


@pytest.mark.parametrize("name", catalogue.names("models"))
def test_a_catalogued_model_is_what_its_configuration_counts(name: str) -> None:
    import transformers

    kind, hidden, layers, heads, kv_heads, intermediate, words = CONFIGURATIONS[name]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=words, tie_word_embeddings=False,
    )  # fmt: skip
    counted = from_config(config)
    assert counted == replace(transformer(name), name=counted.name, source=counted.source)


def test_the_exact_number_of_yis_parameters() -> None:
    assert YI.parameters == 34_388_917_248


@pytest.mark.parametrize("attention", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_on_disk_is_what_its_configuration_counts(tmp_path: Path, attention: str, tied: bool) -> None:
    """As a folder in hub format, and as the `final` weights of a shared model."""
    model = tiny(attention, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "final")
    counted = replace(from_config(model.config), name="")
    assert replace(catalogue.from_checkpoint(tmp_path / "final"), name="") == counted
    assert replace(catalogue.from_checkpoint(tmp_path), name="") == counted


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"hub_id": "someone/a-model"}')
    with pytest.raises(FileNotFoundError, match=r"no folder 'someone/a-model' .*needs a profile that allows downloads"):
        catalogue.from_checkpoint(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json missing"):
        catalogue.from_checkpoint(tmp_path / "empty")


# --- the paper: its running example recomputed (N = 34e9), and the values that it is reported with

T2 = """
4000 0.98304 0.9155 0.8718 0.8939 0.9159 0.9600 0.8923 8.4579 0.0983 0.0916 18 105 280 629
10000 2.4576 2.2888 2.1795 2.3173 2.4552 2.7309 2.3075 8.6387 0.2458 0.2289 7 42 112 251
50000 12.288 11.4441 10.8974 14.3436 17.7897 24.6821 14.0974 9.8440 1.2288 1.1444 1 8 22 50
100000 24.576 22.8882 21.7949 35.5795 49.3641 76.9333 34.5949 11.3507 2.4576 2.2888 0 4 11 25
200000 49.152 45.7764 43.5897 98.7282 153.8667 264.1436 94.7897 14.3639 4.9152 4.5776 0 2 5 12
1000000 245.76 228.8818 217.9487 1596.4103 2974.8718 5731.7949 1497.9487 38.4698 24.576 22.8882 0 0 1 2
"""


def users(context: int, devices: int) -> int:
    return roofline.concurrency(PAPER, tensor_parallel(A100, devices).memory_bytes, context)


@pytest.mark.parametrize("line", T2.split("\n")[1:-1])
def test_every_printed_digit_of_the_recomputed_running_example(line: str) -> None:
    printed = line.split()
    context = int(printed[0])
    kv = roofline.kv_bytes(PAPER, context)
    computed = [
        kv / 1e9,
        kv / GIB,
        *(roofline.prefill_seconds(PAPER, A100, context, c) for c in ("linear", "halved", "causal", "full")),
        roofline.prefill_seconds(NARROW, A100, context, "halved"),
        roofline.decode_seconds(PAPER, A100, context, output_tokens=250),
        roofline.switch_seconds(PAPER, SWITCH, context),
        roofline.switch_seconds(PAPER, replace(A100, host_bytes_per_s=20 * GIB), context),
    ]
    decimals = [len(text.partition(".")[2]) for text in printed[1:11]]
    assert [f"{x:.{d}f}" for x, d in zip(computed, decimals, strict=True)] == printed[1:11]
    assert [users(context, n) for n in (1, 2, 4, 8)] == [int(x) for x in printed[11:]]


def test_the_reported_running_example() -> None:
    """4K and 50K: prefill 0.89 and 14.1 s, 250 tokens in 8.5 and 9.8 s, about 20 users and 1 (a secondary page of it).

    The prefill's convention (half the causal count, width 6656) and the 250 tokens are inferred from these numbers.
    """
    for context, prefill, decode in ((4000, "0.89", "8.5"), (50_000, "14.1", "9.8")):
        digits = len(prefill.partition(".")[2])
        assert f"{roofline.prefill_seconds(NARROW, A100, context, 'halved'):.{digits}f}" == prefill
        assert f"{roofline.decode_seconds(PAPER, A100, context, 250):.1f}" == decode
    assert users(50_000, 1) == 1
    assert users(4000, 1) == 18  # "about 20"


def test_the_number_on_the_box_decides_whether_one_context_fits() -> None:
    assert [roofline.concurrency(PAPER, m, 50_000) for m in (A100.label_bytes, A100.memory_bytes)] == [0, 1]
    assert [roofline.concurrency(PAPER, m, 4000) for m in (A100.label_bytes, A100.memory_bytes)] == [12, 18]


def test_other_numbers_of_the_running_example() -> None:
    assert roofline.kv_bytes(YI, 1) == 245_760
    assert roofline.kv_bytes(YI, 10**6) == 250 * roofline.kv_bytes(YI, 4000)
    many_heads = replace(YI, kv_heads=56)
    assert roofline.kv_bytes(many_heads, 50_000) == 86_016_000_000
    assert PAPER.weight_bytes // roofline.kv_bytes(PAPER, 1) + 1 == 276_693  # tokens whose cache outweighs the weights
    assert A100.flops_per_s / A100.memory_bytes_per_s == pytest.approx(153.0, abs=0.05)  # the critical batch


# --- laws


def test_a_batch_below_the_critical_one_is_bound_by_bandwidth() -> None:
    """Weights alone (one token of context): a step takes as long for any batch up to F / B, and then grows with it."""
    no_cache = replace(PAPER, layers=1, kv_heads=1, head_dim=1, heads=1)
    one = roofline.decode_seconds(no_cache, A100, 1)
    assert roofline.decode_seconds(no_cache, A100, 1, users=153) == pytest.approx(one, rel=1e-6)
    assert roofline.decode_seconds(no_cache, A100, 1, users=306) == pytest.approx(one * 306 / 153.016, rel=1e-4)


def test_a_short_prompt_takes_one_reading_of_the_weights() -> None:
    """Up to the critical batch a prompt is no slower than a token; beyond it, operations bind."""
    reading = PAPER.weight_bytes / A100.memory_bytes_per_s
    assert [roofline.prefill_seconds(PAPER, A100, s, "linear") for s in (1, 100, 153)] == [reading] * 3
    assert roofline.prefill_seconds(PAPER, A100, 154, "linear") > reading


RESOURCES = ("flops_per_s", "memory_bytes_per_s", "host_bytes_per_s")
METRICS = {
    "prefill": (lambda machine: roofline.prefill_seconds(PAPER, machine, 50_000), "flops_per_s"),
    "decode": (lambda machine: roofline.decode_seconds(PAPER, machine, 50_000, 250), "memory_bytes_per_s"),
    "switch": (lambda machine: roofline.switch_seconds(PAPER, machine, 50_000), "host_bytes_per_s"),
}


@pytest.mark.parametrize("metric", METRICS)
def test_elasticities(metric: str) -> None:
    """d log(metric) / d log(resource) is -1 for the resource that binds and 0 for the others."""
    seconds, binding = METRICS[metric]
    for resource in RESOURCES:
        step = 1.001
        faster = replace(A100, **{resource: step * getattr(A100, resource)})
        elasticity = math.log(seconds(faster) / seconds(A100)) / math.log(step)
        assert elasticity == pytest.approx(-1.0 if resource == binding else 0.0, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**5), st.sampled_from(catalogue.names("accelerators")))
def test_everything_gets_worse_with_context(context: int, more: int, name: str) -> None:
    machine, longer = tensor_parallel(accelerator(name), 8), context + more
    assert roofline.prefill_seconds(YI, machine, longer) >= roofline.prefill_seconds(YI, machine, context)
    assert roofline.decode_seconds(YI, machine, longer) > roofline.decode_seconds(YI, machine, context)
    assert roofline.switch_seconds(YI, machine, longer) > roofline.switch_seconds(YI, machine, context)
    fits = [roofline.concurrency(YI, machine.memory_bytes, s) for s in (longer, context)]
    assert fits[0] <= fits[1]
    assert fits[1] * roofline.kv_bytes(YI, context) + YI.weight_bytes <= machine.memory_bytes


def test_concurrency_grows_faster_than_the_number_of_devices() -> None:
    """The weights are paid once: 1, 8, 22, 50 for 1, 2, 4, 8 (the paper says linear)."""
    found = [users(50_000, n) for n in (1, 2, 4, 8)]
    assert found == [1, 8, 22, 50]
    assert all(b > 2 * a for a, b in itertools.pairwise(found))


def test_compression() -> None:
    """To keep 1/250 makes one million tokens cost what 4,000 do in all but prefill; to keep all changes nothing."""
    assert roofline.compressed(PAPER) == PAPER
    small = roofline.compressed(PAPER, layer=1 / 2, head=1 / 5, token=1 / 5, hidden=1 / 5)
    assert roofline.kv_bytes(small, 10**6) == roofline.kv_bytes(PAPER, 4000)
    assert roofline.switch_seconds(small, A100, 10**6) == roofline.switch_seconds(PAPER, A100, 4000)
    assert roofline.decode_seconds(small, A100, 10**6, 250) == roofline.decode_seconds(PAPER, A100, 4000, 250)
    assert roofline.concurrency(small, A100.memory_bytes, 10**6) == users(4000, 1)
    assert roofline.prefill_seconds(small, A100, 10**6) == roofline.prefill_seconds(PAPER, A100, 10**6)


def test_a_session_adds_up_and_switches_only_when_users_do_not_fit() -> None:
    few = roofline.session_seconds(PAPER, A100, 4000, rounds=3, output_tokens=250, users=18)
    many = roofline.session_seconds(PAPER, A100, 4000, rounds=3, output_tokens=250, users=19)
    assert few["switch"] == 0
    assert many == few | {"switch": 3 * roofline.switch_seconds(PAPER, A100, 4000)}
    assert few["prefill"] == roofline.prefill_seconds(PAPER, A100, 4000)
    assert few["decode"] == 3 * roofline.decode_seconds(PAPER, A100, 4000, 250)


def test_a_query_is_the_sum_of_its_steps() -> None:
    """Against a literal loop; no output is scoring, one output comes with the prompt."""
    shape = from_config(tiny("GQA").config)
    machine = replace(A100, flops_per_s=4e9, memory_bytes_per_s=6e9)
    queries = [(1, 0), (1, 1), (5, 2), (40, 90), (3, 700)]
    for prompt, output in queries:
        literal = roofline.prefill_seconds(shape, machine, prompt)
        for context in range(prompt + 1, prompt + output):
            literal += roofline.decode_seconds(shape, machine, context)
        assert float(roofline.query_seconds(shape, machine, prompt, output)) == pytest.approx(literal, rel=1e-12)
    together = roofline.query_seconds(shape, machine, *np.transpose(queries))
    assert together.tolist() == [float(roofline.query_seconds(shape, machine, *query)) for query in queries]


# --- the catalogue


def test_catalogued_figures_have_a_source_and_dense_rates() -> None:
    for name in catalogue.names("accelerators"):
        machine = accelerator(name)
        assert machine.source
        assert machine.label_bytes <= machine.memory_bytes * 1.001  # GB on the box, GiB or the same number of GB within
    assert (A100.flops_per_s, A100.memory_bytes, A100.label_bytes) == (312e12, 80 * 2**30, 80 * 10**9)
    assert accelerator("h200-141gb").memory_bytes == pytest.approx(141e9, rel=1e-3)
    pair = tensor_parallel(A100, 2)
    assert (pair.memory_bytes, pair.host_bytes_per_s) == (2 * A100.memory_bytes, A100.host_bytes_per_s)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerator("tpu"), ValueError, "unknown accelerator 'tpu'; known: a100-80gb, h100-80gb"),
        (lambda: transformer("gpt-5"), ValueError, "unknown model 'gpt-5'; known: yi-34b-200k, "),
        (lambda: tensor_parallel(A100, 0), ValueError, "at least 1 device, not 0"),
        (lambda: replace(YI, kv_heads=9), ValueError, "56 query heads cannot share 9 key-value heads evenly"),
        (lambda: replace(YI, layers=0), ValueError, "layers must be at least 1, not 0"),
        (lambda: roofline.kv_bytes(YI, 0), ValueError, "token counts must be at least 1, not 0"),
        (lambda: roofline.prefill_seconds(YI, A100, -4), ValueError, "token counts must be at least 1, not -4"),
        (lambda: roofline.prefill_flops(YI, 4, "half"), ValueError, "'half'; known: full, causal, halved, linear"),
        (lambda: roofline.decode_seconds(YI, A100, 4, users=0), ValueError, "users >= 1, not 1 and 0"),
        (lambda: roofline.compressed(YI, head=-0.5), ValueError, r"head compression .* must lie in \(0, 1\], not -0.5"),
        (lambda: replace(YI, kv_share=0.0), ValueError, r"kv_share must lie in \(0, 1\], not 0.0"),
        (lambda: roofline.query_seconds(YI, A100, [3, 0], 1), ValueError, "at least 1, not 0"),
        (lambda: roofline.query_seconds(YI, A100, 3, [-1]), ValueError, "at least 0, not -1"),
        (lambda: roofline.concurrency(YI, 24 * GIB, 1), roofline.CapacityError, "more devices"),
        (lambda: roofline.session_seconds(YI, A100, 100_000, 1, 1, 1), roofline.CapacityError, "context does not fit"),
        (lambda: roofline.session_seconds(YI, A100, 4000, 0, 1, 1), ValueError, "at least 1, not 0 and 1"),
        (lambda: Transformer("x", 1, 1, 1, 1, 0, 1, "s"), ValueError, "parameters must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
