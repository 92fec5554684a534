"""Forced answers and packed rows: a branch is what the same text alone would be, in value and gradient."""

from dataclasses import replace

import pytest
import torch

from common.generation.sampler import generate
from common.models.build import ModelConfig, build
from common.reasoners import policies
from common.rl import rewards
from common.rl.branches import Branched, Forcing, force
from common.rl.objectives import AGGREGATIONS, OBJECTIVES
from common.rl.rollout import log_probs, padded, sample
from common.rl.trainer import RLConfig, train
from common.tasks import chain

WORDS = policies.tokenizer()
END, THINK = (WORDS.convert_tokens_to_ids(text) for text in (policies.ANSWER_END, chain.THINK_END))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PROBLEMS = chain.generate(0, 12, (2, 4), style="concise")
FORCING = Forcing(budgets=(3, 6, 9), answers=2, max_answer_tokens=3, delimiter=THINK, ends=(END,))


def tiny(seed: int = 0, attention: str = "sdpa"):
    """Likely to say the end tokens, so that thoughts and answers of all lengths occur."""
    model = build(ModelConfig(**SIZES, vocab_size=len(WORDS)), seed=seed, attention=attention)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[END] *= 3
        rows[THINK] = 0.9 * rows[END]
    return model


def thoughts(model, problems=PROBLEMS, group: int = 2, step: int = 0):
    return sample(model, WORDS, problems, group, 9, stop_tokens=[THINK], seed=1, step=step, score=False)[0]


def with_answers(model, forcing: Forcing = FORCING, **settings):
    return force(model, WORDS, thoughts(model), forcing, chain.verify, seed=1, **settings)[0]


def unpacked(branches):
    """(row of the rollout, prompt and thought up to the cut, forced tokens, answer) of every branch."""
    rollout, forcing = branches.rollout, branches.forcing
    each = len(forcing.budgets) * forcing.answers
    for b, answer in enumerate(branches.answers):
        n, j = b // each, b % each // forcing.answers
        start = int(rollout.response[n].int().argmax())
        thought = rollout.ids[n][rollout.response[n]].tolist()[: forcing.budgets[j]]
        if thought[-1] == THINK:
            thought = thought[:-1]
        yield b, n, rollout.ids[n, :start].tolist() + thought, branches.forced[b], answer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut_off", [(), (5, 6)])
def test_a_packed_row_gives_every_token_the_log_probability_of_its_text_alone(attention, cut_off):
    model = tiny(attention=attention)
    branches = with_answers(model, replace(FORCING, cut_off=cut_off, then=cut_off[:1]))
    of, rollout = branches.packed, branches.rollout
    logp, entropy = log_probs(model, of.ids, of.response, 0.7, of.layout)
    whole, whole_entropy = log_probs(model, rollout.ids, rollout.response, 0.7)
    each = len(FORCING.budgets) * FORCING.answers
    assert len(set(map(len, branches.answers))) > 1
    assert 0 < int(rollout.finished.sum()) < len(rollout.finished)
    for n in range(len(rollout.ids)):
        trunk = of.segment[n] >= 0
        torch.testing.assert_close(logp[n][trunk], whole[n][rollout.response[n]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy[n][trunk], whole_entropy[n][rollout.response[n]], rtol=1e-5, atol=1e-5)
    rows = list(unpacked(branches))
    ids, response = padded([text + forced for _, _, text, forced, _ in rows], [answer for *_, answer in rows])
    alone, _ = log_probs(model, ids, response, 0.7)
    for b, n, _, _, answer in rows:
        own = of.answer[n] == b % each
        assert of.ids[n][own].tolist() == answer
        torch.testing.assert_close(logp[n][own], alone[b][response[b]], rtol=1e-5, atol=1e-5)
    assert not (of.response & (of.segment < 0) & (of.answer < 0)).any()


def test_packed_and_repeated_rows_have_the_same_gradient():
    model = tiny().double()
    branches = with_answers(model)
    of = branches.packed
    answers = of.answer >= 0
    (log_probs(model, of.ids, of.response, 1.0, of.layout)[0] * answers).sum().backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rows = list(unpacked(branches))
    ids, response = padded([text + forced for _, _, text, forced, _ in rows], [answer for *_, answer in rows])
    log_probs(model, ids, response)[0].sum().backward()
    for one, other in zip(packed, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_greedy_answers_are_those_of_the_sampler():
    model = tiny().double()
    branches = with_answers(model, greedy=True)
    rows = list(unpacked(branches))
    expected = generate(model, [text + forced for _, _, text, forced, _ in rows], 3, stop_tokens=[END])
    assert [answer for *_, answer in rows] == [tokens.tolist() for tokens in expected.tokens]


def test_cuts_and_segments():
    model = tiny()
    branches = with_answers(model, replace(FORCING, cut_off=(5,)))
    rollout = branches.rollout
    for b, n, text, forced, _ in unpacked(branches):
        length, budget = int(rollout.length[n]), FORCING.budgets[b // 2 % 3]
        assert int(branches.cut[n, b // 2 % 3]) == min(length, budget)
        ended = bool(rollout.finished[n]) and length <= budget
        assert forced == ([THINK] if ended else [5, THINK])  # only a thought that was cut is told so
        assert len(text) - int(rollout.response[n].int().argmax()) == min(length, budget) - ended
    segment = branches.packed.segment
    for n in range(len(segment)):
        expected = [0] * 3 + [1] * 3 + [2] * 3
        assert segment[n][segment[n] >= 0].tolist() == expected[: int(rollout.length[n])]


def test_the_delimiter_carries_no_loss():
    branches = with_answers(tiny())
    of = branches.packed
    forced = ~of.response & (of.ids == THINK)
    assert int(forced.sum()) == len(branches.answers)


def test_a_draw_does_not_depend_on_the_batch():
    model = tiny()
    rollout = thoughts(model)
    alone = thoughts(model, PROBLEMS[:2])
    all_of, _ = force(model, WORDS, rollout, FORCING, chain.verify, seed=1)
    some, _ = force(model, WORDS, alone, FORCING, chain.verify, seed=1)
    assert all_of.answers[: len(some.answers)] == some.answers
    other, _ = force(model, WORDS, rollout, FORCING, chain.verify, seed=1, step=1)
    assert other.answers != all_of.answers


def mean_estimator(grouped: torch.Tensor, budgets) -> torch.Tensor:
    return grouped - grouped.mean(1, keepdim=True)


def answer_estimator(grouped: torch.Tensor, cuts) -> torch.Tensor:
    return grouped - grouped.mean(1, keepdim=True)


def some_right(problem, text: str) -> bool:
    return len(text) % 2 == 0


def branched(forcing: Forcing, **changes) -> Branched:
    usual = {
        "words": WORDS, "problems_at": lambda step: PROBLEMS[:6], "verify": some_right, "group_size": 4,
        "forcing": forcing, "estimator": mean_estimator, "answer_estimator": answer_estimator,
        "terms": {"right": rewards.Weighted(rewards.verifiable)},
    }  # fmt: skip
    return Branched(**(usual | changes))


def test_advantages_reach_their_tokens():
    model, seen = tiny(), []
    collect = branched(FORCING, seen=lambda *of: seen.append(of))
    experience = collect(model, 0)
    branches, reward, advantage = seen[0]
    of = branches.packed
    mean = reward.mean(-1).view(6, 4, 3)
    expected = (mean - mean.mean(1, keepdim=True)).flatten(0, 1)
    leaves = reward.view(6, 4, 3, 2)
    expected_leaf = (leaves - leaves.mean(1, keepdim=True)).view(24, 6)
    for n in range(24):
        for t in range(of.ids.shape[1]):
            j, b = int(of.segment[n, t]), int(of.answer[n, t])
            want = expected[n, j] if j >= 0 else expected_leaf[n, b] if b >= 0 else torch.tensor(0.0)
            torch.testing.assert_close(advantage[n, t], want)
    assert experience.stats["anytime"] == pytest.approx(float(reward.mean()))
    with torch.no_grad():
        again, _ = log_probs(model, experience.ids, experience.response, 1.0, experience.layout)
    assert torch.equal(again, experience.logp)


def test_training_on_branches_is_resumed_bit_for_bit(tmp_path):
    def run(steps: int, folder):
        model = tiny()
        config = RLConfig(steps=steps, max_new_tokens=12, learning_rate=1e-3, minibatches=2, checkpoint_every=1)
        collect = branched(FORCING)
        aggregate = AGGREGATIONS["seq_mean_token_sum_norm"]
        record = train(model, collect, OBJECTIVES["dapo"], aggregate, config, checkpoints=folder)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), record

    whole, record = run(3, tmp_path / "a")
    assert record.rows[-1]["tokens_trained"] > 0

    class Killed(Exception):
        pass

    def dies(row):
        if row["step"] == 2:
            raise Killed

    model, config = tiny(), RLConfig(steps=3, max_new_tokens=12, learning_rate=1e-3, minibatches=2, checkpoint_every=1)
    collect, aggregate = branched(FORCING), AGGREGATIONS["seq_mean_token_sum_norm"]
    with pytest.raises(Killed):
        train(model, collect, OBJECTIVES["dapo"], aggregate, config, checkpoints=tmp_path / "b", told=dies)
    again, resumed = run(3, tmp_path / "b")
    assert torch.equal(whole, again)
    timed = ("seconds_rollout", "seconds_update")
    strip = [{k: v for k, v in row.items() if k not in timed} for row in record.rows]
    assert strip == [{k: v for k, v in row.items() if k not in timed} for row in resumed.rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (4, 4)}, r"budgets must be positive and rise, not \[4, 4\]"),
        ({"budgets": ()}, "budgets must be positive and rise"),
        ({"budgets": (0, 4)}, "budgets must be positive and rise"),
        ({"answers": 0}, "answers must be at least 1, not 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens must be at least 1, not 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(FORCING, **changes)
