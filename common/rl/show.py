"""A picture of one group of answers: every token with its advantage and how surprising it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from common.rl.rollout import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast


def group(
    words: PreTrainedTokenizerFast, rollout: Rollout, rewards: torch.Tensor, advantages: torch.Tensor, index: int = 0
) -> Figure:
    """The answers of group `index`, one a row, each token in the colour of its advantage; the bar below it shows how
    surprising the token was, -log p in nats, full at 3.

    rewards: [N]. advantages: [N] or [N, T]. Forced tokens are white.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    size = rollout.group_size
    rows = range(index * size, (index + 1) * size)
    spread = advantages[:, None] * rollout.trained if advantages.dim() == 1 else advantages
    largest = max(1e-6, float(spread[list(rows)].abs().max()))
    longest = max(int(rollout.response[n].sum()) for n in rows)
    fig, axis = plt.subplots(figsize=(min(13.0, 1.6 + 0.24 * longest), 0.9 + 0.42 * size))
    colours = plt.get_cmap("PuOr_r")
    for line, n in enumerate(rows):
        places = rollout.response[n].nonzero()[:, 0].tolist()
        for x, t in enumerate(places):
            value = float(spread[n, t]) / largest
            face = colours(0.5 + 0.38 * value) if bool(rollout.trained[n, t]) else "white"
            axis.add_patch(Rectangle((x, line), 1, 0.86, facecolor=face, edgecolor="white", lw=0.5))
            height = 0.14 * min(1.0, -float(rollout.logp[n, t]) / 3)
            axis.add_patch(Rectangle((x + 0.1, line + 0.86 - height), 0.8, height, facecolor="black", lw=0))
            token = words.decode([int(rollout.ids[n, t])])
            axis.text(x + 0.5, line + 0.38, token, ha="center", va="center", fontsize=8, family="monospace")
    shown = np.array([float(rewards[n]) for n in rows])
    axis.set(
        xlim=(0, longest), ylim=(size, 0), xlabel="token of the answer", yticks=np.arange(size) + 0.43,
        yticklabels=[f"reward {reward:.3g}" for reward in shown], title=rollout.problems[index].prompt,
    )  # fmt: skip
    axis.grid(False)
    scale = plt.cm.ScalarMappable(plt.Normalize(-largest, largest), colours)
    fig.colorbar(scale, ax=axis, label="advantage", fraction=0.02, pad=0.01)
    plt.close(fig)  # the notebook shows what the cell returns, once
    return fig
