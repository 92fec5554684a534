"""Text that every Python brings along: the standard library's sources (code) and pydoc's topics (English prose).

The same for one Python version, so `fingerprint` belongs beside every number made from it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SPLITS = {"train": 80, "warmup": 10, "test": 10}  # percent of the modules
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """name: the file below the library's folder, or the topic. module: top-level module, the unit of splitting."""

    name: str
    module: str
    text: str


@functools.cache
def _library() -> tuple[Document, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if LEFT_OUT & set(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue
        if text.strip():
            documents.append(Document("/".join(parts), parts[0].removesuffix(".py"), text))
    if not documents:
        raise FileNotFoundError(f"no sources of the standard library in {root}: install Python with its library")
    return tuple(documents)


def stdlib_sources(split: str) -> list[Document]:
    """The standard library's modules of one split ('train', 'warmup' or 'test'), sorted by name.

    A top-level module, packages with all their files, is in one split, by a hash of its name. Tests, generated tables
    and installed packages are left out. Raises ValueError for another split.
    """
    _check(split)
    return [document for document in _library() if _split_of(document.module) == split]


def pydoc_topics(split: str) -> list[Document]:
    """The help topics of pydoc (the language reference), as prose, split like the sources by a hash of the topic."""
    _check(split)
    from pydoc_data.topics import topics

    documents = [Document(name, name, topics[name]) for name in sorted(topics)]
    return [document for document in documents if _split_of(document.module) == split]


def fingerprint() -> dict[str, str]:
    """Python version and a sha256 over names and texts of all sources, for provenance."""
    digest = hashlib.sha256()
    for document in _library():
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return {"python": sys.version.split()[0], "stdlib_sha256": digest.hexdigest()}


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")


def _split_of(name: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    for split, share in SPLITS.items():
        bucket -= share
        if bucket < 0:
            return split
    raise AssertionError("the shares of SPLITS do not sum to 100")
