"""The one place that imports Triton, and the choice between its kernels and the torch paths beside them.

Triton exists for Linux only. Where it is absent the stand-ins below let every module of this package be imported; the
kernels are then never launched, because `use_triton` answers no.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    AVAILABLE = False
    triton: Any = SimpleNamespace(jit=lambda function: function)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]
else:
    AVAILABLE = True

__all__ = ["AVAILABLE", "INTERPRETED", "block_of", "processors", "split_count", "tl", "triton", "use_triton"]

# `triton.jit` decides while this package is imported whether its kernels are compiled or interpreted.
INTERPRETED = AVAILABLE and bool(triton.knobs.runtime.interpret)


def use_triton(*tensors: torch.Tensor) -> bool:
    """Whether a call with these tensors launches the Triton kernel; if not, it takes the vectorised torch path.

    Yes on CUDA, and on any device in Triton's interpreter (TRITON_INTERPRET=1, for tests). No on the CPU otherwise, for
    float64 (the kernels accumulate in float32), and for tensors that need a gradient (the kernels have no backward).

    Raises RuntimeError when TRITON_INTERPRET has changed since this package was imported, and TypeError for bfloat16 in
    the interpreter, whose `tl.dot` returns garbage for it without an error.
    """
    if not AVAILABLE or any(t.dtype == torch.float64 for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    interpret, device = bool(triton.knobs.runtime.interpret), tensors[0].device.type
    if device != "cuda" and not interpret:
        return False
    if interpret != INTERPRETED:
        now, then = ("1", "0") if interpret else ("0", "1")
        raise RuntimeError(
            f"TRITON_INTERPRET is {now} but was {then} when the kernels were imported, and Triton decides then;"
            " set it before Python starts"
        )
    if interpret and any(t.dtype == torch.bfloat16 for t in tensors):
        raise TypeError(
            "bfloat16 in Triton's interpreter gives wrong numbers without an error: pass float32 or float16, or run on"
            " a GPU without TRITON_INTERPRET"
        )
    return True


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 for the interpreter, so that its small shapes are split, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split_count(programs: int, rows: int, least: int, device: torch.device, each: int = 2) -> int:
    """Parts into which to cut a loop over `rows` so that the GPU is busy: `each` programs a processor, in one wave.

    programs: how many there are without a split. least: rows below which a part does not pay.
    """
    return max(1, min(each * processors(device) // max(programs, 1), -(-rows // least)))


def block_of(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, between least and most (powers of two)."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)
