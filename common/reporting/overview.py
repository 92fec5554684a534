"""The picture of the README: reported values against their reproduced counterparts, and the verdicts of every paper."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.reporting import style
from common.reporting.claims import VERDICTS, Table, load
from common.reporting.page import scoreboard_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACE = Path("docs") / "images" / "reported_and_reproduced"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pairs(table: Table, frame: pd.DataFrame) -> list[tuple[float, float]]:
    """(reported, reproduced) of the numeric columns that a reported table and its regenerated one share.

    Rows are matched by the columns that hold text, or by the first column of a table without text. A regenerated table
    that lacks one of these columns, or has several rows for one key, has no counterparts.
    """
    import pandas as pd

    told = pd.DataFrame(list(table.rows), columns=list(table.columns))
    keys = [c for c in told if not told[c].map(_number).all()] or [table.columns[0]]
    if not set(keys) <= set(frame.columns) or frame.duplicated(keys).any() or told.duplicated(keys).any():
        return []
    found = told.merge(frame.astype({k: told[k].dtype for k in keys}, errors="ignore"), on=keys, suffixes=("", "|own"))
    values = []
    for column in told.columns.difference(keys):
        own = f"{column}|own"
        if own in found and pd.api.types.is_numeric_dtype(found[own]):
            both = [(float(a), float(b)) for a, b in zip(found[column], found[own], strict=True)]
            values += [pair for pair in both if math.isfinite(pair[0]) and math.isfinite(pair[1])]
    return values


def collect(root: Path, profile: str) -> dict[str, list[tuple[float, float]]]:
    """Paper -> pairs of its tables on the paper's own quantities (basis `same`: others are not comparable in value).

    Constants, and tables that we recomputed beforehand and nobody reported, are left out.
    """
    import pandas as pd

    values: dict[str, list[tuple[float, float]]] = {}
    for path in sorted((root / "results" / profile).glob("*/provenance.json")):
        tables = {t.id: t for t in load(root / "papers" / path.parent.name / "reported.yaml").tables}
        listed = json.loads(path.read_text())["contents"]["tables"]
        own: list[tuple[float, float]] = []
        for entry in listed:
            table = tables.get(entry["id"])
            of_paper = table and table.source.kind != "recomputed" and not table.constants
            if table and of_paper and table.basis == "same":
                own += pairs(table, pd.read_csv(path.parent / "tables" / f"{entry['id']}.csv"))
        if own:
            values[path.parent.name] = own
    return values


def draw(root: Path, profile: str = "cpu") -> Figure:
    """Left: reported against reproduced values. Right: one row a paper, one tile a claim, coloured by verdict."""
    import matplotlib.pyplot as plt

    style.use_theme()
    rows = scoreboard_rows(root / "results" / profile)
    values = collect(root, profile)
    height = max(3.4, 1.4 + 0.26 * len(rows))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, height), width_ratios=[1, 1.35])
    _scatter(left, values)
    _tiles(right, rows)
    return fig


def _scatter(ax: Axes, values: dict[str, list[tuple[float, float]]]) -> None:
    shown = {slug: [(a, b) for a, b in own if a > 0 and b > 0] for slug, own in values.items()}  # of the log axes
    points = [point for own in shown.values() for point in own]
    few = len(shown) <= len(style.COLOURS)
    for (slug, own), colour in zip(shown.items(), style.COLOURS * len(shown), strict=False):
        x, y = zip(*own, strict=True) if own else ((), ())
        ax.plot(x, y, "o", ms=4, alpha=0.6, mec="none", color=colour if few else style.COLOURS[0], label=slug)
    if points:
        ends = [0.5 * min(map(min, points)), 2 * max(map(max, points))]
        ax.plot(ends, ends, color="black", lw=0.8, zorder=0)
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        every = [pair for own in values.values() for pair in own]
        close = sum(abs(b - a) <= 0.01 * abs(a) for a, b in every)
        ax.set_title(f"{close} of {len(every)} reproduced values\nlie within 1% of the reported ones", fontsize=10)
        if few:
            ax.legend(loc="upper left", handletextpad=0.2)
    else:
        ax.text(0.5, 0.5, "no table on the paper's\nown quantities yet", ha="center", transform=ax.transAxes)
    ax.set(xlabel="reported by the paper (own unit of each)", ylabel="reproduced here (same unit)")


def _tiles(ax: Axes, rows: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    for y, row in enumerate(rows):
        x = 0
        for verdict in VERDICTS:
            for basis in ("same", "analogue"):
                for _ in range(row["counts"][verdict][basis]):
                    hatch = "" if basis == "same" else "////"
                    colour = style.VERDICT_COLOURS[verdict]
                    ax.barh(y, 0.9, left=x, height=0.6, color=colour, hatch=hatch, edgecolor="white", lw=0)
                    x += 1
    ax.set_yticks(range(len(rows)), [row["paper"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set(xlabel="claims", title="Verdicts")
    ax.title.set_fontsize(10)
    ax.grid(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    marks = [Patch(color=style.VERDICT_COLOURS[verdict], label=verdict) for verdict in VERDICTS]
    marks.append(Patch(facecolor="0.6", hatch="////", edgecolor="white", label="on a small stand-in"))
    ax.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, columnspacing=1.0)


def write(root: Path, profile: str = "cpu") -> Path:
    """Writes docs/images/reported_and_reproduced.svg and .png below root; returns the path of the SVG."""
    fig = draw(root, profile)
    style.save(fig, root / PLACE)
    return (root / PLACE).with_suffix(".svg")
