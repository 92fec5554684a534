"""Checks of arguments: each error names the tensor, what it is, and what it must be."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sizes_of(**tensors: tuple[torch.Tensor, str]) -> dict[str, int]:
    """Sizes by letter: sizes_of(q=(q, "H M D"), k=(k, "H N D")) -> {"H": .., "M": .., "D": .., "N": ..}.

    Raises ValueError for another number of dimensions, for two sizes of one letter, and for D = 0.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, letters) in tensors.items():
        wanted = letters.split()
        if tensor.dim() != len(wanted):
            raise ValueError(f"{name} must be [{', '.join(wanted)}], not {list(tensor.shape)}")
        for letter, size in zip(wanted, tensor.shape, strict=True):
            before, owner = sizes.setdefault(letter, (size, name))
            if before != size:
                raise ValueError(
                    f"{name} must be [{', '.join(wanted)}] with {letter} = {before} as in {owner},"
                    f" not {list(tensor.shape)}"
                )
    return {letter: size for letter, (size, _) in sizes.items()}


def group_of(query_heads: int, heads: int) -> int:
    """Query heads that share a head of keys. Raises ValueError unless it is a whole number."""
    if not heads or query_heads % heads or not query_heads:
        raise ValueError(f"{query_heads} query heads cannot share {heads} heads of keys: pass a multiple")
    return query_heads // heads


def check_floats(**tensors: torch.Tensor) -> None:
    """Raises TypeError unless all have one floating dtype, ValueError unless all are on one device."""
    (first, head), *_ = tensors.items()
    if head.dtype not in FLOATS:
        raise TypeError(f"{first} is {head.dtype}: pass float16, bfloat16, float32 or float64")
    for name, tensor in tensors.items():
        if tensor.dtype != head.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but {first} is {head.dtype}: convert one of them")
    check_device(**tensors)


def check_device(**tensors: torch.Tensor) -> None:
    """Raises ValueError unless all are on one device."""
    (first, head), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.device != head.device:
            raise ValueError(f"{name} is on {tensor.device} but {first} on {head.device}: move one of them")


def check_dtypes(*dtypes: torch.dtype, **tensors: torch.Tensor) -> None:
    """Raises TypeError for a tensor of another dtype than these."""
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{name} is {tensor.dtype}: pass {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
            )


def check_last_dense(**tensors: torch.Tensor) -> None:
    """Raises ValueError for a tensor whose last dimension has gaps; other dimensions may have any stride."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension, the kernel reads whole rows:"
                f" pass {name}.contiguous()"
            )
