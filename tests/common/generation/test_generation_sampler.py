"""The decode loop: parity with `transformers` generate, independence of the batch, randomness, costs, errors."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from common.generation.ledger import Ledger
from common.generation.sampler import draw, filter_logits, generate, uniforms
from common.models.build import build

VOCABULARY = 32
MODELS = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 1},
    "gpt2": {"tie_word_embeddings": False},
}


@functools.cache
def tiny(architecture: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> torch.nn.Module:
    """Random weights, large enough that greedy text does not fall into a loop at once; biases (Qwen2) are not zero."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"architecture": architecture, **sizes, **MODELS[architecture]}
    model = build(config, seed=1, initializer_range=0.4, dtype=dtype, attention=attention)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def random_prompts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def reference(model, prompts, new_tokens, stop):
    """Greedy `transformers` generate on the left-padded batch, cut after the stop token."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    rows = [row[longest:].tolist() for row in out]
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def as_lists(generation):
    return [row.tolist() for row in generation.tokens]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_greedy_equals_transformers(architecture, lean):
    if lean and architecture == "gpt2":
        pytest.skip("no lean forward for GPT-2")
    model = tiny(architecture)
    prompts = random_prompts([1, 7, 20, 3, 3, 12, 5, 20, 2, 9, 14, 16, 4, 6, 8, 10, 11, 13, 15, 17])
    free = reference(model, prompts, 40, -1)
    assert as_lists(generate(model, prompts, 40, stop_tokens=(), lean=lean)) == free
    first = {stop: {row.index(stop) for row in free if stop in row} for stop in range(VOCABULARY)}
    stop = max(first, key=lambda token: len(first[token]))  # the token that ends the rows at the most different steps
    assert len(first[stop]) > 3
    got = generate(model, prompts, 40, stop_tokens=[stop], lean=lean)
    expected = reference(model, prompts, 40, stop)
    assert as_lists(got) == expected
    assert got.stopped == [row[-1] == stop for row in expected]
    assert got.ledger.generated_tokens == sum(map(len, expected))


@pytest.mark.parametrize("architecture", MODELS)
def test_greedy_equals_transformers_with_eager_attention(architecture):
    """Prompt by prompt: in float64 the padding of `transformers` gives NaN here (its mask overflows in float32)."""
    model, prompts = tiny(architecture, attention="eager"), random_prompts([1, 7, 20, 3, 12])
    expected = [reference(model, [prompt], 40, 5)[0] for prompt in prompts]
    assert as_lists(generate(model, prompts, 40, stop_tokens=[5], lean=False)) == expected
    assert len({token for row in expected for token in row}) > 10


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    new_tokens=st.integers(1, 12),
    stop=st.integers(0, VOCABULARY - 1),
    architecture=st.sampled_from(list(MODELS)),
    seed=st.integers(0, 1000),
)
def test_greedy_equals_transformers_on_any_batch(lengths, new_tokens, stop, architecture, seed):
    model, prompts = tiny(architecture), random_prompts(lengths, seed)
    assert as_lists(generate(model, prompts, new_tokens, stop_tokens=[stop])) == reference(
        model, prompts, new_tokens, stop
    )


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
def test_independent_of_the_batch(do_sample, lean):
    """Alone, permuted or split: row for row the same tokens; a stream belongs to its prompt and not to its place."""
    model = tiny("llama")
    prompts, streams = random_prompts([3, 9, 1, 14, 6, 2, 8, 5] * 4, seed=3), list(range(100, 132))
    run = functools.partial(
        generate, model, max_new_tokens=24, do_sample=do_sample, temperature=1.3, seed=7, stop_tokens=[4], lean=lean
    )
    together = as_lists(run(prompts, streams=streams))
    order = np.random.default_rng(0).permutation(len(prompts))
    permuted = as_lists(run([prompts[i] for i in order], streams=[streams[i] for i in order]))
    assert [permuted[list(order).index(i)] for i in range(len(prompts))] == together
    assert as_lists(run(prompts[:5], streams=streams[:5])) + as_lists(run(prompts[5:], streams=streams[5:])) == together
    assert [as_lists(run([p], streams=[s]))[0] for p, s in zip(prompts, streams, strict=True)] == together


def test_a_stop_and_a_limit_for_each_prompt():
    model, prompts = tiny("llama"), random_prompts([4, 6, 9])
    free = as_lists(generate(model, prompts, 20, stop_tokens=()))
    stops = [[free[0][3]], [free[1][7]], []]
    limited = generate(model, prompts, [20, 5, 20], stop_tokens=stops)
    for row, (tokens, limit) in enumerate(zip(free, [20, 5, 20], strict=True)):
        end = next((i + 1 for i, token in enumerate(tokens[:limit]) if token in stops[row]), limit)
        assert limited.tokens[row].tolist() == tokens[:end]
    assert limited.stopped[0]
    assert not limited.stopped[2]


def test_the_models_own_end_token_is_the_default():
    model, prompts = tiny("qwen2"), random_prompts([4])
    free = as_lists(generate(model, prompts, 20))[0]
    model.generation_config.eos_token_id = free[5]
    try:
        assert as_lists(generate(model, prompts, 20))[0] == free[: free.index(free[5]) + 1]
        assert as_lists(generate(model, prompts, 20, stop_tokens=()))[0] == free
    finally:
        model.generation_config.eos_token_id = None


def test_sampled_distribution_is_the_models():
    """First tokens of many streams of one prompt against softmax(logits / T): chi-square within 4 standard errors."""
    model, prompt, n = tiny("llama"), random_prompts([6])[0], 4000
    with torch.no_grad():
        expected = (model(prompt[None]).logits[0, -1] / 1.5).softmax(-1).numpy()
    tokens = torch.cat(generate(model, [prompt] * n, 1, do_sample=True, temperature=1.5, stop_tokens=()).tokens)
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    large = expected * n >= 5
    observed = np.append(counts[large], counts[~large].sum())
    chance = np.append(expected[large], expected[~large].sum()) * n
    chi = ((observed - chance) ** 2 / chance.clip(1e-9)).sum()
    degrees = len(chance) - 1
    assert chi < degrees + 4 * np.sqrt(2 * degrees)


def test_uniforms_are_counter_based():
    whole = uniforms(seed=5, stream=9, count=23)
    for start in (0, 1, 3, 4, 11):
        assert np.array_equal(uniforms(5, 9, 23 - start, start), whole[start:])
    for other in (uniforms(5, 10, 23), uniforms(6, 9, 23)):
        assert not np.intersect1d(whole, other).size
    many = np.concatenate([uniforms(0, stream, 50) for stream in range(400)])
    assert abs(many.mean() - 0.5) < 4 / np.sqrt(12 * many.size)
    assert stats.kstest(many, "uniform").pvalue > 1e-4
    assert many.min() > 0
    assert many.max() < 1


def test_filters_match_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for k in (1, 5, VOCABULARY):
        assert torch.equal(filter_logits(logits, top_k=k), TopKLogitsWarper(k)(None, logits))
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(filter_logits(logits, top_p=p), TopPLogitsWarper(p)(None, logits))
    assert torch.equal(filter_logits(logits, temperature=0.5), logits / 0.5)


@given(st.floats(1e-9, 1 - 1e-9), st.integers(0, 2**31), st.integers(1, VOCABULARY))
def test_a_filtered_token_is_never_drawn(u, seed, k):
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 5
    kept = filter_logits(logits, top_k=k)
    token = draw(kept, torch.tensor([u], dtype=torch.float64))
    assert kept[0, int(token)] > -torch.inf


@pytest.mark.parametrize("lean", [False, True])
def test_ledger_counts_what_ran(lean):
    model = tiny("llama", attention="eager")
    prompts = random_prompts([3, 8, 5] * 8)
    with FlopCounterMode(display=False) as counter:
        ledger = generate(model, prompts, 6, stop_tokens=(), lean=lean).ledger
    measured = counter.get_total_flops()
    assert (ledger.prompt_tokens, ledger.generated_tokens, ledger.forwards) == (128, 144, 6)
    assert ledger.seconds > 0
    if lean:  # its prefill attention runs in the fused CPU kernel, which the counter does not see
        config = model.config
        attention = 4 * config.hidden_size * 8 * 8 * 24 * config.num_hidden_layers
        assert ledger.flops == measured + attention
    else:
        assert ledger.flops == measured


def test_ledger_adds_and_merges():
    ledger = Ledger(forwards=1)
    ledger.add(forwards=2, flops=10, seconds=0.5)
    assert ledger + Ledger(flops=5) == Ledger(forwards=3, flops=15, seconds=0.5)
    assert Ledger.merge([]) == Ledger()
    with pytest.raises(TypeError, match="'tokens'"):
        ledger.add(forwards=1, tokens=3)
    with pytest.raises(ValueError, match="forwards=-1"):
        ledger.add(flops=1, forwards=-1)
    assert ledger.flops == 10


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("block", [None, 2])
def test_lean_logits_are_the_modules(architecture, dtype, tolerance, rows, block, monkeypatch):
    """In float64 the module's norms, which `transformers` rounds to float32, are computed in float64 for this test."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from common.generation import lean

    if block:  # a cache of many blocks, as in large batches
        monkeypatch.setattr(lean, "BLOCK", block)
        monkeypatch.setattr(lean, "LARGE_BATCH", 1)
    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(
            norm,
            "forward",
            lambda self, x: torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),
        )

    model = tiny(architecture, dtype)
    ids = torch.stack(random_prompts([9] * rows))
    forward = lean.LeanForward(model, rows, 9)
    with torch.no_grad():
        expected = model(ids).logits
        positions = torch.arange(9).expand(rows, -1)
        first = forward(ids[:, :6], positions[:, :6], None)
        steps = [forward(ids[:, i : i + 1], positions[:, i : i + 1], None) for i in range(6, 9)]
        torch.testing.assert_close(torch.stack([first, *steps], 1), expected[:, 5:], atol=tolerance, rtol=tolerance)
        again = lean.LeanForward(model, rows, 9)
        again(ids[:, :3], positions[:, :3], None)
        again(ids[:, 3:4], positions[:, 3:4], None)
        order = torch.arange(rows).flip(0)
        again.keep_rows(order)
        future = torch.zeros(4, 8, dtype=dtype).masked_fill_(torch.ones(4, 8).triu(5).bool(), float("-inf"))
        again(ids[order, 4:8], positions[:, 4:8], future[None, None])  # several tokens after several blocks
        last = again(ids[order, 8:9], positions[:, 8:9], None)
    torch.testing.assert_close(last[order], expected[:, 8], atol=tolerance, rtol=tolerance)


def test_lean_leaves_changed_modules_alone():
    """A hook must run: the automatic choice falls back to the module, and asking for the lean forward is an error."""
    model, prompts = tiny("llama"), random_prompts([5, 3])
    plain = as_lists(generate(model, prompts, 12))
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0)
    try:
        assert as_lists(generate(model, prompts, 12)) == reference(model, prompts, 12, -1) != plain
        with pytest.raises(ValueError, match=r"model.layers.0.mlp has a hook"):
            generate(model, prompts, 12, lean=True)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="model type gpt2"):
        generate(tiny("gpt2"), prompts, 12, lean=True)


@pytest.mark.parametrize(
    ("prompts", "limit", "settings_", "message"),
    [
        ([[1], []], 4, {}, "prompt 1 must be a non-empty"),
        ([[1], [99]], 4, {}, "prompt 1 has ids outside the vocabulary of 32"),
        ([[1]], 0, {}, "max_new_tokens must be at least 1, not 0"),
        ([[1]], [1, 2], {}, "2 entries for 1 prompts"),
        ([[1]], 4, {"temperature": 0.0, "do_sample": True}, "temperature must be positive, not 0.0"),
        ([[1]], 4, {"top_p": 1.5}, "top_p"),
        ([[1]], 4, {"top_k": -1}, "top_k"),
        ([[1]], 4, {"stop_tokens": [40]}, "stop token 40 is outside"),
        ([[1]], 4, {"stop_tokens": [[1], [2]]}, "2 collections of stop tokens for 1 prompts"),
        ([[1]], 4, {"streams": [1, 2]}, "2 streams for 1 prompts"),
        ([[1] * 2000], 100, {}, "2000 \\+ 100 new tokens exceed the model's 2048 positions"),
    ],
)
def test_bad_input(prompts, limit, settings_, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny("llama"), prompts, limit, **settings_)


def test_no_prompts_is_no_work():
    assert generate(tiny("llama"), [], 4).ledger == Ledger()


@pytest.mark.slow
def test_bench_compares_equal_work():
    from common.generation.bench import bench_generation

    frame = bench_generation((2,), new_tokens=4, rounds=1)
    assert list(frame.decoder.str.split(",").str[0]) == ["generate", "generate", "own loop", "own loop"]
    assert (frame.tokens_per_s > 0).all()
    assert frame.x_dynamic[0] == 1
