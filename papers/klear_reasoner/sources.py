"""Supervised data of known quality: traces of chains from sources that make mistakes, and the students of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from common.reasoners import policies
from common.tasks import chain

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.tasks.problem import Problem

# From the best to the worst, as the paper orders its sources; "k best sources" are the first k in equal parts.
SOURCES: dict[str, dict[str, Any]] = {
    "clean": {},
    "long strides": {"strides": (0.5, 0.3, 0.2)},
    "2% wrong": {"wrong": 0.02},
    "8% wrong": {"wrong": 0.08},
    "20% wrong": {"wrong": 0.2},
    "operations out of order": {"shuffled": True},
}


def traces(
    seed: int,
    count: int,
    steps: tuple[int, int],
    *,
    wrong: float = 0.0,
    shuffled: bool = False,
    strides: tuple[float, float, float] = (1.0, 0.0, 0.0),
) -> list[Problem]:
    """Problems whose gold answer is replaced by what a source of that quality writes.

    wrong: share of traces in which one value is wrong; what follows is computed from it, so that the answer is wrong
    too, unless a product forgets the mistake. shuffled: the operations stand in another order: the answer is that of
    another problem. strides: see `chain.Style`.
    """
    random = Random(f"{seed}/klear_reasoner")
    style = chain.Style(strides=strides)
    return [
        _shuffled(problem, random) if shuffled else _mistaken(problem, random) if random.random() < wrong else problem
        for problem in chain.generate(seed, count, steps, style=style)
    ]


def _rewritten(
    problem: Problem, operations: list[tuple[str, str, int]], mistake: int | None, random: Random
) -> Problem:
    """With a trace of one segment an operation, a wrong value at one of them."""
    value, segments = int(problem.prompt[0]), []
    for i, (label, operator, operand) in enumerate(operations):
        value = chain.apply(value, operator, operand)
        if i == mistake:
            value = (value + random.randint(1, 9)) % 10
        segments.append(f"{label}{operator}{operand}={value}")
    return replace(problem, answer=",".join(segments) + f",{chain.THINK_END}{value}{chain.END}")


def _operations(problem: Problem) -> list[tuple[str, str, int]]:
    """(label, operator, operand) of a labelled prompt such as 3A+4B*2=."""
    body = problem.prompt[1:].rstrip("=")
    return [(body[i], body[i + 1], int(body[i + 2])) for i in range(0, len(body), 3)]


def _mistaken(problem: Problem, random: Random) -> Problem:
    operations = _operations(problem)
    return _rewritten(problem, operations, random.randrange(len(operations)), random)


def _shuffled(problem: Problem, random: Random) -> Problem:
    operations = _operations(problem)
    return _rewritten(problem, random.sample(operations, len(operations)), None, random)


def mixture_of(cfg: DictConfig, arm: str, seed: int) -> list[Problem]:
    """The training traces of a student. arm: 'top k', 'teacher p' or '<easy|hard|overall> p', p a share of
    wrong traces."""
    own, base = cfg.students, cfg.seed + 100 * (seed + 1)
    kind, _, value = arm.rpartition(" ")
    if kind == "top":
        names = list(SOURCES)[: int(value)]
        share = own.traces // len(names)
        steps = tuple(own.steps)
        return [p for i, n in enumerate(names) for p in traces(base + i, share, steps, **SOURCES[n])]
    return traces(base, own.traces, tuple(own.steps if kind == "teacher" else own[kind]), wrong=float(value))


def train_student(job: tuple[DictConfig, str, int]) -> list[dict[str, Any]]:
    """Trains one student on a mixture and returns its greedy accuracy on each held-out problem."""
    from common.models.hub import load_model
    from common.models.tokenizer import encode
    from common.rl.ground import ground
    from common.rl.outcomes import answer_rows
    from common.training.checkpoint import checkpoint_folder
    from common.training.data import Example, bucketed, mixture
    from common.training.loop import TrainConfig, train

    cfg, arm, seed = job
    own, words = cfg.students, policies.tokenizer()
    origin = Path(cfg.reasoners) / own.start
    model = load_model(origin, attention="eager").to(cfg.device)
    data = mixture_of(cfg, arm, seed)
    prompts, answers = (encode(words, [getattr(p, name) for p in data]) for name in ("prompt", "answer"))
    examples = [Example([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)]
    config = TrainConfig(steps=own.train_steps, learning_rate=own.learning_rate, warmup_steps=10, seed=seed, shards=1)
    settings = [arm, seed, cfg.seed, dict(own)]
    folder = checkpoint_folder(cfg.checkpoints, f"student {arm} {seed}", str(settings), [origin])
    train(model, mixture(bucketed(examples, own.rows, seed=seed)), config, checkpoints=folder, title=arm)
    test = chain.generate(cfg.seed, own.problems, tuple(own.steps), "test", style="concise")
    rows = answer_rows(ground(cfg, cfg.rl, origin), model, test, own.max_new_tokens, 1, cfg.seed, greedy=True)
    return [{"arm": arm, "seed": seed, "problem": r["problem_id"], "correct": r["correct"]} for r in rows]
