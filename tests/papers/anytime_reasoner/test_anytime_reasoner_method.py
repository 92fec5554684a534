"""Budget relative policy optimisation against its formulas written out, and against what it contains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rl.advantages import dr_grpo
from papers.anytime_reasoner import brpo, decoupled, last_answer, parts, prior, v2_only

BUDGETS = (2, 4, 6, 8)


def literal(rewards: torch.Tensor, weights: list[float], lam: float) -> torch.Tensor:
    """A_j of section 2.3, loop by loop."""
    P, G, m = rewards.shape
    out = torch.zeros_like(rewards)
    for p in range(P):
        for g in range(G):
            for j in range(1, m + 1):
                r = [float(x) for x in rewards[p, g]]
                value = sum(weights[i - 1] * r[i - 1] for i in range(j, m + 1))
                v1 = 0.0
                if j > 1:
                    recent = [lam ** (j - i) for i in range(1, j)]
                    mean = sum(w * r[i] for i, w in enumerate(recent)) / sum(recent)
                    v1 = mean * sum(weights[i - 1] for i in range(j, m + 1))
                group = [sum(weights[i - 1] * float(rewards[p, o, i - 1]) for i in range(j, m + 1)) for o in range(G)]
                v2 = sum(group) / G
                out[p, g, j - 1] = value - ((j - 1) / m * v1 + (m - j + 1) / m * v2)
    return out


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 4), st.sampled_from([0.3, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_brpo_is_its_formulas(seed, m, group, lam):
    random = torch.Generator().manual_seed(seed)
    rewards = torch.rand(3, group, m, generator=random, dtype=torch.float64)
    weights = torch.rand(m, generator=random, dtype=torch.float64) + 0.01
    weights = (weights / weights.sum()).tolist()
    found = brpo(weights, lam)(rewards, range(1, m + 1))
    torch.testing.assert_close(found, literal(rewards, weights, lam), rtol=1e-5, atol=1e-6)


def test_the_example_of_two_budgets():
    rewards = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    found = brpo("uniform")(rewards, (2, 4))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.25, -0.25]))
    torch.testing.assert_close(found[0, :, 1], torch.tensor([0.375, -0.125]))


def test_one_budget_is_dr_grpo():
    rewards = torch.rand(5, 4, 1)
    for estimator in (brpo("base"), brpo("uniform"), v2_only()):
        torch.testing.assert_close(estimator(rewards, (8,))[..., 0], dr_grpo(rewards[..., 0]))


def test_the_base_prior_with_the_groups_mean_is_dr_grpo_at_every_token():
    rewards = torch.rand(5, 4, 4)
    found = v2_only("base")(rewards, BUDGETS)
    for j in range(4):
        torch.testing.assert_close(found[..., j], dr_grpo(rewards[..., 3]))


def test_a_group_that_is_always_right_teaches_nothing_at_first():
    found = brpo("uniform")(torch.ones(2, 3, 4), BUDGETS)
    torch.testing.assert_close(found, torch.zeros_like(found))  # V1 = V2 = R everywhere


def test_recent_budgets_weigh_more_and_as_in_the_code():
    """The released code weighs budget i by 2^i, normalised, which is lam = 1/2."""
    rewards = torch.rand(1, 2, 4, dtype=torch.float64)
    of = parts(rewards, prior("uniform", BUDGETS), lam=0.5)
    code = 2.0 ** torch.arange(3, dtype=torch.float64)
    expected = (rewards[..., :3] * code).sum(-1) / code.sum() * 0.25
    torch.testing.assert_close(of.v1[..., 3], expected)
    assert (of.v1[..., 0] == 0).all()


def test_baselines_do_not_look_ahead():
    """V1 at j depends on rewards before j alone, or the gradient would be biased."""
    rewards = torch.rand(2, 3, 4)
    later = rewards.clone()
    later[..., 2:] = 1 - later[..., 2:]
    first, second = (parts(r, prior("uniform", BUDGETS)).v1 for r in (rewards, later))
    torch.testing.assert_close(first[..., :3], second[..., :3])


def test_priors():
    assert prior("base", BUDGETS).tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(prior("linear", BUDGETS), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert prior("uniform", BUDGETS).tolist() == [0.25] * 4
    assert prior([0, 1, 0, 0], BUDGETS).tolist() == [0, 1, 0, 0]


def test_answers_are_compared_with_those_from_the_same_cut():
    rewards = torch.tensor([[[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]])
    cuts = torch.tensor([[[3, 5, 5]]])  # the thought ended after 5 tokens: four answers share that cut
    found = decoupled(rewards, cuts)[0, 0]
    torch.testing.assert_close(found[0], torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(found[1:], torch.tensor([[0.25, 0.25], [-0.75, 0.25]]))


def test_grpo_trains_the_last_answer_alone():
    rewards = torch.tensor([[[[1.0], [1.0]], [[0.0], [0.0]]]])
    found = last_answer(rewards, torch.zeros(1, 2, 2))
    assert found.flatten().tolist() == [0.0, 0.5, 0.0, -0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prior("uniform", (4, 2)), r"budgets must be positive and rise, not \[4, 2\]"),
        (lambda: prior("square", BUDGETS), "unknown prior 'square'; known: base, uniform, linear"),
        (lambda: prior([0.5, 0.5], BUDGETS), r"the prior \[0.5, 0.5\] must be 4 shares that sum to 1"),
        (lambda: prior([0.5, 0.5, 0.5, 0.5], BUDGETS), "shares that sum to 1"),
        (lambda: parts(torch.ones(2, 3, 3), prior("uniform", BUDGETS)), r"rewards must be \[P, G, 4\]"),
        (lambda: parts(torch.ones(2, 3, 4), prior("uniform", BUDGETS), lam=0), "lam must lie in"),
        (lambda: brpo()(torch.ones(2, 1, 4), BUDGETS), "a group of 1 has no mean"),
        (lambda: decoupled(torch.ones(1, 2, 4, 1), torch.ones(1, 2, 4)), "answers must be 2 or more"),
        (lambda: last_answer(torch.ones(1, 2, 4, 2), torch.ones(1, 2, 4)), "answers must be 1, not 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
