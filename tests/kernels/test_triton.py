"""The dispatcher, the package without Triton, and the compiler for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import _triton
from kernels._triton import block_of, split_count, use_triton

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
from kernels.tree_attention import tree_attention
from kernels.w24 import random_f24
from kernels.w24_gemv import w24_gemv

q = torch.randn(1, 2, 3, 8)
print(tree_attention(q, q, q, torch.ones(1, 3, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.int32), 0.3).shape)
print(w24_gemv(torch.randn(2, 64), random_f24(8, 3, 1)).shape)
"""


def python(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_the_torch_paths_serve():
    """As on macOS, and whatever TRITON_INTERPRET says."""
    assert python("-c", WITHOUT_TRITON, TRITON_INTERPRET="1").split("\n")[:2] == [
        "torch.Size([1, 2, 3, 8])",
        "torch.Size([2, 8])",
    ]


@pytest.fixture
def interpreted(monkeypatch):
    if not _triton.INTERPRETED:
        pytest.skip("kernels are compiled in this process")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_interpreter_is_chosen_by_the_environment(interpreted, monkeypatch):
    x = torch.zeros(2)
    assert use_triton(x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not use_triton(x)


def test_gradients_and_float64_take_the_torch_path(interpreted):
    x = torch.zeros(2, requires_grad=True)
    assert not use_triton(torch.zeros(2), x)
    with torch.no_grad():
        assert use_triton(torch.zeros(2), x)
    assert not use_triton(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_bfloat16_is_refused_in_the_interpreter(interpreted):
    """Its tl.dot gives garbage for bfloat16 without an error."""
    with pytest.raises(TypeError, match=r"bfloat16 in Triton's interpreter gives wrong numbers .* pass float32"):
        use_triton(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


def test_an_environment_that_changed_too_late_is_refused(interpreted, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET is 1 but was 0 when .* set it before Python starts"):
        use_triton(torch.zeros(2))


def test_blocks_and_splits():
    assert [block_of(n, 16, 64) for n in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 64]
    assert [block_of(n, 1, 8) for n in (1, 2, 3, 5)] == [1, 2, 4, 8]
    cpu = torch.device("cpu")  # four processors
    assert split_count(1, 1000, 64, cpu) == 8
    assert split_count(3, 1000, 64, cpu) == 2
    assert split_count(9, 1000, 64, cpu) == 1
    assert split_count(1, 100, 64, cpu) == 2
    assert split_count(1, 0, 64, cpu) == 1
    assert split_count(1, 9000, 64, cpu, each=8) == 32


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """In fp16: within a Hopper GPU's shared memory, no spilled registers, on tensor cores where it multiplies."""
    if not _triton.AVAILABLE:
        pytest.skip("no Triton here")
    said = python(
        str(ROOT / "tests" / "kernels" / "compile_for_a_gpu.py"), "float16",
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    compiled = [json.loads(line) for line in said.splitlines()]
    assert {line["kernel"] for line in compiled} == {
        "tree_attention._partial_kernel", "sparse_attention._gather_kernel", "merge_partials._merge_kernel",
        "centroid_scores._part_kernel", "centroid_scores._mean_kernel", "compact_indices._count_kernel",
        "compact_indices._scatter_kernel", "kmeans._assign_kernel", "kmeans._mean_kernel", "kv_compact._move_kernel",
        "w24_dequantise._dequantise_kernel", "w24_gemv._arrange_kernel", "w24_gemv._gemv_kernel",
        "w24_gemm._gemm_kernel",
    }  # fmt: skip
    for line in compiled:
        assert line["shared"] <= 227 * 1024, line
        assert line["stack"] == 0, line
    for name in ("tree_attention._partial", "sparse_attention._gather", "kmeans._assign", "w24_gemm._gemm"):
        for line in compiled:
            if line["kernel"].startswith(name):
                assert line["mma"], line
    for name in ("tree_attention._partial", "sparse_attention._gather", "centroid_scores._part"):
        for line in compiled:
            if line["kernel"].startswith(name):
                assert line["async"], f"loads of the next block do not overlap with this one's products: {line}"
