"""Linear layers whose weights are stored packed, and bits counted from what is stored.

`stored_bits` adds up tensors, so that padding, scales, zeros and orders of channels count, whatever a method calls
its precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from common.quantisation.calibrate import blocks_of
from common.quantisation.gptq import Rounded
from kernels.packing import pack, unpack


class PackedLinear(nn.Module, ABC):
    """y = W x + b with W stored in the module's buffers. A subclass unpacks it in `weight_matrix`."""

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @abstractmethod
    def weight_matrix(self) -> torch.Tensor:
        """W float32 [out_features, in_features], as the forward uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_matrix().to(x.dtype), self.bias)

    def weight_bytes(self) -> int:
        """Of all buffers but the bias."""
        return sum(buffer.nbytes for buffer in self.buffers() if buffer is not self.bias)


class GroupLinear(PackedLinear):
    """The usual storage: codes in int32 words, a float16 scale and a packed zero for each row and group of channels."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, rounded: Rounded, group: int, bias: torch.Tensor | None = None) -> None:
        """rounded: groups of `group` channels (the last may be smaller), all of the same number of bits."""
        rows, channels = rounded.codes.shape
        super().__init__(channels, rows, bias)
        self.group, self.bits = group, rounded.grids[0].bits
        self.register_buffer("words", pack(rounded.codes, self.bits))
        self.register_buffer("scales", torch.stack([grid.scale for grid in rounded.grids], 1).to(torch.float16))
        zeros = torch.stack([grid.zero for grid in rounded.grids], 1)
        self.register_buffer("zeros", pack(zeros.long(), self.bits, torch.int16))

    def weight_matrix(self) -> torch.Tensor:
        scales, zeros = self.scales.float(), unpack(self.zeros, self.bits, self.scales.shape[1]).float()
        scales, zeros = (x.repeat_interleave(self.group, 1)[:, : self.in_features] for x in (scales, zeros))
        return (unpack(self.words, self.bits, self.in_features).float() - zeros) * scales

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


def groups_of(channels: int, group: int) -> list[int]:
    """Widths of groups of `group` channels; the last has the rest. Raises ValueError for group < 1."""
    if group < 1:
        raise ValueError(f"a group has at least 1 channel, not {group}")
    return [min(group, channels - start) for start in range(0, channels, group)]


def stored_bits(model: nn.Module) -> float:
    """Bits a weight of the linear layers in the decoder blocks, counted from tensors; without biases.

    Raises ValueError for blocks without linear layers.
    """
    size = weights = 0
    for block in blocks_of(model).values():
        for module in block.modules():
            if isinstance(module, PackedLinear):
                size, weights = size + module.weight_bytes(), weights + module.in_features * module.out_features
            elif isinstance(module, nn.Linear):
                size, weights = size + module.weight.nbytes, weights + module.weight.numel()
    if not weights:
        raise ValueError("no linear layers in the decoder blocks")
    return 8 * size / weights
