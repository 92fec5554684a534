"""The self-aligned reward: closed forms, what it does not see, and that no gradient passes."""

import math

import pytest
import torch

from common.models.build import ModelConfig, build
from common.reasoners import policies
from common.rl.rollout import sample
from common.tasks import chain
from papers.self_aligned_reward import from_information, information, neg_log_perplexity, score, self_aligned

WORDS = policies.tokenizer()
BLANK = WORDS.encode("=")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PROBLEMS = chain.generate(0, 6, (2, 4), style="mixed")
PROMPTS, ANSWERS = (WORDS([getattr(p, part) for p in PROBLEMS])["input_ids"] for part in ("prompt", "answer"))


def tiny() -> torch.nn.Module:
    return build(ModelConfig(**SIZES, vocab_size=len(WORDS)), attention="eager")


@pytest.mark.parametrize(
    ("given", "alone", "expected"),
    [(0.5, 0.25, 0.5), (0.5, 0.5, 0.0), (0.1, 0.9, -1.0), (1.0, 0.5, 0.5), (1e-30, 1.0, -1.0)],
)
def test_closed_form_from_probabilities(given, alone, expected):
    """(1/alone - 1/given) / (1/alone), cut at -1: perplexities are the inverse of a constant probability."""
    v = torch.full((1, 7), math.log(given) - math.log(alone))
    assert float(from_information(v, torch.ones(1, 7, dtype=torch.bool))) == pytest.approx(expected, abs=1e-6)


def test_it_is_the_relative_fall_of_the_perplexity():
    model = tiny()
    for prompt, answer, reward in zip(PROMPTS, ANSWERS, score(model, PROMPTS, ANSWERS, BLANK), strict=True):
        perplexities = []
        for before in (prompt, BLANK):
            logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            perplexities.append(math.exp(-float(logits.gather(1, torch.tensor(answer)[:, None]).mean())))
        given, alone = perplexities
        assert float(reward) == pytest.approx(max((alone - given) / alone, -1), abs=1e-5)


def test_a_question_that_is_blank_explains_nothing():
    found = score(tiny(), [BLANK] * 6, ANSWERS, BLANK)
    torch.testing.assert_close(found, torch.zeros(6))


def test_a_model_that_ignores_what_is_before_has_no_reward():
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    # The first token of an answer follows another token in each case; both prompts end with "=".
    assert {prompt[-1] for prompt in PROMPTS} == set(BLANK)
    torch.testing.assert_close(score(model, PROMPTS, ANSWERS, BLANK), torch.zeros(6))


def test_tokens_without_information_dilute_it():
    v, mask = torch.full((1, 6), 0.4), torch.ones(1, 6, dtype=torch.bool)
    longer = torch.cat([v, torch.zeros(1, 3)], dim=1)
    both = from_information(v, mask), from_information(longer, torch.ones(1, 9, dtype=torch.bool))
    assert float(both[0]) == pytest.approx(1 - math.exp(-0.4))
    assert float(both[1]) == pytest.approx(1 - math.exp(-0.4 * 6 / 9))
    padded = torch.cat([v, torch.full((1, 3), 9.0)], dim=1)
    masked = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(from_information(padded, masked), both[0])


def test_the_term_of_a_rollout_is_the_score_of_its_answers_and_has_no_gradient():
    model = tiny()
    end = WORDS.convert_tokens_to_ids("$")
    rollout, _ = sample(model, WORDS, PROBLEMS, 3, 12, stop_tokens=[end], seed=1)
    answers = [ids[at].tolist() for ids, at in zip(rollout.ids, rollout.response, strict=True)]
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    found = self_aligned(BLANK)(rollout, torch.zeros(18), model)
    assert len(calls) == 1  # one forward pass more than without it
    assert not found.requires_grad
    torch.testing.assert_close(found, score(model, prompts, answers, BLANK), rtol=1e-4, atol=1e-5)
    confidence = neg_log_perplexity(rollout, torch.zeros(18), model)
    torch.testing.assert_close(
        confidence, torch.stack([row[at].mean() for row, at in zip(rollout.logp, rollout.response, strict=True)])
    )


def test_information_stands_at_the_tokens_of_the_answer():
    rows = information(tiny(), PROMPTS, ANSWERS, BLANK)
    assert [len(row) for row in rows] == [len(answer) for answer in ANSWERS]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_aligned([]), "the blank prompt needs at least one token"),
        (lambda: score(tiny(), PROMPTS[:2], [[5], []], BLANK), "answer 1 is empty"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
