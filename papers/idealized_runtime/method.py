"""Idealized runtime of a model on your stack, and what is made of it: a closed form for models that nobody measured, a
line through the layers for models that do not fit, and the models that none is better than.

    T(p, o) = F(p) + g (o - 1)                                       o >= 1; T(p, 0) = F(p)

The measuring, the fit, HELM's interpolation, prices and the denoised runtime of an API are shared instruments:
common/costs/idealized_runtime.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from common.costs.idealized_runtime import Profile, cheap_cells, decode_flops, denoise, fit, measure, prompt_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Profile", "Shape", "Stack", "along_layers", "denoise", "fit_stack", "leave_one_out", "pareto_front",
    "profile_model",
]  # fmt: skip


def profile_model(
    model: PreTrainedModel,
    prompts: Sequence[int] = (1, 32, 64, 128, 256),
    outputs: Sequence[int] = (1, 2, 4, 8, 16, 32),
    rounds: int = 5,
) -> Profile:
    """The cheap procedure: F on the grid of prompts, g at one prompt length. The weights may be random.

    Seconds are CPU time where the model is on a CPU (set torch to one thread), wall time on a GPU.
    """
    cells, _ = measure(model, cheap_cells(prompts, outputs), rounds)
    if model.device.type != "cpu":
        cells["seconds"] = cells["wall_seconds"]
    return fit(cells).profile


@dataclass(frozen=True)
class Shape:
    """A GPT as the closed form sees it. accelerators: over which each weight matrix is split (tensor parallelism)."""

    layers: int
    hidden: int
    vocabulary: int = 50304
    accelerators: int = 1
    bytes_per_weight: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} of a shape must be at least 1, not {value}")

    @property
    def parameters(self) -> int:
        """12 l h^2 + V h: the blocks and one embedding, which the head shares."""
        return 12 * self.layers * self.hidden**2 + self.vocabulary * self.hidden

    def query_flops(self, prompt_tokens: int, output_tokens: int) -> float:
        """Operations of a query: its prompt, and 24 h^2 l for each output token after the first."""
        reading = prompt_flops(prompt_tokens, self.layers, self.hidden, self.vocabulary)
        return reading + decode_flops(self.layers, self.hidden) * max(output_tokens - 1, 0)


@dataclass(frozen=True)
class Stack:
    """Hardware and software in three numbers that are fitted: operations/s and bytes/s that are reached on one
    accelerator, and seconds that each layer takes whatever its size (launches, Python, communication).

        g    = b P / (BW n) + c l                                       a token reads every weight once
        F(p) = max(b P / (BW n), FLOPs(p) / (R n)) + c l

    P: parameters of b bytes; n accelerators; l layers. The later version of the paper predicts runtimes so; its exact
    form was not at hand, and this one is ours.
    """

    flops_per_s: float
    bytes_per_s: float
    layer_overhead: float

    def profile(self, shape: Shape, prompts: Sequence[int]) -> Profile:
        """The predicted profile on a grid of prompt lengths."""
        reading = shape.parameters * shape.bytes_per_weight / (self.bytes_per_s * shape.accelerators)
        overhead = self.layer_overhead * shape.layers
        rate = self.flops_per_s * shape.accelerators
        first = {p: max(reading, shape.query_flops(p, 1) / rate) + overhead for p in sorted(prompts)}
        return Profile(reading + overhead, first, accelerators=shape.accelerators)


def _log_times(profile: Profile, prompts: Sequence[int]) -> np.ndarray:
    """log g, repeated so that it weighs as much as F, then log F(p)."""
    first = np.log([profile.prompt[p] for p in prompts])
    return np.concatenate([np.full(len(first), np.log(profile.per_output_token)), first])


def fit_stack(shapes: Mapping[str, Shape], profiles: Mapping[str, Profile]) -> Stack:
    """The stack on which these shapes would take these times: least squares of the relative errors of g and F(p).

    Each model needs g > 0; g as a whole weighs as much as F as a whole. Raises ValueError for fewer than 3 models
    (there are three unknowns) and for a model without a shape.
    """
    from scipy.optimize import least_squares

    if len(profiles) < 3 or set(profiles) - set(shapes):
        raise ValueError(
            f"a stack has three unknowns and needs as many models with a shape: {sorted(profiles)}, {sorted(shapes)}"
        )
    wanted = np.concatenate([_log_times(profile, list(profile.prompt)) for profile in profiles.values()])

    def residuals(theta: np.ndarray) -> np.ndarray:
        stack = Stack(*np.exp(theta))
        found = [
            _log_times(stack.profile(shapes[name], list(profile.prompt)), list(profile.prompt))
            for name, profile in profiles.items()
        ]
        return np.concatenate(found) - wanted

    name = max(profiles, key=lambda n: shapes[n].parameters)
    shape, largest = shapes[name], profiles[name]
    p = max(largest.prompt)
    rate = shape.query_flops(p, 1) / (largest.prompt[p] * shape.accelerators)
    bandwidth = shape.parameters * shape.bytes_per_weight / (largest.per_output_token * shape.accelerators)
    starts = [(rate * k, bandwidth * k, share * largest.per_output_token / shape.layers)
              for k in (1.0, 3.0) for share in (0.05, 0.5)]  # fmt: skip
    best = min((least_squares(residuals, np.log(start)) for start in starts), key=lambda found: found.cost)
    return Stack(*(float(x) for x in np.exp(best.x)))


def leave_one_out(shapes: Mapping[str, Shape], profiles: Mapping[str, Profile]) -> dict[str, dict[str, float]]:
    """Model -> relative errors of a stack that was fitted to the others: of `g` (signed) and of `F` (mean over p of its
    size). Raises ValueError for fewer than 4 models."""
    if len(profiles) < 4:
        raise ValueError(f"leaving one of {len(profiles)} models out leaves fewer than the three that a stack needs")
    errors = {}
    for name, profile in profiles.items():
        stack = fit_stack(shapes, {other: p for other, p in profiles.items() if other != name})
        predicted = stack.profile(shapes[name], list(profile.prompt))
        first = [abs(predicted.prompt[p] / seconds - 1) for p, seconds in profile.prompt.items()]
        errors[name] = {
            "g": predicted.per_output_token / profile.per_output_token - 1,
            "F": float(np.mean(first)),
        }
    return errors


def along_layers(fewer: Profile, more: Profile, layers: tuple[int, int], wanted: int) -> Profile:
    """The profile of `wanted` layers on the line through two profiles of the same width, of layers = (fewer, more).

    Embedding and head are in both and so are counted once. (The released runs of the largest model multiply a third of
    its layers by three, embedding and head included.) Raises ValueError for other grids or layers that do not rise.
    """
    low, high = layers
    if not 0 <= low < high <= wanted or list(fewer.prompt) != list(more.prompt):
        raise ValueError(f"needs 0 <= fewer < more <= wanted layers, not {low}, {high}, {wanted}, and the same prompts")
    share = (wanted - low) / (high - low)

    def line(a: float, b: float) -> float:
        return max(a + share * (b - a), 0.0)

    first = {p: line(fewer.prompt[p], more.prompt[p]) for p in fewer.prompt}
    return Profile(line(fewer.per_output_token, more.per_output_token), first, accelerators=more.accelerators)


def pareto_front(cost: ArrayLike, value: ArrayLike) -> np.ndarray:
    """bool [n]: which of n models no other one beats, by a lower cost at no lower value or a higher value at no higher
    cost. Equal ones stand or fall together. Raises ValueError for lists of different length and for what is not finite.
    """
    c, v = np.asarray(cost, dtype=float), np.asarray(value, dtype=float)
    if c.shape != v.shape or c.ndim != 1 or not (np.isfinite(c).all() and np.isfinite(v).all()):
        raise ValueError(f"a front needs a finite cost and value for each model: {c.tolist()}, {v.tolist()}")
    no_worse = (c[:, None] <= c) & (v[:, None] >= v)
    better = (c[:, None] < c) | (v[:, None] > v)
    return ~(no_worse & better).any(axis=0)
