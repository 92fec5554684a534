"""What a paper's `figures` stage calls: collect tables, figures and measurements, judge the claims, write results."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.metrics.intervals import Measured
from common.reporting import claims as claims_module
from common.reporting import page, provenance, style
from common.reporting.claims import Claim, Verdict, combine, judge_part, load

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from omegaconf import DictConfig

DIGITS = 9  # significant digits kept in CSV and JSON: more than any reader needs, fewer than summation order disturbs


def round_significant(value: Any) -> Any:
    """A float to DIGITS significant digits; anything else unchanged."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


class Report:
    """The results of one paper under one profile: `table`, `figure`, `measure`, `not_testable`, then `finish`.

    Nothing reaches the results folder before `finish`; the runner then renames the whole folder's content into place.
    """

    def __init__(self, cfg: DictConfig) -> None:
        style.use_theme()
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.reported = load(Path(cfg.paper) / "reported.yaml")
        self._claims = {claim.id: claim for claim in self.reported.claims}
        self._measured: dict[str, dict[str, dict[str, Any]]] = {}
        self._basis: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._contents: dict[str, list[dict[str, Any]]] = {"tables": [], "figures": []}
        self._metrics: dict[str, float] = {}
        self._notes: list[str] = []
        self._start = time.perf_counter()

    def table(
        self, id: str, frame: pd.DataFrame, title: str = "", note: str = "", timing: tuple[str, ...] | list[str] = ()
    ) -> None:
        """Writes tables/<id>.csv. An id of reported.yaml marks that table as regenerated; its title comes from there.

        timing: columns that hold measured times, which differ from run to run.
        """
        missing = [column for column in timing if column not in frame.columns]
        if missing:
            raise KeyError(f"table {id}: timing names {missing}, the columns are {list(frame.columns)}")
        known = {table.id: table.title for table in self.reported.tables}
        path = self.out / "tables" / f"{id}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.map(round_significant).to_csv(path, index=False)
        self._contents["tables"].append(
            {
                "id": id,
                "title": title or known.get(id, id),
                "note": note,
                "timing": list(timing),
                "reported": id in known,
            }
        )

    def figure(self, id: str, fig: Figure, title: str, caption: str = "") -> None:
        """Writes figures/<id>.svg and .png and closes the figure."""
        style.save(fig, self.out / "figures" / id)
        self._contents["figures"].append({"id": id, "title": title, "caption": caption})

    def measure(self, claim_id: str, part: str, measured: Measured, detail: str = "", basis: str | None = None) -> None:
        """The measurement of one declared part. basis: `analogue` when a substitute stood in for the claim's input."""
        claim = self._claim(claim_id)
        names = [p.name for p in claim.parts]
        if part not in names:
            raise KeyError(f"claim {claim_id} declares no part {part!r}; it has: {', '.join(names) or 'none'}")
        spec = claim.parts[names.index(part)]
        verdict, missing = judge_part(spec, measured)
        self._measured.setdefault(claim_id, {})[part] = {
            "value": round_significant(measured.value),
            "low": round_significant(measured.low),
            "high": round_significant(measured.high),
            "n": measured.n,
            "unit": spec.unit,
            "needs": f"{spec.kind} {list(spec.bound) if isinstance(spec.bound, tuple) else spec.bound}",
            "verdict": verdict,
            "detail": "; ".join(text for text in (detail, missing) if text),
        }
        if basis is not None:
            if basis not in ("same", "analogue"):
                raise ValueError(f"claim {claim_id}: basis {basis!r} is neither 'same' nor 'analogue'")
            if basis == "analogue":
                self._basis[claim_id] = basis

    def not_testable(self, claim_id: str, reason: str) -> None:
        """The claim cannot be judged here: a missed gate, no data, no hardware, or the budget. The reason is shown."""
        self._claim(claim_id)
        if not reason:
            raise ValueError(f"claim {claim_id}: a claim that is not testable needs a reason")
        self._reasons[claim_id] = reason

    def metric(self, name: str, value: float) -> None:
        """A number for `dvc metrics show` and the scoreboard, beside the claims."""
        self._metrics[name] = round_significant(float(value))

    def note(self, text: str) -> None:
        """A sentence for the head of the page, such as which data were used."""
        self._notes.append(text)

    def finish(self) -> None:
        """Judges every claim and writes claims.json, metrics.json, provenance.json and REPORT.md.

        Raises ValueError, before writing, for a claim with neither a reason nor a measurement of each of its parts.
        """
        lacking = []
        for claim in self._claims.values():
            if claim.id not in self._reasons:
                absent = [p.name for p in claim.parts if p.name not in self._measured.get(claim.id, {})]
                if absent or not claim.parts:
                    lacking.append(f"{claim.id} ({', '.join(absent) or 'declares no parts'})")
        if lacking:
            raise ValueError(f"claims without a measurement or a reason: {'; '.join(lacking)}")
        judged = {claim.id: self._judged(claim) for claim in self._claims.values()}
        counts = {verdict: sum(c["verdict"] == verdict for c in judged.values()) for verdict in claims_module.VERDICTS}
        metrics = {f"claims {verdict}": counts[verdict] for verdict in claims_module.VERDICTS} | self._metrics
        for folder in ("tables", "figures"):  # also of a run whose gates leave nothing to show: they are outputs of DVC
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        write_json(self.out / "claims.json", judged)
        write_json(self.out / "metrics.json", metrics)
        origin = provenance.collect(self.cfg)
        origin["seconds"]["figures"] = round(time.perf_counter() - self._start, 1)
        write_json(self.out / "provenance.json", origin | {"notes": self._notes, "contents": self._contents})
        (self.out / "REPORT.md").write_text(page.paper_page(self.out, self.reported))

    def _claim(self, claim_id: str) -> Claim:
        if claim_id not in self._claims:
            raise KeyError(f"no claim {claim_id!r} in reported.yaml; it has: {', '.join(self._claims)}")
        return self._claims[claim_id]

    def _judged(self, claim: Claim) -> dict[str, Any]:
        parts = self._measured.get(claim.id, {})
        entry: dict[str, Any] = {"text": claim.text, "basis": self._basis.get(claim.id, claim.basis)}
        if claim.id in self._reasons:
            return entry | {"verdict": "not testable here", "reason": self._reasons[claim.id], "measured": parts}
        verdicts: list[Verdict] = [part["verdict"] for part in parts.values()]
        return entry | {"verdict": combine(verdicts), "measured": parts}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with a final newline, written to a temporary name and renamed."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
