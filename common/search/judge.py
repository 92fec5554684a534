"""A chat model as process reward model: it answers every step with a good or a bad mark (RLHFlow's PRMs).

The conversation holds the question with the first step and then each further step as turns of the user; the model's
own turns are the good mark, and its chance of that mark after the latest step is the score of the prefix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.generation.ledger import Ledger
from common.generation.steps import State, left_padded
from common.models.flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class StepJudge:
    """score(states): P(good) / (P(good) + P(bad)) after the latest step, in (0, 1).

    questions: of each problem. text: token ids of the policy -> text. good, bad: marks; each must be one token of the
    judge's tokenizer (its last one counts, for those that put a space before). batch: conversations read at once.
    """

    __name__ = "step judge"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        text: Callable[[list[int]], str],
        *,
        good: str = "+",
        bad: str = "-",
        batch: int = 32,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the judge's tokenizer has no chat template: it is not a chat model")
        self.model, self.tokenizer, self.questions, self.text = model, tokenizer, questions, text
        self.good, self.batch, self.ledger = good, batch, Ledger()
        self.marks = [tokenizer.encode(mark, add_special_tokens=False)[-1] for mark in (good, bad)]
        if self.marks[0] == self.marks[1]:
            raise ValueError(f"the marks {good!r} and {bad!r} are the same token of the judge")

    def __call__(self, states: Sequence[State]) -> np.ndarray:
        """Scores, float64 [states]; every conversation is read from its start."""
        began = time.perf_counter()
        conversations = [self._conversation(state) for state in states]
        scores = []
        for start in range(0, len(states), self.batch):
            ids, real = left_padded(conversations[start : start + self.batch], self.model.device)
            positions = (real.cumsum(1) - 1).clamp_(min=0)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids, attention_mask=real.long(), position_ids=positions, logits_to_keep=1
                ).logits
            scores.append(logits[:, -1, self.marks].double().softmax(-1)[:, 0].cpu().numpy())
            rows, longest = ids.shape
            self.ledger.add(
                prompt_tokens=int(real.sum()), forwards=1,
                flops=forward_flops(self.model.config, longest, 0, rows, 1),
            )  # fmt: skip
        self.ledger.add(seconds=time.perf_counter() - began)
        return np.concatenate(scores)

    def _conversation(self, state: State) -> list[int]:
        starts = (0, *state.ends[:-1])
        steps = [self.text(list(state.tokens[a:b])).strip() for a, b in zip(starts, state.ends, strict=True)]
        turns = []
        for i, step in enumerate(steps):
            turns.append({"role": "user", "content": f"{self.questions[state.problem]} {step}" if i == 0 else step})
            turns.append({"role": "assistant", "content": self.good})
        return self.tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
