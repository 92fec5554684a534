"""Named source files: a mirror folder, the download folder, the public address, or a clear error.

A file is named by its path under the data root, e.g. `azure_llm/AzureLLMInferenceTrace_code.csv`. It is looked for in
the root (FRUGAL_DATA or the `data_root` of the config), then in `data/` of the checkout (earlier downloads), then at
its pinned public address if downloads are allowed. Every file is checked against its sha256 before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

CATALOGUE = Path(__file__).with_name("sources.yaml")
DOWNLOADS = Path(__file__).resolve().parents[2] / "data"
CONNECT_TIMEOUT_S = 5


class MissingSource(FileNotFoundError):
    """The file is in none of the places tried."""


class CorruptSource(ValueError):
    """The file's sha256 is not the pinned one."""


@dataclass(frozen=True)
class Located:
    """A source file that passed its checksum. origin: `mirror` (data root) or `public` (downloaded)."""

    name: str
    path: Path
    origin: str
    sha256: str


@cache
def catalogue() -> dict[str, dict]:
    """name -> {sha256, bytes, url, licence}: every file the project can read from outside itself."""
    return yaml.safe_load(CATALOGUE.read_text())


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(name: str, path: Path, origin: str) -> Located:
    expected, found = catalogue()[name]["sha256"], digest(path)
    if found != expected:
        raise CorruptSource(
            f"{path} is not the pinned {name}: sha256 expected {expected}, found {found}. "
            "Nothing of it was used; delete the file, or replace it by the original."
        )
    return Located(name, path, origin, found)


def locate(name: str, root: str | Path | None = None, network: bool = False) -> Located:
    """The verified file `name`.

    root: data root; None means the environment variable FRUGAL_DATA, if set. network: may download (once, to `data/`).
    Raises KeyError (unknown name), CorruptSource (wrong checksum), MissingSource (the places tried and the remedy).
    """
    if name not in catalogue():
        raise KeyError(f"unknown source {name!r}; known: {', '.join(sorted(catalogue()))}")
    root = root or os.environ.get("FRUGAL_DATA") or None
    tried = []
    if root is not None:
        if not Path(root).is_dir():
            raise MissingSource(f"the data root {str(root)!r} is not a folder; unset FRUGAL_DATA or correct it")
        path = Path(root) / name
        if path.is_file():
            return _verified(name, path, "mirror")
        tried.append(str(path))
    path = DOWNLOADS / name
    if path.is_file():
        return _verified(name, path, "public")
    tried.append(str(path))
    url = catalogue()[name]["url"]
    if network:
        try:
            download(name, path)
            return _verified(name, path, "public")
        except (
            urllib.error.URLError,
            OSError,
            CorruptSource,
        ) as error:  # a captive portal answers with a page of its own
            tried.append(f"{url} ({error})")
    raise MissingSource(f"{name} not found. Tried: {'; '.join(tried)}. To fetch it: make data SOURCE={name}")


def download(name: str, target: Path) -> None:
    """Fetches the public address of `name` to target: to a temporary name, verified, then renamed. Shows progress."""
    from rich.progress import wrap_file

    entry = catalogue()[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial.{os.getpid()}")
    try:
        with urllib.request.urlopen(entry["url"], timeout=CONNECT_TIMEOUT_S) as response:
            with wrap_file(response, total=entry["bytes"], description=name, transient=True) as body:
                partial.write_bytes(body.read(2 * entry["bytes"] + 1))
        _verified(name, partial, "public")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def offline_origin(name: str, root: str | Path | None = None) -> str:
    """Where `locate` would find the file without a network: `mirror`, `public` or `embedded` (nowhere)."""
    try:
        return locate(name, root).origin
    except (MissingSource, CorruptSource):
        return "embedded"


def record_sources(out: Path, used: Iterable[Located | str]) -> None:
    """Writes out/sources.json: what a data stage read. A string names an embedded substitute or generator."""
    rows = [
        {"name": item, "origin": "embedded", "sha256": None}
        if isinstance(item, str)
        else {"name": item.name, "origin": item.origin, "sha256": item.sha256}
        for item in used
    ]
    (Path(out) / "sources.json").write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    """`python -m common.data.sources [name ...]`: fetches the named sources (all, without a name) into `data/`."""
    import sys

    names = sys.argv[1:] or sorted(catalogue())
    failed = 0
    for name in names:
        try:
            found = locate(name, network=True)
            print(f"{name}: {found.origin}, {found.path}")
        except (MissingSource, CorruptSource, KeyError) as error:
            failed += 1
            print(error.args[0], file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
