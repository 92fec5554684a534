"""Answers forced at token budgets: one thought, cut at every budget, and some answers from every cut.

A thought ends with its delimiter, the end-of-thinking token, or at the last budget. At a budget that it exceeds it is
cut, and the delimiter is forced. So the reward of an answer says how good the thought is up to there, and costs a few
tokens. Each answer is a branch. For training, a thought and all its branches are one row, in which no token is repeated
but the delimiter:

    columns    prompt | thought           | delimiter answer | delimiter answer | ...
    positions  0 ...  |            ... cut| cut  cut+1 ...   | cut' cut'+1 ...  |
               a branch sees the prompt, the thought up to its own cut, and itself

Otherwise every branch would repeat its thought: m A rows of about half a thought each, for m budgets with A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from common.generation.ledger import Ledger
from common.generation.steps import StepSampler
from common.rl import rewards
from common.rl.experience import Experience
from common.rl.rollout import Layout, Rollout, Verify, log_probs, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem

ROWS = (
    128  # answers in one batch: the caches of many more are new memory each time, which costs as much as the products
)

# (rewards [P, G, m], budgets) -> advantages [P, G, m] of the part of each thought between one budget and the next.
ThoughtEstimator = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
# (rewards [P, G, m, A], cuts int64 [P, G, m]) -> advantages of the answers, of the same shape.
AnswerEstimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Forcing:
    """How answers are forced.

    budgets: tokens of a thought, its delimiter included, rising. answers: A at each. max_answer_tokens, ends: limit of
    an answer, and the tokens that end it. delimiter: the token that ends a thought. cut_off, then: what stands before
    the delimiter where a thought was cut, and after it in every case.
    Raises ValueError, naming the value, for budgets that do not rise and for numbers below 1.
    """

    budgets: tuple[int, ...]
    answers: int
    max_answer_tokens: int
    delimiter: int
    ends: tuple[int, ...]
    cut_off: tuple[int, ...] = ()
    then: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_budgets(self.budgets)
        for name in ("answers", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def check_budgets(budgets: Sequence[int]) -> None:
    """Raises ValueError unless there are budgets, positive and rising."""
    if not budgets or budgets[0] < 1 or any(b <= a for a, b in pairwise(budgets)):
        raise ValueError(f"budgets must be positive and rise, not {list(budgets)}")


@dataclass(frozen=True)
class Branches:
    """N thoughts (`rollout`, finished: by the delimiter) with A answers at each of m budgets.

    cut: int64 [N, m], tokens of the thought within each budget, a delimiter included. forced, answers: token ids that
    were forced and sampled, entry n * m * A + j * A + a for answer a at budget j of thought n. texts: delimiter and
    answer as text. right: float32 [N, m, A].
    """

    rollout: Rollout
    forcing: Forcing
    cut: torch.Tensor
    forced: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    right: torch.Tensor

    @cached_property
    def packed(self) -> Packed:
        return _pack(self)


@dataclass(frozen=True)
class Packed:
    """One row a thought. ids: int64 [N, T]. response: bool [N, T], sampled tokens. layout: their places. segment: int64
    [N, T], for a token of a thought the first budget that has room for it, else -1. answer: int64 [N, T], j * A + a for
    a token of an answer, else -1."""

    ids: torch.Tensor
    response: torch.Tensor
    layout: Layout
    segment: torch.Tensor
    answer: torch.Tensor


def force(
    policy: PreTrainedModel,
    words: PreTrainedTokenizerFast,
    rollout: Rollout,
    forcing: Forcing,
    verify: Verify,
    *,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    step: int = 0,
) -> tuple[Branches, Ledger]:
    """Answers to thoughts at every budget. A draw is a function of (seed, step, thought, budget, answer).

    The texts up to the cuts are read once each, however many answers follow; greedy answers to the same text are one
    piece of work. An answer is judged as the text from the delimiter on.
    """
    cut = torch.minimum(rollout.length.long()[:, None], torch.tensor(forcing.budgets, device=rollout.ids.device))
    kept = _kept(rollout, cut)
    first, many = rollout.response.int().argmax(1).tolist(), forcing.answers
    prompts, forced = [], []
    for n, ids in enumerate(rollout.ids.tolist()):
        for tokens, inside in zip(kept[n].tolist(), cut[n].tolist(), strict=True):
            whole = tokens < inside
            forced.append([*([] if whole else forcing.cut_off), forcing.delimiter, *forcing.then])
            prompts.append(ids[: first[n] + tokens] + forced[-1])
    known: dict[tuple[int, ...], int] = {}
    place = [known.setdefault(tuple(prompt), len(known)) if greedy else i for i, prompt in enumerate(prompts)]
    sampler = StepSampler(
        policy, list(known) if greedy else prompts, step_tokens=(), end_tokens=forcing.ends,
        max_step_tokens=forcing.max_answer_tokens, max_steps=1, temperature=temperature, greedy=greedy, seed=seed,
        algorithm=f"forced answers of step {step}",
    )  # fmt: skip
    roots = [root for root in sampler.roots() for _ in range(1 if greedy else many)]
    size = max(1, ROWS // many) * many
    batches = [range(i, min(i + size, len(roots))) for i in range(0, len(roots), size)]
    found = [sampler.propose([roots[i] for i in batch], [i % many for i in batch]) for batch in batches]
    tokens = [list(state.tokens) for states in found for state in states]
    answers = [tokens[i if greedy else i * many + a] for i in place for a in range(many)]
    texts = words.batch_decode([[forcing.delimiter, *forcing.then, *answer] for answer in answers])
    each = len(forcing.budgets) * many
    owners = [rollout.problems[n // rollout.group_size] for n in range(len(cut)) for _ in range(each)]
    right = [float(verify(problem, text)) for problem, text in zip(owners, texts, strict=True)]
    right_at = torch.tensor(right, device=cut.device).view(len(cut), -1, many)
    before = [tokens for tokens in forced for _ in range(many)]
    return Branches(rollout, forcing, cut, before, answers, texts, right_at), sampler.ledger


def _kept(rollout: Rollout, cut: torch.Tensor) -> torch.Tensor:
    """int64 [N, m]: tokens of the thought before an answer's delimiter; its own delimiter is not one of them."""
    whole = rollout.finished[:, None] & (cut == rollout.length[:, None])
    return cut - whole.long()


def _pack(of: Branches) -> Packed:
    rollout, forcing = of.rollout, of.forcing
    each = len(forcing.budgets) * forcing.answers
    first, length = rollout.response.int().argmax(1).tolist(), rollout.length.long().tolist()
    kept = _kept(rollout, of.cut).repeat_interleave(forcing.answers, dim=1).tolist()
    budgets = torch.tensor(forcing.budgets)
    rows: list[dict[str, list]] = []
    for n, ids in enumerate(rollout.ids.tolist()):
        trunk = first[n] + length[n]
        segments = torch.searchsorted(budgets, torch.arange(1, length[n] + 1)).tolist()
        row: dict[str, list] = {
            "ids": ids[:trunk], "response": [False] * first[n] + [True] * length[n], "positions": list(range(trunk)),
            "start": [0] * trunk, "end": [0] * trunk, "segment": [-1] * first[n] + segments, "answer": [-1] * trunk,
        }  # fmt: skip
        for b in range(each):
            before, answer = of.forced[n * each + b], of.answers[n * each + b]
            begin, at, count = len(row["ids"]), first[n] + kept[n][b], len(before) + len(answer)
            row["ids"] += [*before, *answer]
            row["response"] += [False] * len(before) + [True] * len(answer)
            row["positions"] += range(at, at + count)
            row["start"] += [at] * count
            row["end"] += [begin] * count
            row["segment"] += [-1] * count
            row["answer"] += [-1] * len(before) + [b] * len(answer)
        rows.append(row)
    device = rollout.ids.device
    fill = {"segment": -1, "answer": -1}
    of_all = {name: _stacked([row[name] for row in rows], fill.get(name, 0)).to(device) for name in rows[0]}
    layout = Layout(of_all["positions"], torch.stack([of_all["start"], of_all["end"]], dim=-1))
    return Packed(of_all["ids"], of_all["response"].bool(), layout, of_all["segment"], of_all["answer"])


def _stacked(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """int64 [N, longest], filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*map(int, row), *[fill] * (longest - len(row))] for row in rows])


@dataclass(frozen=True)
class Branched:
    """Experience of thoughts with forced answers; called with (policy, step), as `experience.Grouped` is.

    terms: the reward of an answer, by its thought (whose length counts) and whether it is right. A thought's reward at
    a budget is the mean over the answers there.
    """

    words: PreTrainedTokenizerFast
    problems_at: Callable[[int], Sequence[Problem]]
    verify: Verify
    group_size: int
    forcing: Forcing
    estimator: ThoughtEstimator
    answer_estimator: AnswerEstimator
    terms: dict[str, rewards.Weighted]
    temperature: float = 1.0
    seed: int = 0
    seen: Callable[[Branches, torch.Tensor, torch.Tensor], None] | None = None

    def __call__(self, policy: PreTrainedModel, step: int) -> Experience:
        forcing = self.forcing
        rollout, ledger = sample(
            policy, self.words, self.problems_at(step), self.group_size, forcing.budgets[-1],
            stop_tokens=[forcing.delimiter], temperature=self.temperature, seed=self.seed, step=step, score=False,
        )  # fmt: skip
        branches, forced = force(
            policy, self.words, rollout, forcing, self.verify, temperature=self.temperature, seed=self.seed, step=step
        )
        right = branches.right
        reward = torch.stack(
            [rewards.total(self.terms, rollout, one, policy, step)[0] for one in right.flatten(1).unbind(1)], dim=1
        ).view_as(right)
        grouped = reward.view(-1, self.group_size, *right.shape[1:])
        cuts = branches.cut.view(grouped.shape[:3])
        thought = self.estimator(grouped.mean(-1), forcing.budgets).flatten(0, 1)
        answer = self.answer_estimator(grouped, cuts).flatten(0, 1).flatten(1)
        of = branches.packed
        with torch.no_grad():
            logp, _ = log_probs(policy, of.ids, of.response, self.temperature, of.layout)
        advantage = (of.segment >= 0) * thought.gather(1, of.segment.clamp(min=0))
        advantage = advantage + (of.answer >= 0) * answer.gather(1, of.answer.clamp(min=0))
        if self.seen is not None:
            self.seen(branches, reward, advantage)
        every = grouped.flatten(1)  # rewards of a group
        stats = {
            "reward": float(reward.mean()), "accuracy": float(right[:, -1].mean()),
            "anytime": float(right.mean()), "length_mean": float(rollout.length.mean()),
            "length_p90": float(rollout.length.quantile(0.9)), "finished": float(rollout.finished.float().mean()),
            "frac_zero_adv_groups": float((every.amax(1) == every.amin(1)).float().mean()),
        }  # fmt: skip
        ledger.add(**vars(forced))
        kept = torch.ones(len(of.ids), dtype=torch.bool, device=of.ids.device)
        return Experience(
            of.ids, of.response, of.response, logp, advantage, kept, right[:, -1].mean(-1), stats, ledger,
            layout=of.layout,
        )  # fmt: skip
