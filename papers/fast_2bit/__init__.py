"""Fast 2-bit (Li et al. 2023): weights in 2 bits, stripes of channels that matter in 4, packed for vector loads."""

from papers.fast_2bit.method import F24Linear, bits_per_weight, quantise_matrix, quantize_, stripe_scores

__all__ = ["F24Linear", "bits_per_weight", "quantise_matrix", "quantize_", "stripe_scores"]
