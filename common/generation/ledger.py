"""The ledger: what a piece of generation cost, counted and not estimated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass
class Ledger:
    """Costs of generation; every decoder of the project returns one, so that decoders can be compared at equal cost.

    prompt_tokens: tokens read in prefills, without padding. generated_tokens: tokens handed to the caller, stop tokens
    included. discarded_tokens: tokens that a decoder scored or drew and threw away (rejected drafts, pruned branches).
    forwards: calls of the model, prefills included, a batch counting once. flops: floating-point operations of those
    calls, padding and rows that have finished included (`common.models.flops`). seconds: wall time; a token takes
    longer in a small batch than in a large one, so it compares only what ran at the same batch size.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    discarded_tokens: int = 0
    forwards: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, **costs: float) -> None:
        """Adds to the named fields in place: `ledger.add(forwards=1, flops=12_000)`.

        Raises TypeError for a name that is not a field and ValueError for a negative cost; nothing is added then.
        """
        names = {field.name for field in fields(self)}
        for name, cost in costs.items():
            if name not in names:
                raise TypeError(f"the ledger has no field {name!r}; it has {', '.join(sorted(names))}")
            if cost < 0:
                raise ValueError(f"a cost cannot be negative: {name}={cost}")
        for name, cost in costs.items():
            setattr(self, name, getattr(self, name) + cost)

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger.merge([self, other])

    @classmethod
    def merge(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """A new ledger that holds the sums; the empty sum is all zeros."""
        total = cls()
        for ledger in ledgers:
            total.add(**{field.name: getattr(ledger, field.name) for field in fields(ledger)})
        return total
