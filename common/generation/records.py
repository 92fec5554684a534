"""One row a sample, in one schema for all papers: what every stage that samples from a model writes as parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Costs are of the sample alone: prompt_tokens read, output_tokens of the answer, discarded_tokens that were made for it
# and thrown away; forwards, flops and seconds of the batch are shared out evenly among its samples.
SCHEMA: dict[str, str] = {
    "paper": "string", "arm": "string", "profile": "string", "seed": "int64", "task": "string", "problem_id": "int64",
    "sample_id": "int64", "difficulty": "int64", "prompt_tokens": "int64", "output_tokens": "int64",
    "discarded_tokens": "int64", "forwards": "float64", "flops": "float64", "seconds": "float64", "answer": "string",
    "correct": "bool", "score": "float64",
}  # fmt: skip


def frame(rows: Iterable[Mapping[str, Any]], **common: Any) -> pd.DataFrame:
    """Rows with the columns of SCHEMA in its types; `common` gives the columns that are the same in every row.

    A missing score or answer is null. Raises ValueError for a column that is missing or unknown.
    """
    import pandas as pd

    filled = [{"score": float("nan"), "answer": None} | dict(common) | dict(row) for row in rows]
    for row in filled[:1] + filled[-1:]:
        if wrong := set(row) ^ set(SCHEMA):
            raise ValueError(
                f"records lack or do not know {', '.join(sorted(wrong))}; the columns: {', '.join(SCHEMA)}"
            )
    return pd.DataFrame(filled, columns=list(SCHEMA)).astype(SCHEMA)


def write(path: str | Path, records: pd.DataFrame) -> None:
    """Writes a frame of `frame` as parquet. Raises ValueError for other columns."""
    if list(records.columns) != list(SCHEMA):
        raise ValueError(f"{path}: columns {list(records.columns)} are not those of the schema")
    records.to_parquet(path, index=False)


def read(path: str | Path) -> pd.DataFrame:
    """The records of a file."""
    import pandas as pd

    return pd.read_parquet(path)
