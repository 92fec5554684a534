"""Squeezed Attention: cluster the keys of a fixed context, attend exactly to the relevant ones (Hooper et al. 2024)."""

from papers.squeezed_attention.method import SqueezedCache, SqueezedContext, squeeze

__all__ = ["SqueezedCache", "SqueezedContext", "squeeze"]
