"""Compiles every kernel for a Hopper GPU (sm_90) on a machine without one; a program, run by test_triton.py.

The interpreter accepts what a GPU does not: products of fewer than 16 rows, types that change in a loop, more shared
memory than there is. Public functions are called on CPU tensors with a driver that names the target, and each launch
ends after the compiler. Prints a line of JSON a kernel: name, dtype of its call, bytes of shared memory and of the
stack (where registers did not suffice), registers, tensor core instructions and asynchronous copies.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import (
    centroid_scores,
    compact_indices,
    kmeans,
    kv_compact,
    merge_partials,
    sparse_attention,
    tree_attention,
    w24,
    w24_gemm,
    w24_gemv,
)

TARGET = GPUTarget("cuda", 90, 32)
PROCESSORS = 132  # of an H100 or H200
run = JITFunction.run
seen: set[str] = set()
current = ""


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    if kernel is not None and kernel.hash not in seen:
        seen.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        line = {"kernel": f"{self.fn.__module__.split('.')[-1]}.{self.__name__}", "call": current}
        line |= {"shared": kernel.metadata.shared, "stack": int(re.search(r"STACK:(\d+)", usage)[1])}
        line |= {"registers": int(re.search(r"REG:(\d+)", usage)[1])}
        line |= {"mma": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)), "async": ptx.count("cp.async.c")}
        print(json.dumps(line), flush=True)


def attention(dtype: torch.dtype) -> None:
    heads, keys, d = 8, 4096, 128
    k = torch.zeros(heads, keys, d, dtype=dtype)
    idx, cnt = torch.zeros(heads, keys, dtype=torch.int32), torch.full((heads,), 400, dtype=torch.int32)
    length = torch.tensor([keys - 64], dtype=torch.int32)
    for queries in (1, 64):
        q = torch.zeros(4 * heads, queries, d, dtype=dtype)
        mask = torch.ones(1, queries, queries, dtype=torch.bool)
        tree_attention.tree_attention(q[None], k[None], k[None], mask, length, 0.1)
        merge_partials.merge_partials(*sparse_attention.sparse_attention(q, k, k, idx, cnt, 0.1))
        for centroid_scores.STORED_BYTES in (1 << 26, 0):
            centroid_scores.centroid_scores(q, k[:, :200], torch.ones(heads, 200, dtype=torch.int32), 0.1)
    kmeans.kmeans_step(k, k[:, :200])
    kv_compact.kv_compact([k[None]], torch.arange(9, dtype=torch.int32)[None], cnt[:1] * 0 + 9, length)


def weights(dtype: torch.dtype) -> None:
    weight = w24.random_f24(64, 44, 4)
    for variant in w24_gemv.VARIANTS:
        for batch in (1, 4, 8):
            w24_gemv.w24_gemv(torch.zeros(batch, weight.channels, dtype=dtype), weight, variant)
        w24_gemm.w24_gemm(torch.zeros(64, weight.channels, dtype=dtype), weight, variant)


def main() -> None:
    global current
    device = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    driver.set_active(device)
    JITFunction.run = compile_only
    torch.empty = torch.zeros  # labels and indices that no kernel has written must be in range
    for module in [m for name, m in sys.modules.items() if name.startswith("kernels.")]:
        for name, value in (("use_triton", lambda *_: True), ("processors", lambda _: PROCESSORS)):
            if hasattr(module, name):
                setattr(module, name, value)
    for name in sys.argv[1:]:
        current = name
        attention(getattr(torch, name))
        weights(getattr(torch, name))
    compact_indices.compact_indices(torch.zeros(2, 9), torch.zeros(2, 4096, dtype=torch.int16), 0.5, 100)


if __name__ == "__main__":
    main()
