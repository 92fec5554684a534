"""What notebooks show: verdicts, reported beside reproduced tables, and figures, read from a profile's results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.reporting.claims import VERDICTS, Table, load
from common.reporting.style import VERDICT_COLOURS

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image, Markdown
    from pandas.io.formats.style import Styler

ROOT = Path(__file__).resolve().parents[2]


def root() -> Path:
    """The folder that holds results/ and artifacts/: the checkout, unless FRUGAL_ROOT names another."""
    return Path(os.environ.get("FRUGAL_ROOT", ROOT))


def artifacts(slug: str, profile: str) -> Path:
    """artifacts/<profile>/<slug>. Raises FileNotFoundError with the command that makes it."""
    return _existing(root() / "artifacts" / profile / slug, slug, profile)


def _existing(path: Path, slug: str, profile: str) -> Path:
    if not path.exists():
        command = f"make reproduce{'' if slug == 'shared' else f' PAPER={slug}'} PROFILE={profile}"
        raise FileNotFoundError(f"{path} does not exist yet; run: {command}")
    return path


def _results(slug: str, profile: str) -> Path:
    return _existing(root() / "results" / profile / slug, slug, profile)


def papers(profile: str = "cpu") -> Styler:
    """A map of the papers: title, year and how many claims have which verdict; also of a paper without results."""
    import pandas as pd

    rows = []
    for path in sorted((ROOT / "papers").glob("*/reported.yaml")):
        paper = load(path)
        judged = root() / "results" / profile / paper.slug / "claims.json"
        verdicts = [c["verdict"] for c in json.loads(judged.read_text()).values()] if judged.exists() else []
        counts = {verdict: str(verdicts.count(verdict)) if verdicts else "–" for verdict in VERDICTS}
        told = {"paper": paper.slug, "title": paper.title, "year": str(paper.year), "claims": str(len(paper.claims))}
        rows.append(told | counts)
    columns = ["paper", "title", "year", "claims", *VERDICTS]
    style = pd.DataFrame(rows, columns=columns).style.hide(axis="index").set_uuid("papers")
    for verdict, colour in VERDICT_COLOURS.items():
        style = style.set_properties(subset=[verdict], **{"color": colour, "font-weight": "bold"})
    return style.set_properties(subset=["paper", "title"], **{"text-align": "left"})


def claims(slug: str, profile: str = "cpu") -> Styler:
    """Every claim with its verdict, coloured."""
    import pandas as pd

    judged = json.loads((_results(slug, profile) / "claims.json").read_text())
    frame = pd.DataFrame(
        [{"claim": f"{k}: {c['text']}", "basis": c["basis"], "verdict": c["verdict"]} for k, c in judged.items()]
    )
    return (
        frame.style.hide(axis="index")
        .set_uuid(f"{slug}-claims")
        .set_properties(**{"text-align": "left"})
        .map(
            lambda verdict: f"color: {VERDICT_COLOURS[verdict]}; font-weight: bold; white-space: nowrap",
            subset=["verdict"],
        )
    )


def measurements(slug: str, claim: str, profile: str = "cpu") -> pd.DataFrame:
    """The parts of one claim: value, 95% interval, units, what was needed, verdict."""
    import pandas as pd

    judged = json.loads((_results(slug, profile) / "claims.json").read_text())[claim]
    return pd.DataFrame([{"part": name} | part for name, part in judged["measured"].items()])


def table(slug: str, id: str, profile: str = "cpu") -> pd.DataFrame:
    """A reproduced table."""
    import pandas as pd

    return pd.read_csv(_results(slug, profile) / "tables" / f"{id}.csv")


def reported(slug: str, id: str) -> pd.DataFrame:
    """A table as the paper (or its code) reports it."""
    import pandas as pd

    tables: dict[str, Table] = {t.id: t for t in load(ROOT / "papers" / slug / "reported.yaml").tables}
    if id not in tables:
        raise KeyError(f"{slug} reports no table {id!r}; it has: {', '.join(tables)}")
    return pd.DataFrame([list(row) for row in tables[id].rows], columns=list(tables[id].columns))


def figure(slug: str, id: str, profile: str = "cpu", width: int = 760) -> Image | Markdown:
    """A figure of the results, in a size that keeps a notebook small; a sentence where a gate left nothing to draw."""
    import io

    from IPython.display import Image, Markdown
    from PIL import Image as Pixels

    file = _results(slug, profile) / "figures" / f"{id}.png"
    if not file.exists():
        return Markdown(f"*(`{id}` was not drawn in profile `{profile}`; the verdicts say why.)*")
    with Pixels.open(file) as picture:
        scaled = picture.convert("RGB").resize(
            (width, round(picture.height * width / picture.width)), Pixels.Resampling.LANCZOS
        )
        buffer = io.BytesIO()
        # k-means and no dithering: by median cut alone the colours of small marks turn grey.
        scaled.quantize(64, kmeans=1, dither=Pixels.Dither.NONE).save(buffer, "PNG", optimize=True)
    return Image(buffer.getvalue())
