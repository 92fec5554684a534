"""A task, a policy and a reward model, ready for search: what papers that search at inference time start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.generation.ledger import Ledger
from common.generation.steps import State, StepSampler
from common.reasoners import policies
from common.search.core import Propose, Score, SearchResult
from common.search.score import RewardModel
from common.tasks import chain, countdown

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from common.tasks.problem import Problem

TASKS = ("chain", "countdown")
RESULT_OF = {"chain": chain.result_of, "countdown": countdown.result_of}
STEP_LIMITS = {"chain": (12, 24), "countdown": (16, 12)}  # tokens of a step, steps of an answer
ROWS = 1024  # partial answers in one batch: more is hardly faster, and the cache grows

Algorithm = Callable[[Sequence[int], Propose, Score], SearchResult]


@dataclass
class Outcome:
    """What an algorithm chose, had at the end and paid for each problem, and what the models computed in all."""

    best: list[State | None]
    pool: list[list[State]]
    tokens: list[int]  # generated for the problem, those of dropped branches too
    passes: list[int]  # prefixes that the reward model scored
    trace: list[list[dict]]
    policy: Ledger = field(default_factory=Ledger)
    reward: Ledger = field(default_factory=Ledger)


@dataclass
class Workbench:
    """Hard problems of one task with the models that work on them. task: one of TASKS."""

    task: str
    problems: list[Problem]
    policy: PreTrainedModel
    reward: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        self.words = policies.tokenizer()
        self.prompts = self.words([problem.prompt for problem in self.problems])["input_ids"]

    def sampler(self, seed: int, stream: str, **settings: Any) -> StepSampler:
        """Steps end at ',', answers at '$'. settings: temperature, top_p, greedy, ... of StepSampler."""
        longest, most = STEP_LIMITS[self.task]
        ends = [self.words.convert_tokens_to_ids(end) for end in (*policies.STEP_ENDS, policies.ANSWER_END)]
        return StepSampler(
            self.policy, self.prompts, step_tokens=ends[:-1], end_tokens=ends[-1:], max_step_tokens=longest,
            max_steps=most, seed=seed, algorithm=stream, **settings,
        )  # fmt: skip

    def scorer(self) -> RewardModel:
        """The reward model on this task's prompts. Raises ValueError without one."""
        if self.reward is None:
            raise ValueError(f"no reward model was given for {self.task}")
        return RewardModel(self.reward, self.prompts)

    def run(
        self,
        algorithm: Algorithm,
        *,
        seed: int,
        stream: str,
        width: int,
        score: Score | None = None,
        **settings: Any,
    ) -> Outcome:
        """All problems through an algorithm, in batches of about ROWS partial answers.

        algorithm: (problems, propose, score) -> SearchResult. width: partial answers of a problem at one time. stream:
        names the random streams. score: another scorer than the reward model. settings: of the sampler.
        """
        sampler = self.sampler(seed, stream, **settings)
        own = self.scorer() if score is None and self.reward is not None else None
        out = Outcome([], [], [], [], [], sampler.ledger, own.ledger if own else Ledger())
        size = max(1, ROWS // width)
        for start in range(0, len(self.problems), size):
            chunk = range(start, min(start + size, len(self.problems)))
            result = algorithm(chunk, sampler.propose, score or own or _no_score)
            out.best += result.best
            out.pool += result.pool
            out.tokens += [cost.tokens for cost in result.cost]
            out.passes += [cost.passes for cost in result.cost]
            out.trace += result.trace
        return out

    def text(self, state: State) -> str:
        return self.words.decode(list(state.tokens))

    def answer(self, state: State) -> str | None:
        """The canonical answer of a state, for votes; None if it is not finished."""
        return RESULT_OF[self.task](self.text(state))

    def correct(self, state: State | None) -> bool:
        """Whether a state is a right, finished answer; an abstention is wrong."""
        return state is not None and policies.VERIFY[self.task](self.problems[state.problem], self.text(state))

    def records(self, outcome: Outcome, *, samples: bool = False) -> list[dict[str, Any]]:
        """Rows for common.generation.records, without the columns that are the same in all: one for the chosen answer
        of each problem, or (samples) one for every answer of its pool."""
        rows = []
        for problem, (best, pool) in enumerate(zip(outcome.best, outcome.pool, strict=True)):
            states = pool if samples else [best]
            spent = outcome.tokens[problem] / sum(outcome.tokens)  # of the models' work
            kept = sum(len(state.tokens) for state in states if state)
            for i, state in enumerate(states):
                rows.append(
                    {
                        "problem_id": problem, "sample_id": i, "difficulty": self.problems[problem].difficulty,
                        "prompt_tokens": len(self.prompts[problem]),
                        "output_tokens": len(state.tokens) if state else 0,
                        "discarded_tokens": outcome.tokens[problem] - kept if i == 0 else 0,
                        "forwards": outcome.policy.forwards * spent / len(states),
                        "flops": (outcome.policy.flops + outcome.reward.flops) * spent / len(states),
                        "seconds": (outcome.policy.seconds + outcome.reward.seconds) * spent / len(states),
                        "answer": self.answer(state) if state else None, "correct": self.correct(state),
                        "score": state.scores[-1] if state and state.scores else float("nan"),
                    }
                )  # fmt: skip
        return rows


def _no_score(states: Sequence[State]) -> Any:
    raise ValueError("this algorithm scores partial answers, and no reward model was given")


def load(
    cfg: DictConfig,
    task: str,
    count: int,
    *,
    size: str = "base",
    weights: str | None = None,
    reward: str | None = "prm",
    split: str = "test",
) -> Workbench:
    """The hard problems of a task with a shared policy and reward model of the profile.

    size: small, base or large. weights: what was kept of it: final, chain_hard, chain_strong or countdown; None is the
    one of the task. reward: prm, orm or None. split: test; 'warmup' for choices that must not look at it.
    Raises ValueError for an unknown task.
    """
    from common.models.hub import load_model
    from common.models.reward import load_reward_model

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    folder = Path(cfg.reasoners)
    weights = weights or {"chain": "chain_hard", "countdown": "countdown"}[task]
    problems = json.loads((folder / f"reasoner_{size}" / "hard.json").read_text())[task]
    make = {
        "chain": lambda: chain.generate(cfg.seed, count, tuple(problems), split, style="concise"),
        "countdown": lambda: countdown.generate(cfg.seed, count, problems, split),
    }[task]
    model = load_model(folder / f"reasoner_{size}" / weights).to(cfg.device)
    judge = load_reward_model(folder / reward).to(cfg.device) if reward else None
    return Workbench(task, make(), model, judge)


def gate(cfg: DictConfig, size: str, weights: str) -> str | None:
    """Why a policy cannot carry a comparison (its accuracy on the hard split missed the wanted range), or None."""
    kept = json.loads((Path(cfg.reasoners) / f"reasoner_{size}" / "metrics.json").read_text())[weights]
    if kept["inside"]:
        return None
    measure = "greedy" if "greedy" in kept else "sampled"
    low, high = kept["range"]
    return f"gate: {measure} accuracy of {size}/{weights} measured {kept[measure]:.3f}, needed {low} to {high}"
