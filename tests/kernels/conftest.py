"""Where kernels are tested: the torch path and Triton's interpreter on the CPU, and Triton on a CUDA GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from kernels._triton import AVAILABLE, INTERPRETED

# Largest error against float64, as a share of the largest reference value. float32 products are exact (no TF32).
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Where:
    """A path through the dispatcher."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 1.0) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return (size * torch.randn(*shape, generator=draw)).to(dtype).to(self.device)

    def integers(
        self, low: int, high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int32
    ) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(low, high, shape, generator=draw).to(dtype).to(self.device)

    def close(self, actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
        """actual was computed from inputs of `dtype`; expected is float64."""
        actual, expected = actual.detach().double().cpu(), expected.double().cpu()
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all(), "an element was not written, or is not finite"
        if actual.numel():
            error = float((actual - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
            assert error <= factor * TOLERANCES[dtype], f"relative error {error:.2e} in {dtype} ({self.name})"


PATHS = {
    "torch": Where("torch", "cpu", (torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    "interpreter": Where("interpreter", "cpu", (torch.float32, torch.float16)),
    "cuda": Where("cuda", "cuda", (torch.float32, torch.float16, torch.bfloat16)),
}


@pytest.fixture(scope="module", params=PATHS)
def where(request):
    """Each path that this process can take; TRITON_INTERPRET is set for it."""
    path = PATHS[request.param]
    if path.name == "interpreter" and not INTERPRETED:
        pytest.skip(
            "kernels are compiled in this process: TRITON_INTERPRET is not 1" if AVAILABLE else "no Triton here"
        )
    if path.name == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("make test-gpu runs this on a CUDA GPU")
    before = os.environ.get("TRITON_INTERPRET", "0")
    os.environ["TRITON_INTERPRET"] = "1" if path.name == "interpreter" else "0"
    yield path
    os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is full of NaN, or of the largest integer, so that an element that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def paths():
    """All paths by name; for tests that need one of them only."""
    return PATHS
