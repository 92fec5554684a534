"""The cluster designs of the paper's plots (table t6 of reported.yaml), at a fraction of their size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.reporting.claims import load
from common.serving import catalogue

SPLIT = {  # prompt machine, token machine
    "AA": ("dgx-a100", "dgx-a100"),
    "HH": ("dgx-h100", "dgx-h100"),
    "HA": ("dgx-h100", "dgx-a100"),
    "HHcap": ("dgx-h100", "dgx-h100-pcap"),
}
BASELINES = {"Baseline-A100": "dgx-a100", "Baseline-H100": "dgx-h100"}
NAMES = (*BASELINES, *(f"Splitwise-{kind}" for kind in SPLIT))
STUDIES = ("iso-power conv", "iso-power code", "iso-cost conv", "iso-cost code", "iso-throughput code 130 req/s")


@dataclass(frozen=True)
class Design:
    """A cluster: its name in the paper, prompt machines and token machines (a baseline has no token machines)."""

    name: str
    prompt: int
    token: int = 0

    @property
    def pools(self) -> dict[str, Any]:
        """The arguments of `simulate` that say the cluster and its scheduler."""
        if self.name in BASELINES:
            return {"scheduler": "token_jsq", "machines": {BASELINES[self.name]: self.prompt}}
        prompt, token = SPLIT[self.name.removeprefix("Splitwise-")]
        counts = {"prompt_machines": {prompt: self.prompt}, "token_machines": {token: self.token}}
        return {"scheduler": "mixed_pool", **counts}

    @property
    def label(self) -> str:
        """'25P/15T', or '40' for a baseline."""
        return f"{self.prompt}P/{self.token}T" if self.token else str(self.prompt)

    @property
    def cost(self) -> float:
        return self._sum("cost")

    @property
    def power(self) -> float:
        return self._sum("power")

    def _sum(self, quantity: str) -> float:
        """Machines times their cost or power units (table t7)."""
        counts = [(BASELINES[self.name], self.prompt)] if self.name in BASELINES else list(
            zip(SPLIT[self.name.removeprefix("Splitwise-")], (self.prompt, self.token), strict=True)
        )  # fmt: skip
        return sum(count * float(getattr(catalogue.hardware(machine), quantity)) for machine, count in counts)


@cache
def published() -> dict[str, dict[str, Design]]:
    """{study: {design name: design}} at full scale, from table t6."""
    reported = load(Path(__file__).with_name("reported.yaml"))
    rows = next(table for table in reported.tables if table.id == "t6").rows
    designs: dict[str, dict[str, Design]] = {}
    for study, a100, h100, *splits in rows:
        found = {"Baseline-A100": Design("Baseline-A100", a100), "Baseline-H100": Design("Baseline-H100", h100)}
        for kind, text in zip(SPLIT, splits, strict=True):
            prompt, token = map(int, text.split("/"))
            found[f"Splitwise-{kind}"] = Design(f"Splitwise-{kind}", prompt, token)
        designs[study] = found
    return designs


def scaled(study: str, scale: int) -> dict[str, Design]:
    """The designs of a study with every pool divided by `scale` and rounded, one machine at least."""
    return {
        name: Design(name, _share(design.prompt, scale), _share(design.token, scale))
        for name, design in published()[study].items()
    }


def _share(count: int, scale: int) -> int:
    return max(1, int(count / scale + 0.5)) if count else 0


def counts_at_equal(resource: str, machines: int = 40) -> list[int]:
    """Machines that the power or cost of the H100s left over buys when n = 0, 5, ..., 40 of 40 are kept (table t7).

    resource: 'power' or 'cost' (A100s), or 'hhcap' (power-capped H100s).
    """
    full, other = catalogue.hardware("dgx-h100"), "dgx-h100-pcap" if resource == "hhcap" else "dgx-a100"
    quantity = "cost" if resource == "cost" else "power"
    per_h100, per_other = getattr(full, quantity), getattr(catalogue.hardware(other), quantity)
    return [int(per_h100 * (machines - n) // per_other) for n in range(0, machines + 1, 5)]
