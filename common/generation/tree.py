"""Draft and verify: the one decode loop of methods that propose several tokens and let the model check them at once.

A draft is a tree of tokens rooted at the last committed token. One forward pass scores all its nodes under a mask that
shows each node the committed text and its own ancestors. The longest path on which every token is what the model itself
would have chosen is committed, and with it the model's choice at the end of that path, so a pass commits at least one
token and the text is the one that decoding without drafts gives. A draft of the root alone is plain decoding: methods
are compared with it through the same loop, cache and attention.

Before each pass the cache holds every committed token but the last, whose keys and values the pass computes. The first
pass finds it empty and reads the prompt as well, together with the first draft.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.generation.ledger import Ledger
from common.models.flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.generation.cache import PreallocatedLayer

JOINT = 256  # up to so many tokens of a prompt are read with the first draft; for a longer one the mask gets too large

# draft(tokens, room) -> ids, parents: tokens are all committed ones, the prompt included, and must not be changed;
# room is the depth beyond which a node cannot be committed any more. ids[0] is the last committed token, parents[0] is
# -1, and a parent stands before its children.
Draft = Callable[[list[int], int], tuple[Sequence[int], Sequence[int]]]


@dataclass
class Decoding:
    """tokens: the new tokens, int64 [n] on the CPU, a stop token included. accepted: tokens committed by each decode
    forward pass, sum n. drafted: tokens of the draft in each of these passes, the root included. seconds: wall time.

    The first pass reads the prompt, too, unless that has more than JOINT tokens before the last: then a prefill, which
    commits nothing, comes before it.
    """

    tokens: torch.Tensor
    prompt_tokens: int
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def forwards(self) -> int:
        """Decode forward passes."""
        return len(self.accepted)

    def ledger(self, config: Any) -> Ledger:
        """The costs, prefill included. Raises ValueError for an architecture without a FLOP count."""
        unread = self.prompt_tokens - 1
        ledger = Ledger(
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.tokens),
            discarded_tokens=sum(self.drafted) - sum(self.accepted),
            forwards=self.forwards,
            seconds=self.seconds,
        )
        if unread > JOINT:
            ledger.add(forwards=1, flops=forward_flops(config, unread, 0, 1, 1))
            unread = 0
        context = self.prompt_tokens - 1 - unread
        for drafted, accepted in zip(self.drafted, self.accepted, strict=True):
            ledger.add(flops=forward_flops(config, unread + drafted, context, 1, drafted))
            context += unread + accepted
            unread = 0
        return ledger


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    draft: Draft,
    max_new_tokens: int,
    eos_token_id: int | Collection[int] | None = None,
    *,
    max_draft: int = 64,
    logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    do_sample: bool = False,
    generator: torch.Generator | None = None,
    on_commit: Callable[[list[int]], None] | None = None,
) -> Decoding:
    """Continues one prompt until an end token or max_new_tokens, a draft tree per forward pass.

    model: a causal LM of `transformers` that writes to a standard cache, with 'sdpa' or 'eager' attention. input_ids:
    int64 [n] or [1, n]. max_draft: most tokens of a draft, the root included; the cache has room for so many.
    logits_processor: as in `generate`, called with the committed tokens [1, n] and scores float32 [1, vocabulary].
    do_sample: draw from softmax(scores) with `generator` instead of taking the largest; each committed token takes one
    draw, so the text is the one that the same generator gives without drafts. on_commit: called with the tokens of each
    pass. Equal to `generate` up to rounding: in float64 token for token, in lower precision unless a near tie flips.
    Raises ValueError for more than one sequence, an invalid draft, and a model or attention that this cannot serve.
    """
    began = time.perf_counter()
    prompt = one_prompt(model, input_ids, max_new_tokens)
    stop = _stop_tokens(eos_token_id)
    if max_draft < 1:
        raise ValueError(f"max_draft counts the root, so it is at least 1, not {max_draft}")
    forward = TreeForward(model, len(prompt) + max_new_tokens + max_draft)
    pick = _Pick(logits_processor, do_sample, generator)
    tokens, end = list(prompt), len(prompt) + max_new_tokens
    result = Decoding(torch.empty(0, dtype=torch.long), len(prompt))
    unread = prompt[:-1]
    with torch.inference_mode():
        if len(unread) > JOINT:
            forward.prefill(unread)
            unread = []
        while True:
            ids, parents = draft(tokens, end - len(tokens) - 1)
            if not len(ids) or ids[0] != tokens[-1]:
                root = f"starts with {ids[0]}" if len(ids) else "is empty"
                raise ValueError(f"a draft's root must be the last committed token, {tokens[-1]}; this one {root}")
            if len(ids) > max_draft:
                raise ValueError(f"a draft of {len(ids)} tokens does not fit into the room for {max_draft} (max_draft)")
            logits = forward(ids, parents, unread)
            unread = []
            path, new = verify_tree(ids, parents, pick.bind(logits, tokens), end - len(tokens), stop)
            forward.keep(path)
            tokens += new
            result.accepted.append(len(new))
            result.drafted.append(len(ids))
            if on_commit is not None:
                on_commit(new)
            if len(tokens) == end or new[-1] in stop:
                break
    result.tokens = torch.tensor(tokens[len(prompt) :])
    result.seconds = time.perf_counter() - began
    return result


def verify_tree(
    ids: Sequence[int],
    parents: Sequence[int],
    choose: Callable[[int, list[int]], int],
    limit: int,
    stop: Collection[int] = (),
) -> tuple[list[int], list[int]]:
    """Walks from the root along the model's own choices: returns (path, tokens), of equal length.

    ids, parents [T]: the draft. choose(row, tokens) gives the model's next token after node `row`, to which the walk
    came by committing `tokens`. path: the nodes walked, root first; tokens[i] was chosen at path[i]. The walk ends at a
    choice that no child carries, at a token of `stop` and after `limit` tokens. Siblings may carry the same token (as
    in parallel branches): all of them are followed, and the path is the one that gets farthest.
    """
    tokens: list[int] = []
    reached, last = [0], 0
    while reached:
        last = reached[0]
        token = choose(last, tokens)
        tokens.append(token)
        if len(tokens) == limit or token in stop:
            break
        reached = [row for row in range(last + 1, len(ids)) if ids[row] == token and parents[row] in reached]
    path = []
    while last >= 0:
        path.append(last)
        last = parents[last]
    return path[::-1], tokens


def tree_mask(parents: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """(mask, depth): mask bool [T, T], row i is true at node i and its ancestors; depth of each node, the root's is 0.

    Raises ValueError unless parents[0] is -1 and every other parent stands before its child.
    """
    size = len(parents)
    if not size or parents[0] != -1:
        raise ValueError(f"a draft begins with its root, whose parent is -1; parents are {list(parents[:8])} ({size})")
    seen, depth = [1], [0]  # the rows as the bits of integers: cheaper than small array operations
    for row in range(1, size):
        parent = parents[row]
        if not 0 <= parent < row:
            raise ValueError(f"the parent of node {row} of {size} must be one of 0..{row - 1}, not {parent}")
        seen.append(seen[parent] | 1 << row)
        depth.append(depth[parent] + 1)
    width = (size + 7) // 8
    packed = np.frombuffer(b"".join([bits.to_bytes(width, "little") for bits in seen]), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(size, width), axis=1, count=size, bitorder="little")
    return bits.view(np.bool_), depth


def replay(
    draft: Draft,
    prompt: Sequence[int],
    answer: Sequence[int],
    on_commit: Callable[[list[int]], None] | None = None,
) -> Decoding:
    """What `decode` would do if the model's own text were `answer` [n >= 1]: the same passes, without a model.

    Decoding is lossless, so a recorded greedy answer tells what every draft would have been accepted for.
    """
    began = time.perf_counter()
    tokens, start, end = list(prompt), len(prompt), len(prompt) + len(answer)
    result = Decoding(torch.tensor(list(answer)), start)
    while len(tokens) < end:
        position = len(tokens) - start
        ids, parents = draft(tokens, end - len(tokens) - 1)
        _, new = verify_tree(ids, parents, lambda _, done: answer[position + len(done)], end - len(tokens))  # noqa: B023
        tokens += new
        result.accepted.append(len(new))
        result.drafted.append(len(ids))
        if on_commit is not None:
            on_commit(new)
    result.seconds = time.perf_counter() - began
    return result


def no_draft(tokens: list[int], room: int) -> tuple[list[int], list[int]]:
    """The root alone: plain decoding, one token per pass."""
    return [tokens[-1]], [-1]


def prompt_lookup(num_tokens: int = 10, max_ngram: int = 2) -> Draft:
    """One branch of at most num_tokens, copied from behind the first earlier place where the last n tokens stand.

    n is max_ngram at first, then smaller. The rule of `prompt_lookup_num_tokens` in `transformers`
    (generation/candidate_generator.py, PromptLookupCandidateGenerator); prompt and new tokens are both searched.
    """

    def draft(tokens: list[int], room: int) -> tuple[list[int], list[int]]:
        length = min(num_tokens, room)
        for n in range(min(max_ngram, len(tokens) - 1), 0, -1) if length > 0 else ():
            ngram, first = tokens[-n:], tokens[-n]
            place = -1
            while (place := _index(tokens, first, place + 1, len(tokens) - n)) >= 0:
                if tokens[place : place + n] == ngram:
                    ids = [tokens[-1], *tokens[place + n : place + n + length]]
                    return ids, list(range(-1, len(ids) - 1))
        return no_draft(tokens, room)

    return draft


def _index(tokens: list[int], token: int, start: int, stop: int) -> int:
    try:
        return tokens.index(token, start, stop)
    except ValueError:
        return -1


class TreeForward:
    """Forward passes of one sequence over its own cache; `keep` shortens the cache to what was accepted.

    Raises ValueError for a model without a standard cache, with attention that does not take a tree's mask, or whose
    sliding window is shorter than capacity.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        from transformers.cache_utils import Cache

        from common.generation.cache import PreallocatedLayer

        known = _check_model(model, capacity)
        config = model.config.get_text_config(decoder=True)
        self.layers: list[PreallocatedLayer] = [PreallocatedLayer(capacity) for _ in range(config.num_hidden_layers)]
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.cache, self.context, self.checked = Cache(layers=self.layers), 0, False
        self.keeps_logits = "logits_to_keep" in known
        self.hidden = torch.finfo(model.dtype).min

    def prefill(self, prompt: list[int]) -> None:
        """Reads tokens that are already committed; nothing for an empty list."""
        if prompt:
            self._call(torch.tensor([prompt]), torch.arange(len(prompt))[None], None, 1)
            self.context = len(prompt)

    def __call__(self, ids: Sequence[int], parents: Sequence[int], unread: Sequence[int] = ()) -> torch.Tensor:
        """Logits [T, vocabulary] of a draft; ids, parents [T]. Raises ValueError as `tree_mask`.

        unread: committed tokens before the root that the cache does not hold yet; it is empty then.
        """
        if len(ids) != len(parents):
            raise ValueError(f"a draft of {len(ids)} tokens has {len(parents)} parents")
        visible, depth = tree_mask(parents)
        before, mask = len(unread), None
        if len(ids) > 1:
            rows = before + len(ids)
            mask = torch.zeros(1, 1, rows, self.context + rows, dtype=self.dtype)
            if before:
                mask[0, 0, :before] = torch.full((before, rows), self.hidden, dtype=self.dtype).triu_(1)
            mask[0, 0, before:, self.context + before :].masked_fill_(torch.from_numpy(~visible), self.hidden)
        root = self.context + before  # positions go by depth in the tree, not by place in the draft
        places = [*range(self.context, root), *(root + d for d in depth)]
        out = self._call(torch.tensor([[*unread, *ids]]), torch.tensor([places]), mask, len(ids))
        self.context = root
        return out.logits[0, -len(ids) :]

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, logits: int) -> Any:
        """The model's output, with the logits of the last `logits` tokens at least."""
        out = self.model(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            **({"logits_to_keep": logits} if self.keeps_logits else {}),
        )
        if not self.checked:
            lengths = [layer.get_seq_length() for layer in self.layers]
            if set(lengths) != {self.context + ids.shape[1]}:
                raise ValueError(
                    f"{type(self.model).__name__} has no usable cache: {ids.shape[1]} tokens were read,"
                    f" its layers hold {lengths}"
                )
            self.checked = True
        return out

    def keep(self, path: list[int]) -> None:
        """Keeps the keys and values of the accepted nodes: row context + path[i] becomes row context + i."""
        end = self.context + len(path)
        moved = next((i for i, row in enumerate(path) if row != i), len(path))  # before it nothing has to move
        rows = torch.tensor(path[moved:], device=self.device).add_(self.context) if moved < len(path) else None
        for layer in self.layers:
            if rows is not None:
                for states in (layer.keys, layer.values):
                    states[:, :, self.context + moved : end] = states[:, :, rows]
            layer.length = end
        self.context = end


class _Pick:
    """The model's choice at a node: the largest score or a draw, after the logits processors."""

    def __init__(self, processor: Any, do_sample: bool, generator: torch.Generator | None) -> None:
        self.processor, self.do_sample, self.generator = processor, do_sample, generator

    def bind(self, logits: torch.Tensor, tokens: list[int]) -> Callable[[int, list[int]], int]:
        """choose(row, new tokens) for the logits [T, vocabulary] of one pass. In float32, as `generate` chooses."""
        logits = logits.float()
        if self.processor is None and not self.do_sample:
            choices = logits.argmax(-1).tolist()
            return lambda row, new: choices[row]

        def choose(row: int, new: list[int]) -> int:
            scores = logits[row : row + 1]
            if self.processor is not None:
                scores = self.processor(torch.tensor([tokens + new], device=logits.device), scores.clone())
            if self.do_sample:
                return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
            return int(scores.argmax(-1))

        return choose


def _stop_tokens(eos_token_id: int | Collection[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else map(int, eos_token_id))


def one_prompt(model: PreTrainedModel, input_ids: torch.Tensor | Sequence[int], max_new_tokens: int) -> list[int]:
    """The token ids of one prompt, [n] or [1, n]. Raises ValueError for anything else and for too many positions."""
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"one prompt at a time: input_ids must be [n] or [1, n], n >= 1, not {list(ids.shape)}")
    if ids.is_floating_point():
        raise ValueError(f"input_ids must be token ids, not {ids.dtype}")
    config = model.config.get_text_config(decoder=True)
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(f"input_ids has ids outside the vocabulary of {config.vocab_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise ValueError(f"{len(ids)} prompt and {max_new_tokens} new tokens exceed the model's {positions} positions")
    return ids.tolist()


def _check_model(model: PreTrainedModel, capacity: int) -> Collection[str]:
    """The names of the forward's parameters."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    known = inspect.signature(model.forward).parameters
    lacking = [key for key in ("past_key_values", "position_ids", "attention_mask") if key not in known]
    if lacking or model.config.is_encoder_decoder:
        why = f"its forward takes no {', '.join(lacking)}" if lacking else "it is an encoder-decoder"
        raise ValueError(f"{name} has no usable cache: {why}")
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"{name} runs {attention!r} attention, which takes no tree mask; use 'sdpa' or 'eager'")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{name} has no usable cache: layers of type {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or not getattr(config, "layer_types", None)
    if window is not None and slides and capacity > window:
        raise ValueError(f"{name} attends to a window of {window} tokens, this needs {capacity} without a window")
    return known
