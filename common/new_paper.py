"""`make new-paper SLUG=my_paper`: scaffolds a paper's folder, its DVC stages and its notebook, ready to run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from common.run import ROOT, papers

TEMPLATES = Path(__file__).with_name("templates") / "paper"


def scaffold(slug: str, root: Path = ROOT) -> list[Path]:
    """Writes the files of a new paper below root and returns them.

    Raises ValueError for a slug that is no Python module name, FileExistsError if any of the files is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ValueError(f"SLUG={slug!r}: a slug is a Python module name in lower case, such as sparse_decoding")
    targets = {}
    for template in sorted(p for p in TEMPLATES.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        name = template.relative_to(TEMPLATES).as_posix().removesuffix(".template")
        target = root / ("notebooks" if name.endswith(".ipynb") else f"papers/{slug}") / name.replace("SLUG", slug)
        targets[target] = template.read_text().replace("SLUG", slug)
    taken = [str(path.relative_to(root)) for path in targets if path.exists()]
    if taken:
        raise FileExistsError(f"{slug} exists already: {', '.join(taken)}; choose another SLUG")
    for target, text in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return list(targets)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: make new-paper SLUG=my_paper; the papers so far: {', '.join(papers())}")
    try:
        written = scaffold(sys.argv[1])
    except (ValueError, FileExistsError) as error:
        raise SystemExit(str(error)) from None
    for path in written:
        print(path.relative_to(ROOT))
    print(f"Next: docs/adding_a_paper.md, then make reproduce PAPER={sys.argv[1]} PROFILE=smoke")


if __name__ == "__main__":
    main()
