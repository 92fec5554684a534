"""The decode loop: greedy and sampled generation for ragged batches over a preallocated KV cache.

A draw is a function of (seed, stream, position) and of the model's distribution: it does not depend on what else is in
the batch, on the order of the prompts or on which rows have finished. A stream is one sample of one problem.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from common.generation.lean import LeanForward, why_not_lean
from common.generation.ledger import Ledger
from common.models.flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.generation.cache import ModuleForward

DROP_SHARE = 0.25  # finished rows leave the batch once they are this share of it; each time the cache is copied


@dataclass
class Generation:
    """tokens: the new tokens of each prompt, int64 [n_i], the stop token included. stopped: ended by a stop token."""

    tokens: list[torch.Tensor]
    stopped: list[bool]
    ledger: Ledger


def uniforms(seed: int, stream: int, count: int, start: int = 0) -> np.ndarray:
    """Uniform draws start, ..., start+count-1 of a stream, float64 in (0, 1): from a counter-based generator (Philox).

    On a grid of 2^-32 whose ends are left out, so that a product with a total is never the total itself.
    """
    bits = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
    if start:
        bits.advance(start // 4)  # one step of the counter gives four 64-bit words
    words = bits.random_raw(count + start % 4)[start % 4 :]
    return ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32


def filter_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Logits [rows, vocabulary] of the sampling distribution: temperature, then top-k, then top-p (nucleus).

    top_k=0 and top_p=1 leave everything in. Ties at the k-th value stay in, as does the token that crosses top_p.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits


def draw(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Tokens int64 [rows]: inverts the cumulative distribution of softmax(logits) at u, float64 [rows] in (0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    max_new_tokens: int | Sequence[int],
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    stop_tokens: Collection[int] | Sequence[Collection[int]] | None = None,
    lean: bool | None = None,
) -> Generation:
    """Continues every prompt until a stop token or its limit, all in one batch.

    prompts: token ids, not empty, of any lengths. max_new_tokens: for all, or one per prompt. streams: one number per
    prompt that names its random stream (default: its index); the same (seed, stream) draws the same in any batch.
    stop_tokens: ids for all prompts, or one collection per prompt; None takes the model's own end token, () is none.
    lean: None uses the lean forward where it computes the same; False never; True raises ValueError where it would not.
    Raises ValueError for an empty prompt, ids outside the vocabulary, settings out of range, more positions than the
    model has, and an architecture without a FLOP count.
    """
    began = time.perf_counter()
    prompts = [torch.as_tensor(prompt, dtype=torch.long).cpu() for prompt in prompts]
    limits, streams = checked_settings(len(prompts), max_new_tokens, streams, temperature, top_k, top_p)
    _check_prompts(model, prompts, limits)
    stops = _stop_table(model, stop_tokens, len(prompts))
    if not prompts:
        return Generation([], [], Ledger())
    u = np.stack([uniforms(seed, stream, max(limits)) for stream in streams]) if do_sample else None
    forward = _forward(model, len(prompts), max(map(len, prompts)) + max(limits) - 1, lean)

    def choose(logits: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
        return logits.argmax(-1) if u is None else draw(filter_logits(logits, temperature, top_k, top_p), u)

    ledger = Ledger(prompt_tokens=sum(map(len, prompts)))
    with torch.inference_mode():
        output = _decode(model, forward, prompts, limits, stops, u, choose, ledger).cpu()
    tokens, stopped = [], []
    for row, limit, stop in zip(
        output, limits, stops.cpu() if stops is not None else [None] * len(prompts), strict=True
    ):
        hits = [] if stop is None else stop[row[:limit]].nonzero()[:1, 0].tolist()
        stopped.append(bool(hits))
        tokens.append(row[: hits[0] + 1 if hits else limit].clone())
    ledger.add(generated_tokens=sum(map(len, tokens)), seconds=time.perf_counter() - began)
    return Generation(tokens, stopped, ledger)


def _decode(
    model: PreTrainedModel,
    forward: LeanForward | ModuleForward,
    prompts: list[torch.Tensor],
    limits: list[int],
    stops: torch.Tensor | None,
    u: np.ndarray | None,
    choose: Callable[..., torch.Tensor],
    ledger: Ledger,
) -> torch.Tensor:
    """The loop: tokens [prompts, steps]; what stands after a stop token or a limit is of no meaning."""
    device, config = model.device, model.config
    longest, steps, batch = max(map(len, prompts)), max(limits), len(prompts)
    pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]).to(device)
    output = torch.zeros(batch, steps, dtype=torch.long, device=device)
    live = _Rows(
        index=torch.arange(batch, device=device),
        position=longest - pad,
        limit=torch.tensor(limits, device=device),
        u=None if u is None else torch.from_numpy(u).to(device),
        mask=_padding_mask(pad, longest + steps - 1, model.dtype) if bool(pad.any()) else None,
    )
    may_end = stops is not None or min(limits) < steps
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    positions = (torch.arange(longest, device=device) - pad).clamp_(min=0)
    logits = forward(ids, positions, None if live.mask is None else _prefill_mask(live.mask[..., :longest]))
    ledger.add(forwards=1, flops=forward_flops(config, longest, 0, batch, 1))
    for step in range(steps):
        token = choose(logits, None if live.u is None else live.u[:, step])
        output[live.index, step] = token
        if step + 1 == steps:
            break
        if may_end:
            done |= live.limit == step + 1
            if stops is not None:
                done |= stops[live.index, token]
            finished = int(done.sum())
            if finished == len(done):
                break
            if finished >= DROP_SHARE * len(done):
                keep = (~done).nonzero()[:, 0]
                live, token, done = live.keep(keep), token[keep], done[keep]
                forward.keep_rows(keep)
        width = longest + step + 1
        mask = None if live.mask is None else live.mask[..., :width]
        logits = forward(token[:, None], live.position + step, mask)
        ledger.add(forwards=1, flops=forward_flops(config, 1, width - 1, len(token), 1))
    return output


@dataclass
class _Rows:
    """What belongs to the rows that are still in the batch."""

    index: torch.Tensor  # [rows] which prompt
    position: torch.Tensor  # [rows, 1] of the first new token
    limit: torch.Tensor  # [rows] new tokens allowed
    u: torch.Tensor | None  # [rows, steps] uniform draws
    mask: torch.Tensor | None  # [rows, 1, 1, capacity] additive, hides the padding

    def keep(self, rows: torch.Tensor) -> _Rows:
        return _Rows(**{name: None if x is None else x[rows] for name, x in vars(self).items()})


def _forward(model: PreTrainedModel, rows: int, capacity: int, lean: bool | None) -> LeanForward | ModuleForward:
    reason = why_not_lean(model) if lean is not False else ""
    if lean and reason:
        raise ValueError(f"the lean forward does not cover this model: {reason}")
    if reason is None:
        return LeanForward(model, rows, capacity)
    from common.generation.cache import ModuleForward

    return ModuleForward(model, rows, capacity)


def _padding_mask(pad: torch.Tensor, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, 1, 1, capacity] additive; the lowest finite number and not -inf, so that a row of padding stays finite."""
    hidden = torch.arange(capacity, device=pad.device) < pad
    return torch.zeros(hidden.shape, dtype=dtype, device=pad.device).masked_fill_(hidden, torch.finfo(dtype).min)[
        :, None, None
    ]


def _lowest(dtype: torch.dtype) -> float:
    """Of dtype and float32: not -inf, so that a row of padding alone stays finite, also where softmax is in float32."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def _prefill_mask(padding: torch.Tensor) -> torch.Tensor:
    """Padding [rows, 1, 1, T] and causality together, [rows, 1, T, T]."""
    width = padding.shape[-1]
    future = torch.ones(width, width, dtype=torch.bool, device=padding.device).triu_(1)
    return padding.expand(-1, 1, width, width).masked_fill(future, _lowest(padding.dtype))


def checked_settings(
    count: int,
    max_new_tokens: int | Sequence[int],
    streams: Sequence[int] | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[list[int], Sequence[int]]:
    """The limit and the random stream of each of `count` prompts.

    Raises ValueError for lists of another length and for settings out of range.
    """
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    streams = range(count) if streams is None else streams
    if len(limits) != count:
        raise ValueError(f"max_new_tokens has {len(limits)} entries for {count} prompts")
    if count and min(limits) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {min(limits)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}; do_sample=False is greedy")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be at least 0 and top_p in (0, 1], not {top_k} and {top_p}")
    if len(streams) != count:
        raise ValueError(f"{len(streams)} streams for {count} prompts")
    return limits, streams


def _stop_table(model: PreTrainedModel, stop_tokens: Any, count: int) -> torch.Tensor | None:
    """bool [prompts, vocabulary]: which token ends which row; None if none ends any."""
    if stop_tokens is None:
        own = model.generation_config.eos_token_id
        stop_tokens = () if own is None else [own] if isinstance(own, int) else own
    stop_tokens = list(stop_tokens)
    if not stop_tokens:
        return None
    vocabulary = model.config.vocab_size
    shared = isinstance(stop_tokens[0], int)
    if not shared and len(stop_tokens) != count:
        raise ValueError(f"{len(stop_tokens)} collections of stop tokens for {count} prompts")
    table = torch.zeros(1 if shared else count, vocabulary, dtype=torch.bool)
    for row, stops in enumerate([stop_tokens] if shared else stop_tokens):
        for stop in stops:
            if not 0 <= stop < vocabulary:
                raise ValueError(f"stop token {stop} is outside the vocabulary of {vocabulary}")
            table[row, stop] = True
    return table.expand(count, vocabulary).to(model.device)


def _check_prompts(model: PreTrainedModel, prompts: list[torch.Tensor], limits: list[int]) -> None:
    vocabulary, room = model.config.vocab_size, model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if prompt.dim() != 1 or not len(prompt):
            raise ValueError(f"prompt {i} must be a non-empty list of token ids, not of shape {tuple(prompt.shape)}")
        if int(prompt.min()) < 0 or int(prompt.max()) >= vocabulary:
            raise ValueError(f"prompt {i} has ids outside the vocabulary of {vocabulary}")
        if len(prompt) + limits[i] > room:
            raise ValueError(f"prompt {i}: {len(prompt)} + {limits[i]} new tokens exceed the model's {room} positions")
