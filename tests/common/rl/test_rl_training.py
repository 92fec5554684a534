"""Rollouts and the training loop on models small enough to enumerate: gradients, resumption, refusals."""

import math
from dataclasses import replace

import pytest
import torch

from common.generation.sampler import generate
from common.models.build import ModelConfig, build
from common.reasoners import policies
from common.rl import dpo, rewards
from common.rl import rollout as rollouts
from common.rl.advantages import dr_grpo, rloo
from common.rl.anchor import Anchor
from common.rl.experience import Critic, Experience, Grouped
from common.rl.objectives import AGGREGATIONS, OBJECTIVES, reinforce
from common.rl.rollout import log_probs, padded, sample
from common.rl.selectors import drop_zero_variance
from common.rl.trainer import RLConfig, train
from common.tasks import chain

WORDS = policies.tokenizer()
END = WORDS.convert_tokens_to_ids(policies.ANSWER_END)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
PROBLEMS = chain.generate(0, 40, (2, 3), style="concise")
CONFIG = RLConfig(steps=4, max_new_tokens=8, learning_rate=1e-2, minibatches=2, checkpoint_every=1)


def tiny(seed: int = 0) -> torch.nn.Module:
    return build(ModelConfig(**SIZES, vocab_size=len(WORDS)), seed=seed, attention="eager")


def some_right(problem, text: str) -> bool:
    """Something that an untrained policy gets right now and then: a 1 among the first characters."""
    return "1" in text[:6]


def grouped(**changes) -> Grouped:
    usual = {
        "words": WORDS,
        "problems_at": lambda step: PROBLEMS[4 * step : 4 * step + 4],
        "verify": some_right,
        "group_size": 4,
        "max_new_tokens": 8,
        "stop_tokens": [END],
        "terms": {"verifiable": rewards.Weighted(rewards.verifiable)},
    }
    return Grouped(**(usual | changes))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(config: RLConfig = CONFIG, objective: str = "dapo", model=None, **settings):
    model = model or tiny()
    aggregate = AGGREGATIONS["token_mean"]
    record = train(model, settings.pop("collect", grouped()), OBJECTIVES[objective], aggregate, config, **settings)
    return model, record


def test_log_probs_are_the_models_own_and_do_not_see_padding():
    model = tiny().double()
    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16, 18, 19], [17]]
    ids, response = padded(prompts, answers)
    logp, entropy = log_probs(model, ids, response, temperature=0.7)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = model(torch.tensor([prompt + answer])).logits[0].float() / 0.7
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        own = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logp[n][response[n]], own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entropy[n][response[n]], -(expected.exp() * expected).sum(1), rtol=1e-5, atol=1e-6)
    other = ids.clone()
    other[0, 5:] = 3
    torch.testing.assert_close(log_probs(model, other, response, 0.7)[0], logp)
    assert (logp[~response] == 0).all()
    with pytest.raises(ValueError, match="cannot begin at the first position"):
        log_probs(model, ids, torch.ones_like(response))


def test_rows_read_by_length_are_the_same_rows(monkeypatch):
    """In value and gradient, whatever is read together; a row without a response is all 0."""
    prompts = [[5, 6, 7], [8], [9, 10], [11] * 9, [4, 4]]
    ids, response = padded(prompts, [[11, 12], [13, 14, 15, 16, 18, 19], [17], [3] * 7, []])
    values, gradients = [], []
    for together in (1, 2, 100):
        monkeypatch.setattr(rollouts, "TOGETHER", together)
        model = tiny().double()
        logp, entropy = log_probs(model, ids, response)
        (logp.sum() + entropy.sum()).backward()
        values.append(torch.stack([logp, entropy]).detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in (1, 2):
        torch.testing.assert_close(values[0], values[other])
        torch.testing.assert_close(gradients[0], gradients[other], rtol=1e-5, atol=1e-6)
    assert (values[0][:, 4] == 0).all()


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    ids, response = padded([[5]], [[6, 7]])
    logp, entropy = log_probs(model, ids, response)
    torch.testing.assert_close(entropy[response], torch.full((2,), math.log(len(WORDS))))
    torch.testing.assert_close(logp[response], torch.full((2,), -math.log(len(WORDS))))


def test_a_rollout_is_what_the_sampler_draws_with_its_log_probabilities():
    model = tiny()
    rollout, ledger = sample(model, WORDS, PROBLEMS[:3], 4, 8, stop_tokens=[END], temperature=0.8, seed=3, step=2)
    assert rollout.ids.shape == rollout.response.shape == rollout.logp.shape
    assert rollout.length.sum() == ledger.generated_tokens
    for n in range(12):
        prompt = WORDS.encode(PROBLEMS[n // 4].prompt)
        assert rollout.ids[n, : len(prompt)].tolist() == prompt
        answer = rollout.ids[n][rollout.response[n]].tolist()
        assert WORDS.decode(answer) == rollout.texts[n]
        assert bool(rollout.finished[n]) == (answer[-1] == END)
    alone, _ = sample(model, WORDS, PROBLEMS[:1], 4, 8, stop_tokens=[END], temperature=0.8, seed=3, step=2)
    assert alone.texts == rollout.texts[:4]  # a draw does not depend on what else is in the batch
    assert sample(model, WORDS, PROBLEMS[:3], 4, 8, stop_tokens=[END], seed=3, step=3)[0].texts != rollout.texts
    with pytest.raises(ValueError, match="not 0 problems of 4 samples"):
        sample(model, WORDS, [], 4, 8, stop_tokens=[END])


def test_greedy_rollouts_are_those_of_transformers():
    """The sampler's greedy answers, whole and ragged, are token-equal to `generate` (see also its own tests)."""
    model = tiny().double()
    prompts = WORDS([p.prompt for p in PROBLEMS[:5]])["input_ids"]
    ours = generate(model, prompts, 8, stop_tokens=[END])
    for prompt, tokens in zip(prompts, ours.tokens, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=END)
        assert whole[0, len(prompt) :].tolist() == tokens.tolist()


def enumerated(model: torch.nn.Module, reward: dict[int, float]) -> torch.Tensor:
    """The exact gradient of the expected reward of one-token answers to one prompt."""
    model.zero_grad()
    logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    chance = logits.softmax(-1)
    sum(chance[token] * value for token, value in reward.items()).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("estimator", [rloo, dr_grpo])
def test_the_policy_gradient_is_that_of_the_expected_reward(estimator):
    """REINFORCE with a group baseline, over many groups, against enumeration: rloo is unbiased; the mean of the whole
    group shrinks it by (G - 1) / G and no more."""
    model, reward = tiny().double(), {7: 1.0, 8: 0.5, 20: -1.0}
    with torch.no_grad():  # three outcomes share nearly all of the mass
        head = model.get_output_embeddings().weight
        hidden = model.base_model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
        for token in reward:
            head[token] += 6 * hidden / hidden.square().sum() * (1 + 0.1 * token / 20)
    exact = enumerated(model, reward)
    groups, size = 4000, 4
    chance = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1).detach()
    tokens = torch.multinomial(chance, groups * size, replacement=True, generator=torch.Generator().manual_seed(0))
    value = torch.zeros(len(chance), dtype=torch.double)
    for token, worth in reward.items():
        value[token] = worth
    advantage = estimator(value[tokens].view(groups, size)).flatten()
    # Rows with the same token have the same gradient: weigh each outcome by its summed advantage.
    summed = torch.zeros(len(chance), dtype=torch.double).index_add(0, tokens, advantage) / len(tokens)
    logits = model(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)
    reinforce(logits, logits.detach(), summed).sum().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    shrunk = exact * ((size - 1) / size if estimator is dr_grpo else 1.0)
    assert (found - shrunk).norm() / shrunk.norm() < 0.05
    cosine = float(found @ exact / found.norm() / exact.norm())
    assert cosine > 0.999


def test_one_minibatch_of_one_epoch_makes_all_objectives_equal():
    config = replace(CONFIG, steps=1, minibatches=1)
    found = [weights(run(config, name)[0]) for name in OBJECTIVES]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)
    assert not torch.equal(found[0], weights(tiny()))


def test_minibatches_make_them_differ_and_ratios_leave_one():
    config = replace(CONFIG, steps=2, minibatches=4, learning_rate=5e-2)
    models, records = zip(*(run(config, name) for name in ("reinforce", "dapo")), strict=True)
    assert not torch.equal(weights(models[0]), weights(models[1]))
    assert records[1].rows[-1]["ratio_max"] > 1.28
    assert records[1].rows[-1]["clip_frac_high"] + records[1].rows[-1]["clip_frac_low"] > 0


def test_the_same_seed_gives_the_same_record_and_another_one_does_not():
    timed = {"seconds_rollout", "seconds_update"}

    def rows(**changes):
        _, record = run(replace(CONFIG, **changes), collect=grouped(**changes))
        return [{k: v for k, v in row.items() if k not in timed} for row in record.rows]

    assert rows(seed=1) == rows(seed=1)
    assert rows(seed=1) != rows(seed=2)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    def settings(model):
        anchor, critic = Anchor(model, rate=0.3), Critic(model, 1e-3)
        return {"anchor": anchor, "critic": critic, "collect": grouped(critic=critic)}

    config, whole = replace(CONFIG, kl=0.1), tiny()
    _, record = run(config, model=whole, **settings(whole))

    def stop(row):
        if row["step"] == 3:
            raise RuntimeError("killed")

    first = tiny()
    with pytest.raises(RuntimeError, match="killed"):
        run(config, model=first, told=stop, checkpoints=tmp_path, **settings(first))
    again = tiny(seed=7)
    _, resumed = run(config, model=again, checkpoints=tmp_path, **settings(again))
    assert torch.equal(weights(again), weights(whole))
    assert [row["loss"] for row in resumed.rows] == [row["loss"] for row in record.rows]
    with pytest.raises(ValueError, match=r"kl=0\.1 there, 0\.2 here"):
        run(replace(config, kl=0.2), model=again, checkpoints=tmp_path, **settings(again))


def test_rewards_that_never_differ_train_nothing_and_are_warned_of_once():
    config = replace(CONFIG, steps=12, checkpoint_every=100)
    with pytest.warns(UserWarning, match="constant in every group for 10 steps up to step 10") as caught:
        model, record = run(config, collect=grouped(verify=lambda *_: True, problems_at=lambda step: PROBLEMS[:2]))
    assert len(caught) == 1
    assert torch.equal(weights(model), weights(tiny()))  # advantages of exactly 0 have no gradient
    assert {row["frac_zero_adv_groups"] for row in record.rows} == {1.0}


def test_a_filter_that_leaves_nothing_leaves_the_policy_as_it_is():
    collect = grouped(verify=lambda *_: False, selector=drop_zero_variance)
    with pytest.warns(UserWarning, match="step 1: no token is left to train on"):
        model, record = run(replace(CONFIG, steps=1), collect=collect)
    assert torch.equal(weights(model), weights(tiny()))
    assert record.rows[0]["tokens_trained"] == 0


def test_an_anchor_that_follows_at_once_has_no_divergence():
    model = tiny()
    anchor = Anchor(model, rate=1.0)
    _, record = run(replace(CONFIG, kl=0.1, minibatches=1), model=model, anchor=anchor)
    assert max(abs(row["kl_anchor"]) for row in record.rows) < 1e-6
    fixed = tiny()
    still = Anchor(fixed)
    _, record = run(replace(CONFIG, kl=0.1, minibatches=1), model=fixed, anchor=still)
    assert torch.equal(weights(still.model), weights(tiny()))
    assert record.rows[-1]["kl_anchor"] > 1e-5
    copied = Anchor(tiny(), every=2)
    copied.update(fixed, 1)
    assert torch.equal(weights(copied.model), weights(tiny()))
    copied.update(fixed, 2)
    assert torch.equal(weights(copied.model), weights(fixed))
    with pytest.raises(ValueError, match=r"rate=0\.5, every=3"):
        Anchor(tiny(), every=3, rate=0.5)


def test_training_earns_more_reward():
    config = replace(CONFIG, steps=30, learning_rate=5e-3, checkpoint_every=100)
    _, record = run(config, collect=grouped(problems_at=lambda step: PROBLEMS[:8], group_size=8))
    early, late = (sum(row["reward"] for row in rows) / 5 for rows in (record.rows[:5], record.rows[-5:]))
    assert late > early + 0.2


def test_evaluations_stand_beside_the_tokens_spent_and_stop_what_diverges():
    found = iter([{"accuracy": 0.8}, {"accuracy": 0.7}, {"accuracy": 0.3}])
    _, record = run(replace(CONFIG, steps=20, evaluate_every=2), evaluate=lambda policy: next(found))
    assert [e["step"] for e in record.evaluations] == [0, 2, 4]
    assert record.evaluations[0]["tokens_generated"] == 0
    assert record.evaluations[2]["tokens_generated"] == record.tokens == record.rows[-1]["tokens_generated"]
    assert record.diverged
    assert record.step == 4


def broken(model, step: int, **changes) -> Experience:
    experience = grouped()(model, step)
    return replace(experience, **{k: f(experience) for k, f in changes.items()}) if step == 2 else experience


@pytest.mark.parametrize(
    "change",
    [
        {"advantage": lambda e: e.advantage * math.nan},
        {"logp": lambda e: e.logp - 15.0 * e.response},  # as if the policy had moved far since
    ],
)
def test_what_explodes_stops_with_the_step_named_and_the_checkpoint_kept(tmp_path, change):
    with pytest.raises(FloatingPointError, match=r"step 3: loss .* largest ratio"):
        run(collect=lambda model, step: broken(model, step, **change), checkpoints=tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["record"]["step"] == 2
    assert all(torch.isfinite(w).all() for w in content["policy"].values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"kl": -1.0}, "kl must not be negative, not -1.0"),
        ({"kl_estimator": "k4"}, "unknown kl_estimator 'k4'; known: k1, k2, k3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_a_divergence_needs_something_to_diverge_from():
    with pytest.raises(ValueError, match=r"kl=0.1 needs an anchor"):
        run(replace(CONFIG, kl=0.1))


PAIRS = [dpo.Pair([5, 6], [7, 8], [9], "a"), dpo.Pair([5], [10], [11, 12, 13], "b")]


def test_dpo_starts_at_log_2_and_moves_the_right_way():
    model = tiny()
    logp = dpo.pair_log_probs(model, PAIRS)
    assert float(dpo.dpo_loss(logp.detach(), logp.detach(), 0.1)) == pytest.approx(math.log(2))
    dpo.dpo_loss(logp, logp.detach(), 0.1).backward()
    record = dpo.train_dpo(model, PAIRS, beta=0.1, learning_rate=1e-2, epochs=20)
    assert record[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert record[-1]["loss"] < record[0]["loss"]
    assert record[-1]["accuracy"] == record[-1]["accuracy a"] == record[-1]["accuracy b"] == 1
    for (chosen, rejected), (before, after) in zip(
        logp.tolist(), dpo.pair_log_probs(model, PAIRS).tolist(), strict=True
    ):
        assert before - after > chosen - rejected
    with pytest.raises(ValueError, match="no pairs"):
        dpo.train_dpo(model, [], beta=0.1, learning_rate=1e-2)
    with pytest.raises(ValueError, match="beta must be positive, not 0"):
        dpo.dpo_loss(logp, logp, 0)


def test_dpo_loss_against_its_closed_form():
    logp, reference = torch.tensor([[-3.0, -5.0], [-2.0, -1.0]]), torch.tensor([[-4.0, -4.0], [-2.0, -2.0]])
    margins = [0.3 * (1 + 1), 0.3 * (0 - 1)]
    losses = [math.log1p(math.exp(-m)) for m in margins]
    assert float(dpo.dpo_loss(logp, reference, 0.3)) == pytest.approx(sum(losses) / 2)
    weight = torch.tensor([3.0, 1.0])
    assert float(dpo.dpo_loss(logp, reference, 0.3, weight)) == pytest.approx((3 * losses[0] + losses[1]) / 4)


def test_merged_weights():
    one, other = tiny(1).state_dict(), tiny(2).state_dict()
    for alpha, same in ((1.0, one), (0.0, other)):
        assert all(torch.equal(w, same[name]) for name, w in dpo.merge_linear(one, other, alpha).items())
    half = dpo.merge_linear(one, other, 0.5)
    assert all(torch.allclose(w, (one[name] + other[name]) / 2, atol=1e-6) for name, w in half.items())
    for first, second, alpha, message in (
        (one, other, 1.5, "alpha must lie in"),
        (one, {}, 0.5, "the models differ in their weights"),
        (one, {k: v[:1] for k, v in other.items()}, 0.5, "has shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            dpo.merge_linear(first, second, alpha)
