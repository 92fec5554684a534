"""LookaheadDecoder: its public shape, and greedy text token for token in float64, whatever the settings."""

import functools
import inspect
import itertools
import random

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from common.generation.tree import replay
from common.models.build import build
from papers.lookahead import LookaheadDecoder
from papers.lookahead.method import LookaheadDecoder as FromMethod

VOCABULARY = 24
SIZES = [(64, 12), (16, 4), (8, 8), (33, 1)]


@functools.cache
def tiny(architecture: str) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"architecture": architecture, "vocab_size": VOCABULARY, **sizes}
    return build(config, seed=1, initializer_range=0.3, dtype=torch.float64)


def prompt_of(seed: int, n: int = 24) -> list[int]:
    """Random tokens, half of them repeated, so that the prompt itself gives drafts."""
    rng = random.Random(seed)
    half = [rng.randrange(VOCABULARY) for _ in range(n // 2)]
    return half + half[: n - n // 2]


@functools.cache
def greedy(architecture: str, seed: int, new_tokens: int = 24) -> list[int]:
    ids = torch.tensor([prompt_of(seed)])
    out = tiny(architecture).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


def test_signature_is_the_published_one():
    assert FromMethod is LookaheadDecoder
    own = inspect.signature(LookaheadDecoder.__init__).parameters
    positional = [p for p in own.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional[2:]] == [
        ("decoding_length", 64),
        ("branch_length", 12),
        ("mode", "hier"),
    ]
    assert positional[1].name == "model"
    keywords = {p.name: p.default for p in own.values() if p.kind is p.KEYWORD_ONLY}
    assert {"source": "mix", "stop_tokens": (), "max_nodes": 65536}.items() <= keywords.items()
    call = inspect.signature(LookaheadDecoder.generate).parameters
    assert [(p.name, p.kind.name) for p in call.values()][1:] == [
        ("input_ids", "POSITIONAL_OR_KEYWORD"),
        ("max_new_tokens", "POSITIONAL_OR_KEYWORD"),
        ("eos_token_id", "POSITIONAL_OR_KEYWORD"),
        ("logits_processor", "KEYWORD_ONLY"),
        ("do_sample", "KEYWORD_ONLY"),
        ("generator", "KEYWORD_ONLY"),
    ]


def test_result_as_published():
    out = LookaheadDecoder(tiny("llama")).generate(torch.tensor([prompt_of(0)]), 24)
    assert out.tokens.dim() == 1
    assert out.tokens.dtype == torch.int64
    assert len(out.tokens) == 24 == sum(out.accepted)
    assert out.forwards == len(out.accepted)


@pytest.mark.parametrize("source", ["mix", "input", "output"])
@pytest.mark.parametrize("mode", ["hier", "par", "one"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_greedy_text_in_float64(architecture, mode, source):
    """Sizes in turn, the trie living on over the requests; the second time it knows the answers and drafts well."""
    for decoding_length, branch_length in SIZES:
        decoder = LookaheadDecoder(tiny(architecture), decoding_length, branch_length, mode, source=source)
        forwards = []
        for seed in (0, 1, 0, 1):
            out = decoder.generate(prompt_of(seed), 24)
            assert out.tokens.tolist() == greedy(architecture, seed)
            assert out.forwards <= 24
            forwards.append(out.forwards)
        if source != "input":
            assert sum(forwards[2:]) < sum(forwards[:2])


@pytest.mark.parametrize("settings", [{"decoding_length": 1}, {"branch_length": 0}, {"source": "output"}])
def test_without_drafts_it_is_greedy_decoding(settings):
    """No room for a draft, or a trie that knows nothing at the first request: as many passes as tokens."""
    decoder = LookaheadDecoder(tiny("llama"), **settings)
    new = 1 if settings == {"source": "output"} else 24
    out = decoder.generate(prompt_of(2), new)
    assert out.tokens.tolist() == greedy("llama", 2)[:new]
    assert out.accepted == [1] * new


def test_adversarial_outputs_cost_nothing():
    rng, decoder = random.Random(0), LookaheadDecoder(tiny("llama"), source="output")
    answer = greedy("llama", 3)
    follow = {(a, b) for a, b in itertools.pairwise(answer)}
    for _ in range(300):
        a, b = rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)
        if (a, b) not in follow:
            decoder.warm([a, b])
    decoder.drafter.commit = lambda new: None  # nothing true is ever learnt
    out = decoder.generate(prompt_of(3), 24)
    assert out.tokens.tolist() == answer
    assert out.accepted[1:] == [1] * (len(out.accepted) - 1)
    assert sum(out.drafted) > 3 * 24


def test_warm_answers_help_and_the_oracle_is_exact():
    decoder = LookaheadDecoder(tiny("llama"), 64, 12, source="output")
    prompt, answer = prompt_of(4), greedy("llama", 4)
    decoder.warm([prompt[-1], *answer])
    unique = len(set(zip([prompt[-1], *answer], answer, strict=False))) == len(answer)
    out = decoder.generate(prompt, 24)
    assert out.tokens.tolist() == answer
    assert out.forwards <= (5 if not unique else 2)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_end_token_and_repetition_penalty(architecture):
    model, prompt = tiny(architecture), prompt_of(5)
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, repetition_penalty=1.5, **options)[0, 24:].tolist()
    end = expected[10]
    decoder = LookaheadDecoder(model, 32, 6)
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    for _ in range(2):
        out = decoder.generate(prompt, 24, logits_processor=penalty)
        assert out.tokens.tolist() == expected
        stopped = decoder.generate(prompt, 24, eos_token_id=end, logits_processor=penalty)
        assert stopped.tokens.tolist() == expected[: expected.index(end) + 1]


def test_sampled_text_is_that_of_the_same_generator():
    model, prompt = tiny("llama"), prompt_of(6)

    def sample(decoder, seed):
        generator = torch.Generator().manual_seed(seed)
        return decoder.generate(prompt, 24, do_sample=True, generator=generator)

    plain, decoder = LookaheadDecoder(model, decoding_length=1), LookaheadDecoder(model)
    for seed in range(3):
        expected = sample(plain, seed)
        for _ in range(2):
            got = sample(decoder, seed)
            assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.forwards < expected.forwards


def test_replaying_a_recorded_answer_gives_the_passes_of_the_model():
    decoder, recorded = LookaheadDecoder(tiny("llama"), 32, 6), LookaheadDecoder(tiny("llama"), 32, 6)
    for seed in range(4):
        out = decoder.generate(prompt_of(seed), 24)
        recorded.drafter.start(prompt_of(seed))
        told = replay(recorded.drafter.draft, prompt_of(seed), greedy("llama", seed), recorded.drafter.commit)
        recorded.drafter.finish()
        assert (told.accepted, told.drafted) == (out.accepted, out.drafted)


def test_prompt_counts_go_with_the_request_also_after_an_error():
    decoder = LookaheadDecoder(tiny("llama"))

    def broken(ids, scores):
        raise RuntimeError("no scores")

    with pytest.raises(RuntimeError, match="no scores"):
        decoder.generate(prompt_of(0), 24, logits_processor=broken)
    assert decoder.trie.nodes == 0
    assert decoder.generate(prompt_of(1), 24).tokens.tolist() == greedy("llama", 1)


def test_bad_input_is_refused_before_anything_is_learnt():
    decoder = LookaheadDecoder(tiny("llama"))
    for prompt, new, message in (
        ([[1, 2], [3, 4]], 4, r"one prompt at a time.*\[2, 2\]"),
        ([1, 99], 4, "outside the vocabulary of 24"),
        ([1, 2], 0, "max_new_tokens must be at least 1, not 0"),
        ([1, 2], 4000, "exceed the model's 2048 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate(prompt, new)
    assert not decoder.trie.roots
    for settings, message in (
        ({"decoding_length": 0}, "decoding_length"),
        ({"mode": "tree"}, "unknown mode 'tree'"),
        ({"source": "all"}, "unknown source 'all'"),
        ({"branch_length": -2}, "branch_length must be at least 0, not -2"),
    ):
        with pytest.raises(ValueError, match=message):
            LookaheadDecoder(tiny("llama"), **settings)
