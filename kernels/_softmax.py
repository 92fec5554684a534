"""One step of the online softmax in base 2, shared by the attention kernels (Milakov and Gimelshein 2018).

After keys 1..n a row's state is m = max x_i, l = sum 2^(x_i - m), acc = sum 2^(x_i - m) v_i, with x = logit * log2(e).
A row that has seen no key has m = -inf, l = 0, acc = 0; the differences below never become inf - inf.
"""

from __future__ import annotations

from kernels._triton import tl, triton

LOG2E = 1.4426950408889634  # callers multiply the scale of the logits by it before they launch


@triton.jit
def finite(m):
    """m, or 0 where it is -inf: what may be subtracted from a logit."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def attend(acc, m, l, x, v):
    """The state after more keys: logits x float32 [rows, keys] (-inf: not visible), values v [keys, D]."""
    new_m = tl.maximum(m, tl.max(x, 1))
    p = tl.exp2(x - finite(new_m)[:, None])
    rescale = tl.exp2(m - finite(new_m))
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_m, l * rescale + tl.sum(p, 1)


@triton.jit
def normalised(acc, l):
    """acc / l, and 0 for a row that has seen no key."""
    return acc / tl.where(l == 0.0, 1.0, l)[:, None]
