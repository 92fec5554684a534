"""Answers of known kind to chains, and the start policy that also knows answers without a question."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from common.reasoners import policies
from common.tasks import chain

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from common.rl.rewards import Term
    from common.tasks.problem import Problem

BLANK = "="  # what is left of a prompt without its question
KINDS = ("concise", "padded", "verified", "last step wrong", "all steps wrong", "of another problem")


def blank_ids() -> list[int]:
    return policies.tokenizer().encode(BLANK)


def self_aligned_term(checkpoint: str | None = None, told: str = "", network: bool = False) -> Term:
    """The paper's reward. checkpoint: of the hub, whose blank prompt is its chat format with an empty question and what
    it is `told`; None is the blank prompt of chains."""
    from common.models.hub import load_tokenizer
    from common.rl.ground import asked
    from papers.self_aligned_reward.method import self_aligned

    if checkpoint is None:
        return self_aligned(blank_ids())
    words = load_tokenizer(checkpoint, network=network)
    return self_aligned(words.encode(asked(words, told, ""), add_special_tokens=False))


def of_kinds(seed: int, count: int, steps: tuple[int, int]) -> tuple[list[Problem], dict[str, list[str]]]:
    """Held-out problems, and an answer of each of KINDS to each.

    'of another problem' is a concise right answer to a problem of the same length. In 'last step wrong' the last value
    (and so the result) is wrong, in 'all steps wrong' every value; the operations are copied from the question in both.
    """
    random = Random(f"{seed}/self_aligned_reward")
    problems = chain.generate(seed, count, steps, "test", style="concise")
    styled = {
        "padded": chain.generate(seed, count, steps, "test", style="padded"),
        "verified": chain.generate(seed, count, steps, "test", style="verified"),
    }
    kinds: dict[str, list[str]] = {"concise": [p.answer for p in problems]}
    for kind, same in styled.items():
        by_prompt = {p.prompt: p.answer for p in same}
        kinds[kind] = [by_prompt.get(p.prompt) or _restyled(p.answer, kind) for p in problems]
    kinds["last step wrong"] = [_mistaken(p.answer, random, only_last=True) for p in problems]
    kinds["all steps wrong"] = [_mistaken(p.answer, random, only_last=False) for p in problems]
    by_length: dict[int, list[str]] = {}
    for p in problems:
        by_length.setdefault(p.difficulty, []).append(p.answer)
    kinds["of another problem"] = [
        next(
            (a for a in random.sample(by_length[p.difficulty], len(by_length[p.difficulty])) if a != p.answer), p.answer
        )
        for p in problems
    ]
    return problems, kinds


def _segments(answer: str) -> tuple[list[str], str]:
    """The segments of a concise answer, and its end, such as '#7$'."""
    *segments, end = answer.split(",")
    return segments, end


def _restyled(answer: str, kind: str) -> str:
    segments, end = _segments(answer)
    if kind == "padded":
        segments = [segment + chain.FILLER for segment in segments]
    else:
        segments = [f"{segment}{chain.CHECK}={segment[-1]}" for segment in segments]
    return ",".join([*segments, end])


def _mistaken(answer: str, random: Random, *, only_last: bool) -> str:
    segments, _ = _segments(answer)
    first = len(segments) - 1 if only_last else 0
    for i in range(first, len(segments)):
        value = (int(segments[i][-1]) + random.randint(1, 9)) % 10
        segments[i] = segments[i][:-1] + str(value)
    return ",".join([*segments, f"{chain.THINK_END}{segments[-1][-1]}{chain.END}"])


def train_start(cfg: DictConfig) -> PreTrainedModel:
    """The shared start, taught on that some answers have no question: a share of rows has the blank prompt.

    Without such rows ppl(a) would be a number for a text that the model never saw; language models of the hub have seen
    answers without questions.
    """
    from common.models.hub import load_model
    from common.models.tokenizer import encode
    from common.training.checkpoint import checkpoint_folder
    from common.training.data import Example, bucketed, mixture
    from common.training.loop import TrainConfig, train

    own, words = cfg.blank, policies.tokenizer()
    origin = Path(cfg.reasoners) / cfg.rl.start
    model = load_model(origin, attention="eager").to(cfg.device)
    style = chain.Style(**{k: tuple(v) if k == "strides" else v for k, v in dict(own.style).items()})
    data = chain.generate(cfg.seed, own.problems, tuple(cfg.rl.task.steps), style=style)
    every = round(1 / own.share)
    data = [replace(p, prompt=BLANK) if i % every == 0 else p for i, p in enumerate(data)]
    prompts, answers = (encode(words, [getattr(p, name) for p in data]) for name in ("prompt", "answer"))
    examples = [Example([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)]
    config = TrainConfig(steps=own.steps, learning_rate=own.learning_rate, warmup_steps=10, seed=cfg.seed)
    settings = [own.steps, own.share, own.learning_rate, own.rows, own.problems, str(own.style), cfg.seed]
    folder = checkpoint_folder(cfg.checkpoints, "start", settings, [origin])
    train(model, mixture(bucketed(examples, own.rows, seed=cfg.seed)), config, checkpoints=folder, title="start")
    return model
