"""Draft and verify: the text never depends on the drafts; masks, cache, sampling, replay, prompt lookup, errors."""

import functools
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from common.generation import tree
from common.generation.tree import (
    TreeForward,
    decode,
    no_draft,
    prompt_lookup,
    replay,
    tree_mask,
    verify_tree,
)
from common.models.build import build

VOCABULARY = 32
MODELS = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 1},
    "gpt2": {"tie_word_embeddings": False},
}


@functools.cache
def tiny(architecture: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> torch.nn.Module:
    """Random weights, large enough that greedy text does not fall into a loop at once."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"architecture": architecture, **sizes, **MODELS[architecture]}
    return build(config, seed=1, initializer_range=0.4, dtype=dtype, attention=attention)


def random_prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model, prompt, new_tokens, stop=None, **options):
    """Greedy `transformers` generate."""
    ids = torch.tensor([prompt])
    settings_ = {"do_sample": False, "eos_token_id": stop, "pad_token_id": 0, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings_)
    return out[0, len(prompt) :].tolist()


def random_tree(rng: random.Random, root: int, size: int, vocabulary: int = VOCABULARY):
    parents = [-1] + [rng.randrange(i) for i in range(1, size)]
    return [root] + [rng.randrange(vocabulary) for _ in range(size - 1)], parents


def guessing(answer, prompt_length, rng, size):
    """Drafts that hold some of the true continuation, as one path among random nodes, at places drawn by rng."""

    def draft(tokens, room):
        done = len(tokens) - prompt_length
        path = answer[done : done + rng.randrange(0, 6)]
        ids, parents = random_tree(rng, tokens[-1], max(1, size - len(path)))
        last = 0
        for token in path:
            ids.append(token)
            parents.append(last)
            last = len(ids) - 1
        return ids, parents

    return draft


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_any_drafts_give_the_greedy_text(architecture, attention):
    model, rng = tiny(architecture, attention=attention), random.Random(0)
    committed = []
    for seed, length in enumerate((1, 2, 9, 30)):
        prompt = random_prompt(length, seed)
        free = reference(model, prompt, 24)
        stop = free[-5]
        for end in (None, stop):
            expected = reference(model, prompt, 24, end)
            got = decode(model, prompt, guessing(free, length, rng, 12), 24, end, max_draft=18)
            assert got.tokens.tolist() == expected
            assert sum(got.accepted) == len(expected)
            assert got.forwards == len(got.accepted) <= len(expected)
            committed += got.accepted
    assert max(committed) >= 4  # drafts were accepted, and the longest reached some depth
    assert 1 in committed  # and some were rejected whole


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(list(MODELS)),
    length=st.integers(1, 20),
    new_tokens=st.integers(1, 16),
    size=st.integers(1, 20),
    seed=st.integers(0, 10_000),
)
def test_any_drafts_give_the_greedy_text_on_any_prompt(architecture, length, new_tokens, size, seed):
    model, prompt = tiny(architecture), random_prompt(length, seed)
    expected = reference(model, prompt, new_tokens)
    draft = guessing(expected, length, random.Random(seed), size)
    assert decode(model, prompt, draft, new_tokens, max_draft=size + 6).tokens.tolist() == expected


@pytest.mark.parametrize("architecture", MODELS)
def test_reading_the_prompt_with_the_first_draft_or_before_it_is_the_same(architecture, monkeypatch):
    model, prompt = tiny(architecture), random_prompt(20, 8)
    answer = reference(model, prompt, 24)
    together = decode(model, prompt, guessing(answer, 20, random.Random(4), 12), 24, max_draft=18)
    assert together.accepted[0] > 1  # the first draft is used
    monkeypatch.setattr(tree, "JOINT", 0)
    apart = decode(model, prompt, guessing(answer, 20, random.Random(4), 12), 24, max_draft=18)
    assert together.tokens.tolist() == apart.tokens.tolist() == answer
    assert together.accepted == apart.accepted


def test_without_a_draft_every_pass_commits_one_token():
    model, prompt = tiny("llama"), random_prompt(7)
    got = decode(model, torch.tensor([prompt]), no_draft, 12, max_draft=1)
    assert (got.tokens.tolist(), got.accepted, got.drafted) == (reference(model, prompt, 12), [1] * 12, [1] * 12)


def test_order_of_siblings_does_not_matter():
    """The same tree laid out in another order: the same tokens committed by every pass."""
    model, prompt = tiny("llama"), random_prompt(9)
    answer = reference(model, prompt, 30)

    def laid_out(seed):
        rng = random.Random(seed)

        def draft(tokens, room):
            ids, parents = guessing(answer, 9, random.Random(len(tokens)), 14)(tokens, room)
            order, ready = [0], [i for i in range(1, len(ids)) if parents[i] == 0]
            while ready:
                order.append(ready.pop(rng.randrange(len(ready))))
                ready += [i for i in range(1, len(ids)) if parents[i] == order[-1]]
            place = {old: new for new, old in enumerate(order)}
            return [ids[i] for i in order], [-1] + [place[parents[i]] for i in order[1:]]

        return decode(model, prompt, draft, 30, max_draft=20)

    first, *others = [laid_out(seed) for seed in range(4)]
    assert max(first.accepted) > 2
    for other in others:
        assert (other.tokens.tolist(), other.accepted) == (first.tokens.tolist(), first.accepted)


@pytest.mark.parametrize("architecture", MODELS)
def test_cache_after_compaction_is_that_of_a_fresh_prefill(architecture):
    model, prompt, rng = tiny(architecture), random_prompt(11), random.Random(3)
    forward = TreeForward(model, 64)
    with torch.inference_mode():
        forward.prefill(prompt[:-1])
        text = list(prompt)
        for _ in range(3):
            ids, parents = random_tree(rng, text[-1], 14)
            forward(ids, parents)
            leaf = max(range(14), key=lambda row: len(path_to(row, parents)))
            path = path_to(leaf, parents)
            forward.keep(path)
            text += [ids[row] for row in path[1:]] + [rng.randrange(VOCABULARY)]
        fresh = TreeForward(model, 64)
        fresh.prefill(text[:-1])
        assert forward.context == fresh.context == len(text) - 1
        for ours, theirs in zip(forward.layers, fresh.layers, strict=True):
            for name in ("keys", "values"):
                kept = [getattr(layer, name)[:, :, : len(text) - 1] for layer in (ours, theirs)]
                torch.testing.assert_close(*kept, atol=1e-6, rtol=0)
        torch.testing.assert_close(forward([3], [-1]), fresh([3], [-1]), atol=1e-5, rtol=0)


def path_to(row, parents):
    path = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


@given(st.integers(1, 70), st.integers(0, 1000))
def test_mask_rows_are_the_ancestors(size, seed):
    _, parents = random_tree(random.Random(seed), 0, size)
    mask, depth = tree_mask(parents)
    expected = np.zeros((size, size), dtype=bool)
    for row in range(size):
        expected[row, path_to(row, parents)] = True
    assert np.array_equal(mask, expected)
    assert depth == [len(path_to(row, parents)) - 1 for row in range(size)]


def test_walk_takes_the_farthest_of_equal_siblings_and_ends_at_stop_and_limit():
    #          0 -> 5 -> 6     and a second branch 0 -> 5 -> 7 -> 8
    ids, parents = [1, 5, 6, 5, 7, 8], [-1, 0, 1, 0, 3, 4]
    answer = [5, 7, 8, 9]

    def choose(row, done):
        return answer[len(done)]

    assert verify_tree(ids, parents, choose, 99) == ([0, 3, 4, 5], [5, 7, 8, 9])
    assert verify_tree(ids, parents, choose, 2)[1] == [5, 7]
    assert verify_tree(ids, parents, choose, 99, stop={7})[1] == [5, 7]
    assert verify_tree(ids, parents, lambda row, done: 4, 99) == ([0], [4])


@pytest.mark.parametrize("architecture", MODELS)
def test_logits_processors_as_in_generate(architecture):
    model, prompt = tiny(architecture), random_prompt(15, 4)
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}
    expected = reference(model, prompt, 30, **options)
    assert expected != reference(model, prompt, 30)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(3)])
    draft = guessing(expected, 15, random.Random(1), 10)
    got = decode(model, prompt, draft, 30, max_draft=16, logits_processor=processors)
    assert got.tokens.tolist() == expected
    assert max(got.accepted) > 2


@pytest.mark.parametrize("architecture", MODELS)
def test_sampled_text_is_that_of_the_same_generator_without_drafts(architecture):
    model, prompt = tiny(architecture), random_prompt(6)
    temperature = LogitsProcessorList([lambda ids, scores: scores / 0.7])

    def sample(draft, seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"logits_processor": temperature, "do_sample": True, "generator": generator}
        return decode(model, prompt, draft, 20, max_draft=20, **options)

    plain = [sample(no_draft, seed) for seed in range(6)]
    assert len({tuple(out.tokens.tolist()) for out in plain}) == 6
    for seed, out in enumerate(plain):
        drafted = sample(guessing(out.tokens.tolist(), 6, random.Random(seed), 12), seed)
        assert drafted.tokens.tolist() == out.tokens.tolist()
        assert drafted.forwards < out.forwards


def test_sampled_distribution_is_the_models():
    """20,000 texts of three tokens from a toy model of five symbols, with and without drafts: chi-square at 0.01."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.ones(5), size=5)  # next-token probabilities given the last token
    length, samples = 3, 20_000

    def text(drafts):
        tokens = [0]
        while len(tokens) <= length:
            ids, parents = random_tree(drafts, tokens[-1], 8, 5) if drafts else ([tokens[-1]], [-1])

            def choose(row, done, ids=ids):
                return int(rng.choice(5, p=table[ids[row]]))

            tokens += verify_tree(ids, parents, choose, length + 1 - len(tokens))[1]
        return tuple(tokens[1:])

    texts = list(itertools.product(range(5), repeat=length))
    chance = np.array([np.prod([table[a, b] for a, b in zip((0, *t), t, strict=False)]) for t in texts])
    counts = dict.fromkeys(texts, 0)
    drafts = random.Random(1)
    for _ in range(samples):
        counts[text(drafts)] += 1
    observed, expected = np.array(list(counts.values())), chance * samples
    large = expected >= 5
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    assert stats.chisquare(observed, expected).pvalue > 0.01
    assert stats.chisquare(observed, np.full(len(expected), samples / len(expected))).pvalue < 1e-9  # the test can fail


@pytest.mark.parametrize("architecture", MODELS)
def test_replay_makes_the_same_passes(architecture):
    model, prompt = tiny(architecture), random_prompt(12, 5)
    answer = reference(model, prompt, 30)
    committed = {"decode": [], "replay": []}

    def run(kind, call):
        draft = guessing(answer, 12, random.Random(7), 12)
        return call(draft, committed[kind].append)

    ran = run("decode", lambda draft, note: decode(model, prompt, draft, 30, max_draft=18, on_commit=note))
    told = run("replay", lambda draft, note: replay(draft, prompt, answer, note))
    assert (told.accepted, told.drafted) == (ran.accepted, ran.drafted)
    assert committed["replay"] == committed["decode"]
    assert told.tokens.tolist() == ran.tokens.tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(1, 12), st.integers(1, 4), st.integers(2, 50))
def test_prompt_lookup_drafts_as_transformers(tokens, num_tokens, ngram, room):
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    theirs = PromptLookupCandidateGenerator(None, num_tokens, ngram, max_length=len(tokens) + room + 1)
    expected = theirs.get_candidates(torch.tensor([tokens]))[0][0, len(tokens) :].tolist()
    ids, parents = prompt_lookup(num_tokens, ngram)(tokens, room)
    assert ids == [tokens[-1], *expected[:room]]
    assert parents == list(range(-1, len(ids) - 1))


@pytest.mark.parametrize("architecture", MODELS)
def test_prompt_lookup_takes_as_many_forwards_as_transformers(architecture):
    model = tiny(architecture)
    saved = 0
    for seed in range(4):
        prompt = (random_prompt(5, seed) * 4)[:17]
        calls = []
        handle = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        try:
            expected = reference(model, prompt, 40, prompt_lookup_num_tokens=6)
        finally:
            handle.remove()
        got = decode(model, prompt, prompt_lookup(6), 40, max_draft=7)
        assert got.tokens.tolist() == expected == reference(model, prompt, 40)
        assert got.forwards == len(calls)
        saved += 40 - got.forwards
    assert saved > 0


@pytest.mark.parametrize(("joint", "prefills"), [(256, 0), (7, 1)])
def test_ledger_counts_what_ran(joint, prefills, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(tree, "JOINT", joint)
    model, prompt = tiny("llama", attention="eager"), random_prompt(9)
    answer = reference(model, prompt, 20)
    with FlopCounterMode(display=False) as counter:
        got = decode(model, prompt, guessing(answer, 9, random.Random(2), 8), 20, max_draft=14)
    ledger = got.ledger(model.config)
    assert ledger.flops == counter.get_total_flops()
    assert (ledger.prompt_tokens, ledger.generated_tokens, ledger.forwards) == (9, 20, got.forwards + prefills)
    assert ledger.discarded_tokens == sum(got.drafted) - 20


def two_roots(tokens, room):
    return [tokens[-1], 3], [-1, -1]


def wrong_root(tokens, room):
    return [(tokens[-1] + 1) % VOCABULARY], [-1]


def child_before_parent(tokens, room):
    return [tokens[-1], 3, 4], [-1, 2, 0]


def uneven(tokens, room):
    return [tokens[-1], 3], [-1]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1, 2], [3, 4]], {}, r"one prompt at a time.*\[2, 2\]"),
        ([], {}, r"n >= 1, not \[0\]"),
        ([1, 99], {}, "outside the vocabulary of 32"),
        ([1.5], {}, "must be token ids, not torch.float32"),
        ([1] * 2040, {}, "2040 prompt and 10 new tokens exceed the model's 2048 positions"),
        ([1, 2], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([1, 2], {"max_draft": 0}, "max_draft counts the root, so it is at least 1, not 0"),
        (
            [1, 2],
            {"draft": lambda tokens, room: ([tokens[-1]] * 9, list(range(-1, 8)))},
            "draft of 9 tokens.*room for 4",
        ),
        ([1, 2], {"draft": two_roots}, "the parent of node 1 of 2 must be one of 0..0, not -1"),
        ([1, 2], {"draft": child_before_parent}, "the parent of node 1 of 3 must be one of 0..0, not 2"),
        ([1, 2], {"draft": uneven}, "a draft of 2 tokens has 1 parents"),
        ([1, 2], {"draft": wrong_root}, "root must be the last committed token, 2; this one starts with 3"),
        (
            [1, 2],
            {"draft": lambda tokens, room: ([], [])},
            "root must be the last committed token, 2; this one is empty",
        ),
    ],
)
def test_bad_input(prompt, options, message):
    given_ = {"draft": no_draft, "max_new_tokens": 10, "max_draft": 4} | options
    with pytest.raises(ValueError, match=message):
        decode(tiny("llama"), prompt, given_.pop("draft"), **given_)


def test_models_that_this_cannot_serve():
    from transformers import (
        AutoModelForCausalLM,
        MambaConfig,
        MistralConfig,
        OpenAIGPTConfig,
        T5Config,
        T5ForConditionalGeneration,
    )

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 16}
    first_gpt = AutoModelForCausalLM.from_config(OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**sizes))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    for model in (first_gpt, mamba, t5):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no usable cache"):
            decode(model, [1, 2], no_draft, 4)
    sliding = AutoModelForCausalLM.from_config(
        MistralConfig(**sizes, **heads, num_key_value_heads=2, sliding_window=8, max_position_embeddings=64)
    )
    with pytest.raises(ValueError, match="attends to a window of 8 tokens"):
        decode(sliding, [1, 2], no_draft, 10)
    assert len(decode(sliding, [1, 2], no_draft, 4, max_draft=1).tokens) == 4
    own = tiny("llama")
    own.config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ValueError, match="runs 'flash_attention_2' attention, which takes no tree mask"):
            decode(own, [1, 2], no_draft, 4)
    finally:
        own.config._attn_implementation = "sdpa"
