"""Executes notebooks: the `notebook` stage of a paper, `make notebooks`, and the root's stage `start_here`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 300_000


def stage(cfg: DictConfig) -> None:
    """The built-in stage `notebook`: executes notebooks/<slug>.ipynb on this profile's results into cfg.out."""
    source = ROOT / "notebooks" / f"{cfg.slug}.ipynb"
    execute(source, Path(cfg.out) / "notebook.ipynb", {"profile": cfg.profile, "seed": cfg.seed}, root=Path(cfg.root))


def execute(source: Path, target: Path, parameters: dict[str, Any], root: Path = ROOT) -> None:
    """Runs source top to bottom in a fresh kernel and writes the cleaned copy to target.

    root: where the notebook finds results/ and artifacts/. Raises papermill's PapermillExecutionError for a failing
    cell and ValueError for a result above MAX_BYTES or without a cell tagged `parameters`.
    """

    import nbformat
    import papermill

    notebook = nbformat.read(source, as_version=4)
    if not any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        raise ValueError(f"{source} has no cell tagged 'parameters'")
    partial = target.with_name(f"{target.stem}.partial.ipynb")
    os.environ["FRUGAL_ROOT"] = str(root.resolve())
    papermill.execute_notebook(
        str(source), str(partial), parameters=parameters, kernel_name="python3", cwd=str(ROOT), progress_bar=False,
        record_timing=False, extra_arguments=["--IPKernelApp.log_level=40"],
    )  # fmt: skip
    nbformat.write(clean(nbformat.read(partial, as_version=4)), partial)
    if (size := partial.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{source.name} takes {size} bytes with its outputs, the limit is {MAX_BYTES}")
    partial.replace(target)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drops what differs from run to run without being news: injected parameters, counts, times, metadata."""
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = None
                if "data" in output:
                    for key, value in output.data.items():
                        output.data[key] = re.sub(r"0x[0-9a-f]{8,}", "0x…", value) if isinstance(value, str) else value
    return notebook


def main() -> None:
    """`make notebooks` refreshes notebooks/*.ipynb in place; DVC's stage `start_here` writes a copy to a folder."""
    known = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
    parser = argparse.ArgumentParser(prog="python -m common.reporting.notebook", description=main.__doc__)
    parser.add_argument("names", nargs="*", help=f"default: all ({', '.join(known)})")
    parser.add_argument("--profile", default="cpu", help="whose results are shown; default: cpu")
    parser.add_argument("--out", type=Path, help="a folder for the executed copies; default: in place")
    args = parser.parse_args()
    for name in args.names or known:
        if name not in known:
            raise SystemExit(f"no notebook {name!r}; there are: {', '.join(known)}")
        source = ROOT / "notebooks" / f"{name}.ipynb"
        target = args.out / source.name if args.out else source
        target.parent.mkdir(parents=True, exist_ok=True)
        execute(source, target, {"profile": args.profile, "seed": 0})
        print(f"{os.path.relpath(target)}: {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
