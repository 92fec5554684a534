"""reported.yaml and verdicts: what a paper claims, what would confirm it, and what the measurement says.

Each claim states its parts before anything is measured: two arms, a unit, the null value or margin. A part compares a
95% interval with that bound; a compound claim needs every part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from common.metrics.intervals import Measured, units_to_settle

Verdict = Literal["reproduced", "not reproduced", "inconclusive", "not testable here"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "inconclusive", "not testable here")
Basis = Literal["same", "analogue"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Where a fact comes from. `secondary`: a page about the paper; `memory`: not seen while this was written;
    `recomputed`: by us, from the paper's formulas or released files, apart from the code under test."""

    kind: Literal["paper", "code", "secondary", "memory", "recomputed"]
    where: str


class Part(Strict):
    """One comparison of a claim, written down before measuring.

    kind: greater / less (than bound), within (bound = [lo, hi]), exact (equal to bound up to tolerance).
    """

    name: str
    unit: str
    kind: Literal["greater", "less", "within", "exact"]
    bound: float | tuple[float, float]
    arms: tuple[str, ...] = ()
    tolerance: float = 0.0
    why: str = ""

    @model_validator(mode="after")
    def _bound_fits_kind(self) -> Part:
        if (self.kind == "within") != isinstance(self.bound, tuple):
            raise ValueError(f"part {self.name!r}: kind {self.kind} does not go with bound {self.bound}")
        if isinstance(self.bound, tuple) and not self.bound[0] < self.bound[1]:
            raise ValueError(f"part {self.name!r}: empty margin {self.bound}")
        return self


class Claim(Strict):
    id: str
    text: str
    source: Source
    basis: Basis
    reported: Any = None
    unit: str = ""
    scale: str = ""
    parts: tuple[Part, ...] = ()


class Table(Strict):
    """A table as it was reported. constants: of the paper or its code, which are in use here and need no regenerating;
    they are shown and count as nothing."""

    id: str
    title: str
    source: Source
    basis: Basis
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    regenerate: str = ""
    constants: bool = False

    @model_validator(mode="after")
    def _rows_fit_columns(self) -> Table:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.id}: row {i} has {len(row)} cells, the table {len(self.columns)} columns"
                )
        return self


class Reported(Strict):
    """A paper's reported.yaml."""

    slug: str
    title: str
    arxiv: str
    year: int
    authors_short: str
    venue: str = ""
    code: str = ""
    code_note: str = ""
    license_of_code: str = ""
    models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    tables_not_seen: tuple[str, ...] = ()

    @field_validator("claims", "tables")
    @classmethod
    def _ids_differ(cls, items: tuple[Claim | Table, ...]) -> tuple[Claim | Table, ...]:
        ids = [item.id for item in items]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"duplicate id {', '.join(twice)}")
        return items


def load(path: Path) -> Reported:
    """Reads and validates a reported.yaml. Raises ValueError that names file, entry and what is wrong with it."""
    content = yaml.safe_load(path.read_text())
    try:
        return Reported.model_validate(content)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place: Any = content
            names = []
            for key in item["loc"]:
                place = place[key] if _has(place, key) else None
                label = place.get("id") or place.get("name") if isinstance(place, dict) else None
                names.append(f"{key} ({label})" if label else str(key))
            lines.append(f"  {' > '.join(names) or 'top level'}: {item['msg']}")
        raise ValueError(f"{path} is not valid:\n" + "\n".join(lines)) from None


def _has(place: Any, key: Any) -> bool:
    if isinstance(place, list):
        return isinstance(key, int) and key < len(place)
    return isinstance(place, dict) and key in place


def judge_part(part: Part, measured: Measured) -> tuple[Verdict, str]:
    """The verdict of one part and, when inconclusive, how many units would settle it."""
    low, high, bound = measured.low, measured.high, part.bound
    if isinstance(bound, tuple):
        if bound[0] <= low and high <= bound[1]:
            return "reproduced", ""
        if high < bound[0] or low > bound[1]:
            return "not reproduced", ""
        nearest = min(bound, key=lambda b: abs(b - measured.value))
        return "inconclusive", _more(measured, nearest)
    if part.kind == "exact":
        return ("reproduced" if abs(measured.value - bound) <= part.tolerance else "not reproduced"), ""
    if part.kind == "less":
        reproduced, failed = high < bound, low >= bound
    else:
        reproduced, failed = low > bound, high <= bound
    if reproduced:
        return "reproduced", ""
    if failed:
        return "not reproduced", ""
    return "inconclusive", _more(measured, bound)


def _more(measured: Measured, bound: float) -> str:
    needed = units_to_settle(measured, bound)
    if needed is None:
        return "the value lies on the bound: no number of units settles it"
    return f"about {needed:,} units instead of {measured.n:,} would settle it, if the value stays"


def combine(verdicts: list[Verdict]) -> Verdict:
    """A compound claim: one failed part fails it, one open part leaves it open."""
    for verdict in ("not reproduced", "inconclusive"):
        if verdict in verdicts:
            return verdict
    return "reproduced"
