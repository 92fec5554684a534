"""GPPO, gradient-preserving clipping policy optimisation: a bounded gradient for tokens that PPO's clipping silences.

With delta = pi / pi_old of a token and A its advantage, clipping with two ends has the gradient F * A * grad log pi:
F = 0 where delta < 1 - e_low and A < 0, or delta > 1 + e_high and A > 0, and F = delta elsewhere. GPPO has the same
value; in these two cells its F is 1 - e_low and 1 + e_high (section 3, equations 7 to 12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.rl.objectives import Surrogate, check_range, ratio_of

if TYPE_CHECKING:
    import pandas as pd

CELLS = ("low, A<0", "low, A>0", "inside, A<0", "inside, A>0", "high, A<0", "high, A>0")


def gppo(low: float = 0.2, high: float = 0.28, beta_low: float = 1.0, beta_high: float = 1.0) -> Surrogate:
    """The surrogate of GPPO: (logp, logp_old, advantage), each [N, T] -> [N, T], to be maximised.

    beta_low, beta_high: further factors of the gradient in the two cells (the paper's general form; its runs have 1);
    0 and 0 is clipping with two ends. Raises ValueError for a range that does not hold 1, and negative factors.
    """
    check_range(low, high)
    if beta_low < 0 or beta_high < 0:
        raise ValueError(f"beta_low and beta_high must not be negative, not {beta_low} and {beta_high}")

    def surrogate(logp: torch.Tensor, logp_old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        if advantage.shape != logp.shape or logp_old.shape != logp.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (logp, logp_old, advantage))
            raise ValueError(f"logp, logp_old and advantage must have one shape, not {shapes}")
        ratio = ratio_of(logp, logp_old)
        below, above = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)
        # Not ratio / sg(ratio), whose gradient the cut of extreme log-ratios would silence: value 0, gradient of logp.
        push = logp - logp.detach()
        kept = torch.where(below, (1 - low) * (1 + beta_low * push), (1 + high) * (1 + beta_high * push))
        return torch.where(below | above, kept, ratio) * advantage

    return surrogate


def gradient_weight(ratio: torch.Tensor, advantage: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    """F of a surrogate at each token, by automatic differentiation: d surrogate / d logp / advantage, as `ratio`."""
    logp = ratio.log().requires_grad_()
    surrogate(logp, torch.zeros_like(logp), advantage).sum().backward()
    assert logp.grad is not None
    return logp.grad / advantage


def cell_of(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Which of CELLS a token is in, int64, as `ratio`; tokens with an advantage of 0 count as A<0."""
    side = (ratio >= 1 - low).long() + (ratio > 1 + high).long()
    return 2 * side + (advantage > 0).long()


def clip_cells(
    ratio: torch.Tensor, advantage: torch.Tensor, entropy: torch.Tensor, mask: torch.Tensor, low: float, high: float
) -> pd.DataFrame:
    """Tokens, their mean entropy (nats) and mean |A| in each cell; the masked tokens whose advantage is not 0."""
    import pandas as pd

    counted = mask & (advantage != 0)
    cells = cell_of(ratio, advantage, low, high)[counted].cpu()
    frame = pd.DataFrame(
        {
            "cell": cells.numpy(),
            "entropy": entropy[counted].cpu().numpy(),
            "size": advantage[counted].abs().cpu().numpy(),
        }
    )
    table = frame.groupby("cell").agg(tokens=("size", "size"), entropy=("entropy", "mean"), size=("size", "mean"))
    table = table.reindex(range(len(CELLS)))
    return table.fillna({"tokens": 0}).assign(cell=list(CELLS)).astype({"tokens": int}).reset_index(drop=True)
