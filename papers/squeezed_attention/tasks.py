"""The two tasks: recall of facts from a context, and text (code) that goes on after a context; and what a pass reads.

Recall: a context is F facts "a b ;" over distinct symbols a; its values are symbols of other facts. A question "? a" is
answered by b, and then by the value of b: one look-up each, the second one made from the model's own answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.training.data import IGNORED, Batch

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerFast

    from common.training.data import Batches

BLOCK = 2  # tokens of a question: the mark and a symbol
MARKS = ";?"  # tokens behind the symbols


def facts(
    random: np.random.Generator, rows: int, count: int, questions: int, symbols: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts [rows, 3 * count] and questions with both answers [rows, questions, 4]: "? a b c".

    Symbols are the tokens from `first` on, ";" and "?" the two behind them. Raises ValueError for more facts than
    symbols.
    """
    if count > symbols:
        raise ValueError(f"{count} facts about distinct symbols need as many symbols, there are {symbols}")
    keys = random.permuted(np.tile(np.arange(symbols), (rows, 1)), axis=1)[:, :count]
    other = (np.arange(count) + random.integers(1, count, size=(rows, count))) % count  # never the fact itself
    context = np.stack([keys, np.take_along_axis(keys, other, 1), np.full_like(keys, symbols)], 2)
    asked = random.integers(count, size=(rows, questions))
    then = np.take_along_axis(other, asked, 1)
    last = np.take_along_axis(other, then, 1)
    marks = np.full_like(asked, symbols + 1)
    answers = [np.take_along_axis(keys, place, 1) for place in (asked, then, last)]
    return first + context.reshape(rows, -1), first + np.stack([marks, *answers], 2)


def recall_batches(cfg: DictConfig) -> Batches:
    """step -> one batch of the curriculum's phase (the last one to the end): contexts with questions behind them, loss
    on answers only."""
    own = cfg.recall
    ends = np.cumsum([phase.steps for phase in own.curriculum])

    def batch(step: int) -> list[Batch]:
        phase = own.curriculum[min(int(np.searchsorted(ends, step, side="right")), len(ends) - 1)]
        random = np.random.default_rng([cfg.seed, 1, step])
        context, questions = facts(random, phase.rows, phase.facts, phase.questions, own.symbols, own.first)
        ids = torch.from_numpy(np.concatenate([context, questions.reshape(phase.rows, -1)], 1))
        labels = torch.full_like(ids, IGNORED)
        asked = labels[:, context.shape[1] :].view(phase.rows, -1, 4)
        asked[:, :, BLOCK:] = torch.from_numpy(questions[:, :, BLOCK:])
        return [Batch(ids, labels)]

    return batch


@dataclass(frozen=True)
class Prompts:
    """What is read behind contexts [C, N]: `blocks` blocks of `block` tokens that share a look-up, then single tokens.

    ids, positions int64 [C, M] and [M], M = blocks * block + singles; sees bool [M, M]: which of each other the tokens
    see; targets int64 [C, M]: the next token where it is scored, else IGNORED.
    """

    contexts: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor
    targets: torch.Tensor
    blocks: int
    block: int

    def part(self, rows: slice) -> Prompts:
        """Some of the contexts."""
        return Prompts(
            self.contexts[rows], self.ids[rows], self.positions, self.sees, self.targets[rows], self.blocks, self.block
        )

    def to(self, device: str) -> Prompts:
        moved = (t.to(device) for t in (self.contexts, self.ids, self.positions, self.sees, self.targets))
        return Prompts(*moved, self.blocks, self.block)


def recall_prompts(cfg: DictConfig) -> Prompts:
    """Held-out contexts and questions. The questions of a context stand side by side and do not see each other; that
    the right first answer is read before the second is scored changes nothing where both must be right."""
    own = cfg.recall
    random = np.random.default_rng([cfg.seed, 2])
    context, asked = facts(random, own.contexts, own.facts, own.questions, own.symbols, own.first)
    questions = torch.from_numpy(asked)
    count, length = own.questions, context.shape[1]
    owner = torch.cat([torch.arange(count).repeat_interleave(BLOCK), torch.arange(count)])
    place = torch.cat([torch.arange(BLOCK).repeat(count), torch.full((count,), BLOCK)])
    targets = torch.full((own.contexts, count, BLOCK), IGNORED)
    targets[:, :, -1] = questions[:, :, BLOCK]
    return Prompts(
        contexts=torch.from_numpy(context),
        ids=torch.cat([questions[:, :, :BLOCK].flatten(1), questions[:, :, BLOCK]], 1),
        positions=length + place,
        sees=(owner[:, None] == owner) & (place[:, None] >= place),
        targets=torch.cat([targets.flatten(1), questions[:, :, BLOCK + 1]], 1),
        blocks=count,
        block=BLOCK,
    )


def text_prompts(cfg: DictConfig, words: PreTrainedTokenizerFast) -> Prompts:
    """The beginnings of held-out files (joined: files one after the other, for contexts longer than a file): context,
    the user's input, and the tokens that are scored. Raises ValueError where there are too few."""
    own = cfg.text
    total = own.context + own.user + own.scored
    read_to = None if own.joined else own.characters
    tokens = words([document.text[:read_to] for document in held_out()])["input_ids"]
    if own.joined:
        stream = [token for file in tokens for token in file]
        tokens = [stream[start : start + total] for start in range(0, len(stream), total)]
    tokens = [file[:total] for file in tokens if len(file) >= total][: own.files]
    if len(tokens) < own.files:
        raise ValueError(f"{len(tokens)} held-out texts have {total} tokens, text.files asks for {own.files}")
    ids = torch.tensor(tokens)
    read, length = ids[:, own.context : -1], own.user + own.scored - 1
    targets = ids[:, own.context + 1 :].clone()
    targets[:, : own.user - 1] = IGNORED
    return Prompts(
        contexts=ids[:, : own.context],
        ids=read,
        positions=own.context + torch.arange(length),
        sees=torch.ones(length, length, dtype=torch.bool).tril(),
        targets=targets,
        blocks=1,
        block=own.user,
    )


def held_out() -> list[Any]:
    """Files of the standard library that no shared model has read, one from each module in turn."""
    from common.data import corpus

    by_module: dict[str, list[Any]] = {}
    for document in [*corpus.stdlib_sources("test"), *corpus.stdlib_sources("warmup")]:
        by_module.setdefault(document.module, []).append(document)
    turns = max(map(len, by_module.values()))
    return [files[turn] for turn in range(turns) for files in by_module.values() if turn < len(files)]


def text_batches(cfg: DictConfig, words: PreTrainedTokenizerFast) -> Batches:
    """step -> windows of the training files as long as what is read in the evaluation."""
    from common.data import corpus
    from common.training import data

    own = cfg.text
    texts = [document.text[: own.characters] for document in corpus.stdlib_sources("train")]
    stream = data.pack(words(texts)["input_ids"], words.eos_token_id)
    return data.mixture(data.windows(stream, own.rows, own.context + own.user + own.scored, seed=cfg.seed))
