"""The real phase split over two processes: the tokens of one process, and KV caches bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from common.generation.sampler import generate
from common.models.build import build
from papers.splitwise.method.phases import MODES, LayerwiseCache, PhaseSplit, decode, prefill

VOCABULARY = 64


@pytest.fixture(scope="module")
def split() -> Iterator[PhaseSplit]:
    torch.set_num_threads(1)
    with PhaseSplit(build("llama-0.1m", seed=3, dtype=torch.float64, vocab_size=VOCABULARY)) as running:
        yield running


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1 + 7 * n % 40,), generator=generator) for n in range(count)]


@pytest.mark.slow
def test_split_tokens_are_those_of_one_process(split: PhaseSplit) -> None:
    """Greedy, float64, 64 prompts, both ways of sending, against the project's own decode loop."""
    texts = prompts(64)
    expected = generate(split.model, texts, 12, stop_tokens=(), lean=False).tokens
    for mode in MODES:
        assert [split.generate(prompt, 12, mode) for prompt in texts] == [tokens.tolist() for tokens in expected]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_sending_never_changes_a_value(split: PhaseSplit, mode: str) -> None:
    for prompt in prompts(5):
        _, cache = prefill(split.model, prompt)
        received = split.received(prompt, mode)
        assert len(received) == len(cache.layers) == 2
        for (keys, values), layer in zip(received, cache.layers, strict=True):
            assert torch.equal(torch.from_numpy(keys), layer.keys)
            assert torch.equal(torch.from_numpy(values), layer.values)


@pytest.mark.slow
def test_bare_transfers_and_bad_requests(split: PhaseSplit) -> None:
    prompt = prompts(3)[2]
    split.transfer(prefill(split.model, prompt)[1])
    with pytest.raises(ValueError, match="unknown mode 'carrier pigeon'"):
        split.generate(prompt, 4, "carrier pigeon")
    with pytest.raises(ValueError, match="two new tokens or more: 15 and 1"):
        split.generate(prompt, 1)
    with pytest.raises(ValueError, match="needs a prompt"):
        split.generate([], 4)
    assert len(split.generate(prompt, 4)) == 4  # still in step after refused requests


@pytest.mark.slow
def test_an_ended_token_side_is_an_error_and_no_hang() -> None:
    model = build("llama-0.1m", seed=3, vocab_size=VOCABULARY)
    with PhaseSplit(model) as running:
        running.process.terminate()
        running.process.join()
        with pytest.raises((RuntimeError, OSError)):
            running.generate(prompts(1)[0], 3)


def test_phases_in_one_process_are_greedy_generation() -> None:
    model = build("llama-0.1m", seed=0, dtype=torch.float64, vocab_size=VOCABULARY)
    for prompt in prompts(4):
        first, cache = prefill(model, prompt)
        tokens = [first, *decode(model, first, cache, 7)]
        assert tokens == generate(model, [prompt], 8, stop_tokens=(), lean=False).tokens[0].tolist()


def test_the_layerwise_cache_hands_on_each_layer_once_in_order() -> None:
    model = build("llama-0.1m", seed=0, vocab_size=VOCABULARY)
    seen: list[tuple[int, torch.Size]] = []
    prefill(model, prompts(3)[2], LayerwiseCache(lambda layer, keys, values: seen.append((layer, keys.shape))))
    assert [layer for layer, _ in seen] == [0, 1]
    assert {shape[-2] for _, shape in seen} == {15}
