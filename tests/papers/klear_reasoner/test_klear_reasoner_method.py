"""GPPO: the value of clipping with two ends, its own gradient in all cells, the released formula."""

import pytest
import torch

from common.rl.objectives import cispo, clipped, reinforce
from papers.klear_reasoner.method import CELLS, cell_of, clip_cells, gppo, gradient_weight

LOW, HIGH = 0.2, 0.28
RANDOM = torch.Generator().manual_seed(0)


def draws(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = torch.exp(torch.randn(count, generator=RANDOM).double() * 0.6)
    return ratio, torch.randn(count, generator=RANDOM).double()


def test_its_value_is_that_of_clipping_with_two_ends():
    ratio, advantage = draws()
    logp, old = ratio.log(), torch.zeros_like(ratio)
    torch.testing.assert_close(gppo(LOW, HIGH)(logp, old, advantage), clipped(LOW, HIGH)(logp, old, advantage))


@pytest.mark.parametrize("betas", [(1.0, 1.0), (0.5, 2.0)])
def test_gradient_weights_of_all_cells(betas):
    ratio, advantage = draws()
    found = gradient_weight(ratio, advantage, gppo(LOW, HIGH, *betas))
    below, above = (ratio < 1 - LOW) & (advantage < 0), (ratio > 1 + HIGH) & (advantage > 0)
    expected = torch.where(below, betas[0] * (1 - LOW), torch.where(above, betas[1] * (1 + HIGH), ratio))
    torch.testing.assert_close(found, expected)
    assert set(cell_of(ratio, advantage, LOW, HIGH).tolist()) == set(range(6))


def test_at_the_bounds_the_weight_is_that_of_the_inside():
    for bound, sign in ((1 - LOW, -1.0), (1 + HIGH, 1.0)):
        ratio, advantage = torch.tensor([bound]).double(), torch.tensor([sign]).double()
        beyond = ratio * (1 + 1e-9 * sign)
        one, other = (gradient_weight(r, advantage, gppo(LOW, HIGH)) for r in (ratio, beyond))
        torch.testing.assert_close(one, ratio)
        torch.testing.assert_close(other, one, rtol=1e-8, atol=0)  # continuous there


def test_factors_of_0_are_clipping_and_wide_ends_are_no_clipping():
    ratio, advantage = draws()
    plain = gradient_weight(ratio, advantage, gppo(LOW, HIGH, 0.0, 0.0))
    torch.testing.assert_close(plain, gradient_weight(ratio, advantage, clipped(LOW, HIGH)))
    wide = gradient_weight(ratio, advantage, gppo(0.999999, 1e9))
    torch.testing.assert_close(wide, gradient_weight(ratio, advantage, reinforce))


def test_the_two_cells_in_which_cispo_differs():
    ratio, advantage = draws()
    ours, other = (gradient_weight(ratio, advantage, s) for s in (gppo(LOW, HIGH), cispo(LOW, HIGH)))
    differ = {CELLS[c] for c in cell_of(ratio, advantage, LOW, HIGH)[(ours - other).abs() > 1e-9].tolist()}
    assert differ == {"low, A>0", "high, A<0"}


def test_parity_with_the_released_formula():
    """As released: ratio clamped to tensor bounds (1 - e_low) / sg(ratio) * ratio, and the larger of two losses; where
    both are equal, that is inside, half of each side's gradient is one gradient."""
    ratio, advantage = draws()
    old = torch.zeros_like(ratio)
    logps = [ratio.log().requires_grad_() for _ in range(2)]
    released_ratio = logps[0].exp()
    unit = released_ratio / released_ratio.detach()
    clamped = torch.clamp(released_ratio, min=(1 - LOW) * unit, max=(1 + HIGH) * unit)
    released = -torch.maximum(-advantage * released_ratio, -advantage * clamped)
    ours = gppo(LOW, HIGH)(logps[1], old, advantage)
    torch.testing.assert_close(ours, released)
    released.sum().backward()
    ours.sum().backward()
    torch.testing.assert_close(logps[1].grad, logps[0].grad)


def test_extreme_ratios_keep_a_bounded_gradient():
    logp = torch.tensor([[0.0, -400.0]], requires_grad=True)
    gppo(LOW, HIGH)(logp, torch.tensor([[-400.0, 0.0]]), torch.tensor([[1.0, -1.0]])).sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[1.28, -0.8]]))


def test_cells_are_counted_with_their_entropy():
    ratio = torch.tensor([[0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 2.0]])
    advantage = torch.tensor([[-1.0, 1.0, -1.0, 0.0, 1.0, 3.0, 1.0]])
    entropy = torch.tensor([[0.1, 0.2, 0.3, 9.0, 0.5, 0.7, 9.0]])
    mask = torch.tensor([[True] * 6 + [False]])
    table = clip_cells(ratio, advantage, entropy, mask, LOW, HIGH).set_index("cell")
    assert table["tokens"].to_dict() == {
        "low, A<0": 1, "low, A>0": 1, "inside, A<0": 1, "inside, A>0": 0, "high, A<0": 0, "high, A>0": 2,
    }  # fmt: skip
    assert table.loc["high, A>0", "entropy"] == pytest.approx(0.6)
    assert table.loc["high, A>0", "size"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gppo(1.0, 0.2), "low=1.0"),
        (lambda: gppo(-0.1, 0.2), "low=-0.1"),
        (lambda: gppo(0.2, -0.2), "high=-0.2"),
        (lambda: gppo(beta_low=-1.0), "beta_low and beta_high must not be negative, not -1.0"),
        (
            lambda: gppo()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)),
            r"one shape, not \(2, 3\), \(2, 3\), \(2,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
