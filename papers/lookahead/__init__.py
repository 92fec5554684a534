"""Lookahead: drafts from a trie of n-grams, verified losslessly (Zhao et al., KDD 2024)."""

from papers.lookahead.method import DraftTrie, LookaheadDecoder, ReleasedTrie, TrieDrafter

__all__ = ["DraftTrie", "LookaheadDecoder", "ReleasedTrie", "TrieDrafter"]
