"""A task, a policy and a reward model, ready for search: what papers that search at inference time start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.generation.ledger import Ledger
from common.generation.steps import State, StepSampler, needs_transformers
from common.reasoners import policies
from common.search.core import Propose, Score, SearchResult
from common.search.judge import StepJudge
from common.search.score import RewardModel
from common.tasks.registry import PROGRAMS, Task, task
from common.tasks.sandbox import check_allowed

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem

# Tokens of a step, steps of an answer. A program is one step: it may hold blank lines, and no part of it can be judged.
STEP_LIMITS = {"chain": (12, 24), "countdown": (16, 12), "math500": (1024, 40), "humaneval": (1024, 1)}
TASKS = tuple(STEP_LIMITS)
# What a chat model of the hub is told.
STEP_BY_STEP = (
    "Solve the problem step by step. Put a blank line after every step. End with the final answer in \\boxed{}."
)
AS_PROGRAM = "Complete the Python function. Answer with the whole function in one block of code."
ROWS = (
    256  # partial answers in one batch: on one core 2.1 times as fast as 1024, whose caches are new memory at each fork
)

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
    """Problems of one task with the models that work on them.

    task: its name, and rules: how it is judged. words: the policy's tokenizer. prompts: token ids. step_ends,
    answer_ends: ids of tokens. judge: makes the scorer of the reward model; None: there is none.
    """

    task: str
    rules: Task
    problems: list[Problem]
    policy: PreTrainedModel
    words: PreTrainedTokenizerFast
    prompts: list[list[int]]
    step_ends: list[int]
    answer_ends: list[int]
    judge: Callable[[], RewardModel | StepJudge] | None = None

    def sampler(self, seed: int, stream: str, **settings: Any) -> StepSampler:
        """settings: temperature, top_p, greedy, ... of StepSampler."""
        longest, most = STEP_LIMITS[self.task]
        return StepSampler(
            self.policy, self.prompts, step_tokens=self.step_ends, end_tokens=self.answer_ends,
            max_step_tokens=longest, max_steps=most, seed=seed, algorithm=stream, **settings,
        )  # fmt: skip

    def scorer(self) -> RewardModel | StepJudge:
        """The reward model on this task's prompts. Raises ValueError without one."""
        if self.judge is None:
            raise ValueError(f"no reward model was given for {self.task}")
        return self.judge()

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
        own = self.scorer() if score is None and self.judge is not None else None
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
        return self.words.decode(list(state.tokens), skip_special_tokens=True)

    def answer(self, state: State) -> str | None:
        """The canonical answer of a state, for votes; None if it is not finished."""
        return self.rules.result(self.problems[state.problem], self.text(state))

    def correct(self, state: State | None) -> bool:
        """Whether a state is a right, finished answer; an abstention is wrong."""
        return state is not None and self.rules.verify(self.problems[state.problem], self.text(state))

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
    name: str,
    count: int,
    *,
    size: str = "base",
    weights: str | None = None,
    reward: str | None = "prm",
    split: str = "test",
) -> Workbench:
    """The hard problems of a task with a shared policy and reward model of the profile.

    name: one of TASKS. size: small, base or large. weights: what was kept of it: final, chain_hard, chain_strong or
    countdown; None is the one of the task. reward: prm, orm or None. split: test; 'warmup' for choices that must not
    look at it. Where the shared stages only recorded checkpoints of the hub (profile=paper), these are loaded.
    Before it loads a model it raises ValueError for an unknown task, one that the models cannot do, no problems and
    a back end other than transformers, and CodeExecutionNotAllowed for programs without cfg.allow_code_execution.
    """
    from common.models.hub import load_model
    from common.models.reward import load_reward_model

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    if count < 1:
        raise ValueError(f"{name} needs at least 1 problem, not {count}")
    needs_transformers(cfg.backend, "search")
    if name in PROGRAMS:
        check_allowed(cfg.allow_code_execution)
    folder = Path(cfg.reasoners)
    if (folder / f"reasoner_{size}" / "model.json").exists():
        return _from_hub(cfg, name, count, _hub_id(folder / f"reasoner_{size}"), reward and _hub_id(folder / reward))
    if name not in policies.VERIFY:
        known = " and ".join(policies.VERIFY)
        raise ValueError(f"the models of profile {cfg.profile} cannot do {name}; they do {known}")
    problems, words = _hard_problems(cfg, name, count, size, split), policies.tokenizer()
    prompts = words([problem.prompt for problem in problems])["input_ids"]
    weights = weights or {"chain": "chain_hard", "countdown": "countdown"}[name]
    policy = load_model(folder / f"reasoner_{size}" / weights).to(cfg.device)
    judge = load_reward_model(folder / reward / name).to(cfg.device) if reward else None
    *step_ends, answer_end = (words.convert_tokens_to_ids(end) for end in (*policies.STEP_ENDS, policies.ANSWER_END))
    return Workbench(
        name, task(name), problems, policy, words, prompts, step_ends, [answer_end],
        None if judge is None else lambda: RewardModel(judge, prompts),
    )  # fmt: skip


def _hard_problems(cfg: DictConfig, name: str, count: int, size: str, split: str) -> list[Problem]:
    """The problems that the policy was judged on, by the settings that its stage recorded (a paper's have no such)."""
    from omegaconf import OmegaConf

    stage = f"reasoner_{size}"
    hard = json.loads((Path(cfg.reasoners) / stage / "hard.json").read_text())
    settings = {"seed": cfg.seed, "stage": stage, "styles": {}} | {task: {"hard": hard[task]} for task in hard}
    return policies.problems(OmegaConf.create(settings), f"{name}_hard", split, count)


def _hub_id(folder: Path) -> str:
    return json.loads((folder / "model.json").read_text())["hub_id"]


def _from_hub(cfg: DictConfig, name: str, count: int, policy_id: str, reward_id: str | None) -> Workbench:
    """A chat model that solves a benchmark's problems, in steps that end with a blank line (a program is one step), and
    another as judge."""
    import torch

    from common.models.hub import load_model, load_tokenizer

    dtype = torch.bfloat16 if str(cfg.device).startswith("cuda") else torch.float32
    rules = task(name, data_root=cfg.data_root, network=cfg.network, allow_code_execution=cfg.allow_code_execution)
    problems = rules.generate(cfg.seed, count)
    words = load_tokenizer(policy_id, network=cfg.network)
    policy = load_model(policy_id, dtype=dtype, network=cfg.network).to(cfg.device)
    told = AS_PROGRAM if name in PROGRAMS else STEP_BY_STEP
    prompts = [
        words.apply_chat_template(
            [{"role": "system", "content": told}, {"role": "user", "content": problem.prompt}],
            add_generation_prompt=True, return_dict=False,
        )
        for problem in problems
    ]  # fmt: skip
    ends = policy.generation_config.eos_token_id
    step_ends = [] if name in PROGRAMS else _blank_lines(words, policy_id)
    judge = None
    if reward_id:
        model = load_model(reward_id, dtype=dtype, network=cfg.network).to(cfg.device)
        own, questions = load_tokenizer(reward_id, network=cfg.network), [problem.prompt for problem in problems]

        def judge() -> StepJudge:
            return StepJudge(model, own, questions, words.decode)

    return Workbench(
        name, rules, problems, policy, words, prompts, step_ends, [ends] if isinstance(ends, int) else list(ends), judge
    )


def _blank_lines(words: PreTrainedTokenizerFast, policy_id: str) -> list[int]:
    """Ids of the tokens that hold a blank line."""
    ids = [i for i, text in enumerate(words.batch_decode([[i] for i in range(len(words))])) if "\n\n" in text]
    if not ids:
        raise ValueError(f"the tokenizer of {policy_id} has no token with a blank line, so steps cannot be told apart")
    return ids


def gate(cfg: DictConfig, size: str, weights: str) -> str | None:
    """Why a policy cannot carry a comparison (its accuracy on the hard split missed the wanted range), or None.

    Checkpoints of the hub have no gate.
    """
    folder = Path(cfg.reasoners) / f"reasoner_{size}"
    if (folder / "model.json").exists():
        return None
    kept = json.loads((folder / "metrics.json").read_text())[weights]
    if kept["inside"]:
        return None
    measure = "greedy" if "greedy" in kept else "sampled"
    low, high = kept["range"]
    return f"gate: {measure} accuracy of {size}/{weights} measured {kept[measure]:.3f}, needed {low} to {high}"


def reward_gate(cfg: DictConfig, task: str, reward: str = "prm") -> str | None:
    """Why a reward model cannot guide a search on a task (it hardly ranks the answers to one problem, or too few were
    ranked to tell it from a coin), or None."""
    folder = Path(cfg.reasoners) / reward
    if (folder / "model.json").exists():
        return None
    metrics = json.loads((folder / "metrics.json").read_text())
    name = f"{task} auroc within a problem"
    share, low, needed = metrics[name], metrics[f"{name}, low"], metrics[f"{task} needed"]
    if share >= needed and low > 0.5:
        return None
    return (
        f"gate: AUROC of {reward} within a problem measured {share:.3f} on {task}, needed {needed} with a 95% interval "
        f"above 0.5 (it begins at {low:.3f})"
    )
