"""A temporary clone of the working tree: pipeline tests run DVC and git there, never in the user's tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Clone:
    """A checkout of its own with its own DVC cache; commands run with the tests' Python."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, without what would tie the clone to the tests' own process or data."""
        ties = ("DVC_", "PYTEST_", "FRUGAL_", "MAKE", "MFLAGS")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ties)}
        return kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(self.root.parent / "dvc-site"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
            "COLUMNS": "120",
        }  # fmt: skip

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, *words, check=check)

    def dvc(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "dvc", *words, check=check)

    def git(self, *words: str) -> str:
        return self.run("git", *words).stdout

    def reproduce(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "common.reproduce", *words, check=check)

    def make(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """make, with the tests' Python as the environment that it would set up."""
        complete = self.root / ".venv" / ".complete"
        if not complete.exists():
            complete.parent.mkdir()
            for part in Path(sys.prefix).iterdir():
                if part.name != complete.name:
                    (complete.parent / part.name).symlink_to(part)
            complete.touch()
        return self.run("make", *words, check=check)

    def results(self, profile: str = "smoke", slug: str = "demo") -> dict[str, bytes]:
        """The published files that must be the same from run to run."""
        folder = self.root / "results" / profile / slug
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("provenance.json", "REPORT.md")
        }

    def set_params(self, **values: object) -> None:
        path = self.root / "params.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def tree_files() -> list[str]:
    """What git would commit of the working tree; outside git (an unpacked archive), all but the ignored folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    ignored = {".venv", "artifacts", "runs", "data", ".checkpoints", "dvc_plots", "__pycache__"}
    paths = (path for path in ROOT.rglob("*") if path.is_file())
    return [str(p.relative_to(ROOT)) for p in paths if not ignored & {*p.relative_to(ROOT).parts}]


def copy_tree(target: Path) -> Path:
    """The working tree's files, without its papers' results."""
    for name in tree_files():
        if not name.startswith("results/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def with_demo_papers(root: Path, *slugs: str) -> None:
    """Leaves scaffolded papers as the only ones, and the report as the only stage of the root.

    The real papers and the shared models take minutes, and have tests of their own.
    """
    from common import new_paper

    for path in (root / "papers").glob("*/"):
        shutil.rmtree(path)
    (root / "dvc.lock").unlink(missing_ok=True)
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
    pipeline["stages"] = {"report": pipeline["stages"]["report"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    for slug in slugs:
        new_paper.scaffold(slug, root)


def commit(clone: Clone) -> Clone:
    clone.git("init", "-q", "-b", "main")
    clone.git("add", "-A")
    clone.git("commit", "-q", "-m", "all")
    return clone


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The working tree as it is, committed. For reading: tests that change something take `demo`."""
    return commit(Clone(copy_tree(tmp_path_factory.mktemp("clone") / "frugal")))


@pytest.fixture
def demo(tmp_path: Path) -> Clone:
    """A committed clone with the paper `demo` only, profile smoke, nothing run yet."""
    clone = Clone(copy_tree(tmp_path / "frugal"))
    with_demo_papers(clone.root, "demo")
    clone.set_params(profile="smoke")
    return commit(clone)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, str]:
    """A clone like `demo` after its first `make reproduce`, and what that printed. Only for copying from."""
    clone = Clone(copy_tree(tmp_path_factory.mktemp("finished") / "frugal"))
    with_demo_papers(clone.root, "demo")
    clone.set_params(profile="smoke")
    printed = commit(clone).reproduce().stdout
    clone.git("add", "-A")
    clone.git("commit", "-q", "-m", "locks")
    return clone, printed


@pytest.fixture
def finished(first_run: tuple[Clone, str], tmp_path: Path) -> Clone:
    """A copy of the clone in which everything has run."""
    return Clone(shutil.copytree(first_run[0].root, tmp_path / "frugal", symlinks=True))
