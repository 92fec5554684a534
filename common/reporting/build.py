"""Builds the pages. `make report`: all profiles, the README's scoreboard and picture; DVC's stage: one profile."""

from __future__ import annotations

import argparse
import csv

from common.reporting import overview, page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.reporting.build", description=__doc__)
    parser.add_argument("--profile", help="only this profile; also writes artifacts/<profile>/report/scoreboard.csv")
    profile = parser.parse_args().profile
    if profile:
        print(page.build(profile).relative_to(page.ROOT))
        out = page.ROOT / "artifacts" / profile / "report"
        out.mkdir(parents=True, exist_ok=True)
        with (out / "scoreboard.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["paper", "verdict", "basis", "claims"])
            for row in page.scoreboard_rows(page.ROOT / "results" / profile):
                for verdict, counts in row["counts"].items():
                    writer.writerows([row["paper"], verdict, basis, n] for basis, n in counts.items())
        return
    for results in sorted((page.ROOT / "results").glob("*/")):
        if any(results.glob("*/claims.json")):
            print(page.build(results.name).relative_to(page.ROOT))
    page.update_readme(page.ROOT / "README.md")
    print("README.md")
    if any((page.ROOT / "results" / "cpu").glob("*/claims.json")):
        print(overview.write(page.ROOT).relative_to(page.ROOT))


if __name__ == "__main__":
    main()
