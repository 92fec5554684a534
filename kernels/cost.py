"""What a kernel must move and compute at least, and the time that a card's ceilings allow it."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes to and from memory when each operand is read and each result written once, and arithmetic operations.

    A multiplication and an addition are two FLOPs. Operations that depend on neither head_dim nor a row's channels
    (the exponential of a logit, a comparison) are left out.
    """

    bytes: int
    flops: int

    def __add__(self, other: tuple) -> Cost:  # type: ignore[override]
        return Cost(self.bytes + other[0], self.flops + other[1])

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The roofline: the larger of the time of the memory and the time of the arithmetic."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)
