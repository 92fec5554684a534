"""Shared by all tests: light threads, no network, no user settings."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def _two_workers_share_the_cores():
    """pytest runs in two workers: one torch thread each is faster than two that wait for each other."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def missing_outputs():
    """(slug, root) -> what the paper's dvc.yaml says that `figures` writes and a smoke run under root did not."""
    from pathlib import Path

    import yaml

    def missing(slug: str, root: Path) -> list[str]:
        stage = yaml.safe_load(Path("papers", slug, "dvc.yaml").read_text())["stages"]["figures"]
        entries = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        paths = [(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]
        paths = [path.replace("${item.profile}", "smoke") for path in paths]
        assert paths
        return [path for path in paths if not (root / path).exists()]

    return missing
