"""`make bench`: runs every bench.py of the project and writes its tables to runs/bench/<module>/.

A bench.py stands beside the code that it measures, in common/<part>/, kernels/ or papers/<slug>/, and offers
`tables()`: a mapping from a table's name to its DataFrame. Each runs in a process of its own, so that none inherits
another's threads or memory. `python -m common.bench common.generation.bench` runs one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.reporting.provenance import cpu_name, git_state, versions

ROOT = Path(__file__).resolve().parents[1]


def found(root: Path = ROOT) -> list[str]:
    """The modules named bench in common's parts, in kernels and in the papers."""
    paths = [path for where in ("common/*", "kernels", "papers/*") for path in root.glob(f"{where}/bench.py")]
    return sorted(".".join(path.relative_to(root).with_suffix("").parts) for path in paths)


def run(name: str, out: Path) -> list[Path]:
    """Runs one bench module, prints its tables and writes them below out/<name>/, with provenance.json beside them.

    Raises AttributeError for a module without `tables`.
    """
    module = importlib.import_module(name)
    if not hasattr(module, "tables"):
        raise AttributeError(f"{name} has no function tables(); common/bench.py says what it should return")
    start = time.perf_counter()
    folder = out / name.removesuffix(".bench")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, frame in module.tables().items():
        print(f"\n{name}: {title}\n{frame.round(3).to_string(index=False)}", flush=True)
        path = folder / f"{title.replace(' ', '_')}.csv"
        frame.to_csv(path, index=False)
        written.append(path)
    (folder / "provenance.json").write_text(json.dumps(origin(time.perf_counter() - start), indent=2) + "\n")
    return written


def origin(seconds: float) -> dict[str, Any]:
    """What identifies a measurement: when, code, versions, machine, threads."""
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "git": git_state(),
        "versions": versions(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "torch_threads": threads},
    }


def main() -> None:
    known = found()
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    out = ROOT / "runs" / "bench"
    if len(sys.argv) == 2:
        run(sys.argv[1], out)
        return
    names = sys.argv[1:] or known
    failed = [n for n in names if subprocess.run([sys.executable, "-m", "common.bench", n], cwd=ROOT).returncode]
    print(f"\n{len(names) - len(failed)} of {len(names)} benchmarks done; tables: {out.relative_to(ROOT)}/")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
