"""One figure style for the whole project: colour-blind safe, readable in print, the same in SVG and PNG."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): distinguishable under the common colour-vision deficiencies; black first is kept for baselines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
VERDICT_COLOURS = {
    "reproduced": "#009E73",
    "not reproduced": "#D55E00",
    "inconclusive": "#E69F00",
    "not testable here": "#999999",
}
DPI = 200  # of a PNG
WIDTH = 7.0  # inches: the text width of a page and of a notebook cell


def use_theme() -> None:
    """Sets the project's seaborn theme; call before the first figure."""
    import matplotlib
    import seaborn as sns

    if "inline" not in matplotlib.get_backend():
        matplotlib.use("agg")
    sns.set_theme(
        context="paper",
        style="ticks",
        palette=COLOURS,
        font_scale=1.1,
        rc={
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.figsize": (WIDTH, 3.4),
            "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
            "grid.alpha": 0.35,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "svg.hashsalt": "frugal",  # element ids of an SVG must not change from run to run
        },
    )


def palette(names: list[str]) -> dict[str, str]:
    """A fixed colour for each name in order; raises ValueError beyond the colours that stay distinguishable."""
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} series in one figure, {len(COLOURS)} are distinguishable: split the figure")
    return dict(zip(names, COLOURS, strict=False))


def save(fig: Figure, stem: Path) -> None:
    """Writes stem.svg and stem.png (200 dpi) without a date, so that an unchanged figure is an unchanged file.

    The PNG has a palette of 256 colours: about a third of the size, since a figure has few colours and their edges.
    """
    import matplotlib.pyplot as plt
    from PIL import Image

    stem.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    drawn = BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI)
    # kmeans moves each colour to the middle of the pixels that have it: without it a colour bar shows foreign hues.
    image = Image.open(drawn).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    image.save(stem.with_suffix(".png"), optimize=True, dpi=(DPI, DPI))
    plt.close(fig)
