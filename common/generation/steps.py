"""Generation step by step, with forking: partial answers advance one reasoning step at a time, are copied and dropped.

`StepSampler.propose` continues any states by one step each, in one batch. Where all of them come from its latest call,
their rows of the KV cache are gathered (forked); otherwise their texts are read again. Both give the same tokens.
A draw is a function of (seed, algorithm, problem, sample, step, position), so that nothing depends on the batch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from common.generation.lean import LeanForward, why_not_lean
from common.generation.ledger import Ledger
from common.generation.random import draws, keys, name_key
from common.generation.sampler import DROP_SHARE, draw, filter_logits
from common.models.flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class State:
    """A partial answer to prompts[problem]; immutable.

    tokens: all new tokens. ends: how many of them there were after each step. done: an end token was reached, or the
    limit of steps. logprobs: of each step, under the sampling distribution. scores: a reward model's score after each
    step that was scored. place: where its keys and values are, (call of propose, row); None if nowhere. parent: the
    place of the state that it continues.
    """

    problem: int
    tokens: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    done: bool = False
    logprobs: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    place: tuple[int, int] | None = None
    parent: tuple[int, int] | None = None

    @property
    def step_tokens(self) -> int:
        """Tokens of the latest step."""
        return len(self.tokens) - (self.ends[-2] if len(self.ends) > 1 else 0)

    def truncated(self, steps: int) -> State:
        """The state after its first `steps` steps, to be continued from there; unchanged if it has no more."""
        if steps >= len(self.ends):
            return self
        kept = self.ends[:steps]
        return State(
            self.problem,
            self.tokens[: kept[-1] if kept else 0],
            kept,
            False,
            self.logprobs[:steps],
            self.scores[:steps],
        )


def needs_transformers(name: str, what: str) -> None:
    """Raises ValueError for another back end (`cfg.backend`): for work that forks, keeps or sends a KV cache."""
    if name != "transformers":
        raise ValueError(f"{what} works on the KV cache and needs backend=transformers, not {name}")


class ForkingCache:
    """Rows of tokens that a model has read, with gaps: `read` appends a block, `fork` gathers rows, with repeats.

    A row that lives on stays where it is; only its further copies are written, to the places of rows that died. So row
    i of the caller lies at place slots[i] of the model's cache. Idle places are given up once they are many.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, lean: bool | None = None) -> None:
        reason = why_not_lean(model) if lean is not False else ""
        if lean and reason:
            raise ValueError(f"the lean forward does not cover this model: {reason}")
        self.forward: Any
        if reason is None:
            self.forward = LeanForward(model, rows, capacity)
        else:
            from common.generation.cache import ModuleForward

            self.forward = ModuleForward(model, rows, capacity)
        self.model, self.capacity, self.used, self.gaps = model, capacity, 0, False
        self.slots = list(range(rows))
        self.positions = torch.zeros(rows, dtype=torch.long, device=model.device)  # tokens read at each place
        self.hidden = torch.zeros(rows, capacity, dtype=torch.bool, device=model.device)
        self.lowest = max(torch.finfo(model.dtype).min, torch.finfo(torch.float32).min)

    @property
    def places(self) -> int:
        """Rows of the model's batch, idle ones included."""
        return len(self.positions)

    def fork(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of row rows[i]."""
        origin = [self.slots[row] for row in rows]
        if not (1 - DROP_SHARE) * self.places < len(rows) <= self.places:
            gather = torch.tensor(origin, device=self.model.device)
            self.forward.keep_rows(gather)
            self.positions, self.hidden = self.positions[gather], self.hidden[gather]
            self.slots = list(range(len(rows)))
            return
        free = iter(sorted(set(range(self.places)) - set(origin)))
        settled: set[int] = set()
        self.slots, copies = [], []
        for place in origin:
            if place in settled:
                copies.append((place, next(free)))
                self.slots.append(copies[-1][1])
            else:
                settled.add(place)
                self.slots.append(place)
        if copies:
            source, target = torch.tensor(copies, device=self.model.device).T
            self.forward.copy_rows(source, target)
            self.positions[target], self.hidden[target] = self.positions[source], self.hidden[source]

    def read(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Appends a block ids [rows, T]; real [rows, T] is false at padding. Returns the output at the last column."""
        if self.slots == list(range(self.places)):
            return self._read(ids, real)
        slots = torch.tensor(self.slots, device=ids.device)
        placed, there = (x.new_zeros(self.places, x.shape[1]) for x in (ids, real))
        placed[slots], there[slots] = ids, real
        return self._read(placed, there)[slots]

    def _read(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        block = ids.shape[1]
        start, self.used = self.used, self.used + block
        self.hidden[:, start : self.used] = ~real
        self.gaps = self.gaps or not bool(real.all())
        counts = real.cumsum(1)
        positions = (self.positions[:, None] + counts - 1).clamp_(min=0)
        self.positions = self.positions + counts[:, -1]
        return self.forward(ids, positions, self._mask(start, block))

    def _mask(self, start: int, block: int) -> torch.Tensor | None:
        if not self.gaps and (block == 1 or start == 0):
            return None
        hidden = self.hidden[:, None, None, : self.used]
        if block > 1:
            future = torch.ones(block, self.used, dtype=torch.bool, device=hidden.device).triu_(1 + start)
            hidden = hidden | future
        return torch.zeros(hidden.shape, dtype=self.model.dtype, device=hidden.device).masked_fill_(hidden, self.lowest)


class StepSampler:
    """Samples reasoning steps of a causal language model for a list of problems.

    prompts: token ids of each problem. step_tokens: ids that end a step. end_tokens: ids that end the answer.
    max_step_tokens, max_steps: limits; a state that reaches max_steps is done. greedy: take the likeliest token.
    algorithm: names the random streams. Raises ValueError for settings out of range and for answers that may not fit
    into the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        step_tokens: Collection[int],
        end_tokens: Collection[int],
        max_step_tokens: int,
        max_steps: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        algorithm: str = "",
        lean: bool | None = None,
    ) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError(f"{len(prompts)} prompts, none of which may be empty")
        if not greedy and not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}; greedy=True takes the likeliest token")
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k must be at least 0 and top_p in (0, 1], not {top_k} and {top_p}")
        if max_step_tokens < 1 or max_steps < 1:
            raise ValueError(f"{max_step_tokens=} and {max_steps=} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        highest = max(max(prompt) for prompt in prompts)
        if highest >= model.config.vocab_size or min(min(prompt) for prompt in prompts) < 0:
            raise ValueError(f"the prompts have ids outside the model's vocabulary of {model.config.vocab_size}")
        if max(map(len, prompts)) + max_step_tokens > model.config.max_position_embeddings:
            raise ValueError(f"a prompt and a step exceed the model's {model.config.max_position_embeddings} positions")
        self.model, self.prompts = model, [list(prompt) for prompt in prompts]
        self.max_step_tokens, self.max_steps = max_step_tokens, max_steps
        self.temperature, self.top_k, self.top_p, self.greedy = temperature, top_k, top_p, greedy
        self.seed, self.algorithm, self.lean = seed, name_key(algorithm), lean
        vocabulary = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        self.ends_answer, self.ends_step = vocabulary.clone(), vocabulary.clone()
        self.ends_answer[list(end_tokens)] = True
        self.ends_step[[*step_tokens, *end_tokens]] = True
        self.ledger = Ledger()
        self._cache: ForkingCache | None = None
        self._calls = 0

    def propose(self, states: Sequence[State], samples: Sequence[int]) -> list[State]:
        """One more step of each state. samples: which of the problem's random streams each draws from, all different
        for states of one problem. Raises ValueError for a state that is done."""
        if not states:
            return []
        if any(state.done for state in states):
            raise ValueError("a state that is done cannot be continued")
        began = time.perf_counter()
        with torch.inference_mode():
            cache = self._position(states)
            tokens, logprobs = self._step(cache, states, samples)
        self._calls += 1
        children = []
        for row, (state, new, logprob) in enumerate(zip(states, tokens, logprobs, strict=True)):
            text = state.tokens + new
            ended = bool(self.ends_answer[new[-1]])
            children.append(
                replace(
                    state,
                    tokens=text,
                    ends=(*state.ends, len(text)),
                    done=ended or len(state.ends) + 1 == self.max_steps,
                    logprobs=(*state.logprobs, logprob),
                    place=(self._calls, row),
                    parent=state.place,
                )
            )
        self.ledger.add(generated_tokens=sum(map(len, tokens)), seconds=time.perf_counter() - began)
        return children

    def roots(self, problems: Sequence[int] | None = None) -> list[State]:
        """The empty answer of each problem."""
        return [State(problem) for problem in (range(len(self.prompts)) if problems is None else problems)]

    def _position(self, states: Sequence[State]) -> ForkingCache:
        """A cache whose row i holds the text of states[i] without its last token."""
        places = [state.place for state in states]
        if self._cache is not None and all(place is not None and place[0] == self._calls for place in places):
            cache = self._cache
            if cache.used + self.max_step_tokens <= cache.capacity:
                cache.fork([place[1] for place in places if place is not None])
                return cache
        return self._read_again(states)

    def _read_again(self, states: Sequence[State]) -> ForkingCache:
        index: dict[tuple[int, ...], int] = {}  # states with the same text share one reading of it
        rows = [index.setdefault((*self.prompts[state.problem], *state.tokens)[:-1], len(index)) for state in states]
        texts = list(index)
        longest = max(map(len, texts))
        left = min(self.max_steps - min(len(state.ends) for state in states), 24) * self.max_step_tokens
        cache = ForkingCache(self.model, len(texts), longest + left, self.lean)
        self._cache = cache
        if longest:
            ids, real = left_padded(texts, self.model.device)
            cache.read(ids, real)
            self.ledger.add(
                prompt_tokens=sum(map(len, texts)),
                forwards=1,
                flops=forward_flops(self.model.config, longest, 0, len(texts), 1),
            )
        cache.fork(rows)
        return cache

    def _step(
        self, cache: ForkingCache, states: Sequence[State], samples: Sequence[int]
    ) -> tuple[list[tuple[int, ...]], list[float]]:
        device = self.model.device
        rows = len(states)
        pending = torch.tensor([([*self.prompts[s.problem], *s.tokens])[-1] for s in states], device=device)
        u = None
        if not self.greedy:
            key = keys(self.seed, self.algorithm, [s.problem for s in states], samples, [len(s.ends) for s in states])
            u = torch.from_numpy(draws(key, self.max_step_tokens)).to(device)
        ends_step = self.ends_step.to(device)
        new = torch.zeros(rows, self.max_step_tokens, dtype=torch.long, device=device)
        lengths = torch.full((rows,), self.max_step_tokens, device=device)
        logprobs = torch.zeros(rows, dtype=torch.float64, device=device)
        running = torch.ones(rows, dtype=torch.bool, device=device)
        for place in range(self.max_step_tokens):
            logits = cache.read(pending[:, None], running[:, None])
            self.ledger.add(forwards=1, flops=forward_flops(self.model.config, 1, cache.used - 1, cache.places, 1))
            if u is None:
                token = logits.argmax(-1)
            else:
                logits = filter_logits(logits, self.temperature, self.top_k, self.top_p)
                token = draw(logits, u[:, place])
            chosen = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
            logprobs += torch.where(running, chosen, 0.0)
            new[:, place] = token
            pending = torch.where(running, token, pending)
            ended = running & ends_step[token]
            lengths[ended] = place + 1
            running = running & ~ended
            if not bool(running.any()):
                break
        texts = [tuple(row[:length]) for row, length in zip(new.tolist(), lengths.tolist(), strict=True)]
        return texts, logprobs.tolist()


def left_padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [rows, longest] with zeros on the left, and real bool [rows, longest], false there."""
    longest = max(map(len, texts))
    ids = torch.stack([F.pad(torch.tensor(text, dtype=torch.long), (longest - len(text), 0)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    real = torch.arange(longest) >= longest - lengths[:, None]
    return ids.to(device), real.to(device)
