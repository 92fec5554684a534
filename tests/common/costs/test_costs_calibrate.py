"""A machine's rates come out of its timings; what is spilled comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.costs.calibrate import calibrate, spill
from common.costs.catalogue import from_config
from common.costs.roofline import decode_seconds
from common.models.build import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_spilled_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = spill(tmp_path / "cache", cache)
    assert back.dtype == dtype
    assert torch.equal(back, cache)
    assert (tmp_path / "cache").stat().st_size == 0


def test_rates_are_work_over_median_seconds_and_serve_the_roofline(tmp_path: Path) -> None:
    machine, timings = calibrate(tmp_path, memory_bytes=2**26, size=64, buffer_bytes=2**16, rounds=2)
    assert machine.flops_per_s == 2 * 64**3 / timings.median("product")
    assert machine.memory_bytes_per_s == 2**16 / timings.median("sum")
    assert machine.host_bytes_per_s == 2 * 2**14 / timings.median("spill")
    assert not list(tmp_path.iterdir())
    model = from_config(build("llama-0.1m", vocab_size=32).config, bytes_per_weight=4, bytes_per_kv=4)
    assert decode_seconds(model, machine, 100) > 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sizes must be positive: memory_bytes=0"):
        calibrate(tmp_path, memory_bytes=0)
