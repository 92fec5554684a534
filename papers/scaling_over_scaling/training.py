"""The rethinking models: a shared reasoner that learns to answer again after its own last answer.

A row is last answer, `?`, problem, new answer; only the new answer has a loss. Last answers are samples of the reasoner
itself, most of them wrong; the new one is the problem's gold reasoning, but a last answer that is right is kept.
A share of the rows is a problem and its first answer alone, so that the model does not forget how to begin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem
    from common.training.data import Example

AGAIN = "?"  # between an answer and the next attempt


def train_one(job: tuple[DictConfig, str]) -> dict[str, Any]:
    """(configuration, name) -> a row of metrics; writes the model in hub format to <out>/<name>."""
    from common.models.hub import load_model, save_model
    from common.reasoners import policies
    from common.training.checkpoint import checkpoint_folder
    from common.training.data import bucketed, mixture
    from common.training.loop import TrainConfig
    from common.training.loop import train as fit

    cfg, name = job
    own, words = cfg.rethink[name], policies.tokenizer()
    start = Path(cfg.reasoners) / own.start
    model = load_model(start, attention="eager").to(cfg.device)
    problems = _problems(name, own, cfg.seed)
    last = previous_answers(cfg, name, model, words, problems)
    finished = [(problem, text) for problem, text in zip(problems, last, strict=True) if policies.ANSWER_END in text]
    right = sum(policies.VERIFY[name](problem, text) for problem, text in finished)
    again = [example(words, problem, text, policies.VERIFY[name]) for problem, text in finished]
    plain = [example(words, problem) for problem in problems]
    few = max(1, round(cfg.training.plain * own.rows))
    config = TrainConfig(
        steps=own.steps, learning_rate=cfg.training.learning_rate, warmup_steps=cfg.training.warmup_steps, shards=1,
        seed=cfg.seed,
    )  # fmt: skip
    rows = min(own.rows - few, len(again))
    sources = [bucketed(plain, few, seed=cfg.seed + 1)]
    sources += (
        [bucketed(again, rows, seed=cfg.seed)] if rows else []
    )  # a model that finishes nothing has no last answer
    settings = [name, {k: str(own[k]) for k in own}, {k: cfg.training[k] for k in cfg.training}, cfg.seed]
    folder = checkpoint_folder(cfg.checkpoints, name, settings, [start])
    state = fit(model, mixture(*sources), config, checkpoints=folder, title=name)
    save_model(model.cpu(), Path(cfg.out) / name)
    words.save_pretrained(Path(cfg.out) / name)
    return {
        "model": name, "steps": state.step, "tokens": state.tokens, "problems": len(problems),
        "last answers finished": len(finished) / len(problems), "last answers right": right / len(problems),
        "loss": state.history[-1]["train_loss"],
    }  # fmt: skip


def _problems(name: str, own: DictConfig, seed: int) -> list[Problem]:
    """As the shared reasoners were trained on, of the same split."""
    from common.tasks import chain, countdown

    low, high = own.difficulty
    if name == "chain":
        return chain.generate(seed, own.problems, (low, high), "train", style=chain.Style())
    return countdown.generate(seed, own.problems, (low, high), "train")


def previous_answers(
    cfg: DictConfig, name: str, model: PreTrainedModel, words: PreTrainedTokenizerFast, problems: list[Problem]
) -> list[str]:
    """One sampled answer of a model to each problem."""
    from common.generation.random import name_key
    from common.generation.sampler import generate
    from common.reasoners import policies

    end, texts = words.convert_tokens_to_ids(policies.ANSWER_END), []
    seed = name_key(f"{cfg.seed} last answers")
    order = sorted(range(len(problems)), key=lambda i: problems[i].difficulty)  # batches of like lengths
    for start in range(0, len(order), cfg.rows):
        part = order[start : start + cfg.rows]
        out = generate(
            model, words([problems[i].prompt for i in part])["input_ids"], policies.LONGEST_ANSWER[name],
            do_sample=True, temperature=cfg.temperature, seed=seed, streams=part, stop_tokens=[end],
        )  # fmt: skip
        texts += words.batch_decode(out.tokens)
    return [text for _, text in sorted(zip(order, texts, strict=True))]


def example(
    words: PreTrainedTokenizerFast,
    problem: Problem,
    last: str | None = None,
    verify: Callable[[Problem, str], bool] | None = None,
) -> Example:
    """A training row: a problem and its gold answer; with a last answer, that and `?` in front. A last answer that
    `verify` takes is its own next answer."""
    from common.training.data import Example

    before = problem.prompt if last is None else f"{last}{AGAIN}{problem.prompt}"
    after = last if last is not None and verify is not None and verify(problem, last) else problem.answer
    prompt, answer = (words(text)["input_ids"] for text in (before, after))
    return Example([*prompt, *answer], len(prompt))
