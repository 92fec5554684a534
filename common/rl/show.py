"""Pictures of one group of answers, or of thoughts with forced answers: every token with its advantage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.rl.rollout import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast

    from common.rl.branches import Branches


def group(
    words: PreTrainedTokenizerFast, rollout: Rollout, rewards: torch.Tensor, advantages: torch.Tensor, index: int = 0
) -> Figure:
    """The answers of group `index`, one a row, each token in the colour of its advantage; the bar below it shows how
    surprising the token was, -log p in nats, full at 3.

    rewards: [N]. advantages: [N] or [N, T]. Forced tokens are white.
    """
    size = rollout.group_size
    rows = range(index * size, (index + 1) * size)
    spread = advantages[:, None] * rollout.trained if advantages.dim() == 1 else advantages
    lines = [
        _Line.of(words, rollout.ids[n], rollout.response[n], rollout.trained[n], spread[n], rollout.logp[n])
        for n in rows
    ]
    labels = [f"reward {float(rewards[n]):.3g}" for n in rows]
    return _drawn(lines, labels, rollout.problems[index].prompt, "token of the answer")


def branches(
    words: PreTrainedTokenizerFast, of: Branches, rewards: torch.Tensor, advantages: torch.Tensor, index: int = 0
) -> Figure:
    """The thoughts of group `index`, as `group` shows answers, and under each, at every budget, the answers forced
    there: blue if right, orange if not, with the mean reward.

    rewards: [N, m, A]. advantages: [N, T], of `of.packed`.
    """
    from common.reporting.style import COLOURS

    packed, size = of.packed, of.rollout.group_size
    rows = range(index * size, (index + 1) * size)
    lines = []
    for n in rows:
        on = packed.segment[n] >= 0
        lines.append(_Line.of(words, packed.ids[n], on, on, advantages[n], None))
    figure = _drawn(
        lines, [f"thought {i + 1}" for i in range(size)], of.rollout.problems[index].prompt, "token of the thought", 2
    )
    axis, many = figure.axes[0], of.forcing.answers
    each = len(of.forcing.budgets) * many
    for line, n in enumerate(rows):
        for j, budget in enumerate(of.forcing.budgets):
            axis.axvline(budget, color="0.6", lw=0.8, ls=":", zorder=0)
            mean = float(rewards[n, j].mean())
            axis.text(budget, 2 * line + 1.75, f"r = {mean:.2g}", ha="right", va="center", fontsize=7, color="0.3")
            for a in range(many):
                said = words.decode(of.answers[n * each + j * many + a])
                colour = COLOURS[0] if bool(of.right[n, j, a]) else COLOURS[1]
                place = budget - 1.1 * (many - 1 - a) - 0.2
                axis.text(
                    place, 2 * line + 1.2, said, ha="right", va="center", fontsize=7, color=colour, family="monospace"
                )
    axis.set_xlim(0, of.forcing.budgets[-1] + 0.5)
    return figure


@dataclass(frozen=True)
class _Line:
    """Tokens of a row, whether each is trained, its advantage, and how surprising it was (nats)."""

    tokens: list[str]
    trained: list[bool]
    advantage: list[float]
    surprise: list[float]

    @staticmethod
    def of(
        words: PreTrainedTokenizerFast,
        ids: torch.Tensor,
        shown: torch.Tensor,
        trained: torch.Tensor,
        advantage: torch.Tensor,
        logp: torch.Tensor | None,
    ) -> _Line:
        surprise = torch.zeros(int(shown.sum())) if logp is None else -logp[shown]
        tokens = [words.decode([i]) for i in ids[shown].tolist()]
        return _Line(tokens, trained[shown].tolist(), advantage[shown].tolist(), surprise.tolist())


def _drawn(lines: list[_Line], labels: list[str], title: str, xlabel: str, height: int = 1) -> Figure:
    """A row of squares for each line, every `height` units."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    largest = max(1e-6, max(abs(value) for line in lines for value in line.advantage))
    longest = max(len(line.tokens) for line in lines)
    fig, axis = plt.subplots(figsize=(min(13.0, 1.6 + 0.24 * longest), 0.9 + 0.42 * height * len(lines)))
    colours = plt.get_cmap("PuOr_r")
    for row, line in enumerate(lines):
        top = height * row
        for x, token in enumerate(line.tokens):
            face = colours(0.5 + 0.38 * line.advantage[x] / largest) if line.trained[x] else "white"
            axis.add_patch(Rectangle((x, top), 1, 0.86, facecolor=face, edgecolor="white", lw=0.5))
            bar = 0.14 * min(1.0, line.surprise[x] / 3)
            axis.add_patch(Rectangle((x + 0.1, top + 0.86 - bar), 0.8, bar, facecolor="black", lw=0))
            axis.text(x + 0.5, top + 0.38, token, ha="center", va="center", fontsize=8, family="monospace")
    ticks = height * np.arange(len(lines)) + 0.43
    axis.set(
        xlim=(0, longest), ylim=(height * len(lines), 0), xlabel=xlabel, yticks=ticks, yticklabels=labels, title=title
    )
    axis.grid(False)
    scale = plt.cm.ScalarMappable(plt.Normalize(-largest, largest), colours)
    fig.colorbar(scale, ax=axis, label="advantage", fraction=0.02, pad=0.01)
    plt.close(fig)  # the notebook shows what the cell returns, once
    return fig
