"""This machine as an `Accelerator`: its rates measured in the same run as what the roofline is compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.costs.catalogue import Accelerator
from common.metrics.timing import Timings, compare


def spill(path: Path, buffer: torch.Tensor) -> torch.Tensor:
    """Writes a contiguous CPU tensor to a file and reads it back from the disk, not from the page cache.

    The context switch of a machine whose larger memory is a disk. The file is left empty.
    """
    view = buffer.view(torch.uint8).flatten().numpy()
    with path.open("wb+") as file:
        file.write(view.data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS, where the cache stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        back = torch.frombuffer(bytearray(file.read()), dtype=buffer.dtype).view(buffer.shape)
        file.truncate(0)
    return back


def calibrate(
    folder: Path, memory_bytes: int, size: int = 1024, buffer_bytes: int = 256 * 2**20, rounds: int = 5
) -> tuple[Accelerator, Timings]:
    """The rates that float32 code reaches on this machine's CPU with torch's current number of threads.

    Operations: a product of two [size, size] matrices. Bandwidth: the sum over buffer_bytes, which should exceed the
    last cache several times. Link to the host: `spill` of a quarter of the buffer to `folder`, half of it each way.
    memory_bytes: what the caller lets caches use. Medians of interleaved rounds of wall time; the Timings say whether
    they were contended. watts is nan. Raises ValueError for sizes below 1.
    """
    if min(memory_bytes, size, buffer_bytes // 16, rounds) < 1:
        raise ValueError(f"sizes must be positive: {memory_bytes=}, {size=}, {buffer_bytes=}, {rounds=}")
    left, right = torch.rand(size, size), torch.rand(size, size)
    stream = torch.ones(buffer_bytes // 4)
    part = stream[: len(stream) // 4].clone()
    file = folder / f"calibration.{os.getpid()}"
    calls: dict[str, Callable[[], Any]] = {
        "product": lambda: left @ right,
        "sum": stream.sum,
        "spill": lambda: spill(file, part),
    }
    try:
        timings = compare(calls, rounds=rounds)
    finally:
        file.unlink(missing_ok=True)
    machine = Accelerator(
        "this machine",
        flops_per_s=2 * size**3 / timings.median("product"),
        memory_bytes=memory_bytes,
        label_bytes=memory_bytes,
        memory_bytes_per_s=stream.nbytes / timings.median("sum"),
        host_bytes_per_s=2 * part.nbytes / timings.median("spill"),
        watts=float("nan"),
        source=f"measured with {torch.get_num_threads()} threads",
    )
    return machine, timings
