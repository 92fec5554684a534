"""Klear-Reasoner: clipping that keeps a bounded gradient (GPPO)."""

from papers.klear_reasoner.method import CELLS, cell_of, clip_cells, gppo, gradient_weight

__all__ = ["CELLS", "cell_of", "clip_cells", "gppo", "gradient_weight"]
