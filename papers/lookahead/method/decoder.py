"""Drafts for requests, and the decoder that generates with them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from common.generation.tree import Decoding, decode, one_prompt
from papers.lookahead.method.released import ReleasedTrie
from papers.lookahead.method.trie import MODES, QUERY_LENGTH, SOURCES, DraftTree, DraftTrie

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class TrieDrafter:
    """Drafts for request after request from a trie that lives on: `start`, then `draft` and `commit`, then `finish`."""

    def __init__(self, trie: DraftTrie, decoding_length: int, mode: str, source: str) -> None:
        if decoding_length < 1:
            raise ValueError(f"decoding_length counts the root, so it is at least 1, not {decoding_length}")
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        if source not in SOURCES:
            raise ValueError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
        self.trie, self.decoding_length, self.mode, self.source = trie, decoding_length, mode, source
        self.end_tokens: frozenset[int] = frozenset()

    def start(self, prompt: Sequence[int], end_tokens: Collection[int] = ()) -> None:
        """Begins a request; nothing behind an end token is ever inserted."""
        self.end_tokens = frozenset(end_tokens)
        self.trie.insert_prompt(self._before_end(prompt))

    def draft(self, tokens: list[int], room: int) -> DraftTree:
        depth = min(self.trie.branch_length, room)
        return self.trie.draft(tokens[-QUERY_LENGTH:], self.decoding_length, depth, self.mode, self.source)

    def commit(self, new: list[int]) -> None:
        self.trie.stream_output(self._before_end(new))

    def finish(self) -> None:
        self.trie.end_request()

    def _before_end(self, tokens: Sequence[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in self.end_tokens, tokens))


class LookaheadDecoder:
    """Generates text losslessly with fewer forward passes; what it learns from a request helps the next.

    model: a causal LM of `transformers` with a standard cache. decoding_length: most tokens scored in one pass, the
    last committed one included. branch_length: depth of a draft. mode: 'hier' (one tree), 'par' (the tree's branches
    side by side) or 'one' (its most frequent branch). source: drafts from the prompt ('input'), earlier outputs
    ('output') or both ('mix'). stop_tokens, max_nodes, max_output_nodes, prune_after: see `DraftTrie`.
    compat_released_code: draft as the released code does, its slips included (`ReleasedTrie`). Raises ValueError for
    a setting out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoding_length: int = 64,
        branch_length: int = 12,
        mode: str = "hier",
        *,
        source: str = "mix",
        stop_tokens: Collection[int] = (),
        max_nodes: int = 65536,
        max_output_nodes: int = 512,
        prune_after: int = 1024,
        compat_released_code: bool = False,
    ) -> None:
        self.model = model
        kind = ReleasedTrie if compat_released_code else DraftTrie
        self.trie = kind(
            branch_length,
            stop_tokens=stop_tokens,
            max_nodes=max_nodes,
            max_output_nodes=max_output_nodes,
            prune_after=prune_after,
        )
        self.drafter = TrieDrafter(self.trie, decoding_length, mode, source)

    def warm(self, tokens: torch.Tensor | Sequence[int]) -> None:
        """Adds an earlier answer [n], without its prompt and end token."""
        import torch

        self.trie.insert_output(torch.as_tensor(tokens).tolist())

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[int],
        max_new_tokens: int,
        eos_token_id: int | Collection[int] | None = None,
        *,
        logits_processor: Any = None,
        do_sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Decoding:
        """Continues one prompt, [n] or [1, n]; arguments, result and errors as in `common.generation.tree.decode`."""
        prompt = one_prompt(self.model, input_ids, max_new_tokens)
        ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        self.drafter.start(prompt, ends)
        try:
            return decode(
                self.model,
                prompt,
                self.drafter.draft,
                max_new_tokens,
                eos_token_id,
                max_draft=self.drafter.decoding_length,
                logits_processor=logits_processor,
                do_sample=do_sample,
                generator=generator,
                on_commit=self.drafter.commit,
            )
        finally:
            self.drafter.finish()
