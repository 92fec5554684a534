"""Step-wise sampling with forking: equal to whole generation, to re-encoding and to any other batch."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.generation.random import draws, keys
from common.generation.sampler import generate
from common.generation.steps import State, StepSampler
from common.models.build import build
from common.models.reward import reward_model
from common.search.score import RewardModel

VOCABULARY, STEP, END = 24, 3, 5
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
}


@functools.cache
def tiny(architecture="llama"):
    """Random weights, large enough that steps differ in length."""
    return build(SIZES, architecture=architecture, seed=3, initializer_range=0.35, dtype=torch.float64)


@functools.cache
def reward(architecture="llama"):
    model = reward_model(tiny(architecture))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(7))
    return model


def prompts(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(6, VOCABULARY, size=random.integers(1, 9)).tolist() for _ in range(count)]


def sampler(model, texts, **settings):
    options = {"step_tokens": [STEP], "end_tokens": [END], "max_step_tokens": 7, "max_steps": 6} | settings
    return StepSampler(model, texts, **options)


def run(steps, states, samples, fork=True):
    while live := [i for i, state in enumerate(states) if not state.done]:
        if not fork:
            states = [State(s.problem, s.tokens, s.ends, s.done, s.logprobs) for s in states]
        for i, child in zip(live, steps.propose([states[i] for i in live], [samples[i] for i in live]), strict=True):
            states[i] = child
    return states


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_greedy_steps_are_greedy_generation(architecture):
    model, texts = tiny(architecture), prompts(12)
    states = run(sampler(model, texts, greedy=True), [State(p) for p in range(12)], [0] * 12)
    whole = generate(model, texts, 42, stop_tokens=[END])
    for state, tokens in zip(states, whole.tokens, strict=True):
        assert list(state.tokens) == tokens.tolist()[: len(state.tokens)]
        assert state.tokens[-1] == END or len(state.ends) == 6
        assert all(
            state.tokens[e - 1] in (STEP, END) or e - s == 7 for s, e in zip((0, *state.ends), state.ends, strict=False)
        )


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_forked_caches_equal_reading_again(architecture, lean):
    """Shuffled, repeated and dropped rows after every step, in float64: tokens equal, log-probabilities to rounding."""
    if lean and architecture == "gpt2":
        pytest.skip("no lean forward for GPT-2")
    texts, random = prompts(5), np.random.default_rng(1)
    kept, read = (sampler(tiny(architecture), texts, lean=lean if kept else False, seed=4) for kept in (True, False))
    states = again = [State(p) for p in range(5) for _ in range(4)]
    for _ in range(6):
        order = random.integers(len(states), size=20)
        samples = list(range(20))
        states, again = ([group[i] for i in order if not group[i].done] for group in (states, again))
        again = [State(s.problem, s.tokens, s.ends, s.done, s.logprobs) for s in again]
        states, again = kept.propose(states, samples[: len(states)]), read.propose(again, samples[: len(again)])
        assert [s.tokens for s in states] == [s.tokens for s in again]
        assert np.allclose([s.logprobs for s in states], [s.logprobs for s in again], atol=1e-6)
    assert kept.ledger.prompt_tokens < read.ledger.prompt_tokens


def test_nothing_depends_on_the_batch():
    model, texts = tiny(), prompts(8)
    together = run(sampler(model, texts, seed=2), [State(p) for p in range(8)], [p % 3 for p in range(8)])
    for p in (0, 5, 7):
        alone = run(sampler(model, texts, seed=2), [State(p)], [p % 3])
        assert alone[0].tokens == together[p].tokens
    backwards = run(
        sampler(model, texts, seed=2), [State(p) for p in range(7, -1, -1)], [p % 3 for p in range(7, -1, -1)]
    )
    assert [s.tokens for s in backwards] == [s.tokens for s in together][::-1]


def test_streams_differ_by_seed_algorithm_sample_and_step():
    model, texts = tiny(), prompts(1)
    base = sampler(model, texts).propose([State(0)] * 64, range(64))
    assert len({s.tokens for s in base}) > 20
    for other in ({"seed": 1}, {"algorithm": "beam"}):
        assert [s.tokens for s in sampler(model, texts, **other).propose([State(0)] * 64, range(64))] != [
            s.tokens for s in base
        ]


def test_sampled_tokens_follow_the_model():
    """Chi-square of the first token of 4000 samples; log-probabilities are those of the filtered distribution."""
    model, texts = tiny(), prompts(1)
    states = sampler(model, texts, max_step_tokens=1, temperature=1.3, top_k=8).propose([State(0)] * 4000, range(4000))
    with torch.no_grad():
        logits = model(torch.tensor(texts)).logits[0, -1] / 1.3
    logits[logits < logits.topk(8).values[-1]] = -torch.inf
    chances = logits.softmax(-1).numpy()
    observed = np.bincount([s.tokens[0] for s in states], minlength=VOCABULARY)
    inside = chances > 0
    assert observed[~inside].sum() == 0
    assert stats.chisquare(observed[inside], 4000 * chances[inside]).pvalue > 0.001
    assert states[0].logprobs[0] == pytest.approx(np.log(chances[states[0].tokens[0]]), abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_reward_model_scores_with_a_cache_as_without(architecture):
    """Against the module's own forward on the whole text, after forks and in a changing order."""
    texts, random = prompts(4), np.random.default_rng(3)
    steps, score = sampler(tiny(architecture), texts), RewardModel(reward(architecture), texts)
    states = [State(p) for p in range(4) for _ in range(3)]
    for _ in range(4):
        states = steps.propose(states, range(len(states)))
        states = [states[i] for i in random.permutation(len(states))]
        values = score(states)
        with torch.no_grad():
            for state, value in zip(states, values, strict=True):
                text = torch.tensor([texts[state.problem] + list(state.tokens)])
                hidden = reward(architecture).base_model(text).last_hidden_state[0, -1]
                assert reward(architecture).score(hidden).sigmoid().item() == pytest.approx(value, abs=1e-6)
        states = [states[i] for i in random.integers(len(states), size=12) if not states[i].done] or states[:1]
        if any(state.done for state in states):
            break


def test_a_truncated_state_goes_on_from_its_step():
    model, texts = tiny(), prompts(1)
    state = run(sampler(model, texts), [State(0)], [0])[0]
    cut = state.truncated(2)
    assert (cut.tokens, cut.ends, cut.done) == (state.tokens[: state.ends[1]], state.ends[:2], False)
    assert state.truncated(99) is state
    again = run(sampler(model, texts), [cut], [0])[0]
    assert again.tokens == state.tokens  # the same streams


def test_ledger_counts_what_was_made():
    steps = sampler(tiny(), prompts(3))
    states = steps.propose([State(p) for p in range(3)], [0, 0, 0])
    assert steps.ledger.generated_tokens == sum(len(s.tokens) for s in states)
    assert steps.ledger.prompt_tokens == sum(len(p) - 1 for p in prompts(3))


@given(st.integers(0, 2**62), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_draws_are_uniform_and_keyed(seed, other):
    u = draws(keys(seed, np.arange(64)), 64)
    assert ((u > 0) & (u < 1)).all()
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 5 / np.sqrt(u.size)
    assert (draws(keys(seed, 7), 3) == u[7, :3]).all()
    if seed != other:
        assert (draws(keys(other, 7), 3) != u[7, :3]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"max_steps": 0}, "must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"max_step_tokens": 5000}, "exceed the model's 2048 positions"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(tiny(), prompts(2), **settings)


def test_bad_input():
    with pytest.raises(ValueError, match="none of which may be empty"):
        sampler(tiny(), [[1], []])
    with pytest.raises(ValueError, match="outside the model's vocabulary of 24"):
        sampler(tiny(), [[24]])
    with pytest.raises(ValueError, match="is done cannot be continued"):
        sampler(tiny(), [[7]]).propose([State(0, done=True)], [0])
    with pytest.raises(ValueError, match="come from different tokenizers"):
        RewardModel(reward(), [[99]])
