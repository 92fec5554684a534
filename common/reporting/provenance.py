"""Where a result comes from: code, versions, machine, configuration, data, seconds."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numpy", "scipy", "pandas", "simpy", "hydra-core", "dvc")
# params.yaml is left out: its values are recorded themselves, and `make reproduce PROFILE=...` changes it for a run.
CODE = ("common", "kernels", "papers", "pyproject.toml", "constraints.txt")


def git_state() -> dict[str, Any]:
    """The commit, and whether code or configuration differ from it (results and lock files do not count)."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *CODE, ":(exclude)papers/*/dvc.lock")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "none (not a git checkout)", "dirty": True}


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def stage_seconds(artifacts: Path) -> dict[str, float]:
    """Wall seconds of the last run of each of a paper's stages; artifacts = artifacts/<profile>/<slug>."""
    folder = artifacts.parent / "seconds"
    prefix = f"{artifacts.name}."
    return {
        path.name.removeprefix(prefix).removesuffix(".txt"): float(path.read_text())
        for path in sorted(folder.glob(f"{prefix}*.txt"))
    }


def collect(cfg: DictConfig) -> dict[str, Any]:
    """Everything that identifies a run of a paper: written beside its results as provenance.json."""
    import os

    artifacts = Path(cfg.artifacts)
    sources = artifacts / "data" / "sources.json"
    return {
        "paper": cfg.slug,
        "profile": cfg.profile,
        "seed": cfg.seed,
        "device": cfg.device,
        "git": git_state(),
        "versions": versions(),
        "machine": {
            "cpu": cpu_name(),
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.system(),
        },
        "sources": json.loads(sources.read_text()) if sources.exists() else [],
        "seconds": stage_seconds(artifacts),
    }
