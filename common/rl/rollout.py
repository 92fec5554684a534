"""Rollouts: sampled answers to groups of the same problem, with the log-probabilities that they were sampled with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from common.generation.ledger import Ledger
from common.generation.random import keys
from common.generation.sampler import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem


TOGETHER = 32  # rows of similar length that a forward pass reads


@dataclass(frozen=True)
class Layout:
    """Where the tokens of rows that are not plain sequences stand, and what they do not see.

    positions: int64 [N, T]. hidden: int64 [N, T, 2]; a token sees itself and all before it but columns hidden[0] to
    hidden[1] - 1.
    """

    positions: torch.Tensor
    hidden: torch.Tensor

    def rows(self, index: torch.Tensor) -> Layout:
        return Layout(self.positions[index], self.hidden[index])

    def until(self, width: int) -> Layout:
        """Of the first columns."""
        return Layout(self.positions[:, :width], self.hidden[:, :width])

    def visible(self) -> torch.Tensor:
        """bool [N, T, T]: whether token t (second axis) sees column k (third)."""
        column = torch.arange(self.positions.shape[1], device=self.positions.device)
        outside = (column < self.hidden[:, :, :1]) | (column >= self.hidden[:, :, 1:])
        return (column <= column[:, None]) & outside


@dataclass(frozen=True)
class Rollout:
    """N answers, `group_size` to each of P problems, one after the other: row n belongs to problem n // group_size.

    ids: int64 [N, T], prompt and answer, padded on the right; causal attention needs no mask for that, and positions
    count from the first token. response: bool [N, T], the sampled tokens, the end token included. trained: bool [N, T],
    those of them that carry a loss; forced tokens do not. logp: float32 [N, T], log-probability of each response token
    under the sampling distribution, 0 elsewhere. finished: bool [N], ended by itself and not by the limit of tokens.
    """

    ids: torch.Tensor
    response: torch.Tensor
    trained: torch.Tensor
    logp: torch.Tensor
    finished: torch.Tensor
    group_size: int
    problems: list[Problem]
    texts: list[str]

    @property
    def length(self) -> torch.Tensor:
        """Sampled tokens of each answer, the end token included, float32 [N]."""
        return self.response.sum(1).float()

    def groups(self, values: torch.Tensor) -> torch.Tensor:
        """[N] as [P, group_size]: a term or an estimator looks at its own group only."""
        return values.view(-1, self.group_size)

    def rows(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of some rows, for a minibatch."""
        return {name: getattr(self, name)[index] for name in ("ids", "response", "trained", "logp")}


def sample(
    policy: PreTrainedModel,
    words: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    group_size: int,
    max_new_tokens: int,
    *,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    score: bool = True,
) -> tuple[Rollout, Ledger]:
    """group_size answers to each problem, all in one batch. A draw is a function of (seed, step, problem, sample).

    logp comes from a forward pass over whole answers and not from the sampler: the policy's update reads answers the
    same way, so that the first ratio is exactly 1. score: False leaves it out, and logp at 0, for answers that are not
    trained on. Raises ValueError for no problems or no samples.
    """
    if not problems or group_size < 1:
        raise ValueError(f"a rollout needs problems and samples, not {len(problems)} problems of {group_size} samples")
    prompts = [
        ids
        for ids in words([p.prompt for p in problems], add_special_tokens=False)["input_ids"]
        for _ in range(group_size)
    ]
    number = range(len(prompts))
    streams = [int(k) for k in keys(seed, step, [n // group_size for n in number], [n % group_size for n in number])]
    out = generate(
        policy, prompts, max_new_tokens, do_sample=True, temperature=temperature, seed=seed, streams=streams,
        stop_tokens=stop_tokens,
    )  # fmt: skip
    answers = [answer.tolist() for answer in out.tokens]
    ids, response = padded(prompts, answers)
    device = policy.device
    rollout = Rollout(
        ids.to(device), response.to(device), response.to(device), torch.zeros(ids.shape, device=device),
        torch.tensor(out.stopped, device=device), group_size, list(problems), words.batch_decode(answers),
    )  # fmt: skip
    if not score:
        return rollout, out.ledger
    with torch.no_grad():
        logp, _ = log_probs(policy, rollout.ids, rollout.response, temperature)
    return replace(rollout, logp=logp), out.ledger


def padded(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [N, T] padded with 0 on the right, and bool [N, T]: which of them belong to the answers."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    response = torch.zeros(ids.shape, dtype=torch.bool)
    for n, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[n, : len(row)] = torch.tensor(row)
        response[n, len(prompt) : len(row)] = True
    return ids, response


def log_probs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    response: torch.Tensor,
    temperature: float = 1.0,
    layout: Layout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each response token given what it sees before it, and the entropy (nats) of the distribution
    that it was drawn from, both float32 [N, T] and 0 off the response. Differentiable; the head sees response positions
    alone. layout: None for plain sequences; a response token is always predicted by the column before it. Raises
    ValueError for a response without a prompt.

    Rows of similar length are read together, without the columns that all of them leave empty: most of a batch is
    shorter than its longest row.
    """
    if bool(response[:, 0].any()):
        raise ValueError("a response cannot begin at the first position: nothing predicts that token")
    columns = ids.shape[1]
    length = (response * torch.arange(1, columns + 1, device=ids.device)).amax(1)
    order = length.argsort(stable=True)
    found = []
    for rows in order.split(TOGETHER):
        width = max(1, int(length[rows[-1]]))
        of = layout and layout.rows(rows).until(width)
        both = _log_probs(model, ids[rows, :width], response[rows, :width], temperature, of)
        found.append(torch.nn.functional.pad(torch.stack(both), (0, columns - width)))
    logp, entropy = torch.cat(found, dim=1)[:, order.argsort()]
    return logp, entropy


def _log_probs(
    model: PreTrainedModel, ids: torch.Tensor, response: torch.Tensor, temperature: float, layout: Layout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    embedded = model.get_input_embeddings()(ids)
    where = (
        {} if layout is None else {"position_ids": layout.positions, "attention_mask": _additive(layout, model.dtype)}
    )
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False, **where).last_hidden_state[:, :-1]
    at = response[:, 1:]
    logits = (model.get_output_embeddings()(hidden[at]).float() / temperature).log_softmax(-1)
    blank = torch.zeros(ids.shape, device=ids.device)
    logp = blank.masked_scatter(response, logits.gather(-1, ids[response][:, None])[:, 0])
    entropy = blank.masked_scatter(response, -(logits.exp() * logits).sum(-1))
    return logp, entropy


def _additive(layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """[N, 1, T, T]: 0 where a token sees a column, the lowest number elsewhere."""
    blank = torch.zeros((), dtype=dtype, device=layout.positions.device)
    return torch.where(layout.visible(), blank, torch.finfo(dtype).min)[:, None]


Verify = Callable[["Problem", str], bool]


def correct(rollout: Rollout, verify: Verify) -> torch.Tensor:
    """1 for each right answer, 0 for others, float32 [N]."""
    owners = [problem for problem in rollout.problems for _ in range(rollout.group_size)]
    right = [float(verify(problem, text)) for problem, text in zip(owners, rollout.texts, strict=True)]
    return torch.tensor(right, device=rollout.ids.device)
