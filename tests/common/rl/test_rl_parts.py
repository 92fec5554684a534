"""Advantages, objectives, rewards, selectors: each against its closed form, a literal loop, or another of them."""

import math

import pytest
import torch

from common.rl import advantages, objectives, rewards, selectors
from common.rl.objectives import AGGREGATIONS, KL, OBJECTIVES, cispo, clipped
from common.rl.rollout import Rollout

RANDOM = torch.Generator().manual_seed(0)


def rollout(lengths: list[int], group_size: int, finished: bool = True) -> Rollout:
    response = torch.arange(1, max(lengths) + 2)[None] <= torch.tensor(lengths)[:, None]
    response = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.bool), response], dim=1)
    ids = response.long()
    ended = torch.full((len(lengths),), finished)
    return Rollout(ids, response, response, torch.zeros(ids.shape), ended, group_size, [], [])


def test_rloo_is_dr_grpo_over_the_others():
    r = torch.rand(5, 8, generator=RANDOM)
    torch.testing.assert_close(advantages.rloo(r), 8 / 7 * advantages.dr_grpo(r))
    literal = torch.stack([r[:, i] - (r.sum(1) - r[:, i]) / 7 for i in range(8)], dim=1)
    torch.testing.assert_close(advantages.rloo(r), literal)


def test_what_the_estimators_do_not_see():
    r = torch.rand(5, 8, generator=RANDOM).double()
    torch.testing.assert_close(advantages.grpo(3 * r + 2), advantages.grpo(r), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantages.dr_grpo(r + 2), advantages.dr_grpo(r))
    assert not torch.allclose(advantages.dr_grpo(3 * r), advantages.dr_grpo(r))
    for estimator in advantages.ESTIMATORS.values():
        assert (estimator(torch.full((3, 4), 0.5)) == 0).all()
    sample = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(advantages.grpo(r, ddof=1), sample)


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_a_group_of_one_has_nothing_to_compare(name):
    with pytest.raises(ValueError, match=rf"{name} compares .* rewards \[P, G >= 2\], not torch.Size\(\[3, 1\]\)"):
        advantages.ESTIMATORS[name](torch.zeros(3, 1))


def gae_by_loop(rewards, values, mask, gamma, lam):
    out = torch.zeros_like(values)
    for n in range(len(values)):
        at = mask[n].nonzero()[:, 0].tolist()
        deltas = []
        for i, t in enumerate(at):
            after = values[n, at[i + 1]] if i + 1 < len(at) else 0.0
            deltas.append((rewards[n] if i + 1 == len(at) else 0.0) + gamma * after - values[n, t])
        for i, t in enumerate(at):
            out[n, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_gae_against_a_double_loop(gamma, lam):
    mask = rollout([3, 1, 5, 4], 2).response
    reward, values = torch.randn(4, generator=RANDOM).double(), torch.randn(mask.shape, generator=RANDOM).double()
    found, returns = advantages.gae(reward, values, mask, gamma, lam)
    torch.testing.assert_close(found, gae_by_loop(reward, values, mask, gamma, lam))
    torch.testing.assert_close(returns, (found + values) * mask)


def test_gae_without_a_critic_is_the_outcome_at_every_token():
    mask = rollout([3, 1, 5], 1).response
    reward = torch.tensor([1.0, -2.0, 0.5])
    found, _ = advantages.gae(reward, torch.zeros(mask.shape), mask)
    torch.testing.assert_close(found, reward[:, None] * mask)


def test_whitened_advantages():
    mask = rollout([3, 1, 5], 1).response
    white = advantages.whiten(torch.randn(mask.shape, generator=RANDOM), mask)
    assert white[mask].mean().abs() < 1e-6
    assert white[mask].std(correction=0) == pytest.approx(1, rel=1e-5)
    assert (white[~mask] == 0).all()


def gradient(surrogate, logp, old, advantage):
    logp = logp.clone().requires_grad_()
    surrogate(logp, old, advantage).sum().backward()
    return logp.grad


def test_all_objectives_agree_on_policy():
    logp, advantage = -torch.rand(4, 9, generator=RANDOM), torch.randn(4, 9, generator=RANDOM)
    for surrogate in OBJECTIVES.values():
        torch.testing.assert_close(gradient(surrogate, logp, logp, advantage), advantage)


CELLS = {  # (ratio, sign of the advantage) -> the weight F of PPO with two ends and of CISPO, ends 0.2 and 0.28
    (0.5, 1): (0.5, 0.8),
    (0.5, -1): (0.0, 0.8),
    (2.0, 1): (0.0, 1.28),
    (2.0, -1): (2.0, 1.28),
    (1.1, 1): (1.1, 1.1),
    (0.9, -1): (0.9, 0.9),
}


@pytest.mark.parametrize(("cell", "weights"), CELLS.items())
def test_gradient_weights_by_cell(cell, weights):
    ratio, sign = cell
    logp, old = torch.tensor([[math.log(ratio) - 1]]).double(), torch.tensor([[-1.0]]).double()
    advantage = torch.tensor([[0.7 * sign]]).double()
    for surrogate, weight in zip((clipped(0.2, 0.28), cispo(0.2, 0.28)), weights, strict=True):
        expected = torch.tensor([[weight * 0.7 * sign]]).double()
        torch.testing.assert_close(gradient(surrogate, logp, old, advantage), expected)


def test_clipping_is_the_lesser_of_two_and_wide_ends_clip_nothing():
    logp, old = -torch.rand(50, 9, generator=RANDOM) * 3, -torch.rand(50, 9, generator=RANDOM) * 3
    advantage, ratio = torch.randn(50, 9, generator=RANDOM), (logp - old).exp()
    lesser = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    torch.testing.assert_close(clipped(0.2, 0.28)(logp, old, advantage), lesser)
    wide = clipped(0.999999, 1e9)
    torch.testing.assert_close(
        gradient(wide, logp, old, advantage), gradient(objectives.reinforce, logp, old, advantage)
    )


def test_dual_clipping_has_a_floor():
    old, advantage = torch.zeros(1, 3), torch.tensor([[-1.0, -1.0, 1.0]])
    logp = torch.tensor([[math.log(5.0), math.log(2.0), math.log(5.0)]])
    found = clipped(0.2, 0.28, dual=3.0)
    torch.testing.assert_close(found(logp, old, advantage), torch.tensor([[-3.0, -2.0, 1.28]]))
    torch.testing.assert_close(gradient(found, logp, old, advantage), torch.tensor([[0.0, -2.0, 0.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clipped(1.0, 0.2), "low=1.0"),
        (lambda: cispo(0.2, -0.1), "high=-0.1"),
        (lambda: clipped(0.2, 0.2, dual=1.0), "dual must be above 1, not 1.0"),
    ],
)
def test_ranges_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_extreme_ratios_stay_finite():
    logp, old = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    for surrogate in OBJECTIVES.values():
        assert torch.isfinite(surrogate(logp, old, torch.ones(1, 2))).all()


def test_aggregations_against_loops():
    mask = rollout([3, 1, 5], 1).response
    values = torch.randn(mask.shape, generator=RANDOM).double()
    rows = [values[n][mask[n]].tolist() for n in range(3)]
    tokens = [v for row in rows for v in row]
    expected = {
        "token_mean": sum(tokens) / len(tokens),
        "seq_mean_token_mean": sum(sum(r) / len(r) for r in rows) / 3,
        "seq_mean_token_sum": sum(map(sum, rows)) / 3,
        "seq_mean_token_sum_norm": sum(map(sum, rows)) / 3 / 16,
    }
    for name, aggregate in AGGREGATIONS.items():
        assert float(aggregate(values, mask, 16)) == pytest.approx(expected[name])
        assert float(aggregate(values, torch.zeros_like(mask), 16)) == 0
    dropped = mask & torch.tensor([True, False, True])[:, None]
    assert float(AGGREGATIONS["seq_mean_token_sum"](values, dropped, 16)) == pytest.approx(
        (sum(rows[0]) + sum(rows[2])) / 2
    )


def test_divergences_against_the_exact_one():
    p, q = (torch.randn(6, generator=RANDOM).double().log_softmax(-1) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    for name in ("k1", "k3"):  # unbiased: their mean under p is the divergence
        assert float((p.exp() * KL[name](p, q)).sum()) == pytest.approx(exact)
    assert (KL["k2"](p, q) >= 0).all()
    assert (KL["k3"](p, q) >= 0).all()
    assert (KL["k3"](p, p) == 0).all()


def test_length_terms_on_hand_made_groups():
    of, right = rollout([10, 20, 30, 10, 20, 30], 3), torch.tensor([1.0, 1, 1, 1, 0, 0])
    torch.testing.assert_close(rewards.o1_pruner(of, right, None)[:3], torch.tensor([1.0, 0.0, -1 / 3]))
    z = 10 / (math.sqrt(200 / 3) + 1e-5)
    push = 2 * (1 / (1 + math.exp(-z)) - 0.5)
    torch.testing.assert_close(rewards.efficient_reasoner(of, right, None), torch.tensor([push, 0, -push, 0, 0, 0]))
    torch.testing.assert_close(rewards.length_penalty_l1(40)(of, right, None)[:3], torch.tensor([0.95, 0.9, 0.85]))
    assert rewards.length_penalty_sigmoid(of, right, None).tolist()[4:] == [0, 0]
    assert rewards.overlong(rollout([3, 3], 2, finished=False), right[:2], None).tolist() == [-1, -1]


def test_rewards_add_up_with_weights_gates_and_schedules():
    of, right = rollout([4, 2], 2), torch.tensor([1.0, 0.0])
    terms = {
        "right": rewards.Weighted(rewards.verifiable),
        "length": rewards.Weighted(lambda r, *_: -r.length, rewards.rising(0.5, 10)),
        "gated": rewards.Weighted(lambda r, *_: r.length, rewards.falling(1.0, 10), only_if_correct=True),
    }
    summed, values = rewards.total(terms, of, right, None, step=5)
    assert values["gated"].tolist() == [4, 0]
    torch.testing.assert_close(summed, torch.tensor([1 - 0.25 * 4 + 0.5 * 4, -0.25 * 2]))
    off = {"off": rewards.Weighted(rewards.verifiable, rewards.constant(0.0))}
    assert rewards.total(off, of, right, None, step=3)[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda r, right, policy: right / 0 * 0, "reward 'broken' is not finite for answer 0"),
        (lambda r, right, policy: right[:1], r"reward 'broken' has shape \(1,\), not \(2,\)"),
    ],
)
def test_a_broken_reward_is_named(term, message):
    with pytest.raises(ValueError, match=message):
        rewards.total({"broken": rewards.Weighted(term)}, rollout([4, 2], 2), torch.ones(2), None, 0)


def test_selectors():
    r = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0.1, 0.4, 0.2, 0.3]])
    random = torch.Generator().manual_seed(1)
    assert selectors.keep_all(r, random).all()
    assert selectors.drop_zero_variance(r, random).any(1).tolist() == [True, False, True]
    kept = selectors.oversample(2)(r, random)
    assert kept.sum(1).tolist() == [2, 2, 2]
    assert r[0][kept[0]].sort().values.tolist() == [0, 1]
    assert r[2][kept[2]].sort().values.tolist() == pytest.approx([0.1, 0.4])
    ties = {tuple(selectors.oversample(2)(r, torch.Generator().manual_seed(s))[1].tolist()) for s in range(30)}
    assert len(ties) > 3
    assert selectors.oversample(3, "random")(r, random).sum(1).tolist() == [3, 3, 3]
    for make, message in (
        (lambda: selectors.oversample(3), "keep=3 must be positive, and even"),
        (lambda: selectors.oversample(2, "best"), "unknown rule 'best'; known: balanced, random"),
        (lambda: selectors.oversample(6)(r, random), "6 of 4 answers cannot be kept"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
