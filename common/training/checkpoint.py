"""Where a training run keeps its checkpoints: a folder for each combination of settings, code and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CODE = ("models", "tasks", "training", "data")  # subpackages of common that decide what a run computes


def checkpoint_folder(root: str | Path, name: str, settings: Any, inputs: Sequence[str | Path] = ()) -> Path:
    """root/name-<hash>: the same only for equal settings (JSON values), code (see CODE) and input files or folders.

    Raises FileNotFoundError for an input that does not exist.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    common = Path(__file__).resolve().parents[1]
    for folder in [*(common / name for name in CODE), *map(Path, inputs)]:
        if not folder.exists():
            raise FileNotFoundError(f"training input {folder} does not exist")
        files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            if path.suffix != ".pyc":
                digest.update(path.name.encode() + path.read_bytes())
    return Path(root) / f"{name}-{digest.hexdigest()[:16]}"
