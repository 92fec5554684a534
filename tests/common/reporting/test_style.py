import io

import numpy as np
import pytest

from common.reporting.style import COLOURS, save, use_theme


def drawing():
    """Lines of all colours and a colour bar, whose shades are far more than a palette holds."""
    import matplotlib.pyplot as plt

    use_theme()
    fig, ax = plt.subplots(figsize=(4, 2.5))
    for i, colour in enumerate(COLOURS):
        ax.plot([0, 1], [i, i + 0.3], color=colour, linewidth=4)
    fig.colorbar(ax.scatter(np.arange(5.0), np.arange(5.0), c=np.arange(5.0), cmap="cividis"))
    return fig


def test_a_png_has_a_palette_and_looks_like_the_figure(tmp_path):
    from PIL import Image

    plain = io.BytesIO()
    drawing().savefig(plain, format="png", dpi=200)
    save(drawing(), tmp_path / "figure")
    image = Image.open(tmp_path / "figure.png")
    assert image.mode == "P"
    assert "transparency" not in image.info
    assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    found = np.asarray(image.convert("RGB"), dtype=int)
    wanted = np.asarray(Image.open(plain).convert("RGB"), dtype=int)
    assert found.shape == wanted.shape
    differing = np.abs(found - wanted).max(-1)
    assert (differing > 16).mean() < 1e-3
    assert differing.mean() < 0.5
    assert (found[[0, -1], [0, -1]] == 255).all()
    for colour in COLOURS:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(found - rgb).max(-1) <= 2).sum() > 100, f"{colour} is not in the picture"
    assert (tmp_path / "figure.png").stat().st_size < len(plain.getvalue()) / 2


def test_an_unchanged_figure_is_an_unchanged_file(tmp_path):
    for name in ("once", "again"):
        save(drawing(), tmp_path / name / "figure")
    for suffix in ("png", "svg"):
        once, again = ((tmp_path / name / f"figure.{suffix}").read_bytes() for name in ("once", "again"))
        assert once == again
