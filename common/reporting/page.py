"""The pages: REPORT.md of each paper, results/<profile>/REPORT.md, and the README's scoreboard."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from common.reporting.claims import VERDICTS, Reported, load

ROOT = Path(__file__).resolve().parents[2]
MARKS = {"reproduced": "🟢", "not reproduced": "🔴", "inconclusive": "🟡", "not testable here": "⚪"}
MAX_ROWS = 40  # longer tables are cut on the page; the CSV has all rows
START, END = "<!-- scoreboard: written by make report -->", "<!-- end of scoreboard -->"


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A GitHub table; numbers right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    rule = ["---:" if right else "---" for right in numeric]
    lines = [columns, rule, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return value in ("", None)
    return True


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if _is_number(text) and "." in text:
        text = f"{float(text):.6g}"
    return text.replace("|", "\\|").replace("\n", " ")


def _read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        columns, *rows = csv.reader(file)
    return columns, rows


def claims_table(claims: dict[str, Any], reported: Reported) -> str:
    """One row a part of a claim: reported beside measured, and the verdict."""
    rows = []
    for claim in reported.claims:
        judged = claims[claim.id]
        mark = f"{MARKS[judged['verdict']]} **{judged['verdict']}**"
        told = claim.reported if claim.reported is not None else "no number"
        told = ", ".join(map(str, told)) if isinstance(told, list | tuple) else told
        head = [f"**{claim.id}** {claim.text}", f"{told} {claim.unit}".strip(), claim.source.kind, judged["basis"]]
        if judged["verdict"] == "not testable here":
            rows.append([*head, judged["reason"], mark])
            continue
        told_parts = []
        for name, part in judged["measured"].items():
            interval = "" if part["low"] == part["high"] else f" [{part['low']:.4g}, {part['high']:.4g}], n={part['n']}"
            one = (
                f"{MARKS[part['verdict']]} {name}: {part['value']:.4g}{interval} {part['unit']} (needs {part['needs']})"
            )
            told_parts.append(one + (f". {part['detail']}" if part["detail"] else ""))
        rows.append([*head, "<br>".join(told_parts), mark])
    return markdown_table(["claim", "reported", "source", "basis", "measured", "verdict"], rows)


def paper_page(results: Path, reported: Reported) -> str:
    """The page of one paper from the files in `results`, its results folder."""
    claims = json.loads((results / "claims.json").read_text())
    provenance = json.loads((results / "provenance.json").read_text())
    tables = {table.id: table for table in reported.tables}
    lines = [
        f"# {reported.title}",
        "",
        f"{reported.authors_short}, {reported.venue or reported.year}, "
        f"[arXiv {reported.arxiv}](https://arxiv.org/abs/{reported.arxiv}).",
        "",
        _origin(provenance),
        *(f"\n{note}" for note in provenance["notes"]),
        "",
        "## Claims",
        "",
        claims_table(claims, reported),
        "",
        _chance(claims),
        "",
        "## Tables",
    ]
    for entry in provenance["contents"]["tables"]:
        columns, rows = _read_table(results / "tables" / f"{entry['id']}.csv")
        lines += ["", f"### {entry['id']}: {entry['title']}", ""]
        if entry["note"]:
            lines += [entry["note"], ""]
        if entry["id"] in tables:
            table = tables[entry["id"]]
            lines += [f"Reported ({table.source.kind}: {table.source.where}):", ""]
            lines += [markdown_table(list(table.columns), [list(row) for row in table.rows]), ""]
            used = "Constants, as they are in use here:"
            lines += [used if table.constants else f"Reproduced (basis: {table.basis}):", ""]
        lines += [markdown_table(columns, rows[:MAX_ROWS])]
        if len(rows) > MAX_ROWS:
            lines += ["", f"First {MAX_ROWS} of {len(rows)} rows; all are in `tables/{entry['id']}.csv`."]
        if entry["timing"]:
            lines += ["", f"Measured times, which differ from run to run: {', '.join(entry['timing'])}."]
    regenerated = {entry["id"] for entry in provenance["contents"]["tables"]}
    for table in reported.tables:
        if table.id not in regenerated:
            lines += [
                "",
                f"### {table.id}: {table.title}",
                "",
                f"Reported only ({table.source.kind}: {table.source.where}). {table.regenerate}",
                "",
            ]
            lines += [markdown_table(list(table.columns), [list(row) for row in table.rows])]
    if reported.tables_not_seen:
        lines += ["", "### Reported values not obtained", "", *(f"- {item}" for item in reported.tables_not_seen)]
    lines += ["", "## Figures"]
    for entry in provenance["contents"]["figures"]:
        lines += [
            "",
            f"![{entry['title']}](figures/{entry['id']}.svg)",
            "",
            f"**{entry['title']}.** {entry['caption']}",
        ]
    return "\n".join(lines) + "\n"


def _origin(provenance: dict[str, Any]) -> str:
    git = provenance["git"]
    sources = [f"{s['name']} ({s['origin']})" for s in provenance["sources"]] or ["generated by the project itself"]
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in provenance["seconds"].items())
    return (
        f"Profile `{provenance['profile']}`, seed {provenance['seed']}, device {provenance['device']}, "
        f"{provenance['machine']['cpu']} ({provenance['machine']['threads']} threads), "
        f"torch {provenance['versions']['torch']}, commit `{git['commit'][:12]}`"
        f"{' with local changes' if git['dirty'] else ''}. Data: {', '.join(sources)}. "
        f"Stages: {seconds or 'not timed'}."
    )


def interval_parts(claims: dict[str, Any]) -> int:
    """How many parts were judged by an interval rather than exactly."""
    return sum(
        part["low"] != part["high"]
        for claim in claims.values()
        if claim["verdict"] != "not testable here"
        for part in claim["measured"].values()
    )


def _chance(claims: dict[str, Any]) -> str:
    n = interval_parts(claims)
    return (
        f"{n} comparisons were judged by a 95% interval; if all their null values were true, "
        f"chance alone would call {0.025 * n:.1f} of them reproduced."
    )


def scoreboard_rows(results: Path) -> list[dict[str, Any]]:
    """One row a paper below results/<profile>: counts of verdicts by basis, tables regenerated, seconds."""
    rows = []
    for path in sorted(results.glob("*/claims.json")):
        claims = json.loads(path.read_text()).values()
        provenance = json.loads((path.parent / "provenance.json").read_text())
        counts = {
            verdict: {
                basis: sum(c["verdict"] == verdict and c["basis"] == basis for c in claims)
                for basis in ("same", "analogue")
            }
            for verdict in VERDICTS
        }
        reported = load(ROOT / "papers" / path.parent.name / "reported.yaml")
        told = {table.id for table in reported.tables if not table.constants}
        regenerated = sum(entry["id"] in told for entry in provenance["contents"]["tables"])
        rows.append(
            {
                "paper": path.parent.name,
                "title": reported.title,
                "counts": counts,
                "tables": f"{regenerated}/{len(told)}",
                "seconds": sum(provenance["seconds"].values()),
                "substitutes": any(s["origin"] == "embedded" and s["sha256"] is None for s in provenance["sources"]),
                "intervals": interval_parts(json.loads(path.read_text())),
            }
        )
    return rows


def scoreboard(results: Path, link: str) -> str:
    """The table of verdicts. A cell reads `same + analogue`: judged on the paper's own quantity, and on a stand-in."""
    rows = []
    for row in scoreboard_rows(results):
        cells = [
            f"{c['same']} + {c['analogue']}" if c["same"] or c["analogue"] else "0" for c in row["counts"].values()
        ]
        rows.append(
            [f"[{row['paper']}]({link.format(slug=row['paper'])})", *cells, row["tables"], f"{row['seconds']:.0f}"]
        )
    columns = ["paper", *(f"{MARKS[v]} {v}" for v in VERDICTS), "tables regenerated", "seconds"]
    return markdown_table(columns, rows)


def profile_page(results: Path) -> str:
    """results/<profile>/REPORT.md: the scoreboard, what the words mean, and every claim that was not reproduced."""
    rows = scoreboard_rows(results)
    intervals = sum(row["intervals"] for row in rows)
    lines = [
        f"# Report: profile `{results.name}`",
        "",
        scoreboard(results, "{slug}/REPORT.md"),
        "",
        "A cell reads *same + analogue*: claims judged on the paper's own quantity (a closed form, its simulator, "
        "public records, its checkpoints and data), plus claims judged in direction only, on a small stand-in. "
        "Seconds are the wall time of the paper's own stages.",
        "",
        f"{intervals} comparisons were judged by a 95% interval; chance alone would call {0.025 * intervals:.1f} "
        "of them reproduced.",
        "",
        "## Claims that did not replicate, or were left open",
    ]
    for row in rows:
        claims = json.loads((results / row["paper"] / "claims.json").read_text())
        open_claims = {k: c for k, c in claims.items() if c["verdict"] != "reproduced"}
        if not open_claims:
            continue
        lines += ["", f"### [{row['paper']}]({row['paper']}/REPORT.md): {row['title']}", ""]
        for id_, claim in open_claims.items():
            parts = [
                f"{n}: {p['value']:.4g} {p['unit']} (needs {p['needs']})"
                for n, p in claim["measured"].items()
                if p["verdict"] != "reproduced"
            ]
            lines.append(
                f"- {MARKS[claim['verdict']]} **{id_}** {claim['text']} — {claim.get('reason') or '; '.join(parts)}"
            )
    return "\n".join(lines) + "\n"


def build(profile: str) -> Path:
    """Rewrites every page of a profile from the results on disk; returns the path of the profile's page."""
    results = ROOT / "results" / profile
    for path in sorted(results.glob("*/claims.json")):
        reported = load(ROOT / "papers" / path.parent.name / "reported.yaml")
        _write(path.parent / "REPORT.md", paper_page(path.parent, reported))
    _write(results / "REPORT.md", profile_page(results))
    return results / "REPORT.md"


def update_readme(readme: Path, profile: str = "cpu") -> None:
    """Replaces the scoreboard between the README's markers. Raises ValueError if a marker is missing."""
    text = readme.read_text()
    if START not in text or END not in text:
        raise ValueError(f"{readme} lacks the markers {START!r} and {END!r}")
    head, rest = text.split(START)
    table = scoreboard(ROOT / "results" / profile, f"results/{profile}/{{slug}}/REPORT.md")
    _write(readme, f"{head}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
