"""Lookahead (Zhao et al., KDD 2024): drafts from a trie of n-grams, verified losslessly.

A trie remembers which tokens followed which in the current prompt and in earlier outputs. Before each forward pass the
last two tokens are looked up, and the most frequent continuations become one draft tree, which the model scores at
once; `common.generation.tree` commits the longest path that the model itself would have taken. No draft model, no
training, and the text is that of plain decoding.

    decoder = LookaheadDecoder(model)
    output = decoder.generate(input_ids, max_new_tokens=256)     # output.tokens, output.forwards, output.accepted

Rules are those of the authors' code (alipay/PainlessInferenceAcceleration, lookahead/lookahead/common/), here called
`lookahead_cache.py` (the trie) and `pretrained_model.py` (the loop), except where a comment says otherwise.
"""

from papers.lookahead.method.decoder import LookaheadDecoder, TrieDrafter
from papers.lookahead.method.released import ReleasedTrie
from papers.lookahead.method.trie import DraftTrie

__all__ = ["DraftTrie", "LookaheadDecoder", "ReleasedTrie", "TrieDrafter"]
