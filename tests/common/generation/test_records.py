import pandas as pd
import pytest

from common.generation import records

ROW = {
    "sample_id": 0, "difficulty": 4, "prompt_tokens": 9, "output_tokens": 30, "discarded_tokens": 0, "forwards": 2.5,
    "flops": 1e6, "seconds": 0.1, "answer": "7", "correct": True, "problem_id": 3,
}  # fmt: skip
COMMON = {"paper": "demo", "arm": "greedy", "profile": "smoke", "seed": 0, "task": "chain"}


def test_round_trip(tmp_path):
    frame = records.frame([ROW, ROW | {"sample_id": 1, "answer": None, "score": 0.5}], **COMMON)
    records.write(tmp_path / "r.parquet", frame)
    again = records.read(tmp_path / "r.parquet")
    assert list(again.columns) == list(records.SCHEMA)
    assert again["score"].isna().tolist() == [True, False]
    assert pd.isna(again["answer"][1])
    assert again["correct"].dtype == bool


def test_other_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="correct"):
        records.frame([{k: v for k, v in ROW.items() if k != "correct"}], **COMMON)
    with pytest.raises(ValueError, match="extra"):
        records.frame([ROW | {"extra": 1}], **COMMON)
    with pytest.raises(ValueError, match="not those of the schema"):
        records.write(tmp_path / "r.parquet", pd.DataFrame({"a": [1]}))
