"""What a decoding step reads of the keys and values of a context, as a share of reading all of them."""

from __future__ import annotations


def kv_budget(kept: float, vectors: float, context: int) -> float:
    """kept / N + vectors / (2 N): a kept token costs a key and a value, a compared vector (a centroid, a page's
    bound) is the size of a key alone.

    kept, vectors: means over layers and heads of keys. context: N, tokens of the context.
    Above 1 where keys are read more than once, by lists of several query heads. Raises ValueError for a context without
    tokens and for negative counts.
    """
    if context < 1 or kept < 0 or vectors < 0:
        raise ValueError(f"{kept} kept tokens and {vectors} compared vectors of a context of {context}: count again")
    return kept / context + vectors / (2 * context)
